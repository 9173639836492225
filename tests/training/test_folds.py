"""Cross-validation by patient: everybody is held out once, by an adapter that has not seen them."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess

import numpy as np
import pytest
from launching import QUICKLY, launch_command

from medct import CT_CLIP_LABELS, MedCTModel
from medct import train as training
from medct.common import progress
from medct.common.errors import StoppedError
from medct.common.files import OtherSettingsError
from medct.data import PhantomCohort, open_source
from medct.data.sources import Source
from medct.evaluation.metrics import compare, zero_shot_scores
from medct.evaluation.predictions import Key, Predictions, learned_from
from medct.evaluation.record import read_scores, write_record
from medct.evaluation.report import folds_table
from medct.evaluation.scoring import ScoredStudies, refuse_shares
from medct.train import Trainer, run
from medct.training.folds import _about, _pooled, divide, refuse_another_base, refuse_changed
from medct.training.run_folder import RunFolder
from medct.training.settings import TrainingError, TrainingSettings, check
from medct.training.sources import digest_of_studies

FOLDS = 3


@pytest.mark.parametrize(
    ("act", "what"),
    [
        (refuse_shares, "check labels"),
        (digest_of_studies, "note which studies"),
        (lambda source: divide(source, 2, 1), "divide by patient"),
    ],
)
def test_what_reads_the_row_of_every_study_says_how_far_it_is(act, what, monkeypatch, capsys):
    """A row of a shard on the Hub costs a request, so that thousands take long."""
    rows = [{"id": f"{k}", "patient": f"{k}", "report": "", "labels": [float(k % 3 > 0)]} for k in range(12)]
    source = Source([(k,) for k in range(12)], rows.__getitem__, ("Lung nodule",), "twelve studies")
    act(source)
    assert not capsys.readouterr().err  # where it takes no time
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    act(source)
    assert f"{what}: 12/12" in capsys.readouterr().err


@pytest.fixture
def settings(small_run) -> TrainingSettings:
    """Two steps for each of three folds of eight patients."""
    sizes = {"phantom_train_patients": 14, "phantom_tune_patients": 4, "phantom_eval_patients": 6}
    return dataclasses.replace(small_run, folds=FOLDS, **sizes)


def cohort(patients: int, of_one_kind: bool = False) -> Source:
    """A table of studies of which nothing can be read, two of each patient."""
    labels = [[1.0, 0.0]] * 2 if of_one_kind else [[1.0, 0.0], [0.0, 0.0]]
    rows = [{"patient": f"p{patient}", "labels": each} for patient in range(patients) for each in labels]
    groups = [(index,) for index in range(len(rows))]
    return Source(groups, rows.__getitem__, ("nodule", "mass"), f"{len(rows)} studies", names=list(map(str, groups)))


def patients_of(source: Source) -> list[str]:
    return [source.read(group[0])["patient"] for group in source.groups]


@pytest.mark.parametrize("folds", [3, 5, 10])
def test_each_patient_is_held_out_once_and_never_trained_on_then(folds):
    source = cohort(31)
    held_out = []
    for fold in range(1, folds + 1):
        parts = {part: patients_of(each) for part, each in divide(source, folds, fold).items()}
        for one in parts:
            for other in parts.keys() - {one}:
                assert not set(parts[one]) & set(parts[other])
        assert sum(map(len, parts.values())) == source.num_studies
        assert set(parts["tune"]) == set(patients_of(divide(source, folds, fold % folds + 1)["valid"]))
        assert 31 // folds <= len(set(parts["valid"])) <= 31 // folds + 1
        held_out += parts["valid"]
    assert sorted(held_out) == sorted(patients_of(source))


def test_the_order_of_a_table_decides_nothing():
    source = cohort(20)
    turned = dataclasses.replace(source, groups=source.groups[::-1], names=source.names[::-1])
    for part in ("train", "tune", "valid"):
        assert set(patients_of(divide(source, 5, 2)[part])) == set(patients_of(divide(turned, 5, 2)[part]))
    assert divide(source, 5, 2, max_tune_studies=3)["tune"].num_studies == 3


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(TrainingError, match=r"4 patients cannot be divided into 5 folds\. Lower --folds\."):
        divide(cohort(4), 5, 1)
    with pytest.raises(TrainingError, match=r"Fold \d of 5 would hold out 2 studies in which each finding is always"):
        divide(cohort(5, of_one_kind=True), 5, 1)
    for changes, said in (
        ({"folds": 2}, "--folds is 2. Pass 3 or more"),
        ({"folds": 5, "fold": 6}, "--fold is 6. Pass a number from 1"),
        ({"fold": 1}, "--fold is 1. Pass a number"),
        ({"folds": 5, "max_eval_studies": 9}, "--max_eval_studies leaves out studies"),
        ({"folds": 5, "fold": 0}, "--fold"),
    ):
        with pytest.raises(TrainingError, match=said):
            check(TrainingSettings(**changes))


def _finds_bad_studies(trainer, _model):
    fold = trainer.settings.fold
    lines = [json.dumps({"id": name, "fold": fold}) + "\n" for name in ("every", f"of {fold}")]
    trainer.folder.bad_samples.write_text("".join(lines), encoding="utf-8")


def test_scores_of_all_folds_are_pooled_and_the_first_adapter_is_kept(
    settings, converted, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("medct.train.Trainer._left_out", lambda *_, **__: iter(["left out"]))
    monkeypatch.setattr("medct.train.Trainer._check_base", _finds_bad_studies)
    run(settings)
    monkeypatch.undo()
    shown = capsys.readouterr().out
    folder = tmp_path / "run"
    assert not (tmp_path / "run.unfinished").exists()
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    scored = read_scores(folder).scored
    base, adapted = (scored[Key(model, "phantoms", "valid")] for model in ("base", "adapted"))
    everybody = {f"phantom_b_{patient}" for patient in range(24)}
    assert set(base.patients) == everybody and len(base.patients) == 24
    learned = learned_from(folder / "results.studies.csv")  # of the adapter that is kept
    assert len(learned["train"]) + len(learned["tune"]) + results["folds"][0]["scans"] == 24
    assert base.ids == adapted.ids and not np.array_equal(base.scores, adapted.scores)
    expected = compare(base.scores, adapted.scores, base.labels, base.patients, list(CT_CLIP_LABELS), resamples=20)
    for version in ("base", "adapted", "difference"):
        assert results["comparison"][version]["auroc"] == pytest.approx(expected[version]["auroc"])
    assert [each["fold"] for each in results["folds"]] == [1, 2, 3]
    start = 0  # the line of each fold can be computed again, as its studies stand together
    for fold in results["folds"]:
        rows = np.arange(start, start := start + fold["scans"])
        auroc = zero_shot_scores(adapted.scores[rows], adapted.labels[rows], list(CT_CLIP_LABELS))["auroc"]
        assert fold["adapted"] == pytest.approx(auroc)
    assert sum(each["patients"] for each in results["folds"]) == 24
    assert results["measured_on"].startswith("Cross-validation by patient: each of 24 patients was held out once")
    bad = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert bad == [{"id": name, "fold": fold} for name, fold in (("every", 1), ("of 1", 1), ("of 2", 2), ("of 3", 3))]
    card = (folder / "README.md").read_text(encoding="utf-8")
    for said in (shown, card):
        assert "The adapter in this folder is that of fold 1 of 3: it has not seen the patients of that fold" in said
        assert "| fold 3 |" in said
    assert shown.count("| held out |") == 1 and "fold 2 of 3: mean AUROC 0." in shown
    assert "With --folds 5" not in shown and "Pass --epochs 25." in shown
    assert any(remark.endswith("Pass --epochs 25.") for remark in results["remarks"])
    assert results["remarks"].count("left out") == 1
    assert results["provenance"]["settings"] is None, "no single run has these figures"
    assert "fold 1 of 3, of 24 SYNTHETIC studies" in results["data"] and results["data"] in card
    assert results["data"].endswith("The figures are of all folds: 24 studies of 24 patients.")

    # It is the adapter of the first fold, and one fold alone makes it, too.
    alone = dataclasses.replace(settings, fold=1, output_dir=str(tmp_path / "alone"))
    of_fold = run(alone)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("run", "alone")]
    assert weights[0] == weights[1]
    assert results["thresholds"] == of_fold["thresholds"]
    cohort = PhantomCohort("B", 14, 4, 6, 0)
    whole = open_source("phantoms", "all", MedCTModel.from_pretrained(converted).config, phantoms=cohort)
    held_out = patients_of(divide(whole, FOLDS, 1)["valid"])
    rows = [base.patients.index(patient) for patient in held_out]
    alone_scores = read_scores(tmp_path / "alone").scored[Key("adapted", "phantoms", "valid")]
    in_order = [alone_scores.patients.index(patient) for patient in held_out]
    np.testing.assert_array_equal(adapted.scores[rows], alone_scores.scores[in_order])


def test_a_stopped_cross_validation_goes_on_where_it_was(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(training, "draw_pictures", lambda folder, *_: (folder / "learned.png").touch())
    monkeypatch.setattr("medct.training.folds.save_plot", lambda _, path: path.touch())
    whole_step, steps = Trainer._step, []

    def step(self, *inputs):
        steps.append(self.settings.fold)
        if len(steps) == 3:  # the first of the second fold
            os.kill(os.getpid(), signal.SIGTERM)
        return whole_step(self, *inputs)

    monkeypatch.setattr(Trainer, "_step", step)
    with pytest.raises(
        StoppedError, match=r"stopped in fold 2 of 3\. The same command with --output_dir .*run --resume cont"
    ):
        run(settings)
    with pytest.raises(TrainingError, match="holds an unfinished run"):
        run(settings)
    with pytest.raises(OtherSettingsError, match="was started with seed 0, not 1"):
        run(dataclasses.replace(settings, resume=True, seed=1))
    run(dataclasses.replace(settings, resume=True))
    assert steps == [1, 1, 2, 2, 3, 3]
    assert not (tmp_path / "run" / "learned.png").exists(), "nobody sees pictures of single folds"

    # The fold that was stopped is as if it had not been.
    run(dataclasses.replace(settings, fold=2, output_dir=str(tmp_path / "alone")))
    pooled, alone = (
        read_scores(tmp_path / name).scored[Key("adapted", "phantoms", "valid")] for name in ("run", "alone")
    )
    rows = [pooled.ids.index(study) for study in alone.ids]
    np.testing.assert_array_equal(pooled.scores[rows], alone.scores)


@pytest.mark.slow
def test_two_processes_fold_as_one_does(settings, tmp_path):
    run(settings)
    flags = dataclasses.asdict(settings) | {"batch_size": 2, "output_dir": str(tmp_path / "two")}
    arguments = [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]
    environment = os.environ | QUICKLY
    subprocess.run(launch_command(*arguments, processes=2), check=True, env=environment, cwd=tmp_path)
    one, two = (read_scores(tmp_path / name).scored for name in ("run", "two"))
    for key, scored in one.items():
        assert two[key].ids == scored.ids
        np.testing.assert_allclose(two[key].scores, scored.scores, atol=1e-4)
    assert json.loads((tmp_path / "two/results.json").read_text(encoding="utf-8"))["processes"] == 2


def test_several_processes_need_one_folder(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match=r"Several processes need one folder for all\. Pass --output_dir DIR\."):
        check(dataclasses.replace(settings, output_dir=None))
    check(settings)
    (tmp_path / "run.unfinished").mkdir()
    (tmp_path / "run.unfinished/settings.json").touch()
    for rank, is_refused in (("0", True), ("1", False)):  # which may come when the first has begun
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(TrainingError) if is_refused else contextlib.nullcontext():
            RunFolder(settings.output_dir, resume=False)


def test_pooled_studies_keep_all_that_is_known_of_each():
    def part(name: str) -> ScoredStudies:
        score = np.full((1, 2), ord(name) / 200)
        about = [] if name == "n" else [{"sex": name}]  # nothing is known of any study of that fold
        return ScoredStudies([name], [f"of {name}"], score, score > 0.5, about, names=["x", "y"])

    pooled = _pooled(list(map(part, "bnaf")))
    for index, one in enumerate(map(part, "bnaf")):
        found = pooled.take([index])
        assert (found.ids, found.patients, found.names) == (one.ids, one.patients, one.names)
        assert found.about == (one.about or [{}])
        assert np.array_equal(found.scores, one.scores) and np.array_equal(found.labels, one.labels)


def test_what_each_fold_forgot_is_in_its_line():
    """Each has an adapter of its own; without anything to be kept there is no such column."""
    auroc = {"auroc": {"value": 0.7, "low": 0.6, "high": 0.8}}
    about = {"comparison": {"base": auroc, "adapted": auroc, "scans": 8, "patients": 4}}
    about |= {"steps": 2, "best_step": 2, "strength": 1.0, "kept": None}
    forgot = about | {"kept": {"difference": {"auroc": {"value": -0.02, "low": -0.03, "high": 0}}}}
    head, _, *lines = folds_table([_about(1, forgot), _about(2, about)]).splitlines()
    assert (
        head
        == "| held out | scans | patients | mean AUROC, base | adapted | to be kept: difference | steps | strength |"
    )
    assert lines == [
        "| fold 1 | 8 | 4 | 0.700 | 0.700 | -0.020 | 2 | 1 |",
        "| fold 2 | 8 | 4 | 0.700 | 0.700 | – | 2 | 1 |",
    ]
    assert "to be kept" not in folds_table([_about(1, about)])


@pytest.mark.parametrize(
    ("change", "is_refused"),
    [
        ({}, False),
        ({"fold": 2}, True),  # one patient more or fewer moves all that follow
        ({"patients": ["b", "x"]}, True),
        ({"labels": [[1.0], [np.nan]]}, True),
        ({"ids": "c"}, False),  # d could not be read this time
    ],
)
def test_folds_of_a_table_that_has_changed_between_them_are_not_pooled(tmp_path, change, is_refused):
    def studies(ids, patients=None, labels=((1.0,), (0.0,))):
        scores, labels = np.full((len(ids), 1), 0.5), np.array(labels)[: len(ids)]
        return ScoredStudies(list(ids), list(patients or ids), scores, labels, names=["Mass"])

    runs = [tmp_path / f"fold-{fold}" for fold in (1, 2, 3)]
    second = {"fold": 1, "ids": "cd", **change}
    parts = {0: (studies("ab"), studies("cd")), second.pop("fold"): (studies(**second), studies("ef"))}
    for fold, (held_out, tuned) in parts.items():
        runs[fold].mkdir()
        scored = {Key("base", "site", "tune"): tuned, Key("base", "site", "valid"): held_out}
        scored[Key("base", "kept", "valid")] = studies("ac")  # another hospital's, of the same names
        write_record(runs[fold] / "results.json", {}, Predictions(["Mass"], scored))
    with pytest.raises(TrainingError, match="have changed") if is_refused else contextlib.nullcontext():
        refuse_changed(tmp_path, runs)


def test_folds_of_two_bases_are_not_pooled(tmp_path):
    runs = [tmp_path / f"fold-{fold}" for fold in (1, 2, 3)]
    for folder, window in zip(runs, (-1000, -1000, -900), strict=True):
        folder.mkdir()
        base = {"fingerprint": "f", "preprocessing": {"hu_min": window}}
        results = {"provenance": {"models": {"base": base}}}
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    refuse_another_base(tmp_path, [*runs[:2], tmp_path / "fold-4"])
    with pytest.raises(TrainingError, match="the base has changed since its first folds"):
        refuse_another_base(tmp_path, runs)
