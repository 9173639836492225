"""The flags that say what a model is asked and what the data call it, for all commands that open a source."""

import argparse


def add_label_flags(parser: argparse.ArgumentParser, several: bool = False, templates: bool = True) -> None:
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
