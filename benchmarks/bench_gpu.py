"""Speed and memory of the model on a card, as shares of what the card's own matrix products reach in the same run.

    python benchmarks/bench_gpu.py

Published sizes, random weights and volumes, which cost as much as real ones. Prints Markdown tables: the vision encoder
by precision and batch, with kernels of Triton and without; tokens that take another row of the codebook than on the
CPU; a LoRA step; loading; and whole studies, from files to embeddings. `--tiny` makes everything so
small that it runs on a CPU in seconds, with numbers that mean nothing.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import gpu_studies
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig
from transformers.utils import logging

from medct import MedCTConfig, MedCTModel, graphs_medct, kernels_medct
from medct.training.lora import add_lora, core, leave_casts_to_autocast
from medct.training.objectives import StepLoss

GIGABYTE = 10**9
TINY_VISION = {"image_size": [4, 8, 8], "patch_size": [2, 4, 4], "hidden_size": 32, "num_attention_heads": 2}
TINY_VISION |= {"head_dim": 16, "num_spatial_layers": 1, "num_temporal_layers": 1, "codebook_size": 40}
TINY_TEXT = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
# Precision: that of the weights, whether float32 is multiplied as TF32, whether autocast is on.
PRECISIONS = {
    "bf16 weights": (torch.bfloat16, False, False),
    "bf16 autocast": (torch.float32, False, True),
    "tf32": (torch.float32, True, False),
    "fp32": (torch.float32, False, False),
}
# Whether kernels of Triton are used, and launches recorded.
WAYS = {"": (True, True), ", launches one by one": (True, False), ", plain": (False, False)}
CEILING_OF = {"bf16 weights": "bf16", "bf16 autocast": "bf16", "tf32": "tf32", "fp32": "fp32"}
BATCHES = (1, 4, 8, 16)
STEP_BATCHES = (1, 8)

LOAD = """
import sys, time, torch
from medct import MedCTModel
folder, device = sys.argv[1:]
torch.zeros(1, device=device)  # the driver's own start is not part of it
started = time.perf_counter()
model = MedCTModel.from_pretrained(folder, dtype=torch.bfloat16, device_map=device).eval()
loaded = time.perf_counter()
pixels = torch.zeros(1, 1, *model.config.vision_config.image_size, device=device)
with torch.inference_mode():
    model.get_image_features(pixels).pooler_output.sum().item()
print(loaded - started, time.perf_counter() - started)
"""


def seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float, float]:
    """Seconds of the first run, and the median of those that follow.

    Args:
        run: What to time.
        device: Where it runs.
        repeats: Number of runs after the first.
    """
    taken = []
    for _ in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        taken.append(time.perf_counter() - started)
    return taken[0], statistics.median(taken[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def peak(device: torch.device) -> Iterator[list[float]]:
    """Appends the most memory that was taken meanwhile, in GB; nothing on a CPU."""
    found: list[float] = []
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    found.append(torch.cuda.max_memory_allocated(device) / GIGABYTE if device.type == "cuda" else float("nan"))


@contextmanager
def tf32(is_on: bool) -> Iterator[None]:
    """Products of float32 as TF32, or exact."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if is_on else "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def ceilings(device: torch.device, size: int) -> dict[str, float]:
    """FLOP/s of one large product, by precision.

    Args:
        device: Where.
        size: Edge of the square matrices.
    """
    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32), ("fp32", torch.float32)):
        one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        with tf32(name == "tf32"):
            found[name] = 2 * size**3 / seconds(lambda one=one, other=other: one @ other, device, 9)[1]
    return found


