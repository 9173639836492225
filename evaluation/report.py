"""Scores as Markdown tables."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from medct.common.counting import counted
from medct.evaluation.metrics import CT_CLIP_PREFIX, FEWEST, RADFINDER_PREFIX, Interval

UNDEFINED = "–"
COMPARED = (("base", ""), ("adapted", ""), ("difference", "+"))
"""The parts of a comparison, and how the sign of their figures is written."""
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


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]], texts: Collection[int] = (0,)) -> str:
    """A table in Markdown; "|" in a name or a sentence does not make two cells of one.

    Args:
        titles: Of the columns.
        rows: Each with a cell a column.
        texts: Which columns hold text; the others hold figures, which stand on the right.
    """
    marks = ["---" if index in texts else "---:" for index in range(len(titles))]
    lines = [[cell.replace("|", r"\|") for cell in cells] for cells in (titles, marks, *rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def results_table(comparison: dict[str, Any], names: Sequence[str]) -> str:
    """Two models side by side: AUROC of each label, then means over labels, all with intervals.

    Args:
        comparison: From `metrics.compare` or `source_figures`.
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
    if "scores" in sources[0]:
        findings = [[name, *(_finding_cell(each, name) for each in sources)] for name in names]
        findings.append(["**mean**", *(_cell(each["scores"]["auroc"]) for each in sources)])
        shared = {key: title for key, title in MEANS.items() if all(key in each["scores"] for each in sources)}
        means = [[title, *(_cell(each["scores"][key]) for each in sources)] for key, title in shared.items()]
        tables = [_across("AUROC (scans with the finding)", findings, sources)]
        tables += [_across("mean over findings", means, sources), _caption(sources)]
    else:
        tables = [_differences({each["source"]: each for each in sources})] if len(sources) > 1 else []
        for each in sources:
            own = [label for label in names if label in each["present"]]
            tables += [f"**{each['source']}**", results_table(each, own)]
    for each in sources:
        name = each["source"]
        tables += [points_table(each["operating_points"], name), subgroups_table(each["subgroups"], name)]
        tables += [calibration_table(error, f"{model} on {name}") for model, error in each["calibration_error"].items()]
    return "\n\n".join(table for table in tables if table)


def _finding_cell(source: Mapping[str, Any], name: str) -> str:
    if name not in source["present"]:  # it has other labels
        return UNDEFINED
    return f"{_cell(source['scores'][f'auroc/{name}'])}, {source['present'][name]:,}"


def _across(heading: str, rows: Iterable[Sequence[str]], sources: Sequence[dict[str, Any]]) -> str:
    """One table whose columns are sources."""
    return markdown_table(
        [heading, *(f"{each['source']} ({counted(each['scans'], 'scan')})" for each in sources)], rows
    )


def _differences(by_name: Mapping[str, dict[str, Any]]) -> str:
    """Mean AUROC of two models by source, and their paired difference."""
    rows = [[f"{name} ({_scans_of(each)})", *_compared(each, "auroc")] for name, each in by_name.items()]
    return markdown_table(["mean AUROC", *_titles(next(iter(by_name.values())))], rows)


def folds_table(folds: Sequence[dict[str, Any]]) -> str:
    """Each fold of a cross-validation by itself.

    Args:
        folds: With `fold`, `scans`, `patients`, mean AUROC as `base` and `adapted`, `kept`, how it changed on what is
            to be kept or `None`, `steps` and `strength`.
    """
    is_kept = any(each["kept"] is not None for each in folds)
    titles = ["held out", "scans", "patients", "mean AUROC, base", "adapted", *["to be kept: difference"] * is_kept]
    rows = []
    for each in folds:
        aurocs = [f"{each[model]:.3f}" for model in ("base", "adapted")]
        aurocs += [UNDEFINED if each["kept"] is None else f"{each['kept']:+.3f}"] * is_kept
        counts = [f"{each['scans']:,}", f"{each['patients']:,}"]
        rows.append([f"fold {each['fold']}", *counts, *aurocs, f"{each['steps']:,}", f"{each['strength']:g}"])
    return markdown_table([*titles, "steps", "strength"], rows)


