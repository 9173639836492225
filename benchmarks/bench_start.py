"""Seconds from the shell to the findings of one scan, beside what the imports of the libraries take.

    python benchmarks/bench_start.py

The scan is a SYNTHETIC phantom as .nii.gz, the model the phantom base: both are small, so that what remains is the
start. The floor is a process that imports what a transformers model is made of, and nothing else; `gc off` is the same
without the garbage collector, as the command imports it. Cases run in turns, each in a process of its own, after a turn
that does not count; the ratio of each turn compares across machines and loads, seconds do not. Prints a Markdown table.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FLOOR = "import of PreTrainedModel"
_IMPORT = "from transformers import PreTrainedModel"
IMPORTS = {
    "import of torch": "import torch",
    FLOOR: _IMPORT,
    f"{FLOOR}, gc off": f"import gc; gc.disable(); {_IMPORT}",
}


def write_scan(path: Path) -> None:
    """Write a phantom.

    Args:
        path: To a .nii.gz.
    """
    import nibabel

    from medct.data.phantoms import make_phantom

    study = make_phantom(0)
    nibabel.save(nibabel.Nifti1Image(study["volume"], study["affine"]), path)


def seconds(command: list[str]) -> float:
    """Of a process, from its start to its end.

    Args:
        command: To run.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    # A user's Python keeps the bytecode of what it imports.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="turns that count (default: 7)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_scan(scan := Path(folder, "scan.nii.gz"))
        commands = {what: [sys.executable, "-c", code] for what, code in IMPORTS.items()}
        commands["medct predict"] = [sys.executable, "-m", "medct", "predict", str(scan), "--model", "phantom"]
        turns = [{what: seconds(command) for what, command in commands.items()} for _ in range(1 + args.repeats)][1:]
    print("| | seconds | x floor |\n| --- | ---: | ---: |")
    for what in commands:
        taken = statistics.median(turn[what] for turn in turns)
        ratio = statistics.median(turn[what] / turn[FLOOR] for turn in turns)
        print(f"| {what} | {taken:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
