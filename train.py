"""Adapt MedCT to a source of scans with LoRA, and score it before and after.

    accelerate launch train.py                         # synthetic phantoms, no network, a few minutes on a laptop
    accelerate launch train.py --model ORG/NAME --revision COMMIT --data FOLDER    # a folder in CT-RATE's layout

Only low-rank matrices in the attention of both encoders are trained; that the base stayed as it was, to the byte, is
checked before anything is saved. The output folder holds the adapter, `train_config.json` and `results.json`, and
appears only when it is complete.
"""

import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoProcessor, HfArgumentParser, get_cosine_schedule_with_warmup
from transformers.utils import logging

from medct import MedCTConfig, MedCTModel, MedCTProcessor, VolumeError, zero_shot_probabilities
from medct.data_medct import Collator, DataError, Source, ct_rate_source, phantom_source
from medct.metrics_medct import zero_shot_scores
from medct.modeling_medct import contrastive_loss
from medct.outputs import refuse_taken, whole_folder

PHANTOM_BASE = Path(__file__).with_name("phantom_base")
PHANTOMS = "phantoms"
# The attention Linears of both encoders, under the names that BERT and the other encoders of transformers give them.
ATTENTION_LINEARS = (
    r"vision_model\..*\.(q|k|v|out)_proj"
    r"|text_model\..*(\.(query|key|value|attention\.output\.dense)|\.(q|k|v|o|out)_proj|\.(q|k|v|out)_lin)"
)


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class TrainingSettings:
    """Everything about a run that does not travel with the weights; saved as `train_config.json`."""

    model: str = _setting(
        str(PHANTOM_BASE), "Base model: Hub id or folder. Default: the phantom base of this repository."
    )
    revision: str | None = _setting(None, "Commit of the base on the Hub. Pin it: the repository's code is run.")
    data: str = _setting(PHANTOMS, 'Folder in CT-RATE\'s layout, or "phantoms": synthetic studies drawn on the fly.')
    output_dir: str | None = _setting(None, "Folder to make. Default: runs/ and the time.")
    objective: Literal["prompts", "contrastive", "both"] = _setting(
        "prompts", "Learn from the labels through their prompts, from the reports by contrast, or from both."
    )
    rank: int = _setting(16, "Rank of the LoRA matrices.")
    alpha: int = _setting(32, "Scale of the LoRA matrices; the update is multiplied by alpha / rank.")
    dropout: float = _setting(0.0, "Dropout before the LoRA matrices.")
    learning_rate: float = _setting(
        3e-3,
        "Highest; it rises over the first tenth and falls as a cosine. Suits the phantoms; begin lower with CT-CLIP.",
    )
    weight_decay: float = _setting(0.01, "Weight decay of the LoRA matrices.")
    batch_size: int = _setting(8, "Studies in a batch of one process.")
    epochs: int = _setting(1, "Passes over the training studies.")
    max_steps: int | None = _setting(None, "Stop after so many steps, however many epochs are left.")
    max_grad_norm: float = _setting(1.0, "Gradients are scaled down to this length.")
    gradient_checkpointing: bool = _setting(False, "Recompute activations instead of keeping them: less memory.")
    num_workers: int = _setting(
        1, "Processes that load data, for each training process; 0 loads in the training process."
    )
    phantom_site: Literal["A", "B"] = _setting("B", "Which synthetic hospital to adapt to.")
    phantom_train_patients: int = _setting(2000, "Synthetic patients to train on.")
    phantom_eval_patients: int = _setting(300, "Synthetic patients to score on; others than those trained on.")
    seed: int = _setting(0, "Of the initialisation, the order of studies and the phantoms. Same seed, same numbers.")
    cpu: bool = _setting(False, "Stay on the CPU even if there is a GPU.")


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why and what to do."""


def load_base(settings: TrainingSettings) -> tuple[MedCTModel, MedCTProcessor]:
    """The base model and its processor.

    Raises:
        TrainingError: If there is no such model, or it is no MedCT model.
    """
    options = {"revision": settings.revision, "trust_remote_code": True}
    try:
        config = AutoConfig.from_pretrained(settings.model, **options)
        if config.model_type != MedCTConfig.model_type:
            raise TrainingError(f"{settings.model} is a model of type {config.model_type!r}. Pass a MedCT model.")
        model = AutoModel.from_pretrained(settings.model, config=config, **options)
        return model, AutoProcessor.from_pretrained(settings.model, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(f"{settings.model}: no model ({reason}) Pass a Hub id or a folder.") from error


def load_sources(settings: TrainingSettings, config: MedCTConfig) -> tuple[Source, Source]:
    """Studies to train on and, of other patients, to score on."""
    if settings.data != PHANTOMS:
        return ct_rate_source(settings.data, "train", config), ct_rate_source(settings.data, "valid", config)
    patients = range(settings.phantom_eval_patients + settings.phantom_train_patients)
    held_out, trained = patients[: settings.phantom_eval_patients], patients[settings.phantom_eval_patients :]
    return (
        phantom_source(settings.phantom_site, trained, settings.seed),
        phantom_source(settings.phantom_site, held_out, settings.seed),
    )


def make_loader(source: Source, settings: TrainingSettings, collator: Collator, shuffle: bool) -> DataLoader:
    """Batches of a source, made in loader processes."""
    # A buffer of one still shuffles all studies, as each is a shard, and holds no volumes in memory.
    stream = source.stream.shuffle(seed=settings.seed, buffer_size=1) if shuffle else source.stream
    workers = min(settings.num_workers, stream.num_shards)
    return DataLoader(
        stream,
        settings.batch_size,
        collate_fn=collator,
        num_workers=workers,
        drop_last=shuffle,
        prefetch_factor=4 if workers else None,
    )


def add_lora(model: MedCTModel, settings: TrainingSettings) -> PeftModel:
    """Freeze the base and put trainable low-rank matrices beside its attention Linears."""
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=ATTENTION_LINEARS,
        # Without it `AutoPeftModel...` cannot load the adapter, as the base's class is no class of transformers.
        task_type="FEATURE_EXTRACTION",
        revision=settings.revision,
    )
    return get_peft_model(model, lora)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the names and bytes of tensors."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def tokenize_prompts(config: MedCTConfig, processor: MedCTProcessor) -> list[dict[str, torch.Tensor]]:
    """The sentences that ask for each label, one batch a template."""
    return [dict(processor(text=sentences, return_tensors="pt")) for sentences in config.label_prompts()]


def append_texts(
    texts: dict[str, torch.Tensor], others: dict[str, torch.Tensor], pad_id: int
) -> dict[str, torch.Tensor]:
    """Two batches of texts as one, `(texts, tokens)`, padded to the longer."""
    length = max(texts["input_ids"].shape[1], others["input_ids"].shape[1])
    return {
        name: torch.cat(
            [
                F.pad(part[name], (0, length - part[name].shape[1]), value=pad_id if name == "input_ids" else 0)
                for part in (texts, others)
            ]
        )
        for name in ("input_ids", "attention_mask")
    }


def prompt_loss(logits_per_image: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of "present" against "not present".

    Args:
        logits_per_image: `(batch, 2 * labels)`, in the order of `MedCTConfig.label_prompts`.
        labels: `(batch, labels)`, 0 or 1.
    """
    present, absent = logits_per_image.unflatten(-1, (-1, 2)).unbind(-1)
    return F.binary_cross_entropy_with_logits(present - absent, labels.to(present))


