"""The score of every study in a csv file, so that any figure can be computed again and any plot drawn again.

One row for each study and model: `model`, `source`, `split`, `file_name` (the study's name in its source, as in
`metadata.csv`), `patient`, one column per label with the score, and one with the label itself, `LABEL label`, empty
where unknown. Columns of subgroups may follow. Rows without a model name studies that were only trained on.

The file stays with its user: it names patients, so it is never pushed.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from medct.common.counting import counted
from medct.common.formulas import as_text
from medct.data.sources import DataError
from medct.data.study_names import composed, matched
from medct.data.subgroups import COLUMNS as SUBGROUPS
from medct.data.subgroups import subgroup_columns, subgroups_of
from medct.data.table_files import columns_of, read_table
from medct.data.tables import check_labels, patients_of, refuse_misnamed, refuse_two_spellings, to_numbers
from medct.evaluation.scoring import ScoredStudies

NAME = "file_name"
KEYS = ("model", "source", "split")
TUNE = "tune"
_NAME_COLUMNS = (NAME, "VolumeName", "study")
_LABEL = "{} label"


class Key(NamedTuple):
    """Which scores: of which model, on which source and split."""

    model: str
    source: str
    split: str


def short_names(addresses: Sequence[str]) -> list[str]:
    """What to call sources or models in tables: the last part of a path, each of them only once.

    Args:
        addresses: As the user gave them.
    """
    found: list[str] = []
    for address in addresses:
        name = short = Path(address).name if "://" not in address and Path(address).name else address
        while name in found:
            name = f"{short} ({sum(each.split(' (')[0] == short for each in found) + 1})"
        found.append(name)
    return found


@dataclass(frozen=True)
class Predictions:
    """What a csv file of scores holds.

    Args:
        names: Of the labels.
        scored: By model, source and split, in the order of the file.
    """

    names: list[str]
    scored: dict[Key, ScoredStudies]


def held_out(predictions: Predictions) -> Predictions:
    """Scores without those of tuning patients, which models were chosen on; with them if there are no others.

    Args:
        predictions: Of a run.
    """
    others = {key: scored for key, scored in predictions.scored.items() if key.split != TUNE}
    return Predictions(predictions.names, others or predictions.scored)


def write_predictions(
    path: Path, predictions: Predictions, others: Iterable[tuple[str, str, Sequence[str]]] = ()
) -> None:
    """Write scores.

    Args:
        path: csv file to make; of one that was stopped, a part.
        predictions: What to write.
        others: Source, split and names of studies that have no scores, such as those trained on.
    """
    parts = [_table(key, scored) for key, scored in predictions.scored.items()]
    for source, split, studies in others:
        parts.append(pd.DataFrame({"model": "", "source": source, "split": split, NAME: list(studies)}))
    table = pd.concat(parts, ignore_index=True)
    for column in table.select_dtypes(exclude="number"):
        table[column] = table[column].map(as_text, na_action="ignore")
    table.rename(columns=as_text).to_csv(path, index=False, lineterminator="\n")


def _table(key: Key, scored: ScoredStudies) -> pd.DataFrame:
    table = {**key._asdict(), NAME: scored.ids, "patient": scored.patients}
    names = scored.names
    # As float64, whose text is read back to the bit.
    table |= dict(zip(names, np.asarray(scored.scores, float).T, strict=True))
    labels = np.asarray(scored.labels, float).T
    table |= {_LABEL.format(name): column for name, column in zip(names, labels, strict=True)}
    groups = dict.fromkeys(group for about in scored.about for group in about)
    return pd.DataFrame(table | {group: [about.get(group, "") for about in scored.about] for group in groups})


def read_predictions(path: Path) -> Predictions:
    """Read what `write_predictions` wrote.

    Args:
        path: csv file.

    Raises:
        DataError: If it is not such a file.
    """
    known = [*KEYS, NAME, "patient"]
    columns = columns_of(path)
    names = [name for name in columns if _LABEL.format(name) in columns]
    if columns and not names:
        raise DataError(
            f"{path}: it holds no labels beside its scores. Pass the csv file beside a results.json or, to `medct "
            "metrics`, a table of labels as well."
        )
    table = read_table(path, known, [column for column in columns if column not in known])
    scored_rows = table[table["model"] != ""]
    numbers = to_numbers(scored_rows, [*names, *map(_LABEL.format, names)], str(path))
    groups = [name for name in table if name not in (*known, *names, *map(_LABEL.format, names))]
    found = {}
    for key, rows in numbers.groupby(list(KEYS), sort=False):
        about = rows[groups].to_dict("records") if groups else []
        of_source = [name for name in names if rows[name].notna().any()]  # others may have other labels
        found[Key(*key)] = ScoredStudies(
            rows[NAME].tolist(),
            rows["patient"].tolist(),
            rows[of_source].to_numpy(float),
            rows[list(map(_LABEL.format, of_source))].to_numpy(float),
            about,
            names=of_source,
        )
    return Predictions(names, found)


def learned_from(path: Path) -> dict[str, set[str]]:
    """The names of the studies that a run has trained on ("train") and chosen on ("tune").

    Args:
        path: What `write_predictions` wrote of it; nothing is known without the file.

    Raises:
        DataError: If it is not such a file.
    """
    if not path.is_file():
        return {}
    table = read_table(path, ["split", NAME])
    return {split: set(table[NAME][table["split"] == split]) for split in ("train", TUNE)}


def join_metadata(predictions: Path, metadata: Path, split: str | None = None) -> Predictions:
    """Scores of any origin, with the labels and patients of a table of studies.

    Args:
        predictions: csv file with the study's name (`file_name`, `VolumeName` or, as `medct predict` writes it,
            `study`) and a column of scores per label; with several models, `model`.
        metadata: csv file with the study's name, a column per label (1, 0 or empty) and, optionally, `patient` and
            `split`.
        split: Only studies of this split of the metadata.

    Returns:
        Of the labels that both have. A study is found by its whole name or the end of its path.

    Raises:
        DataError: If a file cannot be read, they share no label or no study, or a study has two rows.
    """
    scores, labels = (named_table(path) for path in (predictions, metadata))
    scores = _of_models(scores, split)
    names = [name for name in _label_columns(scores) if name in labels]
    if not names:
        raise DataError(f"{predictions} and {metadata} have no label in common. Name the columns alike.")
    if lacking := _scores_without_labels(scores, labels):
        said = f"{metadata} has no column {', '.join(lacking)}, so these scores are left out. Name the columns alike."
        warnings.warn(said, stacklevel=2)
    labels, within = labelled(labels, names, metadata), f"{metadata}"
    if split is not None:
        labels, within = _of_split(labels, split, metadata), f"{metadata}, split {split}"
    scores = to_numbers(scores, names, str(predictions))
    scores = scores.assign(**{NAME: matched(scores[NAME], set(labels[NAME])), "model": scores.get("model", "scores")})
    if 0 < (others := int(scores[NAME].isna().sum())) < len(scores):
        warnings.warn(f"{others} of {len(scores)} rows of {predictions} are not in {within}; left out.", stacklevel=2)
    scores = scores[scores[NAME].notna()]
    _refuse_doubles(scores, ["model", NAME], predictions)
    if scores.empty:
        raise DataError(f"No study of {predictions} is in {metadata}. Their names must end alike.")
    groups = pd.DataFrame(subgroup_columns(labels.drop(columns=names)), index=labels[NAME])
    found = {}
    for model, rows in scores.groupby("model", sort=False):
        truth = labels.set_index(NAME).loc[rows[NAME]]
        found[Key(str(model), metadata.name, split or "all")] = ScoredStudies(
            rows[NAME].tolist(),
            truth["patient"].tolist(),
            rows[names].to_numpy(float),
            truth[names].to_numpy(float),
            [subgroups_of(study) for study in groups.loc[rows[NAME]].to_dict("records")],
            names=names,
        )
    return Predictions(names, found)


def _of_split(labels: pd.DataFrame, split: str, metadata: Path) -> pd.DataFrame:
    if "split" not in labels:
        raise DataError(f"{metadata}: it has no column 'split'. Leave out --split.")
    found = labels[labels["split"] == split]
    if found.empty:
        there = ", ".join(labels["split"].unique())
        raise DataError(f"{metadata}: it has no study of the split {split!r}. Pass one of its own: {there}.")
    return found


def named_table(path: Path) -> pd.DataFrame:
    """A table as text, whose column of names (`file_name`, `VolumeName` or `study`) is called `file_name`.

    Of equal rows there is one, as in a source of studies.

    Raises:
        DataError: If it cannot be read, or has no such column.
    """
    columns = columns_of(path)
    name = next((column for column in _NAME_COLUMNS if column in columns), NAME)
    table = read_table(path, [name], [column for column in columns if column != name])
    table = table.rename(columns={name: NAME}).assign(**{NAME: table[name].str.strip().map(composed)})
    return table.drop_duplicates()


def _of_models(scores: pd.DataFrame, split: str | None) -> pd.DataFrame:
    """Rows that hold scores and, unless a split is asked for, not those of tuning patients; see `held_out`."""
    if "model" in scores:
        scores = scores[scores["model"] != ""]
    is_tuned = scores.get("split", pd.Series("", scores.index)) == TUNE
    if split is not None or is_tuned.all() or not is_tuned.any():
        return scores
    warnings.warn(f"{counted(int(is_tuned.sum()), 'score')} of tuning patients left out.", stacklevel=3)
    return scores[~is_tuned]


def _label_columns(scores: pd.DataFrame) -> list[str]:
    """Columns of scores: of a run's own file those with a label beside them, of others all that can be."""
    own = [name for name in scores if _LABEL.format(name) in scores]
    return own or [name for name in scores if name not in (*KEYS, NAME, "patient", *SUBGROUPS)]


