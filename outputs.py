"""Outputs that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def refuse_taken(path: str | os.PathLike) -> None:
    """Raise `FileExistsError` if a folder that is to be made holds something already."""
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty. Choose another output folder, or remove it.")


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder that gets its name only when the block has ended without an error.

    Args:
        path: The folder's final name; must not exist, or be empty.

    Yields:
        A new folder beside it to write to; gone again if the block raises.

    Raises:
        FileExistsError: If `path` holds something already.
    """
    refuse_taken(path)
    final = Path(path).absolute()
    aside = final.with_name(f".{final.name}.partial-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        aside.replace(final)  # an empty folder of that name is replaced
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
