"""One run at a time for each output."""

import contextlib
import errno
import getpass
import os
import platform
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import filelock

from medct.common.files import remove_leftovers
from medct.errors_medct import MedCTError

_HOLDER_BYTES = 500
_CANNOT_LOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class LockedError(MedCTError, OSError):
    """An output that another run is writing; the message says which."""


def is_first_process() -> bool:
    """Whether this process speaks for all that were launched together; known before they have met."""
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return not launched or not int(os.environ.get("RANK", 0))


@contextlib.contextmanager
def only_run(output: str | os.PathLike, each_process: bool = False) -> Iterator[None]:
    """Keep other runs from an output while the block lasts, and clear away what a killed one has left beside it.

    The lock is the system's own, on an open file: it ends with the process, however that ends, and NFS passes it on
    between machines. The file, `.NAME.lock` beside the output, holds who it is. Where a file system cannot lock at
    all, a warning says so.

    Args:
        output: File or folder, which need not exist.
        each_process: Whether each process of a launch has an output of its own; else the first one speaks for all.

    Raises:
        LockedError: If another run has the output.
        OSError: If nothing can be written there.
    """
    if not each_process and not is_first_process():
        yield
        return
    final = Path(output).absolute()
    if final.exists() and not (final.is_file() or final.is_dir()):  # reading on from what it holds would never end
        raise OSError(f"{output} is a pipe or a device. Choose another output.")
    final.parent.mkdir(parents=True, exist_ok=True)
    path = final.with_name(f".{final.name}.lock")
    # A lock that is a mere file would outlive a crash.
    lock = filelock.FileLock(path, blocking=False, thread_local=False, fallback_to_soft=False, on_acquired=_sign)
    try:
        lock.acquire()
    except filelock.Timeout:
        # The library goes on trying where the system lets nobody make a file, as in /proc.
        if not path.exists():
            raise OSError(f"{output}: no file can be made in {final.parent}. Choose another output.") from None
        raise LockedError(
            f"{output} is being written by another run{_holder(path)}. Wait for its end, or choose another output."
        ) from None
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise OSError(error.errno, error.strerror, str(output)) from error
        warnings.warn(
            f"{output}: this file system has no locks. Make sure that no second run writes there.", stacklevel=3
        )
    try:
        remove_leftovers(final)
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # Windows keeps open files
                path.unlink()
        lock.release()


def _sign(handle: int) -> None:
    """Write into the locked file whose it is."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a number without a name, in a container
        user = "?"
    text = f"process {os.getpid()} of {user} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, text.encode())


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError), path.open("rb") as file:
        if text := file.read(_HOLDER_BYTES).decode(errors="replace"):
            return f" ({text})"
    return ""
