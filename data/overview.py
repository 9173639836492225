"""Show what a source holds before training on it.

    medct overview SOURCE --model ct-clip                # all splits: counts, and samples as the model sees them
    medct overview SOURCE --split valid --samples 0      # counts only: reads no volume

Takes any source that training takes. Samples are drawn with a seed; each is shown as its three middle slices, upright,
with the patient's right on the left of the picture.
"""

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from transformers import PreTrainedTokenizerBase

from medct import pictures_medct
from medct.common.counting import counted
from medct.common.files import whole_file
from medct.common.progress import tqdm
from medct.configuration_medct import MedCTConfig
from medct.data.label_space import merge_columns
from medct.data.loader import LoadRow
from medct.data.sources import DataError, Row, Skipped, Source
from medct.image_processing_medct import MedCTImageProcessor
from medct.volume_medct import CTVolume, affine_from_spacing
from medct.workers_medct import Place

_STUDIES_A_LINE = 2
_STUDY_INCHES = 6.2  # width
_LINE_INCHES = 2.6  # height
_HEADER_INCHES = 0.35
_DOTS_PER_INCH = 110
_QUANTILES = {"min": 0.0, "q1": 0.25, "median": 0.5, "q3": 0.75, "max": 1.0}
_TEXTS_AT_ONCE = 256
_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg"}


# ---------------------------------------------------------------------------------------------------------------------
# Counts
# ---------------------------------------------------------------------------------------------------------------------


