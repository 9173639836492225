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


def test_evaluate_names_the_mapping_and_the_positives(rad, converted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scoring, "_scores", given_scores)
    output = tmp_path / "scores.json"
    command = ["evaluate", "--data", rad, "--model", str(converted), "--num_workers", "0", "--output", str(output)]
    assert main([*command, "--cpu"]) == 0
    printed = capsys.readouterr().out
    assert "16 labels by radfinder-standard" in printed
    assert f"{MERGED} (3 with it)" in printed and "Medical material (1 with it)" in printed
    results = json.loads(output.read_text(encoding="utf-8"))
    assert results["mapping"]["labels"][MERGED] == ["calcification"]
    assert results["scores"][f"auroc/{MERGED}"]["value"] == pytest.approx(BY_HAND["radfinder-standard", MERGED])
    assert (results["scans"], results["patients"]) == (6, 5)
