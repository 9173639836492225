"""Adapters: what they record, which models accept them, and several of them on one base."""

import json
import pickle
import warnings

import pytest
import torch
from adapter_files import save_adapter
from peft import PeftModel
from transformers import AutoModel

from medct import AdapterMismatchError, MedCTModel, check_fit
from medct.adapters_medct import base_tensors, fingerprint, read_description


@pytest.fixture(scope="module")
def adapter(converted, tmp_path_factory):
    return save_adapter(converted, tmp_path_factory.mktemp("adapters") / "a")


@pytest.fixture(scope="module")
def other_adapter(converted, tmp_path_factory):
    return save_adapter(converted, tmp_path_factory.mktemp("adapters") / "b", seed=1)


@pytest.fixture
def edited(adapter, tmp_path):
    """`edited(key=value)`: a copy of the adapter that records something else."""

    def edit(**changes):
        folder = tmp_path / "edited"
        folder.mkdir()
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (folder / name).write_bytes((adapter / name).read_bytes())
        description = json.loads((adapter / "medct_adapter.json").read_text()) | changes
        (folder / "medct_adapter.json").write_text(json.dumps(description))
        return folder

    return edit


@torch.no_grad()
def logits(model, batch) -> torch.Tensor:
    return model.eval()(**batch).logits_per_image


# fingerprints


def test_fingerprint_depends_on_the_base_alone(model, adapter):
    before = fingerprint(model)
    names = base_tensors(model).keys()
    peft = PeftModel.from_pretrained(model, adapter)
    assert fingerprint(peft) == fingerprint(peft.get_base_model()) == before
    assert base_tensors(peft.get_base_model()).keys() == names
    assert fingerprint(peft.merge_and_unload()) != before


def test_fingerprint_sees_through_modules_to_save(model, converted, tmp_path):
    before = fingerprint(model)
    folder = save_adapter(converted, tmp_path / "adapter", modules_to_save=["visual_projection", "logit_scale"])
    model.load_adapter(str(folder))
    assert fingerprint(model) == before


def test_fingerprint_is_the_same_in_bfloat16(model):
    before = fingerprint(model)
    assert fingerprint(model.to(torch.bfloat16)) == before


@pytest.mark.parametrize("name", ["logit_scale.weight", "vision_model.quantizer.codebook"])
def test_fingerprint_detects_one_changed_number(model, name):
    before = fingerprint(model)
    model.state_dict()[name].view(-1)[0] += 0.1
    assert fingerprint(model) != before


# which model takes which adapter


