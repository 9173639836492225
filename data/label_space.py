"""Where the names of a data set and the findings that a model is asked for meet.

A model is asked for findings in words, which stand in its configuration. A data set has labels under names of its own.
A table of labels, csv or Excel, says what belongs together:

| column | what it holds |
| --- | --- |
| `label` | a finding: its name in everything that is written |
| `data` | the name of its column in the data; `label` by default |
| `words` | what stands in the prompts in place of its name, in the language of the model |
| `present`, `absent` | sentences of its own, in place of the prompts' templates |
| `merge` | how scores become one, see `Merged`; "max" by default |

In several rows a finding has several names in the data: it is present if any of them is. Several findings in one cell,
with "|" between them, are those which the data cannot tell apart: they are scored as one, and where that is present,
nobody knows which of them is.

Such a table is used in two ways. As `--labels` it says what the model is asked for, instead of its own findings. As
`--mapping` it says which of the data's names mean a finding of the model. A finding that it does not name is unknown in
all studies, not absent.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medct.adapters_medct import as_described
from medct.configuration_medct import MedCTConfig, Prompt
from medct.data.sources import MAPPING_FLAGS, DataError, Merged, Row, Source
from medct.data.table_files import read_table

MAPPINGS = Path(__file__).parent / "mappings"
"""Published mappings, a table each; the comment at its top names the source."""
_BETWEEN = "|"
MERGE_RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "max": lambda values: values.max(axis=1),
    "max_or_min": lambda values: np.where(values.max(axis=1) > 0.5, values.max(axis=1), values.min(axis=1)),
}
"""How `(studies, findings)` become `(studies,)`, by the name of the rule."""


@dataclass(frozen=True)
class LabelRow:
    """One row of a table of labels; see the top of this file."""

    findings: tuple[str, ...]
    data: str
    prompt: Prompt | None = None
    merge: str = "max"


@dataclass(frozen=True)
class LabelTable:
    """A table of labels.

    Args:
        name: Name of the published mapping, or of the file, without its folder.
        rows: In the order of the file.
        source: Where a published mapping is from.
        has_data: Whether it has names of the data, other than the findings' own.
        is_published: Whether it came with this package, so that a model may lack some of its findings.
    """

    name: str
    rows: tuple[LabelRow, ...]
    source: str = ""
    has_data: bool = False
    is_published: bool = False

    @property
    def findings(self) -> tuple[str, ...]:
        """All findings, each once."""
        return tuple(dict.fromkeys(finding for row in self.rows for finding in row.findings))

    @property
    def prompts(self) -> dict[str, Prompt]:
        """Prompts of those findings that have their own."""
        return {finding: row.prompt for row in self.rows for finding in row.findings if row.prompt is not None}


def published_mappings() -> dict[str, Path]:
    """The tables that come with this package, by name."""
    return {path.stem: path for path in sorted(MAPPINGS.glob("*.csv"))}


def read_labels(address: str | Path, what: str = "--labels") -> LabelTable:
    """Read a table of labels.

    Args:
        address: Path of a csv file or Excel sheet, or the name of a published mapping.
        what: Where it was named, for messages.

    Raises:
        DataError: If there is no such table, or its cells contradict each other.
    """
    published = published_mappings()
    is_published = str(address) in published
    path = published[str(address)] if is_published else Path(address)
    if not path.is_file():
        # What a model is asked for is no mapping.
        known = "" if what == "--labels" else f", or one of the published mappings {', '.join(published)}"
        raise DataError(f"{what} {address}: no such file. Pass a table with the column `label`{known}.")
    table = read_table(path, ["label"], ("data", "words", "present", "absent", "merge"), path.name, comments=True)
    rows = [_row(cells, f"{path.name}, row {number}") for number, cells in enumerate(table.to_dict("records"), 1)]
    if not rows:
        raise DataError(f"{path.name}: it has no labels. Write one in each row of the column `label`.")
    labels = LabelTable(path.stem, tuple(rows), _source_of(path), "data" in table, is_published)
    _check(labels, path.name)
    return labels


def _row(cells: dict[str, str], where: str) -> LabelRow:
    cells = {name: " ".join(cell.split()) for name, cell in cells.items()}
    findings = tuple(part.strip() for part in cells["label"].split(_BETWEEN))
    if not all(findings) or len(set(findings)) < len(findings):
        raise DataError(f"{where}: the label {cells['label']!r} is empty or given twice. Write the name of a finding.")
    words, sentences = cells.get("words", ""), [cells.get(name, "") for name in ("present", "absent")]
    if any(sentences) and (words or not all(sentences)):
        raise DataError(f"{where}: write both sentences, `present` and `absent`, and no `words`; or `words` alone.")
    prompt: Prompt | None = [sentences] if all(sentences) else words or None
    merge = cells.get("merge") or "max"
    if merge not in MERGE_RULES:
        raise DataError(f"{where}: there is no rule {merge!r}. `merge` is one of {', '.join(MERGE_RULES)}.")
    if len(findings) > 1 and (prompt is not None or not cells.get("data")):
        raise DataError(f"{where}: several findings in a cell need their name in the data in `data`, and no prompts.")
    return LabelRow(findings, cells.get("data") or findings[0], prompt, merge)


def _source_of(path: Path) -> str:
    """The comment at the top of a csv file, as one line."""
    if path.suffix != ".csv":
        return ""
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    comment = lines[: next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    return " ".join(line.strip("# ") for line in comment)


def _check(labels: LabelTable, where: str) -> None:
    """Refuse a finding that is alone in one row and merged in another, or has two prompts."""
    for finding in labels.findings:
        rows = [row for row in labels.rows if finding in row.findings]
        if len({(row.findings, row.merge) for row in rows}) > 1:
            raise DataError(f"{where}: {finding!r} is merged with others in one row and not so in another. Choose one.")
        prompts = [row.prompt for row in rows if row.prompt is not None]
        if any(prompt != prompts[0] for prompt in prompts):
            raise DataError(f"{where}: {finding!r} has two prompts. Keep one.")
        data = [row.data for row in rows]
        if len(set(data)) < len(data):
            raise DataError(f"{where}: {finding!r} is there twice. Keep one row of each, or give them other `data`.")


# ---------------------------------------------------------------------------------------------------------------------
# What the model is asked
# ---------------------------------------------------------------------------------------------------------------------


def read_label_flags(
    config: MedCTConfig,
    labels: str | None = None,
    templates: Sequence[str] | None = None,
    mapping: str | None = None,
) -> tuple[MedCTConfig, LabelTable | None]:
    """What a model is asked, and what the data call it, by what the command line says.

    Args:
        config: The model's own configuration; not changed.
        labels: Table of what to ask for, instead of the model's own findings.
        templates: Pairs of sentences, "PRESENT|ABSENT", that hold "{label}"; instead of the model's own.
        mapping: Table of the data's names, or name of a published mapping. Findings that have a prompt in it are asked
            for beside the model's own.

    Returns:
        The configuration with its labels and prompts, and the mapping for `open_source`.

    Raises:
        DataError: If a table is not what it should be, or the model is a classifier, which is asked nothing in words.
    """
    own = read_labels(labels) if labels else None
    to_data = read_labels(mapping, "--mapping") if mapping else own if own and own.has_data else None
    if own and any(len(row.findings) > 1 for row in own.rows):
        raise DataError(f"--labels {own.name}: a model is asked for one finding at a time. Merge them with --mapping.")
    if templates:  # also in place of sentences that the model remembers; those of a table stand
        words: dict[str, Prompt] = {
            label: each for label, each in (config.prompts or {}).items() if isinstance(each, str)
        }
        config = with_labels(config, config.label_names, words, pairs_of(templates))
    if own:
        config = with_labels(config, own.findings, own.prompts)
    if to_data and to_data is not own:
        config = also_asked(config, to_data)
    return config, to_data


def also_asked(config: MedCTConfig, mapping: LabelTable) -> MedCTConfig:
    """A configuration that asks for what a mapping has prompts for, beside its own findings.

    Args:
        config: Whose labels and prompts stay, but where the mapping has a prompt.
        mapping: What the data call the findings.
    """
    if not mapping.prompts:
        return config
    names = dict.fromkeys((*config.label_names, *mapping.prompts))
    return with_labels(config, names, {**(config.prompts or {}), **mapping.prompts})


def refuse_two_prompts(mappings: Iterable[LabelTable]) -> None:
    """Refuse tables for several sources that ask for one finding in different words.

    Args:
        mappings: The tables.

    Raises:
        DataError: If two do; it names them.
    """
    first: dict[str, LabelTable] = {}
    for table in mappings:
        for finding, prompt in table.prompts.items():
            other = first.setdefault(finding, table)
            if other.prompts[finding] != prompt:
                raise DataError(
                    f"--mapping {table.name}: {finding!r} has another prompt than in {other.name}. A model is asked "
                    "for it in the same words whatever the source: keep one."
                )


def pairs_of(templates: Sequence[str]) -> list[tuple[str, ...]]:
    """Pairs of sentences.

    Args:
        templates: Each "PRESENT|ABSENT", with "{label}" in both.

    Raises:
        DataError: If one is not.
    """
    pairs = [tuple(template.split("|")) for template in templates]
    try:
        MedCTConfig().label_prompts([], pairs)
    except ValueError as error:
        raise DataError(f"--templates: {error}") from error
    return pairs


def with_labels(
    config: MedCTConfig,
    labels: Iterable[str],
    prompts: dict[str, Prompt] | None = None,
    templates: Sequence[Sequence[str]] | None = None,
) -> MedCTConfig:
    """A copy of a configuration that asks for other labels, or in other words.

    Args:
        config: The model's.
        labels: Names of the labels.
        prompts: See `MedCTConfig.prompts`.
        templates: Pairs of sentences; the configuration's own by default.

    Raises:
        DataError: If it is a classifier's, whose labels belong to its head.
    """
    if "MedCTForImageClassification" in (config.architectures or ()):
        raise DataError(
            "The model is a classifier: it has the labels of its head and is not asked in words. Leave out "
            "--labels and --templates; --mapping says which of the data's names mean its labels."
        )
    pairs = [list(pair) for pair in (config.prompt_templates if templates is None else templates)]
    asked = {"label_names": list(labels), "prompt_templates": pairs, "prompts": dict(prompts) if prompts else None}
    return as_described(config, asked)


# ---------------------------------------------------------------------------------------------------------------------
# What the data say
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelSpace:
    """How the labels of a data set become those of a model.

    Args:
        findings: The model's, in its order.
        table: Which names mean which of them; each its own if `None`.
    """

    findings: tuple[str, ...]
    table: LabelTable | None = None

    @classmethod
    def of(cls, config: MedCTConfig, table: LabelTable | None = None) -> "LabelSpace":
        """The space between a model and a data set.

        Args:
            config: The model's configuration, with what it is asked.
            table: See `LabelSpace`.

        Raises:
            DataError: If the table names a finding that the model is not asked for.
        """
        known = set(config.label_names)
        if table is not None:
            others = [finding for finding in table.findings if finding not in known]
            rows = tuple(row for row in table.rows if known.issuperset(row.findings))
            if (others and not table.is_published) or not rows:
                raise DataError(
                    f"{table.name}: {others[0]!r} is not a finding of the model, which has {_few(config.label_names)}. "
                    "Name one of these, or give it a prompt in the column `words`."
                )
            table = replace(table, rows=rows)
        return cls(tuple(config.label_names), table)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names in the data that are needed."""
        return self.findings if self.table is None else tuple(dict.fromkeys(row.data for row in self.table.rows))

    def apply(self, source: Source) -> Source:
        """A source whose labels are the model's.

        Args:
            source: With the data's labels, in any order.

        Raises:
            DataError: If the source has not all labels that are needed.
        """
        if self.table is None and source.label_names == self.findings:
            return source
        if self.table is not None and source.mapping is not None:
            if source.mapping["labels"] != self._described()["labels"]:
                raise DataError(f"{source.description}: its labels are mapped already. Leave out --mapping.")
            return LabelSpace(self.findings).apply(source)
        if missing := [name for name in self.columns if name not in source.label_names]:
            raise DataError(
                f"{source.description}: it has no label {missing[0]!r}, but {_few(source.label_names)}. Say with "
                f"{MAPPING_FLAGS} which of its labels mean the model's."
            )
        if self.table is None:
            return self._among(source)
        rows = self.table.rows
        names = {finding: [row.data for row in rows if finding in row.findings] for finding in self.findings}
        places = tuple(tuple(map(source.label_names.index, names[finding])) for finding in self.findings)
        merged = dict.fromkeys(Merged(row.findings, row.merge) for row in rows if len(row.findings) > 1)
        classes = len({row.findings for row in rows})
        return replace(
            source,
            read=ReadMapped(source.read, places),
            label_names=self.findings,
            description=f"{source.description}, {classes} labels by {self.table.name}",
            merged=tuple(merged),
            mapping=self._described(),
        )

    def _among(self, source: Source) -> Source:
        """A source of whose labels the model has some, by the same names."""
        # Where the model has a part of what is told together, nobody knows what is true of that part.
        torn = {
            name for each in source.merged if not set(each.findings) <= set(self.findings) for name in each.findings
        }
        places = tuple(() if name in torn else (source.label_names.index(name),) for name in self.findings)
        merged = tuple(each for each in source.merged if torn.isdisjoint(each.findings))
        return replace(source, read=ReadMapped(source.read, places), label_names=self.findings, merged=merged)

    def _described(self) -> dict[str, Any]:
        """The mapping as JSON holds it: for each class the names in the data."""
        assert self.table is not None
        classes: dict[str, list[str]] = {}
        for row in self.table.rows:
            classes.setdefault(Merged(row.findings).name, []).append(row.data)
        return {"name": self.table.name, "source": self.table.source, "labels": classes}


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")


