"""What is learned from a batch: the losses of a step over all processes, and their gradients.

Unusual here:
- Each process computes its own share of a loss (the sum over its rows, divided by the count over all processes), so
  losses and gradients are summed over processes, never averaged, and a step on two processes equals one on a single
  process.
- `common.distributed.sum_gradients` takes the sum, not a DistributedDataParallel wrapper: a step has several backward
  passes, and the gradients of an adapter are megabytes. Under FSDP2 the backward passes do it themselves.
- Contrast over many micro-batches recomputes each of them in the backward pass (gradient caching), so it needs the
  memory of one micro-batch and has the negatives of all.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from medct.common.distributed import gather_rows, process_rank, sum_over_processes
from medct.evaluation.scoring import Texts, is_classifier
from medct.modeling_medct import MedCTModel

Objective = Literal["prompts", "contrastive", "both"]


def label_loss(logits_per_image: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of "present" against "not present", summed over the labels that are known.

    Args:
        logits_per_image: `(batch, 2 * labels)`, in the order of `MedCTConfig.label_prompts`.
        labels: `(batch, labels)`, 0, 1 or NaN for unknown, which adds nothing.
    """
    present, absent = logits_per_image.unflatten(-1, (-1, 2)).unbind(-1)
    known = ~labels.isnan()
    return F.binary_cross_entropy_with_logits((present - absent)[known], labels.to(present)[known], reduction="sum")


def report_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    report_ids: torch.Tensor,
    get_logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """This process's share of the symmetric contrastive loss over the studies of all processes.

    Args:
        image_embeds: `(batch, d)`.
        text_embeds: `(batch, d)`; row i is the report of volume i.
        report_ids: `(batch,)`, equal for equal reports; such pairs are not negatives of each other.
        get_logits: Scaled similarity of rows with rows, `MedCTModel.get_logits`.

    Returns:
        `()`; the sum over all processes is the mean over all rows and both directions.
    """
    all_images, all_texts, all_ids = gather_rows(image_embeds), gather_rows(text_embeds), gather_rows(report_ids)
    batch = len(report_ids)
    own = torch.arange(batch, device=report_ids.device) + (process_rank() * batch)
    same_report = report_ids[:, None] == all_ids[None, :]
    same_report[torch.arange(batch), own] = False
    per_image = get_logits(image_embeds, all_texts).masked_fill(same_report, -torch.inf)
    per_text = get_logits(text_embeds, all_images).masked_fill(same_report, -torch.inf)
    total = F.cross_entropy(per_image, own, reduction="sum") + F.cross_entropy(per_text, own, reduction="sum")
    return total / (2 * len(all_ids))


@dataclass(frozen=True)
class StepLoss:
    """Turns the micro-batches of one optimizer step into gradients.

    Args:
        objective: What to learn from.
        report_weight: Weight of the reports if the objective is "both", in [0, 1]; the labels have the rest.
        autocast: Makes the context of forward passes, `Accelerator.autocast`.
    """

    objective: Objective
    report_weight: float = 0.5
    autocast: Callable[[], AbstractContextManager] = nullcontext

    @property
    def uses_reports(self) -> bool:
        return self.objective != "prompts"

    @property
    def uses_labels(self) -> bool:
        return self.objective != "contrastive"

    def backward(
        self,
        model: MedCTModel,
        micro_batches: Sequence[dict[str, Any]],
        prompts: Sequence[Texts],
        constant_prompts: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Add the gradients of this process's share to the parameters.

        Args:
            model: Without a wrapper; its encoders may hold adapters.
            micro_batches: This process's, equal in number and size in every process. Each has `pixel_values`, `labels`,
                `report_ids` and the reports' `input_ids` and `attention_mask`.
            prompts: The sentences of all labels, one batch per template; encoded once, whatever the number of
                micro-batches. The loss is the mean over templates, like the score.
            constant_prompts: Their embeddings, `(2 * labels, d)` per template, if no text is learned.

        Returns:
            `()`, the loss over all processes, without gradient.
        """
        embeds: list[torch.Tensor] = []
        if self.uses_labels and constant_prompts is not None:
            embeds = list(constant_prompts)
        elif self.uses_labels:
            with self.autocast():
                embeds = [_encode_texts(model, texts) for texts in prompts]
        # The prompts' graph is walked once, after all micro-batches have added to their gradient.
        prompt_embeds = [each.detach().requires_grad_(each.requires_grad) for each in embeds]
        known = sum_over_processes(sum((~batch["labels"].isnan()).sum() for batch in micro_batches)).clamp(min=1)
        # Reports are contrasted across micro-batches; the label losses of different studies are independent.
        groups = [list(micro_batches)] if self.uses_reports else [[batch] for batch in micro_batches]
        total = torch.zeros((), device=known.device)
        for group in groups:
            with self.autocast():
                loss = self._share(model, group, prompt_embeds, known)
            loss.backward()
            total += loss.detach()
        for each, gathered in zip(embeds, prompt_embeds, strict=True):
            if gathered.grad is not None:
                each.backward(gathered.grad)
        return sum_over_processes(total)

    def _share(
        self, model: MedCTModel, group: list[dict], prompt_embeds: list[torch.Tensor], known: torch.Tensor
    ) -> torch.Tensor:
        if is_classifier(model):  # its labels are all that it learns from
            (batch,) = group
            return model.label_loss(model(batch["pixel_values"]).logits.float(), batch["labels"], "sum") / known
        images = torch.cat([_encode(_encode_images, model, batch["pixel_values"], len(group)) for batch in group])
        loss = images.new_zeros(())
        weight = self.report_weight if self.objective == "both" else 1.0
        if self.uses_reports:
            texts = torch.cat([_encode(_encode_texts, model, _reports(batch), len(group)) for batch in group])
            report_ids = torch.cat([batch["report_ids"] for batch in group])
            loss = loss + weight * report_loss(images, texts, report_ids, model.get_logits)
        if prompt_embeds:
            weight = 1 - weight if self.uses_reports else 1.0
            labels = torch.cat([batch["labels"] for batch in group])
            of_templates = [label_loss(model.get_logits(images, texts), labels) for texts in prompt_embeds]
            loss = loss + weight * (sum(of_templates) / len(of_templates)) / known
        return loss


def _encode(encoder: Callable, model: MedCTModel, inputs: Any, micro_batches: int) -> torch.Tensor:
    """Encode; the activations of a single micro-batch are kept, those of several are recomputed."""
    if micro_batches == 1:
        return encoder(model, inputs)
    return checkpoint(encoder, model, inputs, **recomputing())


def recomputing() -> dict[str, Any]:
    """Options of `torch.utils.checkpoint`, with which the second pass has the dropout of the first.

    Torch takes care of that itself, but for the random numbers of Apple's GPUs.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    return options | {"context_fn": _same_draws} if torch.backends.mps.is_available() else options


def _same_draws() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of the first pass, which is about to begin, and of the second."""
    return nullcontext(), _drawing_from(torch.mps.get_rng_state())


@contextmanager
def _drawing_from(state: torch.Tensor) -> Iterator[None]:
    with torch.random.fork_rng([0], device_type="mps"):
        torch.mps.set_rng_state(state)
        yield


def _encode_images(model: MedCTModel, pixel_values: torch.Tensor) -> torch.Tensor:
    return model.get_image_features(pixel_values).pooler_output.float()


def _encode_texts(model: MedCTModel, texts: Texts) -> torch.Tensor:
    return model.get_text_features(**texts).pooler_output.float()


def _reports(batch: dict[str, Any]) -> Texts:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}
