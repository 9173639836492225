"""Images that nibabel opened, whose values nibabel itself is the judge of."""

import gzip
import io
import time
from concurrent.futures import ThreadPoolExecutor

import nibabel
import numpy as np
import pytest
from nibabel.arrayproxy import ArrayProxy
from scan_files import make_hu

from medct import VolumeError, read_volume

ARRAY = make_hu((5, 6, 7))
AFFINE = np.diag([-0.7, -0.8, 2.5, 1])
AFNI = {
    "DATASET_RANK": ("integer", "3 1 0 0 0 0 0 0"),
    "DATASET_DIMENSIONS": ("integer", "5 6 7 0 0"),
    "TYPESTRING": ("string", "3DIM_HEAD_ANAT"),
    "SCENE_DATA": ("integer", "0 0 0 -999 -999 -999 -999 -999"),
    "ORIENT_SPECIFIC": ("integer", "0 3 4"),
    "ORIGIN": ("float", "0 0 0"),
    "DELTA": ("float", "0.7 0.8 2.5"),
    "BRICK_TYPES": ("integer", "1"),
    "BYTEORDER_STRING": ("string", "LSB_FIRST"),
    "TEMPLATE_SPACE": ("string", "ORIG"),
    "IJK_TO_DICOM_REAL": ("float", "0.7 0 0 0 0 0.8 0 0 0 0 2.5 0"),
}


def afni(folder, factor: float):
    fields = AFNI | {"BRICK_FLOAT_FACS": ("float", str(factor))}
    text = ""
    for name, (kind, value) in fields.items():
        count = len(value) + 1 if kind == "string" else len(value.split())
        value = f"'{value}~" if kind == "string" else value
        text += f"\ntype = {kind}-attribute\nname = {name}\ncount = {count}\n{value}\n"
    (folder / "scan+orig.HEAD").write_text(text)
    (folder / "scan+orig.BRIK").write_bytes(ARRAY.astype("<i2").tobytes(order="F"))
    return nibabel.load(folder / "scan+orig.HEAD")


class Doubled(ArrayProxy):
    """A proxy with a scale that its slope does not tell."""

    def __array__(self, dtype=None):
        return 2 * np.asarray(self.get_unscaled(), dtype)


class Dark:
    """A proxy that only gives scaled values."""

    is_proxy, shape, ndim, dtype = True, ARRAY.shape, 3, ARRAY.dtype

    def __array__(self, dtype=None):
        return ARRAY * 2

    def __getitem__(self, key):
        return np.asarray(self)[key]


def doubled(folder):
    nibabel.Nifti1Image(ARRAY, AFFINE).to_filename(folder / "scan.nii")
    spec = (ARRAY.shape, np.dtype("<i2"), 352, 1, 0)
    return nibabel.Nifti1Image(Doubled(str(folder / "scan.nii"), spec), AFFINE)


def plain(folder, slope: float, intercept: float):
    image = nibabel.Nifti1Image(ARRAY, AFFINE)
    image.header.set_slope_inter(slope, intercept)
    image.to_filename(folder / "scan.nii.gz")
    return nibabel.load(folder / "scan.nii.gz")


def mgh(folder):
    nibabel.MGHImage(ARRAY, AFFINE.astype(np.float32)).to_filename(folder / "scan.mgz")
    return nibabel.load(folder / "scan.mgz")


IMAGES = {
    "in memory": (lambda folder: nibabel.Nifti1Image(ARRAY, AFFINE), False),
    "file": (lambda folder: plain(folder, 1, 0), False),
    "file with a scale": (lambda folder: plain(folder, 2, -24), True),
    "slices of it, an array": (lambda folder: plain(folder, 2, -24).slicer[1:, ::-1, :-2], False),
    "MGH": (mgh, False),
    "AFNI": (lambda folder: afni(folder, 0), False),
    "AFNI with a factor": (lambda folder: afni(folder, 0.5), True),
    "subclass": (doubled, True),
    "scaled only": (lambda folder: nibabel.Nifti1Image(Dark(), AFFINE), True),
}


@pytest.mark.filterwarnings("ignore:.*holds no air")  # at half their values
@pytest.mark.parametrize("case", IMAGES)
def test_an_image_has_the_values_that_nibabel_gives_it(case, tmp_path):
    make, is_scaled = IMAGES[case]
    image = make(tmp_path)
    expected = np.asanyarray(image.dataobj).reshape(image.shape[:3])
    volume = read_volume(image)
    np.testing.assert_allclose(volume.array, expected, rtol=1e-6)
    np.testing.assert_allclose(volume.affine, image.affine, atol=1e-6)
    if is_scaled:
        with pytest.raises(VolumeError, match="already rescales"):
            read_volume(image, rescale_slope=1, rescale_intercept=-24)
    else:
        np.testing.assert_allclose(read_volume(image, rescale_intercept=-24).array, expected - 24)


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "scan.img"])
@pytest.mark.parametrize(("more", "is_read"), [(-1, False), (0, True), (1, True), (2 * 5 * 6 - 1, True), (60, False)])
def test_an_image_is_as_long_as_the_header_says_as_its_file_is(name, more, is_read, tmp_path):
    path = tmp_path / name
    (nibabel.Nifti1Pair if name == "scan.img" else nibabel.Nifti1Image)(ARRAY, AFFINE).to_filename(path)
    unpack, pack = (gzip.decompress, gzip.compress) if name.endswith(".gz") else (bytes, bytes)
    content = unpack(path.read_bytes())
    path.write_bytes(pack(content[:more] if more < 0 else content + bytes(more)))
    for source in nibabel.load(path), path.with_suffix(".hdr") if name == "scan.img" else path:
        if is_read and not (name == "scan.img" and more):
            assert np.array_equal(read_volume(source).array, ARRAY)
        else:
            with pytest.raises(VolumeError, match="voxels"):
                read_volume(source)


def test_a_damaged_checksum_of_an_image(tmp_path):
    path = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(ARRAY, AFFINE), path)
    image, content = nibabel.load(path), bytearray(path.read_bytes())  # which looks at so small a file to its end
    content[-6] ^= 1
    path.write_bytes(content)
    with pytest.raises(VolumeError, match="damaged"):
        read_volume(image)


class SlowToMove(io.BytesIO):
    def seek(self, *args) -> int:
        found = super().seek(*args)
        time.sleep(1e-3)
        return found


def test_an_image_of_a_file_object_is_read_by_threads():
    image = nibabel.Nifti1Image.from_stream(SlowToMove(nibabel.Nifti1Image(ARRAY, AFFINE).to_bytes()))
    with ThreadPoolExecutor(4) as threads:
        arrays = list(threads.map(lambda _: read_volume(image).array, range(8)))
    assert all(np.array_equal(array, ARRAY) for array in arrays)
