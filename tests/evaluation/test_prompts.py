"""What wording does to scores: worked out by hand, and equal to what the pipeline gives in the same words."""

import json

import numpy as np
import pytest
from accelerate import Accelerator
from adapter_files import RESULTS, save_adapter
from sklearn.metrics import roc_auc_score

from medct import CT_CLIP_LABELS, MedCTConfig, MedCTModel, ZeroShotCTClassificationPipeline
from medct.adapters_medct import DESCRIPTION_FILE
from medct.cli import main
from medct.cli.prompt_commands import _store_wording
from medct.data import StudyLoader, open_source, phantom_source
from medct.data.label_space import with_labels
from medct.evaluation.prompts import SYNONYMS, TEMPLATES, spread, wording_scores
from medct.evaluation.report import prompts_report
from medct.evaluation.scoring import ScoredStudies, embed_studies, prompts_for, score_studies

A, B = ("{label} a", "not {label} a"), ("{label} b", "not {label} b")
NAMES = {"x": ["x", "y"], "z": ["z"]}
# Six studies with x, then six without; z as well.
LABELS = np.repeat([[1.0, 1.0], [0.0, 0.0]], 6, axis=0)
PERFECT, USELESS = np.repeat([0.9, 0.1], 6), np.full(12, 0.5)


def ranks(errors: int) -> np.ndarray:
    """Scores whose AUROC is 1 - `errors` / 36."""
    scores = np.concatenate([np.full(6, 0.6), np.full(6, 0.3)])
    scores[6] = 0.5 + 0.2 * (errors > 0)  # above `errors` of those with it
    scores[:6] = np.where(np.arange(6) < errors, 0.65, 0.8)
    return scores


def test_the_spread_worked_out_by_hand():
    # (templates, names, studies)
    scores = {"x": np.stack([[ranks(2), PERFECT], [ranks(4), USELESS]]), "z": np.stack([[ranks(1)], [ranks(3)]])}
    found = spread(scores, LABELS, [A, B], NAMES)
    x = found["findings"]["x"]
    aurocs = [34 / 36, 1, 32 / 36, 0.5]
    assert (x["usual"], x["mean"], x["lowest"], x["highest"]) == pytest.approx((aurocs[0], np.mean(aurocs), 0.5, 1))
    assert x["best"] == {"template": list(A), "name": "y"}
    assert (x["present"], x["absent"], x["wordings"]) == (6, 6, 4)
    templates = [(34 / 36 + 35 / 36) / 2, (32 / 36 + 33 / 36) / 2]
    assert [each["auroc"] for each in found["templates"]] == pytest.approx(templates)
    # The mean of both templates: as many scans are out of order as with the worse one, or fewer.
    chosen = found["chosen"]
    assert found["ensemble"] <= templates[0]
    assert chosen["prompt_templates"] == [list(A)]
    assert chosen["names"] == {"x": "y"}
    assert chosen["auroc"] == pytest.approx((1 + 35 / 36) / 2)
    said = prompts_report(found)
    assert f"the mean AUROC from {templates[1]:.3f} to {templates[0]:.3f}" in said
    assert "on the 12 studies of 12 patients that it was chosen on" in said
    assert "| x (6) | 0.944 | " in said and "| y a / not y a |" in said, "templates may share a sentence"


def test_an_ensemble_is_chosen_where_it_is_better():
    """Each template has one pair of four out of order; their mean has none."""
    one, other = np.array([0.9, 0.4, 0.5, 0.1]), np.array([0.4, 0.9, 0.1, 0.5])
    found = spread({"x": np.stack([[one], [other]])}, np.array([[1.0], [1], [0], [0]]), [A, B], {"x": ["x"]})
    assert [each["auroc"] for each in found["templates"]] == [0.75, 0.75]
    assert found["ensemble"] == found["chosen"]["auroc"] == 1
    assert found["chosen"]["prompt_templates"] == [list(A), list(B)]


def test_of_few_studies_no_name_is_chosen():
    """Four studies with a finding tell nothing."""
    labels = LABELS.copy()
    labels[:2] = np.nan
    scores = {"x": np.stack([[ranks(4), PERFECT]]), "z": np.stack([[ranks(1)]])}
    assert spread(scores, LABELS, [A], NAMES)["chosen"]["names"] == {"x": "y"}
    found = spread(scores, labels, [A], NAMES)
    assert found["chosen"]["names"] == {}
    patients = ["p", "p", *"qrstuvwxyz"]  # five of six studies with it are of others
    assert spread(scores, LABELS, [A], NAMES, patients)["chosen"]["names"] == {"x": "y"}
    assert spread(scores, LABELS, [A], NAMES, ["p", *patients[:-1]])["chosen"]["names"] == {}
    labels[:, 1] = 0
    found = spread(scores, labels, [A], NAMES)["findings"]
    assert found["z"]["usual"] is None and found["x"]["usual"] is not None
    with pytest.raises(ValueError, match="always or never present"):
        spread(scores, labels * 0, [A], NAMES)


