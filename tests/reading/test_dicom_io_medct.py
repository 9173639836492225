"""DICOM series: the right volume, or one sentence that says why not."""

import re
import shutil
import warnings
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import scan_files
import SimpleITK
from pydicom.uid import (
    CTImageStorage,
    EncapsulatedPDFStorage,
    MediaStorageDirectoryStorage,
    MRImageStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
)
from scan_files import AFFINE, SECRET, SECRET_DATE, STEP_MM, at, make_hu, write_enhanced, write_series

from medct import VolumeError, VolumeWarning, read_volume


@pytest.fixture
def hu() -> np.ndarray:
    return make_hu()


def assert_is(volume, hu: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    """`hu` is `(slice, row, column)`."""
    np.testing.assert_array_equal(volume.array, hu.T)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-6)


def assert_private(text: str) -> None:
    assert SECRET not in text
    assert SECRET_DATE not in text
    assert "1.2.3" not in text


def test_folder_list_zip_and_names_without_meaning(hu, tmp_path):
    folder = write_series(tmp_path / "series", hu)
    files = sorted(folder.iterdir())
    archive = shutil.make_archive(str(tmp_path / "series"), "zip", folder)
    for source in (folder, str(folder), files, list(reversed(files)), archive, (tmp_path / "series.zip").read_bytes()):
        volume = read_volume(source)
        assert_is(volume, hu)
        assert volume.array.dtype == np.int16
        assert volume.notes == ()


def test_files_of_one_list_as_bytes_and_file_objects(hu, tmp_path):
    files = sorted(write_series(tmp_path / "series", hu).iterdir())
    assert_is(read_volume([file.read_bytes() for file in files]), hu)
    opened = [file.open("rb") for file in files]
    assert_is(read_volume(opened), hu)
    for file in opened:
        file.close()


def turned_instance_numbers(ds, k):
    ds.InstanceNumber = 100 - k


def without_instance_numbers(ds, k):
    del ds.InstanceNumber


def jitter(ds, k):
    ds.ImagePositionPatient = at(0, 0, STEP_MM * k + 0.01 * (-1) ** k)


def almost_equal_orientation(ds, k):
    ds.ImageOrientationPatient = [1, 1e-6 * k, 0, 0, 1, 0]


def misleading_thickness(ds, k):
    ds.SliceThickness, ds.SpacingBetweenSlices = 4, -3


def empty_thickness(ds, k):
    ds.SliceThickness, ds.SpacingBetweenSlices = None, None


def without_frame_of_reference(ds, k):
    del ds.FrameOfReferenceUID


def without_series_uid(ds, k):
    del ds.SeriesInstanceUID


def empty_class(ds, k):
    ds.SOPClassUID = ""


def monochrome1(ds, k):
    ds.PhotometricInterpretation = "MONOCHROME1"


def two_acquisitions(ds, k):
    ds.AcquisitionNumber = 1 + k // 3


def rescale_type(ds, k):
    ds.RescaleType = "HU"


@pytest.mark.parametrize(
    "edit",
    [
        turned_instance_numbers,
        without_instance_numbers,
        almost_equal_orientation,
        misleading_thickness,
        empty_thickness,
        without_frame_of_reference,
        without_series_uid,
        empty_class,
        monochrome1,
        two_acquisitions,
        rescale_type,
    ],
)
def test_odd_headers_that_change_nothing(edit, hu, tmp_path):
    assert_is(read_volume(write_series(tmp_path / "series", hu, edit)), hu)


def test_jitter_of_positions_is_not_a_gap(hu, tmp_path):
    volume = read_volume(write_series(tmp_path / "series", hu, jitter))
    assert np.array_equal(volume.array, hu.T)
    assert volume.spacing_mm[2] == pytest.approx(STEP_MM, abs=0.005)


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_a_modality_in_small_letters_is_the_same(hu, tmp_path):
    volume = read_volume(write_series(tmp_path / "series", hu, lambda ds, k: setattr(ds, "Modality", "ct")))
    assert np.array_equal(volume.array, hu.T) and not volume.notes