def points_table(points: Mapping[str, Any], where: str) -> str:
    """What operating points give on a source.

    Args:
        points: By model, from `carried_over`; without any there is no table.
        where: Name of the source.
    """
    if not points:
        return ""
    rows = []
    for model, by_point in points.items():
        for name, each in by_point.items():
            over = sum(key.startswith("sensitivity/") and each[key]["value"] is not None for key in each)
            cells = [_cell(each[key]) for key in ("sensitivity", "specificity")]
            rows.append([f"{model}: {name}, {counted(over, 'finding')}", *cells])
    table = markdown_table([f"operating points on {where}", "sensitivity", "specificity"], rows)
    return f"{table}\n\nMeans over findings, at thresholds that were chosen on tuning patients."


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
    rows = []
    for division, group in groups:
        aurocs = group["auroc"] or {}
        cells = [
            _cell(aurocs[model], "+" if model == "difference" else "") if aurocs else "too few" for model in models
        ]
        counts = [f"{group[key]:,}" for key in ("scans", "patients", "labels")]
        rows.append([f"{division}: {group['group']}", *counts, *cells])
    table = markdown_table([f"{where}: mean AUROC of", "scans", "patients", "findings", *models], rows)
    smallest = counted(min(group["scans"] for _, group in groups), "scan")
    note = f"Over the findings that vary in a group, so compare with care. The smallest group has {smallest}."
    return f"{table}\n\n{note}"


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
    versions = (("before", ""), ("after", ""), ("difference", "+"))
    metrics = (("expected calibration error", "expected_calibration_error"), ("Brier score", "brier"))
    rows = [[name, *(_cell(errors[which][key], sign) for which, sign in versions)] for name, key in metrics]
    table = markdown_table([about, "score", "calibrated", "difference"], rows)
    note = "Chance makes the expected calibration error of few scans too high, most of all once they are calibrated."
    return f"{table}\n\n{note}"


def _titles(comparison: dict[str, Any]) -> list[str]:
    """Names of the two models that are compared, and of their difference."""
    models = comparison.get("models", {})
    return [models.get("base", "base"), models.get("adapted", "adapted"), "difference"]


def _table(heading: str, rows: Sequence[tuple[str, str]], comparison: dict[str, Any]) -> str:
    """One table; a row is given as its title and the metric's key."""
    return markdown_table(
        [heading, *_titles(comparison)], ([title, *_compared(comparison, key)] for title, key in rows)
    )


def _compared(comparison: dict[str, Any], key: str) -> list[str]:
    """A metric of both models, and its difference."""
    return [_cell(comparison[which][key], sign) for which, sign in COMPARED]


def _scans_of(figures: Mapping[str, Any]) -> str:
    return f"{counted(figures['scans'], 'scan')} of {counted(figures['patients'], 'patient')}"


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
    scans = "; ".join(map(_scans_of, sources))
    paired = "; the difference is paired" if "base" in sources[0] else ""
    resamples = counted(sources[0]["resamples"], "resample")
    said = [f"{scans}. In brackets: 95 % intervals, bootstrap over patients, {resamples}{paired}."]
    figures = [each[part] for each in sources for part in ("scores", "base", "adapted") if part in each]
    if any("accuracy" in each for each in figures):
        said.append("Accuracy and F1 are at thresholds chosen on other scans.")
    if left := list(dict.fromkeys(name for each in sources for name in each.get("no_threshold", ()))):
        said.append(f"Their means leave out findings without a threshold ({', '.join(left)}).")
    said.append(
        "The CT-CLIP and RadFinder protocols choose their thresholds on the scans that they score: only for comparison "
        "with papers."
    )
    said += _without_interval(sources, figures)
    differ = len({tuple(each["present"]) for each in sources}) > 1
    if differ or any(interval["value"] is None for each in figures for interval in each.values()):
        others = " or not among its labels," if differ else ""
        said.append(f"{UNDEFINED}: always or never present there,{others} so it has no score and no part in the means.")
    return " ".join(said)


