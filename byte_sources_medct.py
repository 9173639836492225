"""Where bytes come from: paths, folders, zip archives, bytes, file objects and fsspec addresses, all behind one class.

Limits stand here, so that no source is read for ever or into more memory than it honestly needs: special files are not
opened, links that turn in a circle are not followed, and archives that inflate beyond all reason are refused.
"""

import functools
import gzip
import hashlib
import io
import os
import re
import stat
import unicodedata
import weakref
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

import numpy as np

from .volume_medct import VolumeError

try:
    import fsspec
except ImportError:
    fsspec = None
try:  # inflates about twice as fast
    from isal import igzip as fast_gzip
except ImportError:
    fast_gzip = gzip

MAX_FILES = 20_000
"""Files of one folder or archive."""
MAX_BYTES = 2**33
"""Bytes of one source held at once, 8 GiB."""
MAX_INFLATION = 200
"""Bytes from one compressed byte; a chest CT gives 2 to 10."""
MODEST_BYTES = 2**28
"""What may be inflated whatever the ratio: 256 MiB, since constant test volumes inflate a thousandfold."""

GZIP_MAGIC, ZIP_MAGIC = b"\x1f\x8b", b"PK\x03\x04"
HEAD_BYTES = 600
"""From so many bytes the format of a file is told; the last mark, that of tar, ends at byte 262."""
COPY_AGAIN = "Copy or download the file again"
"""The remedy of a damaged file."""
_MAX_DEFLATE_RATIO = 1032
_CHUNK_BYTES = 2**24
_MAX_REST_BYTES = 2**26
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+(::[a-z0-9]+)*://")
_USER = re.compile(r"(?<=://)[^/?#]*@")
_SIGNED = re.compile(r"(?i)([?&][^=&#]*(?:sig|token|access_?key|api_?key|secret|credent|passw|auth)[^=&#]*=)([^&#]+)")
# Left behind by operating systems; `._*` even carry the suffix of the file they belong to.
_NOT_SCANS = (".DS_Store", "Thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class ByteSource:
    """Bytes that can be opened again and again.

    Args:
        name: What to call them in messages.
        open: Gives a seekable binary file.
        size: How many.
        beside: Finds what lies beside or below them where they are stored; none where nothing else can be reached.
    """

    name: str
    open: Callable[[], BinaryIO]
    size: int
    beside: "Finder | None" = None

    def head(self, count: int) -> bytes:
        """The first bytes, fewer if there are fewer."""
        with self.open() as file:
            return file.read(count)


Finder = Callable[[Collection[str]], ByteSource | None]
"""Gives the file that one of some names leads to from another one's folder: `x.raw` beside it, `data/x.raw` below."""


def too_inflated(inflated: int, packed: int) -> bool:
    """Whether data expands more than honest compression does.

    Args:
        inflated: Size after inflation, bytes.
        packed: Size before inflation, bytes.
    """
    return inflated > MODEST_BYTES and inflated > MAX_INFLATION * max(packed, 1)


def of_bytes(data: bytes, name: str) -> ByteSource:
    """A source that is already in memory.

    Args:
        data: The content.
        name: What to call it in messages.
    """
    return ByteSource(name, lambda: io.BytesIO(data), len(data))


def of_file_object(file: Any, name: str) -> ByteSource:
    """The rest of a binary file object, from its current position.

    Args:
        file: Opened in binary mode.
        name: What to call it in messages.

    Raises:
        VolumeError: If it cannot be read, is open in text mode, or holds more than `MAX_BYTES`.
    """
    try:
        return of_bytes(_rest_of(file, name), name)
    except VolumeError:
        raise
    except Exception as error:  # any, of a file object that the caller made
        raise VolumeError(name, f"it cannot be read ({type(error).__name__})", "Check the file object") from error


def _rest_of(file: Any, name: str) -> bytes:
    pieces, count = [], 0
    while count <= MAX_BYTES:  # a raw stream may give less than it is asked for
        piece = file.read(MAX_BYTES + 1 - count)
        if not isinstance(piece, bytes):
            raise VolumeError(name, "it is opened as text", 'Open it with mode "rb"')
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)
        count += len(piece)
    raise VolumeError(name, f"it holds more than {MAX_BYTES} bytes", "Pass a single scan")


