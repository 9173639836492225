"""NRRD and MetaImage, the two formats that ITK's family writes: a text header, then voxels in the same or another file.

Both are read without a library: a header is a few lines, and the voxels are raw, gzip, bzip2 or zlib bytes. Detached
voxels are read from the header's own folder only, since a name in a header must not open any file of the machine.

Source: NRRD format definition (teem), MetaIO documentation (Kitware).
"""

import bz2
import io
import math
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .byte_sources_medct import ByteSource, check_promise, fast_gzip, of_path, read_array
from .volume_medct import CTVolume, VolumeError, affine_from_spacing, check_affine, check_voxels

_MAX_HEADER_BYTES = 2**20
_MAX_TEXT_BYTES = 2**26
_TEXT_PIECE_BYTES = 2**20
_AGAIN = "Copy or download the file again"
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_NRRD_TYPES = {
    name: code
    for code, names in {
        "i1": ("signed char", "int8", "int8_t"),
        "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
        "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
        "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
        "i4": ("int", "signed int", "int32", "int32_t"),
        "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
        "i8": ("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"),
        "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
        "f4": ("float",),
        "f8": ("double",),
    }.items()
    for name in names
}
_META_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
# Both spellings of a space, by the letters of its axes.
_NRRD_SPACES = {
    name: "".join(word[0] for word in name.split("-")).upper()
    for name in (
        f"{x}-{y}-{z}" for x in ("left", "right") for y in ("anterior", "posterior") for z in ("superior", "inferior")
    )
}
_NRRD_SPACES |= {letters.lower(): letters for letters in _NRRD_SPACES.values()}


class ZlibFile(io.RawIOBase):
    """A zlib stream as a file, inflated as it is read."""

    def __init__(self, file: BinaryIO):
        self._file, self._inflater = file, zlib.decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._inflater.eof:
            packed = self._inflater.unconsumed_tail or self._file.read(2**16)
            inflated = self._inflater.decompress(packed, len(buffer))
            if inflated:
                buffer[: len(inflated)] = inflated
                return len(inflated)
            if not packed:
                raise EOFError("the stream is cut short")
        return 0


def is_nrrd(head: bytes) -> bool:
    return head.startswith(b"NRRD000")


def is_metaimage(head: bytes) -> bool:
    first = head.split(b"\n", 1)[0].split(b"=")[0].strip()
    return b"=" in head and first in (b"ObjectType", b"NDims", b"Comment") and b"\0" not in head.split(b"\n", 1)[0]


def read_nrrd(source: ByteSource, path: Path | None) -> CTVolume:
    """One NRRD file; stored values are taken for HU, for the format has no rescale.

    Args:
        source: Its bytes.
        path: Where it lies, if that is known, for voxels in a second file.
    """
    with source.open() as file:
        fields = _nrrd_fields(source, file)
        shape, dtype, encoding = _nrrd_layout(source, fields)
        affine = _nrrd_affine(source, fields)
        name = fields.get("data file", fields.get("datafile"))
        if name is not None:
            source = _detached(source, path, name)
            with source.open() as voxels:
                return CTVolume(_nrrd_voxels(source, voxels, fields, shape, dtype, encoding), affine, source.name)
        return CTVolume(_nrrd_voxels(source, file, fields, shape, dtype, encoding), affine, source.name)


def _lines(source: ByteSource, file: BinaryIO):
    """Lines of a text header; bounded, since a damaged one may hold no end."""
    for _ in range(10_000):
        line = file.readline(_MAX_HEADER_BYTES)
        if not line.endswith(b"\n") or file.tell() > _MAX_HEADER_BYTES:
            raise VolumeError(source.name, "its header has no end", _AGAIN)
        yield line.decode("latin-1").rstrip("\r\n")
    raise VolumeError(source.name, "its header has no end", _AGAIN)


def _nrrd_fields(source: ByteSource, file: BinaryIO) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in _lines(source, file):
        if not line:
            return fields
        name, colon, value = line.partition(": ")
        if colon and not line.startswith("#") and ":=" not in name:
            fields[name.strip().lower()] = value.strip()
        if name.lower() in ("data file", "datafile") and value.strip().upper().startswith("LIST"):
            break
    raise VolumeError(source.name, "its voxels are spread over a list of files", "Write it as one .nrrd file")


