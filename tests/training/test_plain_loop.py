"""A run does what a loop in plain torch does that is written from the documentation: the same losses and weights."""

import dataclasses
import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn import functional as F

from medct import MedCTModel, MedCTProcessor
from medct import train as training
from medct.data import Row, Source
from medct.training.lora import add_lora


class Changed:
    """Rows of which three share each report, and some have unknown or constant labels."""

    def __init__(self, read):
        self.read = read

    def __call__(self, key: int) -> Row:
        row = self.read(key)
        labels = [1.0, math.nan if key % 2 else 0.0, *row["labels"][2:]]
        return row | {"report": f"Report {key // 3}.", "labels": labels}


def batches(source: Source, seed: int, size: int) -> Iterator[list[int]]:
    epoch = 0
    while True:
        keys = source.keys(epoch, seed)
        yield from (keys[start : start + size] for start in range(0, len(keys) - size + 1, size))
        epoch += 1


def loss_of(model: MedCTModel, processor: MedCTProcessor, rows: list[Row], report_weight: float) -> torch.Tensor:
    scans, affines, reports, labels = ([row[name] for row in rows] for name in ("volume", "affine", "report", "labels"))
    inputs = processor(images=scans, affine=affines, text=reports, return_tensors="pt")
    images = model.get_image_features(inputs["pixel_values"]).pooler_output
    texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    (template,) = model.config.label_prompts()
    prompts = model.get_text_features(**processor(text=template, return_tensors="pt")).pooler_output
    margins, truth = model.get_logits(images, prompts), torch.tensor(labels)
    margins, known = margins[:, ::2] - margins[:, 1::2], ~truth.isnan()
    of_labels = F.binary_cross_entropy_with_logits(margins[known], truth[known])
    logits, of_reports = model.get_logits(images, texts), 0.0
    for one, report in enumerate(reports):
        others = [two for two, other in enumerate(reports) if two == one or other != report]
        for row in (logits[one], logits[:, one]):
            of_reports = of_reports + row[others].logsumexp(0) - row[one]
    return report_weight * of_reports / (2 * len(rows)) + (1 - report_weight) * of_labels


def test_a_run_is_the_loop_that_the_documentation_says(small_run, monkeypatch, tmp_path):
    """With steps that begin in one pass and end in the next; without dropout, as each would draw its own."""
    base, processor = MedCTModel.from_pretrained(small_run.model), MedCTProcessor.from_pretrained(small_run.model)
    base.config.text_config.hidden_dropout_prob = base.config.text_config.attention_probs_dropout_prob = 0.0
    for part in (base, processor):
        part.save_pretrained(tmp_path / "base")
    sources, load = [], training.load_sources

    def changed(*arguments):
        found = load(*arguments)
        sources.append(dataclasses.replace(found["train"], read=Changed(found["train"].read)))
        return found | {"train": sources[0]}

    monkeypatch.setattr(training, "load_sources", changed)
    asks = {"objective": "both", "report_weight": 0.3, "batch_size": 2, "accumulation_steps": 3, "epochs": 5}
    asks |= {"model": str(tmp_path / "base"), "recipe": "paper", "learning_rate": 1e-3, "phantom_train_patients": 9}
    settings = dataclasses.replace(small_run, **asks)
    training.run(settings)

    set_seed(settings.seed)
    base = MedCTModel.from_pretrained(settings.model)
    model = add_lora(base, rank=settings.rank).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=settings.weight_decay)
    keys, losses, steps = batches(sources[0], settings.seed, 2), [], 9 // 2 * 5 // 3
    for step in range(steps):
        for group in optimizer.param_groups:  # warm-up over a tenth: none of so few
            group["lr"] = settings.learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        rows = [sources[0].read(key) for _ in range(3) for key in next(keys)]
        loss = loss_of(base, processor, rows, 0.3)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    lines = (tmp_path / "run/history.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["loss"] for line in lines] == pytest.approx(losses, abs=1e-5)
    found, expected = load_file(tmp_path / "run/adapter_model.safetensors"), get_peft_model_state_dict(model)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        np.testing.assert_allclose(weight, expected[name].detach(), atol=1e-5, err_msg=name)
