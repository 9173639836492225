"""The experiment of MedCT-VLM (arXiv 2512.00597), for those who have CT-CLIP_v2.pt and access to CT-RATE.

    accelerate launch -m medct.training.reproduce_paper --checkpoint CT-CLIP_v2.pt --output_dir medct-vlm

Converts the checkpoint, scores the base zero-shot, trains LoRA, scores again, and puts the figures beside the published
ones. The paper does not state the rank, targets beyond "attention of both encoders", loss, prompts, split, learning
rate or epochs: the values used here are our choice. Further rows show what this package does by itself: the recipe
`vision` and, with `--replay SOURCE`, the same with replay. The base was trained on CT-RATE, so replay CT-RATE when
`--data` is another hospital's; with CT-RATE as `--data`, any other source can be replayed.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from medct.common.counting import counted
from medct.common.distributed import start_launch
from medct.common.errors import StoppedError
from medct.common.files import VERSION, refuse_other_settings, with_version, write_text
from medct.common.host import keep_freed_memory
from medct.common.lock import only_run
from medct.common.run_files import RESULTS, TRAIN_CONFIG
from medct.evaluation.record import read_results
from medct.evaluation.report import COMPARED, markdown_table
from medct.publishing.cards import read_json
from medct.publishing.convert_ct_clip_to_hf import convert
from medct.publishing.loading import PHANTOM_BASE
from medct.train import Trainer
from medct.training.run_folder import how_to_resume
from medct.training.settings import NO_SOURCE, TrainingError, TrainingSettings, run_command, setting

# Per cent; arXiv 2512.00597, abstract.
PAPER = {"auroc": (61.3, 68.9), "accuracy": (67.2, 73.6), "macro_f1": (32.1, 36.9)}
NAMES = {"auroc": "AUROC", "accuracy": "accuracy", "macro_f1": "macro-F1"}
# Per cent; CT-CLIP's own publication, zero-shot on the same 18 findings of CT-RATE's validation split.
CT_CLIP_AUROC = 73.1
REPLAY_ROW = "vision, replay"


@dataclass
class PaperSettings(TrainingSettings):
    """The settings of a run with other defaults, and those of the conversion before it."""

    checkpoint: str | None = setting(None, "CT-CLIP_v2.pt; converted on first use.")
    tokenizer: str = setting("microsoft/BiomedVLP-CXR-BERT-specialized", "Hub id or folder of the tokenizer.")
    sizes: str | None = setting(None, "JSON with the sizes of a checkpoint that differs from the published one.")

    model: str = setting(str(PHANTOM_BASE), "Refused: the base is made of --checkpoint.")
    revision: str | None = setting(None, "Refused, like --model.")
    data: str = setting("hf://datasets/ibrahimhamamci/CT-RATE", "CT-RATE on the Hub (gated), or a local copy.")
    recipe: Literal["paper", "full"] = setting(
        "paper", "Recipe of the row that is compared with the paper; see `medct train`."
    )
    strength: Literal["auto", "1"] = setting(
        "1", "Strength in that row. In the others it is chosen on tuning patients."
    )
    eval_steps: int | None = setting(
        0, "Steps between scores of the tuning patients in that row. The others score them ten times."
    )
    batch_size: int = setting(2, "Studies that one process has in memory at once.")
    accumulation_steps: int = setting(4, "Batches in an optimizer step.")
    gradient_checkpointing: bool = setting(True, "Recompute activations instead of keeping them: less memory.")
    num_workers: int = setting(4, "Processes that read scans, for each training process.")


def converted(settings: PaperSettings) -> Path:
    """The base as a Hub folder beside the output, converted once, by one process."""
    if not (settings.checkpoint and settings.output_dir):
        raise TrainingError("Pass --checkpoint CT-CLIP_v2.pt and --output_dir FOLDER.")
    if settings.folds:
        raise TrainingError("--folds divides all patients anew, and the paper has one split. Leave it out.")
    if settings.model != str(PHANTOM_BASE) or settings.revision:
        raise TrainingError("The base is made of --checkpoint. Leave out --model and --revision.")
    folder = Path(settings.output_dir).with_name(Path(settings.output_dir).name + "-base")
    cpu = settings.cpu or parse_flag_from_env("ACCELERATE_USE_CPU")  # `accelerate launch --cpu`
    with start_launch(PartialState, cpu=cpu).main_process_first():
        if not folder.exists():
            convert(Path(settings.checkpoint), folder, settings.tokenizer, settings.sizes and Path(settings.sizes))
    return folder


def beside_the_paper(comparison: dict[str, Any]) -> str:
    """Our figures and the published ones, in per cent, as a Markdown table."""
    titles = [f"{where}: {which}" for where in ("here", "paper") for which, _ in COMPARED]
    rows = []
    for metric, (before, after) in PAPER.items():
        ours = [_per_cent(comparison[which].get(metric), sign) for which, sign in COMPARED]
        own = f"{CT_CLIP_AUROC:.1f}" if metric == "auroc" else ""
        rows.append([NAMES[metric], *ours, f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}", own])
    return markdown_table(["mean of the findings, %", *titles, "CT-CLIP's own"], rows)


def _per_cent(interval: dict[str, float | None] | None, sign: str) -> str:
    if interval is None or interval["value"] is None:
        return "–"
    if interval["low"] is None:
        return f"{100 * interval['value']:{sign}.1f}"
    value, low, high = (f"{100 * interval[part]:{sign}.1f}" for part in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def rows_of(settings: PaperSettings) -> dict[str, PaperSettings]:
    """The runs of the experiment by the names of their rows; the first one is the paper's, and alone is pushed."""
    vision: dict[str, Any] = {"recipe": "vision", "strength": "auto", "eval_steps": None}
    vision |= dict.fromkeys(("adaptation", "targets", "rank", "alpha", "learning_rate"))
    others = settings.without_push()
    rows = {
        settings.recipe: dataclasses.replace(settings, replay=NO_SOURCE),
        "vision": dataclasses.replace(others, replay=NO_SOURCE, output_dir=_beside(settings, "vision"), **vision),
    }
    if settings.replay not in (None, NO_SOURCE):
        folder = _beside(settings, "vision-replay")
        rows[REPLAY_ROW] = dataclasses.replace(others, output_dir=folder, **vision)
    return rows


