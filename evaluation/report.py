"""Scores as Markdown tables."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medct.common.counting import counted
from medct.evaluation.metrics import CT_CLIP_PREFIX, FEWEST, RADFINDER_PREFIX, Interval

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
    f"{RADFINDER_PREFIX}balanced_accuracy": "RadFinder protocol: accuracy (balanced)",
    f"{RADFINDER_PREFIX}weighted_f1": "RadFinder protocol: weighted F1",
    f"{RADFINDER_PREFIX}precision": "RadFinder protocol: precision",
}


def results_table(comparison: dict[str, Any], names: Sequence[str]) -> str:
    """Two models side by side: AUROC of each label, then means over labels, all with intervals.

    Args:
        comparison: From `metrics.compare` or `source_figures`.
        names: Names of the labels, in display order.

    Returns:
        Two Markdown tables, and a caption that says how to read them.
    """
    present = comparison["present"]
    rows = [(f"{_in_cell(name)} ({present[name]:,})", f"auroc/{name}") for name in names] + [("**mean**", "auroc")]
    means = [(title, key) for key, title in MEANS.items() if key in comparison["base"]]
    return "\n\n".join(
        [
            _table("AUROC: finding (scans with it)", rows, comparison),
            _table("mean over findings", means, comparison),
            _caption([comparison]),
        ]
    )


def sites_table(comparison: dict[str, Any], kept: dict[str, Any] | None) -> str:
    """What was gained on the new site beside what was lost on what is to be kept, with paired intervals.

    Args:
        comparison: From `metrics.compare`, on the new site.
        kept: The same on what is to be kept; without it there is no table.
    """
    return "" if kept is None else _differences({"new site": comparison, "to be kept": kept})


def evaluation_report(sources: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """An evaluation of one model, or of two, on one source or several.

    Args:
        sources: Each from `source_figures`, with `source`, its name.
        names: Names of the labels, in display order.

    Returns:
        Markdown tables, sources as columns, and a caption. Of two models: their difference by source, then a pair of
        tables for each source.
    """
    by_name = {each["source"]: each for each in sources}
    if "scores" in sources[0]:
        tables = [_across("AUROC (scans with the finding)", _finding_rows(by_name, names), by_name)]
        means = [(title, [_cell(each["scores"][key]) for each in sources]) for key, title in _means_of(sources)]
        tables += [_across("mean over findings", means, by_name), _caption(sources)]
    else:
        tables = [_differences(by_name)] if len(sources) > 1 else []
        for name, each in by_name.items():
            tables += [f"**{name}**", results_table(each, [label for label in names if label in each["present"]])]
    for name, each in by_name.items():
        tables += [points_table(each["operating_points"], name), subgroups_table(each["subgroups"], name)]
        tables += [calibration_table(error, f"{model} on {name}") for model, error in each["calibration_error"].items()]
    return "\n\n".join(table for table in tables if table)


def _finding_rows(by_name: Mapping[str, dict[str, Any]], names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    for name in names:
        yield name, [_finding_cell(each, name) for each in by_name.values()]
    yield "**mean**", [_cell(each["scores"]["auroc"]) for each in by_name.values()]


def _finding_cell(source: Mapping[str, Any], name: str) -> str:
    if name not in source["present"]:  # it has other labels
        return UNDEFINED
    return f"{_cell(source['scores'][f'auroc/{name}'])}, {source['present'][name]:,}"


def _means_of(sources: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(key, title) for key, title in MEANS.items() if all(key in each["scores"] for each in sources)]


def _across(heading: str, rows: Any, by_name: Mapping[str, dict[str, Any]]) -> str:
    """One Markdown table whose columns are sources."""
    titles = [f"{name} ({counted(each['scans'], 'scan')})" for name, each in by_name.items()]
    lines = [f"| {heading} | {' | '.join(titles)} |", f"| --- |{' ---: |' * len(titles)}"]
    return "\n".join([*lines, *(f"| {title} | {' | '.join(cells)} |" for title, cells in rows)])


def _differences(by_name: Mapping[str, dict[str, Any]]) -> str:
    """Mean AUROC of two models by source, and their paired difference."""
    titles = _titles(next(iter(by_name.values())))
    lines = [f"| mean AUROC | {' | '.join(titles)} |", "| --- | ---: | ---: | ---: |"]
    for title, each in by_name.items():
        cells = [_cell(each[which]["auroc"], sign) for which, sign in _COLUMNS]
        whose = f"{counted(each['scans'], 'scan')} of {counted(each['patients'], 'patient')}"
        lines.append(f"| {title} ({whose}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def folds_table(folds: Sequence[dict[str, Any]]) -> str:
    """Each fold of a cross-validation by itself.

    Args:
        folds: With `fold`, `scans`, `patients`, mean AUROC as `base` and `adapted`, `kept`, how it changed on what is
            to be kept or `None`, `steps` and `strength`.
    """
    is_kept = any(each["kept"] is not None for each in folds)
    titles = ["held out", "scans", "patients", "mean AUROC, base", "adapted", *["to be kept: difference"] * is_kept]
    lines = [f"| {' | '.join([*titles, 'steps', 'strength'])} |", "| --- |" + " ---: |" * (len(titles) + 1)]
    for each in folds:
        aurocs = [f"{each[model]:.3f}" for model in ("base", "adapted")]
        aurocs += [UNDEFINED if each["kept"] is None else f"{each['kept']:+.3f}"] * is_kept
        cells = [f"{each['scans']:,}", f"{each['patients']:,}", *aurocs, f"{each['steps']:,}", f"{each['strength']:g}"]
        lines.append(f"| fold {each['fold']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def points_table(points: Mapping[str, Any], where: str) -> str:
    """What operating points give on a source.

    Args:
        points: By model, from `carried_over`; without any there is no table.
        where: Name of the source.
    """
    if not points:
        return ""
    lines = [f"| operating points on {where} | sensitivity | specificity |", "| --- | ---: | ---: |"]
    for model, by_point in points.items():
        for name, each in by_point.items():
            cells = [_cell(each[key]) for key in ("sensitivity", "specificity")]
            over = sum(key.startswith("sensitivity/") and each[key]["value"] is not None for key in each)
            lines.append(f"| {model}: {name}, {counted(over, 'finding')} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Means over findings, at thresholds that were chosen on tuning patients."])


def subgroups_table(divisions: Sequence[dict[str, Any]], where: str) -> str:
    """Mean AUROC in the subgroups of a source.

    Args:
        divisions: From `subgroup_figures`; without any there is no table.
        where: Name of the source.
    """
    if not divisions:
        return ""
    groups = [(each["division"], group) for each in divisions for group in each["groups"]]
    models = next((list(group["auroc"]) for _, group in groups if group["auroc"]), ["AUROC"])
    lines = [f"| {where}: mean AUROC of | scans | patients | findings | {' | '.join(models)} |"]
    lines.append(f"| --- |{' ---: |' * (3 + len(models))}")
    for division, group in groups:
        aurocs = group["auroc"] or {}
        cells = [
            _cell(aurocs[model], "+" if model == "difference" else "") if aurocs else "too few" for model in models
        ]
        counts = [f"{group[key]:,}" for key in ("scans", "patients", "labels")]
        lines.append(f"| {division}: {group['group']} | {' | '.join([*counts, *cells])} |")
    smallest = min(group["scans"] for _, group in groups)
    note = f"Over the findings that vary in a group, so compare with care. The smallest group has {smallest:,} scans."
    return "\n".join([*lines, "", note])


def calibration_table(errors: dict[str, Any] | None, title: str = "") -> str:
    """Scores as probabilities, before and after calibration.

    Args:
        errors: From `compare_calibration`; without it there is no table.
        title: Whose they are.
    """
    if errors is None:
        return ""
    whose = f"{title}: " if title else ""
    about = f"{whose}probabilities of {counted(len(errors['labels']), 'finding')} together"
    lines = [f"| {about} | score | calibrated | difference |", "| --- | ---: | ---: | ---: |"]
    for title, key in (("expected calibration error", "expected_calibration_error"), ("Brier score", "brier")):
        cells = [
            _cell(errors[which][key], sign) for which, sign in (("before", ""), ("after", ""), ("difference", "+"))
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _titles(comparison: dict[str, Any]) -> list[str]:
    """Names of the two models that are compared, and of their difference."""
    models = comparison.get("models", {})
    return [models.get("base", "base"), models.get("adapted", "adapted"), "difference"]


def _in_cell(text: str) -> str:
    """A name or a sentence in a cell, of which it does not make two."""
    return text.replace("|", r"\|")


def _table(heading: str, rows: Sequence[tuple[str, str]], comparison: dict[str, Any]) -> str:
    """One Markdown table; a row is given as its title and the metric's key."""
    lines = [f"| {heading} | {' | '.join(_titles(comparison))} |", "| --- | ---: | ---: | ---: |"]
    for title, key in rows:
        cells = [_cell(comparison[which][key], sign) for which, sign in _COLUMNS]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(interval: Interval, sign: str = "") -> str:
    """A value and its interval, as text."""
    if interval["value"] is None:
        return UNDEFINED
    value, low, high = (
        "" if interval[key] is None else f"{interval[key]:{sign}.3f}" for key in ("value", "low", "high")
    )
    return f"{value} ({low} to {high})" if low else value


