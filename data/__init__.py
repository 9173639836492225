"""Streamed sources of studies, and the batches made from them: the public names of the data layer.

| module | what it holds |
| --- | --- |
| `sources` | what a source and a row are |
| `folders` | local folders and dataset repositories on the Hub |
| `tables` | from tables of studies to sources: splits, what is left out |
| `label_space` | labels of a data set as findings of a model: mappings, labels of one's own |
| `table_files` | csv files and Excel sheets |
| `study_names` | which row of a table is a study's |
| `ct_rate` | CT-RATE, on the Hub or local |
| `rad_chestct` | RAD-ChestCT, on the Hub or local |
| `own_data` | folders with `metadata.csv`, Parquet and `datasets` repositories |
| `prepared` | prepared shards |
| `loader` | from rows to batches |
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from medct.configuration_medct import CT_CLIP_LABELS, MedCTConfig
from medct.data.ct_rate import REPORT_COLUMNS, ct_rate_source, is_ct_rate
from medct.data.folders import Folder, open_folder, refuse_revision
from medct.data.label_space import LabelSpace, LabelTable, read_labels
from medct.data.loader import StudyLoader, report_id
from medct.data.own_data import metadata_files, metadata_source, parquet_source
from medct.data.phantoms import make_phantom
from medct.data.phantoms.sites import SITES
from medct.data.prepared import MANIFEST, prepared_source
from medct.data.rad_chestct import is_rad_chestct, rad_chestct_source, rad_chestct_space
from medct.data.sources import (
    AllLeftOutError,
    DataError,
    Deferred,
    NoSuchSplitError,
    Row,
    Skipped,
    Source,
    first_of,
    joined,
    read_study,
)
from medct.data.tables import SPLITS, TUNE_SHARE, Selection

ALL = "all"
"""All splits of a source together, such as of a test set that a model has never seen."""
PHANTOMS = "phantoms"
"""An address that needs no files; with a colon and a site after it, such as `phantoms:A`, phantoms of that site."""


@dataclass(frozen=True)
class PhantomCohort:
    """SYNTHETIC patients by number, each in one split.

    Args:
        site: Synthetic hospital, see `phantoms.sites.SITES`.
        train_patients: Number of patients to train on.
        tune_patients: Number of patients to tune on.
        eval_patients: Number of patients to score on.
        seed: Seed for the whole cohort.
    """

    site: Literal["A", "B", "C"] = "B"
    train_patients: int = 2000
    tune_patients: int = 100
    eval_patients: int = 300
    seed: int = 0

    def patients(self, split: str) -> range:
        """Numbers of the patients in "train", "tune" or "valid"."""
        start = 0
        # The first ones of site A are those that the phantom base has not seen.
        for name, size in (("valid", self.eval_patients), ("tune", self.tune_patients), ("train", self.train_patients)):
            if name == split:
                return range(start, start + size)
            start += size
        raise DataError(f"There is no split {split!r}.")


def open_source(
    address: str,
    split: str,
    config: MedCTConfig,
    *,
    reconstructions: Literal["one", "all"] = "one",
    tune_share: float | None = None,
    limit: int | None = None,
    version: int = 2,
    need_reports: bool = False,
    revision: str | None = None,
    token: str | None = None,
    phantoms: PhantomCohort = PhantomCohort(),
    mapping: LabelTable | str | None = None,
) -> Source:
    """Open a split of labelled studies, wherever they lie.

    Args:
        address: Local folder or `hf://datasets/ORG/NAME`: in CT-RATE's layout, with a `metadata.csv`, of prepared
            shards, or of Parquet with a `Nifti()` column; or one Parquet file. The kind is recognised by its content.
            "phantoms": SYNTHETIC studies; "phantoms:A": those of site A.
        split: "train", "tune" or "valid". No patient is in two of them; thresholds are chosen on "tune", so that
            "valid" stays unseen. Or "all": whatever of these the source has.
        config: The model's configuration, whose labels are read.
        reconstructions: "one" per scan and epoch, in turn, so that no two studies of a batch share a report; or "all",
            as studies of their own.
        tune_share: Share of the train split's patients that form "tune" if the source has no such split: those with
            the lowest hashes, so always the same. 0.1 by default; for prepared shards, the share used to prepare them.
        limit: Take only this many studies, the first of a fixed pseudo-random order.
        version: Version of CT-RATE.
        need_reports: Leave out studies whose report says nothing; they are of use where only labels are learned.
        revision: Branch, tag or commit of a repository.
        token: Token for the Hub, in place of that of the logged-in user.
        phantoms: The studies that "phantoms" stands for.
        mapping: Which of the data's names mean which of the model's findings: a table of labels, its path, or the name
            of a published mapping. By default the names are the same; RAD-ChestCT's abnormalities are CT-RATE's
            findings by `rad_chestct.MAPPING`.

    Returns:
        The source; nothing but tables has been read.

    Raises:
        DataError: If the address holds none of these, or not what the model needs.
    """
    table = read_labels(mapping, "--mapping") if isinstance(mapping, str) else mapping
    if split == ALL:
        options: dict[str, Any] = {"reconstructions": reconstructions, "tune_share": tune_share, "version": version}
        options |= {"need_reports": need_reports, "revision": revision, "token": token, "phantoms": phantoms}
        splits = open_splits(address, config, mapping=table, **options)
        return joined(list(splits.values()), f"studies of {', '.join(splits)} of {address}", limit)
    refuse_revision(address, revision)
    share = TUNE_SHARE if tune_share is None else tune_share
    selection = Selection(split, reconstructions, share, limit, need_reports)
    space = LabelSpace.of(config, table)
    kind, _, site = address.partition(":")
    if kind == PHANTOMS:
        if site and site not in SITES:
            raise DataError(f"{address}: there is no such site. Choose one of {', '.join(SITES)}.")
        cohort = replace(phantoms, site=site) if site else phantoms  # type: ignore[arg-type]
        return space.apply(_phantom_split(selection, cohort))
    if address.endswith(".parquet"):
        return space.apply(parquet_source(address, space.columns, selection, revision, token))
    folder = open_folder(address, revision, token)
    if folder.file(MANIFEST):
        _refuse_mixture(folder)
        # Their labels were the model's when they were made, or are mapped now.
        options = {"tune_share": tune_share, "token": token, "own_labels": space.table is not None}
        return space.apply(prepared_source(folder.address, selection, config, **options))
    if files := metadata_files(folder):
        return space.apply(metadata_source(folder, files, space.columns, selection))
    if is_rad_chestct(folder):
        space = rad_chestct_space(config, table)
        return space.apply(rad_chestct_source(folder, space.columns, selection))
    if is_ct_rate(folder):
        return space.apply(ct_rate_source(folder, space.columns, selection, version))
    return space.apply(parquet_source(address, space.columns, selection, revision, token))


def open_splits(address: str, config: MedCTConfig, **options: Any) -> dict[str, Source]:
    """Every split that a source has; it warns of those whose studies were all left out.

    Args:
        address: See `open_source`.
        config: The model's configuration, whose labels are read.
        options: Of `open_source`.

    Raises:
        DataError: If the address holds nothing, or not what the model needs.
    """
    found: dict[str, Source] = {}
    errors: list[NoSuchSplitError] = []
    for split in SPLITS:
        try:
            found[split] = open_source(address, split, config, **options)
        except NoSuchSplitError as error:
            errors.append(error)
    left_out = [error for error in errors if isinstance(error, AllLeftOutError)]
    if not found:
        raise (left_out or errors)[-1]
    for each in left_out:
        warnings.warn(str(each), stacklevel=2)
    return found


def _refuse_mixture(folder: Folder) -> None:
    """Refuse prepared shards beside tables of studies: nobody knows which of them are meant."""
    # On the Hub, each look for a table would be a request, and what is pushed there is shards alone.
    if folder.is_local and (metadata_files(folder) or is_rad_chestct(folder) or is_ct_rate(folder)):
        raise DataError(
            f"{folder}: it has both prepared shards ({MANIFEST}) and tables of studies. Move one of them elsewhere."
        )


def _phantom_split(selection: Selection, cohort: PhantomCohort) -> Source:
    """A split of a cohort of phantoms."""
    patients = cohort.patients(selection.split)
    chosen = first_of([_phantom_name(cohort.site, patient) for patient in patients], selection.limit)
    return phantom_source(cohort.site, [patients[index] for index in chosen], cohort.seed)


def phantom_source(site: str, patients: Sequence[int], seed: int) -> Source:
    """SYNTHETIC studies, drawn on demand.

    Args:
        site: Synthetic hospital, see `phantoms.sites.SITES`.
        patients: Numbers of the patients; sources with disjoint numbers share no patient.
        seed: Seed for the whole cohort.
    """
    return Source(
        [(patient,) for patient in patients],
        _DrawPhantom(site, seed),
        CT_CLIP_LABELS,
        f"{len(patients)} SYNTHETIC phantoms of site {site}",
        names=[_phantom_name(site, patient) for patient in patients],
        is_synthetic=True,
    )


def _phantom_name(site: str, patient: int) -> str:
    return f"phantom_{site.lower()}_{patient}"


@dataclass(frozen=True)
class _DrawPhantom:
    site: str
    seed: int

    def __call__(self, patient: int) -> Row:
        study = make_phantom(patient, self.site, self.seed)
        return {
            "id": study["VolumeName"],
            "patient": _phantom_name(self.site, patient),
            "report": " ".join(study[column] for column in REPORT_COLUMNS),
            "labels": [float(study[name]) for name in CT_CLIP_LABELS],
            "volume": study["volume"],
            "affine": study["affine"],
        }


__all__ = [
    "ALL",
    "PHANTOMS",
    "DataError",
    "Deferred",
    "NoSuchSplitError",
    "PhantomCohort",
    "Row",
    "Skipped",
    "Source",
    "StudyLoader",
    "joined",
    "open_source",
    "open_splits",
    "phantom_source",
    "read_study",
    "report_id",
]
