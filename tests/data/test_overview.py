"""What the overview counts, and that its pictures stand upright."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from ct_rate_like import ct_rate_files, write_files
from PIL import Image

from medct import CT_CLIP_LABELS, MedCTConfig
from medct.cli import data_commands, main
from medct.common.lock import only_run
from medct.data import overview, phantom_source
from medct.data.sources import DataError, Skipped, Source
from medct.image_processing_medct import MedCTImageProcessor
from medct.volume_medct import CTVolume, affine_from_spacing

SMALL = {"image_size": [16, 24, 20], "patch_size": [4, 4, 4], "target_spacing_mm": [20.0, 15.0, 20.0]}


@pytest.fixture(scope="module")
def config() -> MedCTConfig:
    return MedCTConfig(vision_config=SMALL)


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """Rows whose volumes do not exist: opening one fails."""

    def __call__(self, key: int) -> dict:
        labels = [float(key % 2), math.nan, 0.0] if key else [0.0, 0.0, 0.0]
        report = ("", "one two three", "one two three", "one two three four five")[key]
        return {"id": f"s{key}", "patient": f"p{key // 2}", "report": report, "labels": labels, "volume": "nowhere.nii"}


def source(num_studies: int = 4) -> Source:
    skipped = (Skipped("head_1", "no chest"), Skipped("head_2", "no chest"), Skipped("x", "no labels"))
    groups = [(key,) for key in range(num_studies - 1)] + [(num_studies - 1, 0)]
    return Source(groups, Unreadable(), ("A", "Bee", "C"), "4 studies", skipped)


def test_counts_read_no_volume():
    summary = overview.summarize(source())
    assert (summary["num_studies"], summary["num_volumes"], summary["num_patients"]) == (4, 5, 2)
    assert summary["labels"]["A"] == {"present": 2, "absent": 2, "unknown": 0, "prevalence": 0.5}
    assert summary["labels"]["Bee"] == {"present": 0, "absent": 1, "unknown": 3, "prevalence": 0.0}
    assert summary["no_finding"] == {"studies": 1, "known": 1}
    assert (summary["reports"]["missing"], summary["reports"]["distinct"]) == (1, 2)
    assert summary["reports"]["words"] == {"min": 3, "q1": 3, "median": 3, "q3": 5, "max": 5}
    assert summary["reports"]["tokens"] is None
    assert summary["skipped"] == {"no chest": ["head_1", "head_2"], "no labels": ["x"]}
    text = overview.as_text(summary)
    assert "no finding: 1 of 1 study without an unknown label" in text
    for line in ("4 studies, 5 volumes, 2 patients", "3 reports, 2 distinct; 1 missing", "no chest (head_1, head_2)"):
        assert line in text
    json.dumps(summary, allow_nan=False)


def test_tokens_are_the_models(processor):
    tokenizer = processor.tokenizer
    tokenizer.model_max_length = 14
    reports = overview.summarize(source(), tokenizer)["reports"]
    # Letters are words of this tokenizer's vocabulary, and each report has a start and an end token.
    lengths = [len(tokenizer(text)["input_ids"]) for text in ("one two three", "one two three four five")]
    assert (reports["tokens"]["min"], reports["tokens"]["max"]) == tuple(lengths)
    assert reports["cut"] == sum(length > 14 for length in [lengths[0], *lengths])


def test_a_source_without_labels_and_reports_is_counted():
    def read(key: int) -> dict:
        return {"id": "a", "patient": "p", "report": "", "labels": [math.nan], "volume": "nowhere.nii"}

    summary = overview.summarize(Source([(0,)], read, ("A",), "1 study"))
    assert summary["labels"]["A"]["prevalence"] is None
    assert summary["reports"] == {"missing": 1, "distinct": 0, "words": None, "tokens": None, "cut": None}
    assert "-" in overview.as_text(summary)


def test_shares_are_counted_by_a_rule_that_is_said():
    def read(key: int) -> dict:
        return {"id": f"{key}", "patient": "p", "report": "", "labels": [(0, 0.5, 0.7, 1)[key]], "volume": "v.nii"}

    summary = overview.summarize(Source([(0,), (1,), (2,), (3,)], read, ("A",), "4 studies"))
    assert (summary["labels"]["A"]["present"], summary["labels"]["A"]["absent"], summary["shares"]) == (2, 2, 2)
    said = "labels between 0 and 1: 2; above 0.5 they count as present, else as absent"
    assert said in overview.as_text(summary)
    assert "between 0 and 1" not in overview.as_text(overview.summarize(source()))


@pytest.mark.parametrize("orientation", ["SLP", "RAS", "PIR"])
def test_pictures_stand_upright(orientation):
    """Bright blocks towards the head, the front and the patient's left appear where a radiologist looks for them."""
    # Indices grow towards the right, the front and the head.
    hu = np.full((21, 23, 25), -1000, np.int16)
    hu[:, :, 20:] = 100  # head
    hu[:, 18:, :] = 200  # front
    hu[:5, :, :] = 300  # left
    vision = {"image_size": [30, 30, 30], "patch_size": [10, 10, 10], "orientation": orientation}
    config = MedCTConfig(vision_config={**vision, "target_spacing_mm": [1.0, 1.0, 1.0]})
    volume = CTVolume(hu, affine_from_spacing((1.0, 1.0, 1.0), "RAS"))
    values = MedCTImageProcessor.from_config(config.vision_config).process_volume(volume)
    (axial, _), (coronal, _), (sagittal, _) = overview.middle_slices(values, config)
    assert (axial[15, 23], axial[5, 15]) == pytest.approx((0.3, 0.2))  # left on the right, front above
    assert (coronal[15, 23], coronal[4, 15]) == pytest.approx((0.3, 0.1))  # left on the right, head above
    assert (sagittal[15, 5], sagittal[4, 15]) == pytest.approx((0.2, 0.1))  # front on the left, head above
    for picture in (axial, coronal, sagittal):
        assert picture[15, 15] == picture[26, 15] == -1


