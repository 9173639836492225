"""RAD-ChestCT as it is: 3,630 scans of 3,072 patients of Duke, as `.npz`, with labels but no reports.

| fault or habit | what is done |
| --- | --- |
| `.npz` says nothing of geometry | axes run inferior, posterior, left, 0.8 mm each, as its authors write them |
| values are HU already, and the metadata hold the slope and intercept of long before | never rescaled |
| int16, clipped to -1000..1000 HU | a file that is not so is none of RAD-ChestCT's, and refused |
| labels are `abnormality*location` | by exact names: present if it is so at any location |
| rows of the tables are in another order than files, and some files are missing | joined by name |
| patients stand in the metadata of all 35,747 scans only (`MRN_DEID`) | joined by name; 376 have several scans |
| every scan has a finding, and no label says "nothing" | nothing |

Its splits train, valid and test are "train", "tune" and "valid" here; no patient is in two. Papers score all of it.
Files lie beside the tables or in a folder `npz`.

Source: Zenodo record 6406114; github.com/rachellea/ct-volume-preprocessing; the extrema tables name the axes.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from medct.byte_sources_medct import COPY_AGAIN, ZIP_MAGIC, ByteSource, base_name, of_bytes, of_path, of_zip
from medct.configuration_medct import MedCTConfig
from medct.data.folders import Folder
from medct.data.label_space import LabelSpace, LabelTable, read_labels
from medct.data.sources import DataError, Deferred, NoSuchSplitError, Source
from medct.data.table_files import columns_of, read_table
from medct.data.tables import Selection, Sieve, merge_doubles, table_source
from medct.no_scans_medct import what_is
from medct.volume_medct import MAX_VOXELS, CTVolume, VolumeError, affine_from_spacing, check_voxels

MAPPING = "radfinder-standard"
"""Published mapping of its abnormalities to CT-RATE's findings that holds unless another is named."""
LABELS = "img{split}_Abnormality_and_Location_Labels.csv"
METADATA = "CT_Scan_Metadata_Complete_35747.csv"
SPLITS = {"train": "train", "valid": "tune", "test": "valid"}
"""What each of its splits is here."""
SPACING_MM = 0.8
ORIENTATION = "IPL"
HU_RANGE = (-1000, 1000)
SUFFIX = ".npz"
_ID, _VOLUME, _PATIENT = "NoteAcc_DEID", "VolumeAcc_DEID", "MRN_DEID"
_ABSENT, _PRESENT = {"0", "0.0"}, {"1", "1.0"}
_FOLDERS = ("", "npz/")
_KEY = "ct"
_NPY_HEADER_BYTES = 10_000  # more than numpy itself takes
_REMEDY = "Pass RAD-ChestCT's own files, or write the scan as NIfTI"


# ---------------------------------------------------------------------------------------------------------------------
# One volume
# ---------------------------------------------------------------------------------------------------------------------


def read_npz(file: ByteSource) -> CTVolume:
    """One of RAD-ChestCT's volumes; nothing is unpickled, and no more is unpacked than an honest file holds.

    Args:
        file: The `.npz`.

    Returns:
        `(z, y, x)` growing towards inferior, posterior and left; int16, HU, 0.8 mm.

    Raises:
        VolumeError: If it is none of RAD-ChestCT's files, or damaged.
    """
    if file.head(4) != ZIP_MAGIC:
        what, remedy = what_is(file) or ("", _REMEDY)
        raise VolumeError(file.name, f"it is not an {SUFFIX} archive" + (f", but {what}" if what else ""), remedy)
    member = next((member for member in of_zip(file) if base_name(member.name) == f"{_KEY}.npy"), None)
    if member is None:
        raise VolumeError(file.name, f"it holds no array {_KEY!r}, so it is not one of RAD-ChestCT's files", _REMEDY)
    if member.size > 2 * MAX_VOXELS + _NPY_HEADER_BYTES:
        raise VolumeError(file.name, f"its array takes {member.size} bytes, more than any scan", _REMEDY)
    array = _array(file.name, member)
    lowest, highest = int(array.min()), int(array.max())
    if lowest < HU_RANGE[0] or highest > HU_RANGE[1]:
        raise VolumeError(
            file.name,
            f"its values lie within {lowest}..{highest}, and RAD-ChestCT's HU within {HU_RANGE[0]}..{HU_RANGE[1]}; "
            "perhaps it was rescaled twice",
            "Pass the file as it was published",
        )
    return CTVolume(array, affine_from_spacing((SPACING_MM,) * 3, ORIENTATION), file.name)


