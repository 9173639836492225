"""The kernels of Triton against the plain formulation: interpreted on the CPU, where Triton can be imported.

In half precision products are tried in float16, as Triton's interpreter has no bfloat16 ones.
"""

import copy
import sys
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import BertConfig

from medct import MedCTConfig, MedCTModel, kernels_medct
from medct.training.lora import TARGETS

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernels have nothing to run on")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled for the card, see test_on_a_card.py", allow_module_level=True)

BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
HALF = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def kernels(monkeypatch) -> ModuleType:
    """The kernels, which run on CPU tensors for one test."""
    monkeypatch.setattr(kernels_medct, "interprets_triton", True)
    return kernels_medct.triton_kernels()


@pytest.fixture(params=[True, False], ids=["large-tiles", "small-tiles"])
def tiles(kernels, request, monkeypatch) -> None:
    """Cards of data centres, where blocks are fetched by their copy engine, and others."""
    monkeypatch.setattr(sys.modules[kernels.quantize.__module__], "has_large_tiles", lambda _: request.param)


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape))).to(dtype)


def assert_near(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error < BOUNDS[dtype], error


def assert_same_gradients(got, expected, inputs: tuple, dtype: torch.dtype) -> None:
    given = [rand(*each.shape, seed=9).to(each.dtype) for each in expected]
    for ours, plain in zip(
        torch.autograd.grad(got, inputs, given), torch.autograd.grad(expected, inputs, given), strict=True
    ):
        assert_near(ours, plain, dtype)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("sizes", [(2, 3, 3, 2, 20), (1, 1, 1, 1, 3)], ids=str)
def test_position_generator(kernels, sizes, dtype):
    grid, channels = rand(*sizes).requires_grad_(), sizes[-1]
    weight, bias, norm = rand(channels, 1, 3, 3, 3) / 5, rand(channels), rand(channels)
    made = F.conv3d(grid.permute(0, 4, 1, 2, 3), weight, bias, padding=(2, 1, 1), groups=channels)
    stream = grid + made[:, :, : sizes[1]].permute(0, 2, 3, 4, 1)
    expected = (stream, stream.to(dtype), F.layer_norm(stream, (channels,), norm).to(dtype))
    got = kernels.mix(grid, weight, bias, norm, 1e-5, dtype)
    for ours, plain in zip(got, expected, strict=True):
        assert ours.dtype == plain.dtype
        assert_near(ours, plain, dtype)
    assert_same_gradients(got, expected, (grid,), torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_norms(kernels, dtype):
    stream, update = rand(3, 7, 20).requires_grad_(), rand(3, 7, 20, seed=1).to(dtype).requires_grad_()
    weight, bias = rand(20), rand(20, seed=1)
    total = stream + update
    expected = (total, F.layer_norm(total, (20,), weight, bias).to(dtype))
    got = kernels.add_norm(stream, update, weight, bias, 1e-5, dtype)
    for ours, plain in zip(got, expected, strict=True):
        assert_near(ours, plain, dtype)
    assert_same_gradients(got, expected, (stream, update), dtype)
    normed = kernels.norm(stream, weight, None, 1e-5, dtype)
    plain = F.layer_norm(stream, (20,), weight).to(dtype)
    assert_near(normed, plain, dtype)
    assert_same_gradients((normed,), (plain,), (stream,), dtype)
    with torch.no_grad():
        turned = kernels.norm(
            stream.unflatten(-2, (7, 1)).expand(-1, -1, 5, -1), weight, None, 1e-5, dtype, turned=True
        )
        assert turned.transpose(1, 2).is_contiguous()
        assert torch.equal(turned, normed.unsqueeze(-2).expand_as(turned))
        memory = stream.detach().clone()
        assert kernels.add_norm(memory, update, weight, bias, 1e-5, dtype)[0] is memory
        assert_near(memory, total, dtype)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_gate_of_rows_that_lie_apart(kernels, dtype):
    for hidden in (rand(3, 7, 22, dtype=dtype), rand(3, 7, 24, dtype=dtype)[..., :22], rand(7, 3, 22).mT.mT.to(dtype)):
        hidden = hidden.detach().requires_grad_()
        value, gate = hidden.chunk(2, dim=-1)
        got, expected = kernels.gate(hidden), value * F.gelu(gate)
        assert_near(got, expected, dtype)
        assert_same_gradients((got,), (expected,), (hidden,), dtype)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_unit_lengths(kernels, dtype):
    values, scale = rand(3, 9, 2, 12, dtype=dtype).requires_grad_(), rand(12)
    expected = (F.normalize(values, dim=-1) * scale).to(dtype)
    got = kernels.unit(values, scale)
    assert_near(got, expected, dtype)
    assert_same_gradients((got,), (expected,), (values,), dtype)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_patches(kernels, dtype):
    pixels, weight, bias = rand(3, 4, 6, 8), rand(32), rand(32, seed=1)
    blocks = pixels.view(3, 4, 3, 2, 2, 4).permute(0, 2, 4, 1, 3, 5).flatten(3)
    expected = F.layer_norm(blocks, (32,), weight, bias).flatten(1, 2)
    assert_near(kernels.norm_patches(pixels, (4, 2, 4), weight, bias, 1e-5, dtype), expected, dtype)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", [24, 64, 70])
@pytest.mark.parametrize("dtype", HALF)
def test_attention(kernels, dtype, tokens, biased, scaled):
    query, _ = rand(3, tokens, 2, 2, 16, dtype=dtype, seed=1).unbind(2)
    _, key, value = rand(3, tokens, 3, 2, 16, dtype=dtype).unbind(2)
    bias = rand(1, 2, tokens, tokens, dtype=dtype) if biased else None
    scales = (rand(16), rand(16, seed=1)) if scaled else None
    units = [F.normalize(each.float(), dim=-1) for each in (query, key)]
    plain = [unit * scale for unit, scale in zip(units, scales, strict=True)] if scaled else [query, key]
    expected = F.scaled_dot_product_attention(
        *(each.float().transpose(1, 2) for each in (*plain, value)),
        attn_mask=bias.float() if biased else None,
        scale=0.7,
    )
    got = kernels.attention(query, key, value, bias, 0.7, scales)
    assert got.is_contiguous()
    assert_near(got, expected.transpose(1, 2), dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("codes", [1, 40, 300])
def test_nearest_codes(kernels, tiles, codes, dtype):
    codebook, tokens = rand(codes, 20), rand(130, 20, seed=1)
    unit = F.normalize(codebook, dim=-1)
    rows, ids = kernels.quantize(tokens, unit, codebook, dtype)
    assert torch.equal(ids, (tokens @ unit.T).argmax(-1))
    assert torch.equal(rows, codebook[ids])


@pytest.mark.parametrize("channels", [64, 20])
def test_products_with_the_gate(kernels, tiles, channels):
    rows, weight = rand(170, channels, dtype=torch.float16), rand(42, channels, dtype=torch.float16) / 8
    value, gate = F.linear(rows.float(), weight.float()).chunk(2, dim=-1)
    got = kernels.gated_product(rows, weight, 32)
    assert_near(got[:, :21], value * F.gelu(gate), torch.float16)
    assert not got[:, 21:].any()


def test_more_tiles_than_programs(kernels, tiles, monkeypatch):
    """Each program makes several: here two make eight or more, of which the last ones are not full."""
    monkeypatch.setattr(sys.modules[kernels.quantize.__module__], "num_processors", lambda _: 2)
    rows, weight = rand(400, 64, dtype=torch.float16), rand(300, 64, dtype=torch.float16) / 8
    value, gate = F.linear(rows.float(), weight.float()).chunk(2, dim=-1)
    got = kernels.gated_product(rows, weight, 160)
    assert_near(got[:, :150], value * F.gelu(gate), torch.float16)
    assert not got[:, 150:].any()


@pytest.mark.parametrize("tensor", ["rows", "weight"])
def test_products_of_tensors_that_lie_between_words(kernels, tensor):
    """As parts of larger ones do; the copy engine takes none that begin there."""
    parts = {"rows": rand(70, 64, dtype=torch.float16), "weight": rand(42, 64, dtype=torch.float16) / 8}
    expected = kernels.gated_product(parts["rows"], parts["weight"], 32)
    memory = torch.empty(parts[tensor].numel() + 1, dtype=torch.float16)
    parts[tensor] = memory[1:].view(parts[tensor].shape).copy_(parts[tensor])
    assert parts[tensor].data_ptr() % 16
    assert torch.equal(kernels.gated_product(parts["rows"], parts["weight"], 32), expected)


def test_the_gate_of_a_product_is_gelu_wherever_it_lies(kernels):
    """Gates from -9 to 9, made exact by a weight that picks one channel; the least float16 is 6e-8."""
    gate = torch.linspace(-9, 9, 4001).half()
    rows = torch.zeros(len(gate), 64, dtype=torch.float16)
    rows[:, 0], rows[:, 1] = 1, gate
    weight = torch.zeros(2, 64, dtype=torch.float16)
    weight[0, 0] = weight[1, 1] = 1
    got = kernels.gated_product(rows, weight, 16)[:, 0].double()
    torch.testing.assert_close(got, F.gelu(gate.double()), rtol=2**-11, atol=2e-6)


@pytest.mark.parametrize("channels", [64, 20])
def test_prepared_weights(kernels, channels):
    convolution, second = rand(channels, 1, 3, 3, 3), rand(channels, 21, seed=2)
    norm, projections = rand(channels), [rand(33, channels, seed=seed) for seed in range(3)]
    taps, rows_to_heads, padded = kernels.prepare(convolution, norm, *projections, second, 32)
    assert torch.equal(taps, convolution.flatten(1).t())
    assert torch.equal(padded, F.pad(second, (0, 11)))
    assert torch.equal(rows_to_heads[33:], torch.cat(projections[1:]))
    rows = 3 + rand(7, channels, seed=4)
    normed = F.linear(F.layer_norm(rows, (channels,), norm), projections[0])
    assert_near(F.normalize(F.linear(rows, rows_to_heads[:33])), F.normalize(normed), torch.float32)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("sizes", [(2, 3, 5, 2, 150), (1, 1, 1, 1, 3)], ids=str)
def test_position_generator_without_a_norm(kernels, sizes, dtype):
    """In tiles of channels, frames and rows, none of which is full."""
    grid, channels = rand(*sizes), sizes[-1]
    weight, bias = rand(channels, 1, 3, 3, 3) / 5, rand(channels)
    made = F.conv3d(grid.permute(0, 4, 1, 2, 3), weight, bias, padding=(2, 1, 1), groups=channels)
    expected = grid + made[:, :, : sizes[1]].permute(0, 2, 3, 4, 1)
    stream, low = kernels.mix_prepared(grid, weight.flatten(1).t().contiguous(), bias, dtype)
    assert_near(stream, expected, torch.float32)
    assert torch.equal(low, stream.to(dtype))


@pytest.fixture
def small() -> MedCTModel:
    """A model with all that kernels take, its norms and scales not those of the beginning."""
    torch.manual_seed(0)
    vision = {"image_size": [4, 8, 8], "patch_size": [2, 4, 4], "hidden_size": 32, "num_attention_heads": 2}
    vision |= {"head_dim": 16, "num_spatial_layers": 1, "num_temporal_layers": 1, "codebook_size": 40}
    text = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model = MedCTModel(MedCTConfig(text_config=text, vision_config=vision, projection_dim=10)).eval()
    for parameter in model.vision_model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter) * parameter[0].numel() ** -0.5
    return model


@pytest.fixture
def pixels() -> torch.Tensor:
    return rand(2, 1, 4, 8, 8).clamp(-1, 1)


def both_ways(run, monkeypatch) -> tuple:
    """What a function returns with kernels, and in the plain formulation."""
    fused = run()
    monkeypatch.setattr(kernels_medct, "use_triton", False)
    plain = run()
    monkeypatch.setattr(kernels_medct, "use_triton", True)
    return fused, plain


@pytest.fixture
def used(kernels, monkeypatch) -> set[str]:
    """Names of the kernels that have been called."""
    names = set()

    def noted(name: str, function):
        def call(*args, **kwargs):
            names.add(name)
            return function(*args, **kwargs)

        return call

    for name in kernels.__all__:
        monkeypatch.setattr(kernels, name, noted(name, getattr(kernels, name)))
    return names


@pytest.mark.parametrize("hooked", [False, True])
def test_the_encoder(small, pixels, used, monkeypatch, hooked):
    """As a whole, and layer by layer where somebody looks at its parts."""
    vision = small.vision_model
    if hooked:
        for layer in (*vision.spatial_encoder.layers, *vision.temporal_encoder.layers):
            layer.self_attn.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        fused, plain = both_ways(lambda: vision(pixels), monkeypatch)
    assert {"norm_patches", "attention", "quantize"} <= used
    assert ("prepare" in used) != hooked
    torch.testing.assert_close(fused.last_hidden_state, plain.last_hidden_state)
    assert torch.equal(fused.codebook_ids, plain.codebook_ids)


@pytest.mark.parametrize("name", ["norm_patches", "attention", "quantize"])
def test_a_kernel_that_a_compiler_got_wrong_is_left_out(small, pixels, kernels, monkeypatch, name):
    right = getattr(kernels, name)

    def wrong(*args):
        found = right(*args)
        return found.flip(0) if name != "quantize" else tuple(each.flip(0) for each in found)

    monkeypatch.setattr(kernels_medct, "_agreed", set())
    monkeypatch.setattr(kernels_medct, "use_triton", True)
    monkeypatch.setattr(kernels, name, wrong)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="so torch computes in their place") as said:
        fused, plain = both_ways(lambda: small.vision_model(pixels), monkeypatch)
    assert len(said) == 1
    torch.testing.assert_close(fused.last_hidden_state, plain.last_hidden_state)


@pytest.mark.parametrize("targets", ["vision", "vision-all"])
def test_adapters_get_the_same_gradients(small, pixels, used, monkeypatch, targets):
    adapted = get_peft_model(small, LoraConfig(r=2, target_modules=TARGETS[targets], init_lora_weights=False))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    weights = rand(2, small.config.vision_config.pooled_size)

    def gradients():
        pooled = small.vision_model(pixels).pooler_output
        return torch.autograd.grad((pooled * weights).sum(), trained)

    for ours, plain in zip(*both_ways(gradients, monkeypatch), strict=True):
        assert_near(ours, plain, torch.float16)
    assert {"mix", "add_norm", "gate", "unit"} <= used


def test_what_is_trained_is_left_to_torch(small, pixels, used, monkeypatch):
    def gradients():
        small.zero_grad()
        small.vision_model(pixels).pooler_output.square().sum().backward()
        return {name: each.grad for name, each in small.vision_model.named_parameters() if each.grad is not None}

    fused, plain = both_ways(gradients, monkeypatch)
    assert fused.keys() == plain.keys()
    assert not used & {"mix", "add_norm", "unit", "norm_patches"}
    for name, gradient in plain.items():
        torch.testing.assert_close(fused[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_weights_are_those_of_the_moment(small):
    layer, hidden = small.vision_model.spatial_encoder.layers[0], rand(2, 4, 32)
    with torch.no_grad():
        before = layer(hidden)
        for name, parameter in layer.named_parameters():
            kept = parameter.data.clone()
            parameter.data.mul_(-1.5)  # leaves address and version as they were
            assert not torch.equal(layer(hidden), before), name
            parameter.data.copy_(kept)
        assert torch.equal(layer(hidden), before)


def test_hooks_of_parts_are_called(small, pixels):
    parts = {name: module for name, module in small.vision_model.named_modules() if ".layers." in name}
    seen = []
    for name, module in parts.items():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        small.vision_model(pixels)
    assert sorted(seen) == sorted(parts)


def test_float64_volumes_that_lie_apart_and_the_switch(small, pixels, used, monkeypatch):
    with torch.no_grad():
        expected = small.vision_model(pixels)
        apart = pixels.transpose(-1, -2).contiguous().transpose(-1, -2)
        assert torch.equal(small.vision_model(apart).last_hidden_state, expected.last_hidden_state)
        exact = copy.deepcopy(small).double().vision_model(pixels.double())
        torch.testing.assert_close(exact.pooler_output.float(), expected.pooler_output)
        used.clear()
        monkeypatch.setattr(kernels_medct, "use_triton", False)
        small.vision_model(pixels)
    assert not used


class OfALibrary(torch.nn.Parameter):
    """As those that are quantized, sharded or loaded when they are used."""


def test_a_recording_belongs_to_all_that_it_reads(small, pixels):
    vision = small.vision_model
    with torch.no_grad():
        weights = vision._weights_of_kernels(vision.embeddings(pixels).flatten(2, 3))
    read = {id(each) for each in (*vision.parameters(), *vision.buffers())}
    assert read - {id(each) for each in vision.embeddings.parameters()} == {id(each) for each in weights}
    vision.requires_grad_(False)
    assert vision._weights_of_kernels(vision.embeddings(pixels).flatten(2, 3)) is None, "with gradients"


def test_what_is_recorded_runs_by_kernels_as_a_whole(small, pixels, monkeypatch):
    """Whatever has a part in the encoder behind its embeddings; or a recording would pass it over."""
    vision = small.vision_model
    with torch.no_grad():
        tokens = vision.embeddings(pixels).flatten(2, 3)

    def runs_by_kernels() -> bool:
        with torch.no_grad():
            return vision._weights_of_kernels(tokens) is not None

    assert runs_by_kernels()
    for name, module in vision.named_modules():
        if name and not name.startswith("embeddings") and not isinstance(module, torch.nn.ModuleList):
            hook = module.register_forward_hook(lambda *_: None)
            assert not runs_by_kernels(), name
            hook.remove()
    vision.set_attn_implementation("eager")
    assert not runs_by_kernels()
    vision.set_attn_implementation("sdpa")
    assert runs_by_kernels()
    with torch.autocast("cpu", torch.bfloat16):
        assert not runs_by_kernels()
    for module in vision.modules():
        for name, parameter in [*module._parameters.items()]:
            if parameter is not None and module not in vision.embeddings.modules():
                module._parameters[name] = OfALibrary(parameter)
                assert not runs_by_kernels(), name
                module._parameters[name] = parameter
    assert runs_by_kernels()
    adapted = get_peft_model(small, LoraConfig(r=2, target_modules=TARGETS["vision"]))
    assert not runs_by_kernels()
    adapted.unload()
    assert runs_by_kernels()
    with monkeypatch.context() as patch:
        patch.setattr(kernels_medct, "use_triton", False)
        assert not runs_by_kernels()


def test_tokens_that_no_code_is_like(kernels, tiles):
    """What lies beyond the last code, as zeros, is nearer to them than any."""
    codebook, tokens = rand(40, 20).abs(), -rand(130, 20, seed=1).abs()
    unit = F.normalize(codebook, dim=-1)
    _, ids = kernels.quantize(tokens, unit, codebook, torch.float32)
    assert torch.equal(ids, (tokens @ unit.T).argmax(-1))


@pytest.mark.parametrize(
    "capability, is_large", [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 3), True), ((12, 0), False)]
)
def test_cards_with_memory_for_large_tiles(kernels, monkeypatch, capability, is_large):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    has_large_tiles = sys.modules[kernels.quantize.__module__].has_large_tiles.__wrapped__
    assert has_large_tiles(torch.device("cuda:0")) == is_large


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_tokens_that_are_no_numbers_have_no_row(kernels, value):
    codebook, tokens = rand(40, 20), rand(5, 20, seed=1)
    tokens[3, 7] = value
    rows, ids = kernels.quantize(tokens, F.normalize(codebook, dim=-1), codebook, torch.float32)
    assert rows[3].isnan().all()
    assert torch.equal(rows[[0, 1, 2, 4]], codebook[ids[[0, 1, 2, 4]]])


def test_hooks_keep_what_they_saw_beside_kernels(small, pixels):
    """As in the plain formulation, kernels add in place only where nobody looks at the parts of a layer."""
    kept = []
    for module in small.vision_model.spatial_encoder.layers[0].modules():
        module.register_forward_hook(lambda _, given, __: kept.append((given[0], given[0].clone())))
    with torch.no_grad():
        small.vision_model(pixels)
    assert len(kept) > 5
    assert all(torch.equal(now, then) for now, then in kept)