def test_a_missing_modality_is_remarked_on(hu, tmp_path):
    folder = write_series(tmp_path / "series", hu, lambda ds, k: delattr(ds, "Modality"))
    with pytest.warns(VolumeWarning, match="name no modality"):
        assert_is(read_volume(folder), hu)


@pytest.mark.parametrize(
    ("keyword", "value", "note"),
    [
        ("LossyImageCompression", "01", "compressed with loss"),
        ("LossyImageCompression", "00", None),
        ("ImageType", ["DERIVED", "SECONDARY", "AXIAL", "MIP"], "projections of several"),
        ("ImageType", ["DERIVED", "PRIMARY", "AXIAL", "CT_SOM5 MIP"], "projections of several"),
        ("ImageType", ["DERIVED", "SECONDARY", "PROJECTION IMAGE"], "projections of several"),
        ("ImageType", ["DERIVED", "PRIMARY", "AXIAL", "CT_SOM5 MPR"], None),
        ("ImageType", ["DERIVED", "SECONDARY", "AXIAL"], None),
    ],
)
def test_what_a_header_says_of_its_pixels_is_remarked_on(hu, tmp_path, keyword, value, note):
    """Of a single slice, too: the others are like it."""

    def write(ds, k):
        if k == 2:
            setattr(ds, keyword, value)

    notes = read_volume(write_series(tmp_path, hu, write)).notes
    assert (note is None and not notes) or note in notes[0]


def test_files_of_which_all_uids_were_removed_are_what_their_modality_says(hu, tmp_path):
    """As by tools that remove every UID, that of the kind of file too."""

    def write(modality: str | None) -> Path:
        folder = write_series(tmp_path / f"{modality}", hu)
        for path in folder.iterdir():
            ds = pydicom.dcmread(path)
            for element in [*ds, *ds.file_meta]:
                if element.VR == "UI" and element.keyword != "TransferSyntaxUID":
                    del (ds.file_meta if element.tag.group == 2 else ds)[element.tag]
            ds.Modality = modality
            ds.save_as(path, enforce_file_format=False)
        return folder

    with pytest.warns(VolumeWarning, match="name no SOP class: taken for CT by their modality"):
        assert_is(read_volume(write("CT")), hu)
    with pytest.raises(VolumeError, match=r"no CT slices \(6 x modality MR\)"):
        read_volume(write("MR"))
    with pytest.raises(VolumeError, match="without a SOP class, a modality or any data"):
        read_volume(write(None))


def without_slope(ds, k):
    del ds.RescaleSlope


def without_intercept(ds, k):
    del ds.RescaleIntercept


def without_scale(ds, k):
    del ds.RescaleSlope, ds.RescaleIntercept


def unit_of_perfusion(ds, k):
    ds.RescaleType = "US"


def unit_unheard_of(ds, k):
    ds.RescaleType = SECRET


def missing_slice(ds, k):
    return k != 3


def repeated_slice(ds, k):
    ds.ImagePositionPatient = at(0, 0, STEP_MM * min(k, 4))


def two_phases(ds, k):
    ds.ImagePositionPatient = at(0, 0, STEP_MM * (k % 3))
    del ds.InstanceNumber  # which would tell them apart


def wider_steps(ds, k):
    ds.ImagePositionPatient = at(0, 0, STEP_MM * k + 2.0 * max(0, k - 3))


def beside(ds, k):
    ds.ImagePositionPatient = at(20 * (k > 2), 0, STEP_MM * k)


def sheared(ds, k):
    ds.ImagePositionPatient = at(k, 0, STEP_MM * k)


def tilted(ds, k):
    angle = np.deg2rad(15)
    ds.ImageOrientationPatient = [1, 0, 0, 0, np.cos(angle), -np.sin(angle)]


def oblique(ds, k):
    angle = np.deg2rad(20)
    ds.ImageOrientationPatient = [np.cos(angle), np.sin(angle), 0, -np.sin(angle), np.cos(angle), 0]


def one_finer_slice(ds, k):
    ds.PixelSpacing = [0.8, 0.7 + 0.05 * (k == 2)]


