"""Time and peak memory from a scan on disk to `pixel_values`, each case in a process of its own.

    python benchmarks/bench_preprocessing.py

The scan is synthetic: 512 x 512 x 300 int16, smooth anatomy with noise, as .nii.gz, and the same as 300
DICOM files, plain and as JPEG-LS. Floors are measured in the same run: inflating the .nii.gz into one array and copying
the result's size, reading the bytes of the DICOM files likewise, and decoding the compressed ones with pydicom in the
process itself. Ratios to them compare across machines and loads; seconds do not. At the end the `.nii.gz` goes through
the loader of `medct predict`, with one process to as many as there are cores.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from gpu_studies import of_files, processes_up_to, rate

SHAPE = (512, 512, 300)
SPACING_MM = (0.7, 0.7, 1.0)
CASES = ("floor-nifti", "nifti", "floor-dicom", "dicom", "floor-jpeg-ls", "jpeg-ls")


def write_scans(folder: Path, slices: int) -> None:
    """Write one scan as `scan.nii.gz` and as folders `dicom` and `jpeg-ls`.

    Args:
        folder: Where to write.
        slices: Number of slices, of 512 x 512.
    """
    import nibabel

    generator = np.random.default_rng(0)
    i, j = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE[:2]), indexing="ij")
    body = np.where(i**2 + 1.4 * j**2 < 0.8, 40.0, -1000.0)
    lungs = ((np.abs(i) - 0.4) ** 2 + j**2 < 0.08) * -850.0
    array = np.empty((*SHAPE[:2], slices), np.int16, order="F")
    for k in range(slices):
        array[..., k] = (body + lungs + generator.normal(0, 12, SHAPE[:2])).round()
    affine = np.diag([-SPACING_MM[0], -SPACING_MM[1], SPACING_MM[2], 1])
    nibabel.save(nibabel.Nifti1Image(array, affine), folder / "scan.nii.gz")
    for name in ("dicom", "jpeg-ls"):
        (folder / name).mkdir()
        for k in range(slices):
            write_slice(folder / name / f"{(k * 37) % slices:04}.dcm", array[..., k].T, k, name == "jpeg-ls")


def write_slice(path: Path, hu: np.ndarray, k: int, compress: bool) -> None:
    """Write one CT slice.

    Args:
        path: File to write.
        hu: `(rows, columns)`, int16, HU.
        k: Index of the slice, which gives its position.
        compress: Whether to write it as JPEG-LS.
    """
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGLSLossless

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = f"1.2.3.{k + 1}"
    slice_ = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    slice_.SOPClassUID, slice_.SOPInstanceUID, slice_.SeriesInstanceUID = CTImageStorage, f"1.2.3.{k + 1}", "1.2.4"
    slice_.Modality, slice_.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    slice_.ImagePositionPatient = [0, 0, k * SPACING_MM[2]]
    slice_.ImageOrientationPatient, slice_.PixelSpacing = [1, 0, 0, 0, 1, 0], list(SPACING_MM[:2])
    slice_.Rows, slice_.Columns, slice_.SamplesPerPixel = *hu.shape, 1
    slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 16, 15, 1
    slice_.PhotometricInterpretation, slice_.RescaleSlope, slice_.RescaleIntercept = "MONOCHROME2", 1, 0
    slice_.PixelData = np.ascontiguousarray(hu, "<i2").tobytes()
    if compress:
        slice_.compress(JPEGLSLossless, encoding_plugin="pyjpegls", generate_instance_uid=False)
    slice_.save_as(path, enforce_file_format=True)


def floor(folder: Path, case: str) -> None:
    """Do the least that any reader does: bring the scan's bytes into memory, and write memory for the result.

    Args:
        folder: From `write_scans`.
        case: "floor-nifti" or "floor-dicom".
    """
    if case == "floor-nifti":
        from isal import igzip

        array = np.empty(512 * 512 * 400 * 2, np.uint8)
        view, count = memoryview(array), 0
        with igzip.IGzipFile(folder / "scan.nii.gz") as file:
            while got := file.readinto(view[count : count + 2**24]):
                count += got
    elif case == "floor-dicom":
        for path in sorted((folder / "dicom").iterdir()):
            path.read_bytes()
    else:
        from pydicom.pixels import pixel_array

        for path in sorted((folder / "jpeg-ls").iterdir()):
            pixel_array(path, decoding_plugin="pyjpegls")
    np.ones((240, 480, 480), np.float32).copy()


def measure(folder: Path, case: str, repeats: int, threads: int | None) -> dict[str, float]:
    """Best and median seconds, and peak memory of the process, with all its imports and of these alone, in MiB.

    Args:
        folder: From `write_scans`.
        case: One of `CASES`.
        repeats: Number of runs.
        threads: Threads of torch; its own default if `None`.
    """
    if case.startswith("floor"):

        def run() -> None:
            floor(folder, case)
    else:
        import torch

        from medct import MedCTImageProcessor

        if threads:
            torch.set_num_threads(threads)
        processor = MedCTImageProcessor()
        source = folder / ("scan.nii.gz" if case == "nifti" else case)

        def run() -> None:
            processor(source, return_tensors="pt")

    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {
        "best_s": min(seconds),
        "median_s": statistics.median(seconds),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "imports_mib": imported,
    }


def measure_loader(folder: Path, processes: int, studies: int) -> float:
    """Studies a second through the loader, without the first ones.

    Args:
        folder: From `write_scans`.
        processes: Number of loader processes.
        studies: How many count for each of them.
    """
    import torch

    from medct import MedCTImageProcessor
    from medct.common.host import keep_freed_memory

    keep_freed_memory()
    skipped = 2 * processes + 1
    paths = [folder / "scan.nii.gz"] * (skipped + (studies + 2) * processes)
    batches = of_files(paths, MedCTImageProcessor(), torch.device("cpu"), processes)
    return rate(batches, skipped, studies * processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each case in its process (default: 5)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: its own; pass 1 on a busy machine)")
    parser.add_argument("--slices", type=int, default=SHAPE[2], help="slices of the scan (default: 300)")
    parser.add_argument("--folder", type=Path, help="where to write the scans, or find those of an earlier run")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.processes:
        print(json.dumps(measure_loader(arguments.folder, arguments.processes, arguments.repeats)))
        return
    if arguments.case:
        print(json.dumps(measure(arguments.folder, arguments.case, arguments.repeats, arguments.threads)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        if not (folder / "scan.nii.gz").exists():
            write_scans(folder, arguments.slices)
        size = (folder / "scan.nii.gz").stat().st_size
        print(f"scan: {SHAPE[0]} x {SHAPE[1]} x {arguments.slices} int16, {size / 1e6:.0f} MB as .nii.gz")
        print(f"{'case':12} {'best s':>8} {'median s':>9} {'x floor':>8} {'peak MiB':>9} {'of it imports':>14}")
        floors = {}
        for case in CASES:
            command = [sys.executable, __file__, "--case", case, "--folder", folder, "--repeats", arguments.repeats]
            command += ["--threads", arguments.threads] if arguments.threads else []
            found = json.loads(subprocess.check_output([str(part) for part in command]))
            if case.startswith("floor"):
                least = found["best_s"]
                floors[case] = least
            print(
                f"{case:12} {found['best_s']:8.2f} {found['median_s']:9.2f} {found['best_s'] / least:8.1f} "
                f"{found['peak_mib']:9.0f} {found['imports_mib']:14.0f}"
            )
        print(f"\n{'processes':12} {'studies/s':>9} {'share of floor':>15}")
        for count in processes_up_to(os.cpu_count() or 1):
            command = [
                sys.executable,
                __file__,
                "--processes",
                count,
                "--folder",
                folder,
                "--repeats",
                arguments.repeats,
            ]
            found = json.loads(subprocess.check_output([str(part) for part in command]))
            print(f"{count:<12} {found:9.2f} {found * floors['floor-nifti'] / count:15.2f}")


if __name__ == "__main__":
    main()
