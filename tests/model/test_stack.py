"""At home in the Hugging Face stack: what its tools do to the model changes no score in silence."""

import copy
import json
import shutil
import sys
import threading
import warnings
from functools import reduce

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from adapter_files import RESULTS, save_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, Trainer, TrainingArguments, pipeline

from medct import (
    AdapterMismatchError,
    CheckpointMismatchError,
    CTClassificationPipeline,
    MedCTConfig,
    MedCTForImageClassification,
    MedCTImageProcessor,
    MedCTModel,
    MedCTProcessor,
    MedCTVisionModel,
    ProcessorMismatchError,
    ZeroShotCTClassificationPipeline,
    check_fit,
)
from medct.adapters_medct import base_tensors, fingerprint
from medct.configuration_medct import CLASSIFIER_TASK, ZERO_SHOT_TASK
from medct.publishing.loading import ModelError, load_model

VISION = r"vision_model\..*\.(q|v)_proj"


@pytest.fixture
def scan(processor) -> np.ndarray:
    shape = processor.image_processor.image_size
    return np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)


def scores(pipe, scan) -> dict[str, float]:
    spacing_mm = pipe.processor.image_processor.target_spacing_mm
    return {found["label"]: found["score"] for found in pipe(scan, spacing_mm=spacing_mm)}


# weights and class


def test_methods_take_arguments_by_the_names_that_the_library_gives_them(converted, adapters, tmp_path):
    model = MedCTModel.from_pretrained(pretrained_model_name_or_path=converted)
    model.load_adapter(peft_model_id=adapters[0], adapter_name="a")
    model.set_adapter(adapter_name="a")
    model.save_pretrained(save_directory=tmp_path)
    model.delete_adapter(adapter_names="a")
    model.add_adapter(adapter_config=LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="b")


@pytest.mark.parametrize("load", [MedCTModel.from_pretrained, AutoModel.from_pretrained])
def test_a_classifier_is_no_zero_shot_model(classifier_folder, load):
    with pytest.raises(CheckpointMismatchError, match=r"lacks the text encoder \(.*saved as MedCTForImageClassif"):
        load(classifier_folder)


def test_a_checkpoint_with_missing_or_unexpected_weights_is_refused(model, classifier_folder, tmp_path):
    state = model.state_dict()
    for name, changed in {
        "less": {key: value for key, value in state.items() if "spatial_encoder.layers.0.mlp" not in key},
        "more": state | {"classifier.weight": torch.zeros(2, 2)},
    }.items():
        model.save_pretrained(tmp_path / name, state_dict=changed)
        said = "lacks the vision" if name == "less" else "has the classif"
        # No word of loading it as the class that it is refused as.
        with pytest.raises(CheckpointMismatchError, match=rf"{said}.*\. Its weights .*: save or copy it again"):
            MedCTModel.from_pretrained(tmp_path / name)
    with pytest.raises(CheckpointMismatchError, match="lacks the vision encoder"):
        MedCTForImageClassification.from_pretrained(tmp_path / "less")
    with pytest.raises(CheckpointMismatchError, match="lacks"):
        MedCTVisionModel.from_pretrained(tmp_path / "less")


def test_a_base_is_the_beginning_of_a_classifier(converted):
    begun = AutoModelForImageClassification.from_pretrained(converted, num_labels=3)
    assert begun.classifier.out_features == 3


def test_the_pipelines_tell_the_models_apart(classifier_folder, converted, scan):
    with pytest.raises(ValueError, match="lacks the text encoder"):
        pipeline(ZERO_SHOT_TASK, model=str(classifier_folder), device="cpu")
    model = MedCTForImageClassification.from_pretrained(classifier_folder)
    with pytest.raises(ValueError, match="has no text encoder"):
        pipeline(ZERO_SHOT_TASK, model=model, device="cpu")
    with pytest.raises(ValueError, match="has no classifier"):
        pipeline(CLASSIFIER_TASK, model=MedCTModel.from_pretrained(converted), device="cpu")


