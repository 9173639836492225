"""Reports on the command line: which are refused, what is written, and where patients' names never go."""

import csv
import json
import re

import numpy as np
import pydicom
import pytest
import torch
from reports import dciodvfy_errors
from scan_files import SECRET, SECRET_DATE, make_hu, write_series

from medct import CT_CLIP_LABELS, MedCTVisionModel
from medct.reporting.source import ReportError

pytest.importorskip("highdicom")


@pytest.fixture
def predict(converted, tmp_path, monkeypatch, ended):
    """`predict("series", "--fhir", "out.json")`: exit status and all that was printed, in a folder with two studies."""
    monkeypatch.chdir(tmp_path)
    write_series(tmp_path / "series", make_hu((6, 16, 12)))

    def predict(*arguments, model=converted):
        status, out, err = ended("predict", *arguments, "--model", model, "--cpu")
        return status, out + err

    return predict


def test_a_study_gets_all_that_is_asked_for(predict, tmp_path):
    """Also where it is read with flags: it lies in one folder with another series, and its headers give no HU."""

    def edit(ds, k):
        del ds.RescaleSlope, ds.RescaleIntercept

    write_series(tmp_path / "series", make_hu((9, 16, 12)), lambda ds, k: setattr(ds, "SeriesInstanceUID", "1.2.9"))
    write_series(tmp_path / "series", make_hu((6, 16, 12)), edit, prefix="b")
    reading = ("--series", "2", "--rescale_slope", "1", "--rescale_intercept", "-1024")
    reports = ("--dicom_sr", "out", "--dicom_page", "out", "--fhir", "out/findings.json", "--fhir_identity")
    status, said = predict("series", *reading, *reports, "--templates", "{label} ?|no {label}")
    assert status == 0
    assert '"prompts: {label} ?|no {label}"' in (tmp_path / "out/findings.json").read_text(encoding="utf-8")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    report, page = (next(name for name in names if name.endswith(end)) for end in ("_sr.dcm", "_page.dcm"))
    assert names == sorted([report, page, "findings.json"])
    assert all(f"report: out/{name}" in said for name in names)
    assert pydicom.dcmread(tmp_path / "out" / report).StudyInstanceUID == "1.2.4"
    assert dciodvfy_errors(tmp_path / "out" / report) + dciodvfy_errors(tmp_path / "out" / page) == []


def test_names_of_patients_go_into_dicom_alone(predict, tmp_path):
    _, said = predict(
        *("series", "--dicom_sr", "sr", "--dicom_page", "page", "--fhir", "f.json", "--output", "scores.jsonl")
    )
    (report,), (page,) = (list((tmp_path / folder).iterdir()) for folder in ("sr", "page"))
    for path in (report, page):
        assert SECRET.encode() in path.read_bytes()
    written = said + "".join(map(str, tmp_path.rglob("*")))
    written += "".join(path.read_text(encoding="utf-8") for path in tmp_path.glob("*.json*"))
    assert SECRET not in written and SECRET_DATE not in written


def test_a_bundle_says_whose_it_is_when_asked(predict, tmp_path):
    assert predict("series", "--fhir", "f.json")[0] == 0
    assert SECRET not in (tmp_path / "f.json").read_text(encoding="utf-8")
    assert predict("series", "--fhir", "f.json", "--fhir_identity")[0] == 0
    bundle = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    (patient,) = [each["resource"] for each in bundle["entry"] if each["resource"]["resourceType"] == "Patient"]
    assert patient["identifier"] == [{"value": f"{SECRET}-ID"}]


def test_the_same_run_replaces_its_files(predict, tmp_path):
    for _ in range(2):
        assert predict("series", "--dicom_sr", "out")[0] == 0
    assert len(list((tmp_path / "out").iterdir())) == 1
    assert predict("series", "--dicom_sr", "out", "--labels", "Rib fracture")[0] == 0
    assert len(list((tmp_path / "out").iterdir())) == 2, "what was asked is another report"
    (tmp_path / "labels.csv").write_text("label,words\nRib fracture,broken rib\n", encoding="utf-8")
    assert predict("series", "--dicom_sr", "out", "--labels", "labels.csv")[0] == 0
    assert len(list((tmp_path / "out").iterdir())) == 3, "and so is how"


