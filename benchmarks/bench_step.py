"""Time and memory of one LoRA training step at the published sizes, compared with inference on one volume.

    python benchmarks/bench_step.py

Weights and volumes are random, which costs as much as real ones. Each case runs in a process of its own: inference on
one volume with 36 prompts, and steps (forward, backward, AdamW) with the adapters of `train.py` in the attention of
both encoders. Prints a Markdown table; the ratio to inference compares across machines and loads, seconds do not.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from bench_inference import GIGABYTE, best_seconds, peak_bytes, prompts
from transformers.utils import logging

from medct import MedCTConfig, MedCTModel
from medct.common.host import keep_freed_memory
from medct.training.lora import add_lora, core
from medct.training.objectives import StepLoss

# name: volumes in a batch, whether activations are recomputed instead of kept
STEPS = {
    "step, batch 1": (1, False),
    "step, batch 1, checkpointing": (1, True),
    "step, batch 2, checkpointing": (2, True),
}
INFERENCE = "inference, batch 1"


def measure(case: str, repeats: int) -> dict[str, Any]:
    """Best seconds and peak bytes of a case.

    Args:
        case: `INFERENCE`, or one of `STEPS`.
        repeats: Timed runs; the best counts.
    """
    torch.manual_seed(0)
    model = MedCTModel(MedCTConfig())
    batch, checkpointing = STEPS.get(case, (1, False))
    volumes = torch.rand(batch, 1, *model.config.vision_config.image_size) * 2 - 1
    texts = prompts(model.config)
    if case == INFERENCE:
        model.eval()
        with torch.inference_mode():
            seconds = best_seconds(lambda: model(pixel_values=volumes, **texts), repeats)
        return {"seconds": seconds, "peak": peak_bytes()}

    labels = torch.randint(2, (batch, model.config.num_labels)).float()
    adapted = add_lora(model).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(parameter for parameter in adapted.parameters() if parameter.requires_grad)

    def step() -> None:
        StepLoss("prompts").backward(core(adapted), [{"pixel_values": volumes, "labels": labels}], [texts])
        optimizer.step()
        optimizer.zero_grad()

    return {"seconds": best_seconds(step, repeats), "peak": peak_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="timed runs of each case, the best counts (default: 2)")
    parser.add_argument("--case", choices=[INFERENCE, *STEPS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    if arguments.case:
        keep_freed_memory()
        print(json.dumps(measure(arguments.case, arguments.repeats)))
        return
    print("| case | seconds | seconds a volume x inference | peak, GB |\n| --- | ---: | ---: | ---: |")
    inference_s = 0.0
    for case in (INFERENCE, *STEPS):
        command = [sys.executable, __file__, "--case", case, "--repeats", str(arguments.repeats)]
        found = json.loads(subprocess.check_output(command))
        inference_s = inference_s or found["seconds"]
        volumes, _ = STEPS.get(case, (1, False))
        ratio = found["seconds"] / volumes / inference_s
        print(f"| {case} | {found['seconds']:.2f} | {ratio:.2f} | {found['peak'] / GIGABYTE:.2f} |", flush=True)


if __name__ == "__main__":
    main()
