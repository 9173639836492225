"""What the processes of a run do together: agree on what they run, gather rows, take sums, shard a model.

Losses and gradients are summed over processes, never averaged, because each process computes its own share of one loss.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as collectives
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from medct.common.files import first_difference
from medct.errors_medct import MedCTError, first_line

Started = TypeVar("Started")


class LaunchError(MedCTError, ValueError):
    """Processes that cannot work together; the message says why and what to do."""


def start_launch(start: Callable[..., Started], **options: Any) -> Started:
    """Meet the other processes of a launch.

    Args:
        start: `PartialState` or `Accelerator`.
        options: Of it.

    Raises:
        LaunchError: If accelerate cannot start as it was told to, or each process would do all of the work.
    """
    try:
        started = start(**options)
    except (ImportError, ValueError) as error:
        raise LaunchError(
            f"accelerate cannot start this launch: {first_line(error).rstrip('.')}. Use `accelerate launch` or "
            "`torchrun`, or unset WORLD_SIZE for a single process."
        ) from error
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if started.num_processes != launched:
        raise LaunchError(
            f"{launched} processes were started, but they are not connected. Without GPUs, add --cpu after the "
            "command's name."
        )
    return started


def process_rank() -> int:
    """Index of this process within the run, from 0."""
    return dist.get_rank() if _is_distributed() else 0


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def of_all(value: Any) -> list[Any]:
    """What each process passes, in rank order, in every process; anything that can be pickled."""
    if not _is_distributed():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def be_patient(patience: timedelta) -> None:
    """Let processes that have met wait for each other that long; every process must call this.

    Patience from the start would also be with processes that ended before they met the others.

    Args:
        patience: Instead of the library's minutes.
    """
    if _is_distributed():
        of_all(None)  # NCCL connects them only now
        dist.distributed_c10d._set_pg_timeout(patience)


def refuse_different(what: Mapping[str, Any]) -> None:
    """Refuse processes that would not work on the same; every process must call this.

    Args:
        what: All that must be the same in each process, ready for JSON.

    Raises:
        LaunchError: In every process, if something differs; it names the first.
    """
    first, *others = of_all(json.loads(json.dumps(what)))
    for rank, other in enumerate(others, start=2):
        if found := first_difference(other, first):
            name, theirs, ours = found
            raise LaunchError(
                f"Process {rank} of {len(others) + 1} has {name} {theirs}, but the first one has {ours}. Start all "
                "with the same flags, accelerate configuration, model and data."
            )


def refuse_unshared(folder: Path, output: str | os.PathLike) -> None:
    """Refuse processes, as of several machines, that do not see one folder; every process must call this.

    Args:
        folder: Existing folder to write to.
        output: What is written, for the message.

    Raises:
        LaunchError: In every process, if some do not see what the first one writes there.
    """
    if not _is_distributed():
        return
    with contextlib.ExitStack() as stack:
        is_first = process_rank() == 0
        mark = stack.enter_context(tempfile.NamedTemporaryFile(prefix=".seen-", dir=folder)).name if is_first else ""
        name = Path(of_all(mark)[0]).name
        sees = of_all((folder / name).exists())
    if not all(sees):
        raise LaunchError(
            f"{output}: process {sees.index(False) + 1} of {len(sees)} does not see what the first one writes there. "
            "Choose an output on a disk that all machines share."
        )


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """`(rows, ...)` of each process to `(processes * rows, ...)`, in rank order and with gradients."""
    if not _is_distributed():
        return rows
    # The public `all_gather` carries no gradients, and `torch.distributed.nn`, which did, now points to this function.
    return collectives.wait_tensor(collectives.all_gather_single(rows.contiguous(), 0, dist.group.WORLD))


def sum_over_processes(value: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes, without gradients."""
    value = value.detach().clone()
    if _is_distributed():
        dist.all_reduce(value)
    return value


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add up the gradients of all processes, in place."""
    if _is_distributed():
        waiting = [dist.all_reduce(each.grad, async_op=True) for each in parameters if each.grad is not None]
        for handle in waiting:
            handle.wait()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU, assembled from all processes if it is sharded; every process must call this."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().contiguous()


def shard(model: PreTrainedModel) -> None:
    """Shard a model over all processes, in place (FSDP2): each holds a part of every tensor.

    Gradients are summed over processes in the backward pass, as the losses are shares of one loss.

    Args:
        model: `MedCTModel`, with or without adapters.
    """
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    for module in (*layers, model):
        # Also the outermost, which would else keep its weights whole after a forward pass without a backward one: they
        # would pass for changed, and what is then set in its shards would not be seen.
        fully_shard(module, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums
    # FSDP2 gathers weights in `forward`; training calls the encoders directly.
    for method in ("get_image_features", "get_text_features", "get_logits"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
