"""Turn any source of studies into prepared shards: preprocessed once, streamed many times faster afterwards.

    medct prepare SOURCE OUTPUT --model ct-clip
    medct prepare SOURCE OUTPUT --model ct-clip --push_to_hub ORG/NAME       # to a private Hub dataset
    torchrun --nproc_per_node 16 -m medct.cli prepare SOURCE OUTPUT ...      # any number of processes and machines

The output is a folder of Parquet files that `load_dataset` reads without this project, and that training streams
(see `prepared.py`). A file appears only once it is complete, so to resume a run that was stopped, start it
again. Which study goes into which file depends on the source alone, never on the number of processes.
`manifest.json` is written once the last file is there, by whichever process notices.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from huggingface_hub import DatasetCard, DatasetCardData
from pyarrow import parquet

from medct.common.files import (
    file_sha256,
    refuse_other_settings,
    remove_leftovers,
    whole_file,
    with_version,
    write_json,
    write_text,
)
from medct.common.lock import LockedError, only_run
from medct.common.paths import local_paths, without_paths
from medct.common.progress import tqdm
from medct.configuration_medct import MedCTConfig
from medct.data.parquet_pages import chunks_of
from medct.data.prepared import (
    FEATURES,
    FORMAT,
    MANIFEST,
    VOLUME,
    PreparedVolume,
    grid_settings,
    nifti_header,
    shard_name,
)
from medct.data.sources import DataError, Source, read_study, too_many_bad
from medct.errors_medct import said_of
from medct.image_processing_medct import MedCTImageProcessor
from medct.volume_medct import VolumeError

SCHEMA = FEATURES.arrow_schema
COMPRESSION_LEVELS = {"zstd": 3, "lz4": None}
"""How files may be compressed, and how hard."""
DEFAULTS = {"compression": "zstd"}
"""Settings that need not be given."""
SETTINGS = "records/settings.json"
"""In a folder of shards: what it was begun with, first of all its files."""
LICENCE_NOTE = (
    "The licence of the source applies to these shards. Volumes and reports derived from CT-RATE are CC-BY-NC-SA 4.0 "
    "and may not be redistributed: keep them private."
)
_CARD = """---
{{ card_data }}
---

# Prepared chest CT

{{ description }}

{{ licence_note }}

Each row is one study: `volume` (NIfTI, int16 HU, {{ settings.image_size }} voxels (z, y, x) of about
{{ settings.target_spacing_mm }} mm, clipped to {{ settings.hu_min }}..{{ settings.hu_max }} HU, z, y, x growing towards
{{ settings.orientation }}), `report`, `labels` (in the order of `label_names` in `manifest.json`; NaN: unknown), `id`,
`patient` and the `sha256` of the voxels.

```python
from datasets import load_dataset

studies = load_dataset("ORG/NAME or folder", split="{{ split }}", streaming=True)
image = next(iter(studies))["volume"]  # a nibabel image
```