def test_what_a_killed_run_has_left_of_its_reports_is_removed(predict, tmp_path):
    """It may name the patient."""
    reports = ("--dicom_sr", "out", "--fhir", "out/f.json", "--labels", "Emphysema")
    assert predict("series", *reports)[0] == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert len(names) == 2
    for name in names:
        (tmp_path / "out" / f".{name}.partial-0a1b2c3d").touch()
    assert predict("series", *reports)[0] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_copies_of_a_series_replace_nothing_of_each_other(predict, tmp_path):
    """They may differ in their values: each row names a report of its own, whichever run made it."""

    def edit(ds, k):
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.6.{k}"

    for name, hu in {"a": make_hu((6, 16, 12)), "b": make_hu((6, 16, 12))[:, ::-1]}.items():
        write_series(tmp_path / "copies" / name, hu, edit)
    reports = ("--labels", "Emphysema", "--dicom_sr", "out")
    assert predict("copies", *reports, "--output", "scores.jsonl")[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    paths = [path for row in rows for path in row["reports"]]
    assert len(set(paths)) == 2
    assert predict(str(tmp_path / "copies" / "a"), *reports)[0] == 0
    assert sorted(f"out/{path.name}" for path in (tmp_path / "out").iterdir()) == sorted(paths)


def test_what_was_noted_on_the_scan_is_said_in_its_reports(predict, tmp_path, monkeypatch):
    """But not where else its slices lie, which names places on this machine."""
    pages = []
    monkeypatch.setattr("medct.reporting.page.draw_page", lambda *args: pages.append(args[-1]) or blank)
    blank = np.zeros((960, 1280, 3), np.uint8)
    write_series(tmp_path / "gap", make_hu((6, 16, 12)), lambda ds, k: k != 2)
    write_series(tmp_path / "gap" / "more", make_hu((6, 16, 12)))
    reading = ("--resample_irregular", "--labels", "Emphysema")
    status, said = predict("gap", *reading, "--dicom_sr", "out", "--dicom_page", "out")
    assert status == 0 and "lie in gap/more too" in said
    note = "slices with steps of 2.500 to 5.000 mm were interpolated to 6 even ones"
    assert [note] in pages and not any("gap" in each for notes in pages for each in notes)
    reports = [path.read_bytes() for path in (tmp_path / "out").glob("*_sr.dcm")]
    assert sum(f"note on the scan: {note}".encode() in each for each in reports) == 1
    assert not any(b"gap" in each for each in reports)
    (tmp_path / "gap" / "more").rename(tmp_path / "more")
    assert predict("gap", *reading, "--fhir", "f.json")[0] == 0
    (report,) = [each["resource"] for each in json.loads((tmp_path / "f.json").read_text())["entry"][-1:]]
    assert f"note on the scan: {note}." in report["conclusion"] and note in report["text"]["div"]


@pytest.mark.parametrize("option", ["--dicom_sr", "--dicom_page"])
def test_nifti_is_refused_in_one_sentence(predict, nifti, option, tmp_path):
    nifti(make_hu((6, 8, 8)))
    status, said = predict("scan.nii.gz", "series", option, "out")
    assert status == 2 and not (tmp_path / "out").exists()
    assert said == (
        f"error: scan.nii.gz: it is not DICOM, so there is no study that a report could belong to. Leave out {option}, "
        "or pass the DICOM files.\n"
    )


def test_nifti_has_a_bundle(predict, nifti, tmp_path):
    nifti(make_hu((6, 8, 8)))
    assert predict("scan.nii.gz", "--fhir", "f.json")[0] == 0
    bundle = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert sum(each["resource"]["resourceType"] == "Observation" for each in bundle["entry"]) == len(CT_CLIP_LABELS)
    status, said = predict("scan.nii.gz", "--fhir", "g.json", "--fhir_identity")
    assert status == 2 and "Leave out --fhir_identity" in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("series", "other", "--fhir", "f.json"), "one bundle for one study, and there are 2"),
        (("series", "--fhir_identity"), "Add --fhir FILE"),
    ],
)
def test_what_cannot_be_written_is_refused(predict, tmp_path, arguments, expected):
    write_series(tmp_path / "other", make_hu((4, 12, 12)))
    status, said = predict(*arguments)
    assert status == 2 and expected in said and len(said.splitlines()) == 1


def test_a_study_whose_report_cannot_be_made_has_no_row(predict, tmp_path):
    write_series(tmp_path / "bad", make_hu((4, 12, 12)), lambda ds, k: delattr(ds, "StudyInstanceUID"))
    status, said = predict("bad", "series", "--dicom_sr", "out", "--output", "scores.csv")
    assert status == 1 and "failed: bad: its headers lack the UIDs" in said
    with (tmp_path / "scores.csv").open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["study"] == "series" and re.fullmatch(r"out/[0-9a-f]{16}_sr.dcm", row["reports"])
    assert (tmp_path / row["reports"]).is_file()