def test_the_pipeline_of_a_classifier_gives_its_sigmoids(classifier_folder, scan):
    model = MedCTForImageClassification.from_pretrained(classifier_folder).eval()
    for pipe in (
        pipeline(CLASSIFIER_TASK, model=str(classifier_folder), device="cpu"),
        pipeline(model=str(classifier_folder), trust_remote_code=True, device="cpu"),
        pipeline(CLASSIFIER_TASK, model=model, device="cpu"),
    ):
        assert type(pipe) is CTClassificationPipeline
        images = pipe.processor.image_processor
        pixel_values = images(scan, spacing_mm=images.target_spacing_mm, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = model(pixel_values).logits.sigmoid()[0].tolist()
        assert scores(pipe, scan) == pytest.approx(dict(zip(model.config.label_names, expected, strict=True)))
    spacing_mm = images.target_spacing_mm
    (one,) = pipe(scan, spacing_mm=spacing_mm, candidate_labels=["Emphysema"])
    assert one["label"] == "Emphysema"
    assert one["score"] == scores(pipe, scan)["Emphysema"]
    with pytest.raises(ValueError, match="not trained on Rib fracture"):
        pipe(scan, spacing_mm=spacing_mm, candidate_labels=["Rib fracture"])
    with pytest.raises(ValueError, match="not asked in words"):
        pipe(scan, spacing_mm=spacing_mm, prompt_templates=[("{label}", "no {label}")])


def test_a_head_that_was_drawn_at_random_finds_nothing(converted, classifier_folder, scan, tmp_path):
    with pytest.raises(ValueError, match="initialised at random"):
        pipeline(CLASSIFIER_TASK, model=str(converted), device="cpu")
    options = {"num_labels": 2, "ignore_mismatched_sizes": True}
    begun = AutoModelForImageClassification.from_pretrained(classifier_folder, **options)
    for same in (begun, copy.deepcopy(begun).bfloat16()):
        with pytest.raises(ValueError, match="initialised at random"):
            pipeline(CLASSIFIER_TASK, model=same, device="cpu")
    adapted = AutoModelForImageClassification.from_pretrained(converted, num_labels=2)
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
    get_peft_model(adapted, lora).save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(converted, num_labels=2)
    with pytest.warns(UserWarning, match="it is not known"):
        pipe = pipeline(CLASSIFIER_TASK, model=again, device="cpu", adapter=str(tmp_path))
    assert len(scores(pipe, scan)) == 2
    again.disable_adapters()
    with pytest.raises(ValueError, match="initialised at random"):
        scores(pipe, scan)
    with torch.no_grad():
        begun.classifier.bias.add_(1)
    assert len(scores(pipeline(CLASSIFIER_TASK, model=begun, device="cpu"), scan)) == 2


@pytest.mark.parametrize("of_head", [{"modules_to_save": ["classifier"]}, {"target_modules": ["q_proj", "classifier"]}])
def test_a_head_that_was_drawn_at_random_is_known_as_such_in_an_adapter(converted, scan, of_head):
    """Whether it is a copy of its own that nobody has trained, or the base's: next time that is another."""
    begun = AutoModelForImageClassification.from_pretrained(converted, num_labels=2)
    adapted = get_peft_model(begun, LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | of_head))
    processor = MedCTProcessor.from_pretrained(converted)

    def pipe_of():
        return pipeline(CLASSIFIER_TASK, model=adapted, processor=processor, device="cpu")

    with pytest.raises(ValueError, match=r"initialised at random.* by `modules_to_save`"):
        pipe_of()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad and "classifier" in name:
                weight.add_(1)
    if "modules_to_save" in of_head:
        assert len(scores(pipe_of(), scan)) == 2
    else:
        with pytest.raises(ValueError, match="initialised at random"):
            pipe_of()
    adapted.merge_and_unload()
    assert not begun.is_drawn


