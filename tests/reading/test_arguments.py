"""What a caller says of a scan is heeded or refused in a sentence, and never left out in silence."""

import io

import nibabel
import numpy as np
import pytest
import torch
from scan_files import make_hu, write_series

from medct import CTVolume, VolumeError, read_volume

ARRAY = make_hu((5, 6, 7))
AFFINE = np.diag([-0.7, -0.8, 2.5, 1])
OTHER = np.diag([-1.0, -1.0, 3.0, 1])
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def path_of(folder):
    nibabel.Nifti1Image(ARRAY, AFFINE).to_filename(folder / "scan.nii.gz")
    return folder / "scan.nii.gz"


SOURCES = {
    "array": lambda folder: ARRAY,
    "tensor": lambda folder: torch.from_numpy(ARRAY),
    "CTVolume": lambda folder: CTVolume(ARRAY, AFFINE),
    "nibabel image": lambda folder: nibabel.Nifti1Image(ARRAY, AFFINE),
    "path": path_of,
    "bytes": lambda folder: path_of(folder).read_bytes(),
    "file object": lambda folder: io.BytesIO(path_of(folder).read_bytes()),
    "column": lambda folder: {"bytes": path_of(folder).read_bytes(), "path": None},
    "folder": lambda folder: path_of(folder).parent,
    "DICOM": lambda folder: write_series(folder / "series", ARRAY),
}
ARRAYS, DICOM = {"array", "tensor"}, {"DICOM"}


def heeded(source, **given) -> bool:
    try:
        read_volume(source, **given)
    except VolumeError as error:
        assert f"`{list(given)[-1]}=`" in error.remedy or "`affine=`" in error.remedy
        return False
    return True


@pytest.mark.parametrize("case", SOURCES)
def test_every_argument_is_heeded_or_refused(case, tmp_path):
    source = SOURCES[case](tmp_path)
    geometry = {"affine": AFFINE} if case in ARRAYS else {}
    assert heeded(SOURCES[case](tmp_path), spacing_mm=(1, 1, 1)) == (case in ARRAYS)
    assert heeded(SOURCES[case](tmp_path), **geometry, series=2) is False if case not in DICOM else True
    for series in (None, 1):
        assert read_volume(SOURCES[case](tmp_path), **geometry, series=series).array.size == ARRAY.size
    if case != "CTVolume":
        assert np.array_equal(read_volume(source, affine=OTHER).affine, OTHER)
    else:
        assert not heeded(source, affine=OTHER)


def test_two_geometries_of_an_array():
    with pytest.raises(VolumeError, match="two geometries"):
        read_volume(ARRAY, affine=AFFINE, spacing_mm=(1, 1, 1))


def test_the_empty_path_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(path_of(tmp_path).parent)
    assert np.array_equal(read_volume(".").array, ARRAY)
    for source in ("", {"bytes": None, "path": ""}, ["", ""]):
        with pytest.raises(VolumeError, match="it is empty"):
            read_volume(source)


@pytest.mark.parametrize("rescale", [{}, {"rescale_intercept": 5}, {"rescale_slope": 2}])
def test_masked_voxels_are_no_voxels(rescale):
    masked = np.ma.masked_less(ARRAY, -500)
    for source in (masked, CTVolume(masked, AFFINE), nibabel.Nifti1Image(masked, AFFINE)):
        with pytest.raises(VolumeError, match="some of its voxels are masked"):
            read_volume(source, affine=AFFINE if source is masked else None, **rescale)
    nothing = np.ma.masked_less(ARRAY, -5000)
    found = read_volume(nothing, affine=AFFINE).array
    assert type(found) is np.ndarray
    assert np.array_equal(found, ARRAY)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int16, torch.int32]
)
def test_tensors_of_every_type_have_their_values(dtype):
    tensor = torch.from_numpy(ARRAY).to(dtype)
    expected = tensor.double().numpy()
    for each in (tensor, tensor.clone().requires_grad_() if dtype.is_floating_point else tensor, tensor.mT.mT):
        assert np.array_equal(read_volume(each, affine=AFFINE).array, expected)


def test_tensors_without_a_value_a_voxel():
    tensor = torch.from_numpy(ARRAY).float()
    for bad in (tensor.to("meta"), tensor.to_sparse()):
        with pytest.raises(VolumeError, match="not hold one value a voxel"):
            read_volume(bad, affine=AFFINE)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        *(
            ({"orientation": bad}, "does not name each patient axis once")
            for bad in ("lps", "XYZ", "SL", "SSL", "", None, 3)
        ),
        *(
            ({"affine": bad}, "affine: it does not hold the numbers")
            for bad in ("x", [[1, 0], [1]], [["a"] * 4] * 4, {})
        ),
        *(({"affine": bad}, "its affine has shape") for bad in (np.eye(3), [1, 2, 3], 3, np.eye(4)[None])),
        *(({"affine": bad}, "affine is singular") for bad in (np.zeros((4, 4)), np.full((4, 4), np.inf))),
        *(({"spacing_mm": bad}, "spacing_mm: it does not hold") for bad in ("abc", [1, [2, 3]])),
        *(({"spacing_mm": bad}, "its spacing is") for bad in (1, (1, 1), (1, 1, 0), (1, np.nan, 1), (None, 1, 1))),
        *(({"rescale_slope": bad}, "rescale_slope: it") for bad in ("abc", 0, np.nan, np.inf, [1, 2], {})),
        *(({"rescale_intercept": bad}, "rescale_intercept: it") for bad in ("abc", np.nan, -np.inf, [[1]] * 2)),
        *(({"rescale_slope": bad}, "NaN or infinite|within") for bad in (1e38, 1e-38)),
    ],
)
def test_arguments_that_are_not_what_they_should_be(given, reason):
    geometry = {} if {"affine", "spacing_mm"} & set(given) else {"affine": AFFINE}
    with pytest.raises(VolumeError, match=reason) as refused:
        read_volume(ARRAY, **geometry, **given)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["x", 5, [1, 2], object()])
def test_a_column_whose_bytes_are_none(content):
    with pytest.raises(VolumeError, match="bytes: they are of type"):
        read_volume({"bytes": content, "path": "scan.nii"})


@pytest.mark.parametrize("most", [1, 100, 10_000])
def test_a_stream_may_give_less_than_it_is_asked_for(most, tmp_path):
    class Stream(io.BytesIO):
        def read(self, count=-1):
            return super().read(most if count < 0 else min(count, most))

    assert np.array_equal(read_volume(Stream(path_of(tmp_path).read_bytes())).array, ARRAY)


@pytest.mark.parametrize("word", ["inf", "nan", "1e308", "1e999"])
def test_numbers_of_a_damaged_geometry(word, tmp_path):
    nrrd = (
        "NRRD0004\ntype: short\ndimension: 3\nspace: RAS\nsizes: 5 6 7\n"
        "space directions: ({0},0,0) (0,{0},0) (0,0,{0})\nendian: little\nencoding: raw\nspace origin: ({0},0,0)\n\n"
    )
    meta = (
        "NDims = 3\nTransformMatrix = {0} 0 0 0 1 0 0 0 1\nOffset = {0} 0 0\nElementSpacing = 1e308 1 1\n"
        "DimSize = 5 6 7\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    for header in (nrrd, meta):
        with pytest.raises(VolumeError, match=r"affine is singular|not made of unit vectors"):
            read_volume(header.format(word).encode() + ARRAY.tobytes(order="F"))
