"""The model against the specification, and as a citizen of transformers."""

import copy
import json
import warnings

import ct_clip_reference as reference
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BertConfig, DistilBertConfig

from medct import (
    MedCTConfig,
    MedCTForImageClassification,
    MedCTModel,
    MedCTVisionModel,
    zero_shot_probabilities,
)
from medct.kernels_medct import apply_linear
from medct.publishing.convert_ct_clip_to_hf import build_model, config_from_sizes, map_keys
from medct.training.lora import TARGETS, add_lora

TEXT_QUERY = "encoder.layer.0.attention.self.query.weight"
RECORDED_GRADIENTS = {
    "temperature": "logit_scale.weight",
    "to_text_latent.weight": "text_projection.weight",
    "to_visual_latent.weight": "visual_projection.weight",
    f"text_transformer.{TEXT_QUERY}": f"text_model.{TEXT_QUERY}",
}


def observe(model: MedCTModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model computes from a batch, on the way and in the end, under the names of the recorded tensors."""
    seen: dict[str, torch.Tensor] = {}

    def record(name, pick=lambda output: output):
        return lambda _module, _inputs, output: seen.__setitem__(name, pick(output))

    vision = model.vision_model
    hooks = [
        vision.embeddings.register_forward_hook(record("patch_embeddings")),
        vision.position_bias.register_forward_hook(record("spatial_position_bias", lambda output: output[0])),
        vision.spatial_encoder.register_forward_hook(record("spatial_out")),
        vision.temporal_encoder.register_forward_hook(record("temporal_out")),
        vision.register_forward_hook(record("vision")),
    ]
    output = model(**batch, return_loss=True)
    for hook in hooks:
        hook.remove()
    encoded = seen.pop("vision")
    seen["codebook_ids"] = encoded.codebook_ids
    seen["quantized"] = seen["image_tokens"] = encoded.last_hidden_state
    seen["image_latents"], seen["text_latents"] = output.image_embeds, output.text_embeds
    seen["pair_logits"] = output.logits_per_image.diagonal()
    seen["zero_shot_probs"] = output.logits_per_image[:, :2].softmax(-1)
    seen["loss"] = output.loss
    return seen


def assert_as_recorded(model: MedCTModel, batch: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    seen = observe(model, batch)
    for name, value in seen.items():
        recorded = expected[name].reshape(value.shape)
        if name == "codebook_ids":
            assert torch.equal(value, recorded)
        else:
            tolerance = 1e-6 if name == "loss" else 1e-5
            torch.testing.assert_close(
                value, recorded, atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
            )
    seen["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    compared = [name for name in RECORDED_GRADIENTS if f"grad.{name}" in expected]
    assert compared == list(RECORDED_GRADIENTS)
    for name in compared:
        recorded = expected[f"grad.{name}"]
        torch.testing.assert_close(gradients[RECORDED_GRADIENTS[name]].view_as(recorded), recorded, atol=1e-5, rtol=0)


@pytest.fixture
def threads():
    """Sets the number of threads, which decides how products are split, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_equals_the_original(shared, threads, attention, num_threads):
    threads(num_threads)
    sizes = json.loads((shared / "golden/config.json").read_text(encoding="utf-8"))
    expected = load_file(shared / "golden/expected.safetensors")
    state = torch.load(shared / "golden/ct_clip.pt", weights_only=True)
    model = build_model(config_from_sizes(sizes), map_keys(state)[0])
    model.set_attn_implementation(attention)
    assert_as_recorded(
        model, {name: expected[name] for name in ("pixel_values", "input_ids", "attention_mask")}, expected
    )


def test_reference_equals_the_original(shared):
    """The stand-in for the recorded tensors where they are not available."""
    sizes = json.loads((shared / "golden/config.json").read_text(encoding="utf-8"))
    expected = load_file(shared / "golden/expected.safetensors")
    state = torch.load(shared / "golden/ct_clip.pt", weights_only=True)
    for name, value in reference.run(state, sizes, expected).items():
        torch.testing.assert_close(value, expected[name].view_as(value), atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_equals_the_specification(checkpoint, model, batch, attention):
    # In float64, where rounding does not depend on the order of operations.
    state = {name: value.double() for name, value in torch.load(checkpoint, weights_only=True).items()}
    batch["pixel_values"] = batch["pixel_values"].double()
    for name in RECORDED_GRADIENTS:
        state[name].requires_grad_()
    expected = reference.run(state, reference.SIZES, batch)
    expected["loss"].backward()
    expected = {name: value.detach() for name, value in expected.items()}
    expected |= {f"grad.{name}": state[name].grad for name in RECORDED_GRADIENTS}

    model.double().set_attn_implementation(attention)
    assert_as_recorded(model, batch, expected)


def test_one_volume_against_many_texts_is_encoded_once(model, batch):
    calls = []
    model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        together = model(
            pixel_values=batch["pixel_values"][:1],
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
        )
        pairs = model(**batch)
    assert len(calls) == 2
    assert together.logits_per_image.shape == (1, 3)
    torch.testing.assert_close(together.logits_per_image, pairs.logits_per_image[:1])
    torch.testing.assert_close(together.logits_per_text, together.logits_per_image.t())


def test_features_are_the_embeddings_of_forward(model, batch):
    output = model(**batch)
    images = model.get_image_features(batch["pixel_values"]).pooler_output
    texts = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    torch.testing.assert_close(images, output.image_embeds)
    torch.testing.assert_close(texts, output.text_embeds)
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(3))


def test_padding_does_not_change_a_text(model, batch):
    alone = model.get_text_features(batch["input_ids"][2:, :4]).pooler_output
    padded = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output[2:]
    torch.testing.assert_close(alone, padded)


def test_zero_shot_probabilities_are_softmaxed_pairs():
    logits = torch.tensor([[2.0, 1.0, -1.0, 3.0]])
    expected = torch.tensor([[1 / (1 + torch.e**-1), 1 / (1 + torch.e**4)]])
    torch.testing.assert_close(zero_shot_probabilities(logits), expected)


@pytest.mark.parametrize("left_out", ["pixel_values", "input_ids"])
def test_half_a_batch_is_refused(model, batch, left_out):
    batch.pop(left_out)
    with pytest.raises(ValueError, match=f"`{left_out}` are missing"):
        model(**batch)


def test_wrong_sizes_are_refused_with_both_numbers(model, batch):
    with pytest.raises(ValueError, match=r"\(8, 12, 8\).*not \(3, 1, 7, 12, 8\)"):
        model.get_image_features(batch["pixel_values"][:, :, :7])
    with pytest.raises(ValueError, match="1 volumes and 3 texts"):
        model(batch["input_ids"], batch["pixel_values"][:1], return_loss=True)


def lora(model: MedCTModel):
    return get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS["both"], task_type="FEATURE_EXTRACTION"))


