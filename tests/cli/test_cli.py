"""The command line: findings, files that a second run resumes, embeddings, search, maps, exit status."""

import argparse
import csv
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from adapter_files import RESULTS, save_adapter
from launching import QUICKLY
from peft import LoraConfig
from scan_files import make_hu, write_noise, write_series

import medct
from medct import (
    CT_CLIP_LABELS,
    MedCTForImageClassification,
    MedCTModel,
    MedCTProcessor,
    MedCTVisionModel,
    ZeroShotCTClassificationPipeline,
)
from medct.adapters_medct import DESCRIPTION_FILE, calibrated
from medct.checks_medct import CheckpointMismatchError
from medct.cli import commands, main, score_commands
from medct.cli.arguments import RUNS, make_parser
from medct.cli.flags import refuse_idle
from medct.cli.scan_commands import prediction_table
from medct.common.distributed import LaunchError
from medct.common.lock import only_run
from medct.common.output import flush_output
from medct.data import phantom_source
from medct.inference.search import read_embeddings, write_embeddings
from medct.inference.studies import find_studies
from medct.publishing import loading
from medct.publishing.loading import ModelError, load_config, load_model, resolve_name
from medct.reporting.findings import SYNTHETIC
from medct.training.reproduce_paper import PaperSettings
from medct.training.settings import TrainingSettings

PHANTOM_BASE = Path(medct.__file__).with_name("phantom_base")