def test_a_head_that_was_drawn_at_random_is_known_as_such_where_it_is_offloaded(converted, tmp_path):
    begun = AutoModelForImageClassification.from_pretrained(converted, num_labels=2)
    places = {name: "cpu" for name, _ in begun.named_children()} | {"classifier": "disk"}
    offloaded = dispatch_model(begun, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert offloaded.classifier.weight.is_meta
    assert offloaded.is_drawn


def test_a_head_that_was_drawn_at_random_is_known_as_such_on_disk(classifier_folder, processor, scan, tmp_path):
    options = {"num_labels": 2, "ignore_mismatched_sizes": True}
    begun = AutoModelForImageClassification.from_pretrained(classifier_folder, **options)
    processor.save_pretrained(tmp_path)
    for _ in range(2):  # saved again untrained, too
        begun.save_pretrained(tmp_path)
        begun = AutoModelForImageClassification.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="initialised at random"):
            pipeline(CLASSIFIER_TASK, model=str(tmp_path), device="cpu")
    with torch.no_grad():
        begun.classifier.bias.add_(1)
    begun.save_pretrained(tmp_path)
    assert len(scores(pipeline(CLASSIFIER_TASK, model=str(tmp_path), device="cpu"), scan)) == 2


def test_a_codebook_that_was_drawn_at_random_finds_nothing(converted, model):
    """It is a buffer and no parameter, and was set aside for one of another size."""
    other = {"codebook_size": 2 * model.config.vision_config.codebook_size}
    drawn = MedCTModel.from_pretrained(converted, vision_config=other, ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match="initialised at random"):
        pipeline(ZERO_SHOT_TASK, model=drawn, device="cpu")


def test_a_checkpoint_without_its_head_is_refused(classifier_folder, tmp_path):
    shutil.copytree(classifier_folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointMismatchError, match=r"lacks classifier\.weight, which would be"):
        load_model(str(tmp_path))


# model and processor


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hu_min", -1200),
        ("hu_max", 600),
        ("hu_per_unit", 500),
        ("target_spacing_mm", [1, 1, 1]),
        ("image_size", [8, 12, 16]),
        ("orientation", "SRP"),
    ],
)
def test_a_processor_of_another_preprocessing_is_refused(model, processor, name, value):
    setattr(processor.image_processor, name, value)
    with pytest.raises(ProcessorMismatchError, match=f"has {name} .*, the model"):
        ZeroShotCTClassificationPipeline(model=model, processor=processor, device="cpu")
    processor.image_processor = MedCTImageProcessor.from_config(model.config.vision_config)
    pipe = ZeroShotCTClassificationPipeline(model=model, processor=processor, device="cpu")
    setattr(processor.image_processor, name, value)
    with pytest.raises(ProcessorMismatchError, match=f"has {name} .*, the model"):
        pipe.encode(torch.zeros(1, 1, *model.config.vision_config.image_size))


FROM_A_NEWER_VERSION = {
    "the model's": ("config.json", []),
    "the vision encoder's": ("config.json", ["vision_config"]),
    "the processor's": ("processor_config.json", []),
    "the image processor's": ("processor_config.json", ["image_processor"]),
}


@pytest.mark.parametrize("case", FROM_A_NEWER_VERSION)
def test_settings_that_a_newer_version_wrote_are_refused(converted, tmp_path, case):
    """Whoever goes on without them scores with another model, or other voxels."""
    name, place = FROM_A_NEWER_VERSION[case]
    folder = shutil.copytree(converted, tmp_path / "base")
    content = json.loads((folder / name).read_text())
    reduce(dict.__getitem__, place, content)["hu_curve"] = "log"
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(
        ModelError, match=rf"^{folder}: The .* a setting 'hu_curve' that this version .* update MedCT\.$"
    ):
        load_model(str(folder))


def test_settings_of_the_library_are_no_unknown_ones(converted, tmp_path):
    config = MedCTConfig.from_pretrained(converted, attn_implementation="eager", num_labels=18)
    config.use_cache, config.quantization_config = False, {"quant_method": "any"}
    config.save_pretrained(tmp_path)
    assert MedCTConfig.from_pretrained(tmp_path, dtype="bfloat16").quantization_config


@pytest.mark.parametrize("texts", [[], (), [1], [None]])
def test_texts_that_are_none_are_refused(processor, texts):
    with pytest.raises(ValueError, match="`text` is a sentence or a list"):
        processor(text=texts, return_tensors="pt")


def test_padding_on_the_left_changes_no_text(model, processor):
    texts = ["a b c d e", "a"]
    right = processor(text=texts, return_tensors="pt")
    left = processor(text=texts, return_tensors="pt", padding_side="left")
    assert left["attention_mask"][1, 0] == 0
    with torch.no_grad():
        embeds = [model.get_text_features(**each).pooler_output for each in (right, left)]
    assert torch.equal(*embeds)


