"""Evaluate, compare and metrics: sources and models side by side, what is left out, and a run that is repeated."""

import argparse
import dataclasses
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from adapter_files import RESULTS, save_adapter
from scan_files import write_noise

import medct
from medct import CT_CLIP_LABELS
from medct.cli import main, prompt_commands, score_commands
from medct.cli.figure_commands import _patients_and_labels
from medct.cli.flags import REPOSITORY_OF
from medct.cli.versions import Version, versions_of
from medct.common.counting import counted
from medct.common.output import drop_output
from medct.data import Source, phantom_source
from medct.errors_medct import MedCTError
from medct.evaluation.metrics import zero_shot_scores
from medct.evaluation.operating_points import threshold_for
from medct.evaluation.predictions import Key, Predictions, read_predictions, write_predictions
from medct.evaluation.record import scores_path
from medct.evaluation.scoring import ScoredStudies

PHANTOM_BASE = Path(medct.__file__).with_name("phantom_base")
BAD = "bad.nii.gz"


@pytest.fixture
def run(converted, ended):
    """`run("evaluate", ...)`: exit status, stdout, stderr; evaluations with the small model on the CPU."""

    def run(command: str, *arguments: object, model: object = converted) -> tuple[int, str, str]:
        options = ["--cpu", "--num_workers", "0", "--bootstrap_resamples", "20"] if command == "evaluate" else []
        options += ["--model", str(model)] if model and command == "evaluate" else []
        return ended(command, *arguments, *options)

    return run


@pytest.fixture
def folder(tmp_path):
    """`folder("site", 6)`: studies with labels in a metadata.csv, without a split; one more cannot be read."""

    def make(name: str, count: int = 6, **columns) -> Path:
        root = tmp_path / name
        root.mkdir()
        rows = []
        for index in range(count):
            write_noise(root / f"{index}.nii.gz", index)
            rows.append({"file_name": f"{index}.nii.gz", **dict.fromkeys(CT_CLIP_LABELS, index % 2)})
        (root / BAD).write_bytes(b"nothing")
        rows.append({"file_name": BAD, **dict.fromkeys(CT_CLIP_LABELS, 1)})
        table = pd.DataFrame(rows).assign(patient=[f"patient-{index // 2}" for index in range(count + 1)], **columns)
        table.to_csv(root / "metadata.csv", index=False)
        return root

    return make


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_evaluate_a_known_model(run, tmp_path, monkeypatch):
    monkeypatch.setattr(score_commands, "open_source", lambda *_, **__: phantom_source("A", range(12), 0))
    output = tmp_path / "scores.json"
    status, out, _ = run("evaluate", "--data", "x", "--batch_size", 4, "--output", output, model=PHANTOM_BASE)
    assert status == 0
    assert out.startswith("12 SYNTHETIC phantoms of site A\n")
    assert "NOTE: x: SYNTHETIC drawings" in out
    (source,) = read(output)["sources"]
    assert source["scores"]["auroc"]["value"] > 0.7
    assert f"{source['scores']['auroc']['value']:.3f}" in out


@pytest.mark.parametrize("command", ["evaluate", "prompts"])
def test_what_accelerate_cannot_start_is_said_in_a_sentence_before_a_model_is_loaded(ended, monkeypatch, command):
    def refuse(**_):
        raise ValueError("Using `fp8` precision requires `transformer_engine` to be installed.")

    for module in (score_commands, prompt_commands):
        monkeypatch.setattr(module, "Accelerator", refuse)
        monkeypatch.setattr(module, "load_pipeline", lambda *_, **__: pytest.fail("nothing is loaded for it"))
    status, _, err = ended(command, "--data", "phantoms", "--model", "phantom", "--cpu")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("error: accelerate cannot start this launch: Using `fp8` precision requires")


@pytest.mark.parametrize("what", ["seed", "mixed precision", "phantom_base", "studies"])
def test_processes_that_would_score_something_else_are_refused(run, monkeypatch, what):
    def of_all(ours):
        return [ours, {name: "other" if name.startswith(what) else value for name, value in ours.items()}]

    monkeypatch.setattr(score_commands, "open_source", lambda *_, **__: phantom_source("A", range(12), 0))
    monkeypatch.setattr("medct.common.distributed.of_all", of_all)
    status, out, err = run("evaluate", "--data", "x", model=PHANTOM_BASE)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"error: Process 2 of 2 has {what}")


