"""What made the rows of a file: not the name of a model, under which another may lie by now, but its weights."""

from collections.abc import Iterator

import torch

from medct.common.digest import digest

KEY = "weights"
"""Under which a file's settings hold them."""
PREPROCESSING = "preprocessing"
"""Under which they hold what the voxels meant to these weights."""
NAMES = ("model", "revision", "adapter", "adapter_revision", "dtype")
"""Settings that say where weights came from. Of the same weights they may differ: a folder may have been moved."""


def weights_of(model: torch.nn.Module) -> str | None:
    """A name for all weights of a model and its adapters, and for the scales of these.

    Args:
        model: With or without adapters.

    Returns:
        "sha256:" and 64 hexadecimal digits; `None` where the weights are not plain tensors here: offloaded, quantized.
    """
    tensors = dict(_tensors_of(model))
    if any(type(each) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) for each in tensors.values()):
        return None
    return None if any(each.is_meta for each in tensors.values()) else f"sha256:{digest(tensors.items())}"


def _tensors_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
    for name, module in model.named_modules():
        scales = getattr(module, "scaling", None)
        if isinstance(scales, dict):  # of a layer of PEFT, by the adapter's name
            yield from ((f"{name} {adapter}", torch.tensor(float(scale))) for adapter, scale in scales.items())
