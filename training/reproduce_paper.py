"""The experiment of MedCT-VLM (arXiv 2512.00597) for those who hold CT-CLIP_v2.pt and access to CT-RATE.

    accelerate launch -m medct.training.reproduce_paper --checkpoint CT-CLIP_v2.pt --output_dir medct-vlm
    accelerate launch -m medct.training.reproduce_paper --checkpoint CT-CLIP_v2.pt --output_dir medct-vlm \
        --estimate True

Converts the checkpoint, measures a step and says what the run will need, scores the base zero-shot, trains LoRA,
scores again, and puts the figures beside the published ones. The paper names neither rank nor targets beyond
"attention of both encoders", loss, prompts, split, learning rate or epochs: what stands here for them is our choice.
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from medct.common.files import whole_file
from medct.common.host import keep_freed_memory
from medct.data import to_device
from medct.evaluation.scoring import texts_to
from medct.publishing.convert_ct_clip_to_hf import convert
from medct.train import Trainer, TrainingError, TrainingSettings, memory_bytes, one_line_errors, parse_settings, setting
from medct.training.lora import add_lora, core
from medct.training.objectives import StepLoss

# Per cent; arXiv 2512.00597, abstract.
PAPER = {"auroc": (61.3, 68.9), "accuracy": (67.2, 73.6), "macro_f1": (32.1, 36.9)}
NAMES = {"auroc": "AUROC", "accuracy": "accuracy", "macro_f1": "macro-F1"}
# Per cent; CT-CLIP's own publication, zero-shot on the same 18 findings of CT-RATE's validation split.
CT_CLIP_AUROC = 73.1
GIB = 2**30


@dataclass
class PaperSettings(TrainingSettings):
    """The settings of a run with other defaults, and what comes before it."""

    checkpoint: str | None = setting(None, "CT-CLIP_v2.pt; converted on first use.")
    tokenizer: str = setting("microsoft/BiomedVLP-CXR-BERT-specialized", "Hub id or folder of the tokenizer.")
    sizes: str | None = setting(None, "JSON with the sizes of a checkpoint that has not the published ones.")
    estimate: bool = setting(False, "Say what the run needs, and stop.")

    data: str = setting("hf://datasets/ibrahimhamamci/CT-RATE", "CT-RATE on the Hub (gated), or a local copy.")
    learning_rate: float = setting(1e-4, "Highest; it rises over the first tenth and falls as a cosine.")
    batch_size: int = setting(2, "Studies that one process has in memory at once.")
    accumulation_steps: int = setting(4, "Such batches in an optimizer step.")
    gradient_checkpointing: bool = setting(True, "Recompute activations instead of keeping them: less memory.")
    num_workers: int = setting(4, "Processes that read scans, for each training process.")


def converted(settings: PaperSettings) -> Path:
    """The base as a Hub folder beside the output; made by one process, once."""
    if not (settings.checkpoint and settings.output_dir):
        raise TrainingError("Pass --checkpoint CT-CLIP_v2.pt and --output_dir FOLDER.")
    folder = Path(settings.output_dir).with_name(Path(settings.output_dir).name + "-base")
    with PartialState(cpu=settings.cpu).main_process_first():
        if not folder.exists():
            convert(Path(settings.checkpoint), folder, settings.tokenizer, settings.sizes and Path(settings.sizes))
    return folder


@dataclass(frozen=True)
class Estimate:
    """What a run will need, from one batch that was read, encoded and learned from.

    Args:
        reading_seconds: To read and preprocess a study in one worker.
        encoding_seconds: To encode a study, without gradients.
        training_seconds: To learn from a study.
        memory_bytes: The most that one process used while it did.
        disk_bytes: Of the converted base, checkpoints and adapter; scans are streamed and not kept.
        trained: Studies learned from in all epochs.
        scored: Studies scored, before and after.
        processes: That share the work.
        workers: Readers of each.
    """

    reading_seconds: float
    encoding_seconds: float
    training_seconds: float
    memory_bytes: int
    disk_bytes: int
    trained: int
    scored: int
    processes: int
    workers: int

    @property
    def hours(self) -> float:
        """Reading goes on beside computing, so the slower of both counts."""
        reading = self.reading_seconds / max(1, self.workers)
        training = self.trained * max(self.training_seconds, reading)
        scoring = self.scored * max(self.encoding_seconds, reading)
        return (training + scoring) / self.processes / 3600

    def __str__(self) -> str:
        return (
            f"Estimate: {self.hours:.1f} hours in {self.processes} process{'es' * (self.processes > 1)} for "
            f"{self.trained:,} studies to learn from and {self.scored:,} to score; a study takes "
            f"{self.reading_seconds:.2f} s to read ({self.workers} at a time), {self.encoding_seconds:.2f} s to encode "
            f"and {self.training_seconds:.2f} s to learn from. Memory: {self.memory_bytes / GIB:.1f} GiB a process, "
            f"beside its readers. Disk: {self.disk_bytes / GIB:.2f} GiB; scans are streamed and not kept."
        )


def measure(trainer: Trainer, base: Path) -> Estimate:
    """Read, encode and learn from one batch; the model is as before afterwards."""
    settings, device = trainer.settings, trainer.accelerator.device
    reader = trainer.loader("train", with_text=settings.objective != "prompts")
    reader.num_workers = 0
    started = time.perf_counter()
    batch = next(iter(reader))
    reading = (time.perf_counter() - started) / settings.batch_size
    batch = to_device(batch, device, trainer.config)
    model = add_lora(trainer.base.to(device), rank=settings.rank, alpha=settings.alpha)
    if settings.gradient_checkpointing:
        core(model).activation_checkpointing_enable()
    with trainer.accelerator.autocast():
        encoding = _seconds(device, lambda: _encode(trainer.base, batch)) / settings.batch_size
    model.train()
    learn = StepLoss(settings.objective, settings.report_weight, trainer.accelerator.autocast).backward
    prompts = texts_to(trainer.prompts[0], device)
    training = _seconds(device, lambda: learn(core(model), [batch], prompts)) / settings.batch_size
    adapter_bytes = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    core(model).activation_checkpointing_disable()
    trainer.base = model.unload()
    checkpoints = 3 * adapter_bytes * (settings.keep_checkpoints + 1) * trainer.accelerator.num_processes
    return Estimate(
        reading_seconds=reading,
        encoding_seconds=encoding,
        training_seconds=training,
        memory_bytes=memory_bytes(device),
        disk_bytes=sum(path.stat().st_size for path in base.iterdir()) + checkpoints + 3 * adapter_bytes,
        trained=trainer.steps * settings.batch_size * settings.accumulation_steps * trainer.accelerator.num_processes,
        scored=2 * sum(trainer.sources[split].num_studies for split in ("tune", "valid")),
        processes=trainer.accelerator.num_processes,
        workers=settings.num_workers,
    )


@torch.no_grad()
def _encode(model: torch.nn.Module, batch: dict[str, Any]) -> None:
    model.eval()
    model.get_image_features(batch["pixel_values"])


def _seconds(device: torch.device, action: Any) -> float:
    """The second of two times, since the first call on a GPU prepares."""
    for _ in range(2 if device.type == "cuda" else 1):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - started


def beside_the_paper(comparison: dict[str, Any]) -> str:
    """Our figures and the published ones, in per cent, as a Markdown table."""
    lines = [
        "| mean of the findings, % | here: base | here: adapted | here: difference | paper: base | paper: adapted "
        "| paper: difference | CT-CLIP's own |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for metric, (before, after) in PAPER.items():
        ours = [_per_cent(comparison[which].get(metric), sign) for which, sign in _COLUMNS]
        own = f"{CT_CLIP_AUROC:.1f}" if metric == "auroc" else ""
        cells = [NAMES[metric], *ours, f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}", own]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


_COLUMNS = (("base", ""), ("adapted", ""), ("difference", "+"))


def _per_cent(interval: dict[str, float | None] | None, sign: str) -> str:
    if interval is None or interval["value"] is None:
        return "–"
    value, low, high = (f"{100 * interval[part]:{sign}.1f}" for part in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def reproduce(settings: PaperSettings) -> dict[str, Any] | None:
    """The whole experiment; only its estimate if the settings say so."""
    base = converted(settings)
    settings = dataclasses.replace(settings, model=str(base))
    trainer = Trainer(settings)
    trainer.accelerator.print(measure(trainer, base))
    if settings.estimate:
        return None
    trainer = Trainer(settings)  # anew, so that measuring has no influence on random numbers
    results = trainer.run()
    table = beside_the_paper(results["comparison"])
    trainer.accelerator.print(f"\n{table}")
    if trainer.accelerator.is_main_process:
        with whole_file(trainer.output / "beside_the_paper.md") as aside:
            aside.write_text(table + "\n")
    return results


def main(arguments: list[str] | None = None) -> None:
    settings = parse_settings(PaperSettings, __doc__, arguments)
    keep_freed_memory()
    with one_line_errors():
        reproduce(settings)


if __name__ == "__main__":
    main()
