"""What the app does without a browser."""

import base64
import io
import json
import re
import zipfile
from functools import partial
from types import SimpleNamespace

import nibabel
import numpy as np
import PIL.Image
import pytest
from adapter_files import RESULTS, save_adapter
from app_engine import centre_of_bright, engine_of, write_marked
from scan_files import SECRET, make_hu, write_series

from medct import CT_CLIP_LABELS, read_volume
from medct.app import page, views
from medct.app.scans import Engine, ScanError, data_uri
from medct.cli import main
from medct.inference.maps import map_findings
from medct.inference.slices import LETTERS, WINDOWS_HU
from medct.reporting.findings import Finding


@pytest.fixture(scope="module")
def engine() -> Engine:
    return engine_of()


@pytest.fixture(scope="module")
def phantom(engine):
    return engine.phantom()


def test_scores_are_those_of_the_pipeline(engine, tmp_path):
    path = write_marked(tmp_path / "scan.nii.gz")
    expected = {each["label"]: each["score"] for each in engine.pipe(str(path))}
    scan = engine.read(path)
    assert scan.labels == list(CT_CLIP_LABELS)
    assert {each.label: each.score for each in scan.findings} == pytest.approx(expected)
    assert scan.name == "scan.nii.gz"


def test_a_zip_of_dicom_is_read(engine, tmp_path):
    series = write_series(tmp_path / "series", make_hu((6, 16, 12)))
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        for path in series.iterdir():
            archive.write(path, path.name)
    scan = engine.read(tmp_path / "study.zip")
    np.testing.assert_array_equal(scan.volume.array, read_volume(series).array)
    shown = views.findings_table(scan) + json.dumps(views.as_json(engine.algorithm, scan))
    assert SECRET not in shown


@pytest.mark.parametrize("flips", [(), (0,), (1,), (0, 1), (2,), (0, 1, 2)])
def test_the_patients_right_is_on_the_left(engine, tmp_path, flips):
    scan = engine.read(write_marked(tmp_path / "scan.nii.gz", flips))
    row, column = centre_of_bright(np.asarray(engine.picture(scan, 10, "Bone")))
    assert row == pytest.approx(0.24, abs=0.03) and column == pytest.approx(0.23, abs=0.03)


def test_letters_are_drawn_at_their_sides(engine, phantom, monkeypatch):
    """Each letter changes its own side of the picture, and no other."""
    sides = {"R": np.s_[:, :40], "L": np.s_[:, -40:], "A": np.s_[:60], "P": np.s_[-60:]}
    for name, x, y in LETTERS:
        monkeypatch.setattr("medct.app.scans.LETTERS", ())
        bare = np.asarray(engine.picture(phantom, 30, "Lung")).astype(int)
        monkeypatch.setattr("medct.app.scans.LETTERS", [(name, x, y)])
        changed = (np.asarray(engine.picture(phantom, 30, "Lung")) != bare).any(axis=-1)
        assert changed.any() and changed[sides[name]].sum() == changed.sum(), name


def test_a_slice_that_is_not_square_is_shown_in_its_proportions(engine):
    volume = read_volume(np.zeros((8, 20, 10), np.int16), spacing_mm=(3, 2, 1), orientation="SPL")
    image = engine.picture(engine._scored("x", volume), 2, "Lung")
    assert image.size == (160, 640)


def test_windows_and_overlay_change_the_picture(engine, phantom):
    index = engine.strongest_slice(phantom, "Pleural effusion")
    pictures = [np.asarray(engine.picture(phantom, index, window)) for window in WINDOWS_HU]
    assert not any(np.array_equal(pictures[0], other) for other in pictures[1:])
    assert (np.ptp(pictures[0], axis=-1) > 60).mean() < 0.01, "grey but for the letters"
    overlaid = np.asarray(engine.picture(phantom, index, "Lung", "Pleural effusion"))
    assert (np.abs(overlaid.astype(int) - pictures[0]).max(axis=-1) > 20).mean() > 0.01


def test_the_map_is_that_of_the_command(engine, phantom):
    (expected,) = map_findings(engine.pipe, phantom.encoded, ["Cardiomegaly"])
    np.testing.assert_allclose(engine.map_of(phantom, "Cardiomegaly").patches, expected.patches)


def test_a_scan_is_encoded_once_whatever_it_is_asked(engine, monkeypatch):
    scan = engine.phantom()
    monkeypatch.setattr(engine.pipe.model.vision_model, "forward", None)
    engine.ask(scan, "large mass")
    assert 0 <= engine.strongest_slice(scan, "large mass") < len(scan.slices)


