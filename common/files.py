"""Outputs that appear whole or not at all."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def flush_to_disk(path: str | os.PathLike) -> None:
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
        for path in aside.rglob("*"):
            flush_to_disk(path)
        aside.replace(final)  # an empty folder of that name is replaced
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A file that gets its name, in place of an older one, only when the block has ended without an error.

    Yields:
        A path beside it to write to; the file is gone again if the block raises.
    """
    final = Path(path).absolute()
    final.parent.mkdir(parents=True, exist_ok=True)
    # Not by the process alone: several machines may write to one folder.
    aside = final.with_name(f".{final.name}.partial-{secrets.token_hex(4)}")
    try:
        yield aside
        flush_to_disk(aside)
        aside.replace(final)
        flush_to_disk(final.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


class Reserve:
    """Disk space kept for what must still be written at the end of long work.

    Args:
        path: A file of that size until `release`.
        size_bytes: To keep.

    Raises:
        OSError: If there is not that much.
    """

    def __init__(self, path: str | os.PathLike, size_bytes: int):
        self.path = Path(path)
        with self.path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            else:  # macOS, Windows: only what is written is there
                for _ in range(0, size_bytes, 2**20):
                    file.write(bytes(2**20))

    def release(self) -> None:
        """Give the space back to whoever writes next."""
        self.path.unlink(missing_ok=True)
