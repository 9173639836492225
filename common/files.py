"""Outputs that appear whole or not at all, and are gone on with only under the settings they were begun with."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import medct
from medct.errors_medct import MedCTError

# Fetched once, before any thread: the system tells it only by changing it.
_UMASK = os.umask(0)
os.umask(_UMASK)
VERSION = "MedCT's version"
"""Its name among the settings of an output."""
_ZEROS = memoryview(bytes(2**20))
# A file system or a system that knows no such thing; all others say that something went wrong.
_NOT_KNOWN = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


class OtherSettingsError(MedCTError, RuntimeError):
    """An output that was begun with other settings; the message says which, and what to do."""


def flush_to_disk(path: str | os.PathLike) -> None:
    """Wait until a file, or the names in a folder, would survive a loss of power, where the system can tell."""
    is_folder = Path(path).is_dir()
    try:
        # Windows flushes only what is open for writing, and opens no folders.
        handle = os.open(path, os.O_RDONLY if is_folder or os.name != "nt" else os.O_RDWR)
    except PermissionError:
        if is_folder:
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_KNOWN:
            raise
    finally:
        os.close(handle)


def as_umask_says(path: Path) -> None:
    """Give a file the permissions that any new one gets; some libraries make theirs for its owner alone."""
    with contextlib.suppress(OSError):  # shares of other systems may have none
        path.chmod(0o666 & ~_UMASK)


def remove_leftovers(path: Path) -> None:
    """Remove what a process that was killed has left of `whole_file` and `whole_folder` of a path.

    Nobody else may be writing there; see `only_run`.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def discard(folder: Path, final: Path) -> None:
    """Remove a folder that an output was made of; if that is cut short, the rest is among the `remove_leftovers`.

    Args:
        folder: To remove, beside the output.
        final: The output.
    """
    aside = _aside(final)
    folder.rename(aside)
    shutil.rmtree(aside)


def refuse_taken(path: str | os.PathLike) -> None:
    """Refuse a folder that is about to be created if it is there and a new one cannot take its place.

    Raises:
        FileExistsError: If it holds something.
        OSError: If it is the current folder, or a disk is mounted there.
    """
    folder = Path(path)
    if not folder.exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise FileExistsError(f"{path} exists and is not empty. Choose another output folder, or remove it.")
    if folder.samefile(".") or os.path.ismount(folder.resolve()):  # which `Path` lacks on Windows
        what = "the current folder" if folder.samefile(".") else "where a disk is mounted"
        raise OSError(f"{path} is {what}, which no new folder can replace. Choose a folder in it.")


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """The first name under which two records differ, and what they have there, in short; `None` if they are the same.

    Args:
        one: As JSON gives it back.
        other: Likewise.
    """
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            here, there = (textwrap.shorten(repr(each.get(name)), 200, placeholder=" ...") for each in (one, other))
            return name, here, there
    return None


