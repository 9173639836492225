"""Scans that lie in each other within one series: never interleaved, told apart by name, and to be chosen."""

import itertools

import numpy as np
import pytest
import scan_files
from scan_files import SECRET, STEP_MM, at, make_hu, write_enhanced, write_series

from medct import VolumeError, dicom_stacks_medct, read_volume
from medct.dicom_stacks_medct import TELLING

COUNT = 6
HU = make_hu((2 * COUNT, 16, 12))
VALUES = {
    "AcquisitionTime": ("120000", "120010"),
    "AcquisitionDateTime": ("20200101120000", "20200101120010"),
    "IrradiationEventUID": ("1.2.3.1", "1.2.3.2"),
    "AcquisitionUID": ("1.2.3.1", "1.2.3.2"),
    "ImageType": (["ORIGINAL", "PRIMARY", "AXIAL"], ["DERIVED", "PRIMARY", "MPR"]),
    "FrameType": (["ORIGINAL", "PRIMARY"], ["DERIVED", "PRIMARY"]),
    "StudyInstanceUID": ("1.2.3.1", "1.2.3.2"),
    "FrameOfReferenceUID": ("1.2.3.1", "1.2.3.2"),
    "ConcatenationUID": ("1.2.3.1", "1.2.3.2"),
}
WORDS = ("ContrastBolusAgent", "ConvolutionKernel", "ReconstructionAlgorithm", "FilterType", "ScanOptions", "StackID")


def two_scans(folder, shift, name=None, instance="on", edit=None, values=None):
    """Scans of `COUNT` slices each, the second one shifted by so many steps."""
    if values is None:
        values = VALUES.get(name, ("A", "B") if name in WORDS or name == "SeriesDescription" else (1, 2))

    def write(ds, k):
        scan, slice_ = divmod(k, COUNT)
        ds.ImagePositionPatient = at(0, 0, STEP_MM * (slice_ + shift * scan))
        if name:
            setattr(ds, name, values[scan])
        if instance == "each":
            ds.InstanceNumber = slice_ + 1
        elif instance is None:
            del ds.InstanceNumber
        if edit:
            edit(ds, k)

    return write_series(folder, HU, write)


def assert_two(folder, reason) -> None:
    with pytest.raises(VolumeError, match=rf"2 scans.*1: 6 slices of 16 x 12 pixels, by {reason}") as refused:
        read_volume(folder)
    assert "`series=`" in refused.value.remedy
    assert SECRET not in str(refused.value)
    found = [read_volume(folder, series=number).array for number in (1, 2)]
    assert {array.tobytes() for array in found} == {HU[:COUNT].T.tobytes(), HU[COUNT:].T.tobytes()}


@pytest.mark.parametrize(
    ("spacing", "thickness", "is_remarked"),
    [(2, 2, True), (-2, 2, True), (2, 3, True), (1, 2, False), (None, 2, False), (1.5, 2, False), (3, 3, False)],
)
def test_half_the_written_step_is_remarked_on(spacing, thickness, is_remarked, tmp_path):
    def write(ds, k):
        ds.SliceThickness = thickness * STEP_MM
        if spacing:
            ds.SpacingBetweenSlices = spacing * STEP_MM
        ds.ImagePositionPatient = at(0, 0, STEP_MM * k)

    notes = read_volume(write_series(tmp_path, HU, write)).notes
    assert any("they overlap, or are two passes" in note for note in notes) == is_remarked


@pytest.mark.parametrize("name", TELLING.values())
def test_every_attribute_that_tells(name, tmp_path):
    assert_two(two_scans(tmp_path, 0.5, name, instance=None), name)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.3, 0.5, 0.99, 1.0, 2.5, 4.0])
@pytest.mark.parametrize("name", ["AcquisitionNumber", "ConvolutionKernel", "TemporalPositionIdentifier"])
def test_any_overlap(shift, name, tmp_path):
    assert_two(two_scans(tmp_path, shift, name), name)


@pytest.mark.parametrize("name", ["AcquisitionNumber", "AcquisitionTime", "SliceThickness"])
def test_parts_beside_each_other_are_one_scan(name, tmp_path):
    folder = two_scans(tmp_path, COUNT, name, instance="each")
    assert np.array_equal(read_volume(folder).array, HU.T)