def _array(name: str, member: ByteSource) -> np.ndarray:
    """The array in a `.npy`, by its header."""
    with member.open() as stream:
        try:
            version = np.lib.format.read_magic(stream)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, is_fortran, dtype = read(stream, max_header_size=_NPY_HEADER_BYTES)
        except Exception as error:  # Python's parser raises what it likes on damaged headers
            raise VolumeError(
                name, f"the header of its array is damaged ({type(error).__name__})", "Copy the file again"
            ) from error
        if dtype.kind != "i" or dtype.itemsize != 2:
            raise VolumeError(name, f"its values are of type {dtype}, and RAD-ChestCT's are int16", _REMEDY)
        check_voxels(name, shape, dtype)
        data = bytearray(stream.read())
    if len(data) != 2 * np.prod(shape, dtype=np.int64):
        raise VolumeError(name, f"its array has {len(data)} bytes, which do not fit shape {shape}", "Copy it again")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")
    return array.astype(np.int16, copy=False)


@dataclass(frozen=True)
class NpzVolume(Deferred):
    """A volume that is read when it is opened.

    Args:
        file: Path, or a file of a repository.
    """

    file: str | Deferred

    @contextlib.contextmanager
    def open(self) -> Iterator[CTVolume]:
        """Yield the volume.

        Raises:
            VolumeError, OSError: If it cannot be fetched, or is none of RAD-ChestCT's.
        """
        if isinstance(self.file, Deferred):
            with self.file.open() as fetched:
                yield read_npz(of_bytes(fetched["bytes"], str(self.file)))
        else:
            yield read_npz(of_path(Path(self.file))[0])


# ---------------------------------------------------------------------------------------------------------------------
# Its tables
# ---------------------------------------------------------------------------------------------------------------------


def is_rad_chestct(folder: Folder) -> bool:
    """Whether a folder has one of its tables of labels."""
    return any(folder.file(LABELS.format(split=split)) for split in SPLITS)


def rad_chestct_space(config: MedCTConfig, table: LabelTable | None) -> LabelSpace:
    """How its labels become a model's: by a mapping, by the usual one, or by the names of its abnormalities.

    Args:
        config: The model's configuration.
        table: The mapping that was asked for.
    """
    if table is None:
        usual = read_labels(MAPPING)
        table = usual if set(usual.findings) & set(config.label_names) else None
    return LabelSpace.of(config, table)


def rad_chestct_source(folder: Folder, label_names: Sequence[str], selection: Selection) -> Source:
    """A split of RAD-ChestCT; see the top of this file.

    Args:
        folder: Folder with its tables.
        label_names: Abnormalities, such as "nodule", or one at a place, such as "nodule*left_lung".
        selection: Which studies.

    Raises:
        NoSuchSplitError: If the split has no table.
        DataError: If another table or an abnormality is missing, tables contradict each other, or nothing is left.
    """
    files = {split: folder.file(LABELS.format(split=split)) for split in SPLITS}
    (split,) = (theirs for theirs, ours in SPLITS.items() if ours == selection.split)
    path = files[split]
    if path is None:
        name = LABELS.format(split=split)
        raise NoSuchSplitError(f"{folder}: it has no {name}. Put it there, or choose another split.")
    patients = _patients(folder)
    counts = _count_scans(folder, {split: path for split, path in files.items() if path}, patients)
    table = merge_doubles(_labels(path, label_names, f"{folder}: {path.name}"), "id", str(folder))
    sieve = Sieve(table.assign(patient=table["id"].map(patients), report=""))
    sieve.drop(sieve.table["patient"].isna(), f"no row in {METADATA}, so nobody knows whose it is")
    sieve.table = sieve.table.assign(volume=[_place(folder, name) for name in sieve.table["id"]])
    sieve.drop(sieve.table["volume"].isna(), "no such file")
    elsewhere = {SPLITS[other]: count for other, count in counts.items() if other != split}
    return table_source(sieve, label_names, _Volumes(folder), selection, f"RAD-ChestCT ({folder})", elsewhere)