def one_smaller_slice(ds, k):
    if k == 2:
        scan_files.set_pixels(ds, np.zeros((4, 4)))


def without_spacing(ds, k):
    del ds.PixelSpacing


def zero_spacing(ds, k):
    ds.PixelSpacing = [0, 0.7]


def without_position(ds, k):
    del ds.ImagePositionPatient


def without_orientation(ds, k):
    del ds.ImageOrientationPatient


def not_perpendicular(ds, k):
    ds.ImageOrientationPatient = [1, 0, 0, 0.5, 1, 0]


def scale_of_nothing(ds, k):
    ds.RescaleSlope = 0


def scale_beyond_reason(ds, k):
    ds.RescaleIntercept = 1e6


def one_slice(ds, k):
    return k == 0


def colour(ds, k):
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 3, "RGB"


def magnetic(ds, k):
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = MRImageStorage


def emission(ds, k):
    ds.Modality = "PT"


def localizer(ds, k):
    ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]


def anonymized_file_by_file(ds, k):
    ds.SeriesInstanceUID = f"1.2.3.{k}"


def two_series(ds, k):
    ds.SeriesInstanceUID = "1.2.3.7" if k < 4 else "1.2.3.8"


def one_slice_of_another_series(ds, k):
    ds.SeriesInstanceUID = "1.2.3.8" if k == 5 else "1.2.3.7"


def without_pixels(ds, k):
    del ds[0x7FE00010]


REFUSED = {
    without_slope: "RescaleSlope or RescaleIntercept is missing",
    without_intercept: "RescaleSlope or RescaleIntercept is missing",
    without_scale: "RescaleSlope or RescaleIntercept is missing",
    scale_of_nothing: "rescale slope is 0 and its intercept -1024",
    scale_beyond_reason: r"its intercept 1e\+06",
    unit_of_perfusion: "RescaleType is US, not HU",
    unit_unheard_of: "RescaleType is of another unit, not HU",
    missing_slice: r"uneven \(usually 2.500 mm, but 5.000 mm between 35.00 and 40.00\)",
    repeated_slice: "1 slice positions occur more than once, such as 40.000 mm",
    two_phases: "3 slice positions occur more than once",
    wider_steps: "4.500 mm between 37.50 and 42.00",
    beside: "do not lie on a line",
    sheared: r"21.8 degrees off their normal \(gantry tilt or a sheared stack, 5.0 mm from end to end\)",
    tilted: "15.0 degrees off their normal",
    oblique: r"20.0 degrees off the patient's \(tolerance 10 degrees\)",
    one_finer_slice: r"PixelSpacing \[0.8, 0.75\] differs from \[0.8, 0.7\]",
    one_smaller_slice: "it is (4 x 4|16 x 12), others are (16 x 12|4 x 4)",
    without_spacing: "no PixelSpacing",
    zero_spacing: r"spacing is \(0.0, 0.7\) mm",
    without_position: "no ImagePositionPatient",
    without_orientation: "no ImageOrientationPatient",
    not_perpendicular: "not a pair of perpendicular unit vectors",
    one_slice: "one slice, which is not a volume",
    colour: "not a greyscale image",
    magnetic: r"no CT slices \(6 x MR Image Storage\)",
    emission: r"no CT slices \(6 x modality PT\)",
    localizer: r"no CT slices \(6 x localizer\)",
    anonymized_file_by_file: "each of its 6 slices has a SeriesInstanceUID of its own",
    two_series: r"2 CT series \(1: 4 slices of 16 x 12 pixels; 2: 2 slices of 16 x 12 pixels\)",
    one_slice_of_another_series: r"2 CT series \(1: 5 slices of 16 x 12 pixels; 2: 1 slice of 16 x 12 pixels\)",
    without_pixels: "no pixels",
}


@pytest.mark.parametrize("edit", REFUSED, ids=lambda edit: edit.__name__)
def test_doubtful_volumes_are_refused_with_the_figures(edit, hu, tmp_path):
    folder = write_series(tmp_path / "series", hu, edit)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(VolumeError, match=REFUSED[edit]) as refused:
            read_volume(folder)
    assert "\n" not in str(refused.value)
    assert refused.value.remedy
    for text in (str(refused.value), *(str(warning.message) for warning in caught)):
        assert_private(text)


