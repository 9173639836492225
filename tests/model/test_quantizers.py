"""Quantized by the libraries' own tools; each is left out where it is not installed."""

import importlib.util

import pytest
import torch
from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from medct import MedCTModel
from medct.training.settings import PHANTOM_BASE


def _torchao():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


WAYS = {
    "bitsandbytes int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao int8": _torchao,
    "optimum.quanto int8": lambda: QuantoConfig(weights="int8"),
}


def _is_installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_both_encoders_run_with_quantized_linears(way):
    library = way.split()[0]
    if not _is_installed(library):
        pytest.skip(f"{library} is not installed")
    generator = torch.Generator().manual_seed(0)
    batch = {
        "pixel_values": torch.rand(2, 1, 48, 96, 96, generator=generator) * 2 - 1,
        "input_ids": torch.randint(5, 225, (2, 8), generator=generator),
    }
    plain = MedCTModel.from_pretrained(PHANTOM_BASE).eval()
    model = MedCTModel.from_pretrained(PHANTOM_BASE, quantization_config=WAYS[way](), device_map={"": "cpu"}).eval()
    if "nf4" in way:
        model.train()  # on CPUs bitsandbytes packs it anew for evaluation, in widths that 64 divides; nothing drops out
    with torch.no_grad():
        expected, got = plain(**batch), model(**batch)
    layer = model.vision_model.temporal_encoder.layers[0].mlp
    assert type(layer.fc1) is not torch.nn.Linear or type(layer.fc1.weight) is not torch.nn.Parameter
    assert type(model.vision_model.position_bias.fc1) is torch.nn.Linear
    least = 0.6 if "nf4" in way else 0.98
    for name in ("image_embeds", "text_embeds"):
        assert (got[name].float() * expected[name]).sum(-1).min() > least