def test_an_attribute_of_its_own_for_each_slice_does_not_tell(tmp_path):
    def edit(ds, k):
        ds.AcquisitionNumber, ds.AcquisitionTime = 1 + (k * 5) % 12, f"1200{(k * 7) % 12:02}"

    assert np.array_equal(read_volume(write_series(tmp_path, HU, edit)).array, HU.T)


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.5])
@pytest.mark.parametrize("of_pass", ["AcquisitionNumber", "ConvolutionKernel", "SliceThickness"])
def test_turns_of_a_scanner_are_no_scans(of_pass, shift, tmp_path):
    """Each has a time of its own, and perhaps a number: what makes fewer scans tells them apart."""

    def edit(ds, k):
        ds.AcquisitionTime, ds.IrradiationEventUID = f"1200{k // 3:02}", f"1.2.3.{k // 3}"

    assert_two(two_scans(tmp_path, shift, of_pass, edit=edit), of_pass)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_turns_without_a_number_of_their_pass(shift, tmp_path):
    def edit(ds, k):
        ds.AcquisitionTime, ds.AcquisitionNumber = f"1200{k // 3:02}", k // 3

    assert_two(two_scans(tmp_path, shift, edit=edit), "InstanceNumber")


def test_scans_within_scans(tmp_path):
    """Two phases in each of two reconstructions, with numbers of their own."""

    def edit(ds, k):
        kernel, phase = divmod(k // 3, 2)
        ds.ConvolutionKernel, ds.TemporalPositionIdentifier = "AB"[kernel], 1 + phase + 2 * kernel
        ds.ImagePositionPatient = at(0, 0, STEP_MM * (k % 3 + 0.5 * phase))

    folder = write_series(tmp_path, HU, edit)
    with pytest.raises(VolumeError, match=r"4 scans.*by ConvolutionKernel, TemporalPositionIdentifier"):
        read_volume(folder)
    found = {read_volume(folder, series=number).array.tobytes() for number in range(1, 5)}
    assert found == {HU[k : k + 3].T.tobytes() for k in range(0, 12, 3)}


@pytest.mark.parametrize(("shift", "instance"), [(0.0, "on"), *itertools.product([0.2, 0.5, 0.7, 2.5], ["on", "each"])])
def test_instance_numbers_that_run_twice(shift, instance, tmp_path):
    assert_two(two_scans(tmp_path, shift, instance=instance), "InstanceNumber")


@pytest.mark.parametrize("is_told", [True, False])
def test_instance_numbers_that_run_through_phases_first(is_told, tmp_path):
    """Four phases at each of three positions make no run of numbers, and no three scans."""

    def edit(ds, k):
        ds.ImagePositionPatient = at(0, 0, STEP_MM * (k // 4))
        ds.TemporalPositionIdentifier = k % 4 if is_told else 1

    reason = "4 scans.*1: 3 slices.*by TemporalPositionIdentifier" if is_told else "9 slice positions occur more than"
    with pytest.raises(VolumeError, match=reason):
        read_volume(write_series(tmp_path, HU, edit))


@pytest.mark.parametrize("shift", [-2.5, -0.8, -0.5, -0.2, 0.0, 0.2, 0.5, 0.8, 2.5])
def test_there_and_back(shift, tmp_path):
    """A table that shuttles: the second pass from the other end, and from further out or not."""

    def edit(ds, k):
        if k >= COUNT:
            ds.InstanceNumber = 2 * COUNT - (k - COUNT)

    assert_two(two_scans(tmp_path, shift, edit=edit), "InstanceNumber")


@pytest.mark.parametrize("shift", [0.0, 0.2, 0.5, 0.7, 2.5])
def test_frames_that_run_twice(shift, tmp_path):
    def edit(ds):
        for k, frame in enumerate(ds.PerFrameFunctionalGroupsSequence):
            position = STEP_MM * (k % COUNT + shift * (k // COUNT))
            frame.PlanePositionSequence = [scan_files.item(ImagePositionPatient=at(0, 0, position))]

    assert_two(write_enhanced(tmp_path / "enhanced.dcm", HU, edit), "frame number")


@pytest.mark.parametrize(
    "order", [range(11, -1, -1), [5, 2, 9, 11, 1, 7, 3, 8, 4, 10, 6, 0], [0, 2, 3, 5, 7, 8, 9, 10, 11, 1, 4, 6]]
)
def test_frames_in_any_order_are_one_scan(order, tmp_path):
    volume = read_volume(write_enhanced(tmp_path / "enhanced.dcm", HU, order=order))
    assert np.array_equal(volume.array, HU.T)


@pytest.mark.parametrize("shift", [0.1, 0.3, 0.4, 0.62])
def test_steps_that_take_turns(shift, tmp_path):
    with pytest.raises(VolumeError, match="take turns between its slices: two stacks"):
        read_volume(two_scans(tmp_path, shift, instance=None))


@pytest.mark.parametrize(
    "numbers",
    [
        range(12),
        range(12, 0, -1),
        [5, 2, 9, 11, 1, 7, 3, 12, 4, 10, 6, 8],
        [1, 10, 2, 3, 11, 4, 12, 5, 6, 7, 8, 9],
        [1, 2, 10, 3, 4, 11, 5, 6, 12, 7, 8, 9],
        [7] * 12,
    ],
)
def test_instance_numbers_that_tell_nothing(numbers, tmp_path):
    folder = write_series(tmp_path, HU, lambda ds, k: setattr(ds, "InstanceNumber", numbers[k]))
    assert np.array_equal(read_volume(folder).array, HU.T)


def test_numbers_in_the_order_of_file_names_tell_nothing(tmp_path):
    """1, 10, 11, ..., 2, 20: as frames of one file lie that were gathered so."""
    hu = make_hu((29, 4, 3))
    order = sorted(range(29), key=lambda k: str(k + 1))
    assert np.array_equal(read_volume(write_enhanced(tmp_path / "enhanced.dcm", hu, order=order)).array, hu.T)


@pytest.mark.filterwarnings("error")
def test_one_frame_is_one_scan(tmp_path):
    with pytest.raises(VolumeError, match="it holds one slice"):
        read_volume(write_enhanced(tmp_path / "enhanced.dcm", HU[:1]))


@pytest.mark.parametrize("others", [(1, 4, 5), (1, 2, 8, 9), (0, 1, 2, 6, 7, 8)], ids=["few", "twice", "by turns"])
@pytest.mark.parametrize("name", ["AcquisitionTime", "ImageType", "TriggerTime"])
def test_what_cuts_one_even_stack_into_uneven_ones_tells_nothing(others, name, tmp_path):
    """As heart beats do whose times recur, or the redaction of a few slices; told, as it may be a mixture of scans."""
    values = VALUES.get(name, (350, 352))
    volume = read_volume(write_series(tmp_path, HU, lambda ds, k: setattr(ds, name, values[k in others])))
    assert np.array_equal(volume.array, HU.T)
    assert f"its slices differ in {name}, but make one even stack: taken for one scan" in volume.notes


@pytest.mark.parametrize("missing", [3, 4])
def test_scans_in_each_other_of_which_one_lacks_a_slice(missing, tmp_path):
    folder = two_scans(tmp_path, 0.5, "ConvolutionKernel")
    sorted(folder.iterdir())[missing].unlink()
    with pytest.raises(VolumeError, match=r"2 scans.*by ConvolutionKernel"):
        read_volume(folder)


def test_two_reconstructions_of_other_pixels(tmp_path):
    def edit(ds, k):
        if k >= COUNT:
            ds.PixelSpacing = [0.4, 0.35]

    assert_two(two_scans(tmp_path, 0.0, "ConvolutionKernel", edit=edit), "PixelSpacing, ConvolutionKernel")


def test_scans_are_counted_with_other_series(tmp_path):
    two_scans(tmp_path, 0.5, "AcquisitionNumber")
    write_series(tmp_path, HU[:3], lambda ds, k: setattr(ds, "SeriesInstanceUID", "1.2.9"), prefix="other")
    with pytest.raises(VolumeError, match="holds 3 scans, of which some lie in each other"):
        read_volume(tmp_path)
    assert read_volume(tmp_path, series=3).array.shape[2] == 3
    assert read_volume(tmp_path, series="1.2.9").array.shape[2] == 3
    assert np.array_equal(read_volume(tmp_path, series=1).array, HU[:COUNT].T)
    with pytest.raises(VolumeError, match="holds 3 scans"):
        read_volume(tmp_path, series="1.2.3")


@pytest.mark.parametrize("name", ["TemporalPositionIndex", "StackID", "FrameAcquisitionNumber"])
def test_frames_of_two_phases(name, tmp_path):
    def edit(ds):
        for k, frame in enumerate(ds.PerFrameFunctionalGroupsSequence):
            phase, slice_ = divmod(k, COUNT)
            frame.PlanePositionSequence[0].ImagePositionPatient = at(0, 0, STEP_MM * slice_)
            value = str(phase) if name == "StackID" else phase + 1
            frame.FrameContentSequence = [scan_files.item(**{name: value})]

    assert_two(write_enhanced(tmp_path / "enhanced.dcm", HU, edit), name)


@pytest.mark.parametrize(
    ("name", "spellings"),
    [
        ("SliceThickness", ("5", "5.0", "+5", "5e0")),
        ("KVP", ("120", "120.0", "120.00")),
        ("AcquisitionNumber", ("2", "+2", "02")),
        ("ReconstructionDiameter", ("350", "350.000", "3.5e2")),
        ("AcquisitionTime", ("120000", "120000.0", "120000.000000")),
    ],
)
def test_numbers_written_in_several_ways_are_the_same(name, spellings, tmp_path):
    def edit(ds, k):
        tag = scan_files.pydicom.datadict.tag_for_keyword(name)
        kind = scan_files.pydicom.datadict.dictionary_VR(tag)
        ds[tag] = scan_files.pydicom.DataElement(tag, kind, spellings[k % len(spellings)], already_converted=True)

    folder = write_series(tmp_path, HU, edit)
    written = b"".join(path.read_bytes() for path in folder.iterdir())
    assert all(spelling.encode() in written for spelling in spellings)
    assert np.array_equal(read_volume(folder).array, HU.T)


@pytest.mark.parametrize("name", ["FrameOfReferenceUID", "StudyInstanceUID"])
def test_what_some_slices_lack_does_not_tell(name, tmp_path):
    folder = write_series(tmp_path, HU, lambda ds, k: delattr(ds, name) if k % 2 else None)
    assert np.array_equal(read_volume(folder).array, HU.T)


def test_a_scan_without_contrast_is_another_one(tmp_path):
    folder = two_scans(
        tmp_path, 0.5, instance=None, edit=lambda ds, k: k < COUNT or setattr(ds, "ContrastBolusAgent", "x")
    )
    assert_two(folder, "ContrastBolusAgent")


SEQUENCES = {
    "ConvolutionKernel": ("CTReconstructionSequence", ("A", "B")),
    "KVP": ("CTXRayDetailsSequence", (80, 140)),
    "TemporalPositionIndex": ("FrameContentSequence", (1, 2)),
    "NominalPercentageOfCardiacPhase": ("CardiacSynchronizationSequence", (30, 75)),
}


def two_enhanced(folder, shift, tell):
    """Files of `COUNT` frames each."""

    def edit(ds):
        ds.InstanceNumber = scan + 1
        for k, frame in enumerate(ds.PerFrameFunctionalGroupsSequence):
            frame.PlanePositionSequence = [scan_files.item(ImagePositionPatient=at(0, 0, STEP_MM * (k + shift * scan)))]
        tell(ds, scan)

    for scan in (0, 1):
        write_enhanced(folder / f"{scan}.dcm", HU[COUNT * scan :][:COUNT], edit)
    return folder


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_functional_groups_tell_wherever_they_stand(shift, is_shared, name, tmp_path):
    sequence, values = SEQUENCES[name]

    def tell(ds, scan):
        groups = ds.SharedFunctionalGroupsSequence if is_shared else ds.PerFrameFunctionalGroupsSequence
        for each in groups:
            setattr(each, sequence, [scan_files.item(**{name: values[scan]})])

    assert_two(two_enhanced(tmp_path, shift, tell), name)


@pytest.mark.parametrize(
    ("shift", "uids", "is_two"),
    [
        (0.0, None, True),
        (0.5, None, True),
        (2.5, None, True),
        (0.5, ("1.2.3", "1.2.4"), True),
        (0.5, ("1.2.3", "1.2.3"), False),
        (COUNT, None, False),
        (COUNT, ("1.2.3", "1.2.3"), False),
    ],
)
def test_multi_frame_files_over_the_same_positions_are_scans(shift, uids, is_two, tmp_path):
    """Unless they are parts of one; beside each other they are one whatever they say."""

    def tell(ds, scan):
        if uids is not None:
            ds.ConcatenationUID = uids[scan]

    folder = two_enhanced(tmp_path, shift, tell)
    if is_two:
        assert_two(folder, "ConcatenationUID" if uids else "file")
    else:
        assert read_volume(folder).array.shape[2] == 2 * COUNT


@pytest.mark.parametrize("each", [2, 3])
@pytest.mark.parametrize("name", ["SpacingBetweenSlices", "SliceThickness"])
@pytest.mark.parametrize(
    ("times", "is_numbered", "is_remarked"),
    [(1, True, True), (-1, True, True), (1, False, False), (1.5, True, False)],
)
def test_skipped_slices_are_remarked_on(times, is_numbered, name, each, is_remarked, tmp_path):
    def edit(ds, k):
        setattr(ds, name, times * STEP_MM)
        ds.InstanceNumber = k + 1 if is_numbered else k // each + 1
        return k % each == 0

    volume = read_volume(write_series(tmp_path, HU, edit))
    assert np.array_equal(volume.array, HU[::each].T)
    assert any("those between may be missing" in note for note in volume.notes) == is_remarked


def test_only_scans_that_can_overlap_are_compared(monkeypatch):
    """Each turn of a step-and-shoot scanner has a time of its own, and only a few slices."""
    compared, within = [], dicom_stacks_medct._within
    monkeypatch.setattr(dicom_stacks_medct, "_within", lambda *each: compared.append(each) or within(*each))
    places = np.arange(400.0)
    assert not dicom_stacks_medct._overlap((places // 2).tolist(), places)
    assert not compared
    assert dicom_stacks_medct._overlap((places % 100).tolist(), places)
