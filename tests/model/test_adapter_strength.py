"""An adapter at less than its whole strength, and the probabilities that it brings at its own."""

import json
import math

import pytest
import torch
from adapter_files import RESULTS, save_adapter
from peft import IA3Config, get_peft_model

from medct import MedCTModel
from medct.adapters_medct import DESCRIPTION_FILE, calibrated, describe_adapter
from medct.pipeline_medct import ZeroShotCTClassificationPipeline

CALIBRATION = {"Emphysema": [0.5, -1.0]}


@pytest.fixture(scope="module")
def adapter(converted, tmp_path_factory):
    """On both encoders, with a calibration for one finding."""
    folder = save_adapter(converted, tmp_path_factory.mktemp("strength") / "adapter", results=RESULTS, use_rslora=True)
    path = folder / DESCRIPTION_FILE
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"calibration": CALIBRATION}), encoding="utf-8"
    )
    return folder


@pytest.fixture
def scan(nifti):
    generator = torch.Generator().manual_seed(0)
    return nifti(torch.randint(-1000, 1000, (12, 9, 5), generator=generator).short().numpy())


def finding(results: list[dict], label: str = "Emphysema") -> dict:
    return next(each for each in results if each["label"] == label)


def test_from_the_base_to_the_whole_adapter(model, adapter, batch):
    with torch.no_grad():
        base = model(**batch).logits_per_image
        model.load_adapter(str(adapter), adapter_name="site")
        whole = model.eval()(**batch).logits_per_image
        assert model.adapter_strength("site") == pytest.approx(1)
        model.set_adapter_strength("site", 0)
        assert torch.equal(model(**batch).logits_per_image, base)
        model.set_adapter_strength("site", 0.25)
        assert model.adapter_strength("site") == pytest.approx(0.25)
        part = model(**batch).logits_per_image
        assert not torch.allclose(part, base) and not torch.allclose(part, whole)
        model.set_adapter_strength("site", 1)
        assert torch.equal(model(**batch).logits_per_image, whole)


def test_of_an_adapter_whose_alpha_is_0_any_part_is_nothing(model, converted, batch, tmp_path):
    adapter = save_adapter(converted, tmp_path / "adapter", results=RESULTS, lora_alpha=0)
    with torch.no_grad():
        base = model.eval()(**batch).logits_per_image
        model.load_adapter(str(adapter))
        assert torch.equal(model(**batch).logits_per_image, base)
        assert model.adapter_description("default")["thresholds"] == RESULTS["thresholds"]
        model.set_adapter_strength(strength=0.5)
        assert torch.equal(model(**batch).logits_per_image, base)


def test_a_part_of_the_strength_is_that_part_of_the_update(model, converted, adapter, batch):
    model.load_adapter(str(adapter))
    model.set_adapter_strength(strength=0.5)
    other = MedCTModel.from_pretrained(converted).eval()
    other.load_adapter(str(adapter))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.5)
        expected = other(**batch).logits_per_image
        torch.testing.assert_close(model.eval()(**batch).logits_per_image, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_strengths_that_are_none_are_refused(model, adapter, strength):
    model.load_adapter(str(adapter))
    with pytest.raises(ValueError, match="Pass a number, 0 or more"):
        model.set_adapter_strength("default", strength)


def test_an_unknown_adapter_is_named(model, adapter):
    with pytest.raises(ValueError, match=r"no LoRA adapter 'site'\. Loaded: none"):
        model.set_adapter_strength("site", 0.5)
    model.load_adapter(str(adapter))
    with pytest.raises(ValueError, match=r"no LoRA adapter 'site'\. Loaded: default"):
        model.set_adapter_strength("site", 0.5)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"modules_to_save": ["logit_scale"]}], ids=["dora", "modules"])
def test_what_does_not_scale_is_refused(model, converted, config, tmp_path):
    model.load_adapter(str(save_adapter(converted, tmp_path / "adapter", **config)))
    with pytest.raises(ValueError, match="strength cannot be set"):
        model.set_adapter_strength("default", 0.5)


def test_a_merged_adapter_is_refused_another_strength(model, adapter):
    """Its update is in the weights: nothing would change but what is said of it."""
    model.load_adapter(str(adapter))
    for layer in model._lora_layers("default"):
        layer.merge()
    with pytest.raises(ValueError, match="The adapter 'default' is merged"):
        model.set_adapter_strength(strength=0.5)
    assert model.adapter_strength() == 1


def test_probabilities_come_with_the_score_at_the_adapters_own_strength(model, processor, adapter, scan):
    pipe = ZeroShotCTClassificationPipeline(model=model, processor=processor, device="cpu")
    base = finding(pipe(scan))
    assert "probability" not in base
    pipe.model.load_adapter(str(adapter))
    adapted = finding(pipe(scan))
    assert adapted["probability"] == pytest.approx(float(calibrated(adapted["score"], *CALIBRATION["Emphysema"])))
    assert "present" in adapted and "probability" not in finding(pipe(scan), "Lung nodule")
    pipe.model.set_adapter_strength("default", 0.5)
    half = finding(pipe(scan))
    assert not {"probability", "present"} & half.keys()
    pipe.model.set_adapter_strength("default", 0)
    assert finding(pipe(scan))["score"] == base["score"]  # prompts, too, are those of the base
    pipe.model.set_adapter_strength("default", 1)
    assert finding(pipe(scan)) == adapted
    own = pipe(scan, prompt_templates=[("{label} seen.", "{label} not seen.")])
    assert not {"probability", "present"} & finding(own).keys()


def test_an_adapter_of_another_strength_is_still_that_adapter(model, adapter):
    """Its description stays, but for what was measured at the stored strength; PEFT's own ways count as well."""
    model.load_adapter(str(adapter))
    whole = model.adapter_description("default")
    assert whole["thresholds"] and whole["calibration"] == CALIBRATION
    model.set_adapter_strength("default", 0.5)
    left = model.adapter_description("default")
    assert whole.keys() - left.keys() == {"thresholds", "calibration", "operating_points"}
    assert all(whole[key] == value for key, value in left.items())
    model.set_adapter_strength("default", 1)
    assert model.adapter_description("default") == whole
    layer = next(module for module in model.modules() if hasattr(module, "lora_alpha"))
    layer.scale_layer(0.5)
    assert model.adapter_description("default") == left
    assert math.isnan(model.adapter_strength("default"))


def test_an_adapter_that_does_not_scale_keeps_its_operating_points(model, converted, processor, scan, tmp_path):
    """Not every kind of adapter has a strength."""
    config = IA3Config(target_modules=r".*\.(k_proj|v_proj)", feedforward_modules=[], task_type="FEATURE_EXTRACTION")
    peft = get_peft_model(MedCTModel.from_pretrained(converted), config)
    peft.save_pretrained(tmp_path / "ia3")
    describe_adapter(peft, tmp_path / "ia3", base=str(converted), thresholds={"Emphysema": 0.3})
    pipe = ZeroShotCTClassificationPipeline(
        model=model, processor=processor, device="cpu", adapter=str(tmp_path / "ia3")
    )
    assert "present" in finding(pipe(scan))
    with pytest.raises(ValueError, match="no LoRA adapter 'default'"):
        model.set_adapter_strength("default", 0.5)
