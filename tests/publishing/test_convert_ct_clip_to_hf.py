"""Conversion: every key accounted for, and nothing left behind when it fails."""

import json
import re

import ct_clip_reference as reference
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification

from medct import MedCTConfig, MedCTForImageClassification, MedCTModel, MedCTProcessor
from medct.cli import main
from medct.processing_medct import TextError
from medct.publishing.convert_ct_clip_to_hf import ConversionError, convert, map_keys

PUBLISHED_PARAMETERS = 438_148_761


def classfine(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    width = reference.SIZES["dim_latent"]
    head = {
        "classifier.weight": torch.randn(18, width, generator=generator),
        "classifier.bias": torch.randn(18, generator=generator),
    }
    return {f"trained_model.{key}": value for key, value in state.items()} | head


def test_every_key_is_mapped_or_dropped_with_a_reason(checkpoint):
    state = torch.load(checkpoint, weights_only=True)
    mapped, dropped = map_keys(state)
    # keys and values come as one tensor and leave as two
    assert len(mapped) - 3 + sum(map(len, dropped.values())) == len(state)
    assert all(dropped)


def test_published_sizes_have_the_published_number_of_parameters():
    """The specification's count is that of the file; ours lacks just what is listed as dropped."""
    vocabulary = 30_522
    with torch.device("meta"):
        model = MedCTModel(MedCTConfig(text_config={"model_type": "bert", "vocab_size": vocabulary}))
    ours = sum(tensor.numel() for tensor in model.state_dict().values())
    shapes = reference.shapes(reference.PUBLISHED_SIZES)
    _, dropped = map_keys(
        {key: torch.zeros(shape, device="meta") for key, shape in shapes.items() if "beta" not in key}
    )
    unused = sum(torch.Size(shapes[key]).numel() for keys in dropped.values() for key in keys)
    pooler = 768 * 768 + 768
    # The original counts its codebook as a buffer, too.
    assert ours + unused + pooler - model.vision_model.quantizer.codebook.numel() == PUBLISHED_PARAMETERS
    assert unused > 150_994_944


def test_model_and_processor_load_from_the_folder(converted, checkpoint):
    model = MedCTModel.from_pretrained(converted)
    state = torch.load(checkpoint, weights_only=True)
    encoder = model.vision_model.temporal_encoder.layers[0].self_attn
    kv = state["visual_transformer.enc_temporal_transformer.layers.0.1.to_kv.weight"]
    assert torch.equal(torch.cat([encoder.k_proj.weight, encoder.v_proj.weight]), kv)
    assert torch.equal(model.logit_scale.weight, state["temperature"].reshape(1))
    processor = MedCTProcessor.from_pretrained(converted)
    assert processor.image_processor.image_size == [8, 12, 8]
    assert processor.tokenizer.tokenize("IS Not present.") == ["is", "not", "present", "."]
    assert processor.tokenizer.model_max_length == 32
    assert not any("extra" in key for key in load_file(converted / "model.safetensors"))
    assert "CC-BY-NC-SA" in (converted / "README.md").read_text(encoding="utf-8")


def test_golden_checkpoint_converts(shared, tokenizer_folder, tmp_path):
    convert(shared / "golden/ct_clip.pt", tmp_path / "out", str(tokenizer_folder), shared / "golden/config.json")
    assert MedCTModel.from_pretrained(tmp_path / "out").config.vision_config.grid_size == (5, 4, 3)


def test_classfine_converts_to_a_classifier(checkpoint, tokenizer_folder, sizes_file, tmp_path, batch):
    state = torch.load(checkpoint, weights_only=True)
    torch.save(classfine(state), tmp_path / "classfine.pt")
    dropped = convert(tmp_path / "classfine.pt", tmp_path / "out", str(tokenizer_folder), sizes_file)
    assert any(key.startswith("trained_model.text_transformer") for keys in dropped.values() for key in keys)
    classifier = MedCTForImageClassification.from_pretrained(tmp_path / "out").eval()
    latents = reference.run(state, reference.SIZES, batch)["image_latents"]
    head = classfine(state)
    expected = latents.relu() @ head["classifier.weight"].T + head["classifier.bias"]
    torch.testing.assert_close(classifier(batch["pixel_values"]).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("holds", [lambda state: state, classfine], ids=["CT-CLIP", "ClassFine"])
def test_what_a_converted_model_says_of_its_use_is_right(
    holds, checkpoint, tokenizer_folder, sizes_file, nifti, tmp_path, monkeypatch
):
    torch.save(holds(torch.load(checkpoint, weights_only=True)), tmp_path / "weights.pt")
    convert(tmp_path / "weights.pt", tmp_path / "out", str(tokenizer_folder), sizes_file)
    nifti(np.zeros((8, 8, 8), np.float32))
    monkeypatch.chdir(tmp_path)
    said = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"```python\n(.*?)```", said, re.DOTALL))
    found: dict = {}
    exec(code.replace("ORG/NAME", "out").replace("pipe(", "found = pipe("), found)
    assert len(found["scores"]) == len(found["found"]) == 18
    assert sorted(found["scores"].tolist()) == pytest.approx(sorted(each["score"] for each in found["found"]))
    assert ("prompts" in said) == (holds is not classfine)


