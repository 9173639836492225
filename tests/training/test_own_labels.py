"""Labels of one's own, from a table through training to prediction; sources with other labels to keep and replay."""

import dataclasses
import json
import warnings

import numpy as np
import pandas as pd
import pytest
from ct_rate_like import write_files
from rad_chestct_like import rad_chestct_files
from scan_files import write_noise

from medct import CT_CLIP_LABELS, MedCTConfig, MedCTModel, MedCTProcessor
from medct.adapters_medct import OtherWordsWarning
from medct.cli import main
from medct.common.counting import counted
from medct.common.files import OtherSettingsError
from medct.data import DataError, Source, open_source, phantom_source
from medct.pipeline_medct import ZeroShotCTClassificationPipeline
from medct.publishing.push import ADAPTER_FILES
from medct.train import load_sources, run
from medct.training.replay import with_replay
from medct.training.settings import TrainingError, TrainingSettings
from medct.training.sources import digest_of_studies, mappings_of, remarks_on_labels

LABELS = """label;data;words;present;absent
Verdichtung;Consolidation;c;;
Erguss;Pleural effusion;;An e is present.;No e is present.
"""
MERGED = "Arterial wall calcification or Coronary artery wall calcification"


@pytest.fixture
def settings(small_run) -> TrainingSettings:
    sizes = {"phantom_train_patients": 8, "phantom_tune_patients": 6, "phantom_eval_patients": 12}
    return dataclasses.replace(small_run, recipe="paper", rank=2, **sizes)


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text(LABELS, encoding="utf-8")
    return path


@pytest.fixture
def rad(tmp_path):
    return str(write_files(tmp_path / "rad", rad_chestct_files()))


def test_own_labels_reach_adapter_and_prediction(settings, labels, nifti, tmp_path, capsys):
    templates = ["{label} is present.|No {label} is present."]
    results = run(dataclasses.replace(settings, labels=str(labels), templates=templates, phantom_tune_patients=40))
    assert results["label_names"] == ["Verdichtung", "Erguss"]
    sentences = ["c is present.", "No c is present.", "An e is present.", "No e is present."]
    assert results["prompts"] == [sentences]
    assert results["mappings"]["valid"]["labels"] == {"Verdichtung": ["Consolidation"], "Erguss": ["Pleural effusion"]}
    adapter = tmp_path / "run"
    described = json.loads((adapter / "medct_adapter.json").read_text(encoding="utf-8"))
    assert described["label_names"] == results["label_names"]
    assert described["prompts"] == {"Verdichtung": "c", "Erguss": [sentences[2:]]}
    assert set(described["thresholds"]) == {"Verdichtung", "Erguss"}

    model, processor = (kind.from_pretrained(settings.model) for kind in (MedCTModel, MedCTProcessor))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=OtherWordsWarning)
        pipe = ZeroShotCTClassificationPipeline(model=model, processor=processor, adapter=str(adapter))
    assert pipe.asked.label_prompts() == [sentences] and len(model.config.label_names) == 18
    scan = nifti(np.random.default_rng(0).normal(-500, 300, (9, 10, 11)).astype(np.float32))
    found = {finding["label"]: finding for finding in pipe(str(scan))}
    assert found.keys() == {"Verdichtung", "Erguss"} and all("present" in each for each in found.values())
    alike = pipe(str(scan), candidate_labels={"Verdichtung": "c", "Erguss": [sentences[2:]]})
    assert {each["label"]: each["score"] for each in alike} == {name: found[name]["score"] for name in found}
    assert not any("present" in each for each in alike), "operating points hold for the adapter's own words"
    model.disable_adapters()
    assert len(pipe(str(scan))) == 18

    capsys.readouterr()
    assert main(["predict", str(scan), "--adapter", str(adapter), "--format", "json", "--cpu"]) == 0
    said = {each["label"]: each["score"] for each in json.loads(capsys.readouterr().out)["findings"]}
    assert said == pytest.approx({name: each["score"] for name, each in found.items()})
    assert main(["predict", str(scan), "--model", settings.model, "--labels", str(labels), "--format", "json"]) == 0
    assert {each["label"] for each in json.loads(capsys.readouterr().out)["findings"]} == {"Verdichtung", "Erguss"}

    scores = tmp_path / "scores.json"
    again = ["evaluate", "--data", "phantoms", "--limit", "12", "--adapter", str(adapter), "--output", str(scores)]
    assert main([*again, "--mapping", str(labels), "--num_workers", "0", "--cpu"]) == 0
    evaluated = json.loads(scores.read_text(encoding="utf-8"))
    assert evaluated["prompts"] == {"run": [sentences]} and "accuracy" in evaluated["sources"][0]["scores"]


def test_a_whole_model_is_saved_with_its_labels(settings, labels, tmp_path):
    run(dataclasses.replace(settings, labels=str(labels), recipe="full", rank=None, learning_rate=1e-4))
    config = MedCTModel.from_pretrained(tmp_path / "run").config
    assert config.label_names == ["Verdichtung", "Erguss"]
    assert config.label_prompts()[0][:3] == ["c is present.", "c is not present.", "An e is present."]