def summarize(
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None = None,
    splits: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Count what a source holds, without reading any volume.

    Args:
        source: Any source.
        tokenizer: The model's; without one, reports are counted in words only.
        splits: If it is several splits joined, how many studies of each follow each other.

    Returns:
        `description`; `num_studies` (in one epoch), `num_volumes` (with all reconstructions), `num_patients`; `labels`:
        `present` (above 0.5), `absent`, `unknown` and `prevalence` among the known (`None` if there are none), by name;
        `shares`: how many labels are between 0 and 1;
        `no_finding`: studies without any finding, among those with all labels known; `reports`: `missing`, `distinct`,
        quartiles of `words` and `tokens`, and `cut`, those longer than the model reads; `skipped`: ids by reason;
        `splits`: of each, `num_studies`, `num_patients` and `labels`.
    """
    patients: list[str] = []
    reports: Counter[str] = Counter()
    labels = np.empty((source.num_studies, len(source.label_names)))
    for index, row in enumerate(tqdm(map(source.read, source.keys()), "overview", source.num_studies, unit="study")):
        patients.append(row["patient"])
        reports[row["report"]] += 1
        labels[index] = row["labels"]
    skipped: dict[str, list[str]] = {}
    for study in source.skipped:
        skipped.setdefault(study.reason, []).append(study.id)
    labels, names = merge_columns(labels, source.label_names, source.merged)
    is_known = np.isfinite(labels).all(axis=1)
    by_split, start = {}, 0
    for split, count in (splits or {}).items():
        rows = slice(start, start := start + count)
        by_split[split] = {
            "num_studies": count,
            "num_patients": len(set(patients[rows])),
            "labels": _count_labels(labels[rows], names),
        }
    return {
        "description": source.description,
        "num_studies": source.num_studies,
        "num_volumes": sum(map(len, source.groups)),
        "num_patients": len(set(patients)),
        "labels": _count_labels(labels, names),
        "shares": int(((labels > 0) & (labels < 1)).sum()),
        "no_finding": {"studies": int((labels[is_known] == 0).all(axis=1).sum()), "known": int(is_known.sum())},
        "reports": _count_reports(reports, tokenizer),
        "skipped": skipped,
        "splits": by_split,
    }


def _count_labels(labels: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {name: _count_label(labels[:, index]) for index, name in enumerate(names)}


def _count_label(values: np.ndarray) -> dict[str, Any]:
    known = values[np.isfinite(values)]
    return {
        "present": int((known > 0.5).sum()),
        "absent": int((known <= 0.5).sum()),
        "unknown": len(values) - len(known),
        "prevalence": float((known > 0.5).mean()) if len(known) else None,
    }


def _count_reports(reports: Counter[str], tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    missing = reports.pop("", 0)
    times = list(reports.values())
    found = {"missing": missing, "distinct": len(reports), "words": None, "tokens": None, "cut": None}
    if not reports:
        return found
    found["words"] = _quantiles([len(text.split()) for text in reports], times)
    if tokenizer is not None:
        texts = list(reports)
        lengths = [
            len(tokens)
            for first in range(0, len(texts), _TEXTS_AT_ONCE)
            for tokens in tokenizer(texts[first : first + _TEXTS_AT_ONCE], verbose=False)["input_ids"]
        ]
        found["tokens"] = _quantiles(lengths, times)
        most = tokenizer.model_max_length
        found["cut"] = sum(count for length, count in zip(lengths, times, strict=True) if length > most)
    return found


def _quantiles(lengths: Sequence[int], times: Sequence[int]) -> dict[str, int]:
    """Quantiles of lengths that occur several times each."""
    values = np.quantile(np.repeat(lengths, times), list(_QUANTILES.values()), method="nearest")
    return dict(zip(_QUANTILES, values.astype(int).tolist(), strict=True))


def as_text(summary: dict[str, Any]) -> str:
    """The counts as readable text."""
    lines = [summary["description"], ""]
    studies = counted(summary["num_studies"], "study", "studies")
    volumes = (
        f", {counted(summary['num_volumes'], 'volume')}" if summary["num_volumes"] != summary["num_studies"] else ""
    )
    lines += [f"{studies}{volumes}, {counted(summary['num_patients'], 'patient')}", ""]
    width = max(map(len, summary["labels"]), default=0)
    lines.append(f"{'finding':{width}}  prevalence  present   absent  unknown")
    for name, of in summary["labels"].items():
        prevalence = "-" if of["prevalence"] is None else f"{of['prevalence']:.3f}"
        lines.append(f"{name:{width}}  {prevalence:>10}  {of['present']:7}  {of['absent']:7}  {of['unknown']:7}")
    if summary["shares"]:
        lines.append(f"labels between 0 and 1: {summary['shares']}; above 0.5 they count as present, else as absent")
    without, known = summary["no_finding"]["studies"], summary["no_finding"]["known"]
    lines.append(f"no finding: {without} of {counted(known, 'study', 'studies')} without an unknown label")
    lines += _split_lines(summary["splits"], width)
    lines += ["", *_report_lines(summary["reports"], summary["num_studies"]), ""]
    lines.append(f"{counted(sum(map(len, summary['skipped'].values())), 'study', 'studies')} left out before reading")
    for reason, ids in summary["skipped"].items():
        lines.append(f"{len(ids):7}  {reason} ({', '.join(ids[:3])}{' ...' if len(ids) > 3 else ''})")
    return "\n".join(lines)


def _split_lines(splits: dict[str, Any], width: int) -> list[str]:
    """Studies with each finding, splits as columns."""
    if len(splits) < 2:
        return []
    lines = ["", f"{'with the finding':{width}}  " + "  ".join(f"{split:>9}" for split in splits)]
    for name in next(iter(splits.values()))["labels"]:
        lines.append(f"{name:{width}}  " + "  ".join(f"{of['labels'][name]['present']:9}" for of in splits.values()))
    for title, key in (("studies", "num_studies"), ("patients", "num_patients")):
        lines.append(f"{title:{width}}  " + "  ".join(f"{of[key]:9}" for of in splits.values()))
    return lines


def _report_lines(reports: dict[str, Any], num_studies: int) -> list[str]:
    lines = [
        f"{num_studies - reports['missing']} reports, {reports['distinct']} distinct; {reports['missing']} missing"
    ]
    for unit in ("words", "tokens"):
        if reports[unit] is not None:
            lines.append(f"{unit:6} " + "  ".join(f"{name} {value}" for name, value in reports[unit].items()))
    if reports["cut"]:
        lines.append(f"{reports['cut']} reports are longer than the model reads")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Contact sheet
# ---------------------------------------------------------------------------------------------------------------------


def middle_slices(pixel_values: torch.Tensor, config: MedCTConfig) -> list[tuple[np.ndarray, float]]:
    """The axial, coronal and sagittal slices through the middle, upright; see `pictures_medct.middle_slices`.

    Args:
        pixel_values: `(z, y, x)`, as the model sees it.
        config: Says how the axes lie, and their spacing.
    """
    vision = config.vision_config
    affine = affine_from_spacing(vision.target_spacing_mm, vision.orientation)
    return pictures_medct.middle_slices(CTVolume(pixel_values.numpy(), affine))


def sheet_format(path: Path) -> str:
    """What the name of a sheet asks for: "png" or "jpeg".

    Raises:
        DataError: If it asks for anything else.
    """
    found = _FORMATS.get(path.suffix.lower())
    if found is None:
        raise DataError(f"{path}: a sheet is a picture. Use one of the suffixes {', '.join(_FORMATS)}.")
    return found


def contact_sheet(source: Source, config: MedCTConfig, path: Path, samples: int, seed: int = 0) -> list[Skipped]:
    """Write a picture of some studies as the model sees them.

    Args:
        source: Any source.
        config: The model's configuration.
        path: File to write, see `sheet_format`.
        samples: Number of studies to show.
        seed: Seed for their choice.

    Returns:
        The studies among them that could not be read; the sheet says why.

    Raises:
        DataError: If `path` is named like no picture.
    """
    format = sheet_format(path)
    load = LoadRow(source.read, MedCTImageProcessor.from_config(config.vision_config))
    keys = source.keys(seed=seed)[:samples]
    lines = -(-len(keys) // _STUDIES_A_LINE)
    heights = [_HEADER_INCHES, _LINE_INCHES * lines]
    figure = Figure(figsize=(_STUDY_INCHES * _STUDIES_A_LINE, sum(heights)), dpi=_DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    header, body = figure.subfigures(2, 1, height_ratios=heights)
    vision = config.vision_config
    title = f"{source.description}: middle slices, {vision.hu_min:g}..{vision.hu_max:g} HU"
    header.text(0.01, 0.4, title, fontsize=10, va="center", parse_math=False)
    panels = body.subfigures(lines, _STUDIES_A_LINE, squeeze=False).flat
    unreadable = []
    rows = tqdm(map(source.read, keys), "contact sheet", len(keys), unit="study")
    for panel, row in zip(panels, rows, strict=False):
        study = load.load_row(row, Place())
        if isinstance(study, Skipped):
            unreadable.append(study)
        labels, names = merge_columns(np.array([row["labels"]]), source.label_names, source.merged)
        _draw_study(panel, {**row, "labels": labels[0]}, study, names, config)
    with whole_file(path) as aside:
        figure.savefig(aside, format=format, metadata={"Software": None} if format == "png" else None)
    return unreadable


def _draw_study(
    panel: SubFigure, row: Row, study: Row | Skipped, label_names: Sequence[str], config: MedCTConfig
) -> None:
    """Three pictures below the study's id and findings."""
    present = [name for name, value in zip(label_names, row["labels"], strict=True) if value > 0.5]
    unknown = int(np.isnan(row["labels"]).sum())
    findings = ", ".join(present) or "no finding"
    if unknown:
        findings = f"{findings} ({unknown} unknown)" if unknown < len(label_names) else "labels unknown"
    title = textwrap.fill(findings, 100, max_lines=2, placeholder=" ...")
    panel.text(0.02, 0.95, row["id"], fontsize=8, fontweight="bold", va="top", parse_math=False)
    panel.text(0.02, 0.895, title, fontsize=7, va="top", parse_math=False)
    if isinstance(study, Skipped):
        reason = textwrap.fill(f"cannot be read: {study.reason}", 90)
        panel.text(0.02, 0.6, reason, fontsize=7, color="darkred", parse_math=False)
        return
    vision = config.vision_config
    pixel_values = MedCTImageProcessor.from_config(vision).finish(study["part"])
    low, high = vision.hu_min / vision.hu_per_unit, vision.hu_max / vision.hu_per_unit
    axes = panel.subplots(1, 3, gridspec_kw={"left": 0.02, "right": 0.98, "bottom": 0.02, "top": 0.79, "wspace": 0.04})
    for axis, (picture, aspect), (view, first, last) in zip(
        axes, middle_slices(pixel_values, config), pictures_medct.VIEWS, strict=True
    ):
        axis.imshow(picture, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="nearest")
        axis.axis("off")
        axis.set_anchor("N")
        for x, letter, side in ((0.02, first, "left"), (0.98, last, "right")):
            axis.text(x, 0.5, letter, transform=axis.transAxes, color="gold", fontsize=7, ha=side, va="center")
        axis.text(0.02, 0.98, view, transform=axis.transAxes, color="gold", fontsize=6, va="top")
