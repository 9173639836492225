"""How much of full fine-tuning's gain LoRA keeps, and how much each forgets, on SYNTHETIC phantoms.

    python benchmarks/bench_adaptation.py            # about half an hour on 2 CPU cores; resumes where it stopped

The phantom base knows site A and is adapted to site B with the same number of optimizer steps in every run. Learning
rates are chosen on the tuning patients of site B, at 100 training patients, once for LoRA and once for full
fine-tuning; scores come from 300 other patients of each site. Writes `adaptation.md` and `adaptation.json`.
"""

import argparse
import functools
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

from medct import MedCTModel
from medct import data as medct_data
from medct.common.files import whole_file
from medct.data import StudyLoader, phantom_source
from medct.evaluation.metrics import zero_shot_scores
from medct.evaluation.scoring import score_studies
from medct.train import Trainer
from medct.training.settings import TrainingSettings

STEPS = 150
PATIENTS = (25, 100, 400)
RANKS = (1, 4, 16, 64)
OTHER_TARGETS = ("vision", "text", "both+projections", "all")
LEARNING_RATES = {"lora": (1e-3, 3e-3, 1e-2), "full": (1e-4, 3e-4, 1e-3, 3e-3)}
CHOSEN_AT = 100
TUNE_PATIENTS = 300
SMALLEST_GAIN = 0.02  # of full fine-tuning; shares of a smaller gain are noise
CHOSEN_RANK = 16


