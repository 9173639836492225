"""Settings that make no sense are refused by name, before anything is loaded."""

import dataclasses
import math

import pytest

from medct.training.settings import TrainingError, TrainingSettings, check


@pytest.mark.parametrize(
    "name", ["rank", "batch_size", "accumulation_steps", "epochs", "checkpoint_steps", "keep_checkpoints"]
)
def test_numbers_that_must_be_1_or_more(name):
    check(dataclasses.replace(TrainingSettings(), **{name: 1}))
    with pytest.raises(TrainingError, match=f"--{name} is 0. Pass 1 or more"):
        check(dataclasses.replace(TrainingSettings(), **{name: 0}))


def test_what_may_differ_when_a_run_is_resumed():
    fixed = TrainingSettings().fixed()
    free = {field.name for field in dataclasses.fields(TrainingSettings)} - fixed.keys()
    assert {name for name in free if not name.startswith(("hub_", "push_"))} == {
        *("output_dir", "resume", "checkpoint_steps", "keep_checkpoints", "report_to", "num_workers", "quiet")
    }


def test_phantoms_are_drawn_with_the_runs_seed():
    assert dataclasses.replace(TrainingSettings(), seed=7).phantoms.seed == 7


@pytest.mark.parametrize("rate", [-1.0, 0.0, math.nan, math.inf])
def test_learning_rates_that_make_no_sense(rate):
    with pytest.raises(TrainingError, match=r"--learning_rate is .*Pass a number above 0"):
        check(dataclasses.replace(TrainingSettings(), learning_rate=rate))