# what is kept


@pytest.fixture(scope="module")
def adapters(converted, tmp_path_factory):
    """Folders of two adapters, the first with an operating point."""
    folder = tmp_path_factory.mktemp("adapters")
    results = RESULTS | {"thresholds": {"Lung nodule": 0.5}}
    return [
        str(save_adapter(converted, folder / "a", results=results)),
        str(save_adapter(converted, folder / "b", seed=1)),
    ]


def _switch(model, adapters):
    model.set_adapter("b")


def _disable(model, adapters):
    model.base_model.disable_adapter_layers()


def _hotswap(model, adapters):
    hotswap_adapter(model, adapters[1], adapter_name="a")


def _same_name_again(model, adapters):
    model.set_adapter("b")
    model.delete_adapter("a")
    model.load_adapter(adapters[1], adapter_name="a")
    model.set_adapter("a")


def _rescale(model, adapters):
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("a", 0.5)


def _train(model, adapters):
    model.get_base_model().text_projection.weight.data.normal_(generator=torch.Generator().manual_seed(0))


def _merge(model, adapters):
    model.base_model.merge_adapter()


@pytest.mark.parametrize("change", [_switch, _disable, _hotswap, _same_name_again, _rescale, _train, _merge])
@pytest.mark.filterwarnings("ignore:Adapter name 'a' should not be contained")
def test_prompts_are_those_of_the_weights_as_they_are(converted, processor, adapters, scan, change):
    model = PeftModel.from_pretrained(MedCTModel.from_pretrained(converted), adapters[0], adapter_name="a")
    model.load_adapter(adapters[1], adapter_name="b")
    used = ZeroShotCTClassificationPipeline(model=model, processor=processor, device="cpu")
    before = scores(used, scan)
    change(model, adapters)
    fresh = ZeroShotCTClassificationPipeline(model=model, processor=processor, device="cpu")
    after = scores(used, scan)
    assert after == scores(fresh, scan)
    if change is not _merge:
        assert max(abs(after[label] - before[label]) for label in before) > 1e-4