def settings_of(
    adaptation: str, rank: int, patients: int, learning_rate: float, targets: str, folder: str | Path
) -> TrainingSettings:
    """Settings of a run of `STEPS` steps, however few the patients.

    Args:
        adaptation: See `TrainingSettings`.
        rank: Rank of the matrices; alpha is twice that.
        patients: Number of training patients, at least one batch.
        learning_rate: Peak learning rate.
        targets: See `TARGETS`.
        folder: Where the run writes.
    """
    return TrainingSettings(
        adaptation=adaptation,
        targets=targets,
        rank=rank,
        alpha=2 * rank,
        learning_rate=learning_rate,
        phantom_train_patients=patients,
        phantom_tune_patients=TUNE_PATIENTS,
        epochs=math.ceil(STEPS / (patients // TrainingSettings.batch_size)),
        max_steps=STEPS,
        checkpoint_steps=STEPS,
        bootstrap_resamples=1,
        output_dir=str(Path(folder) / "run"),
        resume=True,  # takes over the base's scores that lie there
        num_workers=0,
        cpu=True,
    )


def on_site_a(model: MedCTModel, trainer: Trainer) -> float:
    """Mean AUROC on patients of the site that the base was trained on.

    Args:
        model: The model to score.
        trainer: Its settings, processor and prompts are used.
    """
    source = phantom_source("A", range(trainer.settings.phantom_eval_patients), trainer.settings.seed)
    labels = trainer.config.label_names
    loader = StudyLoader(source, trainer.processor, labels, batch_size=8, with_text=False)
    scored = score_studies(model, loader, trainer.prompts, trainer.accelerator, "score site A")
    return zero_shot_scores(scored.scores, scored.labels, labels)["auroc"]


class BaseScores:
    """Scores of the base, which is the same in every run and so is scored once."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="bench-adaptation-"))
        self.on_a: float | None = None

    def put_into(self, trainer: Trainer) -> None:
        """Put the scores where a run would leave them, and so finds them."""
        if self.on_a is None:
            self.on_a = on_site_a(trainer.base, trainer)
            for split in ("tune", "valid"):
                trainer.score_base(split)
            for path in trainer.folder.work.glob("base_*.json"):
                shutil.copy(path, self.folder)
        for path in self.folder.iterdir():
            shutil.copy(path, trainer.folder.work)


def figures_of(settings: TrainingSettings, base: BaseScores) -> dict[str, Any]:
    """Train and score once.

    Args:
        settings: From `settings_of`.
        base: Scores of the base.

    Returns:
        AUROC on each site before and after, and the size of what was trained and saved.
    """
    trainer = Trainer(settings)
    base.put_into(trainer)
    results = trainer.run()
    weights = "model.safetensors" if settings.adaptation == "full" else "adapter_model.safetensors"
    return {
        "b_base": results["comparison"]["base"]["auroc"]["value"],
        "b": results["comparison"]["adapted"]["auroc"]["value"],
        "a_base": base.on_a,
        "a": on_site_a(trainer.base, trainer),
        "tune": results["tune_auroc"]["adapted"],
        "trainable_share": results["trainable_parameters"] / results["total_parameters"],
        "bytes": (trainer.folder.final / weights).stat().st_size,
    }


class Runs:
    """Runs that are made once and kept in a JSON file."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        self.base = BaseScores()

    def get(
        self, adaptation: str, rank: int, patients: int, learning_rate: float, targets: str = "both"
    ) -> dict[str, Any]:
        """The figures of a run, made if it is not there yet.

        Args:
            adaptation, rank, patients, learning_rate, targets: See `settings_of`.
        """
        key = {"adaptation": adaptation, "rank": rank, "patients": patients, "learning_rate": learning_rate}
        key["targets"] = targets
        for row in self.rows:
            if key.items() <= row.items():
                return row
        with tempfile.TemporaryDirectory() as folder:
            row = key | figures_of(settings_of(**key, folder=folder), self.base)
        self.rows.append(row)
        with whole_file(self.path) as aside:
            aside.write_text(json.dumps(self.rows, indent=1) + "\n")
        return row

    def best_learning_rate(self, adaptation: str) -> float:
        """The learning rate whose adapted model scores highest on the tuning patients."""
        return max(
            LEARNING_RATES[adaptation], key=lambda rate: self.get(adaptation, CHOSEN_RANK, CHOSEN_AT, rate)["tune"]
        )


def table(rows: list[dict[str, Any]], full: dict[int, dict[str, Any]]) -> str:
    """The runs as a Markdown table.

    Args:
        rows: Figures of the runs.
        full: Figures of full fine-tuning by number of patients.
    """
    lines = [
        "| patients | trained | share of weights | saved | site B | gain | of full's gain | site A | lost on A |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        only = "" if row["targets"] == "both" else f", targets {row['targets']}"
        name = "all weights" if row["adaptation"] == "full" else f"rank {row['rank']}{only}"
        gain, reference = row["b"] - row["b_base"], full[row["patients"]]
        full_gain = reference["b"] - reference["b_base"]
        share = f"{gain / full_gain:.0%}" if full_gain > SMALLEST_GAIN else "–"
        lines.append(
            f"| {row['patients']} | {name} | {row['trainable_share']:.1%} | {row['bytes'] / 1e6:.2f} MB "
            f"| {row['b']:.3f} | "
            f"{gain:+.3f} | {share} | {row['a']:.3f} | {row['a_base'] - row['a']:+.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).with_name("adaptation.md"), help="Table to write."
    )
    arguments = parser.parse_args()
    medct_data.make_phantom = functools.lru_cache(maxsize=None)(medct_data.make_phantom)  # each is drawn once
    runs = Runs(arguments.output.with_suffix(".json"))
    rates = {adaptation: runs.best_learning_rate(adaptation) for adaptation in LEARNING_RATES}
    rows, full = [], {}
    for patients in PATIENTS:
        full[patients] = runs.get("full", CHOSEN_RANK, patients, rates["full"])
        rows += [runs.get("lora", rank, patients, rates["lora"]) for rank in RANKS] + [full[patients]]
    others = [runs.get("lora", CHOSEN_RANK, PATIENTS[-1], rates["lora"], targets) for targets in OTHER_TARGETS]
    text = (
        "# Adaptation from site A to site B, SYNTHETIC phantoms\n\n"
        f"Mean zero-shot AUROC of {TrainingSettings.phantom_eval_patients} held-out phantoms of each "
        f"site. Base: {rows[0]['b_base']:.3f} on B, {rows[0]['a_base']:.3f} on A. {STEPS} steps of "
        f"{TrainingSettings.batch_size} in every run; learning rates {rates['lora']:g} (LoRA) and {rates['full']:g} "
        f"(all weights) chosen on {TUNE_PATIENTS} other patients of B. Made by "
        f"`python benchmarks/{Path(__file__).name}`.\n\n{table(rows + others, full)}\n"
    )
    with whole_file(arguments.output) as aside:
        aside.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