def test_a_training_step_reaches_both_encoders_and_leaves_the_base_as_it_was(model, batch):
    base = model.state_dict(keep_vars=True)
    before = {name: tensor.detach().clone() for name, tensor in base.items()}
    adapted = lora(model).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):  # in the first step only one of the two matrices gets a gradient, as the other is zero
        optimizer.zero_grad()
        adapted(**batch, return_loss=True).loss.backward()
        optimizer.step()
    for encoder in ("vision_model", "text_model"):
        gradients = {
            name: parameter.grad.abs().max()
            for name, parameter in adapted.named_parameters()
            if parameter.requires_grad and encoder in name
        }
        assert gradients
        assert all(gradient > 0 for gradient in gradients.values()), gradients
    assert "vision_model.quantizer.codebook" in before
    for name, tensor in base.items():
        assert torch.equal(tensor, before[name]), name


def test_full_training_moves_the_encoder_but_never_the_codebook(model, batch):
    codebook = model.vision_model.quantizer.codebook.clone()
    projection = model.vision_model.embeddings.projection.weight
    before = projection.detach().clone()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**batch, return_loss=True).loss.backward()
    optimizer.step()
    assert torch.equal(model.vision_model.quantizer.codebook, codebook)
    assert not torch.equal(projection, before)


def test_position_bias_is_that_of_the_weights_as_they_are(model, batch):
    def embeds():
        with torch.no_grad():
            return model.get_image_features(batch["pixel_values"]).pooler_output

    first = embeds()
    model.vision_model.position_bias.fc1.weight.data.mul_(1.5)  # leaves address and version as they were
    assert not torch.equal(embeds(), first)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        kept = model.vision_model.position_bias(torch.device("cpu"), torch.float32)
    assert kept.dtype == torch.float32
    # Adapters on the network, switched without a change of any weight.
    before = embeds()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r".*position_bias\.fc\d", init_lora_weights=False))
    changed = embeds()
    assert not torch.equal(changed, before)
    with adapted.disable_adapter():
        assert torch.equal(embeds(), before)
    assert torch.equal(embeds(), changed)


