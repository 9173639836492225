"""What a card is asked to do for a batch of volumes, counted without a card: launches, and bytes of its memory.

    python benchmarks/gpu_launches.py --batch 8 --compile 80 90

Published sizes, bfloat16. Tensors hold no data, and what would be launched is written down in its place. Each tensor
that a launch takes or makes counts once, and twice if it is overwritten: less cannot go through memory. With
`--compile` the kernels of Triton are compiled for cards of these compute capabilities; bytes on the stack were spilled.

Needs Triton, which torch for CUDA brings.
"""

import argparse
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from medct import (
    MedCTConfig,
    MedCTModel,
    kernels_medct,
    layers_medct,
    modeling_medct,
    triton_launch_medct,
    triton_products_medct,
)

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
NO_LAUNCHES = ("aten.empty", "aten.new_empty", "aten._unsafe_view")
H100_BYTES_PER_SECOND = 3.35e12
"""Of its memory, by the data sheet."""


@dataclass(frozen=True)
class Kernel:
    """A kernel of Triton with all that decides how it is compiled."""

    function: JITFunction = field(hash=False, compare=False)
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]

    def resources(self, capability: int) -> str:
        """Compile it, and say what a thread takes.

        Args:
            capability: Ten times the card's compute capability.

        Returns:
            "REG:n STACK:n SHARED:n", the last in bytes a program.
        """
        names = self.function.arg_names
        aligned = {(i,): [["tt.divisibility", 16]] for i, (_, kind) in enumerate(self.signature) if kind[0] == "*"}
        constants = {(names.index(name),): value for name, value in self.constants}
        source = ASTSource(self.function, dict(self.signature), constants, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(self.options))
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with TemporaryDirectory() as folder:
            (Path(folder) / "kernel.cubin").write_bytes(compiled.asm["cubin"])
            command = [str(tool), "-res-usage", str(Path(folder) / "kernel.cubin")]
            printed = subprocess.check_output(command, encoding="utf-8", stderr=subprocess.STDOUT)
        return " ".join([*re.findall(r"(?:REG|STACK):\d+", printed), f"SHARED:{compiled.metadata.shared}"])


class Launches(TorchDispatchMode):
    """While it lasts, writes down what would be launched on a card.

    Raises:
        RuntimeError: If a tensor in main memory takes part, for which a card would have to wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[tuple[str, int]] = []
        self.kernels: set[Kernel] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = function(*args, **(kwargs or {}))
        name = str(function)
        taken, results = (tensors(each) for each in ((args, kwargs), made))
        if any(each.device.type != "meta" for each in (*taken, *results)):
            raise RuntimeError(f"{name} reaches into main memory.")
        if not function.is_view and not name.startswith(NO_LAUNCHES):
            self.bytes.append((name.split(".")[1], size(taken) + size(results)))
        return made

    def launch(self, function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        """Write down a launch; stands in for `JITFunction.run`.

        Args:
            function: The kernel.
            args: What it is called with.
            grid: Not used.
            warmup: Not used.
            kwargs: What it is called with by name, and options.
        """
        named = dict(zip(function.arg_names, args, strict=False)) | kwargs
        constants = {each.name for each in function.params if each.is_constexpr}
        self.bytes.append((function.__name__.strip("_").removesuffix("_kernel"), size(tensors(args))))
        self.kernels.add(
            Kernel(
                function,
                function.__name__,
                tuple((name, "constexpr" if name in constants else kind(named[name])) for name in function.arg_names),
                tuple((name, named[name]) for name in function.arg_names if name in constants),
                tuple((name, kwargs[name]) for name in ("num_warps", "num_stages") if name in kwargs),
            )
        )


def tensors(values: Any) -> list[torch.Tensor]:
    """The tensors among some arguments; of descriptors those that they describe."""
    leaves = [each.base if isinstance(each, TensorDescriptor) else each for each in tree_leaves(values)]
    return [each for each in leaves if isinstance(each, torch.Tensor)]


def size(values: list[torch.Tensor]) -> int:
    """Bytes of some tensors, each once."""
    return sum(each.numel() * each.element_size() for each in {id(each): each for each in values}.values())


def kind(value: Any) -> str:
    """The type of an argument, in Triton's words."""
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    return "fp32" if isinstance(value, float) else "i32"


@contextmanager
def recorded() -> Iterator[Launches]:
    """Write down what is launched, with kernels taken for right and every tensor for one on a card."""
    launches = Launches()
    with (
        mock.patch.object(JITFunction, "run", lambda function, *a, **k: launches.launch(function, *a, **k)),
        mock.patch.object(kernels_medct, "runs_kernels", lambda _: True),
        mock.patch.object(layers_medct, "agree", lambda *_: True),
        torch.no_grad(),  # in which, unlike in inference mode, copies are calls of their own
        launches,
    ):
        yield launches


def encode(batch: int, dtype: torch.dtype = torch.bfloat16) -> Launches:
    """What the vision encoder launches for a batch of volumes, at the published sizes.

    Args:
        batch: Number of volumes.
        dtype: Precision of the weights.
    """
    config = MedCTConfig()
    with torch.device("meta"):
        vision = MedCTModel(config).eval().vision_model
    for name, module in vision.named_modules():
        if not any(part in name for part in modeling_medct.MedCTPreTrainedModel._keep_in_fp32_modules_strict):
            module._apply(lambda each: each.to(dtype) if each.is_floating_point() else each, recurse=False)
    with recorded() as launches:
        vision(torch.empty(batch, 1, *config.vision_config.image_size, device="meta"))
    return launches


def table(batch: int) -> str:
    """Launches and bytes of the vision encoder, with kernels of Triton and without.

    Args:
        batch: Number of volumes.
    """
    lines = [f"| batch {batch}, bf16 weights | launches | GB a volume |", "| --- | ---: | ---: |"]
    for with_kernels in (True, False):
        with mock.patch.object(kernels_medct, "use_triton", with_kernels):
            found = encode(batch).bytes
        total = sum(each for _, each in found) / batch
        if with_kernels:
            for name in sorted({name for name, _ in found}):
                own = [each for other, each in found if other == name]
                lines.append(f"| {name} | {len(own)} | {sum(own) / batch / 1e9:.3f} |")
        floor = total / H100_BYTES_PER_SECOND * 1e3
        label = f"all{'' if with_kernels else ', plain'} (at an H100's 3.35 TB/s {floor:.2f} ms a volume)"
        lines.append(f"| {label} | {len(found)} | {total / 1e9:.3f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="volumes at a time (default: 1 8)")
    parser.add_argument("--compile", type=int, nargs="+", default=[], metavar="SM", help="compute capabilities, as 90")
    parsed = parser.parse_args(arguments)
    for batch in parsed.batch:
        print(table(batch), end="\n\n", flush=True)
    for capability in parsed.compile:
        is_large = capability // 10 in triton_launch_medct.LARGE_TILES
        with mock.patch.object(triton_products_medct, "has_large_tiles", lambda _, is_large=is_large: is_large):
            kernels = encode(1).kernels
        for kernel in sorted(kernels, key=lambda each: each.name):
            print(f"sm_{capability} {kernel.name}: {kernel.resources(capability)}", flush=True)


if __name__ == "__main__":
    main()
