"""Adapters: what they record, which models accept them, and several of them on one base."""

import json
import logging
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapter_files import save_adapter
from peft import (
    AdaLoraConfig,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    RandLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from medct import AdapterMismatchError, MedCTConfig, MedCTModel, adapters_medct, check_fit
from medct.adapters_medct import (
    WEIGHTS_FILE,
    adapter_fingerprint,
    adapters_in_use,
    as_described,
    asked_config,
    base_tensors,
    describe_adapter,
    description_in_use,
    fingerprint,
    read_description,
)
from medct.peft_medct import without_load_report


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
        description = json.loads((adapter / "medct_adapter.json").read_text(encoding="utf-8")) | changes
        (folder / "medct_adapter.json").write_text(json.dumps(description), encoding="utf-8")
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


def test_what_only_a_newer_version_understands_is_refused(model, edited):
    folder = edited(temperature=2.0, nothing=None)
    with pytest.raises(AdapterMismatchError, match=r"has 'temperature', which this version .* Update MedCT\.$"):
        model.load_adapter(str(folder))
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
    with pytest.warns(UserWarning, match="it is not known"):
        check_fit(model, foreign)
    with pytest.warns(UserWarning, match=r"torch\.float16"):
        check_fit(model.to(torch.float16), adapter)


def test_auto_model_checks_an_adapter_too(adapter, batch, model, edited):
    model.load_adapter(str(adapter))
    assert torch.equal(logits(AutoModel.from_pretrained(adapter), batch), logits(model, batch))
    with pytest.raises(ValueError, match="was trained on other weights"):
        AutoModel.from_pretrained(edited(base={"model": "a/b", "revision": None, "fingerprint": "sha256-bf16:0"}))


# an adapter is its tensors, all of them

LORA_A, OTHERS = "base_model.model.text_model.encoder.layer.0.attention.self.query.lora_A.weight", "x.lora_A.weight"


def dropped(*parts):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)}


def changed(value):
    """One number of one tensor."""

    def edit(tensors):
        tensors[LORA_A].view(-1)[3] = value
        return tensors

    return edit


