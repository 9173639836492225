"""Prepared shards: Parquet files of preprocessed scans, and how they are streamed back.

A folder of prepared shards, on disk or in a Hub dataset repository:

    data/train-00000-of-00003.parquet     8-16 studies each, one study per row group
    manifest.json                         settings, counts, SHA-256 of files, where volumes lie, what was skipped
    README.md                             dataset card, by which `load_dataset(folder)` finds the splits

A study's volume is an uncompressed `.nii` in a `datasets.Nifti()` column: int16 HU on the model's grid with an affine.
`load_dataset` gives a nibabel image without any code from this project.

What is unusual:
    * Rows are found through the manifest, without first reading the footer of every file, and each is a shard of the
      stream: a full permutation without a buffer, exact resumption, and an even division among processes.
    * The volume of a row is read when it is first needed, so that looking at ids, labels and reports costs little, and
      a damaged row, in whichever column, is one bad sample instead of the end of the stream.
    * Arrow verifies the checksums of pages only on request; otherwise flipped bits read as wrong voxels.
    * Volumes are decompressed straight to where they are used; see `parquet_pages.py`.
"""

import bisect
import hashlib
import itertools
import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import nibabel
import numpy as np
import pyarrow as pa
import torch
from datasets import Features, List, Nifti, Value
from pyarrow import parquet

import medct
from medct.byte_sources_medct import is_address
from medct.common.files import version_of_other_numbers
from medct.common.retry import keep_trying
from medct.configuration_medct import MedCTConfig
from medct.data.folders import HUB_ADDRESS
from medct.data.parquet_pages import Chunk, read_value
from medct.data.sources import MAPPING_FLAGS, DataError, Merged, NoSuchSplitError, Row, Skipped, Source, first_of
from medct.data.tables import Selection
from medct.errors_medct import first_line
from medct.volume_medct import VolumeError
from medct.workers_medct import Place

FORMAT = 2
"""Raise it when shards are written differently, or preprocessing gives other voxels."""
MANIFEST = "manifest.json"
FEATURES = Features(
    {
        "id": Value("string"),
        "patient": Value("string"),
        "report": Value("string"),
        "labels": List(Value("float32")),  # in the order of the manifest's label names; NaN where unknown
        "sha256": Value("string"),  # of the voxels, as stored in the file
        "volume": Nifti(),
    }
)
_ROW = pa.schema([FEATURES.arrow_schema.field(name) for name in ("id", "patient", "report", "labels", "sha256")])
"""All but the volume; the last for its checksum, so that no part of a row is read damaged."""
VOLUME = "volume.bytes"
_NIFTI_HEADER_BYTES = 352
_INT16 = 4  # NIfTI's code
_WAITS_S = (1, 2)
"""Waits before a fetch is retried; the file system itself retries some requests, but not all."""


def grid_settings(config: MedCTConfig) -> dict[str, Any]:
    """The part of a model's configuration that decides the content of prepared shards."""
    vision = config.vision_config
    return {
        "image_size": list(vision.image_size),
        "target_spacing_mm": [float(step) for step in vision.target_spacing_mm],
        "orientation": vision.orientation,
        "hu_min": float(vision.hu_min),
        "hu_max": float(vision.hu_max),
        "label_names": config.label_names,
    }


def shard_name(split: str, index: int, count: int) -> str:
    """The name of a shard without suffix, in the form by which `load_dataset` finds splits.

    Args:
        split: Name of the split.
        index: Index of the shard within the split, from 0.
        count: Number of shards in the split.
    """
    return f"{split}-{index:05d}-of-{count:05d}"


# ---------------------------------------------------------------------------------------------------------------------
# One volume
# ---------------------------------------------------------------------------------------------------------------------


