"""The command `medct`: scans to findings, embeddings and maps; sources to shards; models and adapters to the Hub.

    medct predict scan.nii.gz --model ORG/NAME
    accelerate launch -m medct.cli predict studies/ --model ORG/NAME --output scores.csv

Every command explains itself with --help. Exit status: 0, everything was done; 1, done, but some studies could not be
scored or embedded; 2, not done, for the reason that one line on stderr gives.
"""

import argparse
import functools
import gc
import importlib
import sys
import warnings
from types import ModuleType
from typing import NoReturn

from medct import _IS_THE_COMMAND
from medct.cli.arguments import RUNS, make_parser
from medct.cli.flags import commit_of, refuse_idle
from medct.cli.wording import in_flags
from medct.common.errors import one_line_errors, run_process
from medct.common.output import escape_unknown


def run() -> NoReturn:
    """The command as a process."""
    run_process(main)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status, or raises `SystemExit` with it."""
    escape_unknown()
    argv = sys.argv[1:] if argv is None else argv
    run = RUNS.get(argv[0]) if argv else None
    args = None if run else make_parser(__doc__ or "").parse_args(argv)
    # Only now what takes seconds to import.
    with one_line_errors(functools.partial(in_flags, args=args)):
        if (scans := getattr(args, "scans", getattr(args, "scan", None))) is not None:
            _imported("inference.places").refuse_missing([scans] if isinstance(scans, str) else scans)
        if _IS_THE_COMMAND:
            _imported("publishing.registration").register()
            _imported("common.host").keep_freed_memory()
        if run:
            return _imported(run[0].removeprefix("medct.")).main(argv[1:], prog=f"medct {argv[0]}") or 0
        return _carried_out(args)


def _carried_out(args: argparse.Namespace) -> int:
    """Do what parsed arguments ask for; returns the exit status."""
    refuse_idle(args)
    loading = _imported("publishing.loading")
    for flag, what in (("model", "model"), ("adapter", "adapter"), ("against", "adapter")):
        name = getattr(args, flag, None)
        if name and (flag, name) != ("against", "base"):
            setattr(args, flag, loading.resolve_name(name, what, commit_of(args, flag)))
    progress = _imported("common.progress")
    progress.be_quiet(args.quiet)
    module, function = args.run.split(".")
    with _imported("common.host").quiet_libraries(), warnings.catch_warnings():
        # Notes stand in each row; as warnings they would tear the progress bar.
        warnings.simplefilter("ignore", _imported("volume_medct").VolumeWarning)
        warnings.showwarning = lambda message, *_, **__: progress.remark(f"warning: {message}")
        return getattr(_imported(f"cli.{module}"), function)(args)


def _imported(name: str) -> ModuleType:
    """A module of this package. What is imported stays: looking in it for garbage, now and while the command works,
    would be a good part of the time that one scan takes. In other processes there is garbage of others."""
    name = f"medct.{name}"
    if name in sys.modules or not _IS_THE_COMMAND:
        return importlib.import_module(name)
    is_looking = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        if is_looking:
            gc.enable()
