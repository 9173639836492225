"""What decided the figures of a run, so that it can be repeated, and what is not the same when it is.

Holds no patient: studies are named by a checksum. Addresses of data are as the user gave them; what is pushed to the
Hub is cleaned of paths by `publishing`.
"""

import hashlib
import importlib.metadata
import json
import math
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

import medct
from medct.common.host import device_name
from medct.evaluation.scoring import ScoredStudies

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "numpy",
    "scikit-learn",
    "pandas",
    "datasets",
    "nibabel",
    "pydicom",
)
_ROOT = Path(medct.__file__).resolve().parent
_GIT_S = 10


def provenance(
    settings: Mapping[str, Any] | None,
    models: Mapping[str, Mapping[str, Any]],
    studies: Mapping[str, Mapping[str, Any]],
    accelerator: Accelerator | None = None,
    *,
    seed: int,
) -> dict[str, Any]:
    """Everything that decides about a figure, ready for JSON.

    Args:
        settings: Those that `medct evaluate --repeat` starts from; `None` for a run that it cannot repeat.
        models: By name, where each came from and its fingerprint.
        studies: By source and split, from `list_checksum`.
        accelerator: Has computed the scores; without one they were there, and figures are computed on the CPU.
        seed: Of the run.
    """
    device = accelerator.device if accelerator else torch.device("cpu")
    machine = {
        "device": device_name(device),
        "type": device.type,
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes if accelerator else 1,
        "mixed_precision": accelerator.mixed_precision if accelerator else "no",
        "system": platform.system(),
        "processor": platform.machine(),
    }
    return {
        "command": _command(),
        "settings": None if settings is None else dict(settings),
        "seed": seed,
        "code": code(),
        "versions": versions(),
        "machine": machine,
        "models": {name: dict(each) for name, each in models.items()},
        "studies": {name: dict(each) for name, each in studies.items()},
    }


def _command() -> list[str]:
    """The words of the command, of absolute paths the last part."""
    program = Path(sys.argv[0]).name
    words = ["medct" if program == "__main__.py" else program, *sys.argv[1:]]
    return [Path(word).name if Path(word).is_absolute() else word for word in words]


def code() -> dict[str, Any]:
    """Version of this package, and its commit: of the clone that it runs from, else of the one that pip fetched.

    Returns:
        `version`; `commit`, `None` where it is not known; `modified`, whether the clone differs from it, likewise.
    """
    found: dict[str, Any] = {"version": medct.__version__, "commit": None, "modified": None}
    # Not of a repository that merely holds the environment.
    if (top := _git("rev-parse", "--show-toplevel")) and Path(top).resolve() == _ROOT:
        changes = _git("status", "--porcelain", "--untracked-files=no")
        return found | {"commit": _git("rev-parse", "HEAD"), "modified": None if changes is None else bool(changes)}
    try:
        origin = json.loads(importlib.metadata.distribution("medct").read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return found
    return found | {"commit": origin.get("vcs_info", {}).get("commit_id")}


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(_ROOT), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_GIT_S, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):  # no git, or no repository
        return None
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that compute or read something, those that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = str(torch.__version__)  # names its build for CUDA, too, which packages may not
    return found


def list_checksum(scored: ScoredStudies) -> dict[str, Any]:
    """A list of studies by a checksum, in which none can be recognised.

    Args:
        scored: The studies; their order does not matter.

    Returns:
        `scans` and `patients`, their numbers; `ids_sha256` of the studies' names; `labels_sha256` of names and labels.
    """
    lines = sorted(
        (study, ",".join("" if math.isnan(value) else f"{value:g}" for value in labels))
        for study, labels in zip(scored.ids, np.asarray(scored.labels, float).tolist(), strict=True)
    )
    return {
        "scans": len(scored.ids),
        "patients": len(set(scored.patients)),
        "ids_sha256": _sha256(study for study, _ in lines),
        "labels_sha256": _sha256(f"{study}\t{labels}" for study, labels in lines),
    }


def _sha256(lines: Iterator[str]) -> str:
    total = hashlib.sha256()
    for line in lines:
        total.update(f"{line}\n".encode())
    return total.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# A run that is repeated
# ---------------------------------------------------------------------------------------------------------------------

# What may differ without any figure doing so: where things lie, of which fingerprints and checksums say what they are.
_PLACES = {"command", "model", "adapter", "against", "revision", "adapter_revision", "against_revision"}


def sources_of(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The figures of each source, of an evaluation or of a training run.

    Args:
        results: What `results.json` holds.
    """
    if "sources" in results:
        return results["sources"]
    return [each for each in (results.get("comparison"), results.get("kept")) if each]


def changed_figures(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    """The numbers of one run beside those of its repetition.

    Args:
        before: What `results.json` of the first holds.
        now: The same of the second.

    Returns:
        How many of the first are the same to the last digit, and those that are not: `figure`, its place; `before` and
        `now`, `None` where there is none; `digits`, how many leading ones agree.
    """
    old, new = (dict(_numbers(sources_of(each))) for each in (before, now))
    changed = [
        {
            "figure": key,
            "before": old.get(key),
            "now": new.get(key),
            "digits": _equal_digits(old.get(key), new.get(key)),
        }
        for key in old
        if key not in new or old[key] != new[key]
    ]
    return len(old) - len(changed), changed


def _numbers(value: Any, place: str = "") -> Iterator[tuple[str, float | None]]:
    """Every number in nested dictionaries and lists, with its place."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _numbers(part, f"{place}: {key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _numbers(part, f"{place}: {index + 1}" if place else f"source {index + 1}")
    elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        yield place, value


def _equal_digits(before: float | None, now: float | None) -> int:
    """How many leading decimal digits two numbers share."""
    if before is None or now is None or math.copysign(1, before) != math.copysign(1, now):
        return 0
    if before == now:
        return 17
    size = max(abs(before), abs(now))
    return max(0, math.floor(math.log10(size) - math.log10(abs(before - now))))


def reasons(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What decided about the figures of one run and is not the same in its repetition, each in a few words.

    Args:
        before: `provenance` of the first.
        now: `provenance` of the second.
    """
    # Training also scores studies that are not scored again.
    common = before.get("studies", {}).keys() & now.get("studies", {}).keys()
    old, new = (
        dict(_leaves({**each, "studies": {name: each.get("studies", {})[name] for name in sorted(common)}}))
        for each in (before, now)
    )
    said = []
    for key in dict.fromkeys((*old, *new)):
        if old.get(key) != new.get(key):
            said.append(f"{key}: {_shown(old.get(key))}, now {_shown(new.get(key))}")
    return said


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key not in _PLACES or isinstance(part, Mapping):  # which may be a model of that name
                yield from _leaves(part, f"{place} {key}".strip())
    else:
        yield place, value


def _shown(value: Any) -> str:
    text = "not recorded" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:30]}..."