def operations(config: MedCTConfig) -> float:
    """Floating-point operations of the vision encoder for one volume, counted without running anything."""
    with torch.device("meta"):
        model = MedCTModel(config).eval()
    model.set_attn_implementation("eager")
    pixels = torch.empty(1, 1, *config.vision_config.image_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.vision_model(pixels)
    return float(counter.get_total_flops())


def write_model(folder: Path, config: MedCTConfig, device: torch.device) -> None:
    """Write random weights that keep vector lengths.

    Args:
        folder: Where.
        config: Sizes.
        device: Where they are drawn.
    """
    torch.manual_seed(0)
    with device:
        model = MedCTModel(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embeddings" not in name:
                weight.normal_(std=weight[0].numel() ** -0.5)
    model.save_pretrained(folder)


class Bench:
    """Everything that is measured, on one device with one model.

    Args:
        folder: Holds the model.
        device: Where to run.
        repeats: Timed runs of each case; the median counts.
        batches: Volumes at a time.
    """

    def __init__(self, folder: Path, device: torch.device, repeats: int, batches: tuple[int, ...]):
        self.folder, self.device, self.repeats, self.batches = folder, device, repeats, batches
        self.config = MedCTConfig.from_pretrained(folder)

    def load(self, dtype: torch.dtype, device: torch.device | None = None) -> MedCTModel:
        """The model, anew.

        Args:
            dtype: Precision of its weights.
            device: Where; that of all measurements by default.
        """
        return MedCTModel.from_pretrained(self.folder, dtype=dtype, device_map=device or self.device).eval()

    def volumes(self, batch: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(batch)
        shape = (batch, 1, *self.config.vision_config.image_size)
        return torch.rand(shape, device=self.device, generator=generator) * 2 - 1

    def autocast(self, is_on: bool) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if is_on else nullcontext()

    def encoder(self, rates: dict[str, float]) -> dict[str, float]:
        """Print the vision encoder's rows; seconds a volume of the largest batch by precision are returned.

        Args:
            rates: From `ceilings`.
        """
        work, best = operations(self.config), {}
        print("| vision encoder | batch | ms a volume | volumes/s | share of ceiling | peak, GB | first call, s |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for way, (kernels_medct.use_triton, graphs_medct.use_graphs) in WAYS.items():
            for name, (dtype, is_tf32, is_autocast) in PRECISIONS.items():
                vision = self.load(dtype).vision_model
                for batch in self.batches if way == "" else self.batches[:1]:
                    pixels = self.volumes(batch)
                    with torch.inference_mode(), tf32(is_tf32), self.autocast(is_autocast), peak(self.device) as most:
                        first, each = seconds(lambda v=vision, p=pixels: v(p), self.device, self.repeats)
                    each /= batch
                    best[name] = min(each, best.get(name, each))
                    share = work / each / rates[CEILING_OF[name]]
                    print(
                        f"| {name}{way} | {batch} | {each * 1e3:.2f} | {1 / each:.0f} "
                        f"| {share:.2f} | {most[0]:.1f} | {first:.1f} |",
                        flush=True,
                    )
                del vision
        kernels_medct.use_triton = graphs_medct.use_graphs = True
        return best

    def borders(self) -> None:
        """Print how many tokens take another row than in float32 on the CPU, and how near their rows are to each other.

        A token at the border of two rows has the same similarity to both but for rounding. With the CPU's rows in place
        of the card's the embedding is the CPU's again.
        """
        pixels, cpu = self.volumes(1), torch.device("cpu")
        model = self.load(torch.float32, cpu)
        seen: list[torch.Tensor] = []
        model.vision_model.temporal_encoder.register_forward_hook(lambda *outputs: seen.append(outputs[-1]))
        with torch.inference_mode():
            expected = model.get_image_features(pixels.cpu())
        tokens = F.normalize(seen[0].double().transpose(1, 2).flatten(0, 2), dim=-1)
        codes = F.normalize(model.vision_model.quantizer.codebook.double(), dim=-1)
        print("| float32 on the CPU against | tokens in another row | largest gap of their similarities | embedding |")
        print("| --- | ---: | ---: | ---: |")
        for name, (dtype, is_tf32, is_autocast) in PRECISIONS.items():
            with torch.inference_mode(), tf32(is_tf32), self.autocast(is_autocast):
                found = self.load(dtype).get_image_features(pixels)
            ids, others = expected.codebook_ids.flatten(), found.codebook_ids.cpu().flatten()
            gaps = (tokens * (codes[ids] - codes[others])).sum(dim=-1)
            far = (found.pooler_output.cpu() - expected.pooler_output).abs().max()
            share = (ids != others).double().mean()
            print(f"| {name} | {100 * share:.3f} % | {gaps.max():.1e} | {far:.1e} |", flush=True)

    def steps(self, inference: dict[str, float]) -> None:
        """Print the rows of a LoRA step beside the vision encoder's attention; the text is encoded once before.

        Args:
            inference: Seconds a volume of the base, from `encoder`.
        """
        print("| LoRA step, bf16 autocast | ms a volume | x the base's inference | x with the adapter | peak, GB |")
        print("| --- | ---: | ---: | ---: | ---: |")
        model = self.load(torch.float32)
        adapted = add_lora(model, targets="vision")
        leave_casts_to_autocast(adapted)
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        labels = model.config.num_labels
        texts = [F.normalize(torch.randn(2 * labels, self.config.projection_dim, device=self.device), dim=-1)]
        loss = StepLoss("prompts", autocast=lambda: self.autocast(True))
        for batch in STEP_BATCHES:
            studies = {"pixel_values": self.volumes(batch), "labels": torch.ones(batch, labels, device=self.device)}

            def step(studies: dict[str, torch.Tensor] = studies) -> None:
                loss.backward(core(adapted), [studies], [], texts)
                optimizer.step()
                optimizer.zero_grad()

            with peak(self.device) as most:
                each = seconds(step, self.device, self.repeats)[1] / batch
            with torch.inference_mode(), self.autocast(True):
                own = seconds(lambda s=studies: model.vision_model(s["pixel_values"]), self.device, self.repeats)[1]
            print(
                f"| batch {batch} | {each * 1e3:.1f} | {each / inference['bf16 autocast']:.2f} "
                f"| {each / (own / batch):.2f} | {most[0]:.1f} |",
                flush=True,
            )

    def loading(self) -> None:
        """Print the seconds from a file to a score, in a process of its own."""
        command = [sys.executable, "-c", LOAD, str(self.folder), str(self.device)]
        loaded, scored = map(float, subprocess.check_output(command, encoding="utf-8").split()[-2:])
        print(f"Loading to the card: {loaded:.2f} s; first score {scored:.2f} s after the start, imports apart.")


def whole_studies(bench: Bench, tiny: bool, scans: Path | None) -> None:
    """Print studies a second from files to embeddings, and from prepared shards.

    Args:
        bench: Holds the model.
        tiny: Whether scans are so small that a CPU does it in seconds.
        scans: Folder to write the scans to, or to find them in.
    """
    vision = bench.load(torch.bfloat16).vision_model
    cores = os.cpu_count() or 1
    size = (
        {"shape": (12, 12, 6), "processes": (1,), "studies_per_process": 2}
        if tiny
        else {"processes": sorted({1, cores})}
    )
    with torch.inference_mode():
        rows = gpu_studies.whole_studies(
            bench.device, vision_config=vision.config.to_dict(), use=vision, folder=scans, **size
        )
    print(gpu_studies.table(rows), flush=True)


def report(tiny: bool, device: torch.device, repeats: int, scans: Path | None = None) -> None:
    """Measure everything and print it.

    Args:
        tiny: Whether sizes are so small that a CPU does it in seconds.
        device: Where to run.
        repeats: Timed runs of each case.
        scans: Folder to write the scans of whole studies to, or to find them in; a temporary one by default.
    """
    text = BertConfig(intermediate_size=8, **TINY_TEXT) if tiny else None
    config = MedCTConfig(text_config=text, vision_config=TINY_VISION, projection_dim=8) if tiny else MedCTConfig()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    kernels = "with" if kernels_medct.runs_kernels(device) else "without"
    rates = ceilings(device, 64 if tiny else 8192)
    shown = ", ".join(f"{key} {rate / 1e12:.0f}" for key, rate in rates.items())
    print(f"{name}, torch {torch.__version__}, {kernels} Triton. Products, TFLOP/s: {shown}.\n")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), config, device)
        bench = Bench(Path(folder), device, repeats, BATCHES[:2] if tiny else BATCHES)
        inference = bench.encoder(rates)
        for part in (lambda: bench.steps(inference), bench.borders, bench.loading):
            print()
            part()
        print()
        whole_studies(bench, tiny, scans)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, to try the script itself")
    parser.add_argument(
        "--repeats", type=int, default=9, help="timed runs of each case, the median counts (default: 9)"
    )
    parser.add_argument("--device", type=torch.device, help="default: the first card, or the CPU")
    parser.add_argument("--scans", type=Path, help="folder for the scans of whole studies, to use them again")
    parsed = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = parsed.device or torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    report(parsed.tiny, device, parsed.repeats, parsed.scans)


if __name__ == "__main__":
    main()
