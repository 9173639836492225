"""Which checkpoint a run goes on from, and which it does not."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from medct.training.best import BestSoFar
from medct.training.checkpoints import Checkpoints, TrainingState

MAPS = Path("/proc/self/maps")


@dataclasses.dataclass
class Processes:
    """As much of an `Accelerator` as checkpoints use."""

    num_processes: int = 1
    process_index: int = 0
    is_main_process: bool = True
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    def wait_for_everyone(self):
        pass


class Nothing:
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state == {}


def state_of(step=0, value=0.0) -> TrainingState:
    parameter = torch.nn.Parameter(torch.full((3,), float(value)))
    parameters = {"a": parameter}
    best = BestSoFar(parameters, patience=1)
    return TrainingState(parameters, torch.optim.AdamW([parameter]), Nothing(), Nothing(), best, step)


def of(folder, keep=3):
    return Checkpoints(folder, keep, Processes())


def test_a_run_goes_on_from_the_newest(tmp_path):
    checkpoints = of(tmp_path)
    for step in (2, 9, 10):
        assert checkpoints.save(state_of(step, value=step))
    (tmp_path / ".step-00000011.partial").mkdir()
    state = state_of()
    assert checkpoints.load(state)
    assert state.step == 10
    assert state.parameters["a"].tolist() == [10, 10, 10]


def test_the_best_weights_so_far_are_gone_on_with(tmp_path):
    saved = state_of(step=2, value=1)
    saved.best.note(1, 0.8)
    saved.parameters["a"].data.fill_(2)
    saved.best.note(2, 0.7)
    of(tmp_path).save(saved)
    state = state_of()
    assert of(tmp_path).load(state)
    assert (state.best.step, state.best.score, state.best.misses) == (1, 0.8, 1)
    state.best.restore()
    assert state.parameters["a"].tolist() == [1, 1, 1]


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_ones_and_nothing_else(tmp_path, monkeypatch):
    checkpoints = of(tmp_path)
    checkpoints.save(state_of(1))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_write_part", full)
    with pytest.warns(UserWarning, match="step-00000002: no checkpoint was written .*No space left"):
        assert not checkpoints.save(state_of(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_the_newest_are_kept(tmp_path):
    checkpoints = of(tmp_path, keep=2)
    for step in (1, 2, 10, 100):
        checkpoints.save(state_of(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


@pytest.mark.skipif(not MAPS.exists(), reason="the system does not say which files are mapped")
def test_nothing_that_is_gone_on_with_stays_mapped(tmp_path):
    """Windows removes no file that is mapped, and NFS not its folder: the run would end when it drops a checkpoint."""
    saved = state_of(step=1, value=1)
    saved.best.note(1, 0.5)
    saved.parameters["a"].sum().backward()
    saved.optimizer.step()
    of(tmp_path).save(saved)
    state = state_of()
    of(tmp_path).load(state)
    assert state.optimizer.state_dict()["state"]
    assert str(tmp_path) not in MAPS.read_text()


def test_there_may_be_none(tmp_path):
    assert not of(tmp_path / "nothing").load(state_of())


def test_every_source_of_random_numbers_goes_on_where_it_was(tmp_path, apples_draws):
    draws = (
        random.random,
        np.random.random,
        lambda: torch.rand(()).item(),
        lambda: torch.rand((), generator=apples_draws).item(),
    )
    of(tmp_path).save(state_of(1))
    expected = [draw() for draw in draws]
    of(tmp_path).load(state_of())
    assert [draw() for draw in draws] == expected
