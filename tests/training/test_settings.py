"""Settings that make no sense are refused by name, before anything is loaded."""

import dataclasses
import math

import pytest

from medct.data import PhantomCohort
from medct.training.settings import _BOUNDS, TrainingError, TrainingSettings, check


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


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "max_grad_norm": [-1.0, 0.0, math.nan, math.inf],
        "weight_decay": [-0.1, math.nan, math.inf],
        "dropout": [-0.1, 1.0, math.nan],
        "alpha": [0, -3],
        "report_weight": [-1.0, 2.0],
        "max_bad_share": [-1.0, 2.0],
        "max_steps": [0, -1],
        "num_workers": [-1],
        "max_tune_studies": [0],
        "phantom_tune_patients": [0],
        "seed": [-1, 2**32],
        "bootstrap_resamples": [1, 19],
    }.items(),
)
def test_numbers_that_no_run_could_be_meant_with(name, values):
    """A negative norm, for one, trained away from what was to be learned, without a word."""
    for value in values:
        with pytest.raises(TrainingError, match=f"--{name} is {value}. Pass "):
            check(dataclasses.replace(TrainingSettings(), **{name: value}))


@pytest.mark.parametrize(
    ("idle", "needed"),
    [
        ({"report_weight": 0.3}, {"objective": "both"}),
        ({"replay_share": 0.3}, {"replay": "ct-rate"}),
        ({"replay_mapping": "m"}, {"replay": "none"}),  # said out loud
        ({"keep_mapping": "m"}, {"keep": "ct-rate"}),
        ({"max_forgotten": 0.1}, {"data": "phantoms"}),  # which keep something by default
        ({"dropout": 0.1, "recipe": "full"}, {"adaptation": "lora"}),
        ({"train_logit_scale": True, "adaptation": "full"}, {"adaptation": None}),
        ({"rank": 8, "recipe": "full"}, {"adaptation": "lora"}),
        ({"alpha": 8, "adaptation": "full"}, {"adaptation": None}),
        ({"patience": 5, "eval_steps": 0}, {"eval_steps": 10}),
        ({"hub_model_id": "org/site-b", "model": "org/base"}, {"push_to_hub": True}),
        ({"hub_private": True}, {"push_to_hub": True, "hub_model_id": "org/site-b", "hub_base": "org/base"}),
    ],
)
def test_flags_that_would_do_nothing(idle, needed):
    """Such as a scale of logits that is not trained where all weights of the vision half are."""
    settings = TrainingSettings(data="site", **idle)
    with pytest.raises(TrainingError, match=f"--{next(iter(idle))} .* does nothing without .*leave it out"):
        check(settings)
    check(dataclasses.replace(settings, **needed))


def test_every_number_has_bounds():
    kinds = {int, float, int | None, float | None}
    numbers = {field.name for field in dataclasses.fields(TrainingSettings) if field.type in kinds}
    assert numbers - {name for _, _, names in _BOUNDS for name in names} == {"folds", "fold"}  # together, below


@pytest.mark.parametrize("name", ["sensitivity", "specificity"])
def test_shares_that_may_be_wanted(name):
    for share in (0.01, 1.0):
        check(dataclasses.replace(TrainingSettings(), **{name: share}))
    for share in (-0.1, 0.0, 1.01, math.nan):
        with pytest.raises(TrainingError, match=f"--{name} is .*Pass a share above 0, up to 1"):
            check(dataclasses.replace(TrainingSettings(), **{name: share}))


def test_of_another_site_there_are_always_plenty():
    own = TrainingSettings(phantom_train_patients=5, phantom_eval_patients=6, seed=7)
    other = own.other_phantoms
    assert (own.phantoms.train_patients, other.train_patients) == (5, PhantomCohort.train_patients)
    assert (other.eval_patients, other.seed) == (6, 7)
