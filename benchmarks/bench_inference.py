"""Time and memory for 18 findings of a volume at the published sizes, compared with the least that the machine allows.

    python benchmarks/bench_inference.py

Weights are random and volumes are noise or synthetic phantoms; they cost as much as real ones. The floor is the number
of operations that the model needs, counted by torch, at the rate of torch's fastest matrix product of that precision on
the machine, which is measured with each timing. Each case runs in a process of its own, so that its peak memory is its
own. Then the scores of other formulations and precisions are compared with those of float32, for the random model and
for the small trained one that comes with the package. Prints Markdown tables; ratios to the floor compare across
machines and loads, seconds do not.
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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer
from transformers.utils import logging

from medct import MedCTConfig, MedCTImageProcessor, MedCTModel, zero_shot_probabilities
from medct.common.host import keep_freed_memory
from medct.data.phantoms import make_phantom
from medct.kernels_medct import linear

# Published script, published sizes, 2 cores: 18 passes of the vision encoder over the same volume.
PUBLISHED_S = 302.0
GIGABYTE = 10**9
TRAINED = Path(__file__).parents[1] / "phantom_base"  # the random model uses its tokenizer, too
TRAINED_PHANTOMS = 24
FORMULATIONS = {
    "eager": ("float32", "eager"),
    "weights rounded to bfloat16, products in float32": ("rounded", "sdpa"),
    "bfloat16": ("bfloat16", "sdpa"),
}
PRODUCTS = {"torch.nn.Linear": F.linear, "as a convolution": linear}
RANDOM_NOISE = "random, noise"
TOKEN_ERRORS, TOKEN_ERROR_DRAWS = (1e-6, 1e-5, 3e-5, 1e-4), 5
RATE_SIZES = (1024, 2048)  # edges of the square matrices used to measure the machine's rate


def best_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest run, after one that does not count.

    Args:
        run: What to time.
        repeats: Number of runs that count.
    """
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def product_rates(dtype: torch.dtype) -> dict[str, float]:
    """Operations per second of this machine's matrix product, by each of torch's two libraries."""
    rates = {}
    for name, product in PRODUCTS.items():
        squares = [torch.randn(size, size, dtype=dtype) for size in RATE_SIZES]
        rates[name] = max(
            2 * len(square) ** 3 / best_seconds(partial(product, square, square), 5) for square in squares
        )
    return rates


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def prompts(config: MedCTConfig) -> dict[str, torch.Tensor]:
    """The 36 sentences; the small tokenizer splits their words into about as many pieces as the published one."""
    return dict(AutoTokenizer.from_pretrained(TRAINED)(config.label_prompts()[0], padding=True, return_tensors="pt"))


def phantoms(processor: MedCTImageProcessor, seeds: range) -> torch.Tensor:
    """Phantoms of site A and site B in turn, `(2 * seeds, 1, z, y, x)`.

    Args:
        processor: The model's.
        seeds: Numbers of the patients.
    """
    made = [make_phantom(seed, site) for seed in seeds for site in ("A", "B")]
    pixels = [processor(each["volume"], affine=each["affine"], return_tensors="pt").pixel_values for each in made]
    return torch.cat(pixels)


