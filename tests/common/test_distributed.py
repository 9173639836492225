"""What the processes of a launch must agree on. `tests/training` lets two processes work together."""

import re
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import DTensor

from medct.common import distributed
from medct.common.distributed import LaunchError, be_patient, local_part, refuse_different, refuse_unshared, shard


def as_seen_by(monkeypatch, *others):
    """Let this process be the first of several; the others answer as they are told to."""
    answers = iter(others)
    world = SimpleNamespace(get_rank=lambda: 0)
    monkeypatch.setattr(distributed, "_is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "dist", world)
    monkeypatch.setattr(distributed, "of_all", lambda value: [value, *next(answers)])


@pytest.mark.parametrize(
    "other, said",
    [
        ({"seed": 5, "recipe": "vision"}, "Process 3 of 3 has seed 5, but the first one has 0. Start all with the"),
        ({"seed": 0}, "Process 3 of 3 has recipe None, but the first one has 'vision'."),
        ({"seed": 0, "recipe": "vision", "fold": 1}, "Process 3 of 3 has fold 1, but the first one has None."),
    ],
)
def test_processes_that_were_started_differently_are_refused(monkeypatch, other, said):
    first = {"seed": 0, "recipe": "vision"}
    as_seen_by(monkeypatch, [first, other])
    with pytest.raises(LaunchError, match=re.escape(said)):
        refuse_different(first)


def test_processes_that_agree_pass(monkeypatch, tmp_path):
    as_seen_by(monkeypatch, [{"sizes": [1, 2]}], [""], [True])
    refuse_different({"sizes": (1, 2)})
    refuse_unshared(tmp_path, "run")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_another_one_elsewhere_is_refused(monkeypatch, tmp_path):
    as_seen_by(monkeypatch, ["", ""], [True, False])
    with pytest.raises(LaunchError, match="run: process 3 of 3 does not see what the first one writes there"):
        refuse_unshared(tmp_path, "run")
    assert not list(tmp_path.iterdir())


def test_another_process_looks_for_what_the_first_one_wrote(monkeypatch, tmp_path):
    asked = []

    def of_all(value):
        asked.append(value)
        return ["elsewhere/mark", ""] if len(asked) == 1 else [True, value]

    monkeypatch.setattr(distributed, "_is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "dist", SimpleNamespace(get_rank=lambda: 1))
    monkeypatch.setattr(distributed, "of_all", of_all)
    with pytest.raises(LaunchError):
        refuse_unshared(tmp_path, "run")
    (tmp_path / "mark").touch()
    asked.clear()
    refuse_unshared(tmp_path, "run")


def _in_a_group(_rank, folder, check, *args):
    torch.set_num_threads(1)
    where = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", where, timedelta(seconds=9), rank=0, world_size=1)
    check(*args)
    torch.distributed.destroy_process_group()


def in_a_group(folder, check, *args):
    """Run a check in a group of one process, which is another than the tests' own: groups leave garbage behind.

    A loader process that is forked afterwards takes it away, and waits for threads that it does not have.
    """
    torch.multiprocessing.start_processes(_in_a_group, (folder, check, *args), start_method="fork")


def test_patience_holds_for_a_group_that_has_met(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "_is_distributed", lambda: True)

    def check():
        be_patient(timedelta(seconds=77))
        options = torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options
        assert options._timeout == timedelta(seconds=77)

    in_a_group(tmp_path, check)


@torch.no_grad()
def _scores_with_its_shards(model):
    shard(model)
    volumes = torch.rand(1, 1, *model.config.vision_config.image_size)
    before = model.get_image_features(volumes).pooler_output.clone()
    weights = dict(model.named_parameters())
    assert all(isinstance(each, DTensor) for each in weights.values())
    local_part(weights["visual_projection.weight"]).neg_()
    torch.testing.assert_close(model.get_image_features(volumes).pooler_output, -before)


def test_a_sharded_model_is_sharded_after_it_has_scored(tmp_path, model):
    """Also its outermost part: else what is set in its shards afterwards would not be seen."""
    in_a_group(tmp_path, _scores_with_its_shards, model)
