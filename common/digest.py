"""A name for tensors, by their values."""

import hashlib
from collections.abc import Iterable

import torch

from medct.common.distributed import local_part


def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over the names, types and bytes of tensors; for sharded ones, over this process's part."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        total.update(f"{name} {tensor.dtype}\n".encode())
        total.update(local_part(tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
