"""Files of figures, for all commands that write them: what may be replaced, and what stands in them."""

import argparse
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medct.cli.commands import CommandError
from medct.common.files import remove_leftovers
from medct.common.lock import only_run
from medct.data.sources import DataError
from medct.evaluation.figures import Scores, source_figures
from medct.evaluation.record import read_results, scores_path

# Flags that decide about no figure.
_NOT_RECORDED = {"command", "run", "explain", "quiet", "output", "repeat", "num_workers", "cpu"}
# What figures of each command hold, by themselves or in their settings, and those of no other command.
_MARKS = {
    "evaluate": {"sources", "prompts"},
    "compare": {"sources", "runs"},
    "metrics": {"sources", "predictions"},
    "prompts": {"ensemble", "chosen"},
}


@contextlib.contextmanager
def only_json(output: Path | None, command: str) -> Iterator[None]:
    """Refuse, before any work, an output that is no JSON file, cannot be written, is written by another run, or would
    replace anything but what the same command wrote.

    Args:
        output: Where figures go; nowhere by default.
        command: Which one writes them.
    """
    if output is not None and output.suffix != ".json":
        raise CommandError(
            f"{output}: figures are written as JSON, and scores into a csv file beside it. Use the suffix .json."
        )
    with contextlib.nullcontext() if output is None else only_run(output):
        if output is not None:
            remove_leftovers(scores_path(output))
            _refuse_others(output, command)
        yield


def _refuse_others(output: Path, command: str) -> None:
    """Refuse to replace what another command wrote, or anybody else."""
    if output.exists() and not _is_record(output, command):
        raise CommandError(
            f"{output}: it exists, and `medct {command}` did not write it. Choose another --output, or remove it."
        )
    scores = scores_path(output)
    if command == "evaluate" and scores.exists() and not output.exists():
        raise CommandError(
            f"{scores}: it exists, and the scores that belong to {output.name} go there. Choose another --output, or "
            "remove it."
        )


def _is_record(path: Path, command: str) -> bool:
    """Whether a file holds figures that a command wrote."""
    try:
        results = read_results(path)
        return results.keys() | results["provenance"]["settings"].keys() >= _MARKS[command]
    except (DataError, LookupError, TypeError, AttributeError):
        return False


def recorded_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What decides about figures, ready for JSON; for those of an evaluation, what `--repeat` starts from."""
    settings = {name: value for name, value in vars(args).items() if name not in _NOT_RECORDED}
    return json.loads(json.dumps(settings, default=str))


def bootstrap_of(args: argparse.Namespace) -> dict[str, int]:
    """How a command draws resamples, as all functions of figures take it."""
    return {"resamples": args.bootstrap_resamples, "seed": args.seed}


def all_findings(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """The findings of several sources, each once, from the figures of each."""
    return list(dict.fromkeys(name for each in sources for name in each["present"]))


def figures_of(models: Mapping[str, Scores], what: str, **options: int) -> dict[str, Any]:
    """`source_figures`.

    Args:
        models: See there.
        what: Name of the source in messages.
        options: From `bootstrap_of`.

    Raises:
        CommandError: If there is nothing to score.
    """
    try:
        return source_figures(models, next(iter(models.values())).scored.names, **options)
    except ValueError as error:
        raise CommandError(f"{what}: {error}") from error