@pytest.fixture
def switch_often():
    """Makes a rare event frequent."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_threads_get_what_they_asked_for(model, processor, scan, switch_often):
    pipe = ZeroShotCTClassificationPipeline(model=model, processor=processor, device="cpu")
    images = processor.image_processor
    inputs = images(scan, spacing_mm=images.target_spacing_mm, return_tensors="pt")
    labels = ["a", "b", "c", "d"]
    right = {label: pipe.forward(inputs, candidate_labels=[label])["logits"] for label in labels}
    wrong = []

    def ask(label):
        for _ in range(25):
            if not torch.equal(pipe.forward(inputs, candidate_labels=[label])["logits"], right[label]):
                wrong.append(label)

    threads = [threading.Thread(target=ask, args=(label,)) for label in labels]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_operating_points_follow_the_adapter(model, processor, adapters):
    pipe = ZeroShotCTClassificationPipeline(model=model, processor=processor, device="cpu", adapter=adapters[0])
    assert pipe.thresholds == {"Lung nodule": 0.5}
    trained = next(parameter for name, parameter in model.named_parameters() if "lora_B.default" in name)
    before = trained.data.clone()
    trained.data.add_(1)
    assert pipe.thresholds == {}
    trained.data.copy_(before)
    assert pipe.thresholds == {"Lung nodule": 0.5}
    model.delete_adapter("default")
    model.add_adapter(LoraConfig(r=4, target_modules=VISION), adapter_name="default")
    assert pipe.thresholds == {}


# adapters


@pytest.mark.parametrize(
    "config",
    [
        {"trainable_token_indices": [1, 2]},
        {"target_modules": ["word_embeddings", "q_proj"]},
        {"modules_to_save": ["visual_projection", "logit_scale"]},
        {"use_dora": True},
    ],
)
def test_no_adapter_changes_the_fingerprint(model, config):
    before, names = fingerprint(model), base_tensors(model).keys()
    adapted = get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj", "query"]} | config))
    assert base_tensors(adapted.get_base_model()).keys() == names
    assert fingerprint(adapted) == before


class Int8(nn.Module):
    """A quantized Linear as libraries make them."""

    def __init__(self, linear):
        super().__init__()
        self.scale = nn.Parameter(linear.weight.detach().abs().max() / 127)
        self.register_buffer("weight", (linear.weight.detach() / self.scale.detach()).round().to(torch.int8))

    def forward(self, rows):
        return nn.functional.linear(rows, self.weight * self.scale)


def test_an_adapter_on_a_quantized_base_is_compared_with_the_file(converted, adapters, tmp_path):
    def quantized(folder):
        model = MedCTModel.from_pretrained(folder)
        mlp = model.vision_model.temporal_encoder.layers[0].mlp
        mlp.fc2 = Int8(mlp.fc2)
        return model

    with pytest.warns(UserWarning, match=r"torch\.int8.*the file that they were made of"):
        quantized(converted).load_adapter(adapters[0])
    other = MedCTModel.from_pretrained(converted)
    other.visual_projection.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterMismatchError, match="other weights"):
        quantized(tmp_path / "other").load_adapter(adapters[0])
    nowhere = quantized(converted)
    nowhere.name_or_path = ""
    assert fingerprint(nowhere) is None
    with pytest.warns(UserWarning, match="It is not known"):
        check_fit(nowhere, adapters[0])


@pytest.mark.parametrize("where", ["subfolder", "revision"])
def test_files_are_those_that_the_model_was_loaded_from(converted, hub, monkeypatch, tmp_path, where):
    """Not others of the same name, in another folder or of another commit."""
    other = MedCTModel.from_pretrained(converted)
    expected = fingerprint(other)
    other.logit_scale.weight.data += 1
    other.save_pretrained(tmp_path)
    name, options = tmp_path, {"subfolder": "ours"}
    if where == "subfolder":
        shutil.copytree(converted, tmp_path / "ours")
    else:
        hub.connect(monkeypatch)
        ours, theirs = ({path.name: path.read_bytes() for path in each.iterdir()} for each in (converted, tmp_path))
        name, cache = "org/base", {"cache_dir": tmp_path / "cache"}
        options = cache | {"revision": hub.add_files("model", name, ours)}
        hub.add_files("model", name, theirs)
        assert fingerprint(MedCTModel.from_pretrained(name, **cache)) == fingerprint(other)
    model = MedCTModel.from_pretrained(name, **options)
    assert type(pipeline(ZERO_SHOT_TASK, model=model, device="cpu")) is ZeroShotCTClassificationPipeline
    model.visual_projection.to("meta")  # its values are looked up
    assert fingerprint(model) == expected


@pytest.mark.filterwarnings("ignore:.*meta device")
def test_an_offloaded_base_takes_its_adapter(model, converted, adapters, batch, tmp_path):
    adapter = save_adapter(converted, tmp_path / "vision", target_modules=VISION)
    places = {name: "cpu" for name, _ in model.named_children()} | {"text_model": "disk"}
    offloaded = MedCTModel.from_pretrained(converted, device_map=places, offload_folder=tmp_path / "offload").eval()
    assert next(offloaded.text_model.parameters()).is_meta
    assert fingerprint(offloaded) == fingerprint(model)
    with pytest.raises(AdapterMismatchError, match="to layers that are offloaded"):
        offloaded.load_adapter(adapters[0])
    offloaded.load_adapter(adapter)
    model.load_adapter(adapter)
    with torch.no_grad():
        assert torch.equal(offloaded.eval()(**batch).logits_per_image, model.eval()(**batch).logits_per_image)


def _cached(adapter, cache, *, says_absent):
    """An adapter in the Hub's cache as PEFT leaves it, which fetches two files only."""
    commit = "a" * 40
    repo = cache / "models--org--site-b"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit, encoding="utf-8")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(f"{adapter}/{name}", snapshot)
    if says_absent:
        absent = repo / ".no_exist" / commit / "medct_adapter.json"
        absent.parent.mkdir(parents=True)
        absent.touch()


