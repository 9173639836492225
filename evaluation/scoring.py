"""Scores of labelled studies, zero-shot or by a classifier, spread over processes."""

import contextlib
import functools
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from medct.checks_medct import preprocessing, refuse_what_is_no_number
from medct.common.distributed import of_all, sum_over_processes
from medct.common.progress import tqdm
from medct.configuration_medct import MedCTConfig
from medct.data.label_space import merge_columns
from medct.data.loader import StudyLoader
from medct.data.sources import DataError, Source
from medct.modeling_medct import MedCTForImageClassification, MedCTModel, zero_shot_probabilities
from medct.processing_medct import MedCTProcessor

AnyModel = MedCTModel | MedCTForImageClassification
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
        about: For each study the subgroups that it belongs to, by what divides them; nothing where nothing is known.
        names: Of the labels: the model's, but that findings which the source cannot tell apart are one.
    """

    ids: list[str]
    patients: list[str]
    scores: np.ndarray
    labels: np.ndarray
    about: list[dict[str, str]] = field(default_factory=list)
    names: list[str] = field(kw_only=True)

    def take(self, rows: Sequence[int]) -> "ScoredStudies":
        """Some of the studies.

        Args:
            rows: Their indices.
        """
        about = [self.about[row] for row in rows] if self.about else []
        ids, patients = [self.ids[row] for row in rows], [self.patients[row] for row in rows]
        return ScoredStudies(ids, patients, self.scores[rows], self.labels[rows], about, names=self.names)

    def only(self, names: Sequence[str]) -> "ScoredStudies":
        """Some of the labels.

        Args:
            names: Of these, in their order.
        """
        columns = [self.names.index(name) for name in names]
        return replace(self, scores=self.scores[:, columns], labels=self.labels[:, columns], names=list(names))


def is_classifier(model: torch.nn.Module) -> bool:
    """Whether a model has a head for its labels, and is not asked for them in words."""
    return hasattr(model, "classifier")


def prompts_for(model: AnyModel, processor: MedCTProcessor, config: MedCTConfig | None = None) -> list[Texts]:
    """The sentences that ask for each label, as one batch per template; nothing for a classifier.

    Args:
        model: With or without adapters.
        processor: The model's.
        config: Has the labels and templates; the model's own by default.
    """
    if is_classifier(model):
        return []
    return [dict(processor(text=each, return_tensors="pt")) for each in (config or model.config).label_prompts()]


def remark_on_words(model: AnyModel, processor: MedCTProcessor, config: MedCTConfig) -> str | None:
    """A remark if the tokenizer does not know words of the prompts; see `MedCTProcessor.remark_on_words`.

    Args:
        model: With or without adapters; nothing is said of a classifier.
        processor: The model's.
        config: Has the labels and templates.
    """
    return None if is_classifier(model) else processor.remark_on_words(config.label_prompts(), config.label_names)


def about_model(model: AnyModel, config: MedCTConfig | None = None) -> dict[str, Any]:
    """What decides about the scores of a model besides its weights, ready for JSON.

    Args:
        model: With or without adapters.
        config: See `prompts_for`.

    Returns:
        `dtype`, `preprocessing`; unless it is a classifier, `prompt_templates` and `prompts`, as in the configuration.
    """
    about = {"dtype": str(model.dtype).removeprefix("torch."), "preprocessing": preprocessing(model.config)}
    if is_classifier(model):
        return about
    config = config or model.config
    templates = [list(template) for template in config.prompt_templates]
    return about | {"prompt_templates": templates, "prompts": config.prompts or {}}


def texts_to(texts: Texts, device: torch.device) -> Texts:
    """Move texts to a device.

    Args:
        texts: `(texts, tokens)` each.
        device: Where to.
    """
    return {name: part.to(device) for name, part in texts.items()}


def embed_prompts(model: AnyModel, prompts: list[Texts], accelerator: Accelerator) -> list[torch.Tensor]:
    """Encode the sentences that ask for each label into the common space.

    Args:
        model: With or without adapters.
        prompts: From `prompts_for`.
        accelerator: Its device and precision are used.

    Returns:
        `(2 * labels, d)` per template, float32; nothing for a classifier.
    """
    with torch.no_grad(), accelerator.autocast():
        return [model.get_text_features(**texts_to(each, accelerator.device)).pooler_output.float() for each in prompts]


def score_studies(
    model: AnyModel,
    loader: StudyLoader,
    prompts: list[Texts],
    accelerator: Accelerator,
    what: str,
) -> ScoredStudies:
    """Score every study of a source; the prompts are encoded once for all of them.

    Args:
        model: With or without adapters; left in evaluation mode.
        loader: This process's loader, for the device of the model.
        prompts: From `prompts_for`; scores are averaged over templates.
        accelerator: Its processes share the work.
        what: Name for the progress bar.

    Returns:
        The studies of all processes, in every process.
    """
    return score_versions(model, [lambda: None], loader, [prompts], accelerator, what)[0]


@torch.no_grad()
def score_versions(
    model: AnyModel,
    versions: Sequence[Callable[[], None]],
    loader: StudyLoader,
    prompts: Sequence[list[Texts]],
    accelerator: Accelerator,
    what: str,
) -> list[ScoredStudies]:
    """Score every study of a source with several versions of a model; each study is read once.

    Args:
        model: With or without adapters; left in evaluation mode, as the last version.
        versions: Each turns the model into the version to be scored.
        loader, accelerator, what: See `score_studies`.
        prompts: Likewise, of each version.

    Returns:
        For each version, the studies of all processes, in every process.
    """
    model.eval()
    templates = []
    for become, asked in zip(versions, prompts, strict=True):
        become()
        templates.append(embed_prompts(model, asked, accelerator))

    def scores(pixel_values: torch.Tensor) -> torch.Tensor:
        found = []
        for become, texts in zip(versions, templates, strict=True):
            become()
            found.append(_scores(model, pixel_values, texts, accelerator))
        return torch.stack(found, dim=1)  # (batch, versions, labels)

    ids, patients, values, labels, about = _of_every_study(model, loader, accelerator, what, scores)
    merged = functools.partial(merge_columns, names=loader.source.label_names, merged=loader.source.merged)
    known, names = merged(labels)
    return [
        ScoredStudies(ids, patients, merged(by_version)[0], known, about, names=list(names))
        for by_version in values.swapaxes(0, 1)
    ]


def has_same_labels(source: Source, scored: ScoredStudies) -> bool:
    """Whether a source has the same studies, patients and labels as when it was scored; drawings always have.

    Args:
        source: Whose rows are read, without their volumes.
        scored: Earlier.
    """
    if source.is_synthetic:
        return True
    rows = {row["id"]: row for row in source.rows("compare labels")}
    if set(rows) != set(scored.ids) or [rows[each]["patient"] for each in scored.ids] != scored.patients:
        return False
    labels, _ = merge_columns(
        np.array([rows[each]["labels"] for each in scored.ids], float), source.label_names, source.merged
    )
    return np.array_equal(labels, np.asarray(scored.labels, float), equal_nan=True)


def refuse_shares(source: Source) -> None:
    """Refuse, before anything is scored, labels between 0 and 1: there a finding is present or not.

    Args:
        source: Whose rows are read, without their volumes; drawings have no such labels.

    Raises:
        DataError: If there is one.
    """
    for row in [] if source.is_synthetic else source.rows("check labels"):
        for name, label in zip(source.label_names, row["labels"], strict=True):
            if 0 < label < 1:
                raise DataError(
                    f"{source.description}: {name!r} of {row['id']} is {label:g}, and shares are for training only. "
                    "Write 0, 1 or nothing where studies are scored or tuned on."
                )


@torch.no_grad()
def embed_studies(
    model: AnyModel, loader: StudyLoader, accelerator: Accelerator, what: str
) -> tuple[np.ndarray, ScoredStudies]:
    """Encode every study of a source into the common space.

    Args:
        model: Zero-shot model; left in evaluation mode.
        loader, accelerator, what: See `score_studies`.

    Returns:
        `(studies, d)`, float32, and the studies of all processes, without scores.
    """
    model.eval()

    def embeds(pixel_values: torch.Tensor) -> torch.Tensor:
        with accelerator.autocast():
            return model.get_image_features(pixel_values).pooler_output.float()

    ids, patients, values, labels, about = _of_every_study(model, loader, accelerator, what, embeds)
    names = list(loader.source.label_names)
    return values, ScoredStudies(ids, patients, np.full(labels.shape, np.nan), labels, about, names=names)


def _of_every_study(
    model: AnyModel,
    loader: StudyLoader,
    accelerator: Accelerator,
    what: str,
    compute: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[list[str], list[str], np.ndarray, np.ndarray, list[dict[str, str]]]:
    """What is computed of each study of all processes, with its id, patient, labels and subgroups, by id."""
    total = math.ceil(loader.source.num_studies / loader.world_size / loader.batch_size)
    rows: list[tuple[str, str, np.ndarray, np.ndarray, dict[str, str]]] = []
    # Closed, since an error that a notebook keeps would keep the loader's processes.
    with contextlib.closing(_in_step(loader, accelerator)) as batches:
        bar = tqdm(batches, desc=what, total=total, unit="batch", disable=not accelerator.is_main_process)
        for batch, is_own in bar:
            values = compute(batch["pixel_values"])
            refuse_what_is_no_number(values)
            if is_own:
                labels = batch["labels"].cpu().numpy()
                rows += zip(batch["ids"], batch["patients"], values.cpu().numpy(), labels, batch["about"], strict=True)
    rows = sorted((row for each in of_all(rows) for row in each), key=lambda row: row[0])
    if not rows:
        raise DataError(f"{loader.source.description}: none of its studies could be read. Check the volumes.")
    ids, patients, values, labels, about = zip(*rows, strict=True)
    return list(ids), list(patients), np.stack(values), np.stack(labels), list(about) if any(about) else []


def _scores(
    model: torch.nn.Module, pixel_values: torch.Tensor, templates: list[torch.Tensor], accelerator: Accelerator
) -> torch.Tensor:
    """`(batch, labels)`, in [0, 1], averaged over templates."""
    with accelerator.autocast():
        if is_classifier(model):
            return model(pixel_values=pixel_values).logits.float().sigmoid()
        embeds = model.get_image_features(pixel_values).pooler_output.float()
    return torch.stack([zero_shot_probabilities(model.get_logits(embeds, texts)) for texts in templates]).mean(0)


def _in_step(loader: StudyLoader, accelerator: Accelerator) -> Generator[tuple[dict[str, Any], bool], None, None]:
    """Batches, and whether they count: a process that has run out repeats its last batch until all have run out.

    In each forward pass, a sharded model waits for all processes, those without any study among them.
    """
    batches, batch, is_own = iter(loader), None, True
    while True:
        following = next(batches, None) if is_own else None
        is_own = following is not None
        batch = following if is_own else batch
        if not sum_over_processes(torch.tensor(float(is_own), device=accelerator.device)):
            return
        if batch is None:
            size = loader.processor.image_processor.image_size
            batch = {"pixel_values": torch.zeros(1, 1, *size, device=loader.device)}
        yield batch, is_own