def test_a_slice_that_says_two_things_of_its_kind_is_refused(hu, tmp_path):
    """Left out it would leave a hole, and its place may be at the end."""
    folder = write_series(tmp_path / "series", hu)
    last = max(folder.iterdir())
    ds = pydicom.dcmread(last)
    ds.SOPClassUID = MRImageStorage
    ds.save_as(last, enforce_file_format=False)
    assert pydicom.dcmread(last).file_meta.MediaStorageSOPClassUID == CTImageStorage
    with pytest.raises(VolumeError, match="its SOP classes contradict each other"):
        read_volume(folder)


@pytest.mark.parametrize("odd", [0, 3, 5])  # the slice 3 is first by its name
@pytest.mark.parametrize(
    ("attribute", "value"),
    [("PixelSpacing", [0.8, 0.75]), ("ImageOrientationPatient", [0, 1, 0, 0, 0, -1]), ("Rows", 8)],
)
def test_the_slice_that_is_unlike_the_others_is_named(attribute, value, odd, hu, tmp_path):
    folder = write_series(tmp_path / "series", hu, lambda ds, k: setattr(ds, attribute, value) if k == odd else None)
    with pytest.raises(VolumeError, match=f"-{odd}.dcm: it"):
        read_volume(folder)


def test_a_series_is_chosen_by_number_or_uid(hu, tmp_path):
    folder = write_series(tmp_path / "series", hu, two_series)
    for series in (1, "1", "1.2.3.7"):
        assert_is(read_volume(folder, series=series), hu[:4])
    assert np.array_equal(read_volume(folder, series=2).array, hu[4:].T)
    for series in (0, 3, "1.2.9"):
        with pytest.raises(VolumeError, match="no such series"):
            read_volume(folder, series=series)


def test_a_map_beside_a_series_does_not_hinder_it(hu, tmp_path):
    def edit(ds, k):
        two_series(ds, k)
        if k >= 4:
            unit_of_perfusion(ds, k)

    folder = write_series(tmp_path / "series", hu, edit)
    assert_is(read_volume(folder, series=1), hu[:4])
    with pytest.raises(VolumeError, match="RescaleType is US"):
        read_volume(folder, series=2)


def test_less_than_a_pixel_sideways_is_not_a_lean(hu, tmp_path):
    folder = write_series(
        tmp_path / "series", hu, lambda ds, k: setattr(ds, "ImagePositionPatient", at(0.1 * k, 0, STEP_MM * k))
    )
    affine = AFFINE.copy()
    affine[0, 3] -= 0.25  # half of what the stack slides, towards L
    assert_is(read_volume(folder), hu, affine)


def test_the_layout_of_a_disc(hu, tmp_path):
    write_series(tmp_path / "IMAGES/PT0/ST0", hu)
    contents = scan_files.new_slice(hu[0], 0)
    contents.SOPClassUID = contents.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    contents.save_as(tmp_path / "DICOMDIR", enforce_file_format=True)
    volume = read_volume(tmp_path)
    assert_is(volume, hu)
    assert volume.notes == ()
    with pytest.raises(VolumeError, match="table of contents of a disc"):
        read_volume(tmp_path / "DICOMDIR")


def test_other_files_beside_a_series_are_counted(hu, tmp_path):
    folder = write_series(tmp_path / "series", hu)
    for kind in (SecondaryCaptureImageStorage, SegmentationStorage, EncapsulatedPDFStorage):
        other = scan_files.new_slice(hu[0], 0)
        other.SOPClassUID = other.file_meta.MediaStorageSOPClassUID = kind
        other.save_as(folder / f"{kind.keyword}.dcm")
    write_series(folder, hu[:1], localizer, prefix="scout")
    (folder / "readme.txt").write_text("a scan", encoding="utf-8")
    (folder / "LICENSE").write_text("a text", encoding="utf-8")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "._slice.dcm").write_bytes(b"x" * 200)
    with pytest.warns(VolumeWarning, match="files left out: 6 ") as caught:
        assert_is(read_volume(folder), hu)
    for part in ("2 x not a DICOM file", "1 x localizer", "1 x Segmentation Storage", "1 x Encapsulated PDF Storage"):
        assert part in str(caught[0].message)


