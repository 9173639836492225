"""What a run found: scores before and after, what was forgotten, operating points, calibration, and remarks."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from medct.common.counting import counted
from medct.data.prepared import with_revision
from medct.evaluation.figures import Scores, choose_on, source_figures
from medct.evaluation.metrics import zero_shot_scores
from medct.evaluation.operating_points import YOUDEN, remark_on_points
from medct.evaluation.predictions import Key, Predictions, paired
from medct.evaluation.report import calibration_table, points_table, results_table, sites_table
from medct.evaluation.scoring import ScoredStudies
from medct.training.settings import NO_SOURCE, TrainingSettings

SPLITS = ("tune", "valid")
KEPT_SPLITS = ("keep_tune", "keep_valid")
BASE, ADAPTED = "base", "adapted"
SYNTHETIC = "These are SYNTHETIC drawings: no patients, and no clinical meaning."
FEW_STEPS = 50
"""Optimizer steps below which a run is remarked on."""

Scored = dict[str, ScoredStudies]
"""By split: "tune" and "valid" of the new site, and where something is to be kept "keep_tune" and "keep_valid"."""


def mean_auroc(scored: ScoredStudies) -> float | None:
    """Mean AUROC over labels; `None` if none of them varies among these studies.

    Args:
        scored: Studies with their scores.
    """
    try:
        return zero_shot_scores(scored.scores, scored.labels, scored.names)["auroc"]
    except ValueError:
        return None


def in_common(before: Scored, after: Scored) -> tuple[Scored, Scored]:
    """The studies that both models have scored, in the same order.

    One that could not be read in one pass, since memory was full or the Hub did not answer, may be there in another.

    Args:
        before: Of the base.
        after: Of the adapted model, of some or all of these splits.

    Returns:
        Both, of the splits of `after`.

    Raises:
        DataError: If they share no study of a split.
    """
    pairs = {split: paired(before[split], scored, split) for split, scored in after.items()}
    one, other = ({split: pair[side] for split, pair in pairs.items()} for side in (0, 1))
    return one, other


def compare_all(
    before: Scored,
    after: Scored,
    resamples: int,
    seed: int,
    wanted: Mapping[str, tuple[str, float]] | None = None,
) -> dict[str, Any]:
    """Base and adapted model on held-out studies.

    Args:
        before: Of the base.
        after: Of the adapted model, see `in_common`.
        resamples: Of the bootstrap over patients.
        seed: Of the bootstrap.
        wanted: Operating points besides Youden's, see `wanted_points`.

    Returns:
        Ready for JSON. `comparison`: on the new site, see `source_figures`. `kept`: the same on what is to be kept, or
        `None`. `tune_auroc`: mean AUROC of each model on the new site's tuning studies, `keep_tune_auroc` on those to
        be kept. `thresholds`, `operating_points` (those that were wanted) and `calibration`: of the adapted model, from
        the tuning studies. `table`: all of it in Markdown.
    """
    options = {"resamples": resamples, "seed": seed}
    (base_points, _), (points, calibration) = [choose_on(each["tune"], wanted or {}) for each in (before, after)]

    def figures(split: str) -> dict[str, Any]:
        models = {BASE: Scores(before[split], base_points), ADAPTED: Scores(after[split], points, calibration)}
        return source_figures(models, before[split].names, **options)

    comparison = figures("valid")
    kept = figures("keep_valid") if "keep_valid" in before else None
    chosen = dict(points)
    thresholds = chosen.pop(YOUDEN, None)
    tables = [
        results_table(comparison, before["valid"].names),
        sites_table(comparison, kept),
        points_table(comparison["operating_points"], "the new site") if chosen else "",
        calibration_table(comparison["calibration_error"].get(ADAPTED)),
    ]
    return {
        "comparison": comparison,
        "kept": kept,
        "tune_auroc": _by_model(before, after, "tune"),
        "keep_tune_auroc": _by_model(before, after, "keep_tune"),
        "thresholds": thresholds,
        "operating_points": chosen or None,
        "calibration": calibration or None,
        "table": "\n\n".join(table for table in tables if table),
    }


def predictions_of(before: Scored, after: Scored, sources: Sequence[str]) -> Predictions:
    """The scores of both models, as they are written down.

    Args:
        before: Of the base.
        after: Of the adapted model.
        sources: What to call the new site and, where there is one, what is to be kept.
    """
    where = dict(zip((*SPLITS, *KEPT_SPLITS), [*sources[:1] * 2, *sources[1:] * 2], strict=False))
    return Predictions(
        list(dict.fromkeys(name for scored in before.values() for name in scored.names)),
        {
            Key(model, where[split], split.removeprefix("keep_")): scored
            for model, by_split in ((BASE, before), (ADAPTED, after))
            for split, scored in by_split.items()
        },
    )


def _by_model(before: Scored, after: Scored, split: str) -> dict[str, float | None] | None:
    if split not in before:
        return None
    return {BASE: mean_auroc(before[split]), ADAPTED: mean_auroc(after[split])}


def remarks_on(results: dict[str, Any], max_forgotten: float) -> list[str]:
    """What nobody should miss who uses the adapter, each in a sentence or two.

    Args:
        results: With `strength`, `strengths_tried` and what `compare_all` returns.
        max_forgotten: Most that the mean AUROC on what is to be kept may fall.
    """
    remarks = few_patients(results)
    if results["strength"] == 0:
        return [
            "This adapter does not help: on the tuning patients no strength of it scores above the base within what "
            "may be forgotten. Its strength is 0, so what is saved is the base, unchanged.",
            *remarks,
        ]
    tune = results["tune_auroc"]
    if tune["base"] is None:
        remarks.append("No label varies among the tuning patients, so nothing could be chosen there.")
    elif tune["adapted"] < tune["base"]:
        remarks.append(
            f"Worse than the base on the tuning patients: mean AUROC {tune['adapted']:.3f}, not {tune['base']:.3f}."
        )
    kept_tune = results["keep_tune_auroc"]
    if kept_tune and kept_tune["base"] is None and results["strengths_tried"]:
        remarks.append(
            "No label varies among the tuning patients of what is to be kept, so nothing limited what is forgotten."
        )
    if (gained := results["comparison"]["difference"]["auroc"]["value"]) < 0:
        remarks.append(f"Worse than the base on the held-out patients: mean AUROC {gained:+.3f}.")
    lost = -results["kept"]["difference"]["auroc"]["value"] if results["kept"] else 0
    if lost > max_forgotten:
        remarks.append(
            f"On held-out patients of what is to be kept it forgets {lost:.3f} of mean AUROC, more than the allowed "
            f"{max_forgotten:g}."
        )
    return remarks


def few_patients(results: dict[str, Any]) -> list[str]:
    """What could not be told, or chosen, because too few patients have a finding or are without it.

    Args:
        results: With `label_names` and what `compare_all` returns.
    """
    remarks, comparison = [], results["comparison"]
    if comparison["adapted"]["auroc"]["low"] is None:
        remedy = "" if results.get("folds") else " With --folds 5 every patient is held out once."
        who = counted(comparison["patients"], "held-out patient is", "held-out patients are")
        remarks.append(f"{who} too few to tell how reliable means over findings are: they have no interval.{remedy}")
    return remarks + remark_on_points(results["thresholds"] or {}, results["label_names"])


def lower_precision(mixed_precision: str) -> str | None:
    """What to know of figures under autocast; None without it.

    Args:
        mixed_precision: Of the launch: "no", "bf16" or "fp16".
    """
    if mixed_precision == "no":
        return None
    return (
        f"Scored in {mixed_precision}: operating points and calibration are for scores in that precision. In another "
        "one, such as float32, scores differ a little."
    )


def few_steps(steps: int, batches: int, settings: TrainingSettings) -> str | None:
    """What to say of a run that is too short to learn much; `None` of any other.

    Args:
        steps: Of the run.
        batches: Of a process in an epoch.
        settings: Of the run.
    """
    if steps >= FEW_STEPS:
        return None
    remedies = []
    if (epochs := math.ceil(FEW_STEPS * settings.accumulation_steps / batches)) > settings.epochs:
        remedies.append(f"--epochs {epochs}")
    if settings.max_steps is not None and settings.max_steps < FEW_STEPS:
        remedies.append(f"a higher --max_steps than {settings.max_steps}")
    few = counted(steps, "step is", "steps are")
    return f"{few} few: an adapter learns little in fewer than {FEW_STEPS}. Pass {' and '.join(remedies)}."


def repeatable(settings: TrainingSettings, revision: str | None, points: dict[str, Any]) -> dict[str, Any] | None:
    """The settings with which `medct evaluate` scores a run's held-out studies again.

    Args:
        settings: Of the run, completed.
        revision: Commit of its base.
        points: Operating points of both models.

    Returns:
        `None` for a run that trained all weights, as its model is not an adapter of the base, and for folds, whose
        studies are no split of their source.
    """
    if settings.adaptation == "full" or settings.folds:
        return None
    addresses = [with_revision(settings.data, settings.data_revision), settings.keep]
    sources = [address for address in addresses if address != NO_SOURCE]
    return {
        "model": settings.model,
        "revision": revision,
        "adapter": ".",
        "against": BASE,
        "names": [BASE, ADAPTED],
        "points": points,
        "data": sources,
        "labels": settings.labels,
        "templates": settings.templates,
        "mapping": [
            f"{address}={mapping}"
            for address, mapping in zip(addresses, (settings.mapping, settings.keep_mapping), strict=True)
            if mapping is not None
        ],
        "split": "valid",
        "reconstructions": settings.reconstructions,
        "limit": settings.max_eval_studies,
        "phantoms": dataclasses.asdict(settings.phantoms),
        "bootstrap_resamples": settings.bootstrap_resamples,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "dtype": "auto",
    }
