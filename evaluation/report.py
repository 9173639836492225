"""Scores as Markdown tables."""

from collections.abc import Sequence
from typing import Any

from medct.evaluation.metrics import CT_CLIP_PREFIX, Interval

UNDEFINED = "–"
_COLUMNS = (("base", ""), ("adapted", ""), ("difference", "+"))
MEANS = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    f"{CT_CLIP_PREFIX}accuracy": "CT-CLIP protocol: accuracy",
    f"{CT_CLIP_PREFIX}weighted_f1": "CT-CLIP protocol: weighted F1",
    f"{CT_CLIP_PREFIX}precision": "CT-CLIP protocol: precision",
}


def results_table(comparison: dict[str, Any], names: Sequence[str]) -> str:
    """Two models side by side: AUROC of each label, then means over labels, all with intervals.

    Args:
        comparison: From `metrics.compare`.
        names: Names of the labels, in display order.

    Returns:
        Two Markdown tables, and a caption that says how to read them.
    """
    present = comparison["present"]
    rows = [(f"{name} ({present[name]:,})", f"auroc/{name}") for name in names] + [("**mean**", "auroc")]
    means = [(title, key) for key, title in MEANS.items() if key in comparison["base"]]
    return "\n\n".join(
        [
            _table("AUROC: finding (scans with it)", rows, comparison),
            _table("mean over findings", means, comparison),
            _caption(comparison),
        ]
    )


def sites_table(comparison: dict[str, Any], kept: dict[str, Any] | None) -> str:
    """What was gained on the new site beside what was lost on what is to be kept, with paired intervals.

    Args:
        comparison: From `metrics.compare`, on the new site.
        kept: The same on what is to be kept; without it there is no table.
    """
    if kept is None:
        return ""
    lines = ["| mean AUROC | base | adapted | difference |", "| --- | ---: | ---: | ---: |"]
    for title, each in (("new site", comparison), ("to be kept", kept)):
        cells = [_cell(each[which]["auroc"], sign) for which, sign in _COLUMNS]
        lines.append(f"| {title} ({each['scans']:,} scans) | {' | '.join(cells)} |")
    return "\n".join(lines)


def calibration_table(errors: dict[str, Any] | None) -> str:
    """Scores as probabilities, before and after calibration.

    Args:
        errors: From `compare_calibration`; without it there is no table.
    """
    if errors is None:
        return ""
    count = len(errors["labels"])
    lines = [
        f"| probabilities of {count} findings | score | calibrated | difference |",
        "| --- | ---: | ---: | ---: |",
    ]
    for title, key in (("expected calibration error", "expected_calibration_error"), ("Brier score", "brier")):
        cells = [
            _cell(errors[which][key], sign) for which, sign in (("before", ""), ("after", ""), ("difference", "+"))
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _table(heading: str, rows: Sequence[tuple[str, str]], comparison: dict[str, Any]) -> str:
    """One Markdown table; a row is given as its title and the metric's key."""
    lines = [f"| {heading} | base | adapted | difference |", "| --- | ---: | ---: | ---: |"]
    for title, key in rows:
        base, adapted = _cell(comparison["base"][key]), _cell(comparison["adapted"][key])
        lines.append(f"| {title} | {base} | {adapted} | {_cell(comparison['difference'][key], sign='+')} |")
    return "\n".join(lines)


def _cell(interval: Interval, sign: str = "") -> str:
    """A value and its interval, as text."""
    if interval["value"] is None:
        return UNDEFINED
    value, low, high = (f"{interval[part]:{sign}.3f}" for part in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _caption(comparison: dict[str, Any]) -> str:
    """Where the figures come from, and their limits."""
    said = [
        f"{comparison['scans']:,} scans of {comparison['patients']:,} patients. In brackets: 95 % intervals, bootstrap "
        f"over patients, {comparison['resamples']:,} resamples; the difference is paired."
    ]
    if "accuracy" in comparison["base"]:
        said.append("Accuracy and F1 are at thresholds chosen on other scans.")
    said.append(
        "The CT-CLIP protocol chooses its thresholds on the scans that it scores: only for comparison with papers."
    )
    if any(interval["value"] is None for interval in comparison["base"].values()):
        said.append(f"{UNDEFINED}: always or never present here, so it has no score and no part in the means.")
    return " ".join(said)