def nifti_header(shape: tuple[int, int, int], affine: np.ndarray) -> bytes:
    """The bytes that precede the voxels of an int16 volume in a `.nii`.

    Args:
        shape: `(z, y, x)`; x runs fastest in memory, so the file's axes are (x, y, z).
        affine: `(4, 4)`, file voxel `(x, y, z)` to patient millimetres, RAS+.
    """
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape(shape[::-1])
    header.set_sform(affine, code="scanner")
    header.set_qform(affine, code="scanner")
    header.set_xyzt_units("mm")
    header.set_slope_inter(1, 0)
    header["vox_offset"] = _NIFTI_HEADER_BYTES
    return header.as_byteswapped("<").binaryblock + bytes(4)  # no extensions follow


def _num_bytes(shape: tuple[int, int, int]) -> int:
    """Length of the whole file of an int16 volume."""
    return _NIFTI_HEADER_BYTES + 2 * math.prod(shape)


def decode_nifti(data: torch.Tensor, shape: tuple[int, int, int], name: str) -> torch.Tensor:
    """The voxels of an uncompressed int16 `.nii` as a view of its bytes.

    Args:
        data: The whole file, uint8.
        shape: Expected shape, `(z, y, x)`.
        name: What to call the volume in messages.

    Returns:
        `shape`, int16; shares the memory of `data`.

    Raises:
        VolumeError: If it is not such a file, or has another shape or a scale.
    """
    remedy = "Prepare the source again"
    head = bytes(data[:_NIFTI_HEADER_BYTES].numpy())
    if len(head) < _NIFTI_HEADER_BYTES or struct.unpack_from("<i", head)[0] != 348 or head[344:348] != b"n+1\0":
        raise VolumeError(name, "its volume is not a little-endian single-file NIfTI-1", remedy)
    dimensions = struct.unpack_from("<8h", head, 40)
    datatype, bits = struct.unpack_from("<2h", head, 70)
    offset, slope, intercept = struct.unpack_from("<3f", head, 108)
    if dimensions[:4] != (3, *shape[::-1]):
        raise VolumeError(name, f"its volume has the axes {dimensions[1:4]}, not {shape[::-1]} (x, y, z)", remedy)
    if (datatype, bits) != (_INT16, 16) or slope not in (0, 1) or intercept != 0:
        raise VolumeError(name, "its volume is not int16 in HU", remedy)
    if offset != _NIFTI_HEADER_BYTES or len(data) != _num_bytes(shape):
        raise VolumeError(name, f"its volume has {len(data)} bytes, which do not fit its header", remedy)
    return data[_NIFTI_HEADER_BYTES:].view(torch.int16).view(shape)


def _persist(address: str, fetch: Callable[[], Any]) -> Any:
    """Fetch, and retry after a network fault, or bytes that arrived damaged; local files would give the same again."""

    def passes(error: Exception) -> float | None:
        # Each file system raises its own errors for what passes.
        return None if isinstance(error, VolumeError | FileNotFoundError) else 0

    return keep_trying(fetch, passes, _WAITS_S if is_address(address) else ())