@pytest.fixture
def scans(tmp_path):
    """Four good studies and two bad ones."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for index in range(3):
        write_noise(folder / f"{index}.nii.gz", index)
    write_series(folder / "series", make_hu((4, 12, 12)))
    (folder / "bad.nii.gz").write_bytes(b"nothing")
    nibabel.save(nibabel.Nifti1Image(np.eye(4, dtype=np.float32)[:, :, None] * [0, 1], np.eye(4)), folder / "mask.nii")
    return folder


GOOD = ["0.nii.gz", "1.nii.gz", "2.nii.gz", "series"]
BAD = ["bad.nii.gz", "mask.nii"]


@pytest.fixture
def run(converted, ended):
    """`run("predict", ...)`: exit status, stdout, stderr, with the small model on the CPU."""

    def run(command: str, *arguments: object, model: object = converted) -> tuple[int, str, str]:
        options = ["--cpu"] if command != "recall" else []
        options += ["--model", str(model)] if model and command != "recall" else []
        return ended(command, *arguments, *options)

    return run


def read_csv(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def names(rows, scans):
    return [str(Path(row["study"]).relative_to(scans)) for row in rows]


def test_a_table_for_people(run, scans, pipe):
    status, out, err = run("predict", scans / "0.nii.gz", "--labels", "a", "b")
    assert (status, err) == (0, "")
    title, _, *lines = out.strip().splitlines()
    assert title == str(scans / "0.nii.gz")
    expected = pipe(str(scans / "0.nii.gz"), candidate_labels=["a", "b"])
    assert [line.split() for line in lines] == [
        [f"{result['score']:.3f}", f"{result['logits_margin']:+.2f}", result["label"]] for result in expected
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_findings_that_do_not_fit_are_told_once(run, scans, monkeypatch):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        status, _, err = run("predict", scans / "0.nii.gz", "--labels", "a")
        flush_output()  # nothing is left that would fail once more
    assert (status, err) == (2, "error: standard output: No space left on device.\n")


def test_a_model_that_knows_drawings_only_says_so(run, scans, tmp_path):
    """Of itself or of its adapter; scores of a patient would look like any others."""
    status, _, err = run("predict", scans / "0.nii.gz", "--labels", "a", model="phantom")
    assert (status, err.count(SYNTHETIC)) == (0, 1)
    assert err.startswith("NOTE: ")
    status, _, err = run("embed", scans / "0.nii.gz", "--output", tmp_path / "index.parquet", model="phantom")
    assert (status, err.count(SYNTHETIC)) == (0, 1)


def test_the_dtype_reaches_the_model(run, scans, converted, processor):
    """bfloat16 may choose other rows of the codebook, so what it gives is compared with itself."""
    _, out, _ = run("predict", scans / "series", "--format", "json", "--dtype", "bfloat16")
    model = MedCTModel.from_pretrained(converted, dtype=torch.bfloat16)
    pipe = ZeroShotCTClassificationPipeline(model=model, processor=processor, device="cpu")
    assert json.loads(out)["findings"] == pipe(str(scans / "series"))
    _, plain, _ = run("predict", scans / "series", "--format", "json")
    assert plain != out


def test_a_table_is_no_finding(run, scans):
    for labels in (["findings.csv", "Nodule"], ["Nodule", "findings.CSV"]):
        status, out, err = run("predict", scans / "0.nii.gz", "--labels", *labels)
        assert (status, out) == (2, "") and "a table stands alone" in err


def test_json_lines(run, scans, pipe):
    template = "{label} is present .|not {label}"
    status, out, err = run("predict", scans, "--format", "json", "--labels", "a", "--templates", template)
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 1
    assert names(rows, scans) == GOOD
    templates = [tuple(template.split("|"))]
    assert rows[0]["findings"] == pipe(rows[0]["study"], candidate_labels=["a"], prompt_templates=templates)
    assert "2 of 6 studies could not be read" in err
    assert len(re.findall(r"failed: .*(bad\.nii\.gz|mask\.nii): ", err)) == 2


def test_a_file_has_a_row_per_study_and_the_bad_ones_beside_it(run, scans, pipe, tmp_path):
    output = tmp_path / "out/scores.csv"
    status, out, err = run("predict", scans, "--output", output, "--batch_size", 3, "--num_workers", 2)
    assert (status, out) == (1, "")
    assert "2 of 6 studies could not be read; see scores.csv.failed.csv" in err
    rows = read_csv(output)
    assert names(rows, scans) == GOOD
    assert list(rows[0]) == ["study", *CT_CLIP_LABELS, "notes"]
    expected = {result["label"]: result["score"] for result in pipe(rows[3]["study"])}
    assert {label: float(rows[3][label]) for label in CT_CLIP_LABELS} == pytest.approx(expected, abs=2e-6)
    failed = read_csv(tmp_path / "out/scores.csv.failed.csv")
    assert names(failed, scans) == BAD
    assert "it is not a NIfTI" in failed[0]["reason"]
    settings = json.loads((tmp_path / "out/scores.csv.settings.json").read_text(encoding="utf-8"))
    assert settings["labels"] == list(CT_CLIP_LABELS)
    assert not list((tmp_path / "out").glob("*part*"))


def test_a_second_run_does_what_is_left(run, scans, tmp_path, monkeypatch):
    output = tmp_path / "scores.csv"
    run("predict", scans, "--output", output)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:2]) + lines[2][:30])  # stopped in the middle of the second row
    asked = []
    encode = ZeroShotCTClassificationPipeline.encode
    monkeypatch.setattr(
        ZeroShotCTClassificationPipeline,
        "encode",
        lambda self, volumes: asked.append(len(volumes)) or encode(self, volumes),
    )
    status, _, err = run("predict", scans, "--output", output)
    assert status == 1
    assert "1 of 6 studies are already in" in err
    assert sum(asked) == 3
    assert output.read_bytes() == whole
    # Bad studies are retried, and no longer listed once they can be read.
    (scans / "bad.nii.gz").write_bytes((scans / "0.nii.gz").read_bytes())
    (scans / "mask.nii").unlink()
    status, _, _ = run("predict", scans, "--output", output)
    assert status == 0
    assert names(read_csv(output), scans) == [*GOOD[:3], "bad.nii.gz", "series"]
    assert not (tmp_path / "scores.csv.failed.csv").exists()


def test_a_file_of_another_run_is_not_added_to(run, scans, tmp_path):
    output = tmp_path / "scores.jsonl"
    assert run("predict", scans / "0.nii.gz", "--output", output)[0] == 0
    before = output.read_bytes()
    status, _, err = run("predict", scans, "--output", output, "--labels", "a")
    assert status == 2
    assert "was started with labels" in err
    (tmp_path / "scores.jsonl.settings.json").unlink()
    status, _, err = run("predict", scans, "--output", output)
    assert status == 2
    assert "it is not known how it was made" in err
    assert output.read_bytes() == before


def test_an_unknown_failure_of_one_study_ends_nothing(run, scans, tmp_path, monkeypatch):
    read_volume = medct.read_volume

    def fails(source, **options):
        if "1.nii" in str(source):
            raise RuntimeError("a bug")
        return read_volume(source, **options)

    monkeypatch.setattr("medct.inference.studies.read_volume", fails)
    assert run("predict", scans, "--output", tmp_path / "scores.csv")[0] == 1
    assert names(read_csv(tmp_path / "scores.csv"), scans) == ["0.nii.gz", "2.nii.gz", "series"]


@pytest.fixture
def adapter(converted, tmp_path):
    thresholds = {"thresholds": {"Emphysema": 0.0, "Atelectasis": 2.0}}
    return save_adapter(converted, tmp_path / "adapter", results=RESULTS | thresholds)


def test_an_adapter_names_its_base_and_calls_findings_present(run, scans, adapter, tmp_path):
    status, out, _ = run("predict", scans / "0.nii.gz", "--adapter", adapter, model=None)
    assert status == 0
    assert re.search(r"Emphysema  present\n", out)
    assert re.search(r"Atelectasis  absent\n", out)
    assert re.search(r"Lung nodule\n", out)
    run("predict", scans / "0.nii.gz", "--adapter", adapter, "--output", tmp_path / "scores.csv")
    (row,) = read_csv(tmp_path / "scores.csv")
    assert (row["Emphysema present"], row["Atelectasis present"], row["Lung nodule present"]) == ("1", "0", "")
    assert not any("probability" in column for column in row)
    run(
        "predict",
        scans / "0.nii.gz",
        "--adapter",
        adapter,
        "--templates",
        "{label} ?|no {label}",
        "--output",
        tmp_path / "own.csv",
    )
    (row,) = read_csv(tmp_path / "own.csv")
    assert not any("present" in column for column in row), "a threshold holds for the words that it was chosen with"


def test_a_probability_is_never_shown_as_certain():
    finding = {"label": "Emphysema", "score": 0.9, "logits_margin": 2.2, "probability": 0.9997}
    shown = prediction_table({"study": "a.nii", "notes": [], "findings": [finding]})
    assert shown.endswith("Emphysema  probability >0.99\n\n")


def test_a_calibrated_adapter_gives_probabilities(run, scans, adapter, tmp_path):
    path = adapter / DESCRIPTION_FILE
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"calibration": {"Emphysema": [0.5, -1.0]}}),
        encoding="utf-8",
    )
    _, out, _ = run("predict", scans / "0.nii.gz", "--adapter", adapter, model=None)
    run("predict", scans / "0.nii.gz", "--adapter", adapter, "--output", tmp_path / "scores.csv")
    (row,) = read_csv(tmp_path / "scores.csv")
    expected = float(calibrated(float(row["Emphysema"]), 0.5, -1.0))
    assert float(row["Emphysema probability"]) == pytest.approx(expected, abs=1e-5)
    assert re.search(rf"Emphysema  present  probability {expected:.2f}\n", out)
    assert [column for column in row if "probability" in column] == ["Emphysema probability"]


def test_an_adapter_of_another_model_is_refused(run, scans, adapter):
    status, _, err = run("predict", scans / "0.nii.gz", "--adapter", adapter, model=PHANTOM_BASE)
    assert status == 2
    assert err.startswith(f"error: {adapter} was trained on other weights than this model's. Load its base, ")


def test_the_model_may_be_set_in_the_environment(run, scans, converted, monkeypatch):
    monkeypatch.delenv(commands.MODEL_VARIABLE, raising=False)
    status, _, err = run("predict", scans / "0.nii.gz", model=None)
    assert status == 2
    assert "error: Which model?" in err
    monkeypatch.setenv(commands.MODEL_VARIABLE, str(converted))
    assert run("predict", scans / "0.nii.gz", model=None)[0] == 0
    args = argparse.Namespace(model=None, revision=None, adapter=None)
    assert commands.model_of(args) == args.model == str(converted)  # which is what records of a run name


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["{scans}", "--output", "{tmp}/scores.txt"], "rows are written as .csv or .jsonl"),
        (["{scans}", "--format", "table", "--output", "{tmp}/scores.csv"], "rows are written as .csv or .jsonl"),
        (["{scans}", "--templates", "present"], "pair of sentences"),
        (["{scans}", "--adapter", "{tmp}"], "no adapter"),
    ],
)
def test_what_cannot_be_done_is_reported_in_a_sentence(run, scans, tmp_path, arguments, reason):
    status, out, err = run("predict", *(argument.format(scans=scans, tmp=tmp_path) for argument in arguments))
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert reason in err
    assert len(err.strip().splitlines()) == 1


def test_a_folder_that_is_not_a_model_is_refused(run, scans, tmp_path):
    status, _, err = run("predict", scans, model=tmp_path)
    assert status == 2
    assert "cannot load a model (" in err


@pytest.mark.parametrize("name", ["ct-clip", "./ct-clip", "models/site/ct-clip", "/models/ct-clip", "ct-clip/", "a\\b"])
@pytest.mark.parametrize("flag", ["--model", "--adapter"])
def test_a_slip_in_a_folders_name_is_refused_without_asking_the_hub(refused, scans, converted, flag, name, monkeypatch):
    monkeypatch.setattr("httpx2.Client.send", lambda *_, **__: pytest.fail("asks the Hub"))
    others = ["--model", converted] if flag == "--adapter" else []
    said = refused("predict", scans, "--cpu", *others, flag, name)
    failed = "cannot load a model" if flag == "--model" else "no adapter"
    why = "there is no such folder, and a Hub id reads ORG/NAME"
    assert said == f"{name}: {failed} ({why}). Pass a Hub id or a folder."


def test_a_slip_in_the_name_of_what_is_compared_with_is_refused_at_once(refused, converted, monkeypatch):
    monkeypatch.setattr("httpx2.Client.send", lambda *_, **__: pytest.fail("asks the Hub"))
    said = refused("evaluate", "--data", "phantoms", "--cpu", "--model", converted, "--against", "runs-old")
    assert said.startswith("runs-old: no adapter (there is no such folder")


def test_a_name_that_begins_as_folders_here_is_one_of_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(
        ModelError, match="runs is a folder here, but has none of that name; on the Hub it is hf://runs/b"
    ):
        resolve_name("runs/b")
    assert resolve_name("hf://runs/b") == "runs/b"
    assert resolve_name("org/b") == "org/b"
    (tmp_path / "runs/b").mkdir()
    assert resolve_name("runs/b") == "runs/b"


def test_a_file_is_no_name_of_an_adapter(tmp_path, monkeypatch):
    """On the Hub it would be looked for, with half a minute of retries without a network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ModelError, match=r"no adapter \(it is a file\)\. Pass the folder that holds it"):
        resolve_name("adapter_model.safetensors", "adapter")