DAMAGES = {
    "empty": (lambda tensors: {}, "lacks 20 of the 20 tensors"),
    "one missing": (dropped(LORA_A), "lacks 1 of the 20 tensors .* such as .*query.lora_A"),
    "no lora_A": (dropped("lora_A"), "lacks 10 of the 20 tensors"),
    "no lora_B": (dropped("lora_B"), "lacks 10 of the 20 tensors"),
    "other prefix": (
        lambda tensors: {f"x.{name}": tensor for name, tensor in tensors.items()},
        "lacks 20 of the 20 tensors",
    ),
    "no prefix": (
        lambda tensors: {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()},
        "lacks 20 of the 20 tensors",
    ),
    "one more": (lambda tensors: {**tensors, OTHERS: torch.ones(4, 4)}, r"does not ask for \(1, such as x\.lora_A"),
    "other rank": (
        lambda tensors: {
            name: tensor[:2] if "lora_A" in name else tensor[:, :2].contiguous() for name, tensor in tensors.items()
        },
        r"with shape \(2, \d+\), not \(4, ",
    ),
    "transposed": (lambda tensors: {**tensors, LORA_A: tensors[LORA_A].T.contiguous()}, r"lora_A.weight with shape"),
    "NaN": (changed(float("nan")), "NaN or infinity in .*query.lora_A"),
    "infinity": (changed(float("-inf")), "NaN or infinity in"),
    "NaN in eight bits": (
        lambda tensors: {**tensors, LORA_A: torch.full_like(tensors[LORA_A], torch.nan).to(torch.float8_e4m3fn)},
        "NaN or infinity in .*query.lora_A",
    ),
    "integers": (
        lambda tensors: {**tensors, LORA_A: (tensors[LORA_A] * 127).to(torch.int8)},
        r"has torch\.int8 in .*query.lora_A.weight, no floating-point numbers\. Save it again",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_adapter_that_is_not_whole_is_refused(model, converted, edited, damage, batch):
    edit, said = DAMAGES[damage]
    folder = edited()
    save_file(edit(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    plain = logits(model, batch)
    for load in (check_fit, lambda model, folder: model.load_adapter(str(folder))):
        with pytest.raises(AdapterMismatchError, match=said):
            load(model, folder)
    assert torch.equal(logits(model, batch), plain) and not model._hf_peft_config_loaded
    with pytest.raises(AdapterMismatchError, match=said):
        AutoModel.from_pretrained(folder)


def test_a_torn_file_is_refused(model, edited):
    path = edited() / "adapter_model.safetensors"
    whole = path.read_bytes()
    for length in (0, 7, 300, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(AdapterMismatchError, match=r"is damaged\. Copy or download it again"):
            check_fit(model, path.parent)


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"thresholds": {"Nodule": NaN}}', "it holds NaN"), ('{"strength": -Infinity}', "-Infinity"), ("{", "Expecting")],
)
def test_a_description_whose_numbers_mean_nothing_is_refused(model, edited, text, said):
    path = edited() / "medct_adapter.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(
        AdapterMismatchError, match=rf"medct_adapter\.json cannot be read \(.*{said}.*\)\. Correct it, or"
    ):
        check_fit(model, path.parent)


CONFIGURATIONS = {
    "other modules": ({"target_modules": ["nothing_of_this_name"]}, "fits no module of this model"),
    "more memory than there is": ({"r": 10**11}, r"with shape \(4, "),
    "a kind that PEFT does not know": ({"peft_type": "TOMORROW"}, r"PEFT cannot read its .*KeyError\)\. Update"),
    "a word for a number": ({"r": "4"}, r"PEFT cannot read its|fits no module"),
    "prompts": ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, "fits no module of this model"),
    "other adapters": ({"peft_type": "XLORA", "hidden_size": 8, "adapters": {"a": "b/c"}}, "mixes other adapters"),
}


@pytest.mark.parametrize("what", CONFIGURATIONS)
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_a_configuration_that_cannot_be_meant_is_refused(model, edited, monkeypatch, what):
    changed, said = CONFIGURATIONS[what]
    path = edited() / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changed), encoding="utf-8")
    monkeypatch.setattr("peft.peft_model.PeftModel.load_adapter", None)  # which would fetch them
    with pytest.raises(AdapterMismatchError, match=said):
        check_fit(model, path.parent)


def test_tensors_in_memory_are_loaded_all_or_not_at_all(model, adapter, batch):
    plain = logits(model, batch)
    tensors = {
        name: tensor for name, tensor in load_file(adapter / "adapter_model.safetensors").items() if "query" in name
    }
    config = PeftConfig.from_pretrained(adapter)
    with pytest.raises(AdapterMismatchError, match="tensors of the adapter were not loaded"):
        model.load_adapter(peft_config=config, adapter_state_dict=tensors)
    assert torch.equal(logits(model, batch), plain)


