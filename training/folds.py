"""Cross-validation by patient, for cohorts that are too small to hold anything out for good.

All patients of a source, whatever their split, are divided into folds. Each fold is held out once, the next one is
tuned on, and the others are trained on; the scores of the held-out studies, of as many adapters, are pooled. The
adapter that is kept is that of the first fold, with the operating points of its own tuning patients.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medct.common.counting import counted
from medct.common.errors import StoppedError
from medct.common.files import write_json
from medct.common.lock import is_first_process, only_run
from medct.common.run_files import RESULTS, TRAIN_CONFIG
from medct.data.sources import Source, first_of, hash_share
from medct.evaluation.figures import Scores, source_figures
from medct.evaluation.metrics import varying
from medct.evaluation.plots import calibration_plot, roc_plot, save_plot
from medct.evaluation.predictions import Key, Predictions, learned_from
from medct.evaluation.record import read_results, read_scores, scores_path, write_record
from medct.evaluation.report import folds_table, results_table
from medct.evaluation.scoring import ScoredStudies
from medct.publishing.cards import read_json
from medct.training.handing_out import write_readme
from medct.training.results import ADAPTED, BASE, SYNTHETIC, remarks_on
from medct.training.run_folder import RunFolder
from medct.training.settings import TrainingError, TrainingSettings

KEPT_FOLD = 1


def divide(source: Source, folds: int, fold: int, max_tune_studies: int | None = None) -> dict[str, Source]:
    """The studies to train on, to tune on and to hold out in one fold; no patient is in two of them.

    Args:
        source: All studies.
        folds: Into how many parts of as many patients each they are divided, the same ones every time.
        fold: Which part is held out, from 1; the next one is tuned on.
        max_tune_studies: Tune on this many studies at most.

    Raises:
        TrainingError: If there are fewer patients than folds, or a fold on which nothing could be scored.
    """
    rows_of = list(source.rows("divide by patient"))
    patients = [row["patient"] for row in rows_of]
    in_order = sorted(set(patients), key=lambda patient: hash_share(patient, "folds"))
    if len(in_order) < folds:
        raise TrainingError(f"{len(in_order)} patients cannot be divided into {folds} folds. Lower --folds.")
    fold_of = {patient: index % folds for index, patient in enumerate(in_order)}
    _refuse_folds_of_one_kind(np.array([row["labels"] for row in rows_of]), [fold_of[each] for each in patients], folds)
    part_of = {fold - 1: "valid", fold % folds: "tune"}
    parts: dict[str, list[int]] = {"train": [], "tune": [], "valid": []}
    for index, patient in enumerate(patients):
        parts[part_of.get(fold_of[patient], "train")].append(index)
    chosen = first_of([source.names[index] for index in parts["tune"]], max_tune_studies)
    parts["tune"] = [parts["tune"][index] for index in chosen]
    about = f"fold {fold} of {folds}, of {source.description}"
    return {
        part: dataclasses.replace(
            source,
            groups=[source.groups[index] for index in rows],
            names=[source.names[index] for index in rows],
            description=f"{counted(len(rows), 'study', 'studies')} of "
            f"{counted(len({patients[index] for index in rows}), 'patient')}, {about}",
        )
        for part, rows in parts.items()
    }


def _refuse_folds_of_one_kind(labels: np.ndarray, fold_of: Sequence[int], folds: int) -> None:
    for fold in range(folds):
        held_out = labels[np.array(fold_of) == fold]
        if not varying(held_out).any():
            raise TrainingError(
                f"Fold {fold + 1} of {folds} would hold out {len(held_out)} studies in which each finding is always or "
                "never present. Lower --folds."
            )


def cross_validate(
    settings: TrainingSettings, train: Callable[[TrainingSettings], dict[str, Any]]
) -> tuple[dict[str, Any], Path]:
    """Train once for each fold, and put the first adapter into the output folder, with the figures of all.

    Args:
        settings: With `folds`.
        train: One run.

    Returns:
        What `results.json` holds, and the folder; in other processes what that of the last fold holds.

    Raises:
        StoppedError: If it was stopped by a signal; it names what resumes it.
        OtherSettingsError, TrainingError: If it resumes a run of other settings, or of other studies.
    """
    folder = RunFolder(settings.output_dir, settings.resume)
    results: dict[str, Any] = {}
    is_main_process = is_first_process()
    with only_run(folder.final):
        if is_main_process:
            folder.claim(settings.fixed())
        runs = [folder.work / f"fold-{fold}" for fold in range(1, settings.folds + 1)]
        for fold, run in enumerate(runs, start=1):
            if (run / RESULTS).is_file():
                continue
            of_fold = {"fold": fold, "output_dir": str(run), "resume": True}
            try:
                results = train(dataclasses.replace(settings.without_push(), **of_fold))
            except StoppedError as error:
                raise StoppedError(f"stopped in fold {fold} of {settings.folds}. {folder.remedy}") from error
            if is_main_process:
                refuse_changed(folder.work, runs)
                refuse_another_base(folder.work, runs)
                print(_in_a_line(_about(fold, results), settings.folds))
        if is_main_process:
            results = _gather(folder, runs, settings)
    return results, folder.final


def refuse_changed(work: Path, runs: Sequence[Path]) -> None:
    """Refuse folds of studies that have changed between them: some would be held out twice, others never.

    What one fold tunes on is what the next holds out, so any two folds in a row say something of the same studies.

    Args:
        work: Folder of all, for messages.
        runs: Folders of the folds in their order; those that are not complete are passed over.

    Raises:
        TrainingError: If two folds do not agree when a study is held out, of which patient it is, or on its labels.
    """
    known: dict[str, tuple[int, str, str]] = {}
    for fold, run in enumerate(runs):
        scored = read_scores(run).scored if (run / RESULTS).is_file() else {}
        for key, studies in scored.items():
            if (key.model, key.source) != (BASE, next(iter(scored)).source):
                continue  # what is to be kept is no part of the folds
            held_out = fold if key.split == "valid" else (fold + 1) % len(runs)
            for study, patient, labels in zip(studies.ids, studies.patients, studies.labels, strict=True):
                told = (held_out, patient, str(labels.tolist()))
                if known.setdefault(study, told) != told:
                    raise _changed_since(work, "studies or labels have")


def refuse_another_base(work: Path, runs: Sequence[Path]) -> None:
    """Refuse folds whose bases differ, as where one was made anew in the same place: they say nothing of each other.

    Args:
        work: Folder of all, for messages.
        runs: Folders of the folds; those that are not complete are passed over.

    Raises:
        TrainingError: If they do.
    """
    bases = [read_results(run)["provenance"]["models"][BASE] for run in runs if (run / RESULTS).is_file()]
    if any(base != bases[0] for base in bases):
        raise _changed_since(work, "the base has")


def _changed_since(work: Path, what: str) -> TrainingError:
    return TrainingError(
        f"{work}: {what} changed since its first folds were trained, so that these cannot be pooled with later ones. "
        "Remove the folder, or choose another --output_dir."
    )


def _gather(folder: RunFolder, runs: Sequence[Path], settings: TrainingSettings) -> dict[str, Any]:
    """Make the output folder of those of all folds."""
    scores = [read_scores(run) for run in runs]
    source = next(iter(scores[0].scored)).source
    pooled = {
        model: _pooled([each.scored[Key(model, source, "valid")] for each in scores]) for model in (BASE, ADAPTED)
    }
    names = pooled[BASE].names
    results = _results([read_results(run) for run in runs], pooled, names, settings)
    kept = runs[KEPT_FOLD - 1]
    _list_bad_samples(runs, folder.bad_samples)
    with folder.complete() as final:
        shutil.copytree(kept, final, dirs_exist_ok=True)
        (final / "learned.png").unlink(missing_ok=True)  # of one fold alone
        config = read_json(final, TRAIN_CONFIG) | {"output_dir": str(folder.final)}
        write_json(final / TRAIN_CONFIG, config)
        keys = {Key(model, source, "valid"): scored for model, scored in pooled.items()}
        learned = learned_from(scores_path(kept / RESULTS)).items()
        others = [(source, split, sorted(studies)) for split, studies in learned]
        write_record(final / RESULTS, results, Predictions(names, keys), others)
        models = {model: scored.scores for model, scored in pooled.items()}
        note = results["measured_on"]
        save_plot(roc_plot(models, pooled[BASE].labels, names, note), final / "roc.png")
        save_plot(calibration_plot(models, pooled[BASE].labels, note), final / "calibration.png")
        write_readme(final, results)
    return results


def _list_bad_samples(runs: Sequence[Path], path: Path) -> None:
    """Studies that could not be read in any fold, each once: they are missing from the pooled figures."""
    lines: dict[str, str] = {}
    for file in (run / path.name for run in runs):
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            lines.setdefault(json.loads(line)["id"], line)
    if lines:
        path.write_text("".join(f"{line}\n" for line in lines.values()), encoding="utf-8")


def _pooled(parts: Sequence[ScoredStudies]) -> ScoredStudies:
    """The studies of all folds, each of which was held out once."""
    return ScoredStudies(
        [study for part in parts for study in part.ids],
        [patient for part in parts for patient in part.patients],
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.labels for part in parts]),
        # Of a fold in which nothing is known of any study there is nothing at all.
        [about for part in parts for about in part.about or [{}] * len(part.ids)],
        names=parts[0].names,
    )


def _results(
    of_folds: Sequence[dict[str, Any]],
    pooled: dict[str, ScoredStudies],
    names: Sequence[str],
    settings: TrainingSettings,
) -> dict[str, Any]:
    """What `results.json` holds: the kept adapter's own, with the figures of all held-out studies."""
    first, count = of_folds[KEPT_FOLD - 1], len(of_folds)
    models = {model: Scores(scored) for model, scored in pooled.items()}
    comparison = source_figures(models, names, resamples=settings.bootstrap_resamples, seed=settings.seed)
    folds = [_about(fold, each) for fold, each in enumerate(of_folds, start=1)]
    synthetic = f" {SYNTHETIC}" if first["synthetic"] else ""
    results = first | {
        "measured_on": f"Cross-validation by patient: each of {comparison['patients']} patients was held out once, in "
        f"{count} folds, and the scores of {count} adapters on {comparison['scans']} studies are pooled.{synthetic}",
        "data": f"The adapter in this folder is that of fold {KEPT_FOLD} of {count}. {first['data']} The figures are "
        f"of all folds: {comparison['scans']} studies of {comparison['patients']} patients.",
        "comparison": comparison,
        "folds": folds,
        "table": "\n\n".join([results_table(comparison, names), folds_table(folds)]),
        "seconds": round(sum(each["seconds"] for each in of_folds), 1),
    }
    kept = (
        f"The adapter in this folder is that of fold {KEPT_FOLD} of {count}: it has not seen the patients of that "
        "fold, and chose on those of the next. The figures are pooled over all folds, each with an adapter of its own."
    )
    own_figures = remarks_on(first, settings.max_forgotten)
    of_run = [remark for remark in first["remarks"] if remark not in own_figures]
    return results | {"remarks": [kept, *of_run, *remarks_on(results, settings.max_forgotten)]}


def _in_a_line(about: dict[str, Any], folds: int) -> str:
    aurocs = f"mean AUROC {about[BASE]:.3f} before, {about[ADAPTED]:.3f} after"
    studies = counted(about["scans"], "study", "studies")
    return f"fold {about['fold']} of {folds}: {aurocs}, on {studies} of {counted(about['patients'], 'patient')}"


def _about(fold: int, results: dict[str, Any]) -> dict[str, Any]:
    """One fold in the results of all."""
    aurocs = {model: results["comparison"][model]["auroc"]["value"] for model in (BASE, ADAPTED)}
    numbers = {name: results["comparison"][name] for name in ("scans", "patients")}
    kept = results["kept"] and results["kept"]["difference"]["auroc"]["value"]
    return {
        "fold": fold,
        **numbers,
        **aurocs,
        "kept": kept,
        **{name: results[name] for name in ("steps", "best_step", "strength")},
    }
