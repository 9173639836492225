"""Recorded launches, imitated on the CPU (see tests/helpers/recorded_launches.py); on a card: test_on_a_card.py."""

import copy
import gc
import warnings

import pytest
import torch
from recorded_launches import Graph, Streams, imitate
from torch import nn

from medct import graphs_medct, modeling_medct


class Product(nn.Linear):
    """What is recorded in these tests: a product, something in place, and indices."""

    def __init__(self):
        super().__init__(4, 3)
        self.runs = 0

    def run(self, rows):
        self.runs += 1
        made = rows @ self.weight.t()
        made.add_(self.bias)
        return made, made.argmax(dim=-1)

    @torch.no_grad()
    def __call__(self, rows):
        return graphs_medct.replayed(self, self.run, rows, self.parameters())


@pytest.fixture(autouse=True)
def imitated(monkeypatch):
    imitate(monkeypatch)
    monkeypatch.setattr(graphs_medct, "use_graphs", True)
    graphs_medct._recordings.clear()


@pytest.fixture
def product() -> Product:
    torch.manual_seed(0)
    return Product()


def assert_right(product, rows):
    expected = rows @ product.weight.detach().t() + product.bias.detach()
    made, indices = product(rows)
    torch.testing.assert_close(made, expected)
    assert torch.equal(indices, expected.argmax(dim=-1))
    return made


def test_the_third_call_launches_nothing_one_by_one(product):
    for _ in range(2):
        assert_right(product, torch.randn(2, 4))
    launched = product.runs
    results = [(rows, assert_right(product, rows)) for rows in torch.randn(3, 2, 4)]
    assert product.runs == launched
    for rows, made in results:  # no later replay has written to them
        torch.testing.assert_close(made, rows @ product.weight.detach().t() + product.bias.detach())


def test_weights_written_in_place_are_followed_and_others_recorded_anew(product):
    for _ in range(3):
        assert_right(product, torch.randn(2, 4))
    launched = product.runs
    with torch.no_grad():
        product.weight.mul_(-2)
    assert_right(product, torch.randn(2, 4))
    assert product.runs == launched
    product.weight.data = torch.randn(3, 4)
    for _ in range(3):
        assert_right(product, torch.randn(2, 4))
    assert product.runs > launched


def test_rows_of_another_shape_or_precision_are_recorded_anew(product):
    for rows in (torch.randn(2, 4), torch.randn(5, 4)):
        for _ in range(3):
            assert_right(product, rows)
    before = product.runs
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert_right(product, torch.randn(5, 4))
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert product.runs == before + 1


def test_weights_of_another_precision_in_the_same_memory_are_others():
    """Memory that is given back is handed out again."""
    rows, weight = torch.randn(2, 4), torch.randn(3, 4)
    assert graphs_medct._key(rows, [weight]) == graphs_medct._key(rows, [weight])
    assert graphs_medct._key(rows, [weight]) != graphs_medct._key(rows, [weight.view(torch.bfloat16)])


def test_each_owner_has_its_own_and_takes_it_along(product):
    other = copy.deepcopy(product)
    other.weight.data *= 3
    for _ in range(3):
        assert_right(product, torch.randn(2, 4))
        assert_right(other, torch.randn(2, 4))
    assert len(graphs_medct._recordings) == 2
    del other
    gc.collect()
    assert len(graphs_medct._recordings) == 1


def test_recorded_in_inference_mode_and_replayed_without(product):
    with torch.inference_mode():
        for _ in range(2):
            assert_right(product, torch.randn(2, 4))
    launched = product.runs
    made = assert_right(product, torch.randn(2, 4))
    assert product.runs == launched
    assert not made.is_inference()


def test_what_cannot_be_recorded_is_launched_and_said_once(product, monkeypatch):
    run = product.run

    def refused(rows):
        if Streams.current != "main":
            raise RuntimeError("operation not permitted when stream is capturing\nand much more")
        return run(rows)

    monkeypatch.setattr(product, "run", refused)
    assert_right(product, torch.randn(2, 4))
    with pytest.warns(RuntimeWarning, match=r"cannot be recorded \(RuntimeError: operation .* capturing\), so they"):
        assert_right(product, torch.randn(2, 4))
    assert not graphs_medct.use_graphs
    assert Streams.current == "main"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(product, torch.randn(2, 4))


def test_a_replay_that_is_wrong_is_left_out_and_said(product, monkeypatch):
    monkeypatch.setattr(Graph, "replay", lambda graph: None)
    assert_right(product, torch.randn(2, 4))
    with pytest.warns(RuntimeWarning, match=r"are off by .*% when replayed, so they are made one by one"):
        assert_right(product, torch.randn(2, 4))
    assert not graphs_medct.use_graphs
    assert not graphs_medct._recordings


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_results_without_a_length_say_nothing_about_a_replay(product, value):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        product.bias.fill_(value)
        for _ in range(3):
            product(torch.zeros(2, 4))
    assert graphs_medct.use_graphs


def test_only_few_volumes_on_a_card_without_gradients(monkeypatch):
    class OnCard(torch.Tensor):
        is_cuda = True

    few, many = (torch.zeros(number, 3).as_subclass(OnCard) for number in (1, 3))
    with torch.no_grad():
        assert graphs_medct.can_replay(few)
        assert not graphs_medct.can_replay(many)
        assert not graphs_medct.can_replay(torch.zeros(1, 3))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not graphs_medct.can_replay(few)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(graphs_medct, "use_graphs", False)
        assert not graphs_medct.can_replay(few)
    monkeypatch.setattr(graphs_medct, "use_graphs", True)
    assert not graphs_medct.can_replay(few), "with gradients"


@torch.no_grad()
def test_the_encoder_recorded(model, monkeypatch):
    vision = model.vision_model
    volumes = torch.rand(4, 1, 1, *vision.config.image_size) * 2 - 1
    expected = [vision(pixels) for pixels in volumes]
    monkeypatch.setattr(modeling_medct, "can_replay", lambda _: True)
    monkeypatch.setattr(type(vision), "_weights_of_kernels", lambda encoder, _: list(encoder.parameters()))
    for pixels, plain in zip(volumes, expected, strict=True):
        found = vision(pixels)
        assert torch.equal(found.codebook_ids, plain.codebook_ids)
        torch.testing.assert_close(found.pooler_output, plain.pooler_output)
    assert graphs_medct._recordings[vision].graph is not None
