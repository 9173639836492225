"""Shared by the tests of training: a run of seconds."""

import pytest
import torch

from medct.training.handing_out import draw_pictures
from medct.training.settings import TrainingSettings


@pytest.fixture
def small_run(converted, tmp_path) -> TrainingSettings:
    """A run of seconds on the small random model: 6 steps, and nothing chosen afterwards."""
    return TrainingSettings(
        model=str(converted),
        output_dir=str(tmp_path / "run"),
        rank=4,
        replay="none",
        keep="none",
        strength="1",
        eval_steps=0,
        batch_size=4,
        phantom_train_patients=24,
        phantom_tune_patients=12,
        phantom_eval_patients=20,
        bootstrap_resamples=20,
        num_workers=0,
        cpu=True,
    )


@pytest.fixture(autouse=True)
def _pictures_are_empty(monkeypatch):
    """Drawing takes half of a small run's time; `pictures_are_drawn` is for the tests that want it."""

    def touch(folder, *_):
        for name in ("roc.png", "calibration.png"):
            (folder / name).touch()

    monkeypatch.setattr("medct.train.draw_pictures", touch)


@pytest.fixture
def pictures_are_drawn(_pictures_are_empty, monkeypatch):
    monkeypatch.setattr("medct.train.draw_pictures", draw_pictures)


@pytest.fixture
def apples_draws(monkeypatch) -> torch.Generator:
    """The random numbers of an Apple GPU, as if there were one."""
    draws = torch.Generator().manual_seed(3)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("mps"))
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device="mps": draws.get_state())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state, device="mps": draws.set_state(state))
    return draws