def _scores_without_labels(scores: pd.DataFrame, labels: pd.DataFrame) -> list[str]:
    """Columns of nothing but scores that the table of labels lacks; of what `medct predict` wrote, not its calls."""
    beside = {f"{name} {what}" for name in scores for what in ("present", "probability")}
    found = []
    for name in _label_columns(scores):
        cells = scores[name].str.strip().str.replace(",", ".")
        numbers = pd.to_numeric(cells[cells != ""], errors="coerce")
        if name not in labels and name not in beside and len(numbers) and numbers.between(0, 1).all():
            found.append(name)
    return found


def labelled(table: pd.DataFrame, names: Sequence[str], path: Path) -> pd.DataFrame:
    """A table of studies with labels as numbers and the patient of each study, by default the study itself.

    Args:
        table: From `named_table`.
        names: Columns of the labels.
        path: The file, for messages.

    Raises:
        DataError: If a label or a patient is not what it should be, or a study has two rows.
    """
    refuse_misnamed(list(table), str(path))
    patients = patients_of(table, NAME, str(path))
    refuse_two_spellings(patients, str(path))
    _refuse_doubles(table, [NAME], path)
    return check_labels(table, names, str(path)).assign(patient=patients)


def _refuse_doubles(table: pd.DataFrame, key: list[str], path: Path) -> None:
    if (doubled := table.duplicated(key)).any():
        raise DataError(
            f"{path}: {counted(int(doubled.sum()), 'row is', 'rows are')} of a study that has one, such as "
            f"{table[NAME][doubled].iloc[0]!r}. Keep one of each."
        )


def paired(first: ScoredStudies, second: ScoredStudies, what: str) -> tuple[ScoredStudies, ScoredStudies]:
    """The studies that two models have both scored, in the same order.

    Args:
        first: Of the one model.
        second: Of the other.
        what: Name of the studies in messages.

    Raises:
        DataError: If they share none, or differ in a label or a patient: then one of them was not scored on these.
    """
    place = {study: index for index, study in enumerate(second.ids)}
    rows = [(index, place[study]) for index, study in enumerate(first.ids) if study in place]
    if not rows:
        raise DataError(f"{what}: the two runs have no study in common. Pass runs on the same studies.")
    one, two = (scored.take([pair[side] for pair in rows]) for side, scored in enumerate((first, second)))
    same = np.array_equal(one.labels, two.labels, equal_nan=True)
    if not same or one.patients != two.patients:
        unlike = "labels" if not same else "patients"
        raise DataError(f"{what}: the two runs were scored on different {unlike}. Score both on the same table.")
    return one, two