VARIANTS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "whole modules": {"modules_to_save": ["logit_scale", "visual_projection"]},
    "bias": {"bias": "lora_only"},
    "embeddings": {"target_modules": r".*word_embeddings|.*q_proj"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_of_an_adapter_counts(model, converted, variant, batch, tmp_path):
    """By transformers' loaders as by PEFT's; each tensor was changed from what a fresh adapter has."""
    folder = save_adapter(converted, tmp_path / "adapter", **VARIANTS[variant])
    tensors = {name: tensor * 1.5 for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    expected = logits(PeftModel.from_pretrained(MedCTModel.from_pretrained(converted), folder), batch)
    assert torch.equal(logits(AutoModel.from_pretrained(folder), batch), expected)
    model.load_adapter(str(folder))
    assert torch.equal(logits(model, batch), expected)


class Bomb:
    """Its pickle writes a file when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
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


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        ("org/nowhere", "We couldn't connect"),
        ("{tmp}", ".*config.json"),
        ("{tmp}/nowhere", r"there is no such folder\). Pass a Hub id or a folder"),
    ],
)
def test_an_unavailable_adapter_is_not_called_unsafe(model, adapter, reason, tmp_path):
    with pytest.raises(OSError, match=f"no adapter .{reason}"):
        check_fit(model, adapter.format(tmp=tmp_path), local_files_only=True)


# what is checked is what is loaded


def test_what_is_loaded_is_what_is_checked(model, adapter, monkeypatch):
    """Of every file: the same revision, from the same place, with the same rights."""
    asked = {}

    def fetch(folder, name, **hub):
        asked.setdefault(name, []).append(hub)
        path = Path(folder, name)
        return str(path) if path.exists() else None

    monkeypatch.setattr("medct.adapters_medct.cached_file", fetch)
    model.load_adapter(str(adapter), adapter_kwargs={"revision": "abc"})
    assert asked.keys() == {"adapter_config.json", "adapter_model.safetensors", "medct_adapter.json"}
    assert all(hub == {"revision": "abc"} for each in asked.values() for hub in each)
    asked.clear()
    options = {"revision": "a", "token": "b", "cache_dir": "c", "subfolder": "d", "local_files_only": True}
    check_fit(model, adapter, **options)
    assert len(asked) == 3 and all(hub == options for each in asked.values() for hub in each)


class Weights(torch.nn.Module):
    """A model of nothing but these tensors."""

    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


@pytest.mark.parametrize("of", ["a model", "an adapter"])
def test_a_fingerprint_is_of_names_and_shapes_too(of, tmp_path):
    def name_of(**tensors):
        if of == "a model":
            return fingerprint(Weights(**tensors))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / WEIGHTS_FILE)
        return adapter_fingerprint(tmp_path)

    values = torch.arange(6.0)
    same = [name_of(a=values.view(2, 3)) for _ in range(2)]
    others = [
        name_of(b=values.view(2, 3)),
        name_of(a=values.view(3, 2)),
        name_of(a=values),
        name_of(a=values[:2], b=values[2:]),
        name_of(a=values[:3], b=values[3:]),
        name_of(a=values.flip(0).view(2, 3)),
    ]
    assert len({*same, *others}) == 1 + len(others)


def test_a_file_gives_the_fingerprint_only_of_a_whole_model_in_numbers(tmp_path):
    """Where the weights in memory have no values: quantized ones are of another model, and so are some of them."""
    whole = {"a": torch.arange(6.0), "b": torch.arange(2.0)}
    model = Weights(**{name: tensor.to("meta") for name, tensor in whole.items()})
    model.name_or_path, model.config = str(tmp_path), SimpleNamespace()
    strange = {"a": whole["a"].to(torch.int8)}, {"c": torch.ones(1)}
    for saved, known in ((whole, fingerprint(Weights(**whole))), *((whole | each, None) for each in strange)):
        save_file(saved, tmp_path / "model.safetensors")
        assert fingerprint(model) == known


def test_an_adapter_names_its_base_as_it_was_before_training(model, tmp_path):
    for before, named in (("sha256-bf16:0", "sha256-bf16:0"), (None, fingerprint(model))):
        describe_adapter(model, tmp_path, base="org/base", base_fingerprint=before)
        assert read_description(tmp_path)["base"]["fingerprint"] == named


@pytest.fixture
def reports(caplog):
    """What transformers reports while it loads; "LOAD REPORT" if anything."""
    logger = logging.getLogger("transformers.integrations.peft")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING, logger.name):  # commands in the same process have quietened it
        yield logger
    logger.removeHandler(caplog.handler)


def test_loading_reports_nothing_that_is_no_news(converted, tmp_path, reports, caplog):
    """Not the codebook, not an earlier adapter, whatever the names of the adapters are."""
    model = MedCTModel.from_pretrained(converted)
    names = ("a", "b", "lora", "default")
    folders = [save_adapter(converted, tmp_path / name, seed=seed) for seed, name in enumerate(names)]
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        for folder in folders:
            model.load_adapter(str(folder), folder.name)
    assert (caplog.text, [str(remark.message) for remark in remarks]) == ("", [])


def test_a_report_of_what_went_wrong_is_shown(reports, caplog):
    with pytest.raises(RuntimeError), without_load_report():
        reports.warning("MedCTModel LOAD REPORT from: x")
        assert caplog.text == ""
        raise RuntimeError
    assert "LOAD REPORT" in caplog.text
    reports.warning("the next LOAD REPORT")
    assert "the next" in caplog.text


@pytest.mark.parametrize(
    "more", [{"modules_to_save": ["visual_projection"]}, {"trainable_token_indices": [0, 1, 2, 3, 4]}], ids="".join
)
def test_an_adapter_with_a_whole_module_gives_way_to_one_without(converted, adapter, batch, more, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **more)
    whole = get_peft_model(MedCTModel.from_pretrained(converted), config)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "modules_to_save" in name or "tokens_delta" in name:
                parameter.mul_(-1)
    whole.save_pretrained(tmp_path / "whole")
    alone = {}
    for name, folder in (("whole", tmp_path / "whole"), ("plain", adapter)):
        one = MedCTModel.from_pretrained(converted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one.load_adapter(folder)
        alone[name] = logits(one, batch)
    both = MedCTModel.from_pretrained(converted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both.load_adapter(adapter, "plain")
        both.load_adapter(tmp_path / "whole", "whole")
    base = logits(MedCTModel.from_pretrained(converted), batch)
    for name in ("plain", "whole", "plain"):
        both.set_adapter(name)
        assert adapters_in_use(both) == [name]
        torch.testing.assert_close(logits(both, batch), alone[name])
        both.disable_adapters()
        torch.testing.assert_close(logits(both, batch), base)
        both.enable_adapters()
        assert adapters_in_use(both) == [name]
        torch.testing.assert_close(logits(both, batch), alone[name])
    with pytest.raises(ValueError, match="not found"):
        both.set_adapter("neither")
    torch.testing.assert_close(logits(both, batch), alone["plain"])
    both.delete_adapter("whole")
    torch.testing.assert_close(logits(both, batch), alone["plain"])


def test_a_model_is_its_base_again_without_its_last_adapter(model, adapter, other_adapter, batch, tmp_path):
    modules = [(name, type(module)) for name, module in model.named_modules()]
    before = logits(model, batch)
    model.load_adapter(adapter, "a")
    model.load_adapter(other_adapter, "b")
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    layer.merge()
    with pytest.raises(AdapterMismatchError, match="Unmerge it first"):
        model.delete_adapter("a")
    layer.unmerge()
    model.delete_adapter(["a", "b"])
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    torch.testing.assert_close(logits(model, batch), before)
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(MedCTModel.from_pretrained(tmp_path / "again"), batch), before)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_a_model_in_another_precision_asks_what_its_adapter_asks(model, converted, edited, cast, tmp_path):
    with pytest.warns(UserWarning, match="label_names"):
        model.load_adapter(edited(label_names=["a", "b"], thresholds={"a": 0.2}))
    described = model.adapter_description("default")
    for change in (getattr(model, cast), model.float):
        change()
        assert asked_config(model).label_names == ["a", "b"]
        assert model.adapter_description("default") == described
    model.save_pretrained(tmp_path / "again")
    own = {"adapter_fingerprint": adapter_fingerprint(tmp_path / "again")}
    assert read_description(tmp_path / "again") == described | own
    again = MedCTModel.from_pretrained(converted)
    with pytest.warns(UserWarning, match="label_names") as told:
        again.load_adapter(tmp_path / "again")
    assert again.adapter_description("default") == described | own and len(told) == 1


@pytest.mark.parametrize("other", [{}, {"lora_dropout": 0.1}, {"lora_alpha": 3}, {"use_rslora": True}], ids=str)
def test_a_swapped_adapter_is_the_one_that_was_given_or_refused(model, converted, adapter, batch, other, tmp_path):
    """transformers puts the weights into the old one's layers, whose scale stays what it was."""
    folder = save_adapter(converted, tmp_path / "other", seed=1, **other)
    model.load_adapter(folder, "alone")
    expected = logits(model, batch)
    model.load_adapter(adapter, "site")
    before = logits(model, batch)
    model.set_adapter_strength("site", 0.5)
    if other.keys() - {"lora_dropout"}:
        with pytest.raises(AdapterMismatchError, match=f"has another {min(other)} than"):
            model.load_adapter(folder, "site", hotswap=True)
        model.set_adapter_strength("site", 1)
        assert torch.equal(logits(model, batch), before)
    else:
        model.load_adapter(folder, "site", hotswap=True)
        assert torch.equal(logits(model, batch), expected)
        assert model.adapter_description("site") == read_description(folder)


NAMED = {
    "loaded": lambda model, adapter, config: model.load_adapter(adapter, "new"),
    "added": lambda model, adapter, config: model.add_adapter(config, "new"),
    "set": lambda model, adapter, config: model.set_adapter("old"),
}


@pytest.mark.parametrize("named", NAMED)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_an_adapter_that_is_named_is_in_use_though_all_were_disabled(model, adapter, batch, named):
    """Else the layers that only the new one has would work, and those that both have would not."""
    config = LoraConfig(r=2, target_modules=["k_proj", "q_proj", "query"], init_lora_weights=False)
    model.load_adapter(adapter, "alone")
    expected = logits(model, batch)
    model.delete_adapter("alone")
    model.add_adapter(config, "old") if named != "set" else model.load_adapter(adapter, "old")
    model.disable_adapters()
    NAMED[named](model, adapter, config)
    assert adapters_in_use(model) == ["old" if named == "set" else "new"]
    assert not any(getattr(module, "disable_adapters", None) is True for module in model.modules())
    assert named == "added" or torch.equal(logits(model, batch), expected)


def test_of_several_adapters_together_none_is_remembered(model, adapter):
    """Their scores are neither one's."""
    for name in ("one", "other"):
        model.load_adapter(adapter, name)
    assert description_in_use(model)
    model.set_adapter(["one", "other"])
    assert description_in_use(model) == {}


@pytest.mark.parametrize("name", ["0", "q_proj", "vision_model", "weight"])
def test_an_adapter_cannot_be_called_like_a_part(model, adapter, name):
    with pytest.raises(AdapterMismatchError, match=f"A part of the model is called '{name}'"):
        model.load_adapter(adapter, name)
    model.load_adapter(adapter, "fold0")


def test_a_loaded_adapter_that_is_saved_again_remembers(model, converted, adapter, tmp_path):
    model.load_adapter(adapter)
    for use in (model.disable_adapters, model.enable_adapters):
        use()
        model.save_pretrained(tmp_path / "again")
        assert read_description(tmp_path / "again") == read_description(adapter)
    again = MedCTModel.from_pretrained(converted)
    again.load_adapter(tmp_path / "again")
    with torch.no_grad():
        next(each for name, each in model.named_parameters() if "lora_B" in name).add_(1)
    for folder in ("changed", "again"):
        model.save_pretrained(tmp_path / folder)
        assert read_description(tmp_path / folder) is None


@pytest.mark.parametrize("described", ["its own", "another", "nothing"])
def test_operating_points_hold_for_the_weights_that_they_were_chosen_for(model, converted, edited, described, tmp_path):
    """PEFT alone saves weights and knows nothing of the description that lies there."""
    fingerprints = {"another": None, "nothing": {"adapter_fingerprint": None}}
    chosen = {"thresholds": {"x": 0.2}, "calibration": {"x": [1, 0]}, "operating_points": {"all": {"x": 0.1}}}
    folder = edited(**chosen, **fingerprints.get(described) or {})
    remembered = read_description(folder)
    if described != "its own":
        peft = PeftModel.from_pretrained(MedCTModel.from_pretrained(converted), folder, is_trainable=True)
        with torch.no_grad():
            next(each for name, each in peft.named_parameters() if "lora_B" in name).add_(1)
        peft.save_pretrained(folder)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        model.load_adapter(folder)
    is_told = any("other weights than its operating points" in str(each.message) for each in told)
    assert is_told == (described == "another")
    left = {key: value for key, value in remembered.items() if not is_told or key not in chosen}
    assert model.adapter_description("default") == left


@pytest.mark.parametrize("begins", [True, "gaussian", "orthogonal", "eva", "mica", "olora", "pissa", "pissa_niter_4"])
@pytest.mark.filterwarnings("ignore:.*`eva_config` is not specified")
def test_an_adapter_that_changes_its_base_stands_alone(model, adapter, begins):
    """Else the others' scores, and those of the base, would become others without a word."""
    before = fingerprint(model)
    config = LoraConfig(r=2, target_modules=["query"], init_lora_weights=begins)
    model.add_adapter(config, "other")
    if fingerprint(model) == before:
        model.load_adapter(adapter, "plain")
        model.disable_adapters()
        return
    with pytest.raises(AdapterMismatchError, match="without it this is not the base"):
        model.disable_adapters()
    with pytest.raises(AdapterMismatchError, match="without it this is not the base"):
        model.delete_adapter("other")
    with pytest.raises(AdapterMismatchError):
        model.load_adapter(adapter, "plain")


@pytest.mark.parametrize("change", [{"bias": "lora_only"}, {"init_lora_weights": "pissa"}])
def test_beside_another_no_adapter_changes_the_base(model, converted, adapter, change, tmp_path):
    model.load_adapter(adapter, "plain")
    before = fingerprint(model)
    folder = save_adapter(converted, tmp_path / "other", **change)
    (folder / "medct_adapter.json").unlink()
    peft_config = PeftConfig.from_pretrained(folder)
    for put_on in (
        lambda: model.load_adapter(folder, "other"),
        lambda: model.load_adapter(None, "other", adapter_state_dict={}, peft_config=peft_config),
        lambda: model.add_adapter(peft_config, "other"),
    ):
        with pytest.raises(AdapterMismatchError, match="cannot lie beside another"):
            put_on()
    assert fingerprint(model) == before and list(model.peft_config) == ["plain"]


@pytest.mark.filterwarnings("ignore:.*corda_config")
@pytest.mark.parametrize("begins", ["pissa_niter_4", "lora_ga", "corda"])
def test_what_was_taken_out_of_the_base_only_once_is_refused(model, edited, begins, batch):
    """PEFT would take out something else on loading, or nothing, and score with that without a word."""
    before, folder = logits(model, batch), edited()
    config_file = folder / "adapter_config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"init_lora_weights": begins}))
    with pytest.raises(AdapterMismatchError, match="save it as plain LoRA"):
        model.load_adapter(folder)
    torch.testing.assert_close(logits(model, batch), before)


def test_what_cannot_be_checked_is_said(model, converted, tmp_path):
    config = AdaLoraConfig(init_r=2, target_modules=["q_proj"], total_step=9)
    get_peft_model(MedCTModel.from_pretrained(converted), config).save_pretrained(tmp_path)
    config_file = tmp_path / "adapter_config.json"
    pruned = {"vision_model.spatial_encoder.layers.0.self_attn.q_proj.lora_E": [True, False]}
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"rank_pattern": pruned}))
    with pytest.raises(AdapterMismatchError, match=r"so it cannot be checked\. Load it with"):
        check_fit(model, tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        VeraConfig(r=2, target_modules=["q_proj"]),
        VBLoRAConfig(r=2, num_vectors=4, vector_length=4, topk=2, target_modules=["q_proj"]),
        RandLoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        LoHaConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_what_peft_saves_is_what_is_asked_for(model, converted, config, tmp_path):
    """Also of kinds that transformers does not load, for which PEFT's own loader is asked."""
    config.task_type, task = None, config.task_type
    peft = get_peft_model(MedCTModel.from_pretrained(converted), config)
    config.task_type = task
    peft.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="it is not known") as warned:
        check_fit(model, tmp_path)
    assert len(warned) == 1
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop(max(tensors))
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterMismatchError, match="lacks 1 of"):
        check_fit(model, tmp_path)


def test_an_adapters_questions_leave_those_of_its_base_alone(monkeypatch):
    described = {"label_names": ["x", "y"], "prompt_templates": [["a {label}", "b {label}"]], "prompts": {"x": "z"}}
    config = MedCTConfig()
    own = config.to_dict()
    asked = as_described(config, described)
    assert asked.label_names == ["x", "y"] and asked.label_prompts() == [["a z", "b z", "a y", "b y"]]
    assert config.to_dict() == own
    # A classifier has its head's labels, whatever an adapter says.
    monkeypatch.setattr(adapters_medct, "description_in_use", lambda model: described)
    assert asked_config(SimpleNamespace(config=config)).label_names == ["x", "y"]
    assert asked_config(SimpleNamespace(config=config, classifier=None)) is config
