"""DICOM reports and pages: what they say, whose they are, and that others take them."""

import logging
import re
import threading
import warnings
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pydicom
import pytest
from reports import ALGORITHM, CLOSE, FINDINGS, dciodvfy_errors
from scan_files import SECRET, make_hu, write_enhanced, write_series

from medct.configuration_medct import CT_CLIP_LABELS
from medct.inference.slices import AxialSlices
from medct.inference.studies import Study
from medct.reporting.findings import Finding
from medct.reporting.page import MOST_PICTURES, Picture, draw_page, secondary_capture, worth_a_picture
from medct.reporting.source import ReportError, quietly, read_source, refuse_without_study
from medct.reporting.sr import _device_uid, structured_report
from medct.volume_io_medct import VolumeError, VolumeWarning, dicom_slices, read_volume

hd = pytest.importorskip("highdicom")


@pytest.fixture
def series(tmp_path):
    return write_series(tmp_path / "series", make_hu((6, 16, 12)))


def study_of(path) -> Study:
    return Study(str(path), str(path))


def saved(report, tmp_path):
    path = tmp_path / "report.dcm"
    report.save_as(path, enforce_file_format=True)
    return path


@cache
def drawn() -> np.ndarray:
    """A page; drawing it takes longer than all the rest."""
    slices = AxialSlices.of(read_volume(make_hu(), spacing_mm=(2, 2, 2)))
    return draw_page(FINDINGS, ALGORITHM, slices, [Picture(each.label, 2) for each in worth_a_picture(FINDINGS)])


def make(kind: str, path, findings=FINDINGS[:1]):
    """A report or a page of a study."""
    source = read_source(study_of(path))
    if kind == "sr":
        return structured_report(findings, ALGORITHM, source)
    return secondary_capture(drawn(), ALGORITHM, source)


def test_the_report_holds_what_is_known_of_each_finding(series, tmp_path):
    report = hd.sr.srread(saved(make("sr", series, FINDINGS), tmp_path))
    groups = report.content.get_image_measurement_groups()
    assert [group.tracking_identifier for group in groups] == list(CT_CLIP_LABELS)
    for finding, group in zip(FINDINGS, groups, strict=True):
        numbers = {each.name.value: each.value for each in group.get_measurements()}
        expected = {"SCORE": finding.score, "OPERATING-POINT": finding.threshold, "PROBABILITY": finding.probability}
        assert numbers == {name: value for name, value in expected.items() if value is not None}
        calls = [each.value.meaning for each in group.get_qualitative_evaluations() if each.name.value == "CALL"]
        present = "Present" if finding.score >= 0.45 else "Absent"
        assert calls == ([] if finding.threshold is None else [present])
        assert group.finding_type.scheme_designator == "99MEDCT"
        assert len(group.source_images) == 1
    nodule = groups[CT_CLIP_LABELS.index("Lung nodule")].finding_type
    assert [(each.CodeValue, each.CodingSchemeDesignator) for each in nodule.EquivalentCodeSequence] == [
        ("786838002", "SCT")
    ]
    thickening = groups[CT_CLIP_LABELS.index("Interlobular septal thickening")].finding_type
    assert "EquivalentCodeSequence" not in thickening


def test_numbers_and_calls_agree_however_close_they_are(series, tmp_path):
    path = saved(make("sr", series, CLOSE), tmp_path)
    for finding, group in zip(CLOSE, hd.sr.srread(path).content.get_image_measurement_groups(), strict=True):
        numbers = [each.value for each in group.get_measurements()]
        assert numbers[:2] == [finding.score, finding.threshold]
    assert dciodvfy_errors(path) == []


def test_the_report_says_what_made_it_and_that_nobody_checked_it(series, tmp_path):
    path = saved(make("sr", series), tmp_path)
    report = pydicom.dcmread(path)
    flags = (report.PreliminaryFlag, report.CompletionFlag, report.VerificationFlag)
    assert flags == ("PRELIMINARY", "PARTIAL", "UNVERIFIED")
    assert "research only" in report.SeriesDescription
    for said in ("ORG/BASE", "0" * 40, "ORG/SITE-B", "1" * 40, "Research only: not a diagnosis"):
        assert said.encode() in path.read_bytes()
    assert report.CodingSchemeIdentificationSequence[0].CodingSchemeUID.startswith("2.25.")