def _nrrd_layout(source: ByteSource, fields: dict[str, str]) -> tuple[tuple[int, ...], np.dtype, str]:
    try:
        shape = tuple(int(word) for word in fields["sizes"].split())
        dtype = np.dtype(_NRRD_TYPES[fields["type"].lower()])
        encoding = fields["encoding"].lower()
        dtype = dtype.newbyteorder(">" if fields.get("endian", "little").lower() == "big" else "<")
    except (KeyError, ValueError) as error:
        raise VolumeError(source.name, "its NRRD header lacks sizes, a known type or an encoding", _AGAIN) from error
    if min(shape, default=0) <= 0:
        raise VolumeError(source.name, f"it has shape {shape}", "Pass one volume with three axes, one at a time")
    check_voxels(source.name, shape, dtype)
    return shape, dtype, encoding


def _nrrd_affine(source: ByteSource, fields: dict[str, str]) -> np.ndarray:
    space = _NRRD_SPACES.get(fields.get("space", "").lower())
    if space is None:
        raise VolumeError(
            source.name,
            "its header does not name the patient's axes (`space`)",
            "Write it with space left-posterior-superior",
        )
    try:
        columns = [_vector(text) for text in fields["space directions"].replace(" ", "").replace(")(", ") (").split()]
        origin = _vector(fields.get("space origin", "(0,0,0)"))
        affine = np.eye(4)
        affine[:3, :3] = np.array(columns).T
        affine[:3, 3] = origin
    except (KeyError, ValueError) as error:
        raise VolumeError(
            source.name, "its header gives no three `space directions`", "Write it with directions and origin"
        ) from error
    affine = affine_from_spacing((1, 1, 1), space) @ affine
    check_affine(source.name, affine)
    return affine


def _vector(text: str) -> list[float]:
    return [float(word) for word in text.strip().strip("()").split(",")]


def _nrrd_voxels(
    source: ByteSource, file: BinaryIO, fields: dict[str, str], shape: tuple[int, ...], dtype: np.dtype, encoding: str
) -> np.ndarray:
    if encoding in ("text", "txt", "ascii"):
        return _text_voxels(source, file, shape, dtype)
    promised = math.prod(shape) * dtype.itemsize
    check_promise(source, promised, compressed=encoding not in ("raw",))
    try:
        line_skip = int(fields.get("line skip", fields.get("lineskip", "0")))
        byte_skip = int(fields.get("byte skip", fields.get("byteskip", "0")))
    except ValueError as error:
        raise VolumeError(source.name, "its NRRD header is damaged", _AGAIN) from error
    for _, _line in zip(range(line_skip), file, strict=False):
        pass
    if encoding == "raw" and byte_skip == -1:
        file.seek(source.size - promised)
    elif encoding == "raw":
        file.seek(max(byte_skip, 0), io.SEEK_CUR)
    elif encoding in ("gzip", "gz"):
        file = fast_gzip.GzipFile(fileobj=file, mode="rb")
    elif encoding in ("bzip2", "bz2"):
        file = bz2.BZ2File(file)
    else:
        raise VolumeError(source.name, "its encoding is not known", "Write it raw or with gzip")
    if encoding != "raw" and byte_skip:
        raise VolumeError(source.name, "its header skips bytes of a compressed stream", "Write it anew")
    return read_array(source, file, shape, dtype)


