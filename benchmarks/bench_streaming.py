"""What streaming costs: volumes per second and core, memory over thousands of samples, time to the first batch.

    python benchmarks/bench_streaming.py

Everything is SYNTHETIC. Each case has a process of its own:

- speed: volumes of the published size (240 x 480 x 480), a body of noise in constant air, from Parquet shards in the
  page cache to float32. The floor, copying as many bytes and reading them with `numpy.fromfile`, is measured in the
  same process. Ratios to it compare across machines and loads; seconds do not.
- loader: the same volumes through loader processes, of which each is a core; shards to float32 in batches of one.
- memory: very small volumes, so that 10,000 of them are read in a minute; it should not grow with their number.
- full, ct_rate: from before the imports to the first batch of two volumes of the published size, from shards and from
  `.nii.gz` in CT-RATE's layout.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from gpu_studies import best_seconds, decompression, of_shards, processes_up_to, rate

STARTED = time.perf_counter()
FULL_SIZE = (240, 480, 480)
TINY_SIZE = (4, 8, 8)
NUM_FULL, NUM_TINY = 12, 10_000
COUNTS = (100, 1_000, 10_000)
SPACING_MM = (1.5, 0.75, 0.75)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def draw(key: int, size: tuple[int, int, int]) -> np.ndarray:
    """Draw a volume: 20 HU of noise in a body that fills 46 or 26 % of it, and air.

    Args:
        key: Seed; even ones give the larger body.
        size: `(z, y, x)`.

    Returns:
        `(z, y, x)`, int16, HU.
    """
    generator = np.random.default_rng(key)
    z, y, x = np.ogrid[tuple(slice(-1, 1, 1j * length) for length in size)]
    body = (x / 0.95) ** 2 + (y / 0.62) ** 2 < (1.0 if key % 2 == 0 else 0.56)
    lungs = ((np.abs(y) - 0.3) / 0.2) ** 2 + (x / 0.5) ** 2 + (z / 0.8) ** 2 < 1
    hu = np.where(lungs, np.float32(-850), np.float32(40)) + generator.normal(0, 20, size).astype(np.float32)
    return np.where(body, hu, -1000).clip(-1000, 1000).astype(np.int16)


class DrawStudy:
    """Rows of a source of drawn volumes; nothing is resampled."""

    def __init__(self, size: tuple[int, int, int]):
        self.size = size
        self.drawn = {key: draw(key, size) for key in range(2)} if size == TINY_SIZE else {}

    def __call__(self, key: int) -> dict:
        volume = self.drawn[key % 2] if self.drawn else draw(key, self.size)
        # (z, y, x) of "SLP" -> axes L, P, S
        array = volume.transpose(1, 2, 0)
        affine = np.diag([-SPACING_MM[1], -SPACING_MM[2], SPACING_MM[0], 1.0])
        row = {"id": f"train_{key + 1}_a_1.nii.gz", "patient": f"train_{key + 1}", "report": f"Report {key}."}
        return {**row, "labels": [0.0] * 18, "volume": array, "affine": affine}


def config_of(size: tuple[int, int, int]):
    from medct import MedCTConfig

    patch = [4, 8, 8] if size == TINY_SIZE else [10, 20, 20]
    return MedCTConfig(vision_config={"image_size": list(size), "patch_size": patch})


def write_shards(
    folder: Path, size: tuple[int, int, int], num_studies: int, studies_per_shard: int, compression: str = "zstd"
) -> None:
    """Write drawn volumes as prepared shards.

    Args:
        folder: Where to write.
        size: Size of the volumes, `(z, y, x)`.
        num_studies: Number of volumes.
        studies_per_shard: Volumes in a file.
        compression: Of the files.
    """
    from medct.data.prepare import prepare
    from medct.data.sources import Source

    config = config_of(size)
    groups = [(key,) for key in range(num_studies)]
    source = Source(groups, DrawStudy(size), config.label_names, f"{num_studies} SYNTHETIC volumes")
    settings = {"reconstructions": "one", "studies_per_shard": studies_per_shard, "compression": compression}
    prepare({"train": source}, config, folder, settings)


def write_ct_rate(folder: Path, num_studies: int) -> None:
    """Write drawn volumes of the published size in CT-RATE's layout.

    Args:
        folder: Where to write.
        num_studies: Number of volumes.
    """
    import nibabel
    import pandas as pd

    read, labels = DrawStudy(FULL_SIZE), config_of(FULL_SIZE).label_names
    rows = [read(key) for key in range(num_studies)]
    for row in rows:
        scan = row["id"].rpartition("_")[0]
        path = folder / "dataset" / "train_fixed" / row["patient"] / scan / row["id"]
        path.parent.mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(row["volume"], row["affine"]), path)
    names = [row["id"] for row in rows]
    tables = {
        "multi_abnormality_labels/train_predicted_labels.csv": dict.fromkeys(labels, 0),
        "radiology_text_reports/train_reports.csv": {"Findings_EN": "Clear.", "Impressions_EN": "Normal."},
        "metadata/train_metadata.csv": {
            "RescaleSlope": 1, "RescaleIntercept": 0, "XYSpacing": "[0.75, 0.75]", "ZSpacing": 1.5,
        },
    }  # fmt: skip
    for path, columns in tables.items():
        (folder / "dataset" / path).parent.mkdir(parents=True)
        pd.DataFrame({"VolumeName": names, **columns}).to_csv(folder / "dataset" / path, index=False)
    (folder / "dataset/metadata/no_chest_train.txt").write_text("", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Measurements, each in a process of its own
# ---------------------------------------------------------------------------------------------------------------------


def make_loader(address: Path, size: tuple[int, int, int], batch_size: int, **options):
    """Make a loader of volumes without text.

    Args:
        address: From `write_shards` or `write_ct_rate`.
        size: Size of the volumes, `(z, y, x)`.
        batch_size: Volumes in a batch.
        **options: See `StudyLoader`.

    Returns:
        The loader, and the model's configuration.
    """
    from medct import MedCTImageProcessor
    from medct.data import StudyLoader, open_source
    from medct.processing_medct import MedCTProcessor

    config = config_of(size)
    source = open_source(str(address), "train", config, tune_share=0.0)
    processor = MedCTProcessor.__new__(MedCTProcessor)  # without a tokenizer: no text is asked for
    processor.image_processor = MedCTImageProcessor.from_config(config.vision_config)
    names = config.label_names
    loader = StudyLoader(source, processor, names, batch_size=batch_size, with_text=False, seed=0, **options)
    return loader, config


def measure_floor(folder: Path, repeats: int) -> dict[str, float]:
    """Best CPU seconds to copy a volume's bytes within memory, and to read them from a file into new memory.

    Args:
        folder: Where to write the file.
        repeats: Number of runs.
    """
    source = np.ones(FULL_SIZE, np.int16)
    target = np.empty_like(source)
    path = folder / "floor.bin"
    source.tofile(path)
    found: dict[str, list[float]] = {"memcpy": [], "fromfile": []}
    for _ in range(repeats):
        for name, work in (
            ("memcpy", lambda: np.copyto(target, source)),
            ("fromfile", lambda: np.fromfile(path, np.int16)),
        ):
            start = time.process_time()
            work()
            found[name].append(time.process_time() - start)
    return {name: min(seconds) for name, seconds in found.items()}


def measure_speed(folder: Path, repeats: int) -> dict:
    """CPU and wall seconds per volume, from shard to float32, over whole passes; the first pass does not count.

    Args:
        folder: Holds the shards `full`.
        repeats: Number of passes that count.
    """
    import torch

    torch.set_num_threads(1)
    loader, _ = make_loader(folder / "full", FULL_SIZE, batch_size=1)
    floor = measure_floor(folder, repeats)
    cpu, wall = [], []
    for _ in range(repeats + 1):
        starts = time.process_time(), time.perf_counter()
        for batch in loader:
            assert batch["pixel_values"].dtype == torch.float32
        cpu.append((time.process_time() - starts[0]) / NUM_FULL)
        wall.append((time.perf_counter() - starts[1]) / NUM_FULL)
    return {
        "cpu_s": statistics.median(cpu[1:]),
        "wall_s": statistics.median(wall[1:]),
        "peak_mib": memory_mib("VmHWM"),
        **floor,
    }


def measure_loader(folder: Path, repeats: int) -> dict:
    """Volumes a second by the number of loader processes, and seconds of one to load and to decompress a volume.

    Args:
        folder: Holds the shards `full`.
        repeats: Number of passes that count.
    """
    import torch

    from medct import MedCTImageProcessor
    from medct.data import open_source
    from medct.data.loader import LoadRow
    from medct.workers_medct import Place

    torch.set_num_threads(1)
    config = config_of(FULL_SIZE)
    image_processor = MedCTImageProcessor.from_config(config.vision_config)
    shard = min((folder / "full/data").glob("*.parquet"))
    source = open_source(str(folder / "full"), "train", config, tune_share=0.0)
    load, place = LoadRow(source.read, image_processor), Place()
    found = {
        "floor": best_seconds(decompression(shard), repeats),
        "loading": best_seconds(lambda: load(0, place), 1 + repeats),
    }
    for count in processes_up_to(os.cpu_count() or 1):
        skipped, counted = 2 * count + 1, repeats * NUM_FULL * count
        number = skipped + counted + 2 * count
        volumes = of_shards(folder / "full", "train", config, image_processor, torch.device("cpu"), count, number)
        found[str(count)] = rate(volumes, skipped, counted)
    return found


def measure_memory(folder: Path) -> dict:
    """Resident memory of one process and its peak, in MiB, by the number of samples seen."""
    loader, _ = make_loader(folder / "tiny", TINY_SIZE, batch_size=4)
    found, seen = {}, 0
    for batch in loader:
        seen += len(batch["ids"])
        if seen in COUNTS:
            found[seen] = {"resident_mib": memory_mib("VmRSS"), "peak_mib": memory_mib("VmHWM")}
    return found


def memory_mib(what: str) -> float:
    """Memory of this process in MiB: VmRSS, or its peak VmHWM. `getrusage` would include the parent's earlier peak."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(what)
    )
    return int(line.split()[1]) / 1024


