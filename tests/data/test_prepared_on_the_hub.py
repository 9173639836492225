"""Prepared shards on the Hub: private only, and streamed back whole through whatever the network does."""

import pytest
import torch
from huggingface_hub import HfFileSystem

from medct import MedCTConfig, MedCTImageProcessor
from medct.data import StudyLoader, open_source, phantom_source, prepare
from medct.data.prepared import prepared_source
from medct.data.sources import DataError
from medct.data.tables import Selection
from medct.publishing.push import PushError, push_shards
from medct.workers_medct import Place


@pytest.fixture(scope="module")
def config() -> MedCTConfig:
    """The published model on a coarse grid of three different lengths."""
    vision = {"image_size": [16, 24, 20], "patch_size": [4, 4, 4], "target_spacing_mm": (20.0, 15.0, 20.0)}
    return MedCTConfig(vision_config=vision)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, config):
    """Seven and two phantoms in four files."""
    folder = tmp_path_factory.mktemp("prepared")
    sources = {"train": phantom_source("A", range(7), seed=0), "valid": phantom_source("A", range(7, 9), seed=0)}
    prepare.prepare(sources, config, folder, {"reconstructions": "one", "studies_per_shard": 3})
    return folder


def opened(row) -> torch.Tensor:
    return row["volume"].load(Place())


LOAD_FROM_THE_HUB = """
import numpy as np
from datasets import load_dataset
for row in load_dataset("org/scans", split="valid", streaming=True):
    print(row["id"], np.asanyarray(row["volume"].dataobj).astype(int).sum())
"""


def test_a_private_dataset_on_the_hub_streams_back(hub, folder, config, tmp_path, monkeypatch):
    hub.connect(monkeypatch)
    assert push_shards(folder, "org/scans") == "hf://datasets/org/scans"
    assert hub.repo("dataset", "org/scans").private
    files = hub.files("org/scans", "dataset")
    assert {name for name in files if not name.startswith((".", "data/"))} == {"README.md", "manifest.json"}
    assert len([name for name in files if name.startswith("data/")]) == 4
    rows = prepared_source(str(folder), Selection("valid"), config).stream(epoch=0, seed=0)
    sums = [f"{row['id']} {int(opened(row).long().sum())}" for row in rows]
    HfFileSystem.clear_instance_cache()
    rows = open_source("hf://datasets/org/scans", "valid", config, revision="main").stream(epoch=0, seed=0)
    assert [f"{row['id']} {int(opened(row).long().sum())}" for row in rows] == sums
    bare = hub.run(LOAD_FROM_THE_HUB, home=tmp_path, medct=False)
    assert sorted(bare.stdout.splitlines()) == sorted(sums), bare.stderr


def test_shards_are_sent_although_the_network_fails_or_it_is_said_what_to_do(hub, folder, monkeypatch):
    hub.connect(monkeypatch)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.cut_answer("POST /api/repos/create")
    push_shards(folder, "org/scans")
    assert "manifest.json" in hub.files("org/scans", "dataset")
    hub.cut_answer("POST /api/repos/create", times=1000)
    with pytest.raises(PushError, match=rf"Pushing to org/scans failed: .* {folder} is intact; the same command sends"):
        push_shards(folder, "org/scans")


@pytest.fixture
def on_the_hub(hub, folder, monkeypatch, tmp_path):
    """The shards as `hf://datasets/org/scans`, and waits that take no time."""
    hub.connect(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    push_shards(folder, "org/scans")
    HfFileSystem.clear_instance_cache()
    return hub


def test_faults_while_shards_stream_are_overcome_up_to_a_limit(on_the_hub, config, processor, tmp_path):
    processor.image_processor = MedCTImageProcessor.from_config(config.vision_config)
    on_the_hub.fail("GET .*manifest.json", 503, times=2)
    on_the_hub.cut_answer("GET .*manifest.json", after_bytes=20)
    on_the_hub.fail("GET /api/.*/revision/", 500)
    source = open_source("hf://datasets/org/scans", "train", config)
    loader = StudyLoader(
        source, processor, config.label_names, batch_size=2, with_text=False, bad_samples_file=tmp_path / "bad.jsonl"
    )
    first = "GET .*train-00000-of-00003.parquet"
    for status in (429, 503):
        on_the_hub.fail(first, status)
    for request in (first, "GET .*train-00001-of-00003.parquet"):
        on_the_hub.cut_answer(request)
        on_the_hub.cut_answer(request, after_bytes=100)
    on_the_hub.fail("GET /api/.*/tree/.*/data", 500)  # which the client does not try again by itself
    everyone = [row["id"] for row in source.stream()]
    assert [name for batch in loader for name in batch["ids"]] == everyone
    assert loader.num_bad == 0
    assert not any(fault.times for fault in on_the_hub.faults)

    last = "GET .*train-00002-of-00003.parquet"
    on_the_hub.cut_answer(last, after_bytes=100, times=1000)
    before = on_the_hub.count(last)
    assert [name for batch in loader for name in batch["ids"]] == everyone[:6]
    assert loader.num_bad == 1
    assert "train-00002-of-00003.parquet, row 0: it cannot be read" in (tmp_path / "bad.jsonl").read_text(
        encoding="utf-8"
    )
    assert on_the_hub.count(last) - before == 3 * 6  # three attempts of six requests at its row, none at its volume


def test_shards_that_change_while_they_stream_stay_what_they_were(on_the_hub, config):
    rows = open_source("hf://datasets/org/scans", "train", config).stream()
    on_the_hub.add_file("dataset", "org/scans", "data/train-00000-of-00003.parquet", b"other")
    assert all(opened(row).any() for row in rows)


def test_a_hub_that_does_not_answer_is_said(on_the_hub, config):
    on_the_hub.fail(".*/api/datasets/.*", 503, times=1000)
    with pytest.raises(DataError, match=r"manifest.json cannot be read \(HfHubHTTPError\). Check the network, or pass"):
        open_source("hf://datasets/org/scans", "train", config)


def test_a_public_dataset_is_refused(hub, folder, monkeypatch):
    hub.create("dataset", "org/open")
    hub.connect(monkeypatch)
    with pytest.raises(PushError, match="org/open is public, but patients' scans must not be"):
        push_shards(folder, "org/open")
    assert not any(name.startswith("data/") for name in hub.files("org/open", "dataset"))
