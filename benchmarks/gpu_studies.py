"""Whole studies a second, from files and from prepared shards to `pixel_values` on the model's device.

    python benchmarks/gpu_studies.py

Scans are SYNTHETIC: random walks of HU in a body, noise around it, 512 x 512 x 300 int16, about 75 MB each as
`.nii.gz`; a dozen of them, each read several times from the page cache. The floor is what inflating such a file costs a
core, and decompressing the volume of a prepared shard, alone in the same run.
"""

import argparse
import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

SHAPE = (512, 512, 300)
SPACING_MM = (0.7, 0.7, 1.0)
NUM_FILES, NUM_PREPARED = 12, 4


def processes_up_to(count: int) -> list[int]:
    """1, 2, 4 and so on, and the count itself.

    Args:
        count: Most processes.
    """
    return sorted({count, *(2**power for power in range(count.bit_length()) if 2**power <= count)})


def draw(key: int, shape: Sequence[int]) -> np.ndarray:
    """A random walk along the first axis, within -1000..1000 HU, in a body that fills half of it, and noisy air.

    Args:
        key: Seed.
        shape: `(i, j, k)`.

    Returns:
        `shape`, int16, the first axis fastest in memory.
    """
    generator = np.random.default_rng(key)
    array = np.empty(shape, np.int16, order="F")
    j, i = np.ogrid[tuple(slice(-1, 1, 1j * length) for length in (shape[1], shape[0]))]
    is_body = (i / 0.95) ** 2 + (j / 0.65) ** 2 < 1
    for k in range(shape[2]):
        walk = np.cumsum(generator.integers(-12, 13, is_body.shape, np.int16), axis=1)
        air = generator.integers(-1040, -990, is_body.shape, np.int16)
        array[..., k] = np.where(is_body, np.abs((walk + 3000) % 4000 - 2000) - 1000, air).T
    return array


def write_files(folder: Path, shape: Sequence[int], count: int) -> list[Path]:
    """Write scans as `.nii.gz`.

    Args:
        folder: Where to write.
        shape: `(i, j, k)`.
        count: How many.
    """
    import nibabel
    from isal import igzip

    affine = np.diag([-SPACING_MM[0], -SPACING_MM[1], SPACING_MM[2], 1])

    def write(key: int) -> Path:
        path = folder / f"{key}.nii.gz"
        if not path.exists():
            path.write_bytes(igzip.compress(nibabel.Nifti1Image(draw(key, shape), affine).to_bytes(), 1))
        return path

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(write, range(count)))


class DrawStudy:
    """Rows of a source of drawn scans."""

    def __init__(self, shape: Sequence[int], num_labels: int):
        self.shape, self.num_labels = shape, num_labels

    def __call__(self, key: int) -> dict[str, Any]:
        row = {"id": f"study-{key}", "patient": f"patient-{key}", "report": "", "labels": [0.0] * self.num_labels}
        affine = np.diag([-SPACING_MM[0], -SPACING_MM[1], SPACING_MM[2], 1])
        return {**row, "volume": draw(key, self.shape), "affine": affine}


def write_shards(folder: Path, shape: Sequence[int], count: int, config: Any, compression: str) -> Path:
    """Write scans as prepared shards.

    Args:
        folder: Where to write.
        shape: `(i, j, k)`.
        count: How many.
        config: The model's, which has the grid.
        compression: Of the files.

    Returns:
        The first of the files.
    """
    from medct.data.prepare import prepare
    from medct.data.sources import Source

    names = config.label_names
    source = Source([(key,) for key in range(count)], DrawStudy(shape, len(names)), names, f"{count} SYNTHETIC scans")
    settings = {"reconstructions": "one", "studies_per_shard": 1, "compression": compression}
    prepare({"valid": source}, config, folder, settings)
    return min(folder.glob("data/*.parquet"))


# ---------------------------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------------------------