| split | studies | skipped | files |
| --- | ---: | ---: | ---: |
{{ table }}
"""


# ---------------------------------------------------------------------------------------------------------------------
# One study
# ---------------------------------------------------------------------------------------------------------------------


class Preparer:
    """Turns rows of a source into rows of a shard. Holds the memory that all studies share.

    Args:
        config: Configuration of the model that the shards are for.

    Raises:
        DataError: If int16 cannot hold the model's window.
    """

    def __init__(self, config: MedCTConfig):
        vision = config.vision_config
        if not -(2**15) <= vision.hu_min < vision.hu_max < 2**15:
            raise DataError(f"The window {vision.hu_min}..{vision.hu_max} HU does not fit int16, which shards hold.")
        self.processor = MedCTImageProcessor.from_config(vision)
        self.processor.hu_per_unit = 1  # `process_volume` then gives HU
        self._hu = torch.empty(*vision.image_size)

    def __call__(self, row: dict[str, Any]) -> tuple[pa.Table, tuple[str, ...]]:
        """One study as a table of one row, and the notes from reading it.

        Raises:
            VolumeError: If its volume cannot be used.
        """
        if isinstance(row["volume"], PreparedVolume):
            raise DataError("The source is already prepared. Pass the one that it was made from.")
        volume = read_study(row, self.processor.orientation)
        self.processor.process_volume(volume, out=self._hu)
        geometry = self.processor.geometry(volume)
        notes = volume.notes
        del volume  # frees a scan, or twice that, before the next copy is made
        # Positions there are (z, y, x); the file counts (x, y, z).
        affine = (geometry.affine @ geometry.voxel_of_position)[:, [2, 1, 0, 3]]
        header = nifti_header(tuple(self._hu.shape), affine)
        data = np.empty(len(header) + 2 * self._hu.numel(), np.uint8)
        data[: len(header)] = np.frombuffer(header, np.uint8)
        voxels = data[len(header) :].view("<i2")
        np.copyto(voxels, self._hu.round_().numpy().reshape(-1), casting="unsafe")
        columns = {name: row[name] for name in ("id", "patient", "report", "labels")}
        arrays = [pa.array([value], SCHEMA.field(name).type) for name, value in columns.items()]
        digest = hashlib.sha256(voxels.data).hexdigest()
        return pa.Table.from_arrays([*arrays, pa.array([digest]), _volume_column(data)], schema=SCHEMA), notes


def _volume_column(data: np.ndarray) -> pa.Array:
    """One `Nifti()` value that holds these bytes without a copy; `pa.array` would copy them twice."""
    offsets = pa.py_buffer(np.array([0, len(data)], np.int32))
    content = pa.Array.from_buffers(pa.binary(), 1, [None, offsets, pa.py_buffer(data)])
    return pa.StructArray.from_arrays([content, pa.nulls(1, pa.string())], fields=list(SCHEMA.field("volume").type))


# ---------------------------------------------------------------------------------------------------------------------
# One shard
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """A file to be written: neighbouring studies of a split.

    Args:
        folder: Folder of all shards.
        name: File name without suffix.
        split: Split that it belongs to.
        source: Source of the studies.
        keys: For each study, the name of its scan and its key in the source.
        compression: A key of `COMPRESSION_LEVELS`.
    """

    folder: Path
    name: str
    split: str
    source: Source
    keys: Sequence[tuple[str, int]]
    compression: str

    @property
    def path(self) -> Path:
        return self.folder / "data" / f"{self.name}.parquet"

    @property
    def record_path(self) -> Path:
        """Counts, skipped studies and remarks: JSON, written after the file."""
        return self.folder / "records" / f"{self.name}.json"

    def record(self) -> dict[str, Any] | None:
        """The record, or `None` if the shard is still to be written."""
        if not self.record_path.is_file() or not self.path.is_file():
            return None
        record = json.loads(self.record_path.read_text(encoding="utf-8"))
        return record if self.path.stat().st_size == record["file"]["num_bytes"] else None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other runs from the shard, and clear away what one that was killed has left of it.

        Raises:
            LockedError: If another run is making it.
        """
        with only_run(self.path, each_process=True):
            remove_leftovers(self.record_path)
            yield

    def write(self, prepare: Preparer, bar: tqdm) -> list[dict[str, str]]:
        """Write the file and its record.

        Args:
            prepare: Turns rows into those of the file.
            bar: Advanced by one per study.

        Returns:
            `id` and `reason` of each skipped study.
        """
        skipped: list[dict[str, str]] = []
        remarks: list[dict[str, str]] = []
        scans: list[str] = []
        without_report: list[int] = []
        about: list[dict[str, str]] = []
        with whole_file(self.path) as aside, _parquet_writer(aside, self.compression) as writer:
            for scan, key in self.keys:
                row = self.source.read(key)
                try:
                    table, notes = prepare(row)
                except DataError:
                    raise
                except Exception as error:  # libraries and file systems each raise their own
                    # Not where it lies, which tells of this machine.
                    reason = error.reason if isinstance(error, VolumeError) else ""
                    skipped.append({"id": row["id"], "reason": reason or said_of(error)})
                else:
                    # A row group each, so that a study can be read without its neighbours.
                    writer.write_table(table, row_group_size=1)
                    if not row["report"]:
                        without_report.append(len(scans))
                    scans.append(scan)
                    about.append(row.get("about") or {})
                    remarks += [{"id": row["id"], "remark": note} for note in notes]
                bar.update()
        file = {"path": f"data/{self.path.name}", "num_bytes": self.path.stat().st_size}
        file |= {"sha256": file_sha256(self.path), "chunks": chunks_of(self.path, VOLUME)}
        # The reconstructions of one scan share its name; `without_report` holds row indices, from 0; `about` subgroups.
        file |= {"num_studies": len(scans), "scans": scans, "without_report": without_report}
        file |= {"about": about} if any(about) else {}
        write_json(self.record_path, {"file": file, "skipped": skipped, "remarks": remarks})
        return skipped


