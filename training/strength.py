"""How much of what was learned is handed out: the strength of an adapter, chosen on tuning patients.

The trained parameters lie on a line from where they began, at strength 0, which is the base, to where training took
them, at strength 1. Of a LoRA pair only B moves, so the update grows in proportion. What is chosen is written into the
parameters themselves, so that every loader has it without knowing.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from medct.evaluation.scoring import ScoredStudies
from medct.training.results import Scored, in_common, mean_auroc

GRID = (1.0, 0.875, 0.75, 0.625, 0.5, 0.25, 0.0)


@dataclass(frozen=True)
class Trial:
    """How a strength did on the tuning patients.

    Args:
        strength: In [0, 1].
        gained: Mean AUROC above the base's, on the new site.
        forgotten: Mean AUROC below the base's, on what is to be kept; `None` if nothing is.
    """

    strength: float
    gained: float
    forgotten: float | None = None


def choose(trials: Sequence[Trial], max_forgotten: float) -> float:
    """The strength that gains most among those that forget little enough; of equals the smallest.

    Args:
        trials: One at strength 0, which forgets nothing, among them.
        max_forgotten: Most that may be forgotten.
    """
    allowed = [trial for trial in trials if trial.forgotten is None or trial.forgotten <= max_forgotten]
    return max(allowed, key=lambda trial: (trial.gained, -trial.strength)).strength


@dataclass(frozen=True)
class Choice:
    """A strength, and what it was chosen by.

    Args:
        strength: In [0, 1].
        trials: Of all strengths; none if nothing was to be chosen.
        scored: Tuning studies at that strength, by split.
    """

    strength: float
    trials: Sequence[Trial] = ()
    scored: Scored = field(default_factory=dict)


class Line:
    """Parameters between where they begin and where training takes them.

    Args:
        parameters: Trainable ones by name, before the first step.
        moves_both: Whether both matrices of a LoRA pair begin as something, as those of "pissa" do.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], moves_both: bool = False):
        moving = {name: each for name, each in parameters.items() if moves_both or "lora_A" not in name}
        self._parameters = moving
        self._start = {name: parameter.detach().clone() for name, parameter in moving.items()}
        self._end: dict[str, torch.Tensor] | None = None

    @torch.no_grad()
    def go_to(self, strength: float) -> None:
        """Set the parameters; the first call takes those that it finds as the end of the line."""
        if self._end is None:
            self._end = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            start, end = self._start[name], self._end[name]
            # At the ends exactly what was there.
            parameter.copy_(end if strength == 1 else start if strength == 0 else start + strength * (end - start))


def choose_strength(
    line: Line,
    score: Callable[[str, Sequence[Callable[[], None]]], list[ScoredStudies]],
    before: Scored,
    max_forgotten: float,
) -> Choice:
    """Try every strength of `GRID` on the tuning studies, and go to the best.

    Args:
        line: Of the trained parameters.
        score: Scores the studies of a split with several versions of the model.
        before: What the base scored, on "tune" and, where something is to be kept, "keep_tune".
        max_forgotten: Most that the mean AUROC on "keep_tune" may fall.

    Returns:
        Strength 1 without trials if no label varies among the tuning studies that both models have scored.
    """
    trained = GRID[:-1]
    scored = {}
    for split in ("tune", "keep_tune"):
        if split in before:
            versions = [functools.partial(line.go_to, strength) for strength in trained]
            # One pass scores all of them, so they share their studies.
            found = [in_common(before, {split: each}) for each in score(split, versions)]
            scored[split] = dict(zip(trained, [after[split] for _, after in found], strict=True))
            scored[split][0.0] = found[0][0][split]
    aurocs = {
        split: {strength: mean_auroc(each) for strength, each in by_strength.items()}
        for split, by_strength in scored.items()
    }
    trials, strength = [], 1.0
    if aurocs["tune"][0.0] is not None:  # in spite of studies that a pass has lost
        trials = [_trial(each, aurocs) for each in GRID]
        strength = choose(trials, max_forgotten)
    line.go_to(strength)
    return Choice(strength, trials, {split: by_strength[strength] for split, by_strength in scored.items()})


def _trial(strength: float, aurocs: dict[str, dict[float, Any]]) -> Trial:
    """From mean AUROCs by split and strength; at strength 0 they are the base's."""
    tune, kept = aurocs["tune"], aurocs.get("keep_tune")
    # What cannot be scored cannot be held against a strength.
    forgotten = None if kept is None or kept[0.0] is None else kept[0.0] - kept[strength]
    return Trial(strength, tune[strength] - tune[0.0], forgotten)