@pytest.mark.parametrize("kind", ["sr", "page"])
def test_it_belongs_to_the_study_and_to_a_series_of_its_own(series, tmp_path, kind):
    header = pydicom.dcmread(next(series.iterdir()))
    made = [pydicom.dcmread(saved(make(kind, series), tmp_path)) for _ in range(2)]
    for each in made:
        for name in ("StudyInstanceUID", "PatientID", "PatientName", "PatientBirthDate", "AccessionNumber"):
            assert each[name].value == header[name].value, name
        assert each.SeriesInstanceUID != header.SeriesInstanceUID
        assert each.SeriesNumber == {"sr": 9901, "page": 9902}[kind]
    assert made[0].SOPInstanceUID != made[1].SOPInstanceUID


@pytest.mark.parametrize("kind", ["sr", "page"])
@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("ISO_IR 100", "Müller^Jürgen"),
        ("ISO_IR 144", "Иванов^Иван"),
        ("GB18030", "王^小东"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("ISO_IR 192", "Ωmega^Émile"),
    ],
    ids=str,
)
def test_names_survive_in_every_script(tmp_path, kind, charset, name):
    def edit(ds, k):
        ds.SpecificCharacterSet, ds.PatientName, ds.StudyDescription = charset, name, name.split("=")[-1]

    made = pydicom.dcmread(saved(make(kind, write_series(tmp_path / "s", make_hu((4, 12, 12)), edit)), tmp_path))
    assert str(made.PatientName) == name
    if kind == "sr":
        assert made.StudyDescription == name.split("=")[-1]


@pytest.mark.parametrize("kind", ["sr", "page"])
def test_dciodvfy_finds_no_error(series, tmp_path, kind):
    assert dciodvfy_errors(saved(make(kind, series, FINDINGS), tmp_path)) == []


@pytest.mark.parametrize("kind", ["sr", "page"])
def test_headers_may_lack_what_may_be_empty(tmp_path, kind):
    def edit(ds, k):
        for name in ("PatientName", "PatientID", "PatientBirthDate", "StudyDate", "StudyTime", "AccessionNumber"):
            delattr(ds, name)

    path = saved(make(kind, write_series(tmp_path / "s", make_hu((4, 12, 12)), edit)), tmp_path)
    assert pydicom.dcmread(path).PatientID == ""
    assert dciodvfy_errors(path) == []


def test_frames_of_one_file_are_referred_to(tmp_path):
    source = read_source(study_of(write_enhanced(tmp_path / "scan.dcm", make_hu((5, 12, 12)), order=[4, 2, 0, 1, 3])))
    assert source.frame == 2 and len(source.headers) == 1  # the third in space is the second in the file
    report = structured_report(FINDINGS[:1], ALGORITHM, source)
    assert re.findall(r"Referenced Frame Number +IS: '(.*)'", str(report)) == ["2"]


def test_what_computes_has_a_name_for_each_model_and_what_it_is_asked():
    others = [{}, {"model": "b"}, {"model_commit": "b"}, {"adapter": "b"}, {"adapter": "c"}, {"own_prompts": ("b",)}]
    named = [_device_uid(replace(ALGORITHM, **other)) for other in others]
    assert len(set(named)) == len(others) and named[0] == _device_uid(ALGORITHM)


def test_the_headers_are_those_of_the_slices_that_were_read(tmp_path):
    """Of two series in one folder, the one that was chosen; in the order of its slices."""
    folder = tmp_path / "two"
    write_series(folder, make_hu((6, 16, 12)), prefix="a")
    write_series(folder, make_hu((4, 16, 12)), lambda ds, k: setattr(ds, "SeriesInstanceUID", "1.2.9"), prefix="b")
    with pytest.raises(VolumeError, match="holds 2 CT series"):
        read_source(study_of(folder))
    source = read_source(study_of(folder), series=2)
    assert {header.SeriesInstanceUID for header in source.headers} == {"1.2.9"}
    assert [header.InstanceNumber for header in source.headers] == [1, 2, 3, 4]
    assert source.middle.InstanceNumber == 3
    assert [frame for _, frame in dicom_slices(folder, series=2)] == [None] * 4


def test_what_is_read_is_reported_on_with_the_same_options(tmp_path):
    """One slice is missing, and so is the rescale."""

    def edit(ds, k):
        del ds.RescaleSlope, ds.RescaleIntercept
        return k != 3

    folder = write_series(tmp_path / "s", make_hu((9, 12, 12)), edit)
    options = {"resample_irregular": True, "rescale_slope": 1, "rescale_intercept": -1024}
    with pytest.warns(VolumeWarning, match="interpolated"):
        read_volume(folder, **options)
    assert len(read_source(study_of(folder), **options).headers) == 8
    for name in options:
        with pytest.raises(VolumeError):
            read_source(study_of(folder), **{each: options[each] for each in options if each != name})


