"""Outputs that appear whole or not at all."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def flush_to_disk(path: str | os.PathLike) -> None:
    """Wait until a file, or the names in a folder, would survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_taken(path: str | os.PathLike) -> None:
    """Raise `FileExistsError` if a folder that is about to be created already holds something."""
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty. Choose another output folder, or remove it.")


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder that gets its name only once the block has ended without an error.

    Args:
        path: The folder's final name; it must not exist, or be empty.

    Yields:
        A new folder beside it to write to; removed if the block raises.

    Raises:
        FileExistsError: If `path` already holds something.
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
    """A file that gets its name, replacing an older one, only once the block has ended without an error.

    Yields:
        A path beside it to write to; the file is removed if the block raises.
    """
    final = Path(path).absolute()
    final.parent.mkdir(parents=True, exist_ok=True)
    # The process id alone would not do: several machines may write to one folder.
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
    """Disk space reserved for what must be written at the end of a long job.

    Args:
        path: File that occupies the space until `release`.
        size_bytes: Space to reserve.

    Raises:
        OSError: If there is not enough space.
    """

    def __init__(self, path: str | os.PathLike, size_bytes: int):
        self.path = Path(path)
        with self.path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            else:  # macOS, Windows: only written bytes occupy space
                for _ in range(0, size_bytes, 2**20):
                    file.write(bytes(2**20))

    def release(self) -> None:
        """Give the space back for the writes that follow."""
        self.path.unlink(missing_ok=True)
