"""Adapters at the published sizes: their bytes, and the time to check, load and switch between them.

    python benchmarks/bench_adapters.py

Weights are random: neither bytes nor times depend on them. Two adapters on attention of both encoders share one base,
which is never reloaded.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from medct import MedCTConfig, MedCTModel
from medct.adapters_medct import WEIGHTS_FILE, describe_adapter, fingerprint
from medct.training.lora import TARGETS

CT_CLIP_BYTES = 1_770_000_000  # CT-CLIP_v2.pt
ADAPTERS = ("first", "second")


def seconds_of(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def save_adapters(model: MedCTModel, folder: Path, rank: int) -> None:
    """Write two adapters as `folder/first` and `folder/second`; the model is left without them.

    Args:
        model: The base.
        folder: Where to write.
        rank: Rank of the matrices.
    """
    lora = LoraConfig(r=rank, target_modules=TARGETS["both"], task_type="FEATURE_EXTRACTION", init_lora_weights=False)
    peft = get_peft_model(model, lora, adapter_name=ADAPTERS[0])
    peft.add_adapter(ADAPTERS[1], lora)
    peft.save_pretrained(folder)
    peft.unload()
    for name in ADAPTERS:
        describe_adapter(model, folder / name, base="random")


def load_and_switch(model: MedCTModel, folder: Path, repeats: int) -> tuple[float, float]:
    """Median seconds to load an adapter, and to switch from one to the other.

    Args:
        model: A transformers or PEFT model.
        folder: From `save_adapters`.
        repeats: Number of switches.
    """
    loads = [
        seconds_of(lambda name=name: model.load_adapter(str(folder / name), adapter_name=name)) for name in ADAPTERS
    ]
    switches = [seconds_of(lambda run=run: model.set_adapter(ADAPTERS[run % 2])) for run in range(repeats)]
    return statistics.median(loads), statistics.median(switches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA matrices (default: 16)")
    parser.add_argument("--repeats", type=int, default=20, help="switches to time (default: 20)")
    arguments = parser.parse_args()
    model = MedCTModel._from_config(MedCTConfig(text_config={"model_type": "bert"})).eval()
    base_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_adapters(model, folder, arguments.rank)
        adapter_bytes = (folder / ADAPTERS[0] / WEIGHTS_FILE).stat().st_size
        fingerprint_s = statistics.median(seconds_of(lambda: fingerprint(model)) for _ in range(3))
        # PEFT needs a first adapter when it wraps the model.
        peft = PeftModel.from_pretrained(model, folder / ADAPTERS[0], adapter_name="wrapping")
        peft_load_s, peft_switch_s = load_and_switch(peft, folder, arguments.repeats)
        load_s, switch_s = load_and_switch(peft.unload(), folder, arguments.repeats)
    rows = {
        f"adapter of rank {arguments.rank}": f"{adapter_bytes:,} bytes",
        "as a share of CT-CLIP_v2.pt, 1.77 GB": f"1/{CT_CLIP_BYTES / adapter_bytes:.0f} (aim: 1/260 at most)",
        f"fingerprint of the base, {base_bytes / 1e9:.2f} GB": f"{fingerprint_s:.2f} s",
        "load an adapter, `MedCTModel.load_adapter`, checked": f"{load_s:.2f} s",
        "load an adapter, `PeftModel.load_adapter`, unchecked": f"{peft_load_s:.2f} s",
        "switch, `MedCTModel.set_adapter`": f"{1000 * switch_s:.1f} ms (aim: under 50 ms)",
        "switch, `PeftModel.set_adapter`": f"{1000 * peft_switch_s:.1f} ms (aim: under 50 ms)",
    }
    print(f"| published sizes, random weights, {torch.get_num_threads()} threads | |\n| --- | ---: |")
    print("\n".join(f"| {what} | {found} |" for what, found in rows.items()))


if __name__ == "__main__":
    main()