def measure_first(folder: Path, layout: str) -> dict[str, float]:
    """Seconds from before the imports to the first batch of two.

    Args:
        folder: Holds the data.
        layout: "full" or "ct_rate".
    """
    import torch

    torch.set_num_threads(1)
    loader, _ = make_loader(folder / layout, FULL_SIZE, batch_size=2)
    opened = time.perf_counter() - STARTED
    batch = next(iter(loader))
    assert batch["pixel_values"].shape[0] == 2
    return {"opened_s": opened, "first_batch_s": time.perf_counter() - STARTED}


# ---------------------------------------------------------------------------------------------------------------------
# Table
# ---------------------------------------------------------------------------------------------------------------------

CASES = ("speed", "loader", "memory", "full", "ct_rate")


def measure(folder: Path, case: str, repeats: int) -> dict:
    """Measure one case.

    Args:
        folder: Holds the data.
        case: One of `CASES`.
        repeats: Number of passes that count for the speed.
    """
    from medct.common.host import keep_freed_memory

    keep_freed_memory()  # as the commands do
    if case == "speed":
        return measure_speed(folder, repeats)
    if case == "loader":
        return measure_loader(folder, repeats)
    return measure_memory(folder) if case == "memory" else measure_first(folder, case)


def tell(case: str, found: dict) -> list[str]:
    """Rows of the table: what was measured, the figure, and how it compares.

    Args:
        case: One of `CASES`.
        found: From `measure`.
    """
    if case == "speed":
        return [
            f"| floor: copy 110.6 MB in memory / `numpy.fromfile` | {found['memcpy'] * 1e3:.0f} / "
            f"{found['fromfile'] * 1e3:.0f} ms CPU | |",
            f"| shard to float32, 240 x 480 x 480, one process | {1 / found['cpu_s']:.1f} per s and core "
            f"({found['cpu_s'] * 1e3:.0f} ms CPU, {found['wall_s'] * 1e3:.0f} ms wall) | "
            f"{found['cpu_s'] / found['memcpy']:.1f} x copy, {found['cpu_s'] / found['fromfile']:.1f} x fromfile |",
            f"| its peak memory, batch of 1 | {found['peak_mib']:.0f} MiB | |",
        ]
    if case == "loader":
        floor, loading = found.pop("floor"), found.pop("loading")
        return [
            f"| what a loader process does for a volume | {loading * 1e3:.0f} ms | "
            f"{loading / floor:.1f} x decompressing |",
            *(
                f"| loader, {count} process{'es' * (count != '1')} | {per_second:.1f} per s | "
                f"{per_second * floor / int(count):.2f} of decompressing |"
                for count, per_second in found.items()
            ),
        ]
    if case == "memory":
        first = next(iter(found.values()))
        return [
            f"| resident (peak) after {int(count):,} small samples | "
            f"{of['resident_mib']:.0f} ({of['peak_mib']:.0f}) MiB | "
            f"{of['peak_mib'] - first['peak_mib']:+.0f} MiB of peak |"
            for count, of in found.items()
        ]
    what = "shards" if case == "full" else "`.nii.gz` in CT-RATE's layout"
    return [
        f"| start to first batch of 2, {what} | {found['first_batch_s']:.1f} s | "
        f"{found['opened_s']:.1f} s of it imports and opening |"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="passes over the volumes that count (default: 3)")
    parser.add_argument("--folder", type=Path, help="where to write the data (2 GB), or find those of an earlier run")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="which to measure (default: all)")
    parser.add_argument("--compression", default="zstd", help="of the shards: zstd or lz4 (default: zstd)")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.folder, arguments.case, arguments.repeats)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        if {"speed", "loader", "full"} & set(arguments.cases):
            write_shards(folder / "full", FULL_SIZE, NUM_FULL, 4, arguments.compression)
        if "memory" in arguments.cases:
            write_shards(folder / "tiny", TINY_SIZE, NUM_TINY, 16)
        if "ct_rate" in arguments.cases and not (folder / "ct_rate").exists():
            write_ct_rate(folder / "ct_rate", 2)
        size = sum(path.stat().st_size for path in (folder / "full/data").glob("*.parquet")) / NUM_FULL / 1e6
        print(f"SYNTHETIC volumes; {size:.1f} MB each in the shards ({arguments.compression})\n")
        print("| what | measured | |\n| --- | ---: | --- |")
        for case in arguments.cases:
            command = [sys.executable, __file__, "--case", case, "--folder", folder, "--repeats", arguments.repeats]
            found = json.loads(subprocess.check_output([str(part) for part in command]))
            print("\n".join(tell(case, found)), flush=True)


if __name__ == "__main__":
    main()
