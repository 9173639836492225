"""Where a tolerance ends: what is just within it is read, what is just beyond it is refused or told."""

import warnings

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from scan_files import AFFINE, SECRET, STEP_MM, at, make_hu, new_slice, set_pixels, write_enhanced, write_series

from medct import VolumeError, read_volume
from medct.volume_medct import affine_from_spacing, is_straight, rescale_to_hu


@pytest.fixture
def array() -> np.ndarray:
    return np.linspace(-1000, 1000, 12 * 14 * 10).reshape(12, 14, 10).astype(np.int16)


# grids


@pytest.mark.parametrize(
    ("degrees", "slices", "straight"), [(0.02, 10, True), (0.2, 400, False), (1.0, 100, False), (2.8, 40, False)]
)
def test_shear(degrees, slices, straight):
    """Judged by where the last slice comes to lie: of 400 that lean by 0.2 degrees, 3 mm off."""
    array = np.linspace(-1000, 1000, 64 * slices).reshape(8, 8, slices).astype(np.int16)
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    affine[:3, 2] = 2 * np.array([0, np.sin(np.deg2rad(degrees)), np.cos(np.deg2rad(degrees))])
    if straight:
        read_volume(array, affine=affine)
    else:
        with pytest.raises(VolumeError, match=rf"{degrees:.1f} degrees"):
            read_volume(array, affine=affine)


@pytest.mark.parametrize(("shift_mm", "fits"), [(1, True), (3, False), (5, False)])
def test_a_straightened_grid_has_no_more_than_a_million_or_eight_times_the_voxels(shift_mm, fits):
    affine = affine_from_spacing((1, 1, 1), "RAS")
    affine[0, 2] = shift_mm
    array = np.linspace(-1000, 1000, 50**3).reshape(50, 50, 50).astype(np.float32)
    if fits:
        read_volume(array, affine=affine, resample_irregular=True)
    else:
        with pytest.raises(VolumeError, match="a straight grid around it would have shape"):
            read_volume(array, affine=affine, resample_irregular=True)


# numbers


@pytest.mark.parametrize("dtype", ["i2", "i4", "f4"])
@pytest.mark.parametrize(("stored", "intercept"), [(-32000, -1024), (32000, 1024), (-32768, -1), (32767, 1)])
def test_what_int16_cannot_hold_becomes_float(dtype, stored, intercept):
    array = np.array([[[stored, 0, 100]]], dtype)
    hu = rescale_to_hu(array, 1, intercept)
    assert hu.dtype == np.float32
    np.testing.assert_array_equal(hu, array.astype(float) + intercept)


@pytest.mark.parametrize("intercept", [-1, 1])
def test_what_int16_just_holds_stays_whole(intercept):
    array = np.array([[[-32768 - min(intercept, 0), 32767 - max(intercept, 0)]]], np.int16)
    hu = rescale_to_hu(array, 1, intercept)
    assert hu.dtype == np.int16
    np.testing.assert_array_equal(hu, array.astype(int) + intercept)


@pytest.mark.parametrize(
    ("signed", "stored", "intercept", "dtype"),
    [
        (False, 65535, -32768, np.int16),
        (False, 65535, -32767, np.float32),
        (True, 32767, 0, np.int16),
        (True, 32767, 1, np.float32),
        (True, -32768, 0, np.int16),
        (True, -32768, -1, np.float32),
    ],
)
def test_dicom_values_at_the_ends_of_int16(tmp_path, signed, stored, intercept, dtype):
    def edit(ds, k):
        values = np.full((16, 12), max(0, -1000 - intercept), np.int32)
        values[3, 4] = stored
        set_pixels(ds, values, signed=signed)
        ds.RescaleIntercept = intercept

    volume = read_volume(write_series(tmp_path / "series", make_hu((3, 16, 12)), edit))
    assert volume.array.dtype == dtype
    extreme = volume.array.max() if stored > 0 else volume.array.min()
    assert extreme == stored + intercept


# stacks of slices


def missing(k):
    return k + (k >= 30)


def of_two_stacks(k):
    """The steps of the second half are a tenth longer."""
    return k + 0.1 * max(0, k - 30)


@pytest.mark.parametrize(
    ("place", "even"), [(missing, False), (of_two_stacks, False), (lambda k: k + 0.01 * (k % 2), True)]
)
@pytest.mark.parametrize("enhanced", [False, True])
def test_uneven_steps(tmp_path, place, even, enhanced):
    hu, places = make_hu((60, 8, 8)), [at(0, 0, STEP_MM * place(k)) for k in range(60)]
    if enhanced:

        def edit_frames(ds):
            for frame, position in zip(ds.PerFrameFunctionalGroupsSequence, places, strict=True):
                frame.PlanePositionSequence[0].ImagePositionPatient = position

        path = write_enhanced(tmp_path / "e.dcm", hu, edit_frames)
    else:
        path = write_series(tmp_path / "s", hu, lambda ds, k: setattr(ds, "ImagePositionPatient", places[k]))
    if even:
        np.testing.assert_allclose(read_volume(path).affine, AFFINE, atol=0.05)
    else:
        with pytest.raises(VolumeError, match="its slice steps are uneven"):
            read_volume(path)


@pytest.mark.parametrize(
    ("degrees", "slices", "leans"),
    [(0.05, 60, False), (0.5, 60, True), (1.0, 30, True), (1.9, 20, True), (1.9, 5, False), (5.0, 3, False)],
)
def test_a_lean_of_more_than_a_pixel_is_refused_however_small_its_angle(tmp_path, degrees, slices, leans):
    slide = np.tan(np.deg2rad(degrees))

    def edit(ds, k):
        ds.ImagePositionPatient = at(0, slide * STEP_MM * k, STEP_MM * k)

    path = write_series(tmp_path / "series", make_hu((slices, 16, 12)), edit)
    if leans:
        with pytest.raises(VolumeError, match=rf"stacked {degrees:.1f} degrees off their normal"):
            read_volume(path)
    else:
        assert is_straight(read_volume(path).affine)


