"""Scans in, findings out; with and without the package, adapters and operating points."""

import copy
import json
import multiprocessing
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_files import RESULTS, save_adapter
from datasets import Dataset
from tokenizers.normalizers import Replace
from transformers import pipeline

from medct import (
    AdapterMismatchError,
    CTClassificationPipeline,
    MedCTForImageClassification,
    MedCTModel,
    VolumeError,
    ZeroShotCTClassificationPipeline,
)
from medct.pipeline_medct import PromptError, _LoadScan
from medct.publishing.push import push_adapter, push_model
from medct.workers_medct import LoaderError, Place

# One letter is one word of the small tokenizer.
LABELS = ["a", "b", "c"]
TEMPLATES = [("{label} is present .", "{label} is not present ."), ("{label}", "not {label}")]


@pytest.fixture
def scans(nifti):
    random = np.random.default_rng(0)
    return [
        str(nifti(random.integers(-1000, 1000, (9, 12, 5)).astype(np.int16), name=f"{index}.nii.gz"))
        for index in range(3)
    ]


@pytest.fixture
def adapter(converted, tmp_path):
    """Folder of an adapter that changes the scores, with an operating point for "Lung nodule"."""
    return save_adapter(converted, tmp_path / "adapter", results=RESULTS | {"thresholds": {"Lung nodule": 0.5}})


def by_label(results):
    return {result["label"]: result for result in results}


