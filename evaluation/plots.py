"""ROC curves, calibration and changes of one or more models, as matplotlib figures: `roc_plot(...).savefig("roc.png")`.

Models are given as `{"base": scores, "adapted": scores}`, in drawing order. `note` is for what a reader must not miss,
such as that the data are synthetic; it is part of the title. Names are drawn as they are: `parse_math` is off, since
matplotlib reads what stands between two "$" as a formula.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from medct.common.counting import counted
from medct.evaluation.calibration import BINS, calibration_bins, expected_calibration_error
from medct.evaluation.metrics import zero_shot_scores


class Style(NamedTuple):
    """How a model is drawn."""

    colour: str
    dashes: str | tuple
    marker: str
    hatch: str


# Okabe and Ito's colours, which colour-blind readers can tell apart. Dashes, markers and hatches are for grey print.
STYLES = (
    Style("#D55E00", (0, (4, 1.5)), "o", "//"),
    Style("#0072B2", "-", "^", ""),
    Style("#009E73", (0, (1, 1)), "s", ".."),
    Style("#CC79A7", "-.", "D", "xx"),
)
GREY = "0.6"
TITLE_SIZE, TEXT_SIZE, SMALL_SIZE = 13, 11, 8.5  # points
DOTS_PER_INCH = 150
LABEL_ROWS = 3  # rows of small panels
MEAN_PANEL_INCHES, LABEL_PANEL_INCHES = 5.6, 1.75
FALSE_ALARM_RATES = np.array([0, *np.linspace(0, 1, 201)])
"""Twice 0: a curve starts with no scan at all, and may rise before the first false alarm."""


def roc_plot(models: Mapping[str, np.ndarray], labels: np.ndarray, names: Sequence[str], note: str = "") -> Figure:
    """ROC curves: their mean over labels in a large panel, each label in a small one.

    Args:
        models: Scores `(scans, labels)` by name; at most four.
        labels: `(scans, labels)`, 0, 1 or NaN for unknown.
        names: Names of the labels.
        note: Text added to the title.

    Raises:
        ValueError: If shapes do not match, arrays hold other values, no label varies, or there are more than four
            models.
    """
    labels = np.asarray(labels, float)
    rows = min(LABEL_ROWS, len(names))
    columns = math.ceil(len(names) / rows)
    figure = _figure(MEAN_PANEL_INCHES + LABEL_PANEL_INCHES * columns, 6.2, "ROC curves", len(labels), note)
    left, right = figure.subfigures(1, 2, width_ratios=(MEAN_PANEL_INCHES, LABEL_PANEL_INCHES * columns))
    mean_panel = left.subplots()
    panels = right.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel in (mean_panel, *panels):
        _empty_roc(panel)
    for index, (model, scores, style) in enumerate(_styled(models)):
        aurocs = zero_shot_scores(scores, labels, names)
        curves = _label_curves(np.asarray(scores, float), labels)
        _draw_mean(mean_panel, curves, style, f"{model}: AUROC {aurocs['auroc']:.3f}")
        for panel, name, curve in zip(panels, names, curves, strict=False):
            panel.plot(FALSE_ALARM_RATES, curve, color=style.colour, linestyle=style.dashes, linewidth=1.3)
            _write_auroc(panel, aurocs[f"auroc/{name}"], style.colour, line=len(models) - 1 - index)
    mean_panel.set_title("mean over labels (thin: each label)", fontsize=TEXT_SIZE)
    mean_panel.set_xlabel("false alarms (1 - specificity)", fontsize=TEXT_SIZE)
    mean_panel.set_ylabel("sensitivity", fontsize=TEXT_SIZE)
    _name_models(mean_panel, loc="lower right")
    for index, (panel, name) in enumerate(zip(panels, names, strict=False)):
        panel.set_title(_in_two_lines(name), fontsize=SMALL_SIZE, parse_math=False)
        panel.tick_params(labelbottom=index + columns >= len(names))  # the last of its column
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    return figure


def calibration_plot(
    models: Mapping[str, np.ndarray], labels: np.ndarray, note: str = "", what: str = "score"
) -> Figure:
    """Reliability diagram over all labels together, with the number of scores in each bin below it.

    Args:
        models: Scores or probabilities `(scans, labels)`, in [0, 1], by name; at most four.
        labels: `(scans, labels)`, 0, 1 or NaN for unknown.
        note: Text added to the title.
        what: What the numbers are, for the axis.

    Raises:
        ValueError: If shapes do not match, arrays hold other values, scores are outside [0, 1], no label is known, or
            there are more than four models.
    """
    figure = _figure(6.4, 8, "Calibration over all labels", len(labels), note)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color=GREY, linewidth=1, label="perfect")
    width = 0.86 / BINS / len(models)  # a gap between bins
    for index, (model, scores, style) in enumerate(_styled(models)):
        probability, share, counts = calibration_bins(scores, labels)
        said = f"{model}: expected calibration error {expected_calibration_error(scores, labels):.3f}"
        filled = counts > 0  # the line runs across empty bins
        line = {"color": style.colour, "linestyle": style.dashes, "marker": style.marker, "label": said}
        upper.plot(probability[filled], share[filled], markersize=7, linewidth=1.8, **line)
        middles = (np.arange(BINS) + 0.5) / BINS + width * (index - (len(models) - 1) / 2)
        lower.bar(middles, counts, width, color=style.colour, hatch=style.hatch, edgecolor="white", linewidth=0)
    upper.set(ylabel="share that is present", xlim=(0, 1), ylim=(-0.03, 1.03))
    _name_models(upper, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)  # never over a curve
    lower.set(xlabel=f"{what}, in {BINS} bins", ylabel="scans x labels", yscale="log")
    lower.set_ylim(0.7, lower.get_ylim()[1] * 1.3)  # so that a bar of height 1 is visible
    lower.yaxis.set_major_formatter("{x:,.0f}")
    for panel in (upper, lower):
        panel.grid(color="0.9", linewidth=0.6)
        panel.set_axisbelow(True)
    return figure


def save_plot(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, with its title as text, so that programs can read what people see.

    Args:
        figure: From this module.
        path: File to write.
    """
    figure.savefig(path, metadata={"Title": figure.get_suptitle(), "Software": None})


