"""The state of modules, remembered by value, to know whether results that were derived from it are still valid.

By value, because nothing else tells: an adapter may be switched, swapped or scaled under the same name, and weights may
be trained or written through `.data`, without any notice.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

_PLAIN_TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)
_PLAIN_VALUES = (str, int, float, bool, type(None))


class Snapshot:
    """Copies of tensors, and settings as text.

    Args:
        tensors: By any names; they are copied.
        settings: What else matters, as text.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], settings: str = ""):
        self._settings = settings
        with torch.inference_mode(False):
            self._tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def equals(self, tensors: Mapping[str, torch.Tensor], settings: str = "") -> bool:
        """Whether the current state is the same, by value, on the same devices and in the same precision.

        Args:
            tensors: The current tensors, by the same names.
            settings: The current settings, as text.
        """
        if settings != self._settings or tensors.keys() != self._tensors.keys():
            return False
        return all(_same(kept, tensors[name]) for name, kept in self._tensors.items())

    def equals_rounded(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether the current tensors are the same, or what one cast to a lower precision, and back, has made of them.

        Args:
            tensors: The current tensors, by the same names, on the same devices.
        """
        if tensors.keys() != self._tensors.keys():
            return False
        return all(_is_rounded(kept, tensors[name]) for name, kept in self._tensors.items())


def _is_rounded(kept: torch.Tensor, now: torch.Tensor) -> bool:
    return any(torch.equal(kept.to(dtype).to(now.dtype), now) for dtype in (kept.dtype, torch.bfloat16, torch.float16))


def _same(kept: torch.Tensor, now: torch.Tensor) -> bool:
    return kept.device == now.device and kept.dtype == now.dtype and torch.equal(kept, now)


def state_of(modules: Iterable[nn.Module]) -> tuple[dict[str, torch.Tensor], str] | None:
    """All that the results of modules depend on: their tensors, and the plain values among their attributes.

    The latter hold which adapters are in use, and with which weight.

    Returns:
        Arguments of `Snapshot`; `None` if there are tensors that cannot be compared: offloaded, quantized or sharded.
    """
    tensors, settings = {}, []
    for number, module in enumerate(modules):
        for name, child in module.named_modules(prefix=str(number)):
            # A copy first: another thread may be setting attributes.
            values = {key: value for key, value in dict(vars(child)).items() if _is_plain(value)}
            settings.append(f"{name} {type(child).__name__} {values}")
        tensors.update(module.named_parameters(prefix=str(number)))
        tensors.update(module.named_buffers(prefix=str(number)))
    if any(type(tensor) not in _PLAIN_TENSORS or tensor.is_meta for tensor in tensors.values()):
        return None
    return tensors, "\n".join(settings)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return _is_plain([*value.keys(), *value.values()])
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN_VALUES)


__all__ = ["Snapshot", "state_of"]