def test_own_findings_stand_beside_the_models(engine):
    scan = engine.phantom()
    engine.ask(scan, "Rib fracture\n\n  Rib fracture \nCardiomegaly\nlarge mass")
    assert scan.labels == [*CT_CLIP_LABELS, "Rib fracture", "large mass"]
    (expected,) = engine.pipe(scan.volume, candidate_labels=["large mass"])
    assert scan.findings[-1].score == pytest.approx(expected["score"], abs=1e-5)
    engine.ask(scan, "")
    assert scan.labels == list(CT_CLIP_LABELS)
    with pytest.raises(ScanError, match="At most 20 findings"):
        engine.ask(scan, "\n".join(f"finding {index}" for index in range(21)))


def test_what_is_called_present_is_shown_first(engine, monkeypatch):
    """As on the page of a report."""
    found = [Finding("a", 0.9), Finding("b", 0.8, 0.85), Finding("Emphysema", 0.3, 0.1), Finding("c", 0.2, 0.1)]
    monkeypatch.setattr(engine, "_findings", lambda *_, **__: found)
    shown = page._Answers(SimpleNamespace(Dropdown=dict, Slider=dict), engine).take_phantom("Lung")
    assert shown[4]["value"] == "Emphysema"


def test_lines_of_a_table_are_findings(engine):
    scan = engine.phantom()
    assert engine.ask(scan, "rib\tfracture\nlarge mass\t") is None
    assert scan.labels[len(CT_CLIP_LABELS) :] == ["rib fracture", "large mass"]


def test_words_that_the_model_does_not_know_are_remarked_on(engine):
    """They are all the same word to it."""
    own = SimpleNamespace(skip=None, Dropdown=lambda **_: None)
    with pytest.warns(UserWarning, match="does not know words"):
        _, said, table, *_ = page._Answers(own, engine).ask(engine.phantom(), "肺结节\nlarge mass")
    assert "does not know words in the prompts of 1 of 2 labels (肺结节). Give them words" in said
    assert "肺结节" in table


def test_a_refusal_names_the_file_alone(engine, tmp_path):
    path = tmp_path / "wrong.nii.gz"
    path.write_text("nothing")
    with pytest.raises(ScanError) as refusal:
        engine.read(path)
    said = str(refusal.value)
    assert said.startswith("wrong.nii.gz: it is not a NIfTI") and str(tmp_path) not in said


def test_a_program_reaches_and_removes_its_own_upload_alone(engine, tmp_path):
    """gradio lets it name the folder of all uploads as well, and each of theirs."""
    (tmp_path / "uploads/a").mkdir(parents=True)
    path = write_marked(tmp_path / "uploads/a/scan.nii.gz")
    answers = page._Answers(SimpleNamespace(Error=lambda said, **_: RuntimeError(said)), engine)
    for folder in (path.parent, path.parent.parent):
        with pytest.raises(RuntimeError, match=f"^{folder.name}: it is no file"):
            answers.predict(str(folder))
        assert path.exists()
    assert answers.predict(str(path))["scan"] == path.name
    assert list(tmp_path.rglob("*")) == [path.parent.parent]


def test_a_remedy_says_what_the_page_cannot_do(engine, tmp_path):
    """A whole study often holds several series, and the page does not ask which."""
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        for number in ("1.2.8", "1.2.9"):
            edit = partial(lambda number, ds, k: setattr(ds, "SeriesInstanceUID", number), number)
            for path in write_series(tmp_path / number, make_hu((6, 16, 12)), edit).iterdir():
                archive.write(path, f"{number}/{path.name}")
    with pytest.raises(ScanError, match=r"holds 2 CT series .* This page has no such setting: upload a file"):
        engine.read(tmp_path / "study.zip")
    with pytest.raises(ScanError, match="a zip") as refusal:
        engine.read(next((tmp_path / "1.2.8").iterdir()))
    assert "no such setting" not in str(refusal.value)


def test_an_unknown_failure_quotes_nothing(engine, tmp_path, monkeypatch):
    monkeypatch.setattr("medct.app.scans.read_volume", lambda *_, **__: (_ for _ in ()).throw(KeyError(SECRET)))
    (tmp_path / "scan.nii").touch()
    with pytest.raises(ScanError, match=r"^scan.nii: reading failed \(KeyError in \S+, line \d+\). Report this.$"):
        engine.read(tmp_path / "scan.nii")