def test_several_sources_are_columns_and_all_splits_are_scored(run, folder, tmp_path):
    one, two = folder("one", 6), folder("two", 4)
    output = tmp_path / "out" / "scores.json"
    status, out, err = run("evaluate", "--data", one, two, "--split", "all", "--output", output)
    assert status == 1
    assert "2 of 12 studies could not be read" in err
    assert "| AUROC (scans with the finding) | one (6 scans) | two (4 scans) |" in out
    results = read(output)
    assert [(each["source"], each["split"], each["unreadable"]) for each in results["sources"]] == [
        ("one", "all", 1),
        ("two", "all", 1),
    ]
    assert results["table"] in out
    scored = read_predictions(scores_path(output)).scored
    assert [(key.source, key.split, len(each.ids)) for key, each in scored.items()] == [
        ("one", "all", 6),
        ("two", "all", 4),
    ]
    assert scored[next(iter(scored))].patients == [f"patient-{index // 2}" for index in range(6)]


def test_what_is_left_out_is_said(run, folder, tmp_path):
    """Without a split, only the patients that a hash holds out are scored by default."""
    root = folder("site", 40)
    _, out, _ = run("evaluate", "--data", root, "--output", tmp_path / "scores.json")
    results = read(tmp_path / "scores.json")
    (source,) = results["sources"]
    left = source["left_out"]
    assert source["num_studies"] + sum(left.values()) == 41 and min(left.values()) > 0
    few = counted(source["num_studies"], "study", "studies")
    said = f"site: only {few} of the split valid were scored; left out: {left['train']} of "
    assert f"NOTE: {said}train, {left['tune']} of tune. For a test set" in out
    assert results["remarks"][0].startswith(said)
    _, out, _ = run("evaluate", "--data", root, "--split", "all")
    assert "left out" not in out and "(40 scans)" in out


def test_limit_is_kept(run, folder):
    _, out, _ = run("evaluate", "--data", folder("site", 8), "--split", "all", "--limit", 5)
    assert out.startswith("5 studies of ")


