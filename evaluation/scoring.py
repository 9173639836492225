"""Zero-shot classification of labelled studies, spread over processes."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from medct.modeling_medct import MedCTModel, zero_shot_probabilities
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
        labels: `(studies, labels)`: 0, 1, or NaN where unknown.
    """

    ids: list[str]
    patients: list[str]
    scores: np.ndarray
    labels: np.ndarray


def tokenize_prompts(config: MedCTConfig, processor: MedCTProcessor) -> list[Texts]:
    """The sentences that ask for each label, one batch a template."""
    return [dict(processor(text=sentences, return_tensors="pt")) for sentences in config.label_prompts()]


def texts_to(texts: Texts, device: torch.device) -> Texts:
    """Texts on a device."""
    return {name: part.to(device) for name, part in texts.items()}


def embed_prompts(model: MedCTModel, prompts: list[Texts], accelerator: Accelerator) -> list[torch.Tensor]:
    """The sentences that ask for each label in the common space, `(2 * labels, d)` a template, float32."""
    with torch.no_grad(), accelerator.autocast():
        return [model.get_text_features(**texts_to(each, accelerator.device)).pooler_output.float() for each in prompts]


def score_studies(
    model: MedCTModel, loader: StudyLoader, prompts: list[Texts], accelerator: Accelerator, what: str
) -> ScoredStudies:
    """Score every study of a source; the prompts are encoded once for all of them.

    Args:
        model: With or without adapters; in evaluation mode afterwards.
        loader: Of this process.
        prompts: From `tokenize_prompts`; scores are averaged over templates.
        accelerator: Whose processes share the work.
        what: Name for the progress bar.
    """
    return score_versions(model, [lambda: None], loader, prompts, accelerator, what)[0]


@torch.no_grad()
def score_versions(
    model: MedCTModel,
    versions: Sequence[Callable[[], None]],
    loader: StudyLoader,
    prompts: list[Texts],
    accelerator: Accelerator,
    what: str,
) -> list[ScoredStudies]:
    """Score every study of a source with several versions of a model; each study is read once.

    Args:
        model: In evaluation mode and the last version afterwards.
        versions: Each makes the model what it is to be scored as.
        loader, prompts, accelerator, what: See `score_studies`.

    Returns:
        Scores by version.
    """
    model.eval()
    templates = []
    for become in versions:
        become()
        templates.append(embed_prompts(model, prompts, accelerator))
    total = math.ceil(loader.source.num_studies / loader.world_size / loader.batch_size)
    rows: list[tuple[str, str, np.ndarray, np.ndarray]] = []
    bar = tqdm(
        _in_step(loader, accelerator), desc=what, total=total, unit="batch", disable=not accelerator.is_main_process
    )
    for batch, is_own in bar:
        batch = to_device(batch, accelerator.device, model.config)
        scores = []
        for become, texts in zip(versions, templates, strict=True):
            become()
            scores.append(_scores(model, batch["pixel_values"], texts, accelerator))
        if is_own:
            by_study = torch.stack(scores, dim=1).cpu().numpy()  # (batch, versions, labels)
            rows += zip(batch["ids"], batch["patients"], by_study, batch["labels"].cpu().numpy(), strict=True)
    rows = sorted(gather_object(rows), key=lambda row: row[0])
    ids, patients, scores, labels = zip(*rows, strict=True)
    return [
        ScoredStudies(list(ids), list(patients), by_version, np.stack(labels))
        for by_version in np.stack(scores).swapaxes(0, 1)
    ]


def _scores(
    model: MedCTModel, pixel_values: torch.Tensor, templates: list[torch.Tensor], accelerator: Accelerator
) -> torch.Tensor:
    """`(batch, labels)`, averaged over templates."""
    with accelerator.autocast():
        embeds = model.get_image_features(pixel_values).pooler_output.float()
    return torch.stack([zero_shot_probabilities(model.get_logits(embeds, texts)) for texts in templates]).mean(0)


def _in_step(loader: Iterable[dict[str, Any]], accelerator: Accelerator) -> Iterator[tuple[dict[str, Any], bool]]:
    """Batches, and whether they count: a process that has run out repeats its last one until all have.

    A sharded model waits in each forward pass for all processes.
    """
    batches, batch, is_own = iter(loader), None, True
    while True:
        following = next(batches, None) if is_own else None
        is_own = following is not None
        batch = following if is_own else batch
        if not sum_over_processes(torch.tensor(float(is_own), device=accelerator.device)):
            return
        yield batch, is_own
