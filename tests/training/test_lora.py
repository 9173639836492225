"""Adapters are what their settings say."""

import math
import warnings

import pytest
import torch

from medct import MedCTModel
from medct.training.lora import VARIANTS, add_lora, frozen_tensors, leave_casts_to_autocast, trainable


def layers(model):
    """The wrapped Linears."""
    return [module for module in model.modules() if hasattr(module, "lora_A") and len(module.lora_A)]


def test_adapting_warns_of_nothing(model):
    """Not of what PEFT and transformers have to settle among themselves, in a notebook either."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_lora(model, rank=2)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_stands_before_the_matrices(model, batch, dropout):
    peft = add_lora(model, rank=2, dropout=dropout)
    for layer in layers(peft):
        assert getattr(layer.lora_dropout["default"], "p", 0.0) == dropout
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p != dropout:
            module.p = 0.0  # of the text encoder itself
    with torch.no_grad():
        drawn = [peft.train()(**batch).logits_per_image for _ in range(2)]
    assert torch.equal(*drawn) == (dropout == 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_is_what_its_name_says(converted, variant):
    base = MedCTModel.from_pretrained(converted)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    peft = add_lora(base, variant=variant, rank=4, alpha=6, revision="abc")
    assert peft.peft_config["default"].revision == "abc"
    assert layers(peft)
    for layer in layers(peft):
        assert layer.r["default"] == 4
        assert layer.scaling["default"] == pytest.approx(6 / (math.sqrt(4) if variant == "rslora" else 4))
        assert layer.use_dora["default"] == (variant == "dora")
        assert bool(len(layer.lora_magnitude_vector)) == (variant == "dora")
        starts_at_base = not layer.lora_B["default"].weight.any()
        assert starts_at_base == (variant != "pissa")
    magnitudes = [name for name in trainable(peft) if "magnitude" in name]
    assert bool(magnitudes) == (variant == "dora")
    frozen = dict(frozen_tensors(peft))
    changed = [
        name
        for name, tensor in frozen.items()
        if "base_layer.weight" in name
        and not torch.equal(tensor, weights[name.removeprefix("base_model.model.").replace(".base_layer", "")])
    ]
    assert bool(changed) == (variant == "pissa")


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_alone_casts_what_goes_into_adapters(converted, batch, variant):
    peft = add_lora(MedCTModel.from_pretrained(converted), variant=variant, rank=4).eval()
    for layer in layers(peft):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    seen = set()
    layers(peft)[-1].lora_A["default"].register_forward_pre_hook(lambda _, rows: seen.add(rows[0].dtype))

    def gradients() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = peft(**batch, return_loss=True).loss
        return torch.autograd.grad(loss, list(trainable(peft).values()))

    expected = gradients()
    assert seen == {torch.float32}
    seen.clear()
    leave_casts_to_autocast(peft)
    for got, plain in zip(gradients(), expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, plain, atol=1e-3, rtol=2e-2)
    assert seen == {torch.float32 if variant == "dora" else torch.bfloat16}