@pytest.mark.parametrize("arguments", [["evaluate", "--data", "x", "--batch_size", "0"], ["evaluate", "--limit", "0"]])
def test_numbers_that_make_no_sense_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "is not a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "{tmp}/file/scores.json"], "{tmp}/file"),
        (["--output", "{tmp}/scores.csv"], "{tmp}/scores.csv: figures are written as JSON"),
        (["--sensitivity", "0.9"], "A wanted sensitivity or specificity needs tuning patients"),
        (["--against", "base"], "--against base compares an adapter with its base. Pass --adapter."),
        (["--repeat", "{tmp}/none.json"], "{tmp}/none.json: no such file. Pass a training run's folder, or"),
        (["--repeat", "{tmp}/file"], "{tmp}/file: no results"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_work(run, tmp_path, monkeypatch, arguments, said):
    monkeypatch.setattr(score_commands, "load_pipeline", lambda *_, **__: pytest.fail("nothing is loaded for it"))
    (tmp_path / "file").write_text("of others", encoding="utf-8")
    status, _, err = run("evaluate", "--data", "x", *(each.format(tmp=tmp_path) for each in arguments))
    assert status == 2
    assert err.startswith(f"error: {said.format(tmp=tmp_path)}")
    assert len(err.splitlines()) == 1


def test_what_is_compared_with_is_taken_at_its_own_revision(monkeypatch):
    def refuse(name, adapter_name, adapter_kwargs):
        raise MedCTError(f"{name} at {adapter_kwargs['revision']}")

    for name in ("fingerprint", "about_model"):
        monkeypatch.setattr(f"medct.cli.versions.{name}", lambda *_: {})
    names = {"model": "a", "revision": "1", "adapter": "b", "adapter_revision": "2"}
    args = argparse.Namespace(**names, against="c", against_revision="3")
    with pytest.raises(MedCTError, match=r"^c at 3$"):
        versions_of(args, SimpleNamespace(model=SimpleNamespace(load_adapter=refuse)), None, {})


def test_two_adapters_are_compared_on_the_same_studies(run, folder, converted, tmp_path):
    root, output = folder("site", 6), tmp_path / "scores.json"
    new, old = (save_adapter(converted, tmp_path / name, seed) for seed, name in enumerate(("new", "old")))
    options = ["--data", root, "--split", "all", "--adapter", new]
    assert run("evaluate", *options, "--against", old, "--output", output)[0] == 1
    (source,) = read(output)["sources"]
    assert source["models"] == {"base": "old", "adapted": "new"}
    both = read_predictions(scores_path(output)).scored
    # Each is what it is alone, and the difference is theirs.
    for name, adapter in (("old", old), ("new", new)):
        run("evaluate", "--data", root, "--split", "all", "--adapter", adapter, "--output", tmp_path / f"{name}-.json")
        alone = read_predictions(tmp_path / f"{name}-.studies.csv").scored
        (key,) = alone
        np.testing.assert_allclose(both[(name, "site", "all")].scores, alone[key].scores, rtol=0, atol=1e-6)
    assert not np.allclose(both[("old", "site", "all")].scores, both[("new", "site", "all")].scores)
    aurocs = [source[which]["auroc"]["value"] for which in ("base", "adapted", "difference")]
    assert aurocs[2] == pytest.approx(aurocs[1] - aurocs[0])
    models = read(output)["provenance"]["models"]
    assert models["old"]["adapter_fingerprint"] != models["new"]["adapter_fingerprint"]
    assert models["old"]["fingerprint"] == models["new"]["fingerprint"]
    # From the files alone, without a model.
    status, out, _ = run("compare", tmp_path / "old-.json", tmp_path / "new-.studies.csv", "--bootstrap_resamples", 20)
    assert status == 0
    assert f"{aurocs[2]:+.3f}" in out
    assert "| old-.json | new-.studies.csv | difference |" in out
    run("evaluate", *options, "--against", "base", "--output", output)
    base = read_predictions(scores_path(output)).scored[("base", "site", "all")]
    run("evaluate", "--data", root, "--split", "all", "--output", tmp_path / "alone.json")
    (alone,) = read_predictions(tmp_path / "alone.studies.csv").scored.values()
    np.testing.assert_allclose(base.scores, alone.scores, rtol=0, atol=1e-6)


def test_points_are_chosen_on_tuning_patients_and_carried_over(run, folder, converted, tmp_path):
    splits = ["tune"] * 12 + ["valid"] * 5
    root, output = folder("site", 16, split=splits), tmp_path / "scores.json"
    options = ["--data", root, "--tune_on", root, "--sensitivity", 0.7, "--output", output]
    assert run("evaluate", *options)[0] == 1
    (points,) = read(output)["sources"][0]["operating_points"].values()
    run("evaluate", "--data", root, "--split", "tune", "--output", tmp_path / "tune.json")
    (tuned,) = read_predictions(tmp_path / "tune.studies.csv").scored.values()
    expected = threshold_for(tuned.scores[:, 0], tuned.labels[:, 0], "sensitivity", 0.7)
    assert points["sensitivity 0.7"]["thresholds"][CT_CLIP_LABELS[0]] == pytest.approx(expected, abs=1e-6)
    (scored,) = read_predictions(scores_path(output)).scored.values()
    truth = scored.labels[:, 0] == 1
    assert points["sensitivity 0.7"][f"sensitivity/{CT_CLIP_LABELS[0]}"]["value"] == pytest.approx(
        (scored.scores[truth, 0] >= expected - 1e-6).mean()
    )
    studies = read(output)["provenance"]["studies"]
    assert {name: each["scans"] for name, each in studies.items()} == {"site, tune": 12, "site, valid": 4}
    # An adapter brings its own.
    adapter = save_adapter(converted, tmp_path / "adapter", results=RESULTS | {"thresholds": {"Emphysema": 0.5}})
    run("evaluate", "--data", root, "--adapter", adapter, "--output", output)
    assert read(output)["sources"][0]["operating_points"]["adapter"]["youden"]["thresholds"] == {"Emphysema": 0.5}
    # They hold for its own words, and so does what makes probabilities of its scores.
    described = read(adapter / "medct_adapter.json") | {"calibration": {"Emphysema": [1.0, 0.0]}}
    (adapter / "medct_adapter.json").write_text(json.dumps(described), encoding="utf-8")
    table = tmp_path / "words.csv"
    table.write_text("label,words\nEmphysema,large airspaces\n", encoding="utf-8")
    other_words = (["--templates", "{label}|no {label}"], ["--mapping", table])
    for words, has_points in ([], True), *((words, False) for words in other_words):
        run("evaluate", "--data", root, "--adapter", adapter, *words, "--output", output)
        (source,) = read(output)["sources"]
        assert bool(source["operating_points"]) == has_points
        assert bool(source["calibration_error"]) == has_points


def test_one_finding_is_asked_for_in_the_same_words_of_every_source(run, folder, tmp_path):
    sources, options = [folder(name, 6) for name in ("one", "two")], []
    for name, words in (("one", "large airspaces"), ("two", "destroyed lung")):
        table = tmp_path / f"{name}.csv"
        table.write_text(f"label,words\nEmphysema,{words}\n", encoding="utf-8")
        options += [f"{name}={table}"]
    status, _, err = run("evaluate", "--data", *sources, "--mapping", *options, "--output", tmp_path / "scores.json")
    assert status == 2
    assert "--mapping two: 'Emphysema' has another prompt than in one." in err
    assert not (tmp_path / "scores.json").exists()


def test_a_run_is_repeated_to_the_digit(run, folder, converted, tmp_path):
    root, output = folder("site", 6), tmp_path / "scores.json"
    adapter = save_adapter(converted, tmp_path / "adapter")
    first = ["--data", root, "--split", "all", "--limit", 6, "--seed", 3, "--adapter", adapter, "--output", output]
    run("evaluate", *first)
    status, out, _ = run("evaluate", "--repeat", output, model=None)
    assert status == 1  # of the study that cannot be read
    assert "figures are the same to the last digit, 0 are not" in out
    assert "differs" not in out
    results = read(output)
    results["sources"][0]["scores"]["auroc"]["value"] += 1e-4
    results["provenance"]["versions"]["torch"] = "1.0"
    results["provenance"]["settings"]["data"] = ["moved"]
    output.write_text(json.dumps(results), encoding="utf-8")
    status, out, _ = run("evaluate", "--repeat", output, "--data", root, model=None)
    assert status == 1
    assert ", 1 are not" in out and "source 1: scores: auroc: value: " in out
    assert "differs: versions torch: 1.0, now " in out
    assert "differs: settings data: ['moved'], now " in out


def test_of_many_changed_figures_those_that_agree_least_are_shown(capsys):
    before, now = ({"sources": [dict.fromkeys(map(str, range(12)), value)], "provenance": {}} for value in (0.78, 0.8))
    assert score_commands._tell_changes(before, now) == 1
    out = capsys.readouterr().out
    assert out.count("source 1: ") == 10 and "source 1: 0: 0.78, now 0.8 (1 digit agrees)\n" in out
    assert "\n  and 2 more, of which no fewer digits agree\n" in out
    assert out.endswith("nothing that is recorded differs, so the computation itself is not repeatable here\n")


@pytest.mark.parametrize("change", [{}, {"fingerprint": "b"}, {"adapter_fingerprint": "b"}, {"prompts": {"x": "y"}}])
def test_recorded_points_are_for_the_weights_and_words_that_they_were_chosen_with(change):
    about = {"fingerprint": "a", "adapter_fingerprint": "a", "prompt_templates": [], "prompts": {}}
    recorded = {"provenance": {"models": {"adapted": about}}}
    points = {"adapted": {"youden": {"x": 0.5}}}
    versions = {"adapted": Version(lambda: None, [], about | {"adapter": "elsewhere"} | change)}
    assert score_commands._still_hold(points, recorded, versions) == (None if change else points)
    assert score_commands._still_hold(points, recorded, {}) is None
    assert score_commands._still_hold(None, None, versions) is None


@pytest.mark.parametrize("what", ["data", "model", "adapter", "against"])
def test_a_recorded_commit_is_of_its_own_repository(what):
    commits = REPOSITORY_OF
    known = {name: ["ORG/OLD"] if name == "data" else "ORG/OLD" for name in commits.values()}
    known |= dict.fromkeys(commits, "abc")
    flags = dict.fromkeys([*known, "repeat", "sensitivity", "specificity", "tune_on"])
    for address, found in (("ORG/OLD", "abc"), ("ORG/NEW", None)):
        args = argparse.Namespace(**flags | {what: [address] if what == "data" else address})
        score_commands.settle(args, {"provenance": {"settings": known}})
        assert {name: getattr(args, name) for name in commits} == {
            name: found if of == what else "abc" for name, of in commits.items()
        }


def test_a_run_is_repeated_with_the_adapter_beside_its_results(tmp_path):
    known = {"data": ["ORG/OLD"], "model": "ORG/BASE", "adapter": "."}
    for repeat in (tmp_path, tmp_path / "results.json"):
        flags = dict.fromkeys([*known, *REPOSITORY_OF, "against", "sensitivity", "specificity", "tune_on"])
        args = argparse.Namespace(**flags, repeat=repeat)
        score_commands.settle(args, {"provenance": {"settings": known}})
        assert args.adapter == str(tmp_path)


def test_figures_from_tables(run, folder, tmp_path):
    root, output = folder("site", 20), tmp_path / "scores.json"
    run("evaluate", "--data", root, "--split", "all", "--seed", 5, "--output", output)
    expected = read(output)["sources"][0]["scores"]
    assert expected["auroc"]["low"] < expected["auroc"]["high"]
    for tables in ([scores_path(output)], [scores_path(output), root / "metadata.csv"]):
        options = ["--bootstrap_resamples", 20, "--seed", 5, "--output", tmp_path / "again.json"]
        status, out, _ = run("metrics", *tables, *options)
        assert status == 0
        (source,) = read(tmp_path / "again.json")["sources"]
        assert source["scores"] == expected
        assert source["table"] if "table" in source else read(tmp_path / "again.json")["table"] in out
    nowhere = tmp_path / "nowhere.csv"
    for tables in ([root / "metadata.csv", nowhere], [nowhere], [nowhere, root / "metadata.csv"]):
        status, _, err = run("metrics", *tables)
        assert status == 2 and len(err.splitlines()) == 1
        assert err.startswith(f"error: {nowhere}: no such file. ")


def test_runs_that_do_not_fit_are_refused(run, folder, tmp_path):
    one, two = folder("one", 6), folder("two", 4)
    run("evaluate", "--data", one, two, "--split", "all", "--output", tmp_path / "a.json")
    run("evaluate", "--data", two, one, "--split", "valid", "--limit", 3, "--output", tmp_path / "b.json")
    status, _, err = run("compare", tmp_path / "a.json", tmp_path / "a.json", "--models", "new", "old")
    assert status == 2
    assert "it has no scores of 'new', but of model" in err
    for name in ("none.json", "none.csv", "none"):
        status, _, err = run("compare", tmp_path / "a.json", tmp_path / name)
        assert status == 2 and len(err.splitlines()) == 1
        assert err.startswith(f"error: {tmp_path / name}: no such file. ")
    (tmp_path / "alone.json").write_bytes((tmp_path / "a.json").read_bytes())
    status, _, err = run("compare", tmp_path / "a.json", tmp_path / "alone.json")
    said = f"error: {tmp_path / 'alone.json'}: there is no alone.studies.csv beside it, "
    assert status == 2 and err.startswith(said)


def test_labels_that_only_one_run_has_scored_are_named(run, tmp_path):
    labels = np.repeat([[0.0, 1.0], [1.0, 0.0]], 5, axis=0)
    ids = list(map(str, range(10)))
    for name, others in (("old", ["Mass", "Cyst"]), ("new", ["Mass", "Nodule"])):
        scored = {Key(name, "site", "all"): ScoredStudies(ids, ids, labels / 2, labels, names=others)}
        write_predictions(tmp_path / f"{name}.csv", Predictions(others, scored))
    status, out, _ = run("compare", tmp_path / "old.csv", tmp_path / "new.csv")
    assert status == 0 and "NOTE: site, all: only one run has scored Cyst, Nodule; left out." in out


@pytest.mark.parametrize(
    ("made", "why"), [({"provenance": {"settings": None}}, "is of folds, or of a whole"), ({}, "does not say how")]
)
def test_a_run_that_cannot_be_repeated_says_why(run, tmp_path, made, why):
    (tmp_path / "results.json").write_text(json.dumps({"table": ""} | made), encoding="utf-8")
    status, _, err = run("evaluate", "--repeat", tmp_path / "results.json")
    assert status == 2 and f"results.json {why}" in err and "so it cannot be repeated" in err


def test_subgroups_come_with_the_table(run, folder, tmp_path):
    ages = ["30"] * 25 + ["65"] * 22 + [""] * 4
    root, output = folder("site", 50, age=ages, manufacturer="Maker"), tmp_path / "scores.json"
    _, out, _ = run("evaluate", "--data", root, "--split", "all", "--output", output)
    ages, makers = read(output)["sources"][0]["subgroups"]
    assert [(each["group"], each["scans"]) for each in ages["groups"]] == [
        ("60-79", 22),
        ("under 40", 25),
        ("unknown", 3),
    ]
    assert [each["scans"] for each in makers["groups"]] == [50]
    assert "| age: 60-79 | 22 | " in out and "| age: unknown | 3 | " in out and "too few" in out
    # Computed again from the table of scores, they are the same.
    run("metrics", scores_path(output), "--bootstrap_resamples", 20, "--output", tmp_path / "again.json")
    assert read(tmp_path / "again.json")["sources"][0]["subgroups"] == [ages, makers]


def test_training_runs_are_compared_on_held_out_studies(run, tmp_path):
    """Their adapted models, by default, and never on the patients that they were chosen on."""
    generator = np.random.default_rng(0)
    labels = np.repeat([[0.0], [1.0]], 10, axis=0)
    runs = []
    for name in ("old", "new"):
        scored = {}
        for model in ("base", "adapted"):
            for split in ("tune", "valid"):
                scores = np.clip(labels / 3 + generator.random((20, 1)) / 1.5, 0, 1)
                ids = [f"{split}-{index}" for index in range(20)]
                scored[Key(model, "site", split)] = ScoredStudies(ids, ids, scores, labels, names=["Mass"])
        runs.append(tmp_path / name)
        runs[-1].mkdir()
        write_predictions(scores_path(runs[-1] / "results.json"), Predictions(["Mass"], scored))
        runs[-1] = (runs[-1], scored)
    output = tmp_path / "difference.json"
    (old, before), (new, after) = runs
    assert run("compare", old, new, "--output", output)[0] == 0
    (source,) = read(output)["sources"]
    assert (source["source"], source["models"]) == ("site, valid", {"base": "old", "adapted": "new"})
    for which, scored in (("base", before), ("adapted", after)):
        held_out = scored[("adapted", "site", "valid")]
        expected = zero_shot_scores(held_out.scores, held_out.labels, ["Mass"])["auroc"]
        assert source[which]["auroc"]["value"] == pytest.approx(expected)
    assert run("compare", old, old, "--models", "base", "adapted", "--output", output)[0] == 0
    (source,) = read(output)["sources"]
    assert source["models"] == {"base": "old: base", "adapted": "old (2): adapted"}


@pytest.mark.parametrize("command", ["evaluate", "metrics", "compare"])
def test_figures_replace_only_those_of_the_same_command(run, folder, tmp_path, command):
    root, output = folder("site", 6), tmp_path / "scores.json"
    assert run("evaluate", "--data", root, "--split", "all", "--output", output)[0] == 1
    commands = {
        "evaluate": ["--data", root, "--split", "all"],
        "metrics": [scores_path(output), "--bootstrap_resamples", 20],
        "compare": [output, output, "--bootstrap_resamples", 20],
    }
    arguments, own = commands[command], tmp_path / "own.json"
    for _ in range(2):
        assert run(command, *arguments, "--output", own)[0] in (0, 1) and own.is_file()
    taken = [(own, other) for other in commands if other != command]
    for index, content in enumerate(("{", "[]", "{}", '{"sources": [], "provenance": null}')):
        taken.append((tmp_path / f"{index}.json", command))
        taken[-1][0].write_text(content, encoding="utf-8")
    for path, other in taken:
        before = path.read_bytes()
        status, out, err = run(other, *commands[other], "--output", path)
        assert (status, out) == (2, "") and path.read_bytes() == before
        assert err == (
            f"error: {path}: it exists, and `medct {other}` did not write it. Choose another --output, or remove it.\n"
        )


def test_scores_that_nobody_named_are_not_replaced(run, tmp_path):
    scores = tmp_path / "my.studies.csv"
    scores.write_text("of others", encoding="utf-8")
    status, _, err = run("evaluate", "--data", "phantoms", "--limit", 4, "--output", tmp_path / "my.json")
    assert status == 2 and err.startswith(f"error: {scores}: it exists, and the scores that belong to my.json go there")
    assert scores.read_text(encoding="utf-8") == "of others"


@pytest.mark.parametrize("command", ["evaluate", "metrics"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_figures_are_kept_where_they_cannot_be_printed(converted, tmp_path, command, ended, monkeypatch):
    table, output = tmp_path / "scores.csv", tmp_path / "figures.json"
    rows = [f"{k},{k % 2},m,s,all,p{k},{k % 2}" for k in range(9)]
    table.write_text("\n".join(["file_name,Mass,model,source,split,patient,Mass label", *rows]), encoding="utf-8")
    arguments = {
        "metrics": [table, "--bootstrap_resamples", 20],
        "evaluate": ["--data", "phantoms", "--limit", 9, "--cpu", "--model", converted, "--bootstrap_resamples", 20],
    }[command]
    with Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        status, _, err = ended(command, *arguments, "--output", output)
        drop_output()  # or closing it would fail as well
    said = err.splitlines()[-1]
    assert status == 2 and said.startswith("error: ") and "No space left on device" in said
    assert read(output)["sources"]


def test_a_label_that_the_terminal_cannot_show_is_escaped(tmp_path, monkeypatch):
    table, output = tmp_path / "scores.csv", tmp_path / "figures.json"
    rows = [f"{k},{k % 2},m,s,all,p{k},{k % 2}" for k in range(9)]
    text = "\n".join(["file_name,Gefäß,model,source,split,patient,Gefäß label", *rows])
    table.write_text(text, encoding="utf-8")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["metrics", str(table), "--bootstrap_resamples", "20", "--output", str(output)]) == 0
    terminal.flush()
    assert json.loads(r'"Gef\u00e4\u00df"') == "Gefäß" and rb"Gef\u00e4\u00df" in terminal.buffer.getvalue()
    assert read(output)["label_names"] == ["Gefäß"]


@pytest.mark.parametrize("split", ["tune", "all"])
def test_thresholds_are_not_tried_on_what_they_were_chosen_on(run, folder, tmp_path, split):
    """Whatever the studies' address is called."""
    root, link = folder("site", 40), tmp_path / "link"
    link.symlink_to(root)
    for address in (root, link):
        status, _, err = run("evaluate", "--data", address, "--split", split, "--tune_on", root)
        assert status == 2
        assert f"--split {split} scores the studies of {root} that --tune_on chooses thresholds on" in err
    shutil.copytree(root, tmp_path / "copy")
    status, _, err = run("evaluate", "--data", tmp_path / "copy", "--split", split, "--tune_on", root)
    assert status == 2
    assert "studies that they were chosen on. Leave these out" in err
    status, out, _ = run("evaluate", "--data", root, "--tune_on", root)
    assert status == 0
    assert "NOTE: No operating point for any finding: fewer than 5 tuning patients have it" in out


def test_studies_without_a_file_are_remarked_on(run, folder, tmp_path):
    root = folder("site", 6)
    (root / "1.nii.gz").unlink()
    _, out, _ = run("evaluate", "--data", root, "--split", "all", "--output", tmp_path / "scores.json")
    said = "NOTE: site: left out before they were read: no such file (1, such as 1.nii.gz)."
    assert said in out
    assert said.removeprefix("NOTE: ") in read(tmp_path / "scores.json")["remarks"]


def test_shares_are_refused_before_anything_is_scored(run, folder, monkeypatch):
    root = folder("site", 6)
    table = pd.read_csv(root / "metadata.csv").astype({"Emphysema": float})
    table.loc[2, "Emphysema"] = 0.5
    table.to_csv(root / "metadata.csv", index=False)
    monkeypatch.setattr(score_commands, "score_versions", None)
    status, _, err = run("evaluate", "--data", root, "--split", "all")
    assert status == 2
    assert "'Emphysema' of 2.nii.gz is 0.5, and shares are for training only" in err


def test_predicted_scores_are_as_exact_as_the_model_gives_them(run, folder, tmp_path, converted):
    """Scores near 0 or 1 would tie at six decimals."""
    root = folder("site", 6)
    output = tmp_path / "predicted.csv"
    main(
        ["predict", *map(str, sorted(root.glob("[0-9]*"))), "--cpu", "--model", str(converted), "--output", str(output)]
    )
    run("evaluate", "--data", root, "--split", "all", "--output", tmp_path / "scores.json")
    (scored,) = read_predictions(scores_path(tmp_path / "scores.json")).scored.values()
    predicted = pd.read_csv(output)[scored.names].to_numpy(np.float32)
    assert np.array_equal(predicted, scored.scores.astype(np.float32))


@pytest.mark.parametrize(
    "command", ["evaluate --data x --split", "prompts --data x --split", "overview x --split", "prepare x y --splits"]
)
@pytest.mark.parametrize("name", ["test", "validation"])
def test_what_a_split_is_called_here_is_said(command, name, run):
    status, _, err = run(*command.split(), name, model=None)
    assert status == 2 and f"there is no split {name!r}: `valid` is the one that is only scored" in err


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("a,,1\nb,,0\n", "2 rows have an empty 'patient'"),
        ("1.nii,P,1\n", "its row '1.nii' could be of x/1.nii and of y/1.nii"),
        ("a,P,1\na,Q,0\n", "of a study that has one, such as 'a'"),
        ("a,P,7\nb,Q,-1\n", "the label 'Mass' is 7 somewhere"),
        (" a , P,yes\nb,P ,no\n", None),
    ],
)
def test_patients_and_labels_of_retrieval_are_as_everywhere(tmp_path, table, said):
    """Who has no name is not the same patient as all others without one, and a row is of one study."""
    args = argparse.Namespace(metadata=tmp_path / "m.csv", index=tmp_path / "i.parquet", findings=["Mass"])
    args.metadata.write_text(f"file_name,patient,Mass\n{table}", encoding="utf-8")
    studies = ["x/a", "b", "x/1.nii", "y/1.nii"]
    if said is not None:
        with pytest.raises(MedCTError, match=said):
            _patients_and_labels(args, studies)
        return
    patients, labels = _patients_and_labels(args, studies)
    assert patients.tolist() == ["P", "P", "x/1.nii", "y/1.nii"]
    np.testing.assert_array_equal(labels[:, 0], [1, 0, np.nan, np.nan])