def test_scores_are_those_of_the_model(pipe, model, processor, scans):
    (prompts,) = model.config.label_prompts(LABELS)
    inputs = processor(images=scans[0], text=prompts, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits_per_image[0].double()
    results = pipe(scans[0], candidate_labels=LABELS)
    assert [result["score"] for result in results] == sorted((r["score"] for r in results), reverse=True)
    for index, label in enumerate(LABELS):
        margin = logits[2 * index] - logits[2 * index + 1]
        result = by_label(results)[label]
        assert result == {"label": label, "score": result["score"], "logits_margin": result["logits_margin"]}
        assert result["logits_margin"] == pytest.approx(margin.item(), abs=1e-5)
        assert result["score"] == pytest.approx(1 / (1 + np.exp(-margin.item())), abs=1e-6)


@pytest.mark.parametrize("task", ["zero-shot-ct-classification", "ct-classification"])
def test_what_is_encoded_once_is_asked_many_times(task, converted, classifier_folder, scans, monkeypatch):
    pipe = pipeline(task, str(converted if task.startswith("zero") else classifier_folder), device="cpu")
    pixel_values = torch.cat([pipe.preprocess(scan)["pixel_values"] for scan in scans])
    expected = pipe.forward({"pixel_values": pixel_values})["logits"]
    encoded = pipe.encode(pixel_values)
    monkeypatch.setattr(pipe.model.vision_model, "forward", None)
    assert torch.equal(pipe.forward(encoded)["logits"], expected)


def test_the_models_own_findings_are_the_default(pipe, model, scans):
    assert set(by_label(pipe(scans[0]))) == set(model.config.label_names)
    assert len(pipe(scans[0])) == 18


def test_templates_are_averaged(pipe, scans):
    each = [by_label(pipe(scans[0], candidate_labels=LABELS, prompt_templates=[pair])) for pair in TEMPLATES]
    both = by_label(pipe(scans[0], candidate_labels=LABELS, prompt_templates=TEMPLATES))
    assert each[0] != each[1]
    for label in LABELS:
        for key in ("score", "logits_margin"):
            assert both[label][key] == pytest.approx((each[0][label][key] + each[1][label][key]) / 2, abs=1e-6)


def test_lists_batches_generators_and_series(pipe, scans):
    single = [pipe(scan, candidate_labels=LABELS) for scan in scans]
    assert pipe([], candidate_labels=LABELS) == []
    for batch_size, num_workers in ((1, 0), (2, 0), (1, 2), (2, 1)):
        options = {"batch_size": batch_size, "num_workers": num_workers, "candidate_labels": LABELS}
        many = pipe(scans, **options)
        lazy = pipe((scan for scan in scans), **options)
        assert not isinstance(lazy, list)
        for results in (many, list(lazy)):
            for found, expected in zip(results, single, strict=True):
                for label in LABELS:
                    assert by_label(found)[label]["score"] == pytest.approx(
                        by_label(expected)[label]["score"], abs=1e-5
                    )
    assert list(pipe(map(str, scans), candidate_labels=LABELS)) == single
    with Path(scans[0]).open("rb") as file:  # which Python iterates over, too
        assert pipe(file, candidate_labels=LABELS) == single[0]
    with pytest.raises(VolumeError, match="it holds 2 scans"):  # a tuple is one series
        pipe((scans[0], scans[1]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_scan_ends_a_stream_after_those_before_it(pipe, scans, num_workers):
    Path(scans[1]).write_bytes(b"nothing")
    results = pipe((scan for scan in scans), candidate_labels=LABELS, num_workers=num_workers)
    assert len(next(iter(results))) == 3
    with pytest.raises(VolumeError, match=r"1\.nii\.gz: it is not a NIfTI"):
        next(results)


def test_an_error_that_is_kept_keeps_no_processes(pipe, scans, monkeypatch):
    """As a notebook keeps the last, an interrupt say, with its frames and all that they hold."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipe, "_forward", interrupt)
    with pytest.raises(KeyboardInterrupt) as kept:
        next(iter(pipe((scan for scan in scans), candidate_labels=LABELS, num_workers=2)))
    assert kept.tb and not multiprocessing.active_children()


def test_arrays_take_a_spacing(pipe):
    array = np.random.default_rng(0).integers(-1000, 1000, (5, 9, 12)).astype(np.int16)
    assert pipe(array, spacing_mm=(4.0, 2.0, 3.0), candidate_labels=LABELS)
    with pytest.raises(VolumeError, match="without a geometry"):
        pipe(array)


def test_prompts_are_encoded_once_for_a_set_of_labels(pipe, model, scans):
    calls = []
    model.text_model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        pipe(scans)
        pipe(scans[0])
    assert len(calls) == 1
    pipe(scans, candidate_labels=LABELS, prompt_templates=TEMPLATES)
    assert len(calls) == 3
    pipe(scans[0], candidate_labels=LABELS, prompt_templates=TEMPLATES)
    assert len(calls) == 3


def test_prompts_are_encoded_anew_for_what_no_weight_tells(pipe, processor):
    """Another tokenizer, and another precision of the moment; what inference mode made is of use outside of it."""
    asked = {"candidate_labels": LABELS}
    with torch.inference_mode():
        (first,) = pipe.prompt_embeds(**asked)
    assert not first.is_inference()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(pipe.prompt_embeds(**asked)[0], first)
    assert torch.equal(pipe.prompt_embeds(**asked)[0], first)
    processor.tokenizer.backend_tokenizer.normalizer = Replace("a", "z")
    assert not torch.equal(pipe.prompt_embeds(**asked)[0], first)


def test_an_adapter_changes_scores_and_brings_operating_points(pipe, converted, processor, adapter, scans):
    adapted = ZeroShotCTClassificationPipeline(
        model=MedCTModel.from_pretrained(converted), processor=processor, device="cpu", adapter=str(adapter)
    )
    base, found = by_label(pipe(scans[0])), by_label(adapted(scans[0]))
    assert found["Lung nodule"]["score"] != base["Lung nodule"]["score"]
    assert found["Lung nodule"]["present"] == (found["Lung nodule"]["score"] >= 0.5)
    assert "present" not in found["Emphysema"]
    adapted.thresholds["Lung nodule"] = found["Lung nodule"]["score"]
    assert by_label(adapted(scans[0]))["Lung nodule"]["present"] is True
    # Chosen for other prompts, so without a meaning for these.
    own = adapted(scans[0], candidate_labels=["Lung nodule"], prompt_templates=TEMPLATES)
    assert "present" not in own[0]
    own = adapted(scans[0], candidate_labels={"Lung nodule": "nodule"})
    assert "present" not in own[0]


def test_a_disabled_adapter_takes_its_prompts_and_operating_points_along(pipe, converted, processor, adapter, scans):
    base = pipe(scans[0])
    pipe.model.load_adapter(str(adapter))
    adapted = pipe(scans[0])
    assert adapted != base
    assert "present" in by_label(adapted)["Lung nodule"]
    pipe.model.disable_adapters()
    assert pipe(scans[0]) == base
    pipe.model.enable_adapters()
    assert pipe(scans[0]) == adapted


def test_an_adapter_of_another_model_is_refused(model, processor, adapter):
    with torch.no_grad():
        model.visual_projection.weight.add_(1)
    with pytest.raises(AdapterMismatchError, match="other weights"):
        ZeroShotCTClassificationPipeline(model=model, processor=processor, device="cpu", adapter=str(adapter))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"candidate_labels": []}, "list of findings"),
        ({"candidate_labels": [3]}, "list of findings"),
        ({"prompt_templates": "{label}"}, "list of pairs"),
        ({"prompt_templates": [("{label}",)]}, "pair of sentences"),
        ({"prompt_templates": [("yes", "no")]}, "pair of sentences"),
        ({"candidate_labels": 3}, "list of findings"),
        ({"candidate_labels": ["one\ntwo"]}, "control character"),
        ({"candidate_labels": {"one": 3}}, "are words, or pairs"),
        ({"candidate_labels": {"one": []}}, "are words, or pairs"),
        ({"candidate_labels": {"one": [3]}}, "are words, or pairs"),
        ({"prompt_templates": 3}, "list of pairs"),
        ({"prompt_templates": [3]}, "pair of sentences"),
        ({"prompt_templates": [("{label}", 3)]}, "pair of sentences"),
    ],
)
def test_bad_prompts_are_refused_before_a_scan_is_read(pipe, options, reason):
    with pytest.raises(PromptError, match=reason):
        pipe("no such scan", **options)


def test_templates_may_come_one_by_one(pipe, scans):
    pairs = [("{label}", "no {label}"), ("some {label}", "no {label} at all")]
    assert pipe(scans[0], prompt_templates=iter(pairs)) == pipe(scans[0], prompt_templates=pairs)


def test_fewer_processes_than_none_are_refused(pipe, scans):
    with pytest.raises(LoaderError, match="`num_workers` is -1"):
        pipe(scans[:1], num_workers=-1)


def test_few_findings_are_given_where_few_are_wanted(pipe, scans):
    everything = pipe(scans[0])
    assert pipe(scans[0], top_k=3) == everything[:3]
    assert pipe(scans[0], top_k=99) == everything
    assert pipe(scans[0], top_k=np.int64(3), threshold=np.float32(0)) == everything[:3]
    least = everything[6]["score"]
    assert pipe(scans[0], threshold=least) == everything[:7]
    assert pipe(scans[0], threshold=least, top_k=2) == everything[:2]
    assert pipe(scans[0], threshold=1.0) == []
    assert pipe(scans[0], top_k=None, threshold=None) == everything


@pytest.mark.parametrize(
    ("name", "value"), [("top_k", 0), ("top_k", 1.5), ("threshold", 1.1), ("threshold", "a"), ("on_error", "skip")]
)
def test_other_amounts_are_refused(pipe, scans, name, value):
    with pytest.raises(ValueError, match=f"`{name}` is .*, not "):
        pipe(scans[0], **{name: value})


def test_a_column_of_a_data_set_is_many_scans(pipe, scans):
    column = Dataset.from_dict({"scan": scans})["scan"]
    assert not isinstance(column, list)
    assert pipe(column, top_k=2) == pipe(list(column), top_k=2)
    columns = {"images": column, "text": Dataset.from_dict({"text": ["a", "b"]})["text"]}
    found = pipe.processor(**columns, return_tensors="pt")
    expected = pipe.processor(images=list(column), text=["a", "b"], return_tensors="pt")
    assert all(torch.equal(found[name], expected[name]) for name in ("pixel_values", "input_ids"))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", ["zero-shot", "classifier"])
def test_a_bad_scan_costs_no_other_its_findings(pipe, classifier_folder, scans, tmp_path, kind, batch_size, workers):
    if kind == "classifier":
        pipe = pipeline("ct-classification", model=str(classifier_folder), device="cpu", trust_remote_code=True)
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"nothing")
    mixed = [scans[0], bad, tmp_path / "missing.nii.gz", bad, scans[1], {"no": "scan"}]
    with pytest.raises(VolumeError):
        pipe(mixed, batch_size=batch_size, num_workers=workers)
    calls = []
    pipe.model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    found = pipe(mixed, batch_size=batch_size, num_workers=workers, on_error="return", top_k=2)
    for place, scan in ((0, scans[0]), (4, scans[1])):
        expected = pipe(scan, top_k=2)
        assert [each["label"] for each in found[place]] == [each["label"] for each in expected]
        assert [each["score"] for each in found[place]] == pytest.approx([each["score"] for each in expected], abs=1e-5)
    for place, name in ((1, "bad.nii.gz"), (2, "missing.nii.gz"), (3, "bad.nii.gz")):
        assert found[place].keys() == {"error"} and name in found[place]["error"]
    assert found[5].keys() == {"error"}
    if batch_size == 1:
        assert len(calls) == 2 + 2  # nothing was computed for bad ones
    assert pipe(bad, on_error="return").keys() == {"error"}


def test_an_unknown_failure_quotes_nothing(pipe, monkeypatch):
    def fail(*_, **__):
        raise KeyError("Jane Doe")

    monkeypatch.setattr(pipe.processor, "image_processor", fail)
    fail.image_size = (1, 1, 1)
    found = pipe("scan.nii.gz", on_error="return")
    assert re.fullmatch(r"reading failed \(KeyError in \S+, line \d+\). Report this.", found["error"])


def test_unknown_arguments_are_refused(pipe, scans):
    with pytest.raises(TypeError, match="candidate_label'"):
        pipe(scans[0], candidate_label=["a"])


def test_a_single_label_and_a_single_pair_need_no_list(pipe, scans):
    assert pipe(scans[0], candidate_labels="a", prompt_templates=TEMPLATES[1]) == pipe(
        scans[0], candidate_labels=["a"], prompt_templates=[TEMPLATES[1]]
    )


RUN = """
import json, pathlib, sys
from transformers import pipeline
commit, adapter_commit, folder, labels, *scans = sys.argv[1:]
task, options = "zero-shot-ct-classification", {"trust_remote_code": True, "device": "cpu"}
pipe = pipeline(task, model="org/base", revision=commit, **options)
assert type(pipe).__module__.startswith("transformers_modules.org.base."), type(pipe)
results = pipe(scans, candidate_labels=json.loads(labels), batch_size=2)
pipe.save_pretrained(folder)
pipe = pipeline(model=folder, **options)  # the task is in the configuration
assert pipe(scans, candidate_labels=json.loads(labels), batch_size=2, num_workers=2) == results
adapter = {"adapter": "org/site-b", "adapter_revision": adapter_commit}
adapted = pipeline(task, model="org/base", revision=commit, **adapter, **options)
alone = pipeline(task, model="org/site-b", **options)
assert alone(scans[0]) == adapted(scans[0])
pathlib.Path(folder, "tokenizer.json").unlink()
try:
    pipeline(task, model=folder, **options)
except ValueError as error:
    assert "a tokenizer that knows no words" in str(error), error
print(json.dumps([results, adapted(scans[0])]))
"""


def test_a_pipeline_is_pushed_with_all_that_it_was_saved_with(hub, pipe, monkeypatch, tmp_path):
    hub.connect(monkeypatch)
    pipe.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="org/saved", private=True, max_shard_size="1GB")
    assert {path.name for path in (tmp_path / "saved").iterdir()} <= set(hub.files("org/saved"))
    assert hub.repo("model", "org/saved").private


def test_a_process_without_medct_runs_it_from_the_hub_and_from_a_folder(
    hub, pipe, converted, adapter, processor, scans, tmp_path, monkeypatch
):
    hub.connect(monkeypatch)
    commit = push_model(converted, "org/base").split("/")[-1]
    url = push_adapter(adapter, "org/site-b", base="org/base", base_revision=commit)
    arguments = (commit, url.split("/")[-1], tmp_path / "saved", json.dumps(LABELS), *scans)
    run = hub.run(RUN, *arguments, home=tmp_path / "home", medct=False)
    assert run.returncode == 0, run.stderr
    found, with_adapter = json.loads(run.stdout.splitlines()[-1])
    assert found == pipe(scans, candidate_labels=LABELS, batch_size=2)
    assert with_adapter == ZeroShotCTClassificationPipeline(
        model=MedCTModel.from_pretrained(converted), processor=processor, device="cpu", adapter=str(adapter)
    )(scans[0])
    assert "present" in by_label(with_adapter)["Lung nodule"]


def test_the_library_builds_it_here_too(converted, scans):
    pipe = pipeline(
        "zero-shot-ct-classification",
        model=str(converted),
        pipeline_class=ZeroShotCTClassificationPipeline,
        trust_remote_code=True,
        device="cpu",
    )
    assert len(pipe(scans[0])) == 18


def test_prompts_are_encoded_anew_for_an_adapter_that_is_loaded_later(pipe, converted, processor, adapter, scans):
    before = pipe(scans[0])
    pipe.model.load_adapter(str(adapter))
    fresh = MedCTModel.from_pretrained(converted)
    fresh.load_adapter(str(adapter))
    expected = ZeroShotCTClassificationPipeline(model=fresh, processor=processor, device="cpu")(scans[0])
    assert pipe(scans[0]) == expected != before


# what is encoded, asked and shown in steps of one's own


def test_what_was_asked_is_what_is_shown(pipe, batch):
    one = pipe.encode(batch["pixel_values"][:1])
    whole = pipe.postprocess(pipe.forward(one, candidate_labels=LABELS), candidate_labels=LABELS)
    assert pipe.postprocess(pipe.forward(one, candidate_labels=LABELS)) == whole, (
        "what was asked need not be said again"
    )
    assert [each["label"] for each in pipe.postprocess(pipe.forward(one, candidate_labels="a b"))] == ["a b"]
    for labels in ([*reversed(LABELS)], ["a"], ["a", "b", "d"]):
        with pytest.raises(ValueError, match="other labels or templates than `forward`"):
            pipe.postprocess(pipe.forward(one, candidate_labels=LABELS), candidate_labels=labels)
    single = pipe.postprocess(pipe.forward(one, candidate_labels=LABELS, prompt_templates=TEMPLATES[0]))
    assert by_label(single)["a"]["score"] == pytest.approx(by_label(whole)["a"]["score"])


SINCE_FORWARD = {
    "another adapter": lambda model: model.load_adapter(model.other, "other"),
    "none": lambda model: model.disable_adapters(),
    "other labels": lambda model: setattr(model.config, "id2label", {0: "x"}),
}


@pytest.mark.parametrize("change", SINCE_FORWARD)
def test_results_are_shown_as_they_were_asked_for(pipe, converted, adapter, batch, tmp_path, change):
    """A stream of batches shows scans after the caller has seen the first of their batch, and may have changed it."""
    pipe.model.other = str(save_adapter(converted, tmp_path / "other", results=RESULTS))
    pipe.model.load_adapter(str(adapter))
    output = pipe.forward({"pixel_values": batch["pixel_values"][:1]})
    expected = pipe.postprocess(output)
    SINCE_FORWARD[change](pipe.model)
    assert pipe.postprocess(output) == expected
    assert "present" in by_label(expected)["Lung nodule"]


@pytest.mark.parametrize("task", ["zero-shot-ct-classification", "ct-classification"])
def test_several_scans_are_shown_one_by_one(task, converted, classifier_folder, batch):
    folder = converted if task.startswith("zero") else classifier_folder
    asked = pipeline(task, model=str(folder), trust_remote_code=True, device="cpu")
    both = asked.forward(asked.encode(batch["pixel_values"][:2]))
    with pytest.raises(ValueError, match="one scan at a time"):
        asked.postprocess(both)
    alone = [asked.postprocess(asked.forward(asked.encode(batch["pixel_values"][i : i + 1]))) for i in range(2)]
    found = [asked.postprocess({"logits": both["logits"][i : i + 1]}) for i in range(2)]
    for ours, expected in zip(found, alone, strict=True):
        assert {each["label"]: pytest.approx(each["score"], abs=1e-5) for each in expected} == {
            each["label"]: each["score"] for each in ours
        }
    with pytest.raises(ValueError, match="takes `pixel_values`, or what `encode` gives, not ids"):
        asked.forward({"ids": torch.zeros(1)})
    for volume in (np.zeros((1, 1, 4, 4, 4)), {"pixel_values": batch["pixel_values"]}, batch["pixel_values"][0]):
        with pytest.raises(ValueError, match="`encode` takes the tensor `pixel_values`"):
            asked.encode(volume)


def test_own_templates_leave_no_operating_points_however_they_are_given(model, processor, adapter, batch):
    adapted = ZeroShotCTClassificationPipeline(model=model, processor=processor, device="cpu", adapter=str(adapter))
    one = adapted.encode(batch["pixel_values"][:1])
    assert "present" in by_label(adapted.postprocess(adapted.forward(one)))["Lung nodule"]
    own = adapted.postprocess(adapted.forward(one, prompt_templates=TEMPLATES))
    assert "present" not in by_label(own)["Lung nodule"]


@pytest.mark.parametrize("bad", [[], ["a", 1], 3])
def test_labels_that_are_none_are_refused_in_every_step(pipe, batch, bad):
    with pytest.raises((ValueError, TypeError), match=r"candidate_labels|not iterable"):
        pipe.forward({"pixel_values": batch["pixel_values"][:1]}, candidate_labels=bad)


def test_results_that_are_no_numbers_are_refused(pipe, scans, classifier_folder, processor, batch):
    """An adapter that diverged, or float16 that overflowed: NaN is below every operating point."""
    classifier = MedCTForImageClassification.from_pretrained(classifier_folder)
    with torch.no_grad():
        pipe.model.vision_model.temporal_encoder.layers[0].mlp.fc2.weight[0, 0] = torch.nan
        classifier.classifier.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="The model's results are not numbers"):
        pipe(scans[0])
    with pytest.raises(ValueError, match="The model's results are not numbers"):
        CTClassificationPipeline(model=classifier, processor=processor, device="cpu").encode(batch["pixel_values"][:1])


def test_loader_processes_read_as_the_pipeline_does(processor):
    """With the model's orientation, and the options of the call."""
    images = copy.deepcopy(processor.image_processor)
    images.orientation = "RAS"
    scan = np.random.default_rng(0).integers(0, 1500, (7, 8, 9)).astype(np.int16)
    reading = {"spacing_mm": (2, 1, 1), "rescale_slope": 1, "rescale_intercept": -1000}
    loaded = _LoadScan(images, torch.device("cpu"), reading, gives_errors=False)(scan, Place())
    assert torch.equal(loaded, images([scan], return_tensors="pt", **reading)["pixel_values"][0, 0])


def test_a_model_in_training_is_scored_without_dropout(converted, scans):
    model = MedCTModel.from_pretrained(converted)
    expected = pipeline("zero-shot-ct-classification", model=model)(scans[0])
    pipe = pipeline("zero-shot-ct-classification", model=model.train())
    assert pipe(scans[0]) == expected
    model.train()
    model.logit_scale.eval()
    modes = [module.training for module in model.modules()]
    assert pipe(scans[0]) == expected
    assert [module.training for module in model.modules()] == modes


def test_revisions_are_those_of_what_they_are_given_for(converted, processor, monkeypatch):
    asked = []
    model = MedCTModel.from_pretrained(converted)
    monkeypatch.setattr(model, "load_adapter", lambda name, **options: asked.append((name, options)))
    load = lambda name, **options: asked.append((name, options)) or processor  # noqa: E731
    monkeypatch.setattr("medct.pipeline_medct.MedCTProcessor.from_pretrained", load)
    model._place = {"revision": "of-the-base"}  # as loading from the Hub leaves it
    ZeroShotCTClassificationPipeline(model=model, device="cpu", adapter="org/a", adapter_revision="of-the-adapter")
    assert asked == [
        (str(converted), {"revision": "of-the-base"}),
        ("org/a", {"adapter_kwargs": {"revision": "of-the-adapter"}}),
    ]