@dataclass
class PreparedVolume:
    """A row of a shard, whose volume is read when it is loaded.

    Args:
        path: Parquet file; an fsspec address if remote.
        row: Index of the row in the file, where each row is a row group.
        shape: Expected shape of the volume, `(z, y, x)`.
        options: Options for the file system, such as a token.
        chunk: Where the volume lies in the file; `None` if only Arrow knows.
    """

    path: str
    row: int
    shape: tuple[int, int, int]
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    chunk: Chunk | None = None
    refusal: VolumeError | None = None
    """Why the rest of the row cannot be read, in which case neither is the volume."""
    _metadata: parquet.FileMetaData | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        return f"{self.path}, row {self.row}"

    def read(self, columns: list[str], convert: Callable[[pa.Table], Any]) -> Any:
        """Read columns of the row, verified by their checksums.

        Args:
            columns: Names of the columns.
            convert: Turns the table, which has one row, into the result.

        Returns:
            What `convert` returned.

        Raises:
            VolumeError: If the file is damaged, or cannot be fetched.
        """
        return self._tried(lambda: convert(self._read(columns)))

    def _tried(self, fetch: Callable[[], Any]) -> Any:
        try:
            return _persist(self.path, fetch)
        except VolumeError:
            raise
        except Exception as error:  # Arrow's, Python's for damaged text, and those of each file system
            raise VolumeError(
                self.name, f"it cannot be read ({first_line(error)})", "Copy or prepare the shard again"
            ) from error

    def _read(self, columns: list[str]) -> pa.Table:
        with self._open() as file:
            shard = parquet.ParquetFile(file, metadata=self._metadata, page_checksum_verification=True)
            self._metadata = shard.metadata  # the footer is read once
            return shard.read_row_group(self.row, columns, use_threads=False)

    def _open(self) -> Any:
        if is_address(self.path):
            # Arrow asks for whole columns; reading ahead would fetch bytes that are never used.
            return fsspec.open(self.path, "rb", cache_type="none", **self.options).open()
        return pa.OSFile(self.path)

    def load(self, place: Place) -> torch.Tensor:
        """Read the volume.

        Args:
            place: Where the result is to lie.

        Returns:
            `(z, y, x)`, int16, HU.

        Raises:
            VolumeError: If the volume or anything else of the row is damaged or not what it should be.
        """
        if self.refusal is not None:
            raise self.refusal
        return self._tried(lambda: self._load(place))

    def _load(self, place: Place) -> torch.Tensor:
        data = None
        if self.chunk is not None:
            with self._open() as file:
                data = read_value(file, self.chunk, _num_bytes(self.shape), place)
        if data is None:
            (value,) = self._read([VOLUME]).flatten().column(VOLUME)
            array = np.frombuffer(value.as_buffer(), np.uint8)
            data = place.empty(array.shape, torch.uint8)
            data.numpy()[:] = array
        return decode_nifti(data, self.shape, self.name)


# ---------------------------------------------------------------------------------------------------------------------
# A whole split
# ---------------------------------------------------------------------------------------------------------------------