def best_seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """The shortest of some runs.

    Args:
        work: What to run.
        repeats: How often.
    """
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def inflate(path: Path, buffer: np.ndarray) -> None:
    """Inflate a file into memory.

    Args:
        path: Of the file.
        buffer: bytes, as large as what it holds.
    """
    from isal import igzip

    view = memoryview(buffer)
    with igzip.IGzipFile(path) as file:
        while count := file.readinto(view[: 2**24]):
            view = view[count:]


def rate(
    batches: Generator[torch.Tensor, None, None],
    skipped: int,
    counted: int,
    use: Callable[[torch.Tensor], Any] | None = None,
) -> float:
    """Studies a second, while all processes are busy.

    Args:
        batches: `pixel_values` of a study each; some more than are counted, so that none is idle at the end.
        skipped: Studies at the beginning that do not count, while processes start.
        counted: Studies that do.
        use: What is done with each, such as the model.
    """
    start = 0.0
    with contextlib.closing(batches):
        for index, pixel_values in enumerate(batches):
            if use is not None:
                use(pixel_values)
            if pixel_values.is_cuda:
                torch.cuda.synchronize()
            if index == skipped - 1:
                start = time.perf_counter()
            if index == skipped + counted - 1:
                break
    return counted / (time.perf_counter() - start)


def of_files(
    paths: Sequence[Path], image_processor: Any, device: torch.device, processes: int
) -> Generator[torch.Tensor, None, None]:
    """`pixel_values` of files, as `medct predict` reads them.

    Args:
        paths: The files.
        image_processor: The model's.
        device: Where to.
        processes: Number of loader processes.
    """
    from medct.inference.studies import LoadStudy, ReadStudy, Study, read_ahead, stacked

    studies = [Study(f"{index}: {path}", str(path)) for index, path in enumerate(paths)]
    for read in read_ahead(studies, LoadStudy(image_processor, device), processes):
        assert isinstance(read, ReadStudy), read
        yield stacked([read])


def of_shards(
    folder: Path, split: str, config: Any, image_processor: Any, device: torch.device, processes: int, count: int
) -> Generator[torch.Tensor, None, None]:
    """`pixel_values` of prepared shards, as training and `medct evaluate` read them.

    Args:
        folder: Prepared shards.
        split: Of them.
        config: The model's.
        image_processor: The model's.
        device: Where to.
        processes: Number of loader processes.
        count: Studies; those of the folder come again and again.
    """
    from medct.data import StudyLoader, open_source
    from medct.processing_medct import MedCTProcessor

    source = open_source(str(folder), split, config)
    source = dataclasses.replace(source, groups=(source.groups * count)[:count], names=())
    processor = MedCTProcessor.__new__(MedCTProcessor)  # without a tokenizer: no text is asked for
    processor.image_processor = image_processor
    options = {"batch_size": 1, "with_text": False, "num_workers": processes, "device": device}
    for batch in StudyLoader(source, processor, config.label_names, **options):
        yield batch["pixel_values"]