def volumes(folder: Path, config: MedCTConfig) -> dict[str, torch.Tensor]:
    """The volumes that scores are compared on, `(volumes, 1, z, y, x)` each, by description.

    Args:
        folder: Folder of the model.
        config: The model's configuration.
    """
    if folder == TRAINED:
        processor = MedCTImageProcessor.from_pretrained(folder)
        # Seeds that its training and the default run do not use.
        seeds = range(10**6, 10**6 + TRAINED_PHANTOMS // 2)
        return {f"trained on SYNTHETIC phantoms, {TRAINED_PHANTOMS} others": phantoms(processor, seeds)}
    noise = torch.rand(1, 1, *config.vision_config.image_size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return {
        RANDOM_NOISE: noise,
        "random, 2 SYNTHETIC phantoms": phantoms(MedCTImageProcessor(), range(1)),
    }


def count_operations() -> dict[str, float]:
    """Floating-point operations of the vision encoder, and of 18 findings, counted without running anything."""
    with torch.device("meta"):
        model = MedCTModel(MedCTConfig()).eval()
    model.set_attn_implementation("eager")
    pixels = torch.empty(1, 1, *model.config.vision_config.image_size, device="meta")
    # No mask, since the text encoder would look at its values; padding costs as much as words.
    input_ids = prompts(model.config)["input_ids"].to("meta")
    counts = {}
    runs = {
        "vision": lambda: model.vision_model(pixels),
        "findings": lambda: model(pixel_values=pixels, input_ids=input_ids),
    }
    for name, run in runs.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        counts[name] = float(counter.get_total_flops())
    return counts


def make(folder: Path) -> None:
    """Write random weights that keep vector lengths; freshly initialised, all prompts agree to five digits."""
    torch.manual_seed(0)
    model = MedCTModel(MedCTConfig())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embeddings" not in name:
                weight.normal_(std=weight[0].numel() ** -0.5)
    model.save_pretrained(folder)


def current_bytes() -> int:
    """Memory that this process holds now; an earlier peak would hide what loading takes."""
    pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]
    return int(pages) * resource.getpagesize()


def load(folder: Path) -> dict[str, float]:
    """Peak memory while loading, above that before, as a ratio to the size of the weights."""
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
    # What is mapped from the file enters memory only when it is read.
    for tensor in weights:
        tensor.sum()
    done.set()
    watcher.join()
    most, size = max(most, current_bytes()), sum(tensor.nbytes for tensor in weights)
    return {"ratio": (most - before) / size, "weights": size}


@torch.inference_mode()
def score(folder: Path, dtype: str, repeats: int) -> dict[str, Any]:
    """Seconds of the vision encoder and of 18 findings, the machine's rates, and peak memory in bytes.

    Args:
        folder: Folder of the model.
        dtype: "float32" or "bfloat16".
        repeats: Timed runs; the best counts.
    """
    model = MedCTModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    texts = prompts(model.config)
    pixels = torch.rand(1, 1, *model.config.vision_config.image_size) * 2 - 1
    found: dict[str, Any] = {}
    before = product_rates(model.dtype)
    found["vision_s"] = best_seconds(lambda: model.vision_model(pixels), repeats)
    found["findings_s"] = best_seconds(lambda: model(pixel_values=pixels, **texts), repeats)
    after = product_rates(model.dtype)
    found["rates"] = {name: max(before[name], after[name]) for name in PRODUCTS}
    return found | {"peak": peak_bytes()}


@torch.inference_mode()
def answer(folder: Path, precision: str, attention: str) -> dict[str, Any]:
    """Scores and codebook rows of every volume.

    Args:
        folder: Folder of the model.
        precision: "float32", "bfloat16", or "rounded": bfloat16 weights in a float32 model.
        attention: Name of an attention implementation of transformers.
    """
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    model = MedCTModel.from_pretrained(folder, dtype=dtype).eval()
    if precision == "rounded":
        model.float()
    model.set_attn_implementation(attention)
    text_embeds = model.get_text_features(**prompts(model.config)).pooler_output
    found = {}
    for name, pixels in volumes(folder, model.config).items():
        encoded = [model.get_image_features(each) for each in pixels.split(1)]
        logits = model.get_logits(torch.cat([each.pooler_output for each in encoded]), text_embeds)
        found[name] = {
            "scores": zero_shot_probabilities(logits).tolist(),
            "ids": torch.cat([each.codebook_ids for each in encoded]).tolist(),
        }
    return found


@torch.inference_mode()
def borders(folder: Path) -> list[list[float]]:
    """What a small error of the tokens becomes: nothing, until one of them takes another row of the codebook.

    Args:
        folder: Folder of the random model.

    Returns:
        For each size of the error, as a share of a token's length, and each of some draws of it: the size, the tokens
        in another row, and the largest change of a logit.
    """
    model = MedCTModel.from_pretrained(folder).eval()
    quantizer, taken = model.vision_model.quantizer, []
    hook = quantizer.register_forward_pre_hook(lambda _, inputs: taken.extend(inputs))
    expected = model.get_image_features(volumes(folder, model.config)[RANDOM_NOISE][:1])
    hook.remove()
    tokens, dtype = taken
    text_embeds = model.get_text_features(**prompts(model.config)).pooler_output
    logits, found = model.get_logits(expected.pooler_output, text_embeds), []
    for size in TOKEN_ERRORS:
        for seed in range(TOKEN_ERROR_DRAWS):
            error = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(seed))
            error *= size * tokens.norm(dim=-1, keepdim=True) / error.norm(dim=-1, keepdim=True)
            rows, ids = quantizer(tokens + error, dtype)
            embeds = F.normalize(model.visual_projection(rows.mean(dim=1).flatten(1)), dim=-1)
            others = (ids.flatten() != expected.codebook_ids.flatten()).sum()
            found.append([size, others.item(), (model.get_logits(embeds, text_embeds) - logits).abs().max().item()])
    return found


