"""Training as users start it: in processes of its own."""

import os
import sys
from pathlib import Path

from medct import train as training

QUICKLY = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(
        [str(Path(__file__).parent / "quick"), *filter(None, [os.environ.get("PYTHONPATH")])],
    ),
}
"""For the environment of a process that is mostly imports, and of those that it starts; see `quick/`."""


def launch_command(
    *arguments: object, processes: int = 1, precision: str = "no", script: object = training.__file__
) -> list[str]:
    """`accelerate launch train.py`, or another script; on CPUs several processes, too, start with --multi_gpu."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), "--quiet"]
    command += ["--cpu"] if processes == 1 else ["--multi_gpu", "--main_process_port", "0"]
    command += ["--num_machines", "1", "--mixed_precision", precision, "--dynamo_backend", "no"]
    return [*command, str(script), *map(str, arguments)]
