"""The strength of an adapter: what is chosen, and that it is in the weights."""

import copy

import numpy as np
import pytest
import torch
from peft import PeftModel

from medct import MedCTModel
from medct.evaluation.scoring import ScoredStudies
from medct.training.lora import VARIANTS, add_lora, core, note_start, save_weights, trainable, weights_to_save
from medct.training.strength import GRID, Line, Trial, choose, choose_strength


@pytest.mark.parametrize(
    "trials, chosen",
    [
        ([(1, 0.15, 0.02), (0.75, 0.14, 0.008), (0.5, 0.12, 0.002), (0, 0, 0)], 0.75),
        ([(1, 0.15, None), (0.75, 0.16, None), (0.5, 0.12, None), (0, 0, None)], 0.75),  # nothing to keep
        ([(1, -0.02, 0.03), (0.5, -0.01, 0.005), (0, 0, 0)], 0),  # no help
        ([(1, 0.15, 0.09), (0.5, 0.1, 0.02), (0, 0, 0)], 0),  # no help that is allowed
        ([(1, 0.1, 0.01), (0.5, 0.1, 0.0), (0, 0, 0)], 0.5),  # of equals the smallest
        ([(1, 0.1, 0.01), (0.5, 0.09, 0.0), (0, 0, 0)], 1),  # the limit itself is allowed
        ([(1, 0.1, -0.01), (0.5, 0.09, 0.0), (0, 0, 0)], 1),  # better than the base on both
    ],
)
def test_the_best_that_forgets_little_enough_is_chosen(trials, chosen):
    assert choose([Trial(*trial) for trial in trials], max_forgotten=0.01) == chosen


def test_what_is_gained_and_forgotten_is_against_the_base(monkeypatch):
    """A strength is taken that gains on the new site and loses little of the old one."""
    monkeypatch.setattr("medct.training.strength.mean_auroc", lambda scored: scored)
    monkeypatch.setattr("medct.training.strength.in_common", lambda before, after: (before, after))
    parameter = torch.nn.Parameter(torch.zeros(1))
    line = Line({"a": parameter})
    parameter.data.fill_(8)
    aurocs = {"tune": lambda at: 0.6 + 0.2 * at, "keep_tune": lambda at: 0.9 - 0.1 * at}
    before = {split: of(0.0) for split, of in aurocs.items()}

    def score(split, versions):
        for version in versions:
            version()
            yield aurocs[split](parameter.item() / 8)

    choice = choose_strength(line, lambda *asked: list(score(*asked)), before, max_forgotten=0.06)
    assert choice.strength == 0.5 and parameter.item() == 4
    for trial in choice.trials:
        assert (trial.gained, trial.forgotten) == pytest.approx((0.2 * trial.strength, 0.1 * trial.strength))


def test_nothing_is_gained_by_a_study_that_one_pass_could_not_read():
    labels = np.array([[1.0], [0.0], [1.0], [0.0]])
    scores = np.array([[0.9], [0.1], [0.2], [0.4]])
    base = ScoredStudies(list("abcd"), list("abcd"), scores, labels, names=["nodule"])
    choice = choose_strength(Line({}), lambda _, versions: [base.take([1, 0, 3])] * len(versions), {"tune": base}, 0.01)
    assert {trial.gained for trial in choice.trials} == {0}


def test_without_a_label_that_varies_among_what_both_have_scored_all_is_handed_out():
    """As where none varies among the tuning studies at all; the run has been trained, and is not lost."""
    labels = np.array([[1.0], [0.0], [0.0]])
    base = ScoredStudies(list("abc"), list("abc"), labels / 2, labels, names=["nodule"])
    line = Line({"a": (parameter := torch.nn.Parameter(torch.zeros(1)))})
    parameter.data.fill_(8)

    def score(_, versions):
        for become in versions:
            become()
        return [base.take([1, 2])] * len(versions)

    choice = choose_strength(line, score, {"tune": base}, 0.01)
    assert (choice.strength, choice.trials, parameter.item()) == (1, [], 8)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_every_loader_has_the_strength_without_knowing(variant, converted, batch, tmp_path):
    """From the base at 0 to what was trained at 1; what lies between is saved, and loaded by PEFT."""
    base = MedCTModel.from_pretrained(converted).eval()
    with torch.no_grad():
        at_base = base(**batch).logits_per_image
    model = add_lora(copy.deepcopy(base), variant=variant, targets="vision-all", rank=2, train_logit_scale=False)
    note_start(model, tmp_path)
    line = Line(trainable(model), moves_both=variant == "pissa")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        logits = {"trained": core(model).eval()(**batch).logits_per_image}
        for strength in GRID:
            line.go_to(strength)
            logits[strength] = core(model)(**batch).logits_per_image
    assert torch.equal(logits[1.0], logits["trained"])
    torch.testing.assert_close(logits[0.0], at_base, atol=2e-5, rtol=0)
    assert not torch.allclose(logits[0.5], logits[1.0], atol=1e-3)
    line.go_to(0.5)
    save_weights(model, weights_to_save(model), tmp_path / "saved", tmp_path)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "saved").eval()(**batch).logits_per_image
    torch.testing.assert_close(loaded, logits[0.5], atol=2e-4 if variant == "pissa" else 0, rtol=0)


def test_half_a_lora_is_half_its_update(converted):
    model = add_lora(MedCTModel.from_pretrained(converted), targets="vision-all", rank=2)
    line = Line(trainable(model))
    layer = core(model).vision_model.embeddings.projection
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    whole = layer.get_delta_weight("default").detach()
    for strength in (0.5, 1.0, 0.25, 0.0):  # in any order, again and again
        line.go_to(strength)
        torch.testing.assert_close(layer.get_delta_weight("default"), strength * whole)