def training_loss(
    model: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    prompts: dict[str, torch.Tensor],
    objective: str,
    pad_id: int,
) -> torch.Tensor:
    """The loss of one batch; reports and prompts go through the text encoder together, once."""
    size = len(batch["labels"])
    texts = prompts
    if objective != "prompts":
        texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if objective == "both":
            texts = append_texts(texts, prompts, pad_id)
    logits = model(pixel_values=batch["pixel_values"], **texts).logits_per_image
    if objective == "prompts":
        return prompt_loss(logits, batch["labels"])
    if objective == "contrastive":
        return contrastive_loss(logits)
    return (contrastive_loss(logits[:, :size]) + prompt_loss(logits[:, size:], batch["labels"])) / 2


@torch.no_grad()
def evaluate_zero_shot(
    model: MedCTModel, loader: DataLoader, prompts: list[dict[str, torch.Tensor]], accelerator: Accelerator, what: str
) -> dict[str, float]:
    """Score a model on labelled studies; the prompts are encoded once for all of them.

    Args:
        model: With or without adapter, not wrapped by accelerate.
        loader: Prepared by accelerate.
        prompts: From `tokenize_prompts`.
        accelerator: Whose processes share the work.
        what: Name for the progress bar.

    Returns:
        See `zero_shot_scores`.
    """
    model.eval()
    text_embeds = [
        model.get_text_features(**{name: part.to(accelerator.device) for name, part in template.items()}).pooler_output
        for template in prompts
    ]
    probabilities, labels = [], []
    for batch in tqdm(loader, desc=what, unit="batch", disable=not accelerator.is_main_process):
        image_embeds = model.get_image_features(batch["pixel_values"]).pooler_output
        by_template = [zero_shot_probabilities(model.get_logits(image_embeds, texts)) for texts in text_embeds]
        gathered = accelerator.gather_for_metrics((torch.stack(by_template).mean(0), batch["labels"]))
        probabilities.append(gathered[0].float().cpu())
        labels.append(gathered[1].cpu())
    return zero_shot_scores(torch.cat(probabilities).numpy(), torch.cat(labels).numpy(), model.config.label_names)