def whole_studies(
    device: torch.device | str = "cpu",
    processes: Sequence[int] = (),
    shape: Sequence[int] = SHAPE,
    vision_config: dict[str, Any] | None = None,
    use: Callable[[torch.Tensor], Any] | None = None,
    studies_per_process: int = 6,
    folder: Path | None = None,
) -> list[dict[str, Any]]:
    """Measure studies a second by the number of processes.

    Args:
        device: Where the model is.
        processes: Numbers of loader processes; by default 1, 2, 4 and so on to that of the cores.
        shape: Of a scan, `(i, j, k)`.
        vision_config: Of the model, if it is not the published one.
        use: What is done with `pixel_values`, `(1, 1, z, y, x)`, such as the model; nothing by default.
        studies_per_process: How many count.
        folder: Where to write the scans, or find those of an earlier run; a temporary one by default.

    Returns:
        A row for each source and number of processes: `source`, `processes`, `studies_per_second`, `floor_s`, what one
        core needs for a study at least, and `share_of_floor`, of what so many cores could do.
    """
    from medct import MedCTConfig, MedCTImageProcessor
    from medct.data.prepare import COMPRESSION_LEVELS

    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        config, device = MedCTConfig(vision_config=vision_config or {}), torch.device(device)
        image_processor = MedCTImageProcessor.from_config(config.vision_config)
        paths = write_files(folder, shape, NUM_FILES)
        buffer = np.empty(2 * int(np.prod(shape)) + 2**20, np.uint8)
        floors = {".nii.gz": best_seconds(lambda: inflate(paths[0], buffer))}
        for name in COMPRESSION_LEVELS:
            shard = write_shards(folder / name, shape, NUM_PREPARED, config, name)
            floors[f"prepared, {name}"] = best_seconds(decompression(shard))
        rows = []
        for count in processes or processes_up_to(os.cpu_count() or 1):
            skipped = 2 * count + 1
            counted = studies_per_process * count
            number = skipped + counted + 2 * count
            sources = {".nii.gz": of_files((paths * number)[:number], image_processor, device, count)}
            for name in COMPRESSION_LEVELS:
                shards = of_shards(folder / name, "valid", config, image_processor, device, count, number)
                sources[f"prepared, {name}"] = shards
            for source, batches in sources.items():
                found = rate(batches, skipped, counted, use)
                share = found * floors[source] / min(count, os.cpu_count() or 1)
                row = {"source": source, "processes": count, "studies_per_second": found}
                rows.append({**row, "floor_s": floors[source], "share_of_floor": share})
        return rows


def decompression(path: Path) -> Callable[[], Any]:
    """What decompresses the volume of a prepared shard, and does nothing else.

    Args:
        path: Of the shard, whose first study is taken.
    """
    import pyarrow as pa
    from pyarrow import parquet

    from medct.data.prepare import COMPRESSION_LEVELS

    file = parquet.ParquetFile(path)
    (column,) = file.read_row_group(0, ["volume.bytes"]).column("volume").chunks
    value = column.field("bytes")[0].as_buffer()
    name = file.metadata.row_group(0).column(5).compression.lower()
    codec = pa.Codec({"lz4": "lz4_raw"}.get(name, name), COMPRESSION_LEVELS[name])
    compressed = codec.compress(value)
    return lambda: codec.decompress(compressed, value.size)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows for docs/performance.md.

    Args:
        rows: From `whole_studies`.
    """
    lines = ["| source | processes | studies/s | share of floor |", "| --- | ---: | ---: | ---: |"]
    for row in sorted(rows, key=lambda row: row["source"]):
        lines.append(
            f"| {row['source']} | {row['processes']} | {row['studies_per_second']:.2f} | {row['share_of_floor']:.2f} |"
        )
    floors = {row["source"]: row["floor_s"] for row in rows}
    said = ", ".join(f"{source} {seconds:.3f} s" for source, seconds in floors.items())
    return "\n".join([*lines, "", f"floor, a study and core: {said}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=(), help="(default: 1, 2, 4 ... to all cores)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--slices", type=int, default=SHAPE[2], help="slices of a scan (default: 300)")
    parser.add_argument("--studies", type=int, default=6, help="studies a process that count (default: 6)")
    parser.add_argument("--folder", type=Path, help="where to write the scans, or find those of an earlier run")
    arguments = parser.parse_args()
    from medct.common.host import device_name, keep_freed_memory

    keep_freed_memory()
    device = torch.device(arguments.device)
    print(f"{device_name(device)}, {os.cpu_count()} cores, {SHAPE[0]} x {SHAPE[1]} x {arguments.slices}\n")
    shape = (*SHAPE[:2], arguments.slices)
    options = {"studies_per_process": arguments.studies, "folder": arguments.folder}
    print(table(whole_studies(device, arguments.processes, shape, **options)))


if __name__ == "__main__":
    main()