def _beside(settings: PaperSettings, name: str) -> str:
    folder = Path(str(settings.output_dir))
    return str(folder.with_name(f"{folder.name}-{name}"))


def results_of(settings: PaperSettings) -> dict[str, Any]:
    """A row's results: those that lie there, if its run was complete before the experiment was resumed.

    Raises:
        OtherSettingsError: If that run had other settings, or was of a version of other numbers.
        StoppedError: If its run was stopped.
    """
    folder = Path(str(settings.output_dir))
    if not (settings.resume and (folder / RESULTS).exists()):
        return Trainer(settings).run()
    with only_run(folder):
        saved, results = read_json(folder, TRAIN_CONFIG), read_results(folder)
    chosen = {name: value for name, value in settings.fixed().items() if value is not None}
    before = {name: saved.get(name) for name in chosen} | {VERSION: results["provenance"]["code"]["version"]}
    refuse_other_settings(folder, before, with_version(chosen))
    return results


def recipes_table(results: dict[str, dict[str, Any]]) -> str:
    """The rows of the experiment among each other.

    Args:
        results: What `results.json` holds, by row.
    """
    titles = ["row", "parameters", "mean AUROC, %", "above the base", "on what is to be kept", "strength"]
    rows = []
    for name, each in results.items():
        comparison, kept = each["comparison"], each["kept"]
        aurocs = [
            _per_cent(comparison["adapted"]["auroc"], ""),
            _per_cent(comparison["difference"]["auroc"], "+"),
            _per_cent(kept and kept["difference"]["auroc"], "+"),
        ]
        rows.append([name, f"{each['trainable_parameters']:,}", *aurocs, f"{each['strength']:g}"])
    if REPLAY_ROW not in results:
        rows.append([REPLAY_ROW, "not run: pass --replay SOURCE", "", "", "", ""])
    return markdown_table(titles, rows)


def reproduce(settings: PaperSettings) -> dict[str, Any]:
    """The whole experiment; returns what `results.json` of the paper's row holds.

    Raises:
        StoppedError: If it was stopped by a signal; it names what resumes it, which no row does by itself.
    """
    base = converted(settings)
    rows = rows_of(dataclasses.replace(settings, model=str(base)))
    results = {}
    for name, each in rows.items():
        try:
            results[name] = results_of(each)
        except StoppedError as error:
            raise StoppedError(f"stopped in row {name!r}. {how_to_resume(str(settings.output_dir))}") from error
    first = next(iter(results.values()))
    found = first["comparison"]
    held_out = f"Held out: {counted(found['scans'], 'scan')} of {counted(found['patients'], 'patient')}."
    said = f"{held_out} In brackets: 95 % intervals, bootstrap over patients."
    table = f"{said}\n\n{beside_the_paper(found)}\n\n{recipes_table(results)}"
    state = PartialState()
    state.print(f"\n{table}")
    if state.is_main_process:
        write_text(Path(str(settings.output_dir)) / "beside_the_paper.md", table + "\n")
    return first


def main(arguments: list[str] | None = None, prog: str | None = None) -> None:
    """Run the experiment from the command line.

    Args:
        arguments, prog: See `run_command`.
    """
    run_command(reproduce, PaperSettings, __doc__, arguments, prog)


if __name__ == "__main__":
    keep_freed_memory()
    main()
