"""Reading: the right array and affine, or one sentence that says why not."""

import gzip
import pickle
import warnings

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch

from medct import CTVolume, MedCTImageProcessor, VolumeError, VolumeWarning, read_volume
from medct.volume_io_medct import affine_from_spacing, axis_order


@pytest.fixture
def array() -> np.ndarray:
    return np.random.default_rng(0).integers(-1024, 1500, (5, 6, 7)).astype(np.int16)


def test_nifti_gives_its_array_and_affine(nifti, array):
    affine = np.array([[0, -2.5, 0, 10], [0, 0, 1.5, -4], [3, 0, 0, 7], [0, 0, 0, 1.0]])
    for name in ("scan.nii", "scan.nii.gz"):
        volume = read_volume(nifti(array, affine, name))
        assert np.array_equal(volume.array, array)
        np.testing.assert_allclose(volume.affine, affine)
        assert volume.spacing_mm == (3.0, 2.5, 1.5)


def test_compression_is_detected_by_content(nifti, array, tmp_path):
    (tmp_path / "plain.nii.gz").write_bytes(nifti(array, name="a.nii").read_bytes())
    (tmp_path / "packed.nii").write_bytes(nifti(array, name="b.nii.gz").read_bytes())
    for name in ("plain.nii.gz", "packed.nii"):
        assert np.array_equal(read_volume(tmp_path / name).array, array)


def test_float32_spacings_are_read_as_intended(nifti, array):
    assert read_volume(nifti(array, np.diag([0.7, 0.7, 1.1, 1]))).spacing_mm == (0.7, 0.7, 1.1)


def test_stored_values_become_hu(nifti, array):
    volume = read_volume(nifti(array), rescale_slope=2, rescale_intercept=-1024)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, 2.0 * array - 1024)
    only_intercept = read_volume(nifti(array), rescale_intercept=-8192)
    np.testing.assert_array_equal(only_intercept.array, array - 8192.0)


def test_hu_is_never_computed_twice(array, tmp_path):
    image = nibabel.Nifti1Image(array, np.diag([2.0, 2, 2, 1]))
    image.header.set_slope_inter(1, -1024)
    image.to_filename(tmp_path / "scaled.nii")
    assert read_volume(tmp_path / "scaled.nii").array.min() < -1024
    with pytest.raises(VolumeError, match=r"already rescales \(slope 1.0, intercept -1024.0\)"):
        read_volume(tmp_path / "scaled.nii", rescale_slope=1, rescale_intercept=-1024)


def test_arrays_tensors_and_images(array):
    affine = affine_from_spacing((1.5, 0.75, 0.8), "SLP")
    for source in (array, torch.from_numpy(array)):
        volume = read_volume(source, spacing_mm=(1.5, 0.75, 0.8))
        assert np.array_equal(volume.array, array)
        np.testing.assert_allclose(volume.affine, affine)
    image = nibabel.Nifti1Image(array, affine)
    np.testing.assert_allclose(read_volume(image).affine, affine)
    volume = CTVolume(array, affine)
    assert read_volume(volume).array is array


@pytest.mark.filterwarnings("ignore:.*doesn't accept a copy keyword")
def test_an_array_of_simpleitk_is_its_image_if_its_axes_are_named(array, tmp_path):
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing((0.75, 0.8, 1.5))
    SimpleITK.WriteImage(image, str(tmp_path / "scan.mha"))
    processor = MedCTImageProcessor(image_size=(6, 8, 8), target_spacing_mm=(1.5, 0.75, 0.75))
    spacing_mm = image.GetSpacing()[::-1]
    named = read_volume(SimpleITK.GetArrayFromImage(image), spacing_mm=spacing_mm, orientation="SPL")
    of_file, of_array, unnamed = (
        np.array(processor(source, **more)["pixel_values"])
        for source, more in ((tmp_path / "scan.mha", {}), (named, {}), (array, {"spacing_mm": spacing_mm}))
    )
    assert np.array_equal(of_file, of_array)
    assert not np.array_equal(of_file, unnamed), "or no note need warn of it"


