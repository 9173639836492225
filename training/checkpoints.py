"""Checkpoints of a run: what training needs to resume as if it had never stopped.

A checkpoint is a folder `step-00000100` that appears whole or not at all. Every process writes its own part, so sharded
tensors stay sharded: `rank-0.safetensors` holds trainable parameters, optimizer moments and random states,
`rank-0.json` the schedule and the position in the stream. Nothing is pickled.
"""

import dataclasses
import json
import random
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from medct.common.distributed import local_part, sum_over_processes
from medct.common.files import flush_to_disk
from medct.training.best import BestSoFar


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class TrainingState:
    """Everything that changes from step to step.

    Args:
        parameters: Trainable parameters by name.
        optimizer: Optimizer of exactly these, in this order.
        schedule: Learning rate schedule.
        loader: This process's loader; its state is the position in the stream.
        step: Optimizer steps done.
        best: The best weights so far.
    """

    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Stateful
    loader: Stateful
    best: BestSoFar
    step: int = 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """This process's part of the parameters and moments, and its random states."""
        tensors = {f"parameter/{name}": local_part(parameter) for name, parameter in self.parameters.items()}
        moments = self.optimizer.state_dict()["state"]
        for index, name in enumerate(self.parameters):
            for key, moment in moments.get(index, {}).items():
                tensors[f"optimizer/{name}/{key}"] = local_part(moment)
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.tensors().items()}
        tensors["random/torch"] = torch.get_rng_state()
        if accelerator := _accelerator():
            tensors[f"random/{accelerator}"] = torch.get_device_module(accelerator).get_rng_state()
        # copies, because safetensors refuses tensors that share memory
        return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}

    def values(self) -> dict[str, Any]:
        """The part of the state that is not tensors."""
        return {
            "step": self.step,
            "param_groups": self.optimizer.state_dict()["param_groups"],
            "schedule": self.schedule.state_dict(),
            "loader": self.loader.state_dict(),
            "best": self.best.values(),
            "random": {"python": random.getstate(), "numpy": np.random.get_state()},
        }

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Return to the state that `tensors` and `values` were taken from.

        Args:
            tensors: What `tensors()` gave.
            values: What `values()` gave.
        """
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for index, (name, parameter) in enumerate(self.parameters.items()):
            local_part(parameter).copy_(tensors[f"parameter/{name}"])
            if found := _below(f"optimizer/{name}/", tensors):
                moments[index] = {key: _shaped_like(parameter, tensor) for key, tensor in found.items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": values["param_groups"]})
        self.schedule.load_state_dict(values["schedule"])
        self.loader.load_state_dict(values["loader"])
        self.best.load(_below("best/", tensors), values["best"])
        self.step = values["step"]
        random.setstate(values["random"]["python"])
        np.random.set_state(values["random"]["numpy"])
        torch.set_rng_state(tensors["random/torch"])
        if (accelerator := _accelerator()) and (draws := tensors.get(f"random/{accelerator}")) is not None:
            torch.get_device_module(accelerator).set_rng_state(draws)


class Checkpoints:
    """The latest checkpoints of a run, in a folder that all processes share.

    Args:
        folder: Folder of the checkpoints.
        keep: How many of the newest are kept.
        accelerator: Its processes write together.
    """

    def __init__(self, folder: Path, keep: int, accelerator: Accelerator):
        self.folder = folder
        self.keep = keep
        self.accelerator = accelerator

    def newest(self) -> Path | None:
        """The checkpoint with the most steps."""
        return max(self.folder.glob("step-*"), default=None)

    def save(self, state: TrainingState) -> bool:
        """Write a checkpoint; if that fails, as on a full disk, warn, keep the older ones and return False."""
        aside = self.folder / f".step-{state.step:08d}.partial"
        final = self.folder / f"step-{state.step:08d}"
        failure = self._attempt(lambda: self._make_aside(aside))
        failure = failure or self._attempt(lambda: self._write_part(aside, state))
        if failure:
            if self.accelerator.is_main_process:
                shutil.rmtree(aside, ignore_errors=True)
                warnings.warn(f"{final}: no checkpoint was written ({failure}); training continues.", stacklevel=2)
            return False
        if self.accelerator.is_main_process:
            aside.rename(final)
            flush_to_disk(self.folder)
            for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        return True

    def load(self, state: TrainingState) -> bool:
        """Restore a state from the newest checkpoint; False if there is none."""
        newest = self.newest()
        if newest is None:
            return False
        part = newest / f"rank-{self.accelerator.process_index}"
        # Copies: what is mapped from a file keeps Windows and NFS from removing its folder.
        tensors = {name: each.clone() for name, each in load_file(part.with_suffix(".safetensors")).items()}
        state.restore(tensors, decode(part.with_suffix(".json").read_text(encoding="utf-8")))
        return True

    def _attempt(self, action: Any) -> str | None:
        """What went wrong in any process, so that all of them continue alike; `None` if nothing did."""
        reason = None
        try:
            action()
        except OSError as error:
            reason = str(error)
        failures = sum_over_processes(torch.tensor(float(reason is not None), device=self.accelerator.device))
        return (reason or "another process could not write") if failures else None

    def _make_aside(self, aside: Path) -> None:
        if self.accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def _write_part(self, aside: Path, state: TrainingState) -> None:
        part = aside / f"rank-{self.accelerator.process_index}"
        try:
            save_file(state.tensors(), part.with_suffix(".safetensors"))
        except Exception as error:  # safetensors wraps system errors in an exception of its own
            raise OSError(str(error)) from error
        part.with_suffix(".json").write_text(encode(state.values()), encoding="utf-8")
        for path in (*aside.glob(f"{part.name}.*"), aside):
            flush_to_disk(path)


def _accelerator() -> str | None:
    """The kind of accelerator of this machine, such as "cuda" or "mps"."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is None else device.type


def _below(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those whose names begin so, by what follows."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _shaped_like(parameter: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A process's part of a moment, sharded like its parameter; counters are whole in every process."""
    if not isinstance(parameter, DTensor) or local.dim() == 0:
        return local
    return DTensor.from_local(
        local.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


# JSON has no tuples, arrays or keys other than strings; each is written as {TAG: ...}.
def _to_json(value: Any) -> Any:
    match value:
        case np.ndarray():
            return {"$array": [str(value.dtype), value.tolist()]}
        case tuple():
            return {"$tuple": [_to_json(item) for item in value]}
        case list():
            return [_to_json(item) for item in value]
        case dict():
            return {"$dict": [[_to_json(key), _to_json(item)] for key, item in value.items()]}
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return _to_json(dataclasses.asdict(value))
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    match tag:
        case "$array":
            return np.array(content[1], dtype=content[0])
        case "$tuple":
            return tuple(_from_json(item) for item in content)
    return {_from_json(key): _from_json(item) for key, item in content}


def encode(value: Any) -> str:
    """Write nested dicts, lists, tuples, arrays and dataclasses as JSON; of the latter, `decode` gives dictionaries."""
    return json.dumps(_to_json(value))


def decode(text: str) -> Any:
    """Read what `encode` wrote."""
    return _from_json(json.loads(text))
