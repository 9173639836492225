"""Scores where the data's labels are not the model's: findings merged, left out, asked for in other words."""

import json

import pytest
import torch
from accelerate import Accelerator
from ct_rate_like import write_files
from rad_chestct_like import rad_chestct_files

from medct import CT_CLIP_LABELS
from medct.cli import main
from medct.data import StudyLoader, open_source
from medct.evaluation import scoring
from medct.evaluation.metrics import zero_shot_scores

MERGED = "Arterial wall calcification or Coronary artery wall calcification"
# Scores of the six test scans, one row a finding; all others are 0.5.
SCORES = {
    "Arterial wall calcification": [0.9, 0.2, 0.3, 0.4, 0.1, 0.1],
    "Coronary artery wall calcification": [0.1, 0.8, 0.3, 0.2, 0.35, 0.1],
    "Cardiomegaly": [0.6, 0.5, 0.58, 0.55, 0.2, 0.1],
    "Lung nodule": [0.1, 0.5, 0.2, 0.3, 0.3, 0.9],
    "Medical material": [0.1, 0.2, 0.3, 0.4, 0.35, 0.5],
}
# By hand: the share of pairs, of a scan with the finding and one without, that are in order; a tie is half a pair.
BY_HAND = {
    # With it .9 .8 .3, by the higher of both scores; without .4 .35 .1.
    ("radfinder-standard", MERGED): (3 + 3 + 1) / 9,
    # With it .9 .8, whose higher score is above .5, and .3; without .2 .1 .1, the lower ones.
    ("hlip", MERGED): 1.0,
    # With it .6 .55; without .5 .58 .2 .1.
    ("radfinder-standard", "Cardiomegaly"): (4 + 3) / 8,
    ("hlip", "Cardiomegaly"): (4 + 3) / 8,
    # Nodules of any size: with it .5 .3 .9; without .1 .2 .3.
    ("radfinder-standard", "Lung nodule"): (3 + 2.5 + 3) / 9,
    # `nodule` alone: with it .5 .9; without .1 .2 .3 .3.
    ("hlip", "Lung nodule"): 1.0,
    # A stent and a clip: with it .35; without .1 .2 .3 .4 .5.
    ("radfinder-standard", "Medical material"): 3 / 5,
}


def given_scores(model, pixel_values, templates, accelerator):
    """The scan's number is in the voxel at its centre."""
    z, y, x = (size // 2 for size in pixel_values.shape[2:])
    scans = (pixel_values[:, 0, z, y, x] * 100 - 20).round().int().tolist()
    return torch.tensor([[SCORES.get(name, [0.5] * 6)[scan - 1] for name in CT_CLIP_LABELS] for scan in scans])


@pytest.fixture
def rad(tmp_path):
    return str(write_files(tmp_path / "rad", rad_chestct_files()))


@pytest.mark.parametrize("mapping", ["radfinder-standard", "hlip"])
def test_a_small_case_by_hand(rad, model, processor, monkeypatch, mapping):
    monkeypatch.setattr(scoring, "_scores", given_scores)
    source = open_source(rad, "valid", model.config, mapping=mapping)
    loader = StudyLoader(source, processor, model.config.label_names, batch_size=4, with_text=False)
    scored = scoring.score_studies(model, loader, [], Accelerator(cpu=True), "score")
    assert len(scored.names) == 17 and scored.scores.shape == scored.labels.shape == (6, 17)
    found = zero_shot_scores(scored.scores, scored.labels, scored.names)
    by_hand = {name: auroc for (which, name), auroc in BY_HAND.items() if which == mapping}
    for name in scored.names:
        auroc = found[f"auroc/{name}"]
        assert auroc == pytest.approx(by_hand[name]) if name in by_hand else auroc != auroc, name
    assert found["auroc"] == pytest.approx(sum(by_hand.values()) / len(by_hand))


def results_of(output, *arguments):
    command = ["evaluate", "--num_workers", "0", "--cpu", "--bootstrap_resamples", "20", "--output", str(output)]
    assert main([*command, *map(str, arguments)]) == 0
    return json.loads(output.read_text(encoding="utf-8"))


def test_evaluate_names_the_mapping_and_the_positives(rad, converted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scoring, "_scores", given_scores)
    results = results_of(tmp_path / "scores.json", "--data", rad, "--model", converted)
    printed = capsys.readouterr().out
    assert "16 labels by radfinder-standard" in printed
    auroc = BY_HAND["radfinder-standard", MERGED]
    assert f"| {MERGED} | {auroc:.3f}, 3 |" in printed, "too few patients for an interval"
    assert "left out: 6 of train, 2 of tune. For a test set that the model has never seen, pass --split all" in printed
    (source,) = results["sources"]
    assert source["mapping"]["labels"][MERGED] == ["calcification"]
    assert source["scores"][f"auroc/{MERGED}"]["value"] == pytest.approx(auroc)
    assert (source["scans"], source["patients"], source["present"]["Medical material"]) == (6, 5, 1)


def test_several_sources_each_with_its_own_names(rad, converted, tmp_path, capsys):
    """Findings that a source cannot tell have no figure there, and do not stand in the way of the others."""
    site = tmp_path / "b.csv"
    site.write_text("label,data\nEmphysema,Emphysema\nLung nodule,Lung opacity\n", encoding="utf-8")
    data = ["--data", "phantoms:A", "phantoms:B", rad, "--limit", "12", "--split", "all", "--model", converted]
    results = results_of(tmp_path / "scores.json", *data, "--mapping", f"phantoms:B={site}", "rad=hlip")
    a, b, c = results["sources"]
    assert a["mapping"] is None and (b["mapping"]["name"], c["mapping"]["name"]) == ("b", "hlip")
    assert b["scores"]["auroc/Atelectasis"]["value"] is None and b["present"]["Atelectasis"] == 0
    assert MERGED in c["present"] and "Arterial wall calcification" not in c["present"]
    table = {line.split("|")[1].strip(): line for line in results["table"].splitlines() if line.startswith("|")}
    assert table[MERGED].count("\N{EN DASH}") == 2
    assert c["description"].startswith("12 studies of train, tune, valid of") and c["scans"] == 12
    assert c["description"].endswith(", labels by hlip")
    repeated = ["evaluate", "--repeat", str(tmp_path / "scores.json"), "--num_workers", "0", "--cpu"]
    capsys.readouterr()
    assert main(repeated) == 0
    assert ", 0 are not" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*repeated, "--mapping", "nowhere=hlip"])
    assert "there is no source 'nowhere'. Pass one of phantoms:A, phantoms:B, rad" in capsys.readouterr().err