def endless(loader: DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of one epoch after the other, each in an order of its own."""
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader
        epoch += 1


def train(
    model: PeftModel,
    loader: DataLoader,
    prompts: dict[str, torch.Tensor],
    pad_id: int,
    settings: TrainingSettings,
    steps: int,
    accelerator: Accelerator,
) -> PeftModel:
    """Train the adapter for a number of steps; returns the model without accelerate's wrapping."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    # accelerate steps the schedule once for each process
    processes = accelerator.num_processes
    schedule = get_cosine_schedule_with_warmup(optimizer, steps * processes // 10, steps * processes)
    if settings.gradient_checkpointing:
        model.base_model.model.activation_checkpointing_enable()
    wrapped, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    wrapped.train()
    prompts = {name: part.to(accelerator.device) for name, part in prompts.items()}
    batches = endless(loader)
    bar = tqdm(range(steps), desc="train", unit="step", disable=not accelerator.is_main_process)
    for _ in bar:
        loss = training_loss(wrapped, next(batches), prompts, settings.objective, pad_id)
        if not math.isfinite(value := loss.item()):
            raise TrainingError(f"The loss became {value}. Lower --learning_rate.")
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trainable, settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{value:.3f}", refresh=False)
    return accelerator.unwrap_model(wrapped)


def results_table(before: dict[str, float], after: dict[str, float], names: list[str]) -> str:
    """AUROC of each label and their mean, before and after, as a Markdown table."""
    rows = [(name, f"auroc/{name}") for name in names] + [("**mean**", "auroc")]
    lines = ["| finding | base | adapted | difference |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {name} | {before[key]:.3f} | {after[key]:.3f} | {after[key] - before[key]:+.3f} |" for name, key in rows
    ]
    return "\n".join(lines)


def describe(settings: TrainingSettings, scans: int) -> str:
    """What the scores were measured on, in a sentence."""
    if settings.data == PHANTOMS:
        return (
            f"Zero-shot AUROC on {scans} held-out SYNTHETIC phantoms of site {settings.phantom_site}: drawings, no "
            "patients, and no clinical meaning."
        )
    return f"Zero-shot AUROC on {scans} held-out scans of {settings.data}."


def save_run(model: PeftModel, folder: Path, settings: TrainingSettings, results: dict[str, Any]) -> None:
    """Write adapter, settings, scores and a page that shows them."""
    model.save_pretrained(folder)
    (folder / "train_config.json").write_text(json.dumps(dataclasses.asdict(settings), indent=2) + "\n")
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    table = results_table(results["base"], results["adapted"], model.config.label_names)
    (folder / "README.md").write_text(f"# LoRA adapter for MedCT\n\n{results['measured_on']}\n\n{table}\n")


def run(settings: TrainingSettings) -> dict[str, Any]:
    """One whole run: score the base, train, check the base, score again, save.

    Returns:
        `base` and `adapted`, see `zero_shot_scores`; what they were measured on; parameters, steps and seconds.

    Raises:
        TrainingError, DataError, VolumeError, FileExistsError: With what is wrong and what to do.
    """
    started = time.monotonic()
    output = Path(settings.output_dir or time.strftime("runs/%Y-%m-%d_%H-%M-%S"))
    refuse_taken(output)
    set_seed(settings.seed)
    accelerator = Accelerator(
        cpu=settings.cpu, dataloader_config=DataLoaderConfiguration(dispatch_batches=False, non_blocking=True)
    )
    base, processor = load_base(settings)
    labels = base.config.label_names
    base_tensors = base.state_dict(keep_vars=True)
    base_sha256 = digest(base_tensors)
    train_source, eval_source = load_sources(settings, base.config)
    with_text = settings.objective != "prompts"
    train_loader, eval_loader = accelerator.prepare(
        make_loader(train_source, settings, Collator(processor, labels, with_text), shuffle=True),
        make_loader(eval_source, settings, Collator(processor, labels, with_text=False), shuffle=False),
    )
    prompts = tokenize_prompts(base.config, processor)
    steps = number_of_steps(train_source, settings, accelerator.num_processes)
    base.to(accelerator.device)
    before = evaluate_zero_shot(base, eval_loader, prompts, accelerator, "score base")

    model = add_lora(base, settings)
    trainable, total = model.get_nb_trainable_parameters()
    accelerator.print(f"trainable parameters: {trainable:,} of {total:,}, {100 * trainable / total:.2f} %")
    model = train(model, train_loader, prompts[0], processor.tokenizer.pad_token_id, settings, steps, accelerator)
    if digest(base_tensors) != base_sha256:
        raise TrainingError("The base changed during training, so the adapter would not fit it. Nothing was saved.")
    after = evaluate_zero_shot(model.base_model.model, eval_loader, prompts, accelerator, "score adapted")

    results = {
        "measured_on": describe(settings, before["scans"]),
        "base": before,
        "adapted": after,
        "auroc_difference": after["auroc"] - before["auroc"],
        "trainable_parameters": trainable,
        "total_parameters": total,
        "base_sha256": base_sha256,
        "steps": steps,
        "seconds": round(time.monotonic() - started, 1),
    }
    if accelerator.is_main_process:
        with whole_folder(output) as folder:
            save_run(model, folder, settings, results)
    accelerator.print(f"\n{results_table(before, after, labels)}\n\n{results['measured_on']}\nAdapter: {output}")
    return results


def number_of_steps(source: Source, settings: TrainingSettings, processes: int) -> int:
    """Optimizer steps of a run.

    Raises:
        TrainingError: If there are fewer studies than a batch holds.
    """
    per_epoch = source.num_rows // (settings.batch_size * processes)
    if not per_epoch:
        raise TrainingError(
            f"{source.num_rows} training studies do not fill one batch of {settings.batch_size} in {processes} "
            "processes. Lower --batch_size."
        )
    steps = per_epoch * settings.epochs
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def main() -> None:
    (settings,) = HfArgumentParser(TrainingSettings, description=__doc__).parse_args_into_dataclasses()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        run(settings)
    except (DataError, TrainingError, VolumeError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