def test_pixels_have_their_shape_in_millimetres(config):
    values = torch.zeros(16, 24, 20)
    pictures = overview.middle_slices(values, config)
    assert [picture.shape for picture, _ in pictures] == [(20, 24), (16, 24), (16, 20)]
    # Rows are x, z, z and columns y, y, x of "SLP".
    assert [aspect for _, aspect in pictures] == pytest.approx([20 / 15, 20 / 15, 20 / 20])


def test_the_sheet_shows_studies_and_says_which_cannot_be_read(config, tmp_path):
    phantoms = phantom_source("A", range(4), seed=0)

    def read(key: int) -> dict:
        row = phantoms.read(key)
        row["id"] += r"$\x $"  # no formula
        return {**row, "volume": r"nowhere$\x $.nii"} if key == 2 else row

    path = tmp_path / "sheet.png"
    named = dataclasses.replace(phantoms, read=read, description=r"$\x $")
    unreadable = overview.contact_sheet(named, config, path, samples=9)
    assert [study.id for study in unreadable] == [r"phantom_a_2_a_1.nii.gz$\x $"]
    picture = np.asarray(Image.open(path).convert("L"))
    assert len(np.unique(picture)) > 100
    again = tmp_path / "again.png"
    overview.contact_sheet(named, config, again, samples=9)
    assert again.read_bytes() == path.read_bytes()


def test_the_command_counts_and_draws(tmp_path, converted, capsys):
    ct_rate = write_files(tmp_path / "ct_rate", ct_rate_files())
    sheet = tmp_path / "sheet.png"
    main(["overview", str(ct_rate), "--model", str(converted), "--sheet", str(sheet), "--split", "valid"])
    told = capsys.readouterr().out
    assert "3 studies, 4 volumes, 3 patients" in told
    assert "tokens" in told
    assert f"{sheet}: 3 samples, 1 of them unreadable" in told
    assert Image.open(sheet).format == "PNG"
    sheet.unlink()
    main(["overview", str(ct_rate), "--split", "valid", "--samples", "0", "--json", "--sheet", str(sheet)])
    assert list(json.loads(capsys.readouterr().out)["labels"]) == list(CT_CLIP_LABELS)
    assert not sheet.exists()


@pytest.mark.parametrize("command", [["overview", "phantoms"], ["prepare", "phantoms", "out"]])
def test_the_model_is_taken_at_the_revision_that_is_asked_for(command, monkeypatch, refused):
    def refuse(name, revision):
        raise DataError(f"{name} at {revision}")

    monkeypatch.setattr(data_commands, "load_config", refuse)
    assert refused(*command, "--model", "org/x", "--model_revision", "abc") == "org/x at abc"


@pytest.mark.parametrize("arguments", [["nowhere"], ["SOURCE", "--model", "nowhere"]])
def test_bad_input_ends_in_one_sentence(arguments, tmp_path, refused):
    arguments = [tmp_path if argument == "SOURCE" else argument for argument in arguments]
    assert refused("overview", *arguments).startswith("nowhere: ")


@pytest.mark.parametrize(("name", "format"), [("x.jpg", "JPEG"), ("x.JPEG", "JPEG"), ("x.png", "PNG")])
def test_a_sheet_is_what_its_name_says(tmp_path, name, format):
    main(
        [
            "overview",
            "phantoms",
            "--limit",
            "1",
            "--samples",
            "1",
            "--model",
            "phantom",
            "--sheet",
            str(tmp_path / name),
        ]
    )
    with Image.open(tmp_path / name) as image:
        assert image.format == format


@pytest.mark.parametrize("name", ["x", "x.gif", "x.pdf", "x.png.txt"])
def test_a_sheet_that_is_no_picture_is_refused_before_anything_is_read(tmp_path, name, refused, monkeypatch):
    monkeypatch.setattr("medct.cli.data_commands.open_source", lambda *_, **__: pytest.fail("reads"))
    said = refused("overview", "phantoms", "--sheet", tmp_path / name)
    assert "a sheet is a picture. Use one of the suffixes .png, .jpg, .jpeg." in said


def test_a_sheet_that_another_run_draws_is_refused(tmp_path, refused):
    sheet = tmp_path / "sheet.png"
    with only_run(sheet):
        said = refused("overview", "phantoms", "--limit", "2", "--samples", "1", "--sheet", sheet)
    assert said.startswith(f"{sheet} is being written by another run")