@pytest.mark.parametrize("name", ["StudyInstanceUID", "SOPInstanceUID"])
def test_a_study_without_uids_is_refused(tmp_path, name):
    folder = write_series(tmp_path / "s", make_hu((4, 12, 12)), lambda ds, k: delattr(ds, name))
    with pytest.raises(ReportError, match="lack the UIDs"):
        read_source(study_of(folder))


@pytest.mark.parametrize("name", ["StudyInstanceUID", "PatientID", "PatientName", "AccessionNumber"])
def test_a_series_of_several_patients_or_studies_is_nobodys(tmp_path, name):
    """Some anonymizers replace the same value by another one in each file; one missing value is another one, too."""
    for folder, values in {"two": ("1.2.8", "1.2.9"), "one or none": ("1.2.8", None)}.items():
        edit = partial(lambda values, ds, k: setattr(ds, name, values[k == 2]), values)
        written = write_series(tmp_path / folder, make_hu((4, 12, 12)), edit)
        with pytest.raises(ReportError) as refusal:
            read_source(study_of(written))
        assert re.search("name more than one patient or study|lack the UIDs", str(refusal.value))
        assert "1.2.8" not in str(refusal.value)


def raw(name: str, value: str, encoding: str = "utf-8"):
    """An `edit` that writes a value as it is, whether or not the standard allows it."""

    def edit(ds, k):
        ds.SpecificCharacterSet = "ISO_IR 192"
        text = value.encode(encoding)
        text += b" " * (len(text) % 2)
        tag = pydicom.tag.Tag(pydicom.datadict.tag_for_keyword(name))
        vr = pydicom.datadict.dictionary_VR(tag)
        ds[name] = pydicom.dataelem.RawDataElement(tag, vr, len(text), text, 0, False, True)

    return edit


@pytest.mark.parametrize("kind", ["sr", "page"])
@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("PatientSex", "U", ""),
        ("PatientSex", "F", "F"),
        ("PatientBirthDate", "0000", ""),
        ("PatientBirthDate", "1970-01-01", ""),
        ("StudyDate", "20201301", ""),
        ("StudyDate", "2020.01.02", ""),
        ("StudyTime", "12:00", ""),
        ("ReferringPhysicianName", r"One^A\Two^B", ""),
        ("StudyTime", "1200", "1200"),
        ("PatientID", "P" * 80, "P" * 80),
    ],
)
@pytest.mark.filterwarnings("ignore:The value length")
def test_what_anonymizers_write_is_no_obstacle(tmp_path, kind, name, value, kept):
    made = make(kind, write_series(tmp_path / "s", make_hu((4, 12, 12)), raw(name, value)))
    assert str(pydicom.dcmread(saved(made, tmp_path))[name].value or "") == kept


@pytest.mark.parametrize("kind", ["sr", "page"])
@pytest.mark.filterwarnings("ignore:Failed to decode byte string")
def test_a_name_in_another_character_set_is_left_empty(tmp_path, kind):
    """Read as what its header names, it would be another name."""
    edit = raw("PatientName", "Müller^Jürgen", "latin-1")
    made = make(kind, write_series(tmp_path / "s", make_hu((4, 12, 12)), edit))
    assert str(pydicom.dcmread(saved(made, tmp_path)).PatientName) == ""


def test_a_bundle_has_the_values_that_the_headers_write(tmp_path):
    """Some systems write the numbers of several orders into one accession number."""
    source = read_source(study_of(write_series(tmp_path / "s", make_hu((4, 12, 12)), raw("AccessionNumber", r"A1\A2"))))
    assert source.identity.accession_number == r"A1\A2"
    assert structured_report(FINDINGS[:1], ALGORITHM, source).AccessionNumber == ["A1", "A2"]


def test_no_message_quotes_a_header(series, monkeypatch, caplog, recwarn):
    def fail(*_, **__):
        logging.getLogger("highdicom").error(SECRET)
        logging.getLogger("pydicom").warning(SECRET)
        warnings.warn(SECRET, stacklevel=1)
        raise ValueError(SECRET)

    source = read_source(study_of(series))
    monkeypatch.setattr("highdicom.sr.Comprehensive3DSR", fail)
    with pytest.raises(ReportError, match="no report can be made from what its headers hold") as refusal:
        structured_report(FINDINGS, ALGORITHM, source)
    assert refusal.value.__cause__ is None and SECRET not in str(refusal.value)
    assert SECRET not in caplog.text and not any(SECRET in str(each.message) for each in recwarn)


def test_nifti_has_no_study(nifti, series):
    scan = nifti(np.zeros((4, 4, 4), np.int16))
    with pytest.raises(ReportError, match=r"scan.nii.gz: it is not DICOM.*Leave out --dicom_sr"):
        refuse_without_study([study_of(series), study_of(scan)], "--dicom_sr")
    refuse_without_study([study_of(series)], "--dicom_sr")