def _caption(sources: Sequence[dict[str, Any]]) -> str:
    """Where the figures come from, and their limits."""
    scans = "; ".join(f"{counted(each['scans'], 'scan')} of {counted(each['patients'], 'patient')}" for each in sources)
    paired = "; the difference is paired" if "base" in sources[0] else ""
    resamples = counted(sources[0]["resamples"], "resample")
    said = [f"{scans}. In brackets: 95 % intervals, bootstrap over patients, {resamples}{paired}."]
    figures = [each.get("base") or each["scores"] for each in sources]
    if any("accuracy" in each for each in figures):
        said.append("Accuracy and F1 are at thresholds chosen on other scans.")
    if left := list(dict.fromkeys(name for each in sources for name in each.get("no_threshold", ()))):
        said.append(f"Their means leave out findings without a threshold ({', '.join(left)}).")
    said.append(
        "The CT-CLIP and RadFinder protocols choose their thresholds on the scans that they score: only for comparison "
        "with papers."
    )
    if few := list(dict.fromkeys(name for each in sources for name in each.get("too_few", ()))):
        said.append(
            f"Without an interval: findings that fewer than {FEWEST} patients have, or are without ({', '.join(few)}), "
            "and means of which more than half are such."
        )
    differ = len({tuple(each["present"]) for each in sources}) > 1
    if differ or any(interval["value"] is None for each in figures for interval in each.values()):
        others = " or not among its labels," if differ else ""
        said.append(f"{UNDEFINED}: always or never present there,{others} so it has no score and no part in the means.")
    return " ".join(said)