def test_slopes_may_differ_from_slice_to_slice(hu, tmp_path):
    def edit(ds, k):
        slope = (1, 2, 0.5)[k % 3]
        ds.RescaleSlope, ds.RescaleIntercept = slope, -1024
        scan_files.set_pixels(ds, (hu[k].astype(float) // slope * slope + 1024) / slope)

    volume = read_volume(write_series(tmp_path / "series", hu, edit))
    assert volume.array.dtype == np.float32
    expected = [hu[k] // (1, 2, 1)[k % 3] * (1, 2, 1)[k % 3] for k in range(len(hu))]
    np.testing.assert_allclose(volume.array, np.array(expected).T, atol=0.5)


def test_signed_and_unsigned_slices_of_one_series(hu, tmp_path):
    def edit(ds, k):
        if k % 2:
            ds.RescaleIntercept = 0
            scan_files.set_pixels(ds, hu[k], signed=True)

    assert_is(read_volume(write_series(tmp_path / "series", hu, edit)), hu)


@pytest.mark.parametrize("signed", [True, False])
def test_unused_bits_are_ignored(signed, hu, tmp_path):
    def edit(ds, k):
        stored = hu[k].astype(np.int32) + (0 if signed else 1024)
        scan_files.set_pixels(ds, (stored & 0xFFF) | 0x5000, signed=False, bits_stored=12)
        ds.PixelRepresentation, ds.RescaleIntercept = int(signed), 0 if signed else -1024

    assert_is(read_volume(write_series(tmp_path / "series", hu, edit)), hu)


@pytest.mark.parametrize("padding", [-2000, 63536])
def test_padding_becomes_air(padding, hu, tmp_path):
    def edit(ds, k):
        stored = hu[k].astype(np.int32) + 1024
        stored[0] = -2000
        scan_files.set_pixels(ds, stored, signed=True)
        ds.add_new(0x00280120, "SS" if padding < 0 else "US", padding)

    expected = hu.copy()
    expected[:, 0] = -1000
    assert_is(read_volume(write_series(tmp_path / "series", hu, edit)), expected)


def test_values_beyond_int16_are_kept(hu, tmp_path):
    def edit(ds, k):
        if k == 4:
            stored = hu[k].astype(np.int32) + 1024
            stored[0, 0] = 60000
            scan_files.set_pixels(ds, stored)

    volume = read_volume(write_series(tmp_path / "series", hu, edit))
    assert volume.array[0, 0, 4] == 60000 - 1024
    assert np.array_equal(volume.array[..., :4], hu[:4].T)


def test_a_missing_scale_can_be_given_but_never_twice(hu, tmp_path):
    folder = write_series(tmp_path / "bare", hu, without_scale)
    assert_is(read_volume(folder, rescale_slope=1, rescale_intercept=-1024), hu)
    with pytest.raises(VolumeError, match="is missing"):
        read_volume(folder, rescale_slope=1)
    with pytest.raises(VolumeError, match=r"already rescales \(slope 1.0, intercept -1024.0\)"):
        read_volume(write_series(tmp_path / "whole", hu), rescale_slope=1, rescale_intercept=-1024)


IRREGULAR = (missing_slice, wider_steps, sheared, tilted, oblique)


@pytest.mark.parametrize("edit", IRREGULAR, ids=lambda edit: edit.__name__)
def test_irregular_scans_are_resampled_on_request(edit, tmp_path):
    """A field that is linear in patient space is reproduced wherever the scan was."""
    direction = np.array([3.0, 4.0, 6.0])  # HU per mm, LPS

    def draw(ds, k):
        if edit(ds, k) is False:
            return False
        cosines, spacing = np.array(ds.ImageOrientationPatient, float), np.array(ds.PixelSpacing, float)
        rows, columns = np.indices((40, 40))
        mm = (
            np.array(ds.ImagePositionPatient, float)
            + columns[..., None] * spacing[1] * cosines[:3]
            + rows[..., None] * spacing[0] * cosines[3:]
        )
        scan_files.set_pixels(ds, (mm @ direction - 600).round() + 1024)

    folder = write_series(tmp_path / "series", make_hu((10, 40, 40)), draw)
    with pytest.warns(VolumeWarning, match=r"interpolated|resampled"):
        volume = read_volume(folder, resample_irregular=True)
    found = 0
    for voxel in np.random.default_rng(0).integers(0, volume.array.shape, (300, 3)):
        value = volume.array[tuple(voxel)]
        if value > -1000:
            mm = volume.affine[:3] @ [*voxel, 1]
            assert value == pytest.approx((mm * (-1, -1, 1)) @ direction - 600, abs=3)
            found += 1
    assert found > 100
    with pytest.raises(VolumeError):
        read_volume(folder)


def test_equal_repeated_slices_are_left_out_on_request(hu, tmp_path):
    folder = write_series(tmp_path / "series", hu)
    write_series(folder, hu[:3], prefix="again")
    with pytest.warns(VolumeWarning, match="repeated slices with the same pixels left out: 3"):
        assert_is(read_volume(folder, resample_irregular=True), hu)
    with pytest.raises(VolumeError, match="with different pixels"):
        read_volume(write_series(tmp_path / "phases", hu, two_phases), resample_irregular=True)


def test_wide_gaps_are_never_interpolated(tmp_path):
    folder = write_series(tmp_path / "series", make_hu((20, 8, 8)), lambda ds, k: not 5 < k < 14)
    with pytest.raises(VolumeError, match=r"22\.500 mm between"):
        read_volume(folder, resample_irregular=True)


@pytest.mark.parametrize("order", [None, [3, 0, 5, 1, 4, 2], [5, 4, 3, 2, 1, 0]])
def test_enhanced_frames_in_any_order(order, hu, tmp_path):
    path = write_enhanced(tmp_path / "enhanced.dcm", hu, order=order)
    assert_is(read_volume(path), hu)
    assert_is(read_volume(path.read_bytes()), hu)


def test_enhanced_compressed(hu, tmp_path):
    path = write_enhanced(tmp_path / "enhanced.dcm", hu, scan_files.compress(pydicom.uid.RLELossless))
    assert_is(read_volume(path), hu)


def test_one_stack_in_two_enhanced_files(hu, tmp_path):
    write_enhanced(tmp_path / "a.dcm", hu, order=[0, 1, 2])
    write_enhanced(tmp_path / "b.dcm", hu, order=[5, 4, 3])
    assert_is(read_volume(tmp_path), hu)


def test_enhanced_with_a_scale_per_frame(hu, tmp_path):
    def edit(ds):
        del ds.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
        for k, frame in enumerate(ds.PerFrameFunctionalGroupsSequence):
            scale = scan_files.item(RescaleSlope=1, RescaleIntercept=-1024 - k, RescaleType="HU")
            frame.PixelValueTransformationSequence = [scale]

    expected = hu - np.arange(len(hu), dtype=np.int16)[:, None, None]
    assert_is(read_volume(write_enhanced(tmp_path / "enhanced.dcm", hu, edit)), expected)


def test_slope_and_intercept_of_a_frame_are_of_one_group(tmp_path):
    """Half of a scale beside another is nobody's; an item without any attribute says nothing."""
    hu = make_hu()

    def half(ds):
        ds.PerFrameFunctionalGroupsSequence[2].PixelValueTransformationSequence = [scan_files.item(RescaleSlope=2)]

    def nothing(ds):
        ds.PerFrameFunctionalGroupsSequence[2].PixelValueTransformationSequence = [scan_files.item()]

    with pytest.raises(VolumeError, match="frame 3: RescaleSlope or RescaleIntercept is missing"):
        read_volume(write_enhanced(tmp_path / "half.dcm", hu, half))
    assert np.array_equal(read_volume(write_enhanced(tmp_path / "nothing.dcm", hu, nothing)).array, hu.T)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (
            lambda ds: setattr(
                ds.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence[0], "RescaleType", "US"
            ),
            "frame 1: its RescaleType is US",
        ),
        (lambda ds: setattr(ds, "NumberOfFrames", 70000), "promises 70000 frames and describes 6"),
        (lambda ds: delattr(ds, "PerFrameFunctionalGroupsSequence"), "6 frames have no positions"),
        (lambda ds: delattr(ds, "SharedFunctionalGroupsSequence"), "frame 1: it has no ImageOrientationPatient"),
    ],
)
def test_bad_enhanced_files(edit, reason, hu, tmp_path):
    with pytest.raises(VolumeError, match=reason):
        read_volume(write_enhanced(tmp_path / "enhanced.dcm", hu, edit))
    with pytest.raises(VolumeError, match=r"uneven"):
        read_volume(write_enhanced(tmp_path / "gap.dcm", hu, order=[0, 1, 2, 4, 5]))


def cut_in_the_pixels(raw: bytes) -> bytes:
    return raw[: len(raw) - 100]


def cut_in_the_header(raw: bytes) -> bytes:
    return raw[:700]


def cut_in_the_meta(raw: bytes) -> bytes:
    return raw[:180]


@pytest.mark.parametrize("damage", [cut_in_the_pixels, cut_in_the_header, cut_in_the_meta])
def test_one_damaged_file_is_never_left_out(damage, hu, tmp_path):
    folder = write_series(tmp_path / "series", hu)
    victim = sorted(folder.iterdir())[-1]  # an end slice would not be missed by its neighbours
    victim.write_bytes(damage(victim.read_bytes()))
    with pytest.raises(VolumeError, match=re.escape(str(victim))) as refused:
        read_volume(folder)
    assert_private(str(refused.value))


def test_headers_that_promise_gigabytes(hu, tmp_path):
    def edit(ds, k):
        ds.Rows = ds.Columns = 60000

    with pytest.raises(VolumeError, match=r"promise shape|cut short"):
        read_volume(write_series(tmp_path / "series", hu, edit))


def test_error_without_pydicom_names_the_extra(hu, tmp_path, monkeypatch):
    from medct import dicom_io_medct

    monkeypatch.setattr(dicom_io_medct, "pydicom", None)
    with pytest.raises(VolumeError, match=r"pip install pydicom"):
        read_volume(write_series(tmp_path / "series", hu))


def test_two_independent_readers_agree(tmp_path):
    """In patient space, on an oblique-free but flipped and anisotropic series under scrambled names."""

    def edit(ds, k):
        ds.ImageOrientationPatient = [-1, 0, 0, 0, -1, 0]

    folder = write_series(tmp_path / "series", make_hu((7, 20, 24)), edit)
    volume = read_volume(folder)
    files = [pydicom.dcmread(file) for file in sorted(folder.iterdir())]
    second = highdicom.get_volume_from_series(
        files,
        dtype=np.float32,
        apply_real_world_transform=False,
        apply_modality_transform=True,
        apply_presentation_lut=False,
    )
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    reader.SetOutputPixelType(SimpleITK.sitkFloat32)
    third = reader.Execute()
    for voxel in np.random.default_rng(0).integers(0, volume.array.shape, (100, 3)):
        lps = (volume.affine @ [*voxel, 1])[:3] * (-1, -1, 1)
        index = np.rint(np.linalg.inv(second.affine) @ [*lps, 1])[:3].astype(int)
        assert volume.array[tuple(voxel)] == second.array[tuple(index)]
        assert volume.array[tuple(voxel)] == third[third.TransformPhysicalPointToIndex(lps.tolist())]


def test_what_a_frame_says_goes_before_what_all_share(hu, tmp_path):
    """The standard has each in one place only; whoever writes both means the frame's own."""

    def edit(ds):
        for frame in ds.PerFrameFunctionalGroupsSequence:
            scale = scan_files.item(RescaleSlope=1, RescaleIntercept=-1000, RescaleType="HU")
            frame.PixelValueTransformationSequence = [scale]

    assert_is(read_volume(write_enhanced(tmp_path / "enhanced.dcm", hu, edit)), hu + 24)