def with_version(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an output that is added to, with the version of this package, for `refuse_other_settings`.

    Args:
        settings: What else decides the results.
    """
    return {**settings, VERSION: medct.__version__}


def refuse_other_settings(begun: Path, before: dict[str, Any], now: dict[str, Any], flag: str = "--output_dir") -> None:
    """Raise `OtherSettingsError` if an output was begun with other settings, or by a version of other numbers.

    Args:
        begun: The output.
        before: Settings that it was begun with, from JSON.
        now: Settings of this run, from `with_version`.
        flag: What chooses another output.
    """
    ours = now[VERSION]
    if by := version_of_other_numbers(before):
        raise OtherSettingsError(
            f"{begun} was started with {by}, and {ours} may read, compute or train in another way. Resume with that "
            f"version, or choose another {flag}."
        )
    if found := first_difference(before | {VERSION: ours}, json.loads(json.dumps(now))):
        name, other, ours = found
        remedy = f"Resume with the same settings, or choose another {flag}."
        raise OtherSettingsError(f"{begun} was started with {name} {other}, not {ours}. {remedy}")


def version_of_other_numbers(settings: Mapping[str, Any]) -> str | None:
    """The version that an output was made with, if this one may give other numbers.

    Args:
        settings: From `with_version`, whenever that was.
    """
    theirs = settings.get(VERSION)
    if theirs is None:
        return "a version of MedCT before 0.2.0"
    return f"MedCT {theirs}" if _rule(theirs) != _rule(medct.__version__) else None


def _rule(version: str) -> str:
    """All but the last number: releases that differ in nothing else give the same numbers, see CONTRIBUTING."""
    return version.rpartition(".")[0]


def _aside(final: Path) -> Path:
    # Not by the process alone: several machines may write to one folder.
    return final.with_name(f".{final.name}.partial-{secrets.token_hex(4)}")


def _name(error: BaseException, aside: Path, final: str | os.PathLike) -> None:
    """Let what the system reports, of a full disk say, name the output that its user knows."""
    if isinstance(error, OSError) and error.errno is not None:
        name = str(error.filename or "")
        if not name or name == str(aside) or name.startswith(f"{aside}{os.sep}"):
            error.filename = str(final)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder that gets its name only once the block has ended without an error.

    Args:
        path: The folder's final name; it must not exist, or be empty. Of a link, what it points to.

    Yields:
        A new folder beside it to write to; removed if the block raises.

    Raises:
        OSError: See `refuse_taken`.
    """
    refuse_taken(path)
    final = Path(path).resolve()
    aside = _aside(final)
    try:
        aside.mkdir(parents=True)
        yield aside
        for each in aside.rglob("*"):
            if each.is_file():
                as_umask_says(each)
            flush_to_disk(each)
        if final.is_dir() and os.name == "nt":
            final.rmdir()  # empty; elsewhere it is replaced
        aside.replace(final)  # an empty folder of that name is replaced
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        _name(error, aside, path)
        raise


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A file that gets its name, replacing an older one, only once the block has ended without an error.

    Yields:
        A path beside it to write to; the file is removed if the block raises.
    """
    final = Path(path).absolute()
    aside = _aside(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        as_umask_says(aside)
        flush_to_disk(aside)
        aside.replace(final)
        flush_to_disk(final.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # it says less than what went wrong first
            aside.unlink(missing_ok=True)
        _name(error, aside, path)
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file of text, whole or not at all.

    Args:
        path: File to make or replace.
        text: What it is to hold.
    """
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str, what: str) -> None:
    """Append a line, whole or not at all, since half a line would spoil the next one.

    A full disk costs the line, with a warning, and not the run that it is about.

    Args:
        path: File to make or add to.
        line: Without its end.
        what: What it is about, for the warning.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        warnings.warn(f"{path}: {what} was not recorded ({error}); the run continues.", stacklevel=3)


def write_json(path: str | os.PathLike, content: Any, **options: Any) -> None:
    """Write a JSON file, whole or not at all.

    Args:
        path: File to make or replace.
        content: Without NaN or infinity, which JSON does not have.
        options: Of `json.dumps`.
    """
    write_text(path, json_text(content, **options))


def json_text(content: Any, **options: Any) -> str:
    """What `write_json` writes, which takes the same."""
    return json.dumps(content, indent=2, allow_nan=False, **options) + "\n"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Reserve:
    """Disk space reserved for what must be written at the end of a long job.

    Args:
        path: File that occupies the space until `release`.
        size_bytes: Space to reserve.

    Raises:
        OSError: If there is not enough space; it names the folder.
    """

    def __init__(self, path: str | os.PathLike, size_bytes: int):
        self.path = Path(path)
        try:
            with self.path.open("wb") as file:
                _allocate(file, size_bytes)
        except BaseException as error:
            self.release()
            _name(error, self.path, self.path.parent)
            raise

    def release(self) -> None:
        """Give the space back for the writes that follow."""
        self.path.unlink(missing_ok=True)


def _allocate(file: BinaryIO, size_bytes: int) -> None:
    """Give a file blocks on the disk, not just a length."""
    try:
        os.posix_fallocate(file.fileno(), 0, size_bytes)
    except (AttributeError, OSError) as error:  # macOS and Windows; some network shares
        if isinstance(error, OSError) and error.errno not in _NOT_KNOWN:
            raise
        for start in range(0, size_bytes, len(_ZEROS)):
            file.write(_ZEROS[: size_bytes - start])
        file.flush()