def change_plot(comparison: dict[str, Any], kept: dict[str, Any], names: Sequence[str], note: str = "") -> Figure:
    """What was learned and what was forgotten: two dots a finding, the change of its AUROC on the new site and the old.

    Args:
        comparison: From `metrics.compare`, on the new site.
        kept: The same on what was to be kept.
        names: Names of the labels; the one that gained most on the new site is drawn on top.
        note: Text added to the title.
    """

    def change(where: dict[str, Any], key: str) -> tuple[float, float, float]:
        nothing = {"value": None, "low": None, "high": None}  # where a site has not this label
        found = where["difference"].get(key, nothing)
        value, low, high = (math.nan if found[part] is None else found[part] for part in ("value", "low", "high"))
        return value, low, high

    gained = {name: change(comparison, f"auroc/{name}")[0] for name in names}
    ordered = sorted(names, key=lambda name: (not math.isnan(gained[name]), gained[name]))
    keys = ["auroc", *(f"auroc/{name}" for name in ordered)]
    figure = _figure(8, 2 + 0.33 * len(keys), "What was learned and what was forgotten", None, note)
    panel = figure.subplots()
    panel.axvline(0, color=GREY, linewidth=1)
    panel.axhline(0.5, color=GREY, linewidth=0.6)  # between the mean and the findings
    sites = (("new site", comparison, STYLES[1], 0.13), ("to be kept", kept, STYLES[0], -0.13))
    for title, where, style, offset in sites:
        value, low, high = np.array([change(where, key) for key in keys]).T
        rows = np.arange(len(keys)) + offset
        panel.hlines(rows, low, high, color=style.colour, linewidth=1.2, alpha=0.6)
        said = f"{title} ({counted(where['scans'], 'scan')})"
        panel.plot(value, rows, style.marker, color=style.colour, markersize=6, label=said)
    panel.set_yticks(range(len(keys)), ["mean", *ordered], fontsize=TEXT_SIZE, parse_math=False)
    panel.set_ylim(-0.6, len(keys) - 0.4)
    panel.set_xlabel("change of AUROC, adapted - base (line: 95 % interval)", fontsize=TEXT_SIZE)
    panel.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=TEXT_SIZE)
    panel.grid(axis="x", color="0.9", linewidth=0.6)
    panel.set_axisbelow(True)
    return figure