@dataclass(frozen=True)
class _Volumes:
    """Turns a path in the folder into its volume; picklable, for loader processes."""

    folder: Folder

    def __call__(self, path: str) -> NpzVolume:
        return NpzVolume(self.folder.volume(path))


def _place(folder: Folder, name: str) -> str | None:
    # A repository says yes to every path, so that its volumes lie beside the tables.
    return next(filter(None, (folder.find_volume(f"{within}{name}") for within in _FOLDERS)), None)


def _volume_name(names: pd.Series) -> pd.Series:
    """Names of volumes with their suffix, which the tables write or leave out."""
    return names.str.strip().str.removesuffix(SUFFIX) + SUFFIX


def _labels(path: Path, label_names: Sequence[str], where: str) -> pd.DataFrame:
    """`id` and the labels, 0 or 1, of each volume: present where it is so at any location."""
    header = set(columns_of(path))
    places = {name: _columns_of(name, header, where) for name in label_names}
    columns = list(dict.fromkeys(column for found in places.values() for column in found))
    table = read_table(path, [_ID, *columns], name=where)
    present, absent = table[columns].isin(_PRESENT), table[columns].isin(_ABSENT)
    if not (present | absent).all(axis=None):
        raise DataError(f"{where}: it has a label that is neither 0 nor 1. {COPY_AGAIN}.")
    labels = {name: present[found].any(axis=1).astype(float) for name, found in places.items()}
    return pd.DataFrame({"id": _volume_name(table[_ID]), **labels})


def _columns_of(name: str, header: set[str], where: str) -> list[str]:
    """The columns of an abnormality, by its exact name; `nodule` is not `nodulegr1cm`."""
    found = [name] if name in header else sorted(column for column in header if column.split("*")[0] == name)
    if not found or name == _ID:
        known = sorted({column.split("*")[0] for column in header - {_ID}})
        raise DataError(
            f"{where}: it has no abnormality {name!r}, but {', '.join(known[:4])} ... Name one of its {len(known)} in "
            "the column `data` of --mapping."
        )
    return found


def _patients(folder: Folder) -> dict[str, str]:
    """The patient of each volume."""
    path = folder.file(METADATA)
    if path is None:
        raise DataError(
            f"{folder}: it has no {METADATA}, which says which scans are of one patient. Put it beside the labels."
        )
    table = read_table(path, [_VOLUME, _PATIENT], name=f"{folder}: {METADATA}")
    table = table[(table[_VOLUME].str.strip() != "") & (table[_PATIENT].str.strip() != "")]
    table = merge_doubles(table.assign(**{_VOLUME: _volume_name(table[_VOLUME])}), _VOLUME, f"{folder}: {METADATA}")
    return dict(zip(table[_VOLUME], table[_PATIENT].str.strip(), strict=True))


def _count_scans(folder: Folder, files: dict[str, Path], patients: dict[str, str]) -> dict[str, int]:
    """Scans of each split in its table; refuses a patient in two of them."""
    seen: dict[str, set[str]] = {}
    counts = {}
    for split, path in files.items():
        volumes = _volume_name(read_table(path, [_ID], name=f"{folder}: {path.name}")[_ID])
        counts[split] = len(volumes)
        for volume in volumes:
            if patient := patients.get(volume):
                seen.setdefault(patient, set()).add(split)
    shared = sum(len(splits) > 1 for splits in seen.values())
    if shared:
        raise DataError(
            f"{folder}: {shared} patients are in several splits, so scores would be too optimistic. Take the tables as "
            "they were published."
        )
    return counts


__all__ = ["LABELS", "MAPPING", "METADATA", "is_rad_chestct", "rad_chestct_source", "rad_chestct_space", "read_npz"]
