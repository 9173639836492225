"""A digest names tensors by all that they are."""

import torch

from medct.common.digest import digest


def test_names_types_and_bytes_count():
    tensors = {"a": torch.zeros(4), "b": torch.ones(2)}
    others = (
        {"c" if name == "b" else name: tensor for name, tensor in tensors.items()},
        tensors | {"a": torch.zeros(4, dtype=torch.int32)},  # the same bytes
        tensors | {"a": -torch.zeros(4)},
    )
    digests = [digest(each.items()) for each in (tensors, *others)]
    assert len(set(digests)) == len(digests)
    assert digest(reversed(list(tensors.items()))) == digests[0]
