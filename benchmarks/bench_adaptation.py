"""How much of full fine-tuning's gain an adapter keeps, and what either forgets, on SYNTHETIC phantoms.

    python benchmarks/bench_adaptation.py --processes 2      # hours on 2 CPU cores, minutes with a GPU and 16

The phantom base knows site A and is adapted to site B, with the same number of optimizer steps in every run and three
seeds, each with other patients and another initialisation. The adapter is that of `medct train`: recipe `vision` with
replay, early stopping and a strength chosen on tuning patients. The reference is full fine-tuning of the vision half.
Learning rates are chosen by the tuning patients of site B, at 100 training patients, once for each. Scores are those of
300 other patients of each site. Site C has no part in any choice; its rows come last.

Each phantom is drawn once and kept: 20 GB in all. Runs are made on a GPU if there is one; what is there is not made
again.

The table is written after every run and says which runs are missing. Writes `adaptation.md` and `adaptation.json`.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from medct import data as medct_data
from medct.common.counting import FEWEST_RESAMPLES
from medct.common.files import whole_file
from medct.data import PhantomCohort
from medct.data.phantoms import make_phantom
from medct.evaluation.scoring import ScoredStudies
from medct.train import Trainer
from medct.training.recipes import RECIPES
from medct.training.settings import TrainingSettings

STEPS = 300
EVAL_STEPS = 30
PATIENTS = (400, 25, 100)
SEEDS = (0, 1, 2)
TUNE_PATIENTS = 200
EVAL_PATIENTS = 300
# Of each kind of run, the settings by which it differs from the defaults.
KINDS: dict[str, dict[str, Any]] = {
    "full": {"recipe": "full", "replay": "none", "strength": "1", "eval_steps": 0},
    "vision, replay": {"recipe": "vision", "eval_steps": EVAL_STEPS},
    "vision": {"recipe": "vision", "replay": "none", "eval_steps": EVAL_STEPS},
    "paper": {"recipe": "paper", "replay": "none", "strength": "1", "eval_steps": 0},
}
NAMES = {
    "full": "all weights of the vision half (reference)",
    "vision, replay": "recipe vision, replay .2, strength and steps chosen",
    "vision": "recipe vision, no replay, strength and steps chosen",
    "paper": "recipe paper as it was trained",
}
REFERENCE, ADAPTER = "full", "vision, replay"
CHOSEN_AT = 100
# Multiples of the recipe's own.
RATES = (0.5, 1.0, 2.0)
# Least share of the reference's gain, or least gain, and most that may be lost on site A.
GOALS = {400: "95 %, .010", 100: "90 %, .010", 25: "+.03, .010"}


Site = Literal["A", "B", "C"]


@dataclass(frozen=True)
class Key:
    """What a run is known by."""

    kind: str
    patients: int
    seed: int
    site: Site = "B"
    rate: float = 1.0


def settings_of(key: Key, folder: str) -> TrainingSettings:
    """A run of at most `STEPS` steps, however few the patients; those with replayed studies count.

    Args:
        key: Which run.
        folder: Where it writes.
    """
    recipe = RECIPES[KINDS[key.kind]["recipe"]]
    return TrainingSettings(
        **KINDS[key.kind],
        keep="phantoms:A",
        learning_rate=key.rate * recipe.learning_rate,
        seed=key.seed,
        phantom_site=key.site,
        phantom_train_patients=key.patients,
        phantom_tune_patients=TUNE_PATIENTS,
        phantom_eval_patients=EVAL_PATIENTS,
        epochs=STEPS,
        max_steps=STEPS,
        checkpoint_steps=STEPS,
        bootstrap_resamples=FEWEST_RESAMPLES,
        output_dir=str(Path(folder) / "run"),
        num_workers=0,
    )


_base_scores: dict[tuple[str, int, str], ScoredStudies] = {}  # by site, seed and split


class BenchmarkTrainer(Trainer):
    """The base is the same in every run of a seed and site, so a process scores it once."""

    def score_base(self, split: str) -> ScoredStudies:
        key = self.settings.phantom_site, self.settings.seed, split
        if key not in _base_scores:
            _base_scores[key] = super().score_base(split)
        return _base_scores[key]


def make(key: Key) -> dict[str, Any]:
    """Make a run in a process that `start` has prepared.

    Args:
        key: Which run.

    Returns:
        Its row.
    """
    with tempfile.TemporaryDirectory() as folder:
        return asdict(key) | _figures(BenchmarkTrainer(settings_of(key, folder)).run())


_drawn: dict[tuple[int, str, int], dict[str, Any]] = {}  # 1.5 MB each


def _draw(phantom: tuple[int, str, int]) -> dict[str, Any]:
    return _drawn[phantom] if phantom in _drawn else make_phantom(*phantom)


def draw_phantoms(keys: list[Key], pool: Executor) -> None:
    """Draw each phantom of some runs once; processes that are forked later share them.

    Args:
        keys: The runs.
        pool: Draws them.
    """
    scored = {"tune_patients": TUNE_PATIENTS, "eval_patients": EVAL_PATIENTS}
    cohorts = [PhantomCohort(key.site, key.patients, seed=key.seed, **scored) for key in keys]
    cohorts += [PhantomCohort("A", seed=key.seed, **scored) for key in keys]
    wanted = {
        (patient, cohort.site, cohort.seed)
        for cohort in cohorts
        for split in ("train", "tune", "valid")
        for patient in cohort.patients(split)
    }
    missing = sorted(wanted - _drawn.keys())
    for phantom, made in zip(missing, pool.map(_draw, missing, chunksize=20), strict=True):
        _drawn[phantom] = made


def start(threads: int) -> None:
    """Prepare a process.

    Args:
        threads: For torch.
    """
    torch.set_num_threads(threads)
    medct_data.make_phantom = lambda *phantom: _draw(phantom)


class Runs:
    """Runs that are made once; a JSON file keeps them."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def found(self, key: Key) -> dict[str, Any] | None:
        return next((row for row in self.rows if asdict(key).items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> None:
        """Keep the row of a run."""
        self.rows.append(row)
        with whole_file(self.path) as aside:
            aside.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")

    def best_rate(self, kind: str) -> float:
        """The one whose runs score highest on the tuning patients, of those that were tried; else the recipe's own."""
        tried = {rate: self.found(Key(kind, CHOSEN_AT, SEEDS[0], rate=rate)) for rate in RATES}
        known = {rate: row["tune"] for rate, row in tried.items() if row}
        return max(known, key=lambda rate: known[rate]) if len(known) == len(RATES) else 1.0


def _figures(results: dict[str, Any]) -> dict[str, Any]:
    return {
        "base": results["comparison"]["base"]["auroc"]["value"],
        "gain": results["comparison"]["difference"]["auroc"]["value"],
        "lost": -results["kept"]["difference"]["auroc"]["value"],
        "tune": results["tune_auroc"]["adapted"],
        "strength": results["strength"],
        "steps": results["steps"],
        "best_step": results["best_step"],
        "trainable": results["trainable_parameters"],
        "seconds": results["seconds"],
        "device": results["device"],
    }


def choosing() -> list[Key]:
    """The runs that choose the learning rates."""
    return [Key(kind, CHOSEN_AT, SEEDS[0], rate=rate) for kind in (REFERENCE, ADAPTER) for rate in RATES]


def scored(runs: Runs) -> Iterator[Key]:
    """The runs of the tables, by importance.

    Args:
        runs: Those that there are; they decide about the learning rates.
    """
    for site, sizes in (("B", PATIENTS), ("C", PATIENTS[:1])):
        for patients in sizes:
            for seed in SEEDS:
                for kind in (ADAPTER, REFERENCE):
                    yield Key(kind, patients, seed, site, runs.best_rate(kind))
    for kind in ("vision", "paper"):
        yield Key(kind, PATIENTS[0], SEEDS[0])


def _spread(values: list[float], form: str) -> str:
    """Mean and range."""
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def table(runs: Runs, site: str) -> str:
    """Markdown, from the runs that there are.

    Args:
        runs: Those that there are.
        site: Site that was adapted to.
    """
    lines = [
        "| patients | trained | seeds | gain | of the reference's | lost on A | strength | steps | goal |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for patients in sorted(PATIENTS, reverse=True):
        for kind in KINDS:
            rate = runs.best_rate(kind)
            rows = {seed: runs.found(Key(kind, patients, seed, site, rate)) for seed in SEEDS}
            rows = {seed: row for seed, row in rows.items() if row}
            if not rows:
                continue
            shares = []
            for seed, row in rows.items():
                reference = runs.found(Key(REFERENCE, patients, seed, site, runs.best_rate(REFERENCE)))
                if reference and kind != REFERENCE and reference["gain"] > 0.02:  # shares of less are noise
                    shares.append(row["gain"] / reference["gain"])
            cells = [
                str(patients),
                NAMES[kind],
                f"{len(rows)} of {len(SEEDS)}",
                _spread([row["gain"] for row in rows.values()], "+.3f"),
                _spread(shares, ".0%") if shares else "",
                _spread([row["lost"] for row in rows.values()], "+.3f"),
                " / ".join(f"{row['strength']:g}" for row in rows.values()),
                " / ".join(str(row["best_step"] or row["steps"]) for row in rows.values()),
                GOALS[patients] if kind == ADAPTER else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else "No run yet."


def report(runs: Runs) -> str:
    """The whole page.

    Args:
        runs: Those that there are.
    """
    missing = [key for key in (*choosing(), *scored(runs)) if not runs.found(key)]
    chosen = {
        kind: runs.best_rate(kind) * RECIPES[KINDS[kind]["recipe"]].learning_rate for kind in (REFERENCE, ADAPTER)
    }
    tried = sum(bool(runs.found(Key(kind, CHOSEN_AT, SEEDS[0], rate=rate))) for kind in chosen for rate in RATES)
    lines = [
        "# Adaptation from site A, SYNTHETIC phantoms",
        f"Mean zero-shot AUROC of {EVAL_PATIENTS} held-out phantoms of each site. {STEPS} steps of "
        f"{TrainingSettings.batch_size} in every run, those with replayed studies counted; an adapter may have been "
        f"stopped before. Strength, step and learning rate were chosen on {TUNE_PATIENTS} other patients of each site. "
        f"Means over seeds, in brackets their range. Made by `python benchmarks/{Path(__file__).name}`.",
        f"Learning rates: {chosen[ADAPTER]:g} (adapter), {chosen[REFERENCE]:g} (reference); of {2 * len(RATES)} runs "
        f"that choose them, {tried} were made"
        + ("." if tried == 2 * len(RATES) else ", so they are the recipes' own, found in earlier trials on site B."),
        "Made on: " + (", ".join(sorted({row["device"] for row in runs.rows})) or "nothing yet") + ".",
        "## Site B",
        table(runs, "B"),
        "## Site C, which had no part in any choice",
        table(runs, "C"),
    ]
    if missing:
        said = "; ".join(f"{key.kind}, {key.patients} patients, seed {key.seed}, site {key.site}" for key in missing)
        lines.append(f"Not run: {said}.")
    return "\n\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).with_name("adaptation.md"), help="Table to write."
    )
    parser.add_argument("--processes", type=int, default=1, help="Most runs at a time; they share the cores.")
    parser.add_argument("--report_only", action="store_true", help="Make no run.")
    arguments = parser.parse_args()
    runs = Runs(arguments.output.with_suffix(".json"))
    cores = os.cpu_count() or 1
    fork = multiprocessing.get_context("fork")
    for keys in () if arguments.report_only else (choosing, lambda: scored(runs)):
        missing = [key for key in keys() if not runs.found(key)]
        if not missing:
            continue
        with ProcessPoolExecutor(cores, fork) as pool:
            draw_phantoms(missing, pool)
        processes = min(arguments.processes, len(missing))
        with ProcessPoolExecutor(processes, fork, initializer=start, initargs=(max(1, cores // processes),)) as pool:
            for future in as_completed(pool.submit(make, key) for key in missing):
                runs.add(future.result())
                with whole_file(arguments.output) as aside:
                    aside.write_text(report(runs), encoding="utf-8")
    with whole_file(arguments.output) as aside:
        aside.write_text(report(runs), encoding="utf-8")
    print(report(runs))


if __name__ == "__main__":
    main()
