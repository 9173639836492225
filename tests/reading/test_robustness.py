"""Scans of any kind, and files damaged at random: a volume or the project's own error, in bounded time and memory."""

import gzip
import io
import itertools
import time
import tracemalloc
import warnings
import zipfile

import nibabel
import numpy as np
import pydicom
import pytest
import scan_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medct import MedCTImageProcessor, VolumeError, read_volume
from medct.volume_medct import affine_from_spacing

ORIENTATIONS = [
    "".join(letters) for axes in itertools.permutations(("LR", "AP", "IS")) for letters in itertools.product(*axes)
]
MOST_SECONDS = 2.0
MOST_BYTES = 2**25
"""Of memory for a damaged file of a few kilobytes."""
quietly = pytest.mark.filterwarnings("ignore::medct.VolumeWarning")


@quietly
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=hnp.arrays(
        st.sampled_from([np.int16, np.int32, np.uint8, np.uint16, np.float32, np.float64]),
        hnp.array_shapes(min_dims=3, max_dims=3, min_side=2, max_side=9),
        elements=st.integers(0, 255),
    ),
    spacing_mm=st.tuples(*[st.floats(0.2, 8.0)] * 3),
    orientation=st.sampled_from(ORIENTATIONS),
    name=st.sampled_from(["scan.nii", "scan.nii.gz"]),
    rescale=st.sampled_from([(None, None), (1, -1024), (2.5, -100)]),
)
def test_any_volume_on_disk_is_that_volume_in_memory(values, spacing_mm, orientation, name, rescale, nifti):
    values[0, 0, 0] = 2  # no mask
    affine = affine_from_spacing(spacing_mm, orientation)
    options = dict(zip(("rescale_slope", "rescale_intercept"), rescale, strict=True))
    stored = read_volume(nifti(values, affine, name), **options)
    assert np.array_equal(stored.array, read_volume(values, affine=affine, **options).array)
    np.testing.assert_allclose(stored.affine, affine, rtol=1e-6, atol=1e-6)
    processor = MedCTImageProcessor(image_size=(6, 8, 4), target_spacing_mm=(2.0, 1.0, 1.5))
    pixel_values = processor(stored, return_tensors="np")["pixel_values"]
    assert pixel_values.shape == (1, 1, 6, 8, 4)
    assert np.abs(pixel_values).max() <= 1


@quietly
@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(*[st.integers(2, 40)] * 3),
    spacing_mm=st.tuples(*[st.floats(0.3, 6.0)] * 3),
    orientation=st.sampled_from(ORIENTATIONS),
    positions=hnp.arrays(float, (5, 3), elements=st.floats(-20, 60)),
)
def test_every_position_has_a_way_back(shape, spacing_mm, orientation, positions):
    affine = affine_from_spacing(spacing_mm, orientation)
    affine[:3, 3] = 11, -7, 300
    processor = MedCTImageProcessor(image_size=(10, 12, 14), target_spacing_mm=(1.5, 0.75, 0.8))
    volume = read_volume(np.zeros(shape, np.int16), affine=affine)
    geometry = processor.geometry(volume)
    np.testing.assert_allclose(geometry.from_voxel(geometry.to_voxel(positions)), positions, atol=1e-6)
    np.testing.assert_allclose(geometry.from_mm(geometry.to_mm(positions)), positions, atol=1e-6)
    voxels = geometry.to_voxel(positions)
    np.testing.assert_allclose(geometry.to_mm(positions), voxels @ affine[:3, :3].T + affine[:3, 3], atol=1e-6)


def nifti_bytes() -> bytes:
    image = nibabel.Nifti1Image(scan_files.make_hu((8, 9, 7)), np.diag([-2.0, -2, 3, 1]))
    image.header.set_qform(image.affine, code=1)
    return image.to_bytes()


def nrrd_bytes() -> bytes:
    header = (
        "NRRD0005\ntype: short\ndimension: 3\nspace: LPS\nsizes: 8 9 7\nspace directions: (2,0,0) (0,2,0) (0,0,3)\n"
        "endian: little\nencoding: raw\nspace origin: (0,0,0)\n\n"
    )
    return header.encode() + scan_files.make_hu((8, 9, 7)).tobytes(order="F")