def test_a_study_has_all_of_its_reports_or_none(predict, tmp_path, monkeypatch):
    def fail(*_):
        raise ReportError("there is no page.")

    monkeypatch.setattr("medct.reporting.page.draw_page", fail)
    status, said = predict("series", "--dicom_sr", "out", "--dicom_page", "out")
    assert (status, "there is no page." in said) == (1, True)
    assert list(tmp_path.glob("out/*")) == []


def test_labels_that_reports_cannot_tell_apart_are_refused(predict, tmp_path):
    labels = ("--labels", "Rib fracture", "rib  Fracture")
    assert predict("series", *labels)[0] == 0
    status, said = predict("series", *labels, "--fhir", "f.json")
    assert status == 2
    assert "'Rib fracture' and 'rib  Fracture' are one finding in reports. Rename one of them." in said
    assert not (tmp_path / "f.json").exists()


@pytest.mark.parametrize("again", [[], ["--dicom_sr", "elsewhere"], ["--dicom_sr", "out", "--dicom_page", "out"]])
def test_rows_with_other_reports_do_not_mix(predict, tmp_path, again):
    assert predict("series", "--dicom_sr", "out", "--output", "scores.jsonl")[0] == 0
    status, said = predict("series", *again, "--output", "scores.jsonl")
    assert status == 2 and f"was started with reports {{'dicom_sr': '{tmp_path / 'out'}'}}, not " in said


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """The batch sizes that went through the vision encoder."""
    forward, sizes = MedCTVisionModel.forward, []

    def counting(self, pixel_values=None, **kwargs):
        sizes.append(len(pixel_values))
        return forward(self, pixel_values, **kwargs)

    monkeypatch.setattr(MedCTVisionModel, "forward", counting)
    return sizes


def test_pictures_of_a_page_cost_no_second_look_at_the_scan(predict, encoded):
    assert predict("series", "--dicom_page", "out")[0] == 0
    assert encoded == [1]


def test_each_report_gets_its_own_study_of_a_batch(predict, tmp_path, monkeypatch):
    write_series(tmp_path / "other", make_hu((6, 16, 12))[:, ::-1])
    got: dict[int, dict[str, torch.Tensor]] = {1: {}, 2: {}}
    for size, by_study in got.items():

        def keep(write, read, encoded, results, by_study=by_study):
            by_study[read.study.id] = encoded["last_hidden_state"]
            return {}

        monkeypatch.setattr("medct.cli.scan_commands.reported", keep)
        assert predict("series", "other", "--dicom_page", "out", "--batch_size", str(size))[0] == 0
    assert got[1].keys() == got[2].keys() and len(got[1]) == 2
    for study, expected in got[1].items():
        torch.testing.assert_close(got[2][study], expected)
    assert not torch.equal(*got[1].values())


def test_a_classifier_has_a_page_too(predict, classifier_folder, tmp_path):
    assert predict("series", "--dicom_page", "out", model=classifier_folder)[0] == 0
    assert len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("scan.nii.gz", None, "Use the suffix .json"),
        ("metadata.csv", "file_name,patient\n", "Use the suffix .json"),
        ("own.json", "{}", "it exists and is not a bundle of MedCT"),
        (
            "own.json",
            '{"resourceType": "Bundle", "entry": [{"resource": {"resourceType": "Patient"}}]}',
            "not a bundle",
        ),
        ("own.json", "[1", "not a bundle"),
        ("rows.json", None, "--output writes its rows there"),
    ],
)
def test_a_bundle_replaces_nothing_but_a_bundle(predict, nifti, tmp_path, name, content, said):
    nifti(make_hu((6, 8, 8)))
    path = tmp_path / name
    if content is not None:
        path.write_text(content, encoding="utf-8")
    before = path.read_bytes() if path.exists() else None
    status, told = predict("scan.nii.gz", "--fhir", name, "--output", "rows.json")
    assert status == 2 and said in told and len(told.splitlines()) == 1
    assert (path.read_bytes() if path.exists() else None) == before


def test_a_bundle_replaces_an_older_bundle(predict, tmp_path):
    for labels in (["a"], ["b"]):
        assert predict("series", "--fhir", "f.json", "--labels", *labels)[0] == 0
    assert '"b"' in (tmp_path / "f.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("option", ["--dicom_sr", "--dicom_page"])
def test_reports_do_not_lie_among_scans(predict, tmp_path, option):
    """The next run over the folder would take them for scans."""
    (tmp_path / "link").symlink_to("series")
    (tmp_path / "file").write_text("of others", encoding="utf-8")
    for folder, said in (("series", "scans are read from there"), ("link/new", "are read"), ("file", "it is a file")):
        status, told = predict("series", option, folder)
        assert status == 2 and said in told and len(told.splitlines()) == 1
    assert all(path.suffix == ".dcm" and "_" not in path.name for path in (tmp_path / "series").iterdir())
