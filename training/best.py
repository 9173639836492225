"""The best weights of a run so far, and when to stop looking for better ones."""

from typing import Any

import torch

from medct.common.distributed import local_part


class BestSoFar:
    """Weights at the step that scored highest on the tuning patients.

    Args:
        parameters: Trainable ones by name.
        patience: Scores in a row without a better one that end the run.

    Attributes:
        step: Of the best score; `None` before the first.
        score: That score.
        misses: Scores since then.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], patience: int):
        self._parameters, self._patience = parameters, patience
        self._weights: dict[str, torch.Tensor] = {}
        self.step: int | None = None
        self.score = -1.0
        self.misses = 0

    @property
    def has_waited_enough(self) -> bool:
        return self.misses >= self._patience

    def note(self, step: int, score: float | None) -> None:
        """Keep the weights of a step if they are the best so far.

        Args:
            step: Optimizer steps done.
            score: On the tuning patients, higher is better; `None` if it is undefined, which changes nothing.
        """
        if score is None:
            return
        if score <= self.score:
            self.misses += 1
            return
        self.step, self.score, self.misses = step, score, 0
        self._weights = {name: local_part(each).detach().clone() for name, each in self._parameters.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights back; without any the last ones stay."""
        for name, weight in self._weights.items():
            local_part(self._parameters[name]).copy_(weight)

    def tensors(self) -> dict[str, torch.Tensor]:
        """This process's part of the weights."""
        return self._weights

    def values(self) -> dict[str, Any]:
        """The part of the state that is not tensors."""
        return {"step": self.step, "score": self.score, "misses": self.misses}

    def load(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Return to the state that `tensors` and `values` were taken from.

        Args:
            tensors: What `tensors()` gave.
            values: What `values()` gave.
        """
        self._weights = {name: tensor.to(local_part(self._parameters[name])) for name, tensor in tensors.items()}
        self.step, self.score, self.misses = values["step"], values["score"], values["misses"]