def read_manifest(address: str, options: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Read the manifest of a folder or repository of prepared shards.

    Args:
        address: Folder, or an fsspec address.
        options: Options for the file system, such as a token.

    Returns:
        The manifest; `None` if there is none.

    Raises:
        DataError: If it is damaged, or of another version.
    """

    def fetch() -> Any:
        with fsspec.open(f"{str(address).rstrip('/')}/{MANIFEST}", "rb", **(options or {})) as file:
            return json.loads(file.read())

    try:
        manifest = _persist(str(address), fetch)
    except FileNotFoundError:
        return None
    except Exception as error:  # each file system raises its own
        remedy = "Check the network, or pass a local copy" if is_address(str(address)) else "Copy the folder again"
        raise DataError(f"{address}: {MANIFEST} cannot be read ({type(error).__name__}). {remedy}.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{address}: these shards are of another version. Prepare the source again.")
    return manifest


def check_tune_share(address: str, manifest: dict[str, Any], tune_share: float | None) -> None:
    """Refuse a division of the patients that differs from the one used to prepare the shards.

    Args:
        address: Where the shards lie, for messages.
        manifest: From `read_manifest`.
        tune_share: Share asked for, in [0, 1); `None` accepts any.

    Raises:
        DataError: If they differ; it names both shares.
    """
    found = manifest["settings"].get("tune_share")
    if None not in (found, tune_share) and found != tune_share:
        raise DataError(
            f"{address}: prepared with `tune_share` {found}, not {tune_share}. Leave it out, or prepare the source "
            "again with the one you want."
        )


def check_grid(address: str, manifest: dict[str, Any], config: MedCTConfig, own_labels: bool = False) -> None:
    """Refuse shards that were prepared for another model's input.

    Args:
        address: Where the shards lie, for messages.
        manifest: From `read_manifest`.
        config: The model's configuration.
        own_labels: Whether they may have other labels.

    Raises:
        DataError: If they were; it names the first setting that differs.
    """
    for name, wanted in grid_settings(config).items():
        found = manifest["settings"][name]
        if found == wanted or (own_labels and name == "label_names"):
            continue
        remedy = "pass the model that it was prepared for"
        if name == "label_names":
            missing = sorted(set(wanted) - set(found)) or ["the same in another order"]
            remedy = f"say with {MAPPING_FLAGS} which of its labels mean the model's"
            found, wanted = f"{len(found)} labels", f"{len(wanted)} ({', '.join(missing[:3])})"
        raise DataError(
            f"{address}: prepared for `{name}` {found}, but the model has {wanted}. Prepare the source for this model, "
            f"or {remedy}."
        )


@dataclass(frozen=True)
class _ReadRow:
    """Reads a row by its index among all files of a split; picklable, for loader processes.

    Args:
        paths: The files.
        starts: For each file, the number of rows in the files before it.
        shape: Shape of the volumes, `(z, y, x)`.
        num_labels: Labels per study.
        options: Options for the file system.
        about: Subgroups of each row.
        chunks: Where the volume of each row lies, where it was noted.
    """

    paths: tuple[str, ...]
    starts: tuple[int, ...]
    shape: tuple[int, int, int]
    num_labels: int
    options: dict[str, Any]
    about: tuple[dict[str, str], ...]
    chunks: tuple[Chunk | None, ...]

    def __call__(self, number: int) -> Row:
        file = bisect.bisect_right(self.starts, number) - 1
        row_group, chunk = number - self.starts[file], self.chunks[number]
        volume = PreparedVolume(self.paths[file], row_group, self.shape, self.options, chunk)
        try:
            row = volume.read(_ROW.names, self._to_dict)
        except VolumeError as error:  # raised when the volume is loaded, where it affects this study alone
            volume.refusal = error
            row = {"id": volume.name, "patient": "", "report": "", "labels": [math.nan] * self.num_labels}
        return {**row, "volume": volume, "about": self.about[number]}

    def _to_dict(self, table: pa.Table) -> dict[str, Any]:
        if not table.schema.equals(_ROW, check_metadata=False):  # what describes columns has no checksum
            raise ValueError("other columns")
        (row,) = table.to_pylist()
        del row["sha256"]
        if len(row["labels"]) != self.num_labels:
            raise ValueError(f"{len(row['labels'])} labels")
        return row


def prepared_source(
    address: str,
    selection: Selection,
    config: MedCTConfig,
    *,
    tune_share: float | None = None,
    token: str | None = None,
    own_labels: bool = False,
) -> Source:
    """A split of prepared shards.

    Args:
        address: Folder, or address such as `hf://datasets/ORG/NAME`, with a `manifest.json`.
        selection: Which studies, but for its `tune_share`: their division was made when they were prepared.
        config: The model's configuration; shards prepared for another grid, window or other labels are refused.
        tune_share: Refused if it differs from the one used to prepare the shards; `None` accepts any.
        token: Token for the Hub.
        own_labels: Give the labels that the shards have, whatever the model's are.

    Raises:
        DataError: If there are no such shards, they are not for this model, or a file is missing.
    """
    address = str(address).rstrip("/")
    options = {"token": token} if address.startswith(HUB_ADDRESS) and token is not None else {}
    manifest = read_manifest(address, options)
    if manifest is None:
        raise DataError(f"{address}: no {MANIFEST}, so the shards are unfinished. Run `medct prepare` until it exists.")
    check_grid(address, manifest, config, own_labels)
    label_names = tuple(manifest["settings"]["label_names"])
    check_tune_share(address, manifest, tune_share)
    split = selection.split
    if split not in manifest["splits"]:
        raise NoSuchSplitError(
            f"{address}: it has the splits {', '.join(manifest['splits'])}, not {split}. Prepare that one as well."
        )
    found = manifest["splits"][split]
    paths = tuple(f"{address}/{file['path']}" for file in found["files"])
    if not is_address(address):
        _check_files(paths, found["files"])
    groups = _groups(found["files"], selection.reconstructions, selection.need_reports)
    scans = [scan for file in found["files"] for scan in file["scans"]]
    groups = [groups[index] for index in first_of([scans[rows[0]] for rows in groups], selection.limit)]
    starts = itertools.accumulate((len(file["scans"]) for file in found["files"]), initial=0)
    about = tuple(_each_row(found["files"], "about", {}))
    chunks = tuple(chunk and Chunk(*chunk) for chunk in _each_row(found["files"], "chunks", None))
    shape = tuple(manifest["settings"]["image_size"])
    read = _ReadRow(paths, tuple(starts)[:-1], shape, len(label_names), options, about, chunks)
    merged = manifest["settings"].get("merged", ())
    caveat = _made_otherwise(manifest)
    return Source(
        groups,
        read,
        label_names,
        f"{len(groups)} prepared studies of {found['description']}{caveat}",
        skipped=tuple(Skipped(**study) for study in found["skipped"]),
        names=[scans[rows[0]] for rows in groups],
        is_synthetic=found["synthetic"],
        elsewhere={name: each["num_studies"] for name, each in manifest["splits"].items() if name != split},
        merged=tuple(Merged(tuple(each["findings"]), each["rule"]) for each in merged),
        mapping=manifest["settings"].get("mapping"),
        checksum=hashlib.sha256(" ".join(file["sha256"] for file in found["files"]).encode()).hexdigest(),
        caveat=caveat,
    )


def _made_otherwise(manifest: dict[str, Any]) -> str:
    """Part of the description, so that it stands on all that comes of the shards."""
    by = version_of_other_numbers(manifest["settings"])
    return f" (prepared with {by}, which may read scans otherwise than {medct.__version__})" if by else ""


def _each_row(files: list[dict[str, Any]], name: str, otherwise: Any) -> Iterator[Any]:
    """What the manifest notes of each row, where it does."""
    for file in files:
        yield from file.get(name) or [otherwise] * len(file["scans"])


def _groups(files: list[dict[str, Any]], reconstructions: str, need_reports: bool) -> list[tuple[int, ...]]:
    """Indices of the rows that form each study of an epoch; an epoch takes one row per study."""
    rows = [
        (scan, row not in without)
        for file in files
        for without in [set(file["without_report"])]
        for row, scan in enumerate(file["scans"])
    ]
    kept = [number for number, (_, has_report) in enumerate(rows) if has_report or not need_reports]
    if reconstructions == "all":
        return [(number,) for number in kept]
    return [tuple(numbers) for _, numbers in itertools.groupby(kept, key=lambda number: rows[number][0])]


def with_revision(address: str, revision: str | None) -> str:
    """`hf://datasets/ORG/NAME/...` at a commit.

    Args:
        address: Of a source; any other than on the Hub stays as it is.
        revision: Branch, tag or commit.
    """
    if revision is None or not address.startswith(HUB_ADDRESS):
        return address
    organisation, name, *rest = address.removeprefix(HUB_ADDRESS).split("/")
    return HUB_ADDRESS + "/".join([organisation, f"{name}@{revision}", *rest])


def _check_files(paths: Sequence[str], files: list[dict[str, Any]]) -> None:
    for path, file in zip(paths, files, strict=True):
        size = Path(path).stat().st_size if Path(path).is_file() else None
        if size != file["num_bytes"]:
            what = "is missing" if size is None else f"has {size} bytes instead of {file['num_bytes']}"
            raise DataError(f"{path}: {what}. Copy the folder again, or run `medct prepare` again.")


__all__ = ["PreparedVolume", "prepared_source", "read_manifest"]
