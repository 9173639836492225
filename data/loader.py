"""From the studies of a source to batches of the model's inputs, on its device.

Unusual: workers read single studies, and batches are made in the main process, so that they stay full although bad
studies are skipped. Studies come in the order of `Source.keys` whatever the number of workers; so a position is all the
state there is.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from medct.common.files import append_line
from medct.data.prepared import PreparedVolume
from medct.data.sources import DataError, Row, Skipped, Source, read_study, too_many_bad
from medct.errors_medct import said_of
from medct.image_processing_medct import MedCTImageProcessor
from medct.processing_medct import MedCTProcessor
from medct.resampling_medct import ScanPart
from medct.volume_medct import VolumeError
from medct.workers_medct import Lost, Place, load_ahead, overlapped

Batch = dict[str, Any]


def report_id(report: str) -> int:
    """A number that is the same for equal reports; 0 if there is no report."""
    if not report:
        return 0
    return int.from_bytes(hashlib.blake2b(report.encode(), digest_size=8).digest(), "big", signed=True)


@dataclass(frozen=True)
class LoadRow:
    """Turns keys into studies; picklable, for loader processes.

    Args:
        read: Makes the row of a key; see `Source.read`.
        image_processor: The model's.
        device: Where the model is.
    """

    read: Callable[[int], Row]
    image_processor: MedCTImageProcessor
    device: torch.device | str = "cpu"

    def __call__(self, key: int, place: Place) -> Row | Skipped:
        """The row with `part`, for `MedCTImageProcessor.finish`, instead of `volume`, or why it has none."""
        row = self.read(key)
        place.begin(row["id"])
        return self.load_row(row, place)

    def load_row(self, row: Row, place: Place) -> Row | Skipped:
        """As a call, of a row.

        Args:
            row: From `read`.
            place: Where to load it.
        """
        try:
            part = self._prepared(row, place) if isinstance(row["volume"], PreparedVolume) else self._read(row, place)
        except Exception as error:  # libraries and file systems each raise their own; none may end days of training
            return Skipped(row["id"], said_of(error))
        kept = {name: row[name] for name in ("id", "patient", "report", "labels")}
        return {**kept, "about": row.get("about", {}), "part": part}

    def _read(self, row: Row, place: Place) -> ScanPart | torch.Tensor:
        return self.image_processor.load(read_study(row, self.image_processor.orientation), place, self.device)

    def _prepared(self, row: Row, place: Place) -> ScanPart:
        voxels = row["volume"].load(place)
        if list(voxels.shape) != list(self.image_processor.image_size):
            raise VolumeError(row["id"], f"it has shape {tuple(voxels.shape)}", "Prepare it for this model")
        return ScanPart.whole(voxels)


class StudyLoader:
    """Batches of a source for one process.

    Args:
        source: What to load.
        processor: The model's.
        label_names: The model's; the source must have the same.
        batch_size: Studies in a batch.
        with_text: Whether batches hold the reports as tokens.
        seed: Seed for the order, see `Source.keys`.
        drop_last: Leave out what does not fill a batch at the end of a pass.
        rank: Index of this process, from 0.
        world_size: Number of processes that share the source; each study goes to one of them.
        num_workers: Loader processes; 0 loads in this one.
        on_bad_sample: Whether a study that cannot be read is skipped and counted, or ends the run.
        max_bad_share: A greater share of bad studies in a pass ends the run even with "skip"; see `too_many_bad`.
        bad_samples_file: File that gets a JSON line for each: `id`, `reason`, `epoch`. Each study has one line,
            however often it is met, by this process or others, or after the run was resumed.
        device: Where the model is, and so the batches. What loader processes read is resampled there.

    Attributes:
        epoch: Index of the current pass, or of the next if none is under way.
        num_seen: Studies seen so far in the current or last pass.
        num_bad: Those among them that could not be read.

    Memory: at most `num_workers * max(2, ceil(batch_size / num_workers))` studies are read ahead of the batch being
    gathered, in shared memory, however many studies there are. At CT-CLIP's sizes each takes 111 MB from prepared
    shards; otherwise 221 MB if the model is on a CPU, and the scan as int16 (512 x 512 x 300: 157 MB) if it is on a
    GPU. Add the batch in use (on a GPU, that and the next one) and, in each worker, what reading a scan takes.

    Raises:
        DataError: If the labels are not the model's; during iteration, if too many studies are bad, or a pass gives no
            batch. Of few studies one of several processes may have none, unless it is to have full batches.
    """

    def __init__(
        self,
        source: Source,
        processor: MedCTProcessor,
        label_names: Sequence[str],
        *,
        batch_size: int,
        with_text: bool,
        seed: int | None = None,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        on_bad_sample: Literal["skip", "raise"] = "skip",
        max_bad_share: float = 0.05,
        bad_samples_file: Path | None = None,
        device: torch.device | str = "cpu",
    ):
        if list(source.label_names) != list(label_names):
            raise DataError(
                f"{source.description}: its labels ({', '.join(source.label_names)}) are not the model's "
                f"({', '.join(label_names)}). Open the source with the model's configuration."
            )
        self.source, self.processor = source, processor
        self.batch_size, self.with_text, self.seed, self.drop_last = batch_size, with_text, seed, drop_last
        self.rank, self.world_size, self.num_workers = rank, world_size, num_workers
        self.on_bad_sample, self.max_bad_share = on_bad_sample, max_bad_share
        self.bad_samples_file, self.device = bad_samples_file, torch.device(device)
        self.epoch = self.num_seen = self.num_bad = 0
        self._position = self._start = 0  # of this process, in the current pass and in the next

    def __iter__(self) -> Iterator[Batch]:
        """One pass: `pixel_values` `(batch, 1, z, y, x)`, float32, in the model's unit; `labels` `(batch, labels)`,
        float32, NaN if unknown; `report_ids` `(batch,)`, equal for equal reports and 0 without one; `ids`, `patients`
        and `about` (subgroups); and, with text, `input_ids` and `attention_mask` `(batch, tokens)`. Tensors are on
        `device`."""
        self._position, self._start = self._start, 0
        is_whole, num_batches = not self._position, 0
        if is_whole:
            self.num_seen = self.num_bad = 0
        # On a GPU they are a batch ahead, so that the position is noted here, where a batch is given out.
        with contextlib.closing(overlapped(self._batches(), self.device, _tensors_of)) as groups:
            for seen, batch in groups:
                for bad in seen:
                    self._position += 1
                    self.num_seen += 1
                    if bad is not None:
                        self._pass_by(bad)
                if batch is not None:
                    num_batches += 1
                    yield batch
                    del batch
        if is_whole and not num_batches and (self.drop_last or self.world_size == 1):
            raise DataError(
                f"{self.source.description}: a pass over it gave process {self.rank + 1} of {self.world_size} no batch "
                f"of {self.batch_size} ({self.num_bad} of {self.num_seen} studies could not be read). Lower the batch "
                "size, or check the volumes."
            )
        self.epoch += 1
        self._position = 0

    def _batches(self) -> Generator[tuple[list[Skipped | None], Batch | None], None, None]:
        """This process's remaining batches, each with the studies seen since the last; those that are bad, at once."""
        keys = self.source.keys(self.epoch, self.seed)[self.rank :: self.world_size][self._position :]
        load = LoadRow(self.source.read, self.processor.image_processor, self.device)
        seen: list[Skipped | None] = []
        gathered = _Gathered(self)
        pinned = self.device.type == "cuda"
        with contextlib.closing(load_ahead(keys, load, self.num_workers, self.batch_size, pinned)) as studies:
            for study in studies:
                if isinstance(study, Lost):
                    study = Skipped(study.name or f"study {study.item}", study.reason)
                seen.append(study if isinstance(study, Skipped) else None)
                if isinstance(study, Skipped):
                    yield seen, None
                    seen = []
                    continue
                gathered.add(study)
                del study  # otherwise its memory could not be used again
                if gathered.is_full:
                    yield seen, gathered.batch()
                    seen, gathered = [], _Gathered(self)
        yield seen, gathered.batch() if gathered.rows and not self.drop_last else None

    def _pass_by(self, bad: Skipped) -> None:
        """Count and list a study that could not be read, or end the run."""
        self.num_bad += 1
        if self.bad_samples_file is not None:
            self._list(bad, self.bad_samples_file)
        if self.on_bad_sample == "raise":
            raise DataError(f"{bad.id} cannot be used: {bad.reason}")
        if too_many_bad(self.num_bad, self.num_seen, self.max_bad_share):
            raise DataError(
                f"{self.num_bad} of {self.num_seen} studies cannot be used, more than the allowed share of "
                f"{self.max_bad_share:g}; the last: {bad.id}: {bad.reason}"
            )

    def _list(self, bad: Skipped, path: Path) -> None:
        """Append a line unless the study has one; lines are few and other processes write too: the file is searched."""
        head = json.dumps({"id": bad.id})[:-1] + ","
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else ()
        if not any(line.startswith(head) for line in lines):
            append_line(path, json.dumps({"id": bad.id, "reason": bad.reason, "epoch": self.epoch}), bad.id)

    def state_dict(self) -> dict[str, Any]:
        """The position in the pass after the last batch; picklable."""
        position = self._position or self._start
        counts = {"num_seen": self.num_seen, "num_bad": self.num_bad}
        return {"epoch": self.epoch, "position": position, **counts, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state: the next batch is the one that would have come next. The number of workers may differ.

        Raises:
            DataError: If the state belongs to another source, order or number of processes.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise DataError(
                    f"The saved position has {name} {state[name]}, but this run has {value}. Resume with the same "
                    "data and settings, or start again."
                )
        self.epoch, self._start, self._position = state["epoch"], state["position"], 0
        self.num_seen, self.num_bad = state["num_seen"], state["num_bad"]

    def _identity(self) -> dict[str, Any]:
        """What a position depends on."""
        return {"num_studies": self.source.num_studies, "seed": self.seed, "world_size": self.world_size}


class _Gathered:
    """Studies on their way to become a batch; each is finished as it comes."""

    def __init__(self, loader: StudyLoader):
        self.loader, self.image_processor = loader, loader.processor.image_processor
        self.rows: list[Row] = []
        self.pixel_values: torch.Tensor | None = None

    @property
    def is_full(self) -> bool:
        return len(self.rows) == self.loader.batch_size

    def add(self, row: Row) -> None:
        part = row.pop("part")
        if self.loader.batch_size == 1 and isinstance(part, torch.Tensor):
            self.pixel_values = part[None, None]
        else:
            if self.pixel_values is None:
                shape = (self.loader.batch_size, 1, *self.image_processor.image_size)
                self.pixel_values = _empty(shape, self.loader.device)
            self.image_processor.finish(part, out=self.pixel_values[len(self.rows), 0])
        self.rows.append(row)

    def batch(self) -> Batch:
        rows, loader = self.rows, self.loader
        assert self.pixel_values is not None, "a batch has studies"
        batch = {
            "pixel_values": self.pixel_values[: len(rows)],
            "labels": torch.tensor([row["labels"] for row in rows], dtype=torch.float32),
            "report_ids": torch.tensor([report_id(row["report"]) for row in rows]),
            "ids": [row["id"] for row in rows],
            "patients": [row["patient"] for row in rows],
            "about": [row["about"] for row in rows],
        }
        if loader.with_text:
            texts = loader.processor(text=[row["report"] for row in rows], return_tensors="pt")
            batch.update({name: texts[name] for name in ("input_ids", "attention_mask")})
        return {name: part.to(loader.device) if torch.is_tensor(part) else part for name, part in batch.items()}


def _empty(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    # On a CPU numpy asks for huge pages, torch does not, and faulting in small pages costs more than filling them.
    return torch.from_numpy(np.empty(shape, np.float32)) if device.type == "cpu" else torch.empty(shape, device=device)


def _tensors_of(seen_and_batch: tuple[Any, Batch | None]) -> list[torch.Tensor]:
    return [part for part in (seen_and_batch[1] or {}).values() if torch.is_tensor(part)]
