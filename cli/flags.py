"""Flags that several commands share."""

import argparse
from collections.abc import Callable

from medct.common.counting import FEWEST_RESAMPLES
from medct.errors_medct import MedCTError

_SAYS_MORE_OF = {
    "adapter_revision": ("adapter", "--adapter"),
    "against_revision": ("against", "--against"),
    "model_revision": ("model", "--model"),
    "findings": ("metadata", "--metadata"),
    "split": ("metadata", "METADATA"),
}
"""Flags that are about another argument, and what that is called in the arguments and in words."""


REPOSITORY_OF = {
    "data_revision": "data",
    "revision": "model",
    "adapter_revision": "adapter",
    "against_revision": "against",
}
"""By flag of a commit, which flag names the repository: the commit says nothing of another one."""


class IdleFlagError(MedCTError, ValueError):
    """A flag that would do nothing; the message says what it needs."""


def refuse_idle(args: argparse.Namespace) -> None:
    """Refuse flags that would do nothing: whoever passes them expects something else of the command.

    Args:
        args: Parsed, of any command. With `--repeat`, the other argument may be recorded.

    Raises:
        IdleFlagError: If one says more of an argument that the command has and was not given.
    """
    for flag, (other, name) in _SAYS_MORE_OF.items():
        value = getattr(args, flag, None)
        if value and getattr(args, other, "") is None and not getattr(args, "repeat", None):
            said = " ".join(value) if isinstance(value, list) else value
            raise IdleFlagError(f"--{flag} {said} does nothing without {name}. Pass that, or leave it out.")


def commit_of(args: argparse.Namespace, flag: str) -> str | None:
    """The commit that is asked for of what a flag names.

    Args:
        args: Parsed, of any command.
        flag: "model", "adapter" or "against".
    """
    # Where a source of studies has --revision, the model's is --model_revision.
    return getattr(args, f"{flag}_revision", None if flag != "model" else getattr(args, "revision", None))


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which model, with which adapter, and where it runs."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="ID_OR_DIR",
        help="Hub id or folder of a MedCT model, or `phantom`, the small base of this package (default: $MEDCT_MODEL, "
        "else the base that --adapter names)",
    )
    group.add_argument("--revision", metavar="COMMIT", help="commit of the model on the Hub")
    group.add_argument("--adapter", metavar="ID_OR_DIR", help="Hub id or folder of a LoRA adapter")
    group.add_argument("--adapter_revision", metavar="COMMIT", help="commit of the adapter on the Hub")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="precision of the weights; auto: as saved (default: auto)",
    )
    group.add_argument("--cpu", action="store_true", help="stay on the CPU even if there is a GPU")


def label_arguments(parser: argparse.ArgumentParser, several: bool = False, templates: bool = True) -> None:
    """Add `--labels`, `--templates` and `--mapping`; `label_space.read_label_flags` takes them in this order.

    Args:
        parser: Of the command.
        several: Whether the command takes several sources, and so a mapping for each.
        templates: Whether to add `--templates`, which another command may mean otherwise.
    """
    group = parser.add_argument_group("labels")
    group.add_argument(
        "--labels",
        metavar="FILE",
        help="table (csv, xlsx) of findings to ask for instead of the model's own: a column `label` and, where they "
        "differ from it, `data` (the column in the data) and `words`, or `present` and `absent` (what is asked)",
    )
    if templates:
        group.add_argument(
            "--templates",
            nargs="+",
            metavar="PRESENT|ABSENT",
            help="pairs of sentences that contain {label}, instead of the model's own",
        )
    group.add_argument(
        "--mapping",
        nargs="+" if several else None,
        metavar="[SOURCE=]FILE" if several else "FILE",
        help="table, or name of a published mapping, that says which names in the data (`data`) mean which finding "
        "(`label`); findings that it does not name are unknown"
        + ("; with SOURCE=, for that source only" if several else ""),
    )


def batch_arguments(group: argparse._ArgumentGroup, workers: str) -> None:
    """Add the flags that say how many studies are worked on at once.

    Args:
        group: Where to add them.
        workers: Help text of `--num_workers`.
    """
    group.add_argument(
        "--batch_size", type=at_least(1), default=1, metavar="N", help="studies per forward pass (default: 1)"
    )
    group.add_argument("--num_workers", type=at_least(0), default=1, metavar="N", help=workers)


def at_least(least: int) -> Callable[[str], int]:
    """A type of arguments: whole numbers from `least` on."""

    def number(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return number


def resamples_argument(group: argparse.ArgumentParser | argparse._ArgumentGroup, default: int | None = 1000) -> None:
    """Add the flag that says how often patients are drawn for intervals.

    Args:
        group: Where to add it.
        default: Number of resamples; `None` where what is not given comes from elsewhere.
    """
    group.add_argument(
        "--bootstrap_resamples",
        type=at_least(FEWEST_RESAMPLES),
        default=default,
        metavar="N",
        help=f"bootstrap resamples of the patients for the intervals, at least {FEWEST_RESAMPLES} (default: 1000)",
    )


def split_name(text: str) -> str:
    """A type of arguments: the name of a split, as it is called here."""
    if text in ("test", "validation", "val"):
        raise argparse.ArgumentTypeError(
            f"there is no split {text!r}: `valid` is the one that is only scored, even if the data call it test; "
            "`tune` is the one for choosing thresholds, such as the validation split of data with a test split"
        )
    return text


def share(text: str) -> float:
    """A type of arguments: shares above 0, up to 1."""
    if (number := share_or_none(text)) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0, up to 1")
    return number


def share_or_none(text: str) -> float:
    """A type of arguments: shares from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share, 0 to 1")
    return number