def test_code_that_lies_beside_a_model_is_never_run(tmp_path, monkeypatch):
    """transformers would ask on standard input, and take a yes for an answer."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    config = {"model_type": "foreign", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "code.py").write_text("raise AssertionError('it was run')", encoding="utf-8")
    with pytest.raises(ModelError, match="contains custom code"):
        load_config(str(tmp_path))


def test_all_parts_of_a_model_are_taken_at_the_revision_that_is_asked_for(converted, monkeypatch):
    taken = []
    for part in (loading.AutoConfig, loading.MedCTModel, loading.AutoProcessor):

        def take(name, *args, part=part, take=part.from_pretrained, **options):
            taken.append((part.__name__, options.get("revision")))
            return take(name, *args, **options)

        monkeypatch.setattr(part, "from_pretrained", take)
    load_model(str(converted), revision="abc")
    assert set(taken) == {(part, "abc") for part in ("AutoConfig", "MedCTModel", "AutoProcessor")}


@pytest.mark.parametrize("command", ["predict", "overview", "variable"])
def test_the_phantom_base_is_at_hand_everywhere(run, scans, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if command == "overview":
        assert main(["overview", "phantoms", "--model", "phantom", "--limit", "2", "--samples", "0"]) == 0
        return
    if command == "variable":
        monkeypatch.setenv("MEDCT_MODEL", "phantom")
    status, out, err = run("predict", scans / "0.nii.gz", model=None if command == "variable" else "phantom")
    assert status == 0, err
    assert "Lung nodule" in out
    (tmp_path / "phantom").mkdir()
    status, _, err = run("predict", scans / "0.nii.gz", model="phantom")
    assert (status, "cannot load a model (" in err) == (2, True)  # a folder of that name comes first


@pytest.mark.parametrize("arguments", [["predict"], ["predict", "x", "--batch_size", "0"], ["nothing"], []])
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        ("predict {here} --adapter_revision abc", "--adapter"),
        ("overview phantoms --model_revision abc", "--model"),
        ("prepare phantoms {here}/shards --model_revision abc", "--model"),
        ("evaluate --data phantoms --against_revision abc", "--against"),
        ("recall --index i.parquet --findings Nodule Mass", "--metadata"),
        ("metrics scores.studies.csv --split tune", "METADATA"),
    ],
)
def test_flags_that_say_more_of_what_is_not_given(command, needed, tmp_path, refused):
    """`metrics` would give the figures of another split than was asked for."""
    said = refused(*command.format(here=tmp_path).split())
    assert f" does nothing without {needed}. Pass that, or leave it out." in said
    args = make_parser("").parse_args(["evaluate", "--repeat", "results.json", "--adapter_revision", "abc"])
    refuse_idle(args)  # of an adapter that is recorded


@pytest.mark.parametrize(
    "command",
    ["overview {} --revision abc", "overview {} --data_revision abc", "evaluate --data {} --data_revision abc"],
)
@pytest.mark.parametrize("source", ["phantoms", "my-studies"])
def test_a_commit_of_what_is_not_on_the_hub(command, source, tmp_path, refused):
    """It may be meant for the model."""
    address = source if source == "phantoms" else tmp_path
    model = ["--model", "phantom"]
    said = refused(*command.format(address).split(), *model)
    assert said == f"{address}: it is no data set on the Hub, so it has no commit 'abc'. Leave that out."


@pytest.mark.parametrize(
    "command",
    [
        "predict {} --model {} --revision abc",
        "predict {} --model phantom --revision abc",
        "predict {} --model org/base --revision abc --adapter {} --adapter_revision abc",
        "evaluate --data {} --model org/base --adapter org/site-b --against {} --against_revision abc",
        "overview {} --model {} --model_revision abc",
        "train --model {} --revision abc",
    ],
)
def test_a_commit_of_what_lies_here(command, tmp_path, refused):
    """A folder may have the name of a repository, whose commit was pinned."""
    said = refused(*command.replace("{}", str(tmp_path)).split())
    assert said.endswith(": it is here and not on the Hub, so it has no commit 'abc'. Leave that out.")


def sub_parsers():
    return make_parser("")._subparsers._group_actions[0].choices


@pytest.mark.parametrize("command", sorted(set(sub_parsers()) - set(RUNS)))
def test_help_explains_every_flag_and_gives_an_example(command, capsys):
    parser = sub_parsers()[command]
    assert all(action.help for action in parser._actions)
    has_default = [each for each in parser._actions if each.default not in (None, False, argparse.SUPPRESS)]
    assert [each.dest for each in has_default if "default" not in each.help] == []
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"\n  medct {command} " in capsys.readouterr().out


@pytest.mark.parametrize(("name", "settings"), {"train": TrainingSettings, "reproduce-paper": PaperSettings}.items())
def test_help_of_runs_explains_every_setting(name, settings, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "9999")
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: medct {name} [-h]" in out
    for field in dataclasses.fields(settings):
        help = re.search(rf"^  --{field.name}\b.*?  (\S.*)$", out.replace("\n           ", ""), re.MULTILINE)[1]
        assert field.default in (None, False) or "default" in help.lower(), field.name
    assert out.count("Turn off --gradient_checkpointing.") == (name == "reproduce-paper")


def test_train_knows_its_model_in_the_process_of_the_command(tmp_path):
    """There `import medct` alone registers nothing, so this needs a process of its own."""
    code = "import sys; sys.argv[0] = 'medct'; from medct.cli import run; run()"
    flags = ["--data", "nowhere", "--output_dir", tmp_path / "run", "--cpu"]
    command = [sys.executable, "-c", code, "train", *map(str, flags)]
    options = {"stdin": subprocess.DEVNULL, "env": os.environ | QUICKLY}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, **options)
    assert (done.returncode, done.stderr.splitlines()[-1].startswith("error: nowhere: no such folder")) == (2, True)


def test_an_adapter_of_unknown_origin_is_remarked_on_in_a_line(run, scans, adapter):
    (adapter / "medct_adapter.json").unlink()
    status, _, err = run("predict", scans / "0.nii.gz", "--adapter", adapter, "--labels", "a")
    assert status == 0
    assert (
        err == f"warning: {adapter} has no medct_adapter.json: it is not known whether it was trained on this model.\n"
    )


def test_embed_search_and_recall(run, scans, pipe, tmp_path):
    index = tmp_path / "index.parquet"
    reports = tmp_path / "reports.csv"
    reports.write_text("file_name,report\n0.nii.gz,a b\n1.nii.gz,c\nseries,c\n", encoding="utf-8")
    assert run("embed", scans / "0.nii.gz", scans / "bad.nii.gz", "--output", index)[0] == 1
    assert read_csv(tmp_path / "index.parquet.failed.csv")[0]["study"] == str(scans / "bad.nii.gz")
    # A second run adds what is new: studies, and the report of one that was embedded without.
    status, _, err = run("embed", scans, "--reports", reports, "--output", index)
    assert status == 1
    assert "1 of 6 studies are already in" in err
    embeddings = read_embeddings(index)
    assert [Path(study).name for study in embeddings.ids] == GOOD
    assert embeddings.has_report.tolist() == [True, True, False, True]
    assert embeddings.report_ids[1] == embeddings.report_ids[3] != embeddings.report_ids[0]
    pixel_values = pipe.preprocess(embeddings.ids[3])["pixel_values"]
    with torch.no_grad():
        image = pipe.model.get_image_features(pixel_values).pooler_output[0]
        texts = pipe.processor(text=["c"], return_tensors="pt")
        text = pipe.model.get_text_features(texts["input_ids"], texts["attention_mask"]).pooler_output[0]
    np.testing.assert_allclose(embeddings.image_embeds[3], image, atol=1e-6)
    np.testing.assert_allclose(embeddings.text_embeds[3], text, atol=1e-6)
    assert sorted(path.name for path in tmp_path.glob("index*")) == [
        "index.parquet",
        "index.parquet.failed.csv",
        "index.parquet.settings.json",
    ]

    status, out, _ = run("search", scans / "series", "--index", index, "-k", 2, "--format", "json", model=None)
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [row["rank"] for row in rows] == [1, 2]
    assert rows[0]["study"] == str(scans / "series")
    assert rows[0]["similarity"] == pytest.approx(1, abs=1e-5)
    status, out, _ = run("search", "c", "--index", index, "-k", 9, model=None)
    similarities = [float(line.split()[1]) for line in out.splitlines()[1:]]
    assert similarities == pytest.approx(
        sorted((embeddings.image_embeds @ text.numpy()).tolist(), reverse=True), abs=1e-4
    )
    status, out, _ = run("recall", "--index", index, "--format", "json")
    assert status == 0
    results = json.loads(out)
    assert (results["studies"], results["reports"]) == (3, 2)
    # Labels and patients from a table, by the ends of the paths.
    rows = [f"{name},{patient},{finding}" for name, patient, finding in zip(GOOD, "aabc", "1101", strict=True)]
    (tmp_path / "labels.csv").write_text("\n".join(["file_name,patient,Mass", *rows]), encoding="utf-8")
    options = ["--metadata", tmp_path / "labels.csv", "--findings", "Mass", "--pool", 2, "--bootstrap_resamples", 20]
    status, _, err = run("recall", "--index", index, *options)
    assert status == 2 and "A pool of 2 needs as many studies, and k up to that" in err
    status, out, _ = run("recall", "--index", index, *options[:4])
    assert status == 0
    assert out.startswith("3 studies with a report, 2 different reports, 2 patients\n")
    assert "3 scans with a finding" in out and "| CT-CLIP protocol: text to image |" in out
    status, _, err = run("recall", "--index", index, "--metadata", tmp_path / "labels.csv", "--findings", "Nodule")
    assert status == 2 and "has no column 'Nodule'" in err


def test_an_index_of_which_no_study_could_be_read_can_be_added_to(run, scans, tmp_path):
    index = tmp_path / "index.parquet"
    assert run("embed", scans / "bad.nii.gz", "--output", index)[0] == 1
    assert read_embeddings(index).image_embeds.shape[0] == len(read_embeddings(index).has_report) == 0
    for command, said in ((("search", "c"), "holds no study"), (("recall",), "No study of this index has a report")):
        status, _, err = run(*command, "--index", index, model=None)
        assert status == 2 and said in err
    assert run("embed", scans / "bad.nii.gz", scans / "0.nii.gz", "--output", index)[0] == 1
    assert read_embeddings(index).ids == [str(scans / "0.nii.gz")]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every name of a file is Unicode")
def test_a_name_that_no_index_can_hold_costs_its_study_alone(run, scans, tmp_path):
    index, good = tmp_path / "index.parquet", scans / "0.nii.gz"
    named = os.fsdecode(os.fsencode(scans) + b"/M\xfcller.nii.gz")
    shutil.copy(good, named)
    status, _, err = run("embed", good, named, "--output", index)
    assert status == 1
    assert "its name is not UTF-8" in err
    assert read_embeddings(index).ids == [str(good)]


def test_an_index_holds_each_study_once_wherever_its_run_was_stopped(run, scans, tmp_path, monkeypatch):
    index = tmp_path / "index.parquet"

    def write_and_stop(*arguments):
        write_embeddings(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("medct.inference.search.write_embeddings", write_and_stop)
        assert run("embed", scans / "0.nii.gz", "--output", index)[0] == 130
    assert run("embed", scans / "0.nii.gz", scans / "1.nii.gz", "--output", index)[0] == 0
    assert read_embeddings(index).ids == [str(scans / name) for name in GOOD[:2]]
    assert not list(tmp_path.glob("*.rows"))


def test_reports_that_could_be_of_several_studies_are_refused(run, scans, tmp_path):
    """And how many studies have none is said: the table may be of another hospital."""
    index, reports, other = tmp_path / "index.parquet", tmp_path / "reports.csv", tmp_path / "other"
    other.mkdir()
    shutil.copy(scans / "1.nii.gz", other / "0.nii.gz")
    reports.write_text("file_name,report\n0.nii.gz,a\n", encoding="utf-8")
    both = [scans / "0.nii.gz", other / "0.nii.gz"]
    status, _, err = run("embed", *both, "--reports", reports, "--output", index)
    assert status == 2 and not index.exists() and len(err.splitlines()) == 1
    assert f"{reports}: its row '0.nii.gz' could be of {both[0]} and of {both[1]}." in err
    status, _, err = run("embed", both[0], scans / "1.nii.gz", "--reports", reports, "--output", index)
    assert status == 0 and f"Without a report in {reports}: 1 of 2 studies." in err
    # The study that has its report already is none of those that the row could be of.
    status, _, err = run("embed", both[1], "--reports", reports, "--output", index)
    assert status == 0 and read_embeddings(index).has_report.tolist() == [True, False, True]
    status, _, err = run("embed", both[1], "--reports", tmp_path / "nope.csv", "--output", index)
    assert status == 2 and err == f"error: {tmp_path / 'nope.csv'}: no such file. Check the path.\n"


@pytest.mark.parametrize("query", ["", " ", "scan999.nii.gz", "a/b.nrrd", "/nowhere", "./case", "case/", "a/b.img"])
def test_a_query_that_is_no_text_is_no_text(run, tmp_path, monkeypatch, query):
    monkeypatch.chdir(tmp_path)
    status, _, err = run("search", query, "--index", "none.parquet")
    said = f"{query}: no such file or folder. Check" if query.strip() else "The query is empty. Pass a text"
    assert status == 2 and err.startswith(f"error: {said}") and len(err.splitlines()) == 1


@pytest.mark.parametrize("query", ["nodule w/o calcification.", "effusion/atelectasis", "5.5 mm", "long " * 999])
def test_a_text_is_a_text(run, tmp_path, query):
    _, _, err = run("search", query, "--index", tmp_path / "none.parquet")
    assert "none.parquet: no such file. Make it with" in err


def test_map(run, scans, tmp_path):
    (tmp_path / ".maps.partial-0a1b2c3d").mkdir()  # of one that was killed
    status, out, _ = run("map", scans / "0.nii.gz", "--labels", "a", "b c", "--output", tmp_path / "maps")
    assert status == 0
    assert "localises poorly" in out
    stems = ("a_debugging-aid", "b-c_debugging-aid")
    expected = sorted(f"{stem}{suffix}" for stem in stems for suffix in (".nii.gz", ".png"))
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == [*expected, "findings.json"]
    assert not list(tmp_path.glob(".maps*"))
    index = json.loads((tmp_path / "maps" / "findings.json").read_text(encoding="utf-8"))
    assert [(found["label"], found["name"]) for found in index] == [
        ("a", "a_debugging-aid"),
        ("b c", "b-c_debugging-aid"),
    ]
    scan, image = nibabel.load(scans / "0.nii.gz"), nibabel.load(tmp_path / "maps" / expected[0])
    assert image.shape == scan.shape
    np.testing.assert_allclose(image.affine, scan.affine)
    assert run("map", scans / "0.nii.gz", "--labels", "a", "--output", tmp_path / "maps")[0] == 2
    status, _, err = run("map", scans, "--labels", "a", "--output", tmp_path / "more")
    assert status == 2
    assert "holds 6 studies" in err


def test_a_classifier_gives_its_findings(run, scans, classifier_folder, tmp_path, monkeypatch):
    options = ["predict", scans / "0.nii.gz", scans / "1.nii.gz", "--batch_size", 2]
    status, _, err = run(*options, "--output", tmp_path / "scores.csv", model=classifier_folder)
    assert status == 0, err
    classifier = MedCTForImageClassification.from_pretrained(classifier_folder).eval()
    processor = MedCTProcessor.from_pretrained(classifier_folder)
    for row in read_csv(tmp_path / "scores.csv"):
        with torch.no_grad():
            logits = classifier(**processor(images=row["study"], return_tensors="pt")).logits[0]
        found = [float(row[label]) for label in classifier.config.label_names]
        assert found == pytest.approx(logits.sigmoid().tolist(), abs=1e-5)
    status, out, _ = run(*options, "--labels", "Emphysema", "--format", "json", model=classifier_folder)
    assert [found["label"] for found in json.loads(out.splitlines()[0])["findings"]] == ["Emphysema"]
    for wrong in (["--labels", "Rib fracture"], ["--templates", "{label}|no {label}"]):
        status, _, err = run(*options, *wrong, model=classifier_folder)
        assert status == 2
        assert err.startswith("error: ")
    for command in (
        ["embed", "--output", tmp_path / "i.parquet"],
        ["map", "--labels", "a", "--output", tmp_path / "m"],
    ):
        status, _, err = run(command[0], scans / "0.nii.gz", *command[1:], model=classifier_folder)
        assert status == 2
        assert "is a classifier" in err
    monkeypatch.setattr(score_commands, "open_source", lambda *_, **__: phantom_source("A", range(6), 0))
    data = ["--data", "anywhere", "--num_workers", 0, "--output", tmp_path / "scores.json"]
    assert run("evaluate", *data, model=classifier_folder)[0] == 0
    assert json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["sources"][0]["scans"] == 6


@pytest.mark.parametrize("what", ["architectures", "processor", "weights"])
def test_what_does_not_belong_together_is_refused(run, scans, converted, tmp_path, what):
    folder = tmp_path / "model"
    shutil.copytree(converted, folder)
    if what == "weights":
        MedCTVisionModel.from_pretrained(converted).save_pretrained(tmp_path / "vision")
        shutil.copy(tmp_path / "vision/model.safetensors", folder)
    else:
        path = folder / ("config.json" if what == "architectures" else "processor_config.json")
        content = json.loads(path.read_text(encoding="utf-8"))
        if what == "architectures":
            content["architectures"] = ["MedCTVisionModel"]
        else:
            content["image_processor"]["hu_min"] = -900
        path.write_text(json.dumps(content), encoding="utf-8")
    status, out, err = run("predict", scans / "0.nii.gz", model=folder)
    assert (status, out) == (2, "")
    said = {"architectures": "saved as MedCTVisionModel", "processor": "hu_min -900", "weights": "lacks the"}
    assert said[what] in err
    assert err.count("\n") == 1


LAUNCH = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]


@pytest.mark.slow
def test_two_processes_share_the_studies(run, scans, converted, tmp_path):
    """In a launch, and into the same file that one process writes."""
    run("predict", scans, "--output", tmp_path / "one.csv")
    package = tmp_path / "path"
    package.mkdir()
    (package / "medct").symlink_to(PHANTOM_BASE.parent)
    options = ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "medct.cli", "predict", scans, "--cpu"]
    output = tmp_path / "two.csv"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *LAUNCH, *options]
    done = subprocess.run(
        [*map(str, command), "--model", str(converted), "--output", str(output)],
        env=os.environ | {"PYTHONPATH": str(package)},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert "2 of 6 studies could not be read" in done.stderr
    assert done.returncode == 1
    one, two = read_csv(tmp_path / "one.csv"), read_csv(output)
    assert names(two, scans) == GOOD
    for single, shared in zip(one, two, strict=True):
        for label in CT_CLIP_LABELS:
            assert float(shared[label]) == pytest.approx(float(single[label]), abs=2e-6)
    assert names(read_csv(tmp_path / "two.csv.failed.csv"), scans) == BAD
    assert not list(tmp_path.glob("*part*"))


def launched(monkeypatch, connected: int, size: int | None) -> None:
    """This process is one of a launch of `size`, `connected` of which know each other; nothing is loaded in it."""
    monkeypatch.setattr(commands, "PartialState", lambda **_: SimpleNamespace(num_processes=connected))
    monkeypatch.setattr(commands, "load_pipeline", lambda *_, **__: pytest.fail("nothing is loaded for it"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", str(size))


@pytest.mark.parametrize(("connected", "size"), [(1, None), (1, 1), (2, 2), (1, 2)])
def test_processes_that_do_not_know_each_other_are_refused(monkeypatch, connected, size):
    """Each would do all of the work."""
    launched(monkeypatch, connected, size)
    args = argparse.Namespace(cpu=False)
    if connected == (size or 1):
        assert commands.start_processes(args).num_processes == connected
    else:
        with pytest.raises(LaunchError, match=r"2 processes .* are not connected\. Without GPUs, add --cpu"):
            commands.start_processes(args)


@pytest.mark.parametrize(
    ("own", "of_launch", "cpu"), [(False, "false", False), (True, "false", True), (False, "true", True)]
)
def test_the_launchs_own_flag_keeps_to_the_cpu(monkeypatch, own, of_launch, cpu):
    said = []
    monkeypatch.setattr(
        commands, "PartialState", lambda **options: said.append(options) or SimpleNamespace(num_processes=1)
    )
    monkeypatch.setenv("ACCELERATE_USE_CPU", of_launch)
    commands.start_processes(argparse.Namespace(cpu=own))
    assert said == [{"cpu": cpu}]


def test_variables_that_another_launch_has_left_are_named(monkeypatch):
    launched(monkeypatch, 1, 2)

    def refuse(cpu):
        raise ValueError("`MASTER_ADDR` env was not set.")

    monkeypatch.setattr(commands, "PartialState", refuse)
    with pytest.raises(LaunchError, match=r"`MASTER_ADDR` env was not set\. Use .* or unset WORLD_SIZE for a"):
        commands.start_processes(argparse.Namespace(cpu=True))


def test_processes_wait_long_only_for_those_that_they_have_met(monkeypatch):
    """One that ended before, as it had no scans to read, would keep the others waiting for a week."""
    launched(monkeypatch, 2, 2)
    waited = []
    monkeypatch.setattr(commands, "be_patient", waited.append)
    monkeypatch.setattr(commands, "PartialState", lambda cpu: SimpleNamespace(num_processes=2, waited=waited.copy()))
    assert commands.start_processes(argparse.Namespace(cpu=True)).waited == []
    assert waited == [commands._PATIENCE]


def test_several_processes_do_not_write_to_one_screen(run, scans, monkeypatch):
    launched(monkeypatch, 2, 2)
    status, out, err = run("predict", scans)
    assert (status, out, err) == (2, "", "error: Several processes need a file for their rows. Pass --output FILE.\n")


def test_a_folder_of_real_scans(run, shared, tmp_path):
    """All available scans, good and bad; what is bad is listed with the reason that `read_volume` gives."""
    realdata = shared / "realdata"
    if not realdata.is_dir():
        pytest.skip("the real scans are not at hand")
    for archive in realdata.glob("01_*/*.tar.xz"):
        with tarfile.open(archive) as opened:
            opened.extractall(tmp_path / "cptac", filter="data")
    output = tmp_path / "scores.csv"
    status, _, err = run("predict", realdata, tmp_path / "cptac", "--output", output, model=PHANTOM_BASE)
    assert status == 1
    rows, failed = read_csv(output), read_csv(tmp_path / "scores.csv.failed.csv")
    found = {study.id for study in find_studies([realdata, tmp_path / "cptac"])}
    assert {row["study"] for row in rows} | {row["study"] for row in failed} == found
    assert len(rows) + len(failed) == len(found)
    scored = {str(Path(row["study"]).relative_to(realdata)): row for row in rows if "realdata" in row["study"]}
    reasons = {row["study"].removeprefix(f"{realdata}/"): row["reason"] for row in failed}
    assert f"{len(failed)} of {len(found)} studies could not be read" in err
    # The same scan as DICOM and as NIfTI.
    dicom, nifti = (scored[f"07_cip_chest_64/{name}"] for name in ("ct-64Dicom", "ct-64.nii.gz"))
    for label in CT_CLIP_LABELS:
        assert float(dicom[label]) == pytest.approx(float(nifti[label]), abs=1e-4)
    assert any("cptac" in row["study"] for row in rows)
    assert "within 0..255" in scored["13_not_ct_or_not_hu/vtkjs_LIDC2_uint8_0-255.nii.gz"]["notes"]
    assert "2 CT series" in reasons["09_enhanced_ct_multiframe"]
    assert "localizer" in reasons["10_localizer_and_secondary_capture"]
    assert "between 28.11 and 38.11" in reasons["12_broken_series_dicom2nifti/sliceincrement_001"]
    assert "MR Image Storage" in reasons["13_not_ct_or_not_hu/sts_002_mr_t1"]
    assert "Positron" in reasons["13_not_ct_or_not_hu/sts_002_pet"]
    assert "16.5 degrees" in reasons["13_not_ct_or_not_hu/CT_pitch.nii.gz"]


@pytest.mark.parametrize("command", ["predict", "embed"])
def test_an_output_that_another_run_writes_is_refused_at_once(run, scans, tmp_path, command, monkeypatch):
    monkeypatch.setattr(commands, "load_model", lambda *_, **__: pytest.fail("nothing is loaded for it"))
    output = tmp_path / ("out.csv" if command == "predict" else "out.parquet")
    with only_run(output):
        status, _, err = run(command, scans, "--output", output)
    assert status == 2
    assert err.startswith(f"error: {output} is being written by another run (process {os.getpid()} of ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["index", "index.csv", "index.parquet.gz"])
def test_an_index_is_named_as_what_it_is(run, tmp_path, name):
    status, _, err = run("embed", tmp_path, "--output", tmp_path / name)
    assert (status, err) == (2, f"error: {tmp_path / name}: an index is written as Parquet. Use the suffix .parquet.\n")


def test_what_a_killed_run_left_is_cleared_away(run, scans, tmp_path):
    output = tmp_path / "out.csv"
    for name in ("out.csv", "out.csv.failed.csv", "out.csv.settings.json"):
        (tmp_path / f".{name}.partial-0a1b").touch()
    (tmp_path / ".out.csv.lock").touch()
    assert run("predict", scans / "0.nii.gz", "--output", output)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.csv.settings.json", "scans"]


@pytest.mark.parametrize("option", [("--dtype", "bfloat16"), ("--series", "1"), ("--resample_irregular",)])
def test_rows_of_another_precision_or_reading_are_not_mixed(run, scans, tmp_path, option):
    assert run("predict", scans / "0.nii.gz", "--output", tmp_path / "scores.csv")[0] == 0
    status, _, err = run("predict", scans / "0.nii.gz", "--output", tmp_path / "scores.csv", *option)
    assert status == 2
    assert f"was started with {option[0].removeprefix('--')} " in err


@pytest.fixture
def site_model(converted, tmp_path) -> Path:
    """A model that can be made anew in its place."""
    return shutil.copytree(converted, tmp_path / "site-model")


def remake(folder: Path, what: str) -> None:
    """Other weights, another precision, another window or other prompts, in the same folder."""
    model = MedCTModel.from_pretrained(folder)
    if what == "weights":
        model.visual_projection.weight.data[0, 0] += 1e-6
    if what == "precision":
        model = model.bfloat16()
    if what == "prompts":
        model.config.prompt_templates = [("{label}", "no {label}")]
    if what == "window":
        model.config.vision_config.hu_min = -900
        processor = MedCTProcessor.from_pretrained(folder)
        processor.image_processor.hu_min = -900
        processor.save_pretrained(folder)
    model.save_pretrained(folder)


@pytest.mark.parametrize("what", ["nothing", "weights", "precision", "window", "prompts"])
@pytest.mark.parametrize("command", ["predict", "embed"])
def test_what_made_the_rows_decides_not_its_name(run, scans, site_model, tmp_path, command, what):
    output = tmp_path / ("scores.csv" if command == "predict" else "index.parquet")
    assert run(command, scans / "0.nii.gz", "--output", output, model=site_model)[0] == 0
    before = output.read_bytes()
    remake(site_model, what)
    status, _, err = run(command, scans / "0.nii.gz", scans / "1.nii.gz", "--output", output, model=site_model)
    if what == "nothing" or (command, what) == ("embed", "prompts"):
        assert status == 0, err
        return
    assert status == 2
    said = {
        "window": "preprocessing {",
        "prompts": "templates [",
        "weights": "other weights",
        "precision": "other weights",
    }
    assert f"{output} was started with {said[what]}" in err
    assert "hoose another --output" in err
    assert output.read_bytes() == before


def test_a_model_that_has_moved_goes_on_with_its_rows_and_its_index(run, scans, site_model, tmp_path):
    scores, index = tmp_path / "scores.csv", tmp_path / "index.parquet"
    for command, output in (("predict", scores), ("embed", index)):
        assert run(command, scans / "0.nii.gz", "--output", output, model=site_model)[0] == 0
    moved = site_model.rename(tmp_path / "moved")
    assert run("search", "a", "--index", index, model=moved)[0] == 0
    for command, output in (("predict", scores), ("embed", index)):
        assert run(command, scans / "0.nii.gz", scans / "1.nii.gz", "--output", output, model=moved)[0] == 0
    assert run("search", "a", "--index", index, model=None)[0] == 0  # it knows the new place
    remake(moved, "weights")
    other = moved.rename(tmp_path / "other")
    for command, output, begun in (("predict", scores, "started"), ("search", index, "made")):
        where = ("--index", output) if command == "search" else ("--output", output)
        status, _, err = run(command, scans / "0.nii.gz", *where, model=other)
        assert status == 2 and f"was {begun} with model" in err


@pytest.mark.parametrize("what", ["tensors", "alpha"])
def test_an_adapter_made_anew_is_another(run, scans, converted, tmp_path, what):
    folder = save_adapter(converted, tmp_path / "adapter")
    predict = ["predict", scans / "0.nii.gz", "--adapter", folder, "--output", tmp_path / "scores.csv"]
    assert run(*predict)[0] == 0
    assert run(*predict)[0] == 0
    save_adapter(converted, folder, **({"seed": 1} if what == "tensors" else {"lora_alpha": 3}))
    status, _, err = run(*predict)
    assert status == 2
    assert "was started with other weights than those that model and adapter have now" in err


def test_an_index_of_other_weights_is_not_searched(run, scans, site_model, tmp_path):
    index = tmp_path / "index.parquet"
    assert run("embed", scans / "0.nii.gz", "--output", index, "--dtype", "bfloat16", model=site_model)[0] == 0
    assert run("search", "a", "--index", index, model=None)[0] == 0
    assert run("search", "a", "--index", index, "--dtype", "float32", model=None)[0] == 2
    model = MedCTModel.from_pretrained(site_model)
    model.visual_projection.weight.data[0, 0] += 1
    model.save_pretrained(site_model)
    status, _, err = run("search", "a", "--index", index, model=None)
    assert status == 2
    assert "was made with other weights than those that" in err


def test_an_index_of_another_window_is_not_searched(run, scans, site_model, tmp_path):
    index = tmp_path / "index.parquet"
    assert run("embed", scans / "0.nii.gz", "--output", index, model=site_model)[0] == 0
    remake(site_model, "window")
    status, _, err = run("search", scans / "1.nii.gz", "--index", index, model=None)
    assert status == 2 and re.search(r"was made with hu_min -1000(\.0)?, but the model has -900", err)


def test_an_index_that_names_no_weights_is_not_searched(run, tmp_path):
    row = {"study": "a", "image_embeds": [1.0, 0.0]}
    write_embeddings(tmp_path / "index.parquet", [row], {"model": "org/name"})
    status, _, err = run("search", "a", "--index", tmp_path / "index.parquet", model=None)
    assert status == 2 and "index.parquet does not say which weights made it" in err


def test_a_label_is_printed_whatever_the_terminal_can_show(scans, converted, monkeypatch):
    """As an escape that JSON reads, where the encoding lacks a character."""
    options = ["--model", str(converted), "--cpu", "--labels", "Gefäß", "--format", "json"]
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["predict", str(scans / "0.nii.gz"), *options]) == 0
    terminal.flush()
    assert json.loads(terminal.buffer.getvalue())["findings"][0]["label"] == "Gefäß"


@pytest.mark.parametrize(("given", "expected"), [(None, "abc"), ("own", "own")])
def test_the_base_of_an_adapter_is_taken_at_the_commit_that_it_names(tmp_path, monkeypatch, given, expected):
    monkeypatch.delenv(commands.MODEL_VARIABLE, raising=False)
    LoraConfig(base_model_name_or_path="org/base", revision="abc").save_pretrained(tmp_path)
    args = argparse.Namespace(model=None, revision=given, adapter=str(tmp_path), adapter_revision=None)
    assert (commands.model_of(args), args.model, args.revision) == ("org/base", "org/base", expected)


def test_an_adapter_of_a_kind_that_peft_does_not_know_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv(commands.MODEL_VARIABLE, raising=False)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "TOMORROW"}', encoding="utf-8")
    args = argparse.Namespace(model=None, revision=None, adapter=str(tmp_path), adapter_revision=None)
    with pytest.raises(commands.CommandError, match=r": no adapter \(PEFT: KeyError\)\. Pass"):
        commands.model_of(args)


def test_a_configuration_that_its_weights_do_not_fit_is_refused(tmp_path):
    folder = shutil.copytree(PHANTOM_BASE, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"projection_dim": 10**12}), encoding="utf-8")
    with pytest.raises(CheckpointMismatchError, match=f"^{folder}: its weights have other sizes than its config.json"):
        load_model(str(folder))


def test_outputs_have_names_whatever_the_model_was_saved_with(converted, tmp_path, batch):
    folder = shutil.copytree(converted, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"return_dict": False}), encoding="utf-8")
    model, _ = load_model(str(folder))
    with torch.no_grad():
        assert model.get_image_features(batch["pixel_values"]).pooler_output is not None


def test_a_library_that_a_model_needs_is_named(monkeypatch):
    def needs_library(*_, **__):
        raise ImportError("Loading it requires optimum.")

    monkeypatch.setattr(MedCTModel, "from_pretrained", needs_library)
    with pytest.raises(ModelError, match=r"phantom_base: cannot load a model \(Loading it requires optimum\.\)"):
        load_model(str(PHANTOM_BASE))


def test_names_of_files_are_shown_as_one_line(run, scans):
    good, bad = (scans / f"{name}\x1b[31m\n\u202e.nii.gz" for name in ("good", "bad"))
    shutil.copy(scans / "0.nii.gz", good)
    bad.write_text("nothing", encoding="utf-8")
    status, out, err = run("predict", good, bad, "--labels", "Emphysema")
    assert status == 1 and r"good\u001b[31m\n\u202e.nii.gz" in out.splitlines()[0]
    assert r"bad\u001b[31m\n\u202e.nii.gz: it is not a NIfTI" in err.replace("[31m ", r"[31m\n")
    assert not {"\x1b", "\u202e"} & {*out, *err}
    status, _, err = run("predict", scans / "no\nsuch\x1b.nii.gz")
    assert status == 2 and err.endswith(r"no\nsuch\u001b.nii.gz: no such file or folder. Check the path." + "\n")


@pytest.mark.parametrize("changed", [{"projection_dim": -1}, {"projection_dim": "many"}, {"id2label": {"0": "a\nb"}}])
def test_a_configuration_that_is_none_of_a_model_is_refused(tmp_path, changed):
    config = json.loads((PHANTOM_BASE / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | changed), encoding="utf-8")
    with pytest.raises(ModelError, match=f"^{tmp_path}: its config.json is not that of a model .*Pass another"):
        load_config(str(tmp_path))