def retrieval_report(results: dict[str, Any]) -> str:
    """What scans and reports find, as Markdown tables.

    Args:
        results: From `recall_figures`, with `findings` from `shared_findings` where there are labels.
    """
    head = f"{counted(results['studies'], 'study', 'studies')} with a report"
    head += f", {counted(results['reports'], 'different report')}, {counted(results['patients'], 'patient')}"
    lines = [head, "", _retrieval_head("recall at", results["chance"])]
    protocols = {"": results, "unique reports: ": results["unique_reports"]}
    protocols["CT-CLIP protocol: "] = results["ct_clip_protocol"]
    for title, each in protocols.items():
        for name in ("text_to_image", "image_to_text"):
            lines.append(_retrieval_row(f"{title}{name.replace('_', ' ')}", each[name], results["chance"]))
        lines.append(_retrieval_row(f"{title}chance", each["chance"], results["chance"]))
    if pools := results.get("pools"):
        for name in ("text_to_image", "image_to_text"):
            title = f"pools of {pools['size']}: {name.replace('_', ' ')}"
            lines.append(_retrieval_row(title, pools[name], results["chance"]))
    if found := results.get("findings"):
        at = found["image_to_image"]
        lines += ["", f"{counted(found['studies'], 'scan')} with a finding", "", _retrieval_head("MAP at", at)]
        for title, each in {"": found, "CT-CLIP protocol: ": found["ct_clip_protocol"]}.items():
            lines.append(_retrieval_row(f"{title}image to image", each["image_to_image"], at))
            lines.append(_retrieval_row(f"{title}chance", each["chance"], at))
    return "\n".join(lines)


def _retrieval_head(title: str, at: Mapping[int, Any]) -> str:
    return f"| {title} | {' | '.join(map(str, at))} |\n| --- |{' ---: |' * len(at)}"


def _retrieval_row(title: str, figures: Mapping[int, Any], at: Mapping[int, Any]) -> str:
    cells = []
    for k in at:
        figure = figures.get(k)
        cells.append(_cell(figure) if isinstance(figure, dict) else UNDEFINED if figure is None else f"{figure:.3f}")
    return f"| {title} | {' | '.join(cells)} |"


def _wording(best: dict[str, Any] | None) -> str:
    """Both sentences of a name in a template, or those that a finding has itself."""
    if best is None:
        return UNDEFINED
    if not isinstance(best["name"], str):
        return "; ".join(" / ".join(pair) for pair in best["name"])
    return " / ".join(best["template"]).replace("{label}", best["name"])


def prompts_report(found: dict[str, Any]) -> str:
    """How far AUROC moves by wording, as Markdown tables.

    Args:
        found: From `prompts.spread`.
    """
    lines = ["| AUROC: finding (scans with it) | usual wording | mean | lowest | highest | best wording |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | --- |")
    for label, each in found["findings"].items():
        aurocs = [each[key] for key in ("usual", "mean", "lowest", "highest")]
        figures = [UNDEFINED if auroc is None else f"{auroc:.3f}" for auroc in aurocs]
        title, best = f"{_in_cell(label)} ({each['present']:,})", _in_cell(_wording(each["best"]))
        lines.append(f"| {title} | {' | '.join(figures)} | {best} |")
    lines += ["", "| template | mean AUROC |", "| --- | ---: |"]
    for each in found["templates"]:
        lines.append(f"| {_in_cell(' / '.join(each['template']))} | {each['auroc']:.3f} |")
    lines.append(f"| all of them, averaged | {found['ensemble']:.3f} |")
    chosen = found["chosen"]
    aurocs = [each["auroc"] for each in found["templates"]]
    templates, findings = counted(len(chosen["prompt_templates"]), "template"), counted(len(chosen["names"]), "finding")
    chosen_on = f"{counted(found['studies'], 'study', 'studies')} of {counted(found['patients'], 'patient')}"
    lines += [
        "",
        f"The template alone moves the mean AUROC from {min(aurocs):.3f} to {max(aurocs):.3f}. Chosen: {templates}, "
        f"other names for {findings}, mean AUROC {chosen['auroc']:.3f} on the {chosen_on} that it was chosen on. This "
        "is too optimistic: score it on other patients.",
    ]
    return "\n".join(lines)