def _parquet_writer(path: Path, compression: str) -> parquet.ParquetWriter:
    return parquet.ParquetWriter(
        path,
        SCHEMA,
        compression=compression,
        compression_level=COMPRESSION_LEVELS[compression],
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The whole folder
# ---------------------------------------------------------------------------------------------------------------------


def shards_of(folder: Path, split: str, source: Source, settings: dict[str, Any]) -> list[Shard]:
    """All files to be written for a split, in order.

    Args:
        folder: Folder of all shards.
        split: Name of the split.
        source: Its studies.
        settings: See `prepare`.
    """
    last = 1 if settings["reconstructions"] == "one" else None
    keys = [(name, key) for name, group in zip(source.names, source.groups, strict=True) for key in group[:last]]
    size = settings["studies_per_shard"]
    count = math.ceil(len(keys) / size)
    parts = [keys[index * size : (index + 1) * size] for index in range(count)]
    return [
        Shard(folder, shard_name(split, index, count), split, source, part, settings["compression"])
        for index, part in enumerate(parts)
    ]


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Record the settings in the folder, or compare them with those that its files were made with.

    Args:
        folder: Output, which all processes share.
        settings: Everything that decides the content of the files.

    Raises:
        OtherSettingsError, DataError: If they differ, or the folder holds something else or lies in the source.
    """
    path = folder / SETTINGS
    source = settings.get("source")
    if source is not None and Path(source).is_dir() and folder.resolve().is_relative_to(Path(source).resolve()):
        raise DataError(f"{folder}: it lies in {source}, which is read. Choose a folder outside of it.")
    if not path.is_file():
        _refuse_taken(folder)
        # Before anything else: it says to the other processes whose folder this is.
        write_json(path, settings)
    (folder / "data").mkdir(exist_ok=True)
    refuse_other_settings(folder, json.loads(path.read_text(encoding="utf-8")), settings, "folder")


def _refuse_taken(folder: Path) -> None:
    """Refuse a folder where shards would lie among files of others."""
    own = [folder / "data", folder / "records"]
    places = [folder, *own]
    found = [path for place in places if place.exists() for path in sorted(place.iterdir()) if path not in own]
    # Hidden files are the system's, or what a process that was killed has left.
    others = [path.name for path in found if not path.name.startswith(".")]
    # Another process may have begun the folder meanwhile.
    if others and not (folder / SETTINGS).is_file():
        raise DataError(f"{folder}: it holds something else, such as {others[0]}. Choose another folder.")


def finish(
    folder: Path, shards: dict[str, list[Shard]], sources: dict[str, Source], settings: dict[str, Any]
) -> dict | None:
    """Write the manifest and the card if all files are there.

    Args:
        folder: Output, which all processes share.
        shards: All files of each split.
        sources: Source of each split.
        settings: Everything that decides the content of the files.

    Returns:
        The manifest, the same whichever process writes it; `None` while files are missing.
    """
    splits = {}
    known = local_paths(settings)
    for split, source in sources.items():
        records = [shard.record() for shard in shards[split]]
        if None in records:
            return None
        left_out = [{"id": study.id, "reason": study.reason} for study in source.skipped]
        splits[split] = {
            "description": without_paths(source.description, known),
            "synthetic": source.is_synthetic,
            "num_studies": sum(record["file"]["num_studies"] for record in records),
            "files": [record["file"] for record in records],
            "skipped": left_out + [study for record in records for study in record["skipped"]],
            "remarks": [study for record in records for study in record["remarks"]],
        }
    # The manifest may be handed out with the shards; `claim` has the settings in full.
    settings = {
        name: without_paths(value, known) if isinstance(value, str) else value for name, value in settings.items()
    }
    manifest = {"format": FORMAT, "licence_note": LICENCE_NOTE, "settings": settings, "splits": splits}
    # Several processes may find at once that all is there, and one writes.
    with contextlib.suppress(LockedError), only_run(folder / MANIFEST, each_process=True):
        _tidy_up(folder, [shard for of_split in shards.values() for shard in of_split])
        write_text(folder / "README.md", card(manifest))
        write_json(folder / MANIFEST, manifest)
    return manifest


def _tidy_up(folder: Path, shards: list[Shard]) -> None:
    """Remove what processes that were killed have left, but of shards that are being made again."""
    for path in (folder / "README.md", folder / SETTINGS):
        remove_leftovers(path)
    named = {left.name.split(".partial-")[0] for left in (folder / "data").glob(".*.partial-*")}
    named |= {left.name.split(".partial-")[0] for left in (folder / "records").glob(".*.partial-*")}
    for shard in shards:
        if not named.isdisjoint((f".{shard.path.name}", f".{shard.record_path.name}")):
            with contextlib.suppress(LockedError), shard.alone():
                pass


def card(manifest: dict[str, Any]) -> str:
    """The card of a Hub dataset, whose front matter tells `load_dataset` which files belong to which split."""
    splits = {split: found for split, found in manifest["splits"].items() if found["num_studies"]}
    data_files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    data = DatasetCardData(
        configs=[{"config_name": "default", "data_files": data_files}], tags=["medical", "ct"], viewer=False
    )
    rows = [
        f"| {split} | {found['num_studies']} | {len(found['skipped'])} | {len(found['files'])} |"
        for split, found in manifest["splits"].items()
    ]
    rendered = DatasetCard.from_template(
        data,
        template_str=_CARD,
        description=" ".join(f"{split}: {found['description']}." for split, found in manifest["splits"].items()),
        licence_note=manifest["licence_note"],
        settings=manifest["settings"],
        split=next(iter(splits), "train"),
        table="\n".join(rows),
    )
    return str(rendered)


def prepare(
    sources: dict[str, Source],
    config: MedCTConfig,
    folder: Path,
    settings: dict[str, Any],
    rank: int = 0,
    world_size: int = 1,
    retry_skipped: bool = False,
    max_skipped_share: float = 0.05,
) -> dict[str, Any] | None:
    """Write this process's share of the files that are not there yet.

    Args:
        sources: Source of each split.
        config: Configuration of the model that the shards are for.
        folder: Output, which all processes share.
        settings: What decides the content of the files: `reconstructions`, `studies_per_shard`, `compression` (by
            default "zstd"), and anything else that should be in the manifest and be the same when a run is resumed.
        rank: Index of this process, from 0.
        world_size: Number of processes.
        retry_skipped: Rewrite files in which studies were skipped.
        max_skipped_share: Stop if a greater share of this process's studies cannot be read; see `too_many_bad`.

    Returns:
        The manifest if all files of all processes are there, else `None`.

    Raises:
        OtherSettingsError, DataError: If the folder was started with other settings, holds something else or lies in
            the source, or too many studies cannot be read.
    """
    preparer = Preparer(config)
    settings = {**DEFAULTS, **settings}
    shards = {split: shards_of(folder, split, source, settings) for split, source in sources.items()}
    num_studies = {split: sum(len(shard.keys) for shard in shards[split]) for split in sources}
    settings = {**grid_settings(config), **label_settings(sources), **settings, "num_studies": num_studies}
    settings = with_version(settings)
    claim(folder, settings)
    mine = [shard for of_split in shards.values() for shard in of_split][rank::world_size]
    mine = [shard for shard in mine if _is_wanted(shard, retry_skipped)]
    with tqdm(
        total=sum(len(shard.keys) for shard in mine), desc=f"prepare ({rank + 1} of {world_size})", unit="study"
    ) as bar:
        num_skipped = num_seen = 0  # not by the bar, which counts nothing where none is shown
        for shard in mine:
            with shard.alone():
                skipped = shard.write(preparer, bar)
            num_skipped += len(skipped)
            num_seen += len(shard.keys)
            bar.set_postfix(skipped=num_skipped, refresh=False)
            if too_many_bad(num_skipped, num_seen, max_skipped_share):
                raise DataError(
                    f"{num_skipped} of {num_seen} studies could not be read, more than the allowed share of "
                    f"{max_skipped_share:g}; the last: {skipped[-1]['id']}: {skipped[-1]['reason']}. Fix the source "
                    "and resume with --retry_skipped, or allow more."
                )
    return finish(folder, shards, sources, settings)


def label_settings(sources: dict[str, Source]) -> dict[str, Any]:
    """How the labels of a source came about, if the data call them otherwise; the same for all its splits.

    Args:
        sources: Source of each split.
    """
    source = next(iter(sources.values()))
    if source.mapping is None:
        return {}
    merged = [{"findings": list(each.findings), "rule": each.rule} for each in source.merged]
    return {"mapping": source.mapping, "merged": merged}


def _is_wanted(shard: Shard, retry_skipped: bool) -> bool:
    record = shard.record()
    return record is None or (retry_skipped and bool(record["skipped"]))