def test_several_templates_that_a_model_uses_are_its_usual_wording():
    """Their mean is what it gives now, and a choice is never worse than that."""
    one, other = np.array([0.9, 0.4, 0.5, 0.1]), np.array([0.4, 0.9, 0.1, 0.5])
    scores = {"x": np.stack([[one], [other], [1 - one - other]])}
    found = spread(scores, np.array([[1.0], [1], [0], [0]]), [A, B, A], {"x": ["x"]}, own_templates=2)
    assert found["findings"]["x"]["usual"] == found["chosen"]["auroc"] == 1
    assert found["chosen"]["prompt_templates"] == [list(A), list(B)]


def test_own_sentences_are_one_wording_and_kept_unless_another_is_better(tmp_path):
    pairs = {"x": [["It is large.", "It is small."]]}
    (tmp_path / DESCRIPTION_FILE).write_text("{}", encoding="utf-8")
    studies = ScoredStudies(list("abcdefghijkl"), list("abcdefghijkl"), LABELS, LABELS, names=["x", "z"])
    names = {"x": [pairs["x"], "x"], "z": ["z"]}
    for own, plain, stored in ((PERFECT, ranks(2), pairs), (ranks(2), PERFECT, None)):
        scores = {"x": np.stack([[own, plain], [own, USELESS]]), "z": np.stack([[ranks(1)], [ranks(3)]])}
        found = spread(scores, LABELS, [A, B], names)
        aurocs = [roc_auc_score(LABELS[:, 0], each) for each in (own, plain, USELESS)]
        x = found["findings"]["x"]
        assert (x["wordings"], x["usual"], x["mean"]) == pytest.approx((3, aurocs[0], np.mean(aurocs)))
        assert (x["best"]["name"] == pairs["x"]) == (stored is not None)
        assert ("| It is large. / It is small. |" in prompts_report(found)) == (stored is not None)
        _store_wording(tmp_path, found, scores, studies, [A, B], names)
        described = json.loads((tmp_path / DESCRIPTION_FILE).read_text(encoding="utf-8"))
        assert described["prompts"] == stored and described["prompt_templates"] == [list(A)]