def test_studies_that_an_adapter_has_learned_from_are_remarked_on(tmp_path):
    """By what its folder knows: their names, or that of their scan where there are several reconstructions."""
    scored = ScoredStudies(["a", "b_1", "t", "v"], list("abtv"), np.zeros((4, 1)), np.zeros((4, 1)), names=["Mass"])
    source = Source([(0,), (1, 2), (3,), (4,)], lambda key: {}, ("Mass",), "four", names=["a", "b", "t", "v"])
    tuned = Predictions(["Mass"], {Key("adapted", "site", "tune"): scored.take([2])})
    (tmp_path / "run").mkdir()
    write_predictions(tmp_path / "run/results.studies.csv", tuned, [("site", "train", ["a", "b", "x"])])
    (tmp_path / "other").mkdir()
    write_predictions(tmp_path / "other/results.studies.csv", tuned)

    def learned(source=source, scored=scored, **adapters) -> dict:
        versions = {
            name: Version(lambda: None, [], {"adapter": str(tmp_path / each)} if each else {})
            for name, each in adapters.items()
        }
        return score_commands._learned(versions, source, scored)

    about = score_commands._about("site", source, "all", 0)
    about["learned"] = learned(base=None, run="run")
    (said,) = score_commands._remarks(about)
    assert said.startswith("site: of the 4 studies, run has trained on 2 and chosen on 1, by their names.")
    # Each is called as it is in the tables, also where two have a folder of the same name.
    assert learned(**{"run": "other", "run (2)": "run"}) == {"run": {"tune": 1}, "run (2)": {"train": 2, "tune": 1}}
    others = dataclasses.replace(source, names=list("wyuv"))
    assert learned(others, scored.take([3]), run="run") == {}
    assert learned(dataclasses.replace(source, is_synthetic=True), run="run") == {}
    assert learned(run="ORG/NAME") == {}
    adapters = [str(tmp_path / "run"), str(tmp_path / "other"), None]
    said, *others = [score_commands.remark_on_choice(adapter, source, scored) for adapter in adapters]
    assert said.startswith("run has trained on 2 of the 4 studies that the choice was made on") and not any(others)
