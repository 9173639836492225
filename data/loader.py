"""From the studies of a source to batches of the model's inputs.

Unusual: workers read and preprocess single studies, and batches are made in the main process, so that they stay full
although bad studies are skipped. Studies come in the order of `Source.keys` whatever the number of workers; so a
position is all the state there is.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from medct.configuration_medct import MedCTConfig
from medct.data.sources import DataError, Deferred, Row, Skipped, Source, read_study, too_many_bad
from medct.data.workers import load_in_processes
from medct.image_processing_medct import MedCTImageProcessor
from medct.processing_medct import MedCTProcessor
from medct.volume_io_medct import VolumeError

Batch = dict[str, Any]


def report_id(report: str) -> int:
    """A number that is the same for equal reports; 0 if there is no report."""
    if not report:
        return 0
    return int.from_bytes(hashlib.blake2b(report.encode(), digest_size=8).digest(), "big", signed=True)


@dataclass(frozen=True)
class LoadStudy:
    """Turns rows into tensors; picklable, for loader processes.

    Args:
        image_processor: The model's.
    """

    image_processor: MedCTImageProcessor

    def __call__(self, row: Row) -> Row | Skipped:
        """The row with `pixel_values` `(1, z, y, x)` instead of `volume`, or why it has none."""
        try:
            pixel_values = self._prepared(row) if row.get("prepared") else self._read(row)
        except Exception as error:  # libraries and file systems each raise their own; none may end days of training
            return Skipped(row["id"], _reason(error))
        kept = {name: row[name] for name in ("id", "patient", "report", "labels")}
        return {**kept, "about": row.get("about", {}), "pixel_values": pixel_values[None]}

    def _read(self, row: Row) -> torch.Tensor:
        return self.image_processor.process_volume(read_study(row, self.image_processor.orientation))

    def _prepared(self, row: Row) -> torch.Tensor:
        volume = row["volume"]
        if isinstance(volume, Deferred):
            with volume.open() as opened:
                volume = torch.as_tensor(opened)
        if list(volume.shape) != list(self.image_processor.image_size):
            raise VolumeError(row["id"], f"it has shape {tuple(volume.shape)}", "Prepare it for this model")
        return torch.as_tensor(volume)


def _reason(error: Exception) -> str:
    """What is wrong, in one line; for errors that are not ours, only the class, which cannot quote a header."""
    if isinstance(error, VolumeError | DataError | OSError):
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return type(error).__name__


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

    Attributes:
        epoch: Index of the current pass, or of the next if none is under way.
        num_seen: Studies seen so far in the current or last pass.
        num_bad: Those among them that could not be read.

    Memory: at most `num_workers * max(2, ceil(batch_size / num_workers))` volumes are read ahead of the batch being
    gathered, in shared memory, however many studies there are. At CT-CLIP's sizes each takes 111 MB from prepared
    shards and 221 MB otherwise. Add the batch in use and, in each worker, what reading a scan takes.

    Raises:
        DataError: If the labels are not the model's; during iteration, if too many studies are bad.
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
        self.bad_samples_file = bad_samples_file
        self.epoch = self.num_seen = self.num_bad = 0
        self._position = self._start = 0  # of this process, in the current pass and in the next

    def __iter__(self) -> Iterator[Batch]:
        """One pass: `pixel_values` `(batch, 1, z, y, x)`, float32, or int16 HU from prepared shards (see `to_device`);
        `labels` `(batch, labels)`, float32, NaN if unknown; `report_ids` `(batch,)`, equal for equal reports and 0
        without one; `ids`, `patients` and `about` (subgroups); and, with text, `input_ids` and `attention_mask`
        `(batch, tokens)`."""
        self._position, self._start = self._start, 0
        is_whole, num_batches = not self._position, 0
        if is_whole:
            self.num_seen = self.num_bad = 0
        studies: list[Row] = []
        for study in self._studies():
            self._position += 1
            self.num_seen += 1
            if isinstance(study, Skipped):
                self._pass_by(study)
                continue
            studies.append(study)
            del study  # otherwise its volume would stay in shared memory while the batch is used
            if len(studies) == self.batch_size:
                num_batches += 1
                batch, studies = self._batch(studies), []
                yield batch
                del batch
        if studies and not self.drop_last:
            num_batches += 1
            yield self._batch(studies)
        if is_whole and not num_batches:
            raise DataError(
                f"{self.source.description}: a pass over it gave process {self.rank + 1} of {self.world_size} no batch "
                f"of {self.batch_size} ({self.num_bad} of {self.num_seen} studies could not be read). Lower the batch "
                "size, or check the volumes."
            )
        self.epoch += 1
        self._position = 0

    def _studies(self) -> Iterator[Row | Skipped]:
        """This process's remaining studies, in order."""
        keys = self.source.keys(self.epoch, self.seed)[self.rank :: self.world_size][self._position :]
        load = LoadStudy(self.processor.image_processor)
        workers = min(self.num_workers, len(keys))
        if not workers:
            return (load(self.source.read(key)) for key in keys)
        # Together they are about one batch ahead.
        ahead = workers * max(2, math.ceil(self.batch_size / workers))
        return load_in_processes(keys, self.source.read, load, workers, ahead)

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
        with path.open("a+", encoding="utf-8") as file:
            file.seek(0)
            if not any(line.startswith(head) for line in file):
                file.write(json.dumps({"id": bad.id, "reason": bad.reason, "epoch": self.epoch}) + "\n")

    def _batch(self, studies: list[Row]) -> Batch:
        batch = {
            "pixel_values": self._stack([study["pixel_values"] for study in studies]),
            "labels": torch.tensor([study["labels"] for study in studies], dtype=torch.float32),
            "report_ids": torch.tensor([report_id(study["report"]) for study in studies]),
            "ids": [study["id"] for study in studies],
            "patients": [study["patient"] for study in studies],
            "about": [study["about"] for study in studies],
        }
        if self.with_text:
            texts = self.processor(text=[study["report"] for study in studies], return_tensors="pt")
            batch.update({name: texts[name] for name in ("input_ids", "attention_mask")})
        return batch

    def _stack(self, volumes: list[torch.Tensor]) -> torch.Tensor:
        """`(batch, 1, z, y, x)`, newly allocated unless it is a single volume made in this process."""
        shape = (len(volumes), *volumes[0].shape)
        if torch.cuda.is_available():  # pinned memory is copied to a GPU while the GPU computes
            return torch.stack(volumes, out=volumes[0].new_empty(shape, pin_memory=True))
        if len(volumes) == 1 and not self.num_workers:
            return volumes[0][None]
        # numpy asks for huge pages, torch does not, and faulting in small pages costs more than the copy
        return torch.stack(volumes, out=torch.from_numpy(np.empty(shape, volumes[0].numpy().dtype)))

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


def to_device(batch: Batch, device: torch.device | str, config: MedCTConfig) -> Batch:
    """Move a batch to a device; only there do int16 HU from prepared shards become float32 in the model's unit.

    Args:
        batch: From a `StudyLoader`; the tensors in it are moved, the rest is kept.
        device: Where to.
        config: The model's configuration, which has its unit.
    """
    batch = {
        name: part.to(device, non_blocking=True) if isinstance(part, torch.Tensor) else part
        for name, part in batch.items()
    }
    volume, vision = batch["pixel_values"], config.vision_config
    hu_per_unit = vision.hu_per_unit  # type: ignore[union-attr]
    if volume.dtype == torch.int16 and volume.device.type == "cpu":
        # Several times as fast as torch, whose allocator asks for no huge pages.
        values = np.divide(volume.numpy(), np.float32(hu_per_unit), dtype=np.float32)
        batch["pixel_values"] = torch.from_numpy(values)
    elif volume.dtype == torch.int16:
        batch["pixel_values"] = volume.float().div_(hu_per_unit)
    return batch