@pytest.mark.parametrize("says_absent", [False, True])
def test_offline_a_description_that_was_never_fetched_is_asked_for(model, adapters, tmp_path, says_absent):
    _cached(adapters[0], tmp_path, says_absent=says_absent)
    options = {"adapter_kwargs": {"cache_dir": str(tmp_path)}}
    if says_absent:
        with pytest.warns(UserWarning, match="it is not known"):
            model.load_adapter("org/site-b", **options)
        return
    with pytest.raises(OSError, match=r"medct_adapter\.json could not be fetched"):
        model.load_adapter("org/site-b", **options)


# Trainer, PEFT, DataParallel


@pytest.mark.parametrize("task_type", [None, "FEATURE_EXTRACTION", "SEQ_CLS"])
def test_what_a_whole_processor_gives_is_taken(converted, batch, task_type):
    classifier = MedCTForImageClassification.from_pretrained(converted).eval()
    with torch.no_grad():
        expected = classifier(batch["pixel_values"]).logits
        features = MedCTModel.from_pretrained(converted).get_image_features(**batch).pooler_output
    assert features.shape[0] == len(batch["pixel_values"])
    config = LoraConfig(r=2, target_modules=VISION, modules_to_save=["classifier"], task_type=task_type)
    adapted = get_peft_model(classifier, config).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(**batch).logits, expected)


class Studies(torch.utils.data.Dataset):
    def __init__(self, pixel_values, labels):
        self.rows = [{"pixel_values": x, "labels": y} for x, y in zip(pixel_values, labels, strict=True)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_the_librarys_trainer_takes_the_mean_whatever_the_accumulation(converted, tmp_path):
    base = MedCTForImageClassification.from_pretrained(converted, classifier_dropout=0.0)
    generator = torch.Generator().manual_seed(0)
    shape = (4, 1, *base.config.vision_config.image_size)
    studies = Studies(torch.rand(shape, generator=generator), torch.rand(4, 18, generator=generator).round())
    logged = []
    for size, steps in ((4, 1), (1, 4)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(size)),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            logging_steps=1,
            optim="sgd",
            max_grad_norm=1e9,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=copy.deepcopy(base), args=arguments, train_dataset=studies)
        trainer.train()
        logged.append(next(log for log in trainer.state.log_history if "loss" in log))
    for key in ("loss", "grad_norm"):
        assert logged[0][key] == pytest.approx(logged[1][key], rel=1e-3)


def test_unknown_labels_add_nothing_to_the_loss(converted, batch):
    classifier = MedCTForImageClassification.from_pretrained(converted).eval()
    labels = torch.ones(3, 18)
    labels[:, 5:] = torch.nan
    loss = classifier(batch["pixel_values"], labels=labels).loss
    logits = classifier(batch["pixel_values"]).logits[:, :5]
    torch.testing.assert_close(loss, nn.functional.binary_cross_entropy_with_logits(logits, torch.ones(3, 5)))


def _replica(model):
    """As `torch.nn.parallel.replicate` makes them, on the CPU: they have no `parameters()`."""
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            setattr(replica, name, copies[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.clone())
        for name, buffer in module._buffers.items():
            setattr(replica, name, buffer)
    return copies[model]


def test_replicas_of_data_parallel_run(model, batch):
    expected = model(**batch, return_loss=True)
    got = _replica(model)(**batch, return_loss=True)
    torch.testing.assert_close(got.loss, expected.loss)


# without a word of remote code


def test_pipelines_take_objects_and_folders_without_trust(converted, model, scan):
    expected = scores(pipeline(ZERO_SHOT_TASK, model=model, device="cpu"), scan)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe = pipeline(ZERO_SHOT_TASK, model=str(converted), device="cpu")
    assert type(pipe) is ZeroShotCTClassificationPipeline
    assert scores(pipe, scan) == expected
    model.config.name_or_path = ""
    fresh = MedCTModel(model.config)
    with pytest.raises(ValueError, match="pass `processor=`"):
        pipeline(ZERO_SHOT_TASK, model=fresh, device="cpu")


@pytest.mark.parametrize("kind", ["flash_attention_2", "flex_attention"])
def test_attention_that_takes_no_bias_is_refused(converted, kind):
    with pytest.raises(ValueError, match="does not support"):
        MedCTModel.from_pretrained(converted, attn_implementation=kind)