def _styled(models: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray, Style]]:
    """Models, each with a style of its own."""
    if len(models) > len(STYLES):
        raise ValueError(f"{len(models)} models do not fit one plot. Pass {len(STYLES)} at most.")
    for (model, scores), style in zip(models.items(), STYLES, strict=False):
        yield model, scores, style


def _figure(width: float, height: float, what: str, scans: int | None, note: str) -> Figure:
    """An empty figure, sizes in inches, whose title names the data."""
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    title = what if scans is None else f"{what}, {counted(scans, 'scan')}"
    lines = [title, *textwrap.wrap(note, width=int(9.5 * width))]  # 9.5 letters per inch
    figure.suptitle("\n".join(lines), fontsize=TITLE_SIZE, parse_math=False)
    return figure


def _name_models(panel: Axes, **look: Any) -> None:
    """Draw a legend."""
    for text in panel.legend(fontsize=TEXT_SIZE, **look).get_texts():
        text.set_parse_math(False)


def _empty_roc(panel: Axes) -> None:
    """Set up a square panel with the chance line."""
    panel.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, zorder=0)
    panel.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    panel.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    panel.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])


def _label_curves(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Sensitivity at `FALSE_ALARM_RATES`, `(labels, rates)`; NaN where a label does not vary."""
    curves = np.full((labels.shape[1], len(FALSE_ALARM_RATES)), np.nan)
    for curve, score, truth in zip(curves, scores.T, labels.T, strict=True):
        known = ~np.isnan(truth)
        if len(np.unique(truth[known])) == 2:
            false_alarms, sensitivity, _ = roc_curve(truth[known], score[known])
            curve[0], curve[1:] = 0, np.interp(FALSE_ALARM_RATES[1:], false_alarms, sensitivity)
    return curves


def _draw_mean(panel: Axes, curves: np.ndarray, style: Style, said: str) -> None:
    """Draw the mean of curves `(labels, rates)`, and each of them faintly."""
    panel.plot(FALSE_ALARM_RATES, curves.T, color=style.colour, linewidth=0.5, alpha=0.3)
    mean = np.nanmean(curves, axis=0)
    panel.plot(FALSE_ALARM_RATES, mean, color=style.colour, linestyle=style.dashes, linewidth=2.4, label=said)


def _write_auroc(panel: Axes, auroc: float, colour: str, line: int) -> None:
    """Write an AUROC in the lower right corner, `line` lines up."""
    said = "none" if math.isnan(auroc) else f"{auroc:.3f}"
    panel.text(0.97, 0.05 + 0.15 * line, said, ha="right", color=colour, fontsize=SMALL_SIZE)


def _in_two_lines(name: str) -> str:
    """A name; a long one is broken at the space nearest its middle."""
    spaces = [index for index, letter in enumerate(name) if letter == " "]
    if len(name) < 20 or not spaces:
        return name
    middle = min(spaces, key=lambda index: abs(index - len(name) / 2))
    return f"{name[:middle]}\n{name[middle + 1 :]}"