@pytest.mark.filterwarnings("default:The model's tokenizer does not know words")
def test_words_that_the_tokenizer_does_not_know_are_remarked_on(settings, tmp_path, capsys):
    path = tmp_path / "labels.csv"
    path.write_text("label,data\n气胸,Consolidation\n肺炎,Pleural effusion\n", encoding="utf-8")
    results = run(dataclasses.replace(settings, labels=str(path)))
    said = "does not know words in the prompts of 2 of 2 labels (气胸, 肺炎): they cannot be told from one another"
    assert any(said in remark for remark in results["remarks"])
    assert said in capsys.readouterr().out
    main(["overview", "phantoms", "--labels", str(path), "--model", settings.model, "--samples", "0", "--limit", "2"])
    assert said in capsys.readouterr().err


def test_a_resumed_run_learns_the_same_labels(settings, labels, monkeypatch):
    stopped = dataclasses.replace(settings, labels=str(labels), checkpoint_steps=1)
    monkeypatch.setattr("medct.train.Trainer._check_base", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(stopped)
    monkeypatch.undo()
    labels.write_text(LABELS.replace(";c;", ";d;"), encoding="utf-8")
    with pytest.raises(OtherSettingsError, match="was started with labels, prompts and mappings "):
        run(dataclasses.replace(stopped, resume=True))


def test_a_source_with_other_labels_is_kept_and_replayed(settings, rad):
    sizes = {"phantom_eval_patients": 24, "phantom_tune_patients": 24, "strength": "auto"}
    settings = dataclasses.replace(settings, keep=rad, replay=rad, replay_share=0.5, max_steps=1, **sizes)
    results = run(settings)
    kept = results["kept"]["base"]
    assert {f"auroc/{MERGED}", "auroc/Lung nodule"} <= kept.keys() and "auroc/Arterial wall calcification" not in kept
    assert results["kept"]["present"][MERGED] == 3
    assert results["label_names"][1] == "Arterial wall calcification", "of the data, whose labels are the model's"
    assert "To be kept: 6 valid studies of RAD-ChestCT" in results["measured_on"]
    assert results["mappings"].keys() == {"keep_tune", "keep_valid", "replay"}


def test_what_labels_mean_is_told_of_what_is_learned_and_of_what_is_replayed(settings, rad):
    both = dataclasses.replace(settings, data=rad, replay=rad, replay_share=0.5)
    sources = load_sources(both, MedCTModel.config_class())
    told = mappings_of(sources)
    assert told.keys() == {"train", "tune", "valid", "replay"} and told["train"] == told["replay"] is not None
    told = mappings_of(load_sources(dataclasses.replace(both, replay="phantoms"), MedCTModel.config_class()))
    assert told.keys() == {"train", "tune", "valid"}


def test_rad_chestct_is_learned_from(settings, rad):
    results = run(dataclasses.replace(settings, data=rad, batch_size=2))
    assert results["label_names"][1] == MERGED and len(results["label_names"]) == 17
    assert f"| {MERGED} (3) |" in results["table"]
    with pytest.raises(DataError, match=r"no study of the train split is left \(no report"):
        load_sources(dataclasses.replace(settings, data=rad, objective="contrastive"), MedCTModel.config_class())


def test_a_classifier_learns_its_own_labels_only(settings, labels, classifier_folder):
    settings = dataclasses.replace(settings, model=str(classifier_folder), targets="vision")
    with pytest.raises((DataError, TrainingError), match="The model is a classifier: it has the labels of its head"):
        run(dataclasses.replace(settings, labels=str(labels)))


@pytest.fixture
def site(tmp_path):
    """A folder of scans with labels that a table gives, and the table to be written anew."""
    root = tmp_path / "site"
    root.mkdir()
    rows = []
    for index in range(24):
        write_noise(root / f"{index}.nii.gz", index)
        split = ("train", "train", "tune", "valid")[index % 4]
        rows.append({"file_name": f"{index}.nii.gz", "split": split, **dict.fromkeys(CT_CLIP_LABELS, index // 4 % 2)})
    return root, pd.DataFrame(rows)


def test_labels_that_were_corrected_count_when_a_run_is_resumed(settings, site, monkeypatch, capsys):
    root, table = site
    table.to_csv(root / "metadata.csv", index=False)
    settings = dataclasses.replace(settings, data=str(root), epochs=1)

    with monkeypatch.context() as patch:
        patch.setattr("medct.train.Trainer._train", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(settings)
    is_valid = table["split"] == "valid"
    table.loc[is_valid, "Emphysema"] = 1 - table.loc[is_valid, "Emphysema"]
    table.to_csv(root / "metadata.csv", index=False)
    run(dataclasses.replace(settings, resume=True))
    assert "NOTE: valid: studies or labels have changed since, so the base is scored again." in capsys.readouterr().out
    found = pd.read_csv(root.parent / "run" / "results.studies.csv").query("split == 'valid'")
    wanted = table[is_valid].set_index("file_name")["Emphysema"]
    assert set(found["model"]) >= {"base", "adapted"}
    assert all(found["Emphysema label"] == found["file_name"].map(wanted))


def test_what_training_studies_teach_is_known_when_a_run_is_resumed(site):
    """To the last cell, replayed studies', too, without reading a scan; what is only scored is no part of it."""
    root, table = site

    def digest(changed: int | None = None, column: str = "Emphysema", value: object = 1) -> str:
        rows = table.assign(report="").astype({column: object})
        if changed is not None:
            rows.loc[changed, column] = value
        rows.to_csv(root / "metadata.csv", index=False)
        source = open_source(str(root), "train", MedCTConfig())
        return digest_of_studies(with_replay(phantom_source("A", range(30), 0), source, 0.4))

    cells = ((0, "Emphysema", ""), (0, "report", "Clear."), (0, "split", "tune"), (8, "file_name", "nowhere"))
    changes = [(None,), (0,), *cells]
    found = [digest(*change) for change in changes]
    assert len(set(found)) == len(changes)
    assert digest(2) == digest(3) == digest(None) == found[0]


def test_rows_of_which_there_is_a_checksum_are_not_read():
    """A row of a shard on the Hub costs a request."""
    source = Source([(0, 1), (2,)], lambda _: 1 / 0, ("Mass",), "two", checksum="a")
    others = [{"checksum": "b"}, {"groups": [(0, 1)]}, {"groups": [(2,), (0, 1)]}]
    assert len({digest_of_studies(dataclasses.replace(source, **each)) for each in ({}, *others)}) == 4
    with pytest.raises(ZeroDivisionError):
        digest_of_studies(dataclasses.replace(source, checksum=""))


def test_what_cannot_be_learned_or_scored_is_refused_before_anything_is(settings, site, monkeypatch):
    root, table = site
    settings = dataclasses.replace(settings, data=str(root))
    monkeypatch.setattr("medct.train.Trainer.score_base", None)
    nothing = table.astype(dict.fromkeys(CT_CLIP_LABELS, float))
    nothing.loc[nothing["split"] == "train", list(CT_CLIP_LABELS)] = np.nan
    nothing.to_csv(root / "metadata.csv", index=False)
    with pytest.raises(TrainingError, match="no label of any study is known"):
        run(settings)
    shares = table.astype({"Emphysema": float})
    shares.loc[shares["split"] == "valid", "Emphysema"] = 0.5
    shares.to_csv(root / "metadata.csv", index=False)
    with pytest.raises(DataError, match=r"'Emphysema' of 3.nii.gz is 0.5, and shares are for training only"):
        run(dataclasses.replace(settings, output_dir=settings.output_dir + "2"))


@pytest.mark.parametrize(
    ("columns", "alike"),
    [
        ({"a": [0, 1, np.nan], "b": [1, 1, 1], "c": [1, np.nan, 0]}, ["b"]),
        ({"a": [np.nan] * 3, "b": [0, np.nan, 0], "c": [0, 0.5, 0]}, ["a", "b"]),
        ({"a": [0, 1, 1], "b": [0, 1, 0], "c": [0, 0, 1]}, []),
    ],
)
def test_findings_that_no_training_study_differs_in_are_remarked_on(columns, alike):
    rows = [{"labels": list(labels)} for labels in zip(*columns.values(), strict=True)]
    source = Source([(0,), (1,), (2,)], rows.__getitem__, tuple(columns), "three")
    said = " ".join(remarks_on_labels(source))
    assert said.startswith(f"{counted(len(alike), 'finding')} of 3, such as {alike[0]}:") if alike else said == ""
    for quick in ({"checksum": "a"}, {"is_synthetic": True}):
        assert not list(remarks_on_labels(dataclasses.replace(source, read=None, **quick)))


def test_studies_that_are_left_out_are_remarked_on(settings, site, capsys):
    root, table = site
    table.to_csv(root / "metadata.csv", index=False)
    (root / "3.nii.gz").unlink()
    results = run(dataclasses.replace(settings, data=str(root), epochs=1))
    assert not any("the same in every training study" in remark for remark in results["remarks"])
    said = "valid: left out before they were read: no such file (1{})."
    assert said.format(", such as 3.nii.gz") in capsys.readouterr().out
    assert said.format("") in results["remarks"]
    for name in ADAPTER_FILES:
        pushed = root.parent / "run" / name
        assert not pushed.is_file() or b".nii.gz" not in pushed.read_bytes(), "a file's name may be a patient's"


@pytest.mark.parametrize("objective", ["contrastive", "both"])
def test_reports_without_another_to_be_contrasted_with_are_refused(settings, objective, site, monkeypatch):
    """Their loss is 0 from the first step to the last."""
    root, table = site
    monkeypatch.setattr("medct.train.Trainer.score_base", None)
    settings = dataclasses.replace(settings, objective=objective, batch_size=1)
    with pytest.raises(TrainingError, match=rf"--objective {objective} .* a step has one study. Pass a higher --acc"):
        run(settings)
    table.assign(report="Clear.").to_csv(root / "metadata.csv", index=False)
    with pytest.raises(TrainingError, match="all of its reports are the same"):
        run(dataclasses.replace(settings, data=str(root), accumulation_steps=2, output_dir=settings.output_dir + "2"))
