"""Whether what was derived of modules still holds: every way in which they can have changed is told."""

import pytest
import torch
from torch import nn

from medct.snapshots_medct import Snapshot, state_of

CHANGES = {
    "a weight": lambda module: module[0].weight.data.add_(1),
    "a buffer": lambda module: module[1].running_mean.add_(1),
    "precision": lambda module: module[0].double(),
    "one tensor more": lambda module: module.register_buffer("more", torch.zeros(1)),
    "one tensor less": lambda module: delattr(module[1], "running_mean"),
    "another module": lambda module: module.__setitem__(2, nn.Tanh()),
    "training": lambda module: module.eval(),
    "a number": lambda module: setattr(module[0], "scale", 0.5),
    "a dictionary": lambda module: module[0].scaling.update(a=0.5),
    "a list": lambda module: module[0].active.append("b"),
    "a set": lambda module: module[0].merged.add("a"),
}


def module_with_an_adapter() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU())
    module[0].scaling, module[0].active, module[0].merged, module[0].scale = {"a": 1.0}, ["a"], set(), 1.0
    return module


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_told(change):
    module = module_with_an_adapter()
    snapshot = Snapshot(*state_of([module]))
    assert snapshot.equals(*state_of([module]))
    CHANGES[change](module)
    assert not snapshot.equals(*state_of([module]))


def test_what_cannot_be_compared_is_not():
    assert state_of([nn.Linear(2, 2, device="meta")]) is None


@pytest.mark.parametrize("change", ["bfloat16", "half", "double"])
def test_a_cast_is_told_from_other_weights(change):
    module = module_with_an_adapter()
    snapshot = Snapshot(state_of([module])[0])
    for cast in (getattr(module, change), module.float):
        cast()
        assert snapshot.equals_rounded(dict(state_of([module])[0]))
    weight = module[0].weight.data
    weight[0, 0] = weight[0, 0].nextafter(torch.tensor(9.0))
    assert not snapshot.equals_rounded(dict(state_of([module])[0]))
    assert not snapshot.equals_rounded({})