def _without_interval(sources: Sequence[dict[str, Any]], figures: Sequence[dict[str, Interval]]) -> Iterator[str]:
    """Why figures of these have no interval."""
    if few := list(dict.fromkeys(name for each in sources for name in each.get("too_few", ()))):
        yield (
            f"Without an interval: findings that fewer than {FEWEST} patients have, or are without ({', '.join(few)}), "
            "and means of which more than half are such."
        )
    shown = [each[key] for each in figures for key in each if key in MEANS or key.startswith("auroc/")]
    if any(each["value"] in (0, 1) and each["low"] is None for each in shown):
        difference = ", nor has its difference" if "base" in sources[0] else ""
        yield f"A figure that is 0 or 1 in every resample has no interval{difference}."


def retrieval_report(results: dict[str, Any]) -> str:
    """What scans and reports find, as Markdown tables.

    Args:
        results: From `recall_figures`, with `findings` from `shared_findings` where there are labels.
    """
    head = f"{counted(results['studies'], 'study', 'studies')} with a report"
    head += f", {counted(results['reports'], 'different report')}"
    is_known = results["patients"] is not None
    head += f", {counted(results['patients'], 'patient')}" if is_known else ", patients not known"
    ways, at = ("text_to_image", "image_to_text"), results["chance"]
    protocols = {"": results, "unique reports: ": results["unique_reports"]}
    protocols["CT-CLIP protocol: "] = results["ct_clip_protocol"]
    rows = []
    for title, each in protocols.items():
        rows += [_retrieval_row(f"{title}{way.replace('_', ' ')}", each[way], at) for way in ways]
        rows.append(_retrieval_row(f"{title}chance", each["chance"], at))
    if pools := results.get("pools"):
        rows += [_retrieval_row(f"pools of {pools['size']}: {way.replace('_', ' ')}", pools[way], at) for way in ways]
    parts = [head, markdown_table(["recall at", *map(str, at)], rows)]
    if found := results.get("findings"):
        at, rows = found["image_to_image"], []
        for title, each in {"": found, "CT-CLIP protocol: ": found["ct_clip_protocol"]}.items():
            rows.append(_retrieval_row(f"{title}image to image", each["image_to_image"], at))
            rows.append(_retrieval_row(f"{title}chance", each["chance"], at))
        parts.append(f"{counted(found['studies'], 'scan')} with a finding")
        parts.append(markdown_table(["MAP at", *map(str, at)], rows))
    whose = "patients" if is_known else "reports"
    parts.append(f"In brackets: 95 % intervals, bootstrap over the {whose} of the queries, against the same answers.")
    return "\n\n".join(parts)


def _retrieval_row(title: str, figures: Mapping[int, Any], at: Iterable[int]) -> list[str]:
    cells = [title]
    for k in at:
        figure = figures.get(k)
        cells.append(_cell(figure) if isinstance(figure, dict) else UNDEFINED if figure is None else f"{figure:.3f}")
    return cells


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
    findings = []
    for label, each in found["findings"].items():
        aurocs = [each[key] for key in ("usual", "mean", "lowest", "highest")]
        figures = [UNDEFINED if auroc is None else f"{auroc:.3f}" for auroc in aurocs]
        findings.append([f"{label} ({each['present']:,})", *figures, _wording(each["best"])])
    titles = ["AUROC: finding (scans with it)", "usual wording", "mean", "lowest", "highest", "best wording"]
    templates = [[" / ".join(each["template"]), f"{each['auroc']:.3f}"] for each in found["templates"]]
    templates.append(["all of them, averaged", f"{found['ensemble']:.3f}"])
    chosen = found["chosen"]
    aurocs = [each["auroc"] for each in found["templates"]]
    number, others = counted(len(chosen["prompt_templates"]), "template"), counted(len(chosen["names"]), "finding")
    chosen_on = f"{counted(found['studies'], 'study', 'studies')} of {counted(found['patients'], 'patient')}"
    said = (
        f"The template alone moves the mean AUROC from {min(aurocs):.3f} to {max(aurocs):.3f}. Chosen: {number}, "
        f"other names for {others}, mean AUROC {chosen['auroc']:.3f} on the {chosen_on} that it was chosen on. This "
        "is too optimistic: score it on other patients."
    )
    tables = [markdown_table(titles, findings, texts=(0, 5)), markdown_table(["template", "mean AUROC"], templates)]
    return "\n\n".join([*tables, said])