def _text_voxels(source: ByteSource, file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    count = math.prod(shape)
    text = file.read(_MAX_TEXT_BYTES + 1)
    try:
        if len(text) > _MAX_TEXT_BYTES or len(text) < 2 * count - 1:
            raise ValueError("too long or too short")
        values, found, at = np.empty(count, dtype.newbyteorder("=")), 0, 0
        while at < len(text):  # in pieces, for every number takes many times its room while it is a text
            end = min(at + _TEXT_PIECE_BYTES, len(text))
            while end < len(text) and not text[end : end + 1].isspace():
                end += 1
            piece = np.array(text[at:end].split(), dtype="S32").astype(float)
            values[found : found + len(piece)] = piece
            found, at = found + len(piece), end
        if found != count:
            raise ValueError("too many or too few")
        return values.reshape(shape, order="F")
    except (ValueError, OverflowError) as error:
        raise VolumeError(
            source.name, "its voxels cannot be read (text encoding)", "Write it raw or with gzip"
        ) from error


def read_metaimage(source: ByteSource, path: Path | None) -> CTVolume:
    """One MetaImage file (`.mha`, or `.mhd` with its data beside it); stored values are taken for HU.

    Args:
        source: Its bytes.
        path: Where it lies, if that is known.
    """
    with source.open() as file:
        fields: dict[str, str] = {}
        for line in _lines(source, file):
            name, _, value = line.partition("=")
            fields[name.strip()] = value.strip()
            if name.strip() == "ElementDataFile":
                break
        shape, dtype = _meta_layout(source, fields)
        affine, notes = _meta_affine(source, fields)
        name = fields["ElementDataFile"]
        if name.upper() == "LOCAL":
            return CTVolume(_meta_voxels(source, file, fields, shape, dtype), affine, source.name, notes)
        voxels = _detached(source, path, name)
        with voxels.open() as file:
            return CTVolume(_meta_voxels(voxels, file, fields, shape, dtype), affine, source.name, notes)


def _meta_layout(source: ByteSource, fields: dict[str, str]) -> tuple[tuple[int, ...], np.dtype]:
    try:
        shape = tuple(int(word) for word in fields["DimSize"].split())
        channels = int(fields.get("ElementNumberOfChannels", "1"))
        dtype = np.dtype(_META_TYPES[fields["ElementType"].upper()])
        big = fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False"))
    except (KeyError, ValueError) as error:
        raise VolumeError(source.name, "its MetaImage header lacks DimSize or a known ElementType", _AGAIN) from error
    if channels != 1 or min(shape, default=0) <= 0:
        raise VolumeError(
            source.name,
            f"it has shape {shape} and {channels} channels",
            "Pass one volume with three axes, one at a time",
        )
    dtype = dtype.newbyteorder(">" if big.lower() == "true" else "<")
    check_voxels(source.name, shape, dtype)
    return shape, dtype


def _meta_affine(source: ByteSource, fields: dict[str, str]) -> tuple[np.ndarray, tuple[str, ...]]:
    spacing = fields.get("ElementSpacing") or fields.get("ElementSize")
    if spacing is None:
        raise VolumeError(source.name, "its header gives no ElementSpacing", "Write it with one, in mm")
    axes = fields.get("TransformMatrix") or fields.get("Rotation") or fields.get("Orientation")
    notes = () if axes else ("its header gives no TransformMatrix: axes taken towards L, P and S",)
    try:
        affine = np.eye(4)
        affine[:3, :3] = np.array((axes or "1 0 0 0 1 0 0 0 1").split(), float).reshape(3, 3).T
        affine[:3, :3] *= _positive(source, spacing)
        offset = fields.get("Offset") or fields.get("Position") or fields.get("Origin") or "0 0 0"
        affine[:3, 3] = np.array(offset.split(), float)
    except VolumeError:
        raise
    except ValueError as error:
        raise VolumeError(source.name, "its MetaImage header does not give three axes in mm", _AGAIN) from error
    affine = _LPS_TO_RAS @ affine
    check_affine(source.name, affine)
    return affine, notes


def _positive(source: ByteSource, text: str) -> np.ndarray:
    spacing = np.array(text.split(), float)
    if not (spacing > 0).all():
        raise VolumeError(source.name, f"its spacing is {tuple(spacing.tolist())} mm", "Correct the header")
    return spacing


def _meta_voxels(
    source: ByteSource, file: BinaryIO, fields: dict[str, str], shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    compressed = fields.get("CompressedData", "False").lower() == "true"
    promised = math.prod(shape) * dtype.itemsize
    check_promise(source, promised, compressed)
    if fields.get("HeaderSize") == "-1":
        file.seek(source.size - promised)
    return read_array(source, ZlibFile(file) if compressed else file, shape, dtype)


def _detached(source: ByteSource, path: Path | None, name: str) -> ByteSource:
    """The file of voxels that a header names, if it lies beside the header."""
    name = name.removeprefix("./")
    if path is None or not name or "%" in name or Path(name).name != name or name.upper() == "LIST":
        raise VolumeError(
            source.name,
            "its voxels lie in other files",
            "Pass the path of the header with one file of voxels beside it",
        )
    voxels = path.parent / name
    if not voxels.is_file():
        raise VolumeError(source.name, "the file of its voxels is not beside it", "Copy both files to one folder")
    return of_path(voxels)[0]