def test_remarks_are_shown(engine, tmp_path):
    array = np.full((8, 8, 8), 50, np.int16) + np.eye(8, dtype=np.int16)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "s.nii")
    assert "Note: its values lie within" in views.findings_table(engine.read(tmp_path / "s.nii"))


def test_operating_points_are_shown_where_there_are_any(tmp_path, phantom, engine):
    thresholds = {"Emphysema": 0.0, "Cardiomegaly": 1.0}
    base, results = engine.pipe.model.name_or_path, RESULTS | {"thresholds": thresholds}
    adapter = save_adapter(base, tmp_path / "site-b", results=results)
    adapted = engine_of(adapter=str(adapter))
    rows = re.findall(r'<tr class="(\w+)"><td>([^<]*)<', views.findings_table(adapted.phantom()))
    found = {label: kind for kind, label in rows}
    assert len(rows) == 18 and found["Emphysema"] == "above" and found["Cardiomegaly"] == "below"
    assert found["Lung nodule"] == "none"
    assert not re.search('<tr class="(above|below)"', views.findings_table(phantom))
    assert "adapter: site-b" in adapted.algorithm.parameters


def test_a_probability_is_never_shown_as_certain():
    scan = SimpleNamespace(name="a", notes=[], findings=[Finding("a", 0.9, probability=p) for p in (0.999, 0.001, 0.5)])
    shown = re.findall(r'<td class="number">([^<]*)</td></tr>', views.findings_table(scan))
    assert shown == ["&gt;0.99", "&lt;0.01", "0.50"]


def test_downloads_are_part_of_the_page(engine, phantom):
    shown = views.downloads(engine.algorithm, phantom)
    links = dict(re.findall(r'download="([^"]*)" href="data:[^,]*,([^"]*)"', shown))
    files = {name: base64.b64decode(text).decode() for name, text in links.items()}
    assert [each["label"] for each in json.loads(files["findings.json"])["findings"]] == list(CT_CLIP_LABELS)
    lines = files["findings.csv"].splitlines()
    assert lines[0].startswith("# Research only") and len(lines) == 2 + 18


def test_text_from_outside_is_no_markup(engine):
    scan = engine.phantom()
    engine.ask(scan, "<script>x</script>")
    scan.name = "<b>name</b>"
    shown = views.findings_table(scan) + views.message("<em>")
    shown += views.slice_view(engine, scan, 3, "Lung", scan.labels[-1])
    assert not re.search("<script>|<b>name|<em>", shown)


def test_a_classifier_has_no_map(classifier_folder):
    engine = engine_of(str(classifier_folder))
    scan = engine.phantom()
    assert not engine.can_be_asked and engine.strongest_slice(scan, scan.labels[0]) == len(scan.slices) // 2
    engine.picture(scan, 1, "Lung", scan.labels[0])
    assert "sentence" not in views.findings_table(scan), "it is asked in none"


def test_the_banner_says_what_it_is(engine):
    said = views.banner(engine.algorithm)
    assert "Research only" in said and "patient data" in said and "synthetic drawings" in said


def test_pictures_hold_themselves():
    image = PIL.Image.new("RGB", (4, 3), "red")
    uri = data_uri(image)
    assert PIL.Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size == (4, 3)


def test_old_uploads_are_swept_away(tmp_path):
    (tmp_path / "half").write_bytes(b"x")
    page.sweep(tmp_path, age_s=60)
    assert (tmp_path / "half").exists()
    page.sweep(tmp_path, age_s=-1)
    assert not (tmp_path / "half").exists()


def test_the_command_serves_the_phantom_base_unless_told(monkeypatch, converted):
    served = []
    monkeypatch.delenv("MEDCT_MODEL", raising=False)
    monkeypatch.setattr("medct.cli.app.import_gradio", lambda: None)
    monkeypatch.setattr("medct.cli.app.serve", lambda *arguments: served.append(arguments))
    assert main(["app", "--cpu"]) == 0
    assert main(["app", "--cpu", "--model", str(converted), "--port", "8000", "--max_file_mb", "2"]) == 0
    (first, *rest), (other, *others) = served
    assert (first.algorithm.model, first.algorithm.is_synthetic) == ("phantom_base", True)
    assert (other.algorithm.model, other.algorithm.is_synthetic) == (converted.name, False)
    assert (rest, others) == (["127.0.0.1", None, 2**30], ["127.0.0.1", 8000, 2**21])


def test_a_missing_library_is_named(refused, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert "The app needs gradio" in refused("app")