def test_old_file_format_converts(checkpoint, tokenizer_folder, sizes_file, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    convert(tmp_path / "old.pt", tmp_path / "out", str(tokenizer_folder), sizes_file)
    assert (tmp_path / "out/model.safetensors").is_file()


def spoil(state: dict[str, torch.Tensor], how: str):
    if how == "unknown":
        state["visual_transformer.enc_spatial_transformer.layers.0.9.weight"] = torch.zeros(1)
    elif how == "missing":
        del state["to_visual_latent.weight"]
    elif how == "nonzero":
        state["visual_transformer.enc_spatial_transformer.norm_out.beta"][0] = 1.0
    elif how == "shape":
        state["to_text_latent.weight"] = torch.zeros(3, 3)
    elif how == "not finite":
        state["to_visual_latent.weight"][1, 2] = torch.nan
    elif how == "nested":
        return {"state_dict": state}
    elif how == "stranger":
        return {"conv1.weight": torch.zeros(3)}
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unknown", "Unknown key visual_transformer.enc_spatial_transformer.layers.0.9.weight"),
        ("missing", "lacks visual_projection.weight"),
        ("nonzero", "norm_out.beta should be zero"),
        ("shape", r"text_projection.weight has shape \(3, 3\); these sizes ask for \(10, 16\)"),
        ("not finite", "visual_projection.weight holds NaN or infinity"),
        ("nested", "not a flat dictionary of tensors"),
        ("stranger", "Unknown key conv1.weight"),
    ],
)
def test_other_checkpoints_are_refused_by_name(how, message, checkpoint, tokenizer_folder, sizes_file, tmp_path):
    torch.save(spoil(torch.load(checkpoint, weights_only=True), how), tmp_path / "spoiled.pt")
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "spoiled.pt", tmp_path / "out", str(tokenizer_folder), sizes_file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spoiled.pt"]


def test_code_in_a_checkpoint_is_not_run(tokenizer_folder, tmp_path):
    class Payload:
        def __reduce__(self):
            return (print, ("this must never be printed",))

    torch.save({"a": Payload()}, tmp_path / "bad.pt")
    with pytest.raises(ConversionError, match=r"bad.pt: not a checkpoint of tensors alone \(UnpicklingError\)"):
        convert(tmp_path / "bad.pt", tmp_path / "out", str(tokenizer_folder))


def test_missing_tokenizer_and_sizes(checkpoint, tokenizer_folder, sizes_file, tmp_path):
    with pytest.raises(ConversionError, match="not a tokenizer"):
        convert(checkpoint, tmp_path / "out", str(tmp_path / "nowhere"), sizes_file)
    sizes = json.loads(sizes_file.read_text(encoding="utf-8"))
    del sizes["heads"]
    (tmp_path / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")
    with pytest.raises(ConversionError, match="lack 'heads'"):
        convert(checkpoint, tmp_path / "out", str(tokenizer_folder), tmp_path / "sizes.json")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_could_not_be_fetched_is_refused(checkpoint, sizes_file, tmp_path):
    """Offline, the library makes an empty one of any Hub id."""
    with pytest.raises(TextError, match="org/not-fetched: a tokenizer that knows no words"):
        convert(checkpoint, tmp_path / "out", "org/not-fetched", sizes_file)
    assert not (tmp_path / "out").exists()


def test_existing_output_is_not_touched(checkpoint, tokenizer_folder, sizes_file, tmp_path):
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(FileExistsError, match="not empty"):
        convert(checkpoint, tmp_path, str(tokenizer_folder), sizes_file)
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "keep"


def test_what_a_killed_conversion_has_left_is_removed(tokenizer_folder, tmp_path):
    (tmp_path / ".out.partial-0a1b2c3d").mkdir()
    with pytest.raises(ConversionError):
        convert(tmp_path / "nowhere.pt", tmp_path / "out", str(tokenizer_folder))
    assert not list(tmp_path.iterdir())


def test_command_line_says_what_is_wrong_in_one_line(tmp_path, tokenizer_folder, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refused("convert", "nowhere.pt", "out", "--tokenizer", tokenizer_folder)
    assert said == "nowhere.pt: no such file. Pass a CT-CLIP checkpoint (.pt)."
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageClassification])
def test_command_line_lists_what_was_dropped_and_how_to_load(
    auto_class, checkpoint, tokenizer_folder, sizes_file, tmp_path, capsys
):
    if auto_class is AutoModelForImageClassification:
        state = classfine(torch.load(checkpoint, weights_only=True))
        checkpoint = tmp_path / "classfine.pt"
        torch.save(state, checkpoint)
    out = tmp_path / "out"
    main(["convert", str(checkpoint), str(out), "--tokenizer", str(tokenizer_folder), "--sizes", str(sizes_file)])
    printed = capsys.readouterr().out
    assert "to_visual_latent_extra.weight" in printed
    assert f"Load it with {auto_class.__name__}.from_pretrained({str(out)!r}, trust_remote_code=True)." in printed
    auto_class.from_pretrained(out)