@dataclass(frozen=True)
class ReadMapped:
    """Rows with other labels; picklable, for loader processes.

    Args:
        read: Reads a row with the data's labels.
        places: For each label the places of those that mean it; none: unknown.
    """

    read: Callable[[Any], Row]
    places: tuple[tuple[int, ...], ...]

    def __call__(self, key: Any) -> Row:
        row = self.read(key)
        return {**row, "labels": [any_of([row["labels"][place] for place in places]) for places in self.places]}


def any_of(values: Sequence[float]) -> float:
    """Whether any of several labels holds.

    Args:
        values: 0 to 1, NaN if unknown.

    Returns:
        The highest; NaN if none is known, or an unknown one might be higher.
    """
    known = [value for value in values if not math.isnan(value)]
    if not known or (len(known) < len(values) and max(known) < 1):
        return math.nan
    return max(known)


def told_apart(source: Source) -> Source:
    """A source to learn from: where several findings have one label, and it is present, each of them is unknown.

    Args:
        source: Any source.
    """
    if not source.merged:
        return source
    groups = tuple(tuple(source.label_names.index(name) for name in each.findings) for each in source.merged)
    return replace(source, read=ReadToldApart(source.read, groups), merged=())


@dataclass(frozen=True)
class ReadToldApart:
    """Rows whose labels hold for each finding by itself; picklable, for loader processes.

    Args:
        read: Reads a row in which merged findings have the label of all.
        groups: Places of the findings of each group.
    """

    read: Callable[[Any], Row]
    groups: tuple[tuple[int, ...], ...]

    def __call__(self, key: Any) -> Row:
        row = self.read(key)
        labels = list(row["labels"])
        for group in self.groups:
            for place in group:
                labels[place] = 0.0 if labels[place] == 0 else math.nan
        return {**row, "labels": labels}


def merge_columns(
    values: np.ndarray, names: Sequence[str], merged: Sequence[Merged]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Scores or labels by finding as those of what is scored: merged findings have one column, where the first was.

    Args:
        values: `(studies, findings)`.
        names: Of the findings.
        merged: Which of them are scored as one.

    Returns:
        `(studies, scored)`, and their names.
    """
    columns, found = [], []
    first = {each.findings[0]: each for each in merged}
    others = {name for each in merged for name in each.findings[1:]}
    for index, name in enumerate(names):
        if name in first:
            places = [list(names).index(each) for each in first[name].findings]
            columns.append(MERGE_RULES[first[name].rule](values[:, places]))
            found.append(first[name].name)
        elif name not in others:
            columns.append(values[:, index])
            found.append(name)
    return np.stack(columns, axis=1), tuple(found)


__all__ = [
    "LabelSpace",
    "LabelTable",
    "also_asked",
    "any_of",
    "merge_columns",
    "pairs_of",
    "published_mappings",
    "read_label_flags",
    "read_labels",
    "refuse_two_prompts",
    "told_apart",
    "with_labels",
]