def is_address(source: Any) -> bool:
    """Whether a string is an address such as `hf://` or `https://` rather than a path."""
    return isinstance(source, str) and bool(_ADDRESS.match(source))


def without_secrets(address: str) -> str:
    """What to call an address: itself, without user and password, and with a digest for each value that gives access.

    So it can stand in messages and results, and two addresses still have two names. Paths stay as they are.
    """
    if not is_address(address):
        return address

    def digest(match: re.Match[str]) -> str:
        return match[1] + hashlib.sha256(match[2].encode(errors="surrogateescape")).hexdigest()[:8]

    return _SIGNED.sub(digest, _USER.sub("", address))


def of_address(address: str) -> list[ByteSource]:
    """The file at an fsspec address, or all files below it."""
    said = without_secrets(address)
    if fsspec is None:
        raise VolumeError(said, "addresses need fsspec", "Install it, pip install fsspec, or pass a local path")
    try:
        file_system, path = fsspec.url_to_fs(address)
        if file_system.protocol in ("file", ("file", "local")):
            return of_path(Path(path))
        names = [path]
        if file_system.info(path)["type"] == "directory":
            names = [name for name in sorted(file_system.find(path)) if _may_be_scan(name)]
        _check_count(said, len(names))
        return [_of_remote(file_system, name, without_secrets(name) if len(names) > 1 else said) for name in names]
    except VolumeError:
        raise
    except Exception as error:  # each file system has its own
        kind = str(error) if isinstance(error, ImportError) else type(error).__name__
        raise VolumeError(
            said, f"the address cannot be opened ({kind})", "Check it, or download the scan and pass its path"
        ) from error


def _of_remote(file_system: Any, path: str, name: str) -> ByteSource:
    size = file_system.info(path).get("size") or 0
    if size > MAX_BYTES:
        raise VolumeError(name, f"it holds {size} bytes", "Download the scan and pass its path")

    @functools.cache  # fetched once, however often it is opened
    def fetch() -> bytes:
        try:
            with file_system.open(path, "rb") as file:
                return _rest_of(file, name)
        except VolumeError:
            raise
        except Exception as error:  # as above
            raise VolumeError(
                name, f"it cannot be fetched ({type(error).__name__})", "Download the scan and pass its path"
            ) from error

    beside = functools.partial(_find_remote, file_system, path)
    return ByteSource(name, lambda: io.BytesIO(fetch()), size or len(fetch()), beside)


def _find_remote(file_system: Any, path: str, names: Collection[str]) -> ByteSource | None:
    """`find_beside` in another file system."""
    for name in filter(leads_below, sorted(names)):
        found = f"{path.rpartition('/')[0]}/{name}"
        if file_system.isfile(found):
            return _of_remote(file_system, found, without_secrets(found))
    return None


def leads_below(name: str) -> bool:
    """Whether a name in a header can only lead beside or below the file that holds it, on a server too."""
    return {"", ".", ".."}.isdisjoint(unquote(name).split("/"))


def of_path(path: Path) -> list[ByteSource]:
    """A file, or all files below a folder."""
    try:
        is_folder = path.is_dir()
    except OSError:  # a name that is too long, or a folder above that may not be entered: what opens the file says so
        is_folder = False
    if not is_folder:
        return [_of_file(path)]
    files = [_of_file(file, in_folder=True) for file in _walk(path)]
    return [file for file in files if file is not None]


def find_beside(path: Path, names: Collection[str]) -> ByteSource | None:
    """The file that one of some names leads to from the folder of another file; never one outside of that folder.

    Args:
        path: The other file.
        names: Acceptable names, with folders before a slash, in any Unicode normalization.

    Returns:
        The file, or `None` if there is none.
    """
    found = (_find_below(path.parent, name.split("/")) for name in names)
    file = next((file for file in found if file is not None), None)
    return None if file is None else _of_file(file)


def _find_below(folder: Path, parts: list[str]) -> Path | None:
    """Follow a name by what folders list, so that it cannot lead upwards; nor through a folder that is a link."""
    for number, part in enumerate(parts):
        try:
            if number > 0 and folder.is_symlink():
                return None
            found = [file for file in folder.iterdir() if _same_name(file.name, [part])]
        except OSError:
            return None
        if not found:
            return None
        folder = found[0]
    return folder


