"""How much of what was learned is handed out: the strength of an adapter, chosen on tuning patients.

The trained parameters lie on a line from where they began, at strength 0, which is the base, to where training took
them, at strength 1. Of a LoRA pair only B moves, so the update grows in proportion. What is chosen is written into the
parameters themselves, so that every loader has it without knowing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

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


def trial_of(strength: float, aurocs: Mapping[str, Mapping[float, float | None]]) -> Trial:
    """A trial from mean AUROCs by split and strength; at strength 0 they are the base's."""
    tune, kept = aurocs["tune"], aurocs.get("keep_tune")
    # What cannot be scored cannot be held against a strength.
    forgotten = None if kept is None or kept[0.0] is None else kept[0.0] - kept[strength]  # type: ignore[operator]
    return Trial(strength, tune[strength] - tune[0.0], forgotten)  # type: ignore[operator]


def choose(trials: Sequence[Trial], max_forgotten: float) -> float:
    """The strength that gains most among those that forget little enough; of equals the smallest.

    Args:
        trials: One at strength 0, which forgets nothing, among them.
        max_forgotten: Most that may be forgotten.
    """
    allowed = [trial for trial in trials if trial.forgotten is None or trial.forgotten <= max_forgotten]
    return max(allowed, key=lambda trial: (trial.gained, -trial.strength)).strength


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