def test_axes_that_nobody_named_are_remarked_on(array):
    """Of most arrays they run otherwise."""
    given = {"spacing_mm": (2, 1, 1)}
    said = "its axes are taken to run towards {}: if they do not"
    with pytest.warns(VolumeWarning, match=said.format("S, L, P")):
        assumed = read_volume(array, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error", VolumeWarning)
        named = read_volume(array, **given, orientation="SLP")
        read_volume(array, affine=named.affine)
    assert np.array_equal(assumed.affine, named.affine)
    with pytest.warns(VolumeWarning, match=said.format("R, A, S")):
        MedCTImageProcessor(orientation="RAS")(array, **given)


def test_units_other_than_mm(array, tmp_path):
    image = nibabel.Nifti1Image(array, np.diag([0.002, 0.002, 0.003, 1]))
    image.header.set_xyzt_units("meter")
    image.to_filename(tmp_path / "metres.nii")
    assert read_volume(tmp_path / "metres.nii").spacing_mm == (2.0, 2.0, 3.0)


@pytest.mark.parametrize("orientation", ["SLP", "RAS", "PIR"])
def test_axis_order_inverts_affine_from_spacing(orientation):
    affine = affine_from_spacing((1, 2, 3), orientation)
    assert axis_order(affine, orientation) == ([0, 1, 2], [1, 1, 1])
    opposite = {"S": "I", "I": "S", "L": "R", "R": "L", "P": "A", "A": "P"}
    turned = "".join(opposite[letter] for letter in reversed(orientation))
    assert axis_order(affine, turned) == ([2, 1, 0], [-1, -1, -1])


def damaged_gzip(path, array, nifti):
    raw = bytearray(nifti(array, name="whole.nii.gz").read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)


def without_checksum(path, array, nifti):
    path.write_bytes(nifti(array, name="whole.nii.gz").read_bytes()[:-4])


def cut_short(path, array, nifti):
    path.write_bytes(nifti(array, name="whole.nii").read_bytes()[:-100])


def text(path, array, nifti):
    path.write_text("VolumeName,Findings_EN\n" * 40, encoding="utf-8")


def empty(path, array, nifti):
    path.write_bytes(b"")


def two_volumes(path, array, nifti):
    path.write_bytes(nifti(np.stack([array, array], axis=-1), name="whole.nii").read_bytes())


def with_nan(path, array, nifti):
    values = array.astype(np.float32)
    values[1, 2, 3] = np.nan
    path.write_bytes(nifti(values, name="whole.nii").read_bytes())


def complex_values(path, array, nifti):
    path.write_bytes(nifti(array.astype(np.complex64), name="whole.nii").read_bytes())


def without_orientation(path, array, nifti):
    nibabel.Nifti1Image(array, None).to_filename(path.with_name("whole.nii"))
    path.write_bytes(path.with_name("whole.nii").read_bytes())


def sheared(path, array, nifti):
    affine = np.diag([2.0, 2, 2, 1])
    affine[0, 2] = 1.0
    path.write_bytes(nifti(array, affine, "whole.nii").read_bytes())


def singular(path, array, nifti):
    raw = bytearray(nifti(array, name="whole.nii").read_bytes())
    raw[296:312] = bytes(16)  # srow_y
    path.write_bytes(raw)


def terabyte(path, array, nifti):
    header = nibabel.Nifti1Header()
    header.set_data_shape((30_000, 30_000, 1_000))
    header.set_data_dtype(np.int16)
    header.set_sform(np.eye(4), code=1)
    path.write_bytes(header.binaryblock + bytes(1000))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (damaged_gzip, "gzip stream is damaged"),
        (without_checksum, "gzip stream is damaged"),
        (cut_short, "voxels cannot be read"),
        (text, "not a NIfTI, DICOM"),
        (empty, "not a NIfTI, DICOM"),
        (two_volumes, r"shape \(5, 6, 7, 2\)"),
        (with_nan, "1 of its 210 voxels are NaN"),
        (complex_values, "type complex64"),
        (without_orientation, "no orientation"),
        (sheared, "not perpendicular"),
        (singular, "affine is singular"),
        (terabyte, "voxels cannot be read"),
    ],
)
def test_bad_files_are_refused_in_one_line(make, reason, array, nifti, tmp_path):
    path = tmp_path / "bad.nii.gz"
    make(path, array, nifti)
    with pytest.raises(VolumeError, match=reason) as refused:
        read_volume(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert refused.value.remedy


def test_other_bad_sources(array, tmp_path):
    with pytest.raises(VolumeError, match=r"missing.nii: it cannot be read \(No such file or directory\)"):
        read_volume(tmp_path / "missing.nii")
    # Of a path that cannot even be looked up pathlib does not say that it is no folder.
    with pytest.raises(VolumeError, match=r"it cannot be read \(File name too long\). Check the path."):
        read_volume("scan" * 100)
    with pytest.raises(VolumeError, match="without a geometry"):
        read_volume(array)
    with pytest.raises(VolumeError, match=r"shape \(6, 7\)"):
        read_volume(array[0], affine=np.eye(4))
    with pytest.raises(VolumeError, match="not a CT source"):
        read_volume({"volume": array})


def test_a_missing_orientation_can_be_given(array, tmp_path):
    nibabel.Nifti1Image(array, None).to_filename(tmp_path / "blank.nii")
    assert read_volume(tmp_path / "blank.nii", affine=np.diag([-2.0, -2, 3, 1])).spacing_mm == (2.0, 2.0, 3.0)


def test_a_gzip_of_many_members_is_read_whole(array, nifti, tmp_path):
    raw = nifti(array, name="whole.nii").read_bytes()
    (tmp_path / "members.nii.gz").write_bytes(gzip.compress(raw[:400]) + gzip.compress(raw[400:]))
    assert np.array_equal(read_volume(tmp_path / "members.nii.gz").array, array)


def test_the_error_survives_pickling_and_tracebacks():
    """As it travels from a loader process to the training process."""
    error = VolumeError("scan.nii", "it is cut short", "Copy it again")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    traceback = f'Caught VolumeError in worker.\n  File "x.py", line 1\nmedct.volume_io_medct.VolumeError: {error}\n'
    assert str(VolumeError(traceback)) == str(error)


def header_edit(path, **fields):
    """Change fields of a NIfTI header on disk to what no library would write."""
    image = nibabel.load(path)
    header = image.header.copy()
    for name, value in fields.items():
        header[name] = value
    raw = bytearray(path.read_bytes())
    raw[: len(header.binaryblock)] = header.binaryblock
    path.write_bytes(raw)
    return path


def test_one_volume_of_four_dimensions(array, nifti):
    assert np.array_equal(read_volume(nifti(array[..., None], name="scan.nii")).array, array)


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("image_class", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_both_versions_in_both_byte_orders(endian, image_class, array, tmp_path):
    header = image_class.header_class(endianness=endian)
    image_class(array.astype(f"{endian}i2"), np.diag([-1.0, -2, 3, 1]), header).to_filename(tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz")
    assert np.array_equal(volume.array, array)
    assert volume.array.dtype.isnative
    assert volume.spacing_mm == (1.0, 2.0, 3.0)


def test_scaled_files_are_float32_and_images_equal_them(array, tmp_path):
    image = nibabel.Nifti1Image(array, np.diag([-1.0, -2, 3, 1]))
    image.header.set_slope_inter(2, -8)
    image.to_filename(tmp_path / "scaled.nii.gz")
    loaded = nibabel.load(tmp_path / "scaled.nii.gz")
    for source in (tmp_path / "scaled.nii.gz", loaded):
        volume = read_volume(source)
        assert volume.array.dtype == np.float32
        np.testing.assert_allclose(volume.array, loaded.get_fdata())


@pytest.mark.parametrize(("step_mm", "read_mm"), [(1.499939, 1.5), (1.500051, 1.5), (1.48, 1.48)])
def test_the_noise_of_an_sform_is_not_read(step_mm, read_mm, tmp_path):
    """Of 1.5 mm dcm2niix makes 1.499939 mm where positions are large: one voxel less after resampling."""
    array = np.arange(-1000, 600, dtype=np.int16).reshape(4, 4, 100)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([-1.0, -2, step_mm, 1])), tmp_path / "scan.nii")
    path = header_edit(tmp_path / "scan.nii", pixdim=[1, 1, 2, 1.5, 0, 0, 0, 0], vox_offset=352)
    for source in (path, nibabel.load(path)):
        assert read_volume(source).spacing_mm == (1.0, 2.0, read_mm)


def test_what_headers_contradict_is_remarked_on(array, nifti):
    path = header_edit(nifti(array, name="scan.nii"), pixdim=[1, 9, 9, 9, 0, 0, 0, 0])
    with pytest.warns(VolumeWarning, match="pixdim disagrees with its sform"):
        assert read_volume(path).spacing_mm == (3.0, 2.0, 4.0)
    path = header_edit(nifti(array, name="scan.nii"), qform_code=1, qoffset_x=50)
    with pytest.warns(VolumeWarning, match="qform disagrees with its sform"):
        assert read_volume(path).affine[0, 3] == 0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"sform_code": 0, "qform_code": 1, "pixdim": [1, 2, 0, 2, 0, 0, 0, 0]}, r"spacing is \(2.0, 0.0, 2.0\) mm"),
        ({"sform_code": 0, "qform_code": 1, "pixdim": [1, 2, -2, 2, 0, 0, 0, 0]}, r"spacing is \(2.0, -2.0, 2.0\) mm"),
        ({"sform_code": 0, "qform_code": 1, "quatern_b": 7}, "orientation cannot be read"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "affine is singular"),
        ({"dim": [3, 5, -6, 7, 1, 1, 1, 1]}, "header is damaged"),
        ({"vox_offset": 1e9}, "header is damaged"),
        ({"vox_offset": 1e6}, "it ends before them"),
        ({"vox_offset": np.nan}, "no known type of numbers, or no place where its voxels begin"),
        ({"datatype": 999}, "no known type of numbers"),
        ({"xyzt_units": 5}, "unit of length is not known"),
        ({"scl_slope": 1, "scl_inter": np.inf}, "scl_slope and scl_inter are damaged"),
        ({"magic": b"ni1"}, r"second file \(.img\)"),
    ],
)
def test_impossible_headers(fields, reason, array, nifti):
    with pytest.raises(VolumeError, match=reason):
        read_volume(header_edit(nifti(array, name="scan.nii"), **fields))


def test_error_without_nibabel_says_what_to_install(array, nifti, monkeypatch):
    from medct import nifti_io_medct

    monkeypatch.setattr(nifti_io_medct, "nibabel", None)
    with pytest.raises(VolumeError, match="pip install nibabel"):
        read_volume(nifti(array))