# NIfTI


def nifti_of(array, kind=nibabel.Nifti1Image, affine=None, unit="mm"):
    image = kind(array, affine_from_spacing((0.8, 0.7, 2.5), "RAS") if affine is None else affine)
    image.header.set_xyzt_units(unit)
    return image


UNITS = [("mm", 1.0), ("meter", 0.001), ("micron", 1000.0)]


@pytest.mark.parametrize(("unit", "in_a_mm"), UNITS)
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_units_of_files_and_images(array, tmp_path, unit, in_a_mm, kind):
    affine = affine_from_spacing((0.8, 0.7, 2.5), "RAS")
    image = nifti_of(array, kind, np.diag([in_a_mm] * 3 + [1]) @ affine, unit)
    image.set_qform(image.affine, code="scanner")
    nibabel.save(image, tmp_path / "scan.nii")
    for source in (tmp_path / "scan.nii", image, nibabel.load(tmp_path / "scan.nii")):
        volume = read_volume(source)
        assert volume.spacing_mm == pytest.approx((0.8, 0.7, 2.5), rel=1e-5)
        np.testing.assert_allclose(volume.affine, affine, rtol=1e-5, atol=1e-5)
        assert [note for note in volume.notes if "disagrees" in note] == []


@pytest.mark.parametrize("as_file", [False, True])
def test_an_image_is_never_rescaled_twice(array, tmp_path, as_file):
    image = nifti_of(array)
    image.header.set_slope_inter(2, -24)
    nibabel.save(image, tmp_path / "scan.nii")
    image = nibabel.load(tmp_path / "scan.nii")
    source = tmp_path / "scan.nii" if as_file else image
    assert read_volume(source).array.max() == pytest.approx(image.get_fdata().max())
    with pytest.raises(VolumeError, match=r"already rescales .* computed twice"):
        read_volume(source, rescale_slope=1, rescale_intercept=-1024)


@pytest.mark.parametrize("pixdim", [0.0, -1.0, np.nan])
def test_a_bad_pixdim_matters_only_where_it_is_used(array, tmp_path, pixdim):
    image = nifti_of(array)
    path = tmp_path / "scan.nii"
    for sform, qform in ((1, 0), (1, 1), (0, 1)):
        image.set_sform(image.affine, sform)
        image.set_qform(image.affine, qform)
        nibabel.save(image, path)
        content = bytearray(path.read_bytes())
        content[80:84] = np.array(pixdim, "<f4").tobytes()
        path.write_bytes(content)
        if sform:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert read_volume(path).spacing_mm == pytest.approx((0.8, 0.7, 2.5))
        else:
            with pytest.raises(VolumeError):
                read_volume(path)


@pytest.mark.parametrize("attribute", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
@pytest.mark.parametrize("number", ["1e308", "-1e308", "1e200", "1e39", "1e6"])
@pytest.mark.parametrize("is_first_only", [False, True])
@pytest.mark.parametrize("which", [range(6), [2]])
def test_numbers_without_bound_are_refused(attribute, number, is_first_only, which, tmp_path):
    """With one sentence and no warning from where they overflow."""

    def edit(ds, k):
        if k in which:
            others = [str(value)[:16] for value in ds[attribute].value]
            text = "\\".join([number, *others[1:]] if is_first_only else [number] * len(others)).encode()
            ds._dict[ds[attribute].tag] = RawDataElement(ds[attribute].tag, "DS", len(text), text, 0, False, True)

    folder = write_series(tmp_path, make_hu(), edit)
    with warnings.catch_warnings(), pytest.raises(VolumeError, match=f"its {attribute} is not a list of . numbers"):
        warnings.simplefilter("error")
        read_volume(folder)


def test_values_that_overflow_are_refused_as_infinite(array):
    with warnings.catch_warnings(), pytest.raises(VolumeError, match="NaN or infinite"):
        warnings.simplefilter("error")
        read_volume(array.astype(np.float64) * 1e305, affine=AFFINE, rescale_slope=2, rescale_intercept=0)


# privacy

READ = (
    *("SOPClassUID", "Modality", "ImageType", "SeriesInstanceUID", "Rows", "Columns", "SamplesPerPixel"),
    *("PhotometricInterpretation", "NumberOfFrames", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PixelPaddingValue", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
    *("SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept", "RescaleType", "InstanceNumber", "PatientName"),
    *("ModalityLUTSequence", "KVP", "AcquisitionTime", "IconImageSequence"),
    *("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"),
)


@pytest.mark.parametrize("attribute", READ)
def test_no_message_holds_what_stands_in_a_header(attribute, tmp_path):
    tag = pydicom.tag.Tag(attribute)
    vr = pydicom.datadict.dictionary_VR(tag).split(" ")[0]
    value = f"{SECRET}^1964\\{SECRET}".ljust(26).encode()

    def edit(ds, k):
        ds._dict[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True)

    folder = tmp_path / "series"
    folder.mkdir()
    for k, hu in enumerate(make_hu((3, 16, 12))):
        ds = new_slice(hu, k)
        edit(ds, k)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds.save_as(folder / f"{k}.dcm", enforce_file_format=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            volume = read_volume(folder)
            said = [*volume.notes]
        except VolumeError as error:
            said = [str(error), str(error.__cause__ or "")]
            assert error.__suppress_context__ or error.__context__ is None, "or the traceback tells it"
    assert SECRET not in " ".join([*said, *(str(warning.message) for warning in caught)])
