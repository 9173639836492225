"""The model against the specification, and as a citizen of transformers."""

import copy
import json

import ct_clip_reference as reference
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BertConfig, DistilBertConfig

from medct import MedCTConfig, MedCTForImageClassification, MedCTModel, MedCTVisionModel, zero_shot_probabilities
from medct.convert_ct_clip_to_hf import build_model, config_from_sizes, map_keys

RECORDED_GRADIENTS = {
    "temperature": "logit_scale.weight",
    "to_text_latent.weight": "text_projection.weight",
    "to_visual_latent.weight": "visual_projection.weight",
    "text_transformer.encoder.layer.0.attention.self.query.weight": "text_model.encoder.layer.0.attention.self.query.weight",
}


def observe(model: MedCTModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model makes of a batch on the way and in the end, under the names of the recorded tensors."""
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
            torch.testing.assert_close(value, recorded, atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    seen["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    compared = [name for name in RECORDED_GRADIENTS if f"grad.{name}" in expected]
    assert compared == list(RECORDED_GRADIENTS)
    for name in compared:
        recorded = expected[f"grad.{name}"]
        torch.testing.assert_close(gradients[RECORDED_GRADIENTS[name]].view_as(recorded), recorded, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_equals_the_original(shared, attention):
    sizes = json.loads((shared / "golden/config.json").read_text())
    expected = load_file(shared / "golden/expected.safetensors")
    state = torch.load(shared / "golden/ct_clip.pt", weights_only=True)
    model = build_model(config_from_sizes(sizes), map_keys(state)[0])
    model.set_attn_implementation(attention)
    assert_as_recorded(model, {name: expected[name] for name in ("pixel_values", "input_ids", "attention_mask")}, expected)


def test_reference_equals_the_original(shared):
    """What stands in for the recorded tensors where they are not at hand."""
    sizes = json.loads((shared / "golden/config.json").read_text())
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
