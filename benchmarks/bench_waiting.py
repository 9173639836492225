"""CPU seconds of a scan at the published sizes while others use the machine, by what idle OpenMP threads do.

    python benchmarks/bench_waiting.py                 # makes the machine busy itself
    python benchmarks/bench_waiting.py --busy 0        # as it is

The threads of a matrix product wait for each other many times a scan. By default they spin for a while, which costs
processor time that others could use; with OMP_WAIT_POLICY=PASSIVE they sleep. The vision encoder has random weights and
the volume is noise; both cost as much as real ones. Each policy runs in a process of its own, in turn. Prints a
Markdown table; seconds of a busy machine do not compare across machines, their ratio does.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

POLICIES = {"default": {}, "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"}}
SPIN = "while True: pass"


def measure(scans: int) -> dict[str, float]:
    """CPU and wall seconds of a scan, after one that does not count.

    Args:
        scans: How many are encoded.
    """
    import torch

    from medct import MedCTConfig, MedCTVisionModel
    from medct.common.host import keep_freed_memory

    keep_freed_memory()
    config = MedCTConfig().vision_config
    model = MedCTVisionModel(config).eval()
    volume = torch.rand(1, 1, *config.image_size) * 2 - 1
    with torch.no_grad():
        model(volume)
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        for _ in range(scans):
            model(volume)
    after, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - start
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu": cpu / scans, "wall": wall / scans, "threads": torch.get_num_threads()}


def child(environment: dict[str, str], scans: int) -> dict[str, float]:
    """`measure` in a process of its own.

    Args:
        environment: Variables to set there.
        scans: See `measure`.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, __file__, "--scans", str(scans), "--here"]
    run = subprocess.run(command, env=inherited | environment, capture_output=True, encoding="utf-8", check=True)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=2, help="scans that count (default: 2)")
    parser.add_argument(
        "--busy", type=int, default=os.cpu_count(), help="processes that spin beside (default: one a core)"
    )
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.scans)))
        return
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(args.busy)]
    try:
        found = {name: child(environment, args.scans) for name, environment in POLICIES.items()}
    finally:
        for other in others:
            other.kill()
            other.wait()
    print(f"| {os.cpu_count()} cores, {args.busy} other processes | threads | CPU s a scan | s a scan |")
    print("| --- | ---: | ---: | ---: |")
    for name, each in found.items():
        print(f"| {name} | {each['threads']} | {each['cpu']:.1f} | {each['wall']:.1f} |")


if __name__ == "__main__":
    main()
