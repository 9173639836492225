"""Phantoms have an address, so that every command can be tried without data."""

import pytest

from medct import MedCTConfig
from medct.cli import main
from medct.data import PHANTOMS, DataError, open_source
from medct.data.prepared import read_manifest
from medct.train import load_sources
from medct.training.settings import TrainingSettings

CONFIG = MedCTConfig()
SPLITS = ("train", "tune", "valid")


def test_phantoms_are_those_of_a_default_run():
    trained_on = load_sources(TrainingSettings(replay="none"), CONFIG)
    for split in SPLITS:
        source = open_source(PHANTOMS, split, CONFIG)
        assert (source.groups, source.read) == (trained_on[split].groups, trained_on[split].read)
        assert source.description == f"{source.num_studies} SYNTHETIC phantoms of site B"
    few = [open_source(PHANTOMS, "train", CONFIG, limit=limit).groups for limit in (3, 5)]
    assert set(few[0]) < set(few[1]) and len(few[1]) == 5


def test_limits_hold_for_phantoms():
    sources = load_sources(TrainingSettings(max_tune_studies=5, max_eval_studies=7), CONFIG)
    assert [sources[split].num_studies for split in ("tune", "valid")] == [5, 7]
    assert set(sources["tune"].groups) < set(open_source(PHANTOMS, "tune", CONFIG).groups)


def test_phantoms_have_the_labels_that_they_are_drawn_with():
    with pytest.raises(DataError, match=r"site B: it has no label 'nodule', but Medical material, .* --mapping"):
        open_source(PHANTOMS, "train", MedCTConfig(id2label={0: "nodule"}, label2id={"nodule": 0}))
    few = MedCTConfig(id2label={0: "Consolidation", 1: "Emphysema"})
    whole, part = (next(iter(open_source(PHANTOMS, "tune", config).stream())) for config in (CONFIG, few))
    assert part["labels"] == [whole["labels"][CONFIG.label_names.index(name)] for name in few.label_names]


def test_commands_are_tried_without_data(converted, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    main(["overview", PHANTOMS, "--model", str(converted), "--limit", "3", "--samples", "2", "--sheet", str(sheet)])
    assert "9 SYNTHETIC studies of train, tune, valid of phantoms" in capsys.readouterr().out
    assert sheet.is_file()
    main(["prepare", PHANTOMS, str(tmp_path / "shards"), "--model", str(converted), "--limit", "2"])
    splits = read_manifest(str(tmp_path / "shards"))["splits"]
    assert {split: found["num_studies"] for split, found in splits.items()} == dict.fromkeys(SPLITS, 2)
    assert all("SYNTHETIC" in found["description"] for found in splits.values())