@pytest.mark.parametrize("count", [12, 6])
def test_what_is_stored_is_of_all_chosen_templates_and_of_enough_patients(tmp_path, count):
    """Two scans a patient are of too few patients, as in training; what held for other words is chosen anew."""
    known = {"label_names": ["x"], "operating_points": {"sensitivity 0.9": {"x": 0.4}}, "calibration": {"x": [9, 9]}}
    (tmp_path / DESCRIPTION_FILE).write_text(json.dumps(known), encoding="utf-8")
    patients = [str(index * count // 12) for index in range(12)]
    names = [f"scan {index}" for index in range(12)]
    studies = ScoredStudies(names, patients, np.full((12, 1), np.nan), LABELS[:, :1], names=["x"])
    found = {"chosen": {"prompt_templates": [list(A), list(B)], "names": {}}}
    _store_wording(tmp_path, found, {"x": np.stack([[PERFECT], [PERFECT / 2]])}, studies, [A, B], {"x": ["x"]})
    described = json.loads((tmp_path / DESCRIPTION_FILE).read_text(encoding="utf-8"))
    assert described["label_names"] == ["x"]
    lowest = pytest.approx(0.675)  # of those with the finding, as PERFECT parts them from all others
    assert described["thresholds"] == ({"x": lowest} if count == 12 else None)
    assert described["operating_points"] == ({"sensitivity 0.9": {"x": lowest}} if count == 12 else None)
    assert (described["calibration"] is None) == (count == 6) and described["calibration"] != known["calibration"]


def test_wordings_have_the_scores_that_the_pipeline_gives(model, processor):
    source = phantom_source("A", range(3), 0)
    loader = StudyLoader(source, processor, CT_CLIP_LABELS, batch_size=2, with_text=False)
    accelerator = Accelerator(cpu=True)
    embeds, studies = embed_studies(model, loader, accelerator, "")
    names = {label: [label] for label in CT_CLIP_LABELS} | {"Emphysema": ["Emphysema", "a b c"]}
    scores = wording_scores(model, processor, embeds, [A, B], names, accelerator)
    assert scores["Emphysema"].shape == (2, 2, 3) and scores["Cardiomegaly"].shape == (2, 1, 3)
    pipe = ZeroShotCTClassificationPipeline(model=model, processor=processor, device="cpu")
    row = source.read(1)
    assert studies.ids[1] == row["id"]
    for template, each in zip((A, B), scores["Emphysema"], strict=True):
        found = pipe(
            [row["volume"]], affine=row["affine"], candidate_labels=names["Emphysema"], prompt_templates=[template]
        )
        by_name = {result["label"]: result["score"] for result in found[0]}
        assert each[:, 1] == pytest.approx([by_name[name] for name in names["Emphysema"]], abs=1e-5)
    # With the model's own words it is what `score_studies` gives.
    own = wording_scores(
        model, processor, embeds, model.config.prompt_templates, {n: [n] for n in CT_CLIP_LABELS}, accelerator
    )
    scored = score_studies(model, loader, prompts_for(model, processor), accelerator, "")
    np.testing.assert_allclose(np.stack([each[0, 0] for each in own.values()], 1), scored.scores, atol=1e-6)
    # With all that a configuration asks, too.
    prompts = {"Emphysema": "a b c", "Cardiomegaly": [["q", "r"], ["s", "t"], ["u", "v"]]}
    config = with_labels(model.config, CT_CLIP_LABELS, prompts, [A, B])
    usual = {label: [prompts.get(label, label)] for label in CT_CLIP_LABELS}
    own = wording_scores(model, processor, embeds, [A, B], usual, accelerator)
    scored = score_studies(model, loader, prompts_for(model, processor, config), accelerator, "")
    np.testing.assert_allclose(np.stack([each[:, 0].mean(0) for each in own.values()], 1), scored.scores, atol=1e-6)


def test_the_lists_are_of_whole_sentences():
    config = MedCTConfig()
    assert set(SYNONYMS) == set(CT_CLIP_LABELS)
    assert len(set(TEMPLATES)) == len(TEMPLATES) == 7
    assert TEMPLATES[0] == tuple(config.prompt_templates[0])
    assert all(config.label_prompts(["x"], [template]) for template in TEMPLATES)


def test_a_choice_is_stored_with_the_adapter_and_used(converted, processor, tmp_path, capsys):
    adapter = save_adapter(converted, tmp_path / "adapter")
    (tmp_path / "names.json").write_text(json.dumps({"Lung nodule": ["q w e", "r t"]}), encoding="utf-8")
    options = ["prompts", "--data", "phantoms:A", "--limit", "20", "--model", converted, "--adapter", adapter, "--cpu"]
    options += ["--num_workers", "0", "--batch_size", "4"]
    options += ["--templates", "{label} a|not {label} b", "{label} q|no {label}"]
    output = tmp_path / "prompts.json"
    assert main([*map(str, options), "--names", str(tmp_path / "names.json"), "--store", "--output", str(output)]) == 0
    assert "moves the mean AUROC from" in (out := capsys.readouterr().out)
    assert "medct_adapter.json, with operating points and calibration for it\nNOTE: No operating point for " in out
    found = json.loads(output.read_text(encoding="utf-8"))
    assert len(found["templates"]) == 3 and found["studies"] == 20
    described = json.loads((adapter / DESCRIPTION_FILE).read_text(encoding="utf-8"))
    wording = {key: found["chosen"][key] for key in ("prompt_templates", "names")}
    assert described["prompt_templates"] == wording["prompt_templates"]
    assert (described["prompts"] or {}) == wording["names"]
    assert set(described["thresholds"]) <= set(CT_CLIP_LABELS) and described["thresholds"]
    # A pipeline with the adapter asks so, and one that is told what to ask does as it is told.
    row = phantom_source("A", range(1), 0).read(0)
    model = MedCTModel.from_pretrained(converted)
    pipe = ZeroShotCTClassificationPipeline(model=model, processor=processor, adapter=str(adapter), device="cpu")
    own = {each["label"]: each for each in pipe([row["volume"]], affine=row["affine"])[0]}
    names = [wording["names"].get(label, label) for label in CT_CLIP_LABELS]
    told = pipe(
        [row["volume"]],
        affine=row["affine"],
        candidate_labels=names,
        prompt_templates=[tuple(each) for each in wording["prompt_templates"]],
    )[0]
    scores = {each["label"]: each["score"] for each in told}
    for label, name in zip(CT_CLIP_LABELS, names, strict=True):
        assert own[label]["score"] == pytest.approx(scores[name], abs=1e-6)
    assert {label for label, each in own.items() if "present" in each} == set(described["thresholds"])
    some = pipe([row["volume"]], affine=row["affine"], candidate_labels=["Lung nodule", "b"])[0]
    assert next(each for each in some if each["label"] == "Lung nodule")["score"] == pytest.approx(
        own["Lung nodule"]["score"], abs=1e-6
    )
    # And so does `medct evaluate`: mean AUROC on the same studies is what was reported.
    scored = tmp_path / "scores.json"
    evaluate = ["evaluate", "--data", "phantoms:A", "--split", "tune", "--limit", 20, "--adapter", adapter, "--cpu"]
    main([*map(str, evaluate), "--num_workers", "0", "--bootstrap_resamples", "20", "--output", str(scored)])
    auroc = json.loads(scored.read_text(encoding="utf-8"))["sources"][0]["scores"]["auroc"]["value"]
    assert auroc == pytest.approx(found["chosen"]["auroc"], abs=1e-9)


def test_a_choice_on_few_is_stored_without_operating_points_and_says_so(converted, tmp_path, capsys):
    adapter = save_adapter(converted, tmp_path / "adapter", results=RESULTS | {"thresholds": {"Emphysema": 0.5}})
    options = ["prompts", "--data", "phantoms:A", "--limit", "4", "--model", converted, "--adapter", adapter, "--cpu"]
    assert main([*map(str, options), "--num_workers", "0", "--templates", "{label} a|not {label} b", "--store"]) == 0
    out = capsys.readouterr().out
    assert "stored in " in out and "medct_adapter.json, without operating points for it" in out
    assert "NOTE: No operating point for any finding: fewer than 5 tuning patients have it" in out
    assert json.loads((adapter / DESCRIPTION_FILE).read_text(encoding="utf-8"))["thresholds"] is None


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ('{"Nodules": ["a"]}', "the model has no finding 'Nodules'"),
        ('["a"]', "write a list of other names for each finding"),
        ('{"Emphysema": "a"}', "write a list of other names for each finding"),
        ("{", "not a readable JSON file"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(converted, tmp_path, refused, names, said):
    (tmp_path / "names.json").write_text(names, encoding="utf-8")
    options = ["--model", converted, "--cpu", "--names", tmp_path / "names.json"]
    assert said in refused("prompts", "--data", "phantoms:A", *options)


@pytest.mark.parametrize("what", ["limit", "mixed precision", "fingerprint", "studies"])
def test_processes_that_would_try_words_on_something_else_are_refused(converted, refused, monkeypatch, what):
    def of_all(ours):
        return [ours, {name: "other" if name.startswith(what) else value for name, value in ours.items()}]

    monkeypatch.setattr("medct.common.distributed.of_all", of_all)
    options = ["--limit", 4, "--model", converted, "--cpu", "--num_workers", 0]
    assert refused("prompts", "--data", "phantoms:A", *options).startswith(f"Process 2 of 2 has {what}")


def test_wordings_of_own_findings_are_tried(converted, tmp_path, refused):
    """Under the names that the data have for them."""
    rows = ["label,data,words,present,absent", "Nodule,Lung nodule,a b,,", "Water,Pleural effusion,,,"]
    rows += ["Heart,Cardiomegaly,,It is large.,It is small."]
    (tmp_path / "own.csv").write_text("\n".join(rows), "utf-8")
    (tmp_path / "names.json").write_text('{"Nodule": ["q"]}', encoding="utf-8")
    output = tmp_path / "prompts.json"
    options = ["prompts", "--data", "phantoms:A", "--limit", 20, "--model", converted, "--cpu", "--num_workers", 0]
    options += ["--labels", tmp_path / "own.csv", "--names", tmp_path / "names.json", "--output", output]
    assert main(list(map(str, options))) == 0
    found = json.loads(output.read_text(encoding="utf-8"))
    assert set(found["findings"]) == {"Nodule", "Water", "Heart"}
    nodule, water = found["findings"]["Nodule"], found["findings"]["Water"]
    assert found["findings"]["Heart"]["wordings"] == water["wordings"] + 1
    assert nodule["wordings"] == 2 * water["wordings"] and nodule["best"]["name"] in ("a b", "q")
    source = open_source("phantoms:A", "tune", MedCTModel.from_pretrained(converted).config, limit=20)
    labels = np.array([source.read(group[0])["labels"] for group in source.groups])
    assert nodule["present"] == labels[:, CT_CLIP_LABELS.index("Lung nodule")].sum()
    adapter = save_adapter(converted, tmp_path / "adapter")
    assert "Leave out all others" in refused(*options, "--adapter", adapter, "--store")


def test_a_choice_needs_an_adapters_folder_and_patients_to_choose_on(converted, refused, tmp_path):
    options = ["prompts", "--data", "x", "--model", converted, "--store"]
    assert "Pass its folder as --adapter" in refused(*options)
    adapter = save_adapter(converted, tmp_path / "adapter")
    for split in ("valid", "all"):
        said = refused(*options, "--adapter", adapter, "--split", split)
        assert f"--split {split} would make it on the patients that scores are told of" in said
