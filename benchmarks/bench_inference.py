"""Seconds and memory of 18 findings for a volume at the published sizes, beside the least that the machine allows.

    python benchmarks/bench_inference.py

Weights are random and volumes are noise or synthetic phantoms; they cost what real ones cost. The floor is the number
of operations that the model needs, counted by torch, at the rate of the machine's own float32 matrix product, which is
measured beside each timing. Each case runs in a process of its own, so that its peak of memory is its own. Prints a
Markdown table; ratios to the floor compare across machines and loads, seconds do not.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer
from transformers.utils import logging

from medct import MedCTConfig, MedCTImageProcessor, MedCTModel, zero_shot_probabilities
from medct.phantoms import make_phantom

# Published script, published sizes, a machine of 2 cores: 18 passes of the vision encoder over the same volume.
PUBLISHED_S = 302.0
GIGABYTE = 10**9
TOKENIZER = Path(__file__).parents[1] / "phantom_base"
RATE_SIZE = 2048  # edge of the square matrices that the machine's rate is measured with


def best_seconds(run: Callable[[], Any], repeats: int) -> float:
    """The fastest of some runs, after one that does not count."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def matmul_rate() -> float:
    """Operations a second of this machine's float32 matrix product."""
    matrix = torch.randn(RATE_SIZE, RATE_SIZE)
    return 2 * RATE_SIZE**3 / best_seconds(lambda: matrix @ matrix, 5)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def prompts(config: MedCTConfig) -> dict[str, torch.Tensor]:
    """The 36 sentences; the small tokenizer cuts their words into about as many pieces as the published one."""
    return dict(AutoTokenizer.from_pretrained(TOKENIZER)(config.label_prompts()[0], padding=True, return_tensors="pt"))


def volumes(config: MedCTConfig) -> dict[str, torch.Tensor]:
    """Inputs with and without structure, `(1, 1, z, y, x)` each."""
    generator = torch.Generator().manual_seed(1)
    size = (1, 1, *config.vision_config.image_size)
    found = {"noise": torch.rand(size, generator=generator) * 2 - 1}
    for site in ("A", "B"):
        phantom = make_phantom(0, site)
        pixels = MedCTImageProcessor()(phantom["volume"], affine=phantom["affine"], return_tensors="pt")
        found[f"SYNTHETIC phantom of site {site}"] = pixels["pixel_values"]
    return found


def count_operations() -> dict[str, float]:
    """Floating point operations of the vision encoder, and of 18 findings, counted without running anything."""
    with torch.device("meta"):
        model = MedCTModel(MedCTConfig()).eval()
    model.set_attn_implementation("eager")
    pixels = torch.empty(1, 1, *model.config.vision_config.image_size, device="meta")
    # Without a mask, whose values the text encoder would look at: padding costs what words cost.
    input_ids = prompts(model.config)["input_ids"].to("meta")
    counts = {}
    runs = {
        "vision": lambda: model.vision_model(pixels),
        "findings": lambda: (model.get_image_features(pixels), model.get_text_features(input_ids)),
    }
    for name, run in runs.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        counts[name] = float(counter.get_total_flops())
    return counts


def make(folder: Path) -> None:
    """Random weights; fresh ones make every prompt the same to five digits, so these keep the lengths of vectors."""
    torch.manual_seed(0)
    model = MedCTModel(MedCTConfig())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embeddings" not in name:
                weight.normal_(std=weight[0].numel() ** -0.5)
    model.save_pretrained(folder)


