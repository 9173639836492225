"""Scores of labelled studies, zero-shot or by a classifier, spread over processes."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from medct.common.distributed import sum_over_processes
from medct.configuration_medct import MedCTConfig
from medct.data import StudyLoader, to_device
from medct.modeling_medct import MedCTForImageClassification, MedCTModel, zero_shot_probabilities
from medct.processing_medct import MedCTProcessor

Texts = dict[str, torch.Tensor]
"""`input_ids` and `attention_mask`, `(texts, tokens)` each."""


@dataclass(frozen=True)
class ScoredStudies:
    """Scores of studies, in the order of their ids.

    Args:
        ids: `(studies,)`.
        patients: `(studies,)`.
        scores: `(studies, labels)`, in [0, 1]: "present" against "not present".
        labels: `(studies, labels)`, 0, 1 or NaN for unknown.
    """

    ids: list[str]
    patients: list[str]
    scores: np.ndarray
    labels: np.ndarray


def is_classifier(model: torch.nn.Module) -> bool:
    """Whether a model has a head for its labels, and is not asked for them in words."""
    return hasattr(model, "classifier")


def tokenize_prompts(config: MedCTConfig, processor: MedCTProcessor) -> list[Texts]:
    """The sentences that ask for each label, as one batch per template.

    Args:
        config: The model's; it has the labels and templates.
        processor: The model's.
    """
    return [dict(processor(text=sentences, return_tensors="pt")) for sentences in config.label_prompts()]


def prompts_for(model: MedCTModel | MedCTForImageClassification, processor: MedCTProcessor) -> list[Texts]:
    """What a model is asked: its own prompts, or nothing if it is a classifier."""
    return [] if is_classifier(model) else tokenize_prompts(model.config, processor)


def texts_to(texts: Texts, device: torch.device) -> Texts:
    """Move texts to a device.

    Args:
        texts: `(texts, tokens)` each.
        device: Where to.
    """
    return {name: part.to(device) for name, part in texts.items()}


@torch.no_grad()
def score_studies(
    model: MedCTModel | MedCTForImageClassification,
    loader: StudyLoader,
    prompts: list[Texts],
    accelerator: Accelerator,
    what: str,
) -> ScoredStudies:
    """Score every study of a source; the prompts are encoded once for all of them.

    Args:
        model: With or without adapters; left in evaluation mode.
        loader: This process's loader.
        prompts: From `prompts_for`; scores are averaged over templates.
        accelerator: Its processes share the work.
        what: Name for the progress bar.

    Returns:
        The studies of all processes, in every process.
    """
    model.eval()
    with accelerator.autocast():
        templates = [
            model.get_text_features(**texts_to(texts, accelerator.device)).pooler_output.float() for texts in prompts
        ]
    total = math.ceil(loader.source.num_studies / loader.world_size / loader.batch_size)
    rows: list[tuple[str, str, np.ndarray, np.ndarray]] = []
    bar = tqdm(
        _in_step(loader, accelerator), desc=what, total=total, unit="batch", disable=not accelerator.is_main_process
    )
    for batch, is_own in bar:
        batch = to_device(batch, accelerator.device, model.config)
        with accelerator.autocast():
            scores = _scores(model, batch["pixel_values"], templates)
        if is_own:
            rows += zip(
                batch["ids"], batch["patients"], scores.cpu().numpy(), batch["labels"].cpu().numpy(), strict=True
            )
    rows = sorted(gather_object(rows), key=lambda row: row[0])
    ids, patients, scores, labels = zip(*rows, strict=True)
    return ScoredStudies(list(ids), list(patients), np.stack(scores), np.stack(labels))


def _scores(model: torch.nn.Module, pixel_values: torch.Tensor, templates: list[torch.Tensor]) -> torch.Tensor:
    """`(batch, labels)`, in [0, 1]."""
    if is_classifier(model):
        return model(pixel_values=pixel_values).logits.float().sigmoid()
    embeds = model.get_image_features(pixel_values).pooler_output.float()
    return torch.stack([zero_shot_probabilities(model.get_logits(embeds, texts)) for texts in templates]).mean(0)


def _in_step(loader: Iterable[dict[str, Any]], accelerator: Accelerator) -> Iterator[tuple[dict[str, Any], bool]]:
    """Batches, and whether they count: a process that has run out repeats its last batch until all have run out.

    In each forward pass, a sharded model waits for all processes.
    """
    batches, batch, is_own = iter(loader), None, True
    while True:
        following = next(batches, None) if is_own else None
        is_own = following is not None
        batch = following if is_own else batch
        if not sum_over_processes(torch.tensor(float(is_own), device=accelerator.device)):
            return
        yield batch, is_own
