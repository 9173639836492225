"""Outputs that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


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
    final = Path(path).absolute()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty. Choose another output folder, or remove it.")
    aside = final.with_name(f".{final.name}.partial-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        aside.replace(final)  # an empty folder of that name is replaced
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