def test_gradient_checkpointing_changes_no_gradient(model, batch):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        adapted = lora(copy.deepcopy(model))
        torch.manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if checkpointing:
            adapted.base_model.model.activation_checkpointing_enable()
            assert any(getattr(module, "gradient_checkpointing", False) for module in adapted.modules())
        # dropout of the text encoder off, so that both runs are the same
        for module in adapted.modules():
            module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
        adapted.train()
        adapted(**batch, return_loss=True).loss.backward()
        return {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert plain
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(converted, model, batch, dtype):
    half = MedCTModel.from_pretrained(converted, dtype=dtype).eval()
    assert torch.equal(half.vision_model.quantizer.codebook, model.vision_model.quantizer.codebook)
    assert half.vision_model.spatial_encoder.layers[0].mlp.fc1.weight.dtype == dtype
    with torch.no_grad():
        tokens = half.vision_model.embeddings(batch["pixel_values"])
        # What the layers add to stays in float32.
        assert tokens.dtype == torch.float32
        assert half.vision_model.temporal_encoder(tokens.flatten(2, 3)).dtype == torch.float32
        expected = model.vision_model.embeddings(batch["pixel_values"])
        torch.testing.assert_close(tokens.float(), expected, atol=0.1, rtol=0.1)
        output = half(**batch)
    # Half precision does not tell the prompts of two labels apart.
    assert output.logits_per_image.dtype == output.text_embeds.dtype == torch.float32
    torch.testing.assert_close(output.text_embeds.float(), model(**batch).text_embeds, atol=0.05, rtol=0.1)
    assert output.logits_per_image.isfinite().all()


def test_half_precision_finds_the_nearest_row_where_two_seem_equal(model):
    torch.manual_seed(0)
    quantizer = copy.deepcopy(model.vision_model.quantizer)
    base = torch.eye(quantizer.codebook.shape[-1])[:4]
    quantizer.codebook = base.repeat_interleave(2, 0) + 2**-9 * torch.randn(8, base.shape[-1])
    tokens = base.repeat(1000, 1) + 0.1 * torch.randn(4000, base.shape[-1])
    _, expected = quantizer(tokens, torch.float32)
    _, ids = quantizer(tokens, torch.bfloat16)
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("rows", [1, 16, 24, 31, 64])
def test_the_nearest_row_is_found_wherever_it_is(model, rows):
    torch.manual_seed(0)
    quantizer = copy.deepcopy(model.vision_model.quantizer)
    quantizer.codebook = torch.randn(rows, 12)
    tokens = torch.randn(500, 12)
    expected = torch.cosine_similarity(tokens[:, None], quantizer.codebook, dim=-1).argmax(-1)
    assert len(expected.unique()) == rows
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(quantizer(tokens, dtype)[1], expected)


def test_every_linear_is_torchs_own(model):
    """Quantisers replace modules of the very type."""
    linears = [module for module in model.vision_model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 1 + 3 + 6 * model.config.vision_config.num_hidden_layers
    assert {type(module) for module in linears} == {torch.nn.Linear}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [7, 16])
@pytest.mark.parametrize("convolves", [False, True])
def test_fast_products_are_those_of_torch(monkeypatch, convolves, width, bias):
    """Also for rows of any number of axes, and under an adapter."""
    monkeypatch.setattr("medct.kernels_medct.WIDE", 1)
    monkeypatch.setattr("medct.kernels_medct.CONVOLVES_ON_CPU", convolves)
    linear = torch.nn.Linear(5, width, bias=bias)
    adapted = get_peft_model(torch.nn.Sequential(copy.deepcopy(linear)), LoraConfig(target_modules=["0"]))
    rows = torch.randn(2, 3, 5, requires_grad=True)
    for each in (rows, rows[0], rows[:, 0], rows[0, 0], rows.transpose(0, 1)):
        torch.testing.assert_close(apply_linear(linear, each), linear(each))
        torch.testing.assert_close(apply_linear(adapted, each), linear(each))
    inputs = (rows, *linear.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(apply_linear(linear, rows).square().sum(), inputs),
        torch.autograd.grad(linear(rows).square().sum(), inputs),
    )


def test_the_encoders_may_differ_in_precision(converted, model, batch):
    mixed = MedCTModel.from_pretrained(converted).eval()
    mixed.vision_model.to(torch.bfloat16)
    with torch.no_grad():
        output = mixed(**batch)
        assert torch.equal(output.text_embeds, model(**batch).text_embeds)
    assert output.image_embeds.isfinite().all()


def test_long_volumes_are_encoded_in_chunks_without_a_difference(model, batch, monkeypatch):
    with torch.enable_grad():
        whole = model(**batch)
    before = batch["pixel_values"].clone()
    monkeypatch.setattr("medct.kernels_medct.CPU_CHUNK_BYTES", 1)
    for size in (3, 1):
        with torch.inference_mode():
            pieces = model(**batch | {"pixel_values": batch["pixel_values"][:size]})
        torch.testing.assert_close(pieces.image_embeds, whole.image_embeds[:size])
    assert torch.equal(batch["pixel_values"], before)


def test_reused_memory_keeps_hidden_states(model, batch):
    encode, pixels = model.double().vision_model, batch["pixel_values"].double()
    expected = encode(pixels, output_hidden_states=True).hidden_states
    with torch.no_grad():
        seen = encode(pixels, output_hidden_states=True).hidden_states
    assert len(seen) == len(expected)
    for got, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_patches_lose_nothing_to_half_precision_before_they_are_scaled(model):
    """10 HU of texture in soft tissue: a bfloat16 voxel would hold one of three values."""
    generator = torch.Generator().manual_seed(0)
    pixels = 0.5 + 0.01 * torch.rand(1, 1, *model.config.vision_config.image_size, generator=generator)
    with torch.no_grad():
        expected = model.vision_model.embeddings(pixels)
        half = copy.deepcopy(model.vision_model.embeddings).bfloat16()(pixels).float()
    assert (half - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("grad", [pytest.param(False, marks=pytest.mark.slow), True])
def test_vision_model_compiles_as_one_graph(model, batch, grad):
    vision = model.vision_model
    compiled = torch.compile(vision, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        expected = vision(batch["pixel_values"])
        for _ in range(2):
            got = compiled(batch["pixel_values"])
            torch.testing.assert_close(got.pooler_output, expected.pooler_output)
            assert torch.equal(got.codebook_ids, expected.codebook_ids)


def test_vision_model_is_exported_for_batches_of_any_size(model, batch):
    """Without gradients, and run with them: weights that are trained could not be added to in place."""
    pixels = torch.cat([batch["pixel_values"]] * 2)
    with torch.no_grad():
        axes = ({0: torch.export.Dim("volumes")},)
        exported = torch.export.export(model.vision_model, (pixels[:2],), dynamic_shapes=axes).module()
    for some in (pixels[:1], pixels[:5]):
        assert torch.equal(exported(some)["pooler_output"], model.vision_model(some).pooler_output)


def test_text_encoder_is_exported_for_any_length(model):
    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model.get_text_features(input_ids, attention_mask).pooler_output

    tokens = torch.randint(5, 50, (3, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0] * 2 + [1] * 5])
    axes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens", max=16)}
    with torch.no_grad():
        exported = torch.export.export(Encoder(), (tokens, mask), dynamic_shapes=(axes, axes))
        for end in (7, 5):
            some = tokens[:, :end], mask[:, :end]
            torch.testing.assert_close(exported.module()(*some), Encoder()(*some))
    # Of a length that is not known yet, it has no counterpart in ONNX.
    assert not any("remainder" in str(node.target) for node in exported.graph.nodes)


def test_outputs_are_tuples_where_the_configuration_says_so(model, batch):
    with torch.no_grad():
        expected = model(**batch).to_tuple()
        model.config.return_dict = False
        for one, other in zip(model(**batch), expected, strict=True):
            assert torch.equal(one, other)


def test_device_map_places_the_model(converted, model, batch):
    placed = MedCTModel.from_pretrained(converted, device_map={"": "cpu"}).eval()
    with torch.no_grad():
        assert torch.equal(placed(**batch).logits_per_image, model(**batch).logits_per_image)


def test_every_buffer_comes_back_from_disk(model, converted):
    """Buffers that no checkpoint holds are uninitialised memory after loading, unless something fills them."""
    built = MedCTModel(model.config)
    fresh = dict(built.named_buffers())
    loaded = dict(model.named_buffers())
    assert fresh.keys() == loaded.keys()
    saved = set(model.state_dict())
    for name, buffer in loaded.items():
        if name not in saved:
            assert torch.equal(buffer, fresh[name]), name
    again = MedCTModel.from_pretrained(converted)
    for name, buffer in again.named_buffers():
        assert torch.equal(buffer, loaded[name]), name


def test_fresh_weights_are_sound(model, batch):
    torch.manual_seed(0)
    fresh = MedCTModel(model.config).eval()
    with torch.no_grad():
        output = fresh(**batch)
    assert output.logits_per_image.isfinite().all()
    assert fresh.logit_scale.weight.shape == (1,)
    assert fresh.logit_scale.weight.item() == model.config.logit_scale_init_value
    assert fresh.vision_model.quantizer.codebook.std() > 0.5


def test_hidden_states_and_attentions(model, batch):
    model.set_attn_implementation("eager")
    output = model.vision_model(batch["pixel_values"], output_hidden_states=True, output_attentions=True)
    config = model.config.vision_config
    t, h, w = config.grid_size
    assert len(output.attentions) == config.num_hidden_layers
    assert output.attentions[0].shape == (3 * t, config.num_attention_heads, h * w, h * w)
    assert output.hidden_states[0].shape == (3 * t, h * w, config.hidden_size)
    assert output.last_hidden_state.shape == (3, t * h * w, config.hidden_size)
    assert output.codebook_ids.shape == (3, t * h * w)


def test_vision_model_loads_from_the_whole_model(converted, model, batch):
    vision = MedCTVisionModel.from_pretrained(converted).eval()
    with torch.no_grad():
        expected = model.vision_model(batch["pixel_values"]).pooler_output
        assert torch.equal(vision(batch["pixel_values"]).pooler_output, expected)


def test_another_text_encoder(model, batch):
    text_config = DistilBertConfig(vocab_size=60, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    config = MedCTConfig(text_config=text_config, vision_config=model.config.vision_config, projection_dim=10)
    other = MedCTModel(MedCTConfig.from_dict(config.to_dict())).eval()
    assert type(other.text_model).__name__ == "DistilBertModel"
    assert other(**batch).logits_per_image.shape == (3, 3)


def test_classifier_learns_and_ignores_the_text_half(converted, model, batch):
    classifier = MedCTForImageClassification.from_pretrained(converted).eval()
    assert torch.equal(classifier.visual_projection.weight, model.visual_projection.weight)
    labels = torch.zeros(3, 18)
    output = classifier(batch["pixel_values"], labels=labels)
    assert output.logits.shape == (3, 18)
    embeds = model.get_image_features(batch["pixel_values"]).pooler_output
    expected = classifier.classifier(embeds.relu())
    torch.testing.assert_close(output.logits, expected)
    plain = torch.nn.functional.binary_cross_entropy_with_logits(expected, labels)
    torch.testing.assert_close(output.loss, plain)
    classifier.config.classifier_pos_weight = [2.0] * 18
    ones = torch.ones(3, 18)
    weighted = classifier(batch["pixel_values"], labels=ones).loss
    torch.testing.assert_close(weighted, 2 * torch.nn.functional.binary_cross_entropy_with_logits(expected, ones))


@pytest.mark.parametrize("model_class", [MedCTModel, MedCTForImageClassification, MedCTVisionModel])
def test_every_class_names_its_input_embeddings(model, model_class):
    """Quantizers and NEFTune ask for them."""
    config = model.config.vision_config if model_class is MedCTVisionModel else model.config
    with torch.device("meta"):
        assert model_class(config).get_input_embeddings() is not None


def test_lora_at_the_published_sizes_stays_within_the_papers_number():
    with torch.device("meta"):
        model = MedCTModel(MedCTConfig(text_config=BertConfig()))
        adapted = add_lora(model)
    trainable, total = adapted.get_nb_trainable_parameters()
    print(f"trainable {trainable:,} of {total:,} parameters, {100 * trainable / total:.2f} %")
    assert trainable == 1_572_864
    assert trainable <= 1_670_000


def test_logits_are_never_rounded_by_autocast(model):
    """Of embeddings in float32: bfloat16 has 8 bits, and scores of findings lie closer together."""
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.rand(4, 16, generator=generator), torch.rand(5, 16, generator=generator)
    expected = model.get_logits(images, texts)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.get_logits(images, texts)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_embeddings_that_were_kept_in_another_precision_are_float32_or_better(model, dtype):
    images, texts = torch.rand(4, 16).to(dtype), torch.rand(5, 16)
    logits = model.get_logits(images, texts)
    assert logits.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(logits.float(), model.get_logits(images.float(), texts))


def test_the_classifiers_dropout_is_the_configurations(converted, batch):
    classifier = MedCTForImageClassification.from_pretrained(converted, classifier_dropout=0.5)
    with torch.no_grad():
        torch.manual_seed(0)
        drawn = [classifier.train()(batch["pixel_values"]).logits for _ in range(2)]
        assert not torch.equal(*drawn)
        still = [classifier.eval()(batch["pixel_values"]).logits for _ in range(2)]
        assert torch.equal(*still)


def test_token_types_reach_the_text_encoder(model, batch):
    with torch.no_grad():
        plain = model(**batch).logits_per_image
        types = torch.zeros_like(batch["input_ids"])
        assert torch.equal(model(**batch, token_type_ids=types).logits_per_image, plain)
        types[0] = 1
        typed = model(**batch, token_type_ids=types)
        assert not torch.allclose(typed.logits_per_image[:, 0], plain[:, 0])
        assert torch.equal(typed.logits_per_image[:, 1:], plain[:, 1:])


def test_the_loss_of_a_head_is_the_mean_over_known_labels(converted):
    classifier = MedCTForImageClassification.from_pretrained(converted)
    logits = torch.linspace(-2, 2, 36).view(2, 18)
    labels = torch.full((2, 18), torch.nan)
    labels[0, 1], labels[1, 3] = 1.0, 0.0
    known = ~labels.isnan()
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits[known], labels[known], reduction="none")
    torch.testing.assert_close(classifier.label_loss(logits, labels), each.mean())
    torch.testing.assert_close(classifier.label_loss(logits, labels, "sum"), each.sum())
    assert classifier.label_loss(logits, torch.full((2, 18), torch.nan)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_decides_between_rows_of_the_codebook_stays_in_float32(converted, dtype):
    parts = ("patch_norm", "position_generator", "layer_norm", "coder.norm", "quantizer")
    parts += ("position_bias",) if dtype == torch.float16 else ()
    vision = MedCTModel.from_pretrained(converted, dtype=dtype).vision_model
    for name, tensor in (*vision.named_parameters(), *vision.named_buffers()):
        assert tensor.dtype == (torch.float32 if any(part in name for part in parts) else dtype), name


@pytest.mark.parametrize("kind", [MedCTVisionModel, MedCTForImageClassification, MedCTModel])
def test_a_model_in_half_precision_is_saved_and_loaded_as_such(converted, tmp_path, kind):
    """Its first parameter stays in float32, which the library would take for the precision of all."""
    half = kind.from_pretrained(converted, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16  # which is what records of scores name
    half.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert {name: each.dtype for name, each in again.state_dict().items()} == {
        name: each.dtype for name, each in half.state_dict().items()
    }


def test_a_model_of_two_precisions_is_rounded_by_no_saving(converted, tmp_path):
    for half in ("vision_model", "text_model"):
        mixed = MedCTModel.from_pretrained(converted)
        getattr(mixed, half).bfloat16()
        mixed.save_pretrained(tmp_path / half)
        again = MedCTModel.from_pretrained(tmp_path / half).state_dict()
        assert all(torch.equal(again[name].to(each.dtype), each) for name, each in mixed.state_dict().items())


def test_labels_that_are_none_are_refused(converted):
    """-1 is "uncertain" in some tables, -100 what the library ignores elsewhere; here NaN is unknown."""
    classifier = MedCTForImageClassification.from_pretrained(converted)
    logits = torch.zeros(2, 18)
    for value in (-1, -100, 2, 255, torch.inf):
        labels = torch.ones(2, 18)
        labels[1, 3] = value
        with pytest.raises(ValueError, match=r"numbers outside of \[0, 1\]. Pass NaN where a label is unknown"):
            classifier.label_loss(logits, labels)
    for labels in (torch.tensor([0, 1]), torch.zeros(2, 17)):
        with pytest.raises(ValueError, match=r"`labels` must be \(batch, labels\) = \(2, 18\)"):
            classifier.label_loss(logits, labels)
    assert classifier.label_loss(logits, torch.full((2, 18), 0.3)).isfinite()
    classifier.config.classifier_pos_weight = [5.0]
    with pytest.raises(ValueError, match="1 numbers for 18 labels"):
        classifier.label_loss(logits, torch.ones(2, 18))


def test_a_head_has_one_output_a_label(converted, batch):
    classifier = MedCTForImageClassification.from_pretrained(converted)
    classifier.classifier = torch.nn.Linear(classifier.config.projection_dim, 20)
    with pytest.raises(ValueError, match="The head has 20 outputs for 18 labels"):
        classifier(batch["pixel_values"])


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_stays_so(model, batch, value, with_gradients):
    """One volume of two; some row of the codebook is always the nearest."""
    pixels = batch["pixel_values"][:2].clone()
    pixels[1, 0, 0, 0, 0] = value
    with torch.set_grad_enabled(with_gradients):
        found = model.get_image_features(pixels)
    assert found.pooler_output[0].isfinite().all()
    assert found.pooler_output[1].isnan().all()


@pytest.mark.parametrize("traced_with", [1, 3])
def test_a_traced_encoder_takes_other_batches(model, batch, traced_with):
    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            return self.model.get_image_features(pixel_values).pooler_output

    pixels = torch.cat([batch["pixel_values"]] * 3)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Encoder(), pixels[:traced_with])
        for number in (1, 2, 4):
            torch.testing.assert_close(traced(pixels[:number]), Encoder()(pixels[:number]))


def test_what_hooks_keep_is_not_written_over(model, batch):
    """Without gradients layers add in place, unless somebody looks at their parts."""

    def seen(**options):
        kept, hooks = [], []

        def keep(module, given, made):
            kept.extend(each for each in (*given, *(made if isinstance(made, tuple) else (made,))))

        for name, module in model.vision_model.named_modules():
            if ".layers." in name:
                hooks.append(module.register_forward_hook(keep))
        with torch.set_grad_enabled(options["with_gradients"]):
            model.vision_model(batch["pixel_values"])
        for hook in hooks:
            hook.remove()
        return [each.detach().clone() for each in kept if isinstance(each, torch.Tensor)]

    for without, plain in zip(seen(with_gradients=False), seen(with_gradients=True), strict=True):
        torch.testing.assert_close(without, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "text_config",
    [{"model_type": "gpt2"}, {"model_type": "clip_text_model"}, {"model_type": "bert", "is_decoder": True}],
)
def test_a_text_encoder_whose_first_token_sees_nothing_is_refused(text_config):
    with torch.device("meta"), pytest.raises(ValueError, match="not an encoder whose first token sees the whole text"):
        MedCTModel(MedCTConfig(text_config=text_config))


def test_positions_are_moved_with_the_text(model, batch):
    tokens, length = batch["input_ids"][:1], batch["input_ids"].shape[1]
    positions = torch.arange(length)[None]
    with torch.no_grad():
        expected = model.get_text_features(tokens, torch.ones_like(tokens)).pooler_output
        left = torch.cat([torch.zeros(1, 2, dtype=torch.long), tokens], dim=1)
        mask = torch.cat([torch.zeros(1, 2, dtype=torch.long), torch.ones_like(tokens)], dim=1)
        moved = torch.cat([torch.zeros(1, 2, dtype=torch.long), positions], dim=1)
        found = model.get_text_features(left, mask, position_ids=moved).pooler_output
    torch.testing.assert_close(found, expected)


def test_derivatives_forward_are_those_backward(model, batch):
    pixels = batch["pixel_values"][:1]
    direction = torch.randn_like(pixels)

    def summed(pixel_values):
        return model.get_image_features(pixel_values).pooler_output.sum()

    model.set_attn_implementation("eager")  # torch has no forward derivative of the others
    _, forward = torch.func.jvp(summed, (pixels,), (direction,))
    backward = (torch.func.grad(summed)(pixels) * direction).sum()
    assert forward.item() == pytest.approx(backward.item(), rel=1e-3)
    assert forward.abs() > 0