def find_among(folder: str, files: Iterable[ByteSource], names: Collection[str]) -> ByteSource | None:
    """The first file that one of some names leads to.

    Args:
        folder: How the names of files begin in the folder from which names lead.
        files: Files to choose from.
        names: As in `find_beside`.

    Returns:
        The file, or `None` if there is none.
    """
    below = (file for file in files if file.name.startswith(folder))
    return next((file for file in below if _same_name(file.name[len(folder) :].replace("\\", "/"), names)), None)


def _same_name(name: str, names: Collection[str]) -> bool:
    """Whether a name is one of some, however its accents are composed."""
    return unicodedata.normalize("NFC", name) in {unicodedata.normalize("NFC", one) for one in names}


def base_name(name: str) -> str:
    return name.replace("\\", "/").rsplit("/", 1)[-1]


def _of_file(path: Path, in_folder: bool = False) -> ByteSource | None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            # Reading a pipe or a device may never end.
            if in_folder:
                return None
            raise VolumeError(str(path), "it is not a regular file", "Pass a file or a folder")
        with path.open("rb"):
            pass
    except VolumeError:
        raise
    except OSError as error:
        raise VolumeError(str(path), f"it cannot be read ({error.strerror})", "Check the path") from error
    except ValueError as error:  # a null character
        raise VolumeError(repr(str(path)), f"it is not a path ({error})", "Check the path") from error
    return ByteSource(str(path), lambda: path.open("rb"), status.st_size, functools.partial(find_beside, path))


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder in order of their names; each folder once, however links lead to it."""
    seen, count = set(), 0

    def refuse(error: OSError) -> None:
        raise VolumeError(str(folder), f"a folder cannot be read ({error.strerror})", "Check its permissions")

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        # What programs keep for themselves: versions, deleted files, snapshots.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if _may_be_scan(name):
                count += 1
                _check_count(str(folder), count)
                yield Path(parent, name)


def of_zip(archive: ByteSource) -> list[ByteSource]:
    """The members of a zip archive."""
    damaged = "Copy or download the archive again"
    stream = archive.open()
    try:
        file = zipfile.ZipFile(stream)
        weakref.finalize(file, stream.close)  # when the last member is gone
        members = [info for info in file.infolist() if not info.is_dir() and _may_be_scan(info.filename)]
    except Exception as error:  # zipfile raises struct's, its own and codecs' on damaged directories
        stream.close()
        raise VolumeError(archive.name, f"the zip archive is damaged ({type(error).__name__})", damaged) from error
    _check_count(archive.name, len(members))
    if any(info.flag_bits & 1 for info in members):
        raise VolumeError(archive.name, "the zip archive is encrypted", "Unpack it and pass the folder")
    # Of the others Python unpacks all that a piece of bytes holds at once, gigabytes from a kilobyte.
    if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in members):
        raise VolumeError(
            archive.name, "the zip archive is packed in an unusual way, not deflated", "Unpack it and pass the folder"
        )
    inflated = sum(info.file_size for info in members)
    if inflated > MAX_BYTES or too_inflated(inflated, archive.size):
        raise VolumeError(
            archive.name,
            f"the zip archive of {archive.size} bytes would unpack to {inflated} bytes",
            "Unpack it and pass the folder, if that is right",
        )
    return [_of_member(archive.name, file, info) for info in members]


def _of_member(archive: str, file: zipfile.ZipFile, info: zipfile.ZipInfo) -> ByteSource:
    name = f"{archive}/{info.filename}"

    def open_member() -> BinaryIO:
        try:
            return io.BytesIO(_read_member(file, info))
        except Exception as error:  # as above, and those of each decompressor
            raise VolumeError(
                name, f"the zip member is damaged ({type(error).__name__})", "Copy or download the archive again"
            ) from error

    return ByteSource(name, open_member, info.file_size)


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Never more than the directory says, which was checked; reaching the end verifies the checksum."""
    data = bytearray()
    with archive.open(info) as member:
        while piece := member.read(min(_CHUNK_BYTES, info.file_size + 1 - len(data))):
            data += piece
    if len(data) != info.file_size:
        raise EOFError("cut short")
    return bytes(data)


