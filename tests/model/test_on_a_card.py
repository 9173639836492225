"""Every stage of the vision encoder on an NVIDIA card against float32 on the CPU, each with its bound."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from medct import MedCTConfig, MedCTModel, graphs_medct, kernels_medct
from medct.training.lora import TARGETS

if not torch.cuda.is_available():
    pytest.skip("there is no NVIDIA card", allow_module_level=True)

CARD = torch.device("cuda:0")
# Largest relative error, by norm, of what each stage makes: the products' rounding, and what layers make of it.
BOUNDS = {
    "fp32": {"embeddings": 1e-6, "position_bias": 1e-6, "spatial_encoder": 1e-5, "temporal_encoder": 2e-5},
    "tf32": {"embeddings": 1e-3, "position_bias": 2e-3, "spatial_encoder": 5e-3, "temporal_encoder": 1e-2},
    "bf16": {"embeddings": 5e-3, "position_bias": 1e-2, "spatial_encoder": 3e-2, "temporal_encoder": 5e-2},
}
GAPS = {"fp32": 1e-5, "tf32": 1e-2, "bf16": 5e-2}
"""How much less similar a token may be to the row that it takes on the card: near the border of two rows."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of the published widths, few tokens and layers, with weights that keep vector lengths."""
    torch.manual_seed(0)
    vision = {"image_size": [40, 100, 80], "num_spatial_layers": 2, "num_temporal_layers": 1, "codebook_size": 1000}
    text = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = MedCTModel(MedCTConfig(text_config=text, vision_config=vision, projection_dim=16))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=weight[0].numel() ** -0.5)
            else:
                weight.add_(0.2 * torch.randn_like(weight))
    path = tmp_path_factory.mktemp("wide")
    model.save_pretrained(path)
    return path


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(3, 1, 40, 100, 80, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def set_tf32():
    yield lambda is_on: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32" if is_on else "ieee")
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def stages(model: MedCTModel, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each stage makes of volumes, on the CPU."""
    seen, vision = {}, model.vision_model
    hooks = [
        getattr(vision, name).register_forward_hook(lambda *a, name=name: seen.__setitem__(name, a[-1].float().cpu()))
        for name in BOUNDS["fp32"]
    ]
    with torch.no_grad():
        seen["codebook_ids"] = vision(pixels).codebook_ids.cpu()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize("precision", BOUNDS)
def test_stages(folder, pixels, set_tf32, monkeypatch, precision, with_kernels):
    monkeypatch.setattr(kernels_medct, "use_triton", with_kernels)
    set_tf32(precision == "tf32")
    expected = stages(MedCTModel.from_pretrained(folder).eval(), pixels)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = MedCTModel.from_pretrained(folder, dtype=dtype, device_map=CARD).eval()
    found = stages(model, pixels.to(CARD))
    errors = {name: ((found[name] - expected[name]).norm() / expected[name].norm()).item() for name in BOUNDS["fp32"]}
    print(precision, with_kernels, errors)
    assert all(errors[name] < bound for name, bound in BOUNDS[precision].items()), errors

    ids, others = expected["codebook_ids"], found["codebook_ids"]
    tokens = expected["temporal_encoder"].transpose(1, 2).flatten(1, 2)
    codes = F.normalize(model.vision_model.quantizer.codebook.cpu(), dim=-1)
    gaps = (F.normalize(tokens, dim=-1) * (codes[ids] - codes[others])).sum(dim=-1)
    print(f"{(ids != others).float().mean():.2%} of tokens in another row, gap {gaps.max():.1e}")
    assert gaps.max() < GAPS[precision]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_get_the_gradients_of_the_plain_formulation(folder, pixels, monkeypatch, dtype):
    model = MedCTModel.from_pretrained(folder, dtype=dtype, device_map=CARD)
    torch.manual_seed(0)
    get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS["vision"], init_lora_weights=False))
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}

    def gradients():
        hidden = []
        hook = model.vision_model.temporal_encoder.register_forward_hook(lambda *outputs: hidden.append(outputs[-1]))
        model.vision_model(pixels.to(CARD))
        hook.remove()
        return torch.autograd.grad(hidden[0].square().mean(dim=-1).sqrt().sum(), list(trained.values()))

    ours = gradients()
    monkeypatch.setattr(kernels_medct, "use_triton", False)
    for name, got, plain in zip(trained, ours, gradients(), strict=True):
        error = ((got - plain).norm() / plain.norm()).item()
        assert error < (1e-3 if dtype == torch.float32 else 0.1), (name, error)


def test_other_batches_need_no_other_kernels(folder, pixels):
    model = MedCTModel.from_pretrained(folder, dtype=torch.bfloat16, device_map=CARD).eval().vision_model
    triton = pytest.importorskip("triton")
    compiled = []
    with torch.no_grad():
        model(pixels.to(CARD))
        triton.knobs.runtime.jit_post_compile_hook = lambda *_, **__: compiled.append(1)
        try:
            for size in (1, 2):
                model(pixels[:size].to(CARD))
        finally:
            triton.knobs.runtime.jit_post_compile_hook = None
    assert not compiled


def test_a_model_that_moved_and_a_volume_that_lies_apart(folder, pixels):
    model = copy.deepcopy(MedCTModel.from_pretrained(folder)).to(CARD).eval().vision_model
    apart = pixels.to(CARD).transpose(-1, -2).contiguous().transpose(-1, -2)
    with torch.no_grad():
        assert torch.equal(model(apart).codebook_ids, model(pixels.to(CARD)).codebook_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_launches(folder, pixels, monkeypatch, dtype):
    """Results are those of launches one by one, also after weights have changed, in place and otherwise."""
    monkeypatch.setattr(graphs_medct, "use_graphs", True)
    vision = MedCTModel.from_pretrained(folder, dtype=dtype, device_map=CARD).eval().vision_model
    weight = vision.temporal_encoder.layers[0].mlp.fc2.weight

    def compare() -> None:
        for volume in pixels.to(CARD).split(1):
            found = vision(volume)
            with monkeypatch.context() as patch:
                patch.setattr(graphs_medct, "use_graphs", False)
                plain = vision(volume)
            assert (found.codebook_ids == plain.codebook_ids).double().mean() > 0.99
            torch.testing.assert_close(found.pooler_output, plain.pooler_output, atol=0.05, rtol=0.05)

    with torch.inference_mode():
        compare()
    with torch.no_grad():
        compare()
        assert graphs_medct.use_graphs
        graph = graphs_medct._recordings[vision].graph
        assert graph is not None
        weight.mul_(-3)
        compare()
        assert graphs_medct._recordings[vision].graph is graph
        weight.data = torch.randn_like(weight)
        compare()
        assert graphs_medct._recordings[vision].graph not in (None, graph)