def test_an_adapter_fits_its_base(model, adapter, other_adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_fit(model, adapter)
    model.load_adapter(str(adapter))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_fit(model, other_adapter)  # the first one does not interfere


def test_other_weights_are_refused(model, adapter):
    model.visual_projection.weight.data += 1
    with pytest.raises(AdapterMismatchError, match=r"was trained on other weights .* Load its base, .*model"):
        model.load_adapter(str(adapter))
    assert not model._hf_peft_config_loaded


def test_the_remedy_names_the_commit(model, edited):
    folder = edited(base={"model": "org/base", "revision": "abc", "fingerprint": "sha256-bf16:0"})
    with pytest.raises(AdapterMismatchError, match=r"Load its base, org/base at revision abc\.$"):
        check_fit(model, folder)


def test_other_preprocessing_is_refused(model, adapter, edited):
    theirs = read_description(adapter)["preprocessing"]
    folder = edited(preprocessing=theirs | {"hu_min": -1200})
    with pytest.raises(AdapterMismatchError, match="trained with hu_min -1200, this model has -1000"):
        model.load_adapter(str(folder))


@pytest.mark.parametrize("name, value", [("label_names", ["Mass"]), ("prompt_templates", [["{label}", "no {label}"]])])
def test_other_labels_or_prompts_are_warned_about(model, edited, name, value):
    with pytest.warns(UserWarning, match=f"other {name}"):
        check_fit(model, edited(**{name: value}))


def test_what_cannot_be_compared_is_warned_about(model, adapter, edited):
    foreign = edited()
    (foreign / "medct_adapter.json").unlink()
    with pytest.warns(UserWarning, match="nobody can tell"):
        check_fit(model, foreign)
    with pytest.warns(UserWarning, match=r"torch\.float16"):
        check_fit(model.to(torch.float16), adapter)


def test_auto_model_checks_an_adapter_too(adapter, batch, model, edited):
    model.load_adapter(str(adapter))
    assert torch.equal(logits(AutoModel.from_pretrained(adapter), batch), logits(model, batch))
    with pytest.raises(ValueError, match="was trained on other weights"):
        AutoModel.from_pretrained(edited(base={"model": "a/b", "revision": None, "fingerprint": "sha256-bf16:0"}))


class Bomb:
    """Its pickle writes a file when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_no_pickle_is_ever_loaded(model, converted, adapter, tmp_path):
    folder, exploded = tmp_path / "pickled", tmp_path / "exploded"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(exploded)))
    with pytest.raises(AdapterMismatchError, match="safetensors"):
        model.load_adapter(str(folder))
    with pytest.raises(pickle.UnpicklingError):
        PeftModel.from_pretrained(model, folder)
    (folder / "config.json").write_bytes((converted / "config.json").read_bytes())
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(exploded)))
    with pytest.raises(OSError, match="safetensors"):
        MedCTModel.from_pretrained(folder)
    assert not exploded.exists()


# several adapters


def test_adapters_are_switched_on_one_base(model, converted, adapter, other_adapter, batch):
    plain = logits(model, batch)
    weight = model.vision_model.embeddings.projection.weight
    model.load_adapter(str(adapter), adapter_name="a")
    found = {"a": [logits(model, batch)]}
    model.load_adapter(str(other_adapter), adapter_name="b")
    for name in ("b", "a"):
        model.set_adapter(name)
        found.setdefault(name, []).append(logits(model, batch))
    assert torch.equal(*found["a"])
    alone = PeftModel.from_pretrained(MedCTModel.from_pretrained(converted), other_adapter)
    assert torch.equal(found["b"][0], logits(alone, batch))
    assert not torch.allclose(found["a"][0], found["b"][0])
    model.disable_adapters()
    assert torch.equal(logits(model, batch), plain)
    assert model.vision_model.embeddings.projection.weight is weight


def test_adapters_are_weighted_and_combined(model, adapter, other_adapter, batch):
    peft = PeftModel.from_pretrained(model, adapter, adapter_name="a")
    peft.load_adapter(other_adapter, adapter_name="b")
    alone = logits(peft, batch)
    peft.add_weighted_adapter(["a", "b"], [1.0, 0.0], "first", combination_type="cat")
    peft.add_weighted_adapter(["a", "b"], [0.5, 0.5], "both", combination_type="cat")
    peft.set_adapter("first")
    torch.testing.assert_close(logits(peft, batch), alone, atol=1e-5, rtol=1e-5)
    peft.set_adapter("both")
    layer = next(module for module in peft.modules() if hasattr(module, "lora_A"))
    expected = (layer.get_delta_weight("a") + layer.get_delta_weight("b")) / 2
    torch.testing.assert_close(layer.get_delta_weight("both"), expected, atol=1e-5, rtol=1e-5)


def test_a_merged_model_is_a_plain_one(model, adapter, batch, tmp_path):
    peft = PeftModel.from_pretrained(model, adapter)
    expected = logits(peft, batch)
    merged = peft.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), expected, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("adapter_*"))
    loaded = AutoModel.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert torch.equal(logits(loaded, batch), logits(merged, batch))


def test_peft_loads_what_transformers_loads(model, converted, adapter, batch):
    peft = PeftModel.from_pretrained(MedCTModel.from_pretrained(converted), adapter)
    model.load_adapter(str(adapter))
    assert torch.equal(logits(peft, batch), logits(model, batch))


@pytest.mark.parametrize(("adapter", "reason"), [("org/nowhere", "We couldn't connect"), ("{tmp}", ".*config.json")])
def test_an_unavailable_adapter_is_not_called_unsafe(model, adapter, reason, tmp_path):
    with pytest.raises(OSError, match=f"no adapter .{reason}"):
        check_fit(model, adapter.format(tmp=tmp_path), local_files_only=True)