def border_rows(found: list[list[float]]) -> list[str]:
    """One table row for each size of the error.

    Args:
        found: From `borders`.
    """
    rows = []
    for size in TOKEN_ERRORS:
        counts, changes = zip(*((count, change) for each, count, change in found if each == size), strict=True)
        rows.append(f"| {size:.0e} | {min(counts)} to {max(counts)} | {min(changes):.2g} to {max(changes):.2g} |")
    return rows


def timing_rows(operations: dict[str, float], found: dict[str, dict[str, Any]]) -> list[str]:
    """One table row for each measured time.

    Args:
        operations: From `count_operations`.
        found: From `score`, by dtype.
    """
    rows = []
    for dtype, case in found.items():
        for name, what in (("vision", "vision encoder"), ("findings", "18 findings")):
            floor_s, seconds = operations[name] / max(case["rates"].values()), case[f"{name}_s"]
            times = f"1/{PUBLISHED_S / seconds:.0f}" if name == "findings" else ""
            rows.append(
                f"| {what}, {dtype} | {seconds:.2f} | {floor_s:.2f} | {seconds / floor_s:.2f} | {times} "
                f"| {case['peak'] / GIGABYTE:.2f} |"
            )
    return rows


def agreement_row(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """How far the scores of some volumes are from float32's, and how far findings keep their order within a volume.

    Args:
        expected: From `answer` in float32, for one description.
        found: From `answer` in another formulation or precision, for the same.
    """
    want, got = (torch.tensor(each["scores"]) for each in (expected, found))
    ids, expected_ids = (torch.tensor(each["ids"]) for each in (found, expected))
    one, other = torch.combinations(torch.arange(want.shape[1])).unbind(-1)
    gaps = want[:, one] - want[:, other]
    is_swapped = gaps * (got[:, one] - got[:, other]) < 0
    return (
        f"| {(got - want).abs().max():.1e} | {(want.amax(1) - want.amin(1)).mean():.3f} "
        f"| {100 * (1 - is_swapped.float().mean()):.1f} % | {(gaps.abs() * is_swapped).max():.4f} "
        f"| {100 * (ids != expected_ids).float().mean():.2f} % |"
    )


def child(folder: Path, *case: object) -> Any:
    """Run a case in a process of its own, and return what it found."""
    command = [sys.executable, __file__, "--folder", folder, "--case", *case]
    output = subprocess.check_output([str(part) for part in command])
    return json.loads(output) if output else None


def report(folder: Path, repeats: int) -> None:
    """Measure every case and print the tables.

    Args:
        folder: Where to write the random model.
        repeats: Timed runs of each case; the best counts.
    """
    child(folder, "make")
    operations = count_operations()
    print("| | seconds | floor, s | x floor | of the published 302 s | peak, GB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    timed = {dtype: child(folder, "score", dtype, repeats) for dtype in ("float32", "bfloat16")}
    print("\n".join(timing_rows(operations, timed)), flush=True)
    vision, findings = (operations[name] / 1e9 for name in ("vision", "findings"))
    print(f"\nFloor: {vision:.0f} and {findings:.0f} GFLOP at the faster of the rates that torch reaches, ", end="")
    print(f"{torch.get_num_threads()} threads. GFLOP/s:")
    for dtype, case in timed.items():
        print(f"{dtype}: {', '.join(f'{rate / 1e9:.0f} {name}' for name, rate in case['rates'].items())}")
    loaded = child(folder, "load")
    print(f"Loading: {loaded['ratio']:.2f} x the {loaded['weights'] / GIGABYTE:.2f} GB of the weights.\n", flush=True)
    print("| against float32 | model, volumes | largest difference | mean range of a volume's scores ", end="")
    print("| pairs of findings in order | widest gap swapped | other codebook rows |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for model in (folder, TRAINED):
        expected = child(model, "answer", "float32", "sdpa")
        for name, case in FORMULATIONS.items():
            found = child(model, "answer", *case)
            for each, answers in found.items():
                print(f"| {name} | {each} {agreement_row(expected[each], answers)}", flush=True)
    print("\n| tokens off by, share of their length | tokens in another codebook row | logits off by |")
    print("| ---: | ---: | ---: |")
    print("\n".join(border_rows(child(folder, "borders"))))


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
    keep_freed_memory()
    case, *values = arguments.case
    if case == "make":
        make(arguments.folder)
    elif case == "load":
        print(json.dumps(load(arguments.folder)))
    elif case == "borders":
        print(json.dumps(borders(arguments.folder)))
    elif case == "score":
        print(json.dumps(score(arguments.folder, values[0], int(values[1]))))
    else:
        print(json.dumps(answer(arguments.folder, *values)))


if __name__ == "__main__":
    main()