def open_inflated(file: BinaryIO) -> BinaryIO:
    """The file itself, or what its gzip stream holds: by content, since files are often misnamed."""
    is_gzip = file.read(2) == GZIP_MAGIC
    file.seek(0)
    return fast_gzip.GzipFile(fileobj=file, mode="rb") if is_gzip else file


def inflated_head(source: ByteSource, count: int) -> bytes:
    """The first bytes of a source after inflation.

    Args:
        source: A plain or gzip file.
        count: Maximum number of bytes.

    Returns:
        At most `count` bytes; empty if the stream cannot be inflated.
    """
    with source.open() as file:
        try:
            return open_inflated(file).read(count)
        except Exception:  # the reader proper says what is wrong
            return b""


def check_promise(source: ByteSource, promised: int, compressed: bool) -> None:
    """Refuse a header that promises more voxels than its file can hold, before any memory is allocated.

    Args:
        source: The file that holds the voxels.
        promised: Size of the voxels according to the header, bytes.
        compressed: Whether the voxels are compressed in the file.

    Raises:
        VolumeError: If the file is too short.
    """
    most = source.size * _MAX_DEFLATE_RATIO if compressed else source.size
    if promised > most or (compressed and too_inflated(promised, source.size)):
        raise VolumeError(
            source.name,
            f"its voxels cannot be read (the header promises {promised} bytes, the file has {source.size})",
            COPY_AGAIN,
        )


def read_array(
    source: ByteSource, stream: BinaryIO, shape: tuple[int, ...], dtype: np.dtype, is_alone: bool = False
) -> np.ndarray:
    """Exactly one array in Fortran order, straight into its memory, then the end of the stream.

    Args:
        source: For messages.
        stream: Stands at the first voxel. Reading it to its end is what verifies a checksum.
        shape: Of the array.
        dtype: As stored.
        is_alone: Whether the stream holds these voxels and nothing else, so that any other length is that of other
            voxels. Else less than a slice may follow them, since programs pad their files.

    Returns:
        The array, in the machine's byte order.
    """
    try:
        array = np.empty(shape, dtype, order="F")
        unread = memoryview(array.reshape(-1, order="F").view(np.uint8))
        while len(unread):
            count = stream.readinto(unread[:_CHUNK_BYTES])
            if not count:
                raise VolumeError(
                    source.name,
                    f"its voxels cannot be read ({len(unread)} of {array.nbytes} bytes are missing)",
                    COPY_AGAIN,
                )
            unread = unread[count:]
        _read_rest(source, stream, array.nbytes, 0 if is_alone else array.nbytes // shape[-1] - 1)
    except VolumeError:
        raise
    except MemoryError as error:
        raise VolumeError(
            source.name, f"there is no memory for shape {shape} of type {dtype}", "Crop the scan"
        ) from error
    except Exception as error:  # gzip, isal, zlib and bz2 each raise their own
        raise VolumeError(source.name, f"the {_stream_kind(stream)} stream is damaged ({error})", COPY_AGAIN) from error
    return array if array.dtype.isnative else array.byteswap(inplace=True).view(array.dtype.newbyteorder("="))


def _read_rest(source: ByteSource, stream: BinaryIO, promised: int, most: int) -> None:
    """Read a stream to its end, and refuse it where more follows the voxels than `most` bytes."""
    rest = 0
    while chunk := stream.read(2**20):
        rest += len(chunk)
        if rest > min(most, _MAX_REST_BYTES):
            raise VolumeError(
                source.name,
                f"it holds more than the {promised} bytes of voxels that its header promises",
                "Correct the type or the shape in the header, or write the file again",
            )


def _stream_kind(stream: BinaryIO) -> str:
    kinds = {"GzipFile": "gzip", "IGzipFile": "gzip", "BZ2File": "bzip2", "ZlibFile": "zlib"}
    return kinds.get(type(stream).__name__, "byte")


def _may_be_scan(name: str) -> bool:
    base = base_name(name)
    return not base.startswith("._") and base not in _NOT_SCANS


def _check_count(name: str, count: int) -> None:
    if count > MAX_FILES:
        raise VolumeError(name, f"it holds more than {MAX_FILES} files", "Pass the folder of one series")
