"""Reads damaged scans by the thousand and says what escaped: `python tests/fuzz_reading.py --count 100000`.

Cases run in a process of their own, so that one that ends or hangs it is counted, named and passed over. A case is made
of its kind, number and seed alone: `--kind "jpeg-ls" --first 1234 --count 1` makes that one again. Takes tens of
thousands an hour on one core.
"""

import argparse
import collections
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import damage

from medct import VolumeError, decoders_medct, read_volume

MOST_SECONDS = 5.0
MOST_BYTES = 2**30
_STUCK_SECONDS = 60.0
_RESET_PEAK = "5"


def peak_bytes() -> int:
    """Most memory that this process and those that decode for it held at once, or rather the sum of their peaks."""
    total = 0
    for pid in (os.getpid(), *(helper._process.pid for helper in decoders_medct._helpers.all)):
        try:
            lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
            Path(f"/proc/{pid}/clear_refs").write_text(_RESET_PEAK, encoding="utf-8")
        except OSError:
            continue
    return total


def read_one(source) -> str:
    """What became of a source: read, refused, or what it should not have become."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            volume = read_volume(source)
        return "read" if np.isfinite(volume.array).all() else "not finite"
    except VolumeError:
        return "refused"
    except BaseException as error:
        return f"{type(error).__name__} escaped"


def timed(source) -> tuple[str, float]:
    start = time.perf_counter()
    return read_one(source), time.perf_counter() - start


def work(kind: str, numbers: range, seed: int, folder: str, results) -> None:
    """Runs cases and sends `(number, outcome, seconds, bytes)` of each."""
    make = damage.SOURCES[kind](Path(folder))
    read_one(make(np.random.default_rng(0)))
    before = peak_bytes()
    for number in numbers:
        source = make(np.random.default_rng([seed, number]))
        outcome, seconds = timed(source)
        for _ in range(3):
            if seconds > MOST_SECONDS:  # or something else had the machine
                outcome, seconds = timed(source)
        peak = peak_bytes()
        if peak - before > MOST_BYTES and outcome in ("read", "refused"):
            outcome = "too much memory"
        if seconds > MOST_SECONDS:
            outcome = "too slow"
        results.send((number, outcome, seconds, max(peak - before, 0)))
    results.send(None)


def run_kind(kind: str, numbers: range, seed: int) -> tuple[collections.Counter, list, float, int]:
    """Outcomes of a kind's cases, those that escaped, the longest time and the most memory."""
    outcomes, escaped, longest, most = collections.Counter(), [], 0.0, 0
    context = multiprocessing.get_context("fork")  # a new interpreter would take longer than a thousand cases
    while numbers:
        with tempfile.TemporaryDirectory() as folder:
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(target=work, args=(kind, numbers, seed, folder, sender))
            worker.start()
            sender.close()
            done, at = False, numbers.start
            try:
                while not done and receiver.poll(_STUCK_SECONDS):
                    result = receiver.recv()
                    done = result is None
                    if not done:
                        at, outcome, seconds, peak = result[0] + 1, *result[1:]
                        outcomes[outcome] += 1
                        longest, most = max(longest, seconds), max(most, peak)
                        if outcome not in ("read", "refused"):
                            escaped.append((kind, at - 1, outcome))
            except EOFError:
                pass
            if not done:
                worker.kill()
                outcomes["ended or hung the process"] += 1
                escaped.append((kind, at, "ended or hung the process"))
                at += 1
            worker.join()
            numbers = range(at, numbers.stop)
    return outcomes, escaped, longest, most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="cases, of all kinds together")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each kind")
    parser.add_argument("--kind", action="append", help="only this kind; may be given several times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON Lines: a line for each kind, as soon as it is done")
    arguments = parser.parse_args()
    kinds = arguments.kind or list(damage.SOURCES)
    count, all_escaped = -(-arguments.count // len(kinds)), []
    for kind in kinds:
        numbers = range(arguments.first, arguments.first + count)
        outcomes, escaped, longest, most = run_kind(kind, numbers, arguments.seed)
        all_escaped += escaped
        print(f"{kind}: {dict(outcomes)}, at most {longest:.1f} s and {most / 2**20:.0f} MiB more", flush=True)
        if arguments.output:
            line = {"kind": kind, "outcomes": outcomes, "seconds": longest, "bytes": most, "escaped": escaped}
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    print(f"{len(all_escaped)} of {count * len(kinds)} escaped", *all_escaped[:50], sep="\n")
    return int(bool(all_escaped))


if __name__ == "__main__":
    sys.exit(main())
