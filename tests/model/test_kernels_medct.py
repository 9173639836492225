"""Kernels are compared with torch before their results are used."""

import warnings

import pytest
import torch

from medct import kernels_medct


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch):
    monkeypatch.setattr(kernels_medct, "_agreed", set())
    monkeypatch.setattr(kernels_medct, "use_triton", True)


def test_kernels_are_tried_once_for_each_case():
    tried = []

    def by_kernels():
        tried.append(1)
        return torch.ones(3) * (1 + 1e-3)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(kernels_medct.agree(("a", 3), by_kernels, lambda: torch.ones(3)) for _ in range(3))
        assert kernels_medct.agree(("a", 4), by_kernels, lambda: torch.ones(3))
    assert len(tried) == 2


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.tensor([1.0, 1.0, 1.2]), torch.tensor([1, torch.nan, 1])])
def test_kernels_that_are_wrong_are_left_out_and_said(wrong):
    with pytest.warns(RuntimeWarning, match=r"kernels are off by .*% on this card \(a\), so torch computes in their"):
        assert not kernels_medct.agree(("a",), lambda: wrong, lambda: torch.ones(3))
    assert not kernels_medct.use_triton


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_results_without_a_length_say_nothing_about_kernels(value):
    same = torch.full((3,), value)
    assert kernels_medct.agree(("a",), lambda: same, lambda: same)


def test_no_room_for_a_comparison_ends_no_run():
    def full():
        raise torch.OutOfMemoryError

    assert kernels_medct.agree(("a",), lambda: torch.ones(3), full)
    with pytest.warns(RuntimeWarning, match="kernels are off"):
        assert not kernels_medct.agree(("a",), lambda: torch.ones(3), lambda: torch.zeros(3) + 2)


def test_no_kernel_has_a_part_in_what_they_are_compared_with(monkeypatch):
    monkeypatch.setattr(kernels_medct, "interprets_triton", True)
    rows = torch.ones(1)
    seen = []

    def looked(name):
        seen.append((name, kernels_medct.fused(rows)))
        return rows

    kernels_medct.agree(("a",), lambda: looked("kernels"), lambda: looked("plain"))
    assert [*seen, ("later", kernels_medct.fused(rows))] == [("kernels", True), ("plain", False), ("later", True)]
    with pytest.raises(ZeroDivisionError):
        kernels_medct.agree(("b",), lambda: rows, lambda: 1 / 0)
    assert kernels_medct.fused(rows), "a failure leaves kernels as they were"