def current_bytes() -> int:
    """Memory that this process holds now; its peak before loading would hide what loading takes."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def load(folder: Path) -> dict[str, float]:
    """Most memory that was held while loading, above what was held before, by the size of the weights."""
    before, most, done = current_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, current_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = MedCTModel.from_pretrained(folder)
    weights = [*model.parameters(), *model.buffers()]
    # What is mapped from the file is not in memory before it is read.
    for tensor in weights:
        tensor.sum()
    done.set()
    watcher.join()
    most, size = max(most, current_bytes()), sum(tensor.nbytes for tensor in weights)
    return {"ratio": (most - before) / size, "weights": size}


@torch.inference_mode()
def score(folder: Path, dtype: str, repeats: int) -> dict[str, Any]:
    """Seconds of the vision encoder and of 18 findings, the rate beside them, and memory."""
    model = MedCTModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    texts = prompts(model.config)
    pixels = torch.rand(1, 1, *model.config.vision_config.image_size) * 2 - 1
    found = {"rate": matmul_rate()}
    found["vision_s"] = best_seconds(lambda: model.vision_model(pixels), repeats)
    found["findings_s"] = best_seconds(lambda: model(pixel_values=pixels, **texts), repeats)
    found["rate"] = max(found["rate"], matmul_rate())
    return found | {"peak": peak_bytes()}


@torch.inference_mode()
def answer(folder: Path, dtype: str, attention: str) -> dict[str, Any]:
    """Scores and codebook rows of every volume, from `attention` and without its timing."""
    model = MedCTModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.set_attn_implementation(attention)
    text_embeds = model.get_text_features(**prompts(model.config)).pooler_output
    found = {}
    for name, pixels in volumes(model.config).items():
        encoded = model.get_image_features(pixels)
        logits = model.get_logits(encoded.pooler_output, text_embeds).float()
        found[name] = {
            "scores": zero_shot_probabilities(logits)[0].tolist(),
            "ids": encoded.codebook_ids.flatten().tolist(),
        }
    return found


def timing_rows(operations: dict[str, float], found: dict[str, dict[str, Any]]) -> list[str]:
    """One row for each measured time."""
    rows = []
    for dtype, case in found.items():
        for name, what in (("vision", "vision encoder"), ("findings", "18 findings")):
            floor_s, seconds = operations[name] / case["rate"], case[f"{name}_s"]
            times = f"1/{PUBLISHED_S / seconds:.0f}" if name == "findings" else ""
            rows.append(
                f"| {what}, {dtype} | {seconds:.2f} | {floor_s:.2f} | {seconds / floor_s:.2f} | {times} "
                f"| {case['peak'] / GIGABYTE:.2f} |"
            )
    return rows


def agreement_rows(expected: dict[str, Any], others: dict[str, dict[str, Any]]) -> list[str]:
    """How far the scores of other formulations are from float32's, volume by volume."""
    rows = []
    for what, answers in others.items():
        for volume, got in answers.items():
            want = torch.tensor(expected[volume]["scores"])
            scores = torch.tensor(got["scores"])
            ids = torch.tensor(got["ids"]) != torch.tensor(expected[volume]["ids"])
            places, expected_places = (each.argsort().argsort().float() for each in (scores, want))
            spearman = torch.corrcoef(torch.stack([places, expected_places]))[0, 1]
            one, other = torch.combinations(torch.arange(len(want))).unbind(-1)
            gaps = want[one] - want[other]
            is_swapped = gaps * (scores[one] - scores[other]) < 0
            widest = (gaps.abs() * is_swapped).max()
            rows.append(
                f"| {what} | {volume} | {(scores - want).abs().max():.1e} | {want.max() - want.min():.3f} "
                f"| {spearman:.3f} "
                f"| {100 * (1 - is_swapped.float().mean()):.1f} % | {widest:.4f} | {100 * ids.float().mean():.2f} % |"
            )
    return rows


def child(folder: Path, *case: object) -> Any:
    """What a case found, in a process of its own."""
    command = [sys.executable, __file__, "--folder", folder, "--case", *case]
    output = subprocess.check_output([str(part) for part in command])
    return json.loads(output) if output else None


def report(folder: Path, repeats: int) -> None:
    """Measure every case and print the tables."""
    child(folder, "make")
    operations = count_operations()
    print("| | seconds | floor, s | x floor | of the published 302 s | peak, GB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    timed = {dtype: child(folder, "score", dtype, repeats) for dtype in ("float32", "bfloat16")}
    print("\n".join(timing_rows(operations, timed)), flush=True)
    vision, findings = (operations[name] / 1e9 for name in ("vision", "findings"))
    print(f"\nFloor: {vision:.0f} and {findings:.0f} GFLOP at the float32 rate beside each case, ", end="")
    print(f"{timed['float32']['rate'] / 1e9:.0f} GFLOP/s beside the first; {torch.get_num_threads()} threads.")
    loaded = child(folder, "load")
    print(f"Loading: {loaded['ratio']:.2f} x the {loaded['weights'] / GIGABYTE:.2f} GB of the weights.\n", flush=True)
    expected = child(folder, "answer", "float32", "sdpa")
    others = {
        "float32, eager": child(folder, "answer", "float32", "eager"),
        "bfloat16": child(folder, "answer", "bfloat16", "sdpa"),
    }
    print("| against float32 | volume | largest difference | range of scores | rank correlation ", end="")
    print("| pairs in order | widest gap swapped | other codebook rows |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    print("\n".join(agreement_rows(expected, others)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each case, the best counts (default: 3)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not arguments.case:
        with tempfile.TemporaryDirectory() as folder:
            report(Path(folder), arguments.repeats)
        return
    case, *values = arguments.case
    if case == "make":
        make(arguments.folder)
    elif case == "load":
        print(json.dumps(load(arguments.folder)))
    elif case == "score":
        print(json.dumps(score(arguments.folder, values[0], int(values[1]))))
    else:
        print(json.dumps(answer(arguments.folder, *values)))


if __name__ == "__main__":
    main()