def meta_bytes() -> bytes:
    header = (
        "ObjectType = Image\nNDims = 3\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = 2 2 3\n"
        "DimSize = 8 9 7\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    return header.encode() + scan_files.make_hu((8, 9, 7)).tobytes(order="F")


def dicom_files(edit=None) -> list[bytes]:
    files = []
    for k, hu in enumerate(scan_files.make_hu((3, 40, 36))):
        ds = scan_files.new_slice(hu, k)
        if edit:
            edit(ds, k)
        file = io.BytesIO()
        ds.save_as(file, enforce_file_format=True)
        files.append(file.getvalue())
    return files


def enhanced_bytes(folder) -> bytes:
    return scan_files.write_enhanced(folder / "enhanced.dcm", scan_files.make_hu((4, 12, 10))).read_bytes()


def zip_bytes() -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for k, data in enumerate(dicom_files()):
            file.writestr(f"{k}.dcm", data)
    return archive.getvalue()


def damaged(raw: bytes, generator: np.random.Generator) -> bytes:
    """A few bytes changed, most of them in the header; or a piece cut, dropped or repeated."""
    data = bytearray(raw)
    reach = len(data) if generator.random() < 0.3 else min(len(data), 1000)
    kind = generator.integers(6)
    start = int(generator.integers(reach))
    if kind <= 2:
        for _ in range(generator.integers(1, 5)):
            data[int(generator.integers(reach))] = generator.choice([0, 1, 0x7F, 0x80, 0xFF, generator.integers(256)])
    elif kind == 3:
        del data[start:]
    elif kind == 4:
        del data[start : start + int(generator.integers(1, 50))]
    else:
        data[start:start] = data[start : start + int(generator.integers(1, 50))]
    return bytes(data)


def damage_and_read(make_source, count: int, seed: int) -> int:
    """How many of some damaged sources were refused; asserts that the others are volumes."""
    generator, refused = np.random.default_rng(seed), 0
    for attempt in range(count):
        source = make_source(generator)
        irregular = bool(attempt % 2)
        tracemalloc.reset_peak()
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.simplefilter("ignore", UserWarning)  # the project's own
                volume = read_volume(source, resample_irregular=irregular)
            assert volume.array.ndim == 3
            assert np.isfinite(volume.array).all()
        except VolumeError as error:
            refused += 1
            assert "\n" not in str(error)
            assert scan_files.SECRET not in str(error)
            assert error.remedy
        assert time.perf_counter() - start < MOST_SECONDS
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    return refused


def sources(folder):
    """For each kind of source a function that makes a damaged one."""

    def single(raw, pack=lambda data: data):
        return lambda generator: pack(damaged(raw, generator))

    def series(files):
        def make(generator):
            victim = int(generator.integers(len(files)))
            return [damaged(file, generator) if k == victim else file for k, file in enumerate(files)]

        return make

    return {
        "nifti": single(nifti_bytes()),
        "nifti in gzip": single(nifti_bytes(), lambda data: gzip.compress(data, 1)),
        "gzip": single(gzip.compress(nifti_bytes())),
        "nrrd": single(nrrd_bytes()),
        "metaimage": single(meta_bytes()),
        "dicom": series(dicom_files()),
        "rle": series(dicom_files(scan_files.compress(pydicom.uid.RLELossless))),
        "jpeg 2000": series(dicom_files(scan_files.compress(pydicom.uid.JPEG2000Lossless))),
        "jpeg-ls": series(dicom_files(scan_files.compress(pydicom.uid.JPEGLSLossless))),
        "enhanced": single(enhanced_bytes(folder)),
        "zip": single(zip_bytes()),
    }


KINDS = tuple(
    "nifti,nifti in gzip,gzip,nrrd,metaimage,dicom,rle,jpeg 2000,jpeg-ls,enhanced,zip".split(",")  # noqa: SIM905
)


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind, tmp_path, traced):
    assert damage_and_read(sources(tmp_path)[kind], 40, seed=1) > 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_damaged_files(kind, tmp_path, traced):
    assert damage_and_read(sources(tmp_path)[kind], 1000, seed=2) > 100