def test_a_missing_library_is_named(series, monkeypatch):
    source = read_source(study_of(series))
    monkeypatch.setitem(__import__("sys").modules, "highdicom", None)
    with pytest.raises(ReportError, match=r"need highdicom.*pip install"):
        structured_report(FINDINGS, ALGORITHM, source)


def test_the_page_is_a_colour_picture_that_names_nobody(series, tmp_path):
    page = pydicom.dcmread(saved(make("page", series), tmp_path))
    pixels = page.pixel_array
    assert pixels.shape == (960, 1280, 3) and pixels.dtype == np.uint8
    assert page.BurnedInAnnotation == "NO" and "Research only" in page.ImageComments
    red = (pixels == (0xA0, 0, 0)).all(axis=-1)
    assert red[:60].mean() > 0.2 and not red[100:].any(), "the warning is burnt in on top"


def test_a_page_is_what_its_slices_are(tmp_path):
    """One slice with a name burnt into it may be among those that are shown, and so may one that lost something."""
    kept = {
        "LossyImageCompression": "01",
        "LossyImageCompressionRatio": 9.5,
        "LossyImageCompressionMethod": "ISO_10918_1",
    }

    def edit(ds, k):
        ds.BurnedInAnnotation = "YES" if k == 1 else "NO"
        for name, value in kept.items() if k == 1 else ():
            setattr(ds, name, value)

    path = saved(make("page", write_series(tmp_path / "s", make_hu((4, 12, 12)), edit)), tmp_path)
    page = pydicom.dcmread(path)
    assert page.BurnedInAnnotation == "YES" and {name: page[name].value for name in kept} == kept
    assert dciodvfy_errors(path) == []


@pytest.mark.parametrize("count", [1, 18, 60])
def test_a_page_has_room_for_any_number_of_findings(count):
    """Their names are no formulas, whatever stands in them."""
    findings = [Finding(rf"$\x {index} $ " * 9, index / count, 0.5) for index in range(count)]
    volume = read_volume(np.zeros((6, 8, 8), np.int16), spacing_mm=(2, 2, 2))
    pictures = [Picture(r"$\x $ " * 40, index) for index in range(MOST_PICTURES)]
    assert draw_page(findings, ALGORITHM, AxialSlices.of(volume), pictures).shape == (960, 1280, 3)


def test_a_page_has_room_for_any_number_of_prompts():
    algorithm = replace(ALGORITHM, own_prompts=("label: The label is present.|The label is not present.",) * 60)
    volume = read_volume(np.zeros((6, 8, 8), np.int16), spacing_mm=(2, 2, 2))
    page = draw_page(FINDINGS, algorithm, AxialSlices.of(volume), [])
    assert (page[-4:] == 255).all(), "they end above the edge"
    assert (page[-104:-94] == 255).all(), "and begin below the scores"


def test_those_called_present_are_shown_first():
    findings = [Finding("a", 0.9), Finding("b", 0.2, 0.1), Finding("c", 0.3, 0.1), Finding("d", 0.5, 0.8)]
    assert [each.label for each in worth_a_picture(findings)] == ["c", "b", "a", "d"]


def test_threads_that_are_quiet_leave_no_silence_and_end_nobodys():
    """Loggers and warnings belong to the process, and a warning of a header can quote it."""
    first, second, logger = threading.Event(), threading.Event(), logging.getLogger("pydicom")
    level = logger.level

    def make_first():
        first.set()
        second.wait(0.1)  # in vain: nobody else is quiet meanwhile

    def make_second():
        second.set()
        first_one.join(0.1)  # has it not ended before, its end would be the end of this silence
        return logger.level

    first_one = threading.Thread(target=quietly, args=(make_first, ""))
    first_one.start()
    first.wait()
    assert quietly(make_second, "") > logging.CRITICAL
    first_one.join()
    assert logger.level == level


@pytest.mark.parametrize("kind", ["sr", "page"])
def test_no_more_of_a_deflated_file_is_inflated_than_its_header(tmp_path, monkeypatch, kind):
    def deflate(ds, k):
        ds.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian

    series = write_series(tmp_path / "series", make_hu((6, 16, 12)), deflate)
    monkeypatch.setattr("pydicom.filereader.zlib.decompress", lambda *_: pytest.fail("all of it is inflated"))
    report = pydicom.dcmread(saved(make(kind, series), tmp_path))
    assert report.PatientID == f"{SECRET}-ID" and report.StudyInstanceUID == "1.2.4"
