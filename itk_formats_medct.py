"""NRRD and MetaImage, the two formats that ITK's family writes: a text header, then voxels in the same or another file.

Both are read without a library: a header is a few lines, and the voxels are text or raw, gzip, bzip2 or zlib bytes.
Detached voxels are looked for among the files beside and below the header only, since a name in a header must not open
any file of the machine. What a header says of units and of the scale of values is followed, also where ITK ignores it.

Source: NRRD format definition (teem), MetaIO documentation and source (Kitware).
"""

import bz2
import contextlib
import io
import itertools
import math
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from .byte_sources_medct import COPY_AGAIN, ByteSource, Finder, check_promise, fast_gzip, read_array
from .volume_medct import (
    CTVolume,
    VolumeError,
    affine_from_spacing,
    check_affine,
    check_voxels,
    drop_singletons,
    refuse_second_rescale,
    rescale_to_hu,
)

_MAX_HEADER_BYTES = 2**20
_MAX_TEXT_BYTES = 2**26
_TEXT_PIECE_BYTES = 2**20
_MAX_NUMBER_BYTES = 32
_MAX_WHOLE = 2.0**53
"""Up to which double precision, as which texts are read, holds every whole number."""
_LENGTH_TOLERANCE = 1e-2
"""Of spacings that a header says in two ways, and of axes that should be of length 1."""
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
        "i8": (
            "longlong",
            "long long",
            "long long int",
            "signed long long",
            "signed long long int",
            "int64",
            "int64_t",
        ),
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
_NRRD_ALIASES = {name.replace(" ", ""): name for name in ("data file", "line skip", "byte skip", "old min", "old max")}
_NRRD_FIELDS = (
    *("sizes", "kinds", "type", "encoding", "endian"),
    *("space", "spacings", "space directions", "space origin", "space units"),
    *_NRRD_ALIASES.values(),
)
_SPATIAL_KINDS = ("domain", "space", "none", "???")
"""What an axis of space is called, or one of which nothing is said; others are time, colours, vectors, lists."""
_TEXTS = ("text", "txt", "ascii")
_META_FIELDS = (
    *("CompressedData", "CompressedDataSize", "BinaryData", "BinaryDataByteOrderMSB", "ElementByteOrderMSB"),
    *("Position", "Offset", "Origin", "Orientation", "Rotation", "TransformMatrix", "DistanceUnits", "ElementSpacing"),
    *("ElementSize", "DimSize", "HeaderSize", "Modality", "ElementNumberOfChannels", "ElementType"),
    *("ElementToIntensityFunctionSlope", "ElementToIntensityFunctionOffset", "ElementDataFile"),
    "AnatomicalOrientation",
)
_META_KEYS = (
    *("Comment", "ObjectType", "ObjectSubType", "TransformType", "NDims", "Name", "ID", "ParentID", "AcquisitionDate"),
    *("CompressionLevel", "Color", "CenterOfRotation", "SequenceID", "ElementMin", "ElementMax", *_META_FIELDS),
)
# Other names of a field, by which a header may say it a second time.
_META_ALIASES = {
    **dict.fromkeys(("Position", "Origin"), "Offset"),
    **dict.fromkeys(("Rotation", "Orientation"), "TransformMatrix"),
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}
_TOWARDS_LPS = ("RAI", "???", "")
"""Where axes come from, if they run towards L, P and S, or if nobody knows."""
_META_MODALITIES = ("MET_MOD_CT", "MET_MOD_OTHER", "MET_MOD_UNKNOWN")
_META_SEPARATOR = re.compile("[=:]")
_UNITS_MM = {
    **dict.fromkeys(("", "?", "mm", "millimeter", "millimetre", "millimeters", "millimetres"), 1.0),
    **dict.fromkeys(("cm", "centimeter", "centimetre", "centimeters", "centimetres"), 10.0),
    **dict.fromkeys(("m", "meter", "metre", "meters", "metres"), 1000.0),
    **dict.fromkeys(("um", "\u00b5m", "micron", "microns", "micrometer", "micrometre"), 0.001),
}
_AXIS_DIRECTION = re.compile(r"\([^)]*\)|\S+")
_DECIMAL_COMMA = re.compile(r"\d,\d+(\s|$)")
# In which a name may be written that a header gives in bytes.
_NAME_ENCODINGS = ("utf-8", "cp1252", "gb18030", "shift_jis", "latin-1")


class ZlibFile(io.RawIOBase):
    """A zlib or gzip stream as a file, inflated as it is read."""

    def __init__(self, file: BinaryIO):
        self._file, self._inflater = file, zlib.decompressobj(zlib.MAX_WBITS | 32)

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
    first = head.split(b"\n", 1)[0]
    key = _META_SEPARATOR.split(first.decode("latin-1"), maxsplit=1)[0].strip()
    return b"\0" not in first and key in _META_KEYS and key != first.decode("latin-1").strip()


def read_nrrd(source: ByteSource, find: Finder, rescale: bool = False) -> CTVolume:
    """One NRRD file; stored values are taken for HU, unless the header shifts them.

    Args:
        source: Its bytes.
        find: For voxels in a second file.
        rescale: Whether the caller will compute HU.
    """
    with source.open() as file:
        fields = _without_singletons(_nrrd_fields(source, file))
        shape, dtype, encoding = _nrrd_layout(source, fields)
        affine, notes = _nrrd_affine(source, fields)
        shift, more = _nrrd_shift(source, fields, dtype, rescale)
        name = fields.get("data file")
        if name is None:
            array = _nrrd_voxels(source, file, fields, shape, dtype, encoding)
        else:
            voxels = _detached(source, find, name)
            with voxels.open() as file:
                array = _nrrd_voxels(voxels, file, fields, shape, dtype, encoding, is_detached=True)
    return CTVolume(rescale_to_hu(array, 1.0, shift), affine, source.name, (*notes, *more))


def _nrrd_shift(
    source: ByteSource, fields: dict[str, str], dtype: np.dtype, rescale: bool
) -> tuple[float, tuple[str, ...]]:
    """What a header adds to stored values, unless the caller will compute HU.

    `old min` and `old max` are what the least and the greatest number of the type stand for. As far apart as these,
    they shift values: so dcm2niix writes a rescale by slope 1. Others may as well be the extremes of the voxels.
    """
    known = [fields.get(name) for name in ("old min", "old max")]
    if None in known or rescale or dtype.kind == "f":
        return 0.0, ()
    low, high = (_number(source, value, "old min") for value in known)
    least, greatest = np.iinfo(dtype).min, np.iinfo(dtype).max
    if high - low != greatest - least:
        raise VolumeError(
            source.name,
            "its values were quantized (`old min` and `old max`)",
            "Pass `rescale_slope=` and `rescale_intercept=` that give HU",
        )
    shift = low - least
    return shift, (f"its header's `old min` and `old max` were applied (stored {shift:+g})",) if shift else ()


def _number(source: ByteSource, text: str, field: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise _bad_numbers(source, field, text) from error


def _bad_numbers(source: ByteSource, field: str, text: str) -> VolumeError:
    """The error of a field that should hold numbers."""
    if _DECIMAL_COMMA.search(text):
        return VolumeError(source.name, f"its {field} is written with decimal commas", "Write it with points")
    return VolumeError(source.name, f"its {field} does not hold the numbers that it should", COPY_AGAIN)


def _lines(source: ByteSource, file: BinaryIO) -> Iterator[str]:
    """Lines of a text header, to the end of the file at most; bounded, since a damaged one may hold no end."""
    for _ in range(10_000):
        line = file.readline(_MAX_HEADER_BYTES)
        if file.tell() > _MAX_HEADER_BYTES:
            break
        if not line:
            return
        yield line.decode("latin-1").rstrip("\r\n")
    raise _endless(source)


def _endless(source: ByteSource) -> VolumeError:
    return VolumeError(source.name, "its header has no end", COPY_AGAIN)


def _take(source: ByteSource, fields: dict[str, str], name: str, value: str) -> None:
    """Keep what a header says, unless it has said something else: which of both is right cannot be known."""
    known = fields.get(name) or value
    if value and not _is_same(known, value):
        raise _contradiction(source, name)
    fields[name] = known


def _contradiction(source: ByteSource, name: str) -> VolumeError:
    return VolumeError(source.name, f"its header contradicts itself about its {name}", "Correct the header")


def _is_same(one: str, other: str) -> bool:
    """Whether two texts stand for the same numbers, or are the same words."""
    try:
        return np.array_equal(np.array(one.split(), float), np.array(other.split(), float), equal_nan=True)
    except ValueError:
        return one.lower() == other.lower()


def _nrrd_fields(source: ByteSource, file: BinaryIO) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in _lines(source, file):
        if not line:
            return fields
        name, colon, value = line.partition(":")
        name = name.strip().lower()
        name = _NRRD_ALIASES.get(name, name)
        if colon and name in _NRRD_FIELDS and not value.startswith("="):
            _take(source, fields, name, value.strip())
        if name == "data file" and value.split()[:1] == ["LIST"]:
            raise VolumeError(source.name, "its voxels are spread over a list of files", "Write it as one .nrrd file")
    if "data file" not in fields:
        raise _endless(source)
    return fields  # where the voxels lie in another file, this one may end with its last field


def _without_singletons(fields: dict[str, str]) -> dict[str, str]:
    """A header without the axes that are one long and have no direction in space, such as time or components."""
    sizes, directions = fields.get("sizes", "").split(), _AXIS_DIRECTION.findall(fields.get("space directions", ""))
    if not 3 < len(sizes) == len(directions):
        return fields
    is_kept = [axis != ("1", "none") for axis in zip(sizes, directions, strict=True)]
    said = {"sizes": sizes, "space directions": directions, "kinds": fields.get("kinds", "").split()}
    return fields | {name: " ".join(itertools.compress(words, is_kept)) for name, words in said.items()}


def _nrrd_layout(source: ByteSource, fields: dict[str, str]) -> tuple[tuple[int, ...], np.dtype, str]:
    try:
        shape = tuple(int(word) for word in fields["sizes"].split())
        dtype = np.dtype(_NRRD_TYPES[fields["type"].lower()])
        encoding = fields["encoding"].lower()
        if dtype.itemsize > 1 and encoding not in _TEXTS:
            dtype = dtype.newbyteorder({"little": "<", "big": ">"}[fields["endian"].lower()])
    except (KeyError, ValueError) as error:
        if isinstance(error, KeyError) and fields.get("endian", "").lower() not in ("little", "big"):
            raise VolumeError(
                source.name, "its NRRD header names no byte order (endian)", "Add `endian: little` or `endian: big`"
            ) from error
        raise VolumeError(
            source.name, "its NRRD header lacks sizes, a known type or an encoding", COPY_AGAIN
        ) from error
    is_spatial = set(fields.get("kinds", "").lower().split()) <= set(_SPATIAL_KINDS)
    if min(shape, default=0) <= 0 or not is_spatial:
        what = "" if is_spatial else " and an axis that is not of space (`kinds`)"
        raise VolumeError(source.name, f"it has shape {shape}{what}", "Pass one volume with three axes, one at a time")
    check_voxels(source.name, shape, dtype)
    return shape, dtype, encoding


def _nrrd_affine(source: ByteSource, fields: dict[str, str]) -> tuple[np.ndarray, tuple[str, ...]]:
    space = _NRRD_SPACES.get(fields.get("space", "").lower())
    if space is None:
        raise VolumeError(
            source.name,
            "its header does not name the patient's axes (`space`)",
            "Write it with space left-posterior-superior",
        )
    try:
        columns = [_vector(text) for text in _AXIS_DIRECTION.findall(fields["space directions"])]
        origin = _vector(fields.get("space origin", "(0,0,0)"))
        affine = np.eye(4)
        affine[:3, :3] = np.array(columns).T
        affine[:3, 3] = origin
        spacings = np.abs([float(word) for word in fields.get("spacings", "").split()])
    except (KeyError, ValueError) as error:
        if _has_decimal_commas(fields):
            raise VolumeError(
                source.name, "its geometry is written with decimal commas", "Write it with points"
            ) from error
        raise VolumeError(
            source.name, "its header does not give three `space directions`", "Write it with directions and origin"
        ) from error
    units = {unit.strip() for unit in fields.get("space units", "").split('"')} - {""}
    unit_mm, notes = _unit(source, units.pop() if len(units) == 1 else "several" if units else "")
    with np.errstate(all="ignore"):  # what is not finite is refused
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        if len(spacings) == 3 and (np.abs(spacings / lengths - 1) > _LENGTH_TOLERANCE).any():  # NaN says nothing
            raise _contradiction(source, "spacings")
        affine = np.diag([unit_mm, unit_mm, unit_mm, 1.0]) @ affine_from_spacing((1, 1, 1), space) @ affine
    check_affine(source.name, affine)
    return affine, notes


def _has_decimal_commas(fields: dict[str, str]) -> bool:
    """Whether the geometry of an NRRD header does: its vectors have commas between their three numbers, too."""
    vectors = _AXIS_DIRECTION.findall(f"{fields.get('space directions', '')} {fields.get('space origin', '')}")
    return any(vector.count(",") > 2 for vector in vectors) or bool(_DECIMAL_COMMA.search(fields.get("spacings", "")))


def _unit(source: ByteSource, unit: str) -> tuple[float, tuple[str, ...]]:
    """Millimetres of a unit of length, and a remark if it is another one."""
    unit_mm = _UNITS_MM.get(unit.strip().lower())
    if unit_mm is None:
        raise VolumeError(source.name, "its unit of length is not known", "Write it in mm")
    return unit_mm, () if unit_mm == 1 else ("its unit was converted to mm",)


def _vector(text: str) -> list[float]:
    text = text.strip()
    if not (text.startswith("(") and text.endswith(")")):  # a header that was cut in the middle of a number
        raise ValueError("no vector")
    return [float(word) for word in text[1:-1].split(",")]


def _nrrd_voxels(
    source: ByteSource,
    file: BinaryIO,
    fields: dict[str, str],
    shape: tuple[int, ...],
    dtype: np.dtype,
    encoding: str,
    is_detached: bool = False,
) -> np.ndarray:
    """Voxels from where a header stands, or from a file of their own."""
    promised = math.prod(shape) * dtype.itemsize
    is_text = encoding in (*_TEXTS, "hex")
    if not is_text:
        check_promise(source, promised, compressed=encoding != "raw")
    try:
        line_skip = int(fields.get("line skip", "0"))
        byte_skip = int(fields.get("byte skip", "0"))
    except ValueError as error:
        raise VolumeError(source.name, "its NRRD header is damaged", COPY_AGAIN) from error
    is_alone = is_detached and line_skip == byte_skip == 0
    for _, _line in zip(range(line_skip), file, strict=False):
        pass
    if encoding == "raw" and byte_skip == -1:
        file.seek(source.size - promised)
        byte_skip = 0
    elif encoding in ("gzip", "gz"):
        file = fast_gzip.GzipFile(fileobj=file, mode="rb")
    elif encoding in ("bzip2", "bz2"):
        file = bz2.BZ2File(file)
    elif encoding != "raw" and not is_text:
        raise VolumeError(source.name, "its encoding is not known", "Write it raw or with gzip")
    if byte_skip < 0:
        raise VolumeError(source.name, f"its header skips {byte_skip} bytes", "Write it again")
    _skip_bytes(source, file, byte_skip)  # of what is inflated, as the format has it
    if encoding == "hex":
        return _hex_voxels(source, file, shape, dtype)
    return _text_voxels(source, file, shape, dtype) if is_text else read_array(source, file, shape, dtype, is_alone)


def _skip_bytes(source: ByteSource, file: BinaryIO, count: int) -> None:
    try:
        while count > 0 and (skipped := len(file.read(min(count, 2**20)))):
            count -= skipped
    except Exception as error:  # gzip, isal and bz2 each raise their own
        raise VolumeError(source.name, f"its compressed stream is damaged ({error})", COPY_AGAIN) from error


def _hex_voxels(source: ByteSource, file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    text = file.read(_MAX_TEXT_BYTES + 1)
    try:
        if len(text) > _MAX_TEXT_BYTES:
            raise ValueError("too long")
        values = np.frombuffer(bytes.fromhex(text.decode("ascii")), dtype).reshape(shape, order="F")
    except ValueError as error:
        raise VolumeError(
            source.name, "its voxels are not hexadecimal: its encoding is not known", "Write it raw"
        ) from error
    return values.astype(dtype.newbyteorder("="))


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
            piece = _numbers_of_text(text[at:end], values.dtype)
            values[found : found + len(piece)] = piece
            found, at = found + len(piece), end
        if found != count:
            raise ValueError("too many or too few")
        return values.reshape(shape, order="F")
    except (ValueError, OverflowError) as error:
        raise VolumeError(
            source.name,
            "its voxels cannot be read (text encoding), or are not all numbers of the type in its header",
            "Write it raw or with gzip",
        ) from error


def _numbers_of_text(text: bytes, dtype: np.dtype) -> np.ndarray:
    """Numbers as they are written; a ValueError if their type cannot hold them, since a cast would say nothing."""
    words = text.split()
    if max(map(len, words), default=0) > _MAX_NUMBER_BYTES:  # numpy would cut it
        raise ValueError("too long a number")
    numbers = np.array(words, dtype=f"S{_MAX_NUMBER_BYTES}").astype(float)
    with np.errstate(all="ignore"):
        values = numbers.astype(dtype)
        fits = np.isfinite(values) if dtype.kind == "f" else (values == numbers) & (np.abs(numbers) <= _MAX_WHOLE)
    if not fits.all():
        raise ValueError("numbers that are not of their type")
    return values


def read_metaimage(source: ByteSource, find: Finder, rescale: bool = False) -> CTVolume:
    """One MetaImage file (`.mha`, or `.mhd` with its data beside it); stored values are taken for HU.

    Args:
        source: Its bytes.
        find: For voxels in a second file.
        rescale: Whether the caller will compute HU.
    """
    with source.open() as file:
        fields: dict[str, str] = {}
        for line in _lines(source, file):
            name, *value = (part.strip() for part in _META_SEPARATOR.split(line, maxsplit=1))
            if name in _META_FIELDS:
                _take(source, fields, _META_ALIASES.get(name, name), value[0] if value else "")
            if name == "ElementDataFile":
                break
        else:
            raise _endless(source)
        shape, dtype = _meta_layout(source, fields)
        affine, notes = _meta_affine(source, fields)
        scale, more = _meta_scale(source, fields, rescale)
        name = fields["ElementDataFile"]
        if name.upper() == "LOCAL":
            array = _meta_voxels(source, file, fields, shape, dtype)
        else:
            voxels = _detached(source, find, name)
            with voxels.open() as file:
                array = _meta_voxels(voxels, file, fields, shape, dtype, is_detached=True)
    return CTVolume(rescale_to_hu(array, *scale), affine, source.name, (*notes, *more))


def _is_true(fields: dict[str, str], name: str, default: str = "False") -> bool:
    """A truth value as MetaIO reads it, by its first letter."""
    return fields.get(name, default)[:1] in ("T", "t", "1")


def _meta_layout(source: ByteSource, fields: dict[str, str]) -> tuple[tuple[int, ...], np.dtype]:
    try:
        shape = drop_singletons([int(word) for word in fields["DimSize"].split()])
        channels = int(fields.get("ElementNumberOfChannels", "1"))
        dtype = np.dtype(_META_TYPES[fields["ElementType"].upper()])
    except (KeyError, ValueError) as error:
        raise VolumeError(
            source.name, "its MetaImage header lacks DimSize or a known ElementType", COPY_AGAIN
        ) from error
    if fields.get("Modality", "MET_MOD_CT").upper() not in _META_MODALITIES:
        raise VolumeError(source.name, "its Modality is not CT", "Pass a CT scan")
    if channels != 1 or min(shape, default=0) <= 0:
        raise VolumeError(
            source.name,
            f"it has shape {shape} and {channels} channels",
            "Pass one volume with three axes, one at a time",
        )
    is_big = _is_true(fields, "BinaryDataByteOrderMSB")
    check_voxels(source.name, shape, dtype)
    return shape, dtype.newbyteorder(">" if is_big else "<")


def _meta_affine(source: ByteSource, fields: dict[str, str]) -> tuple[np.ndarray, tuple[str, ...]]:
    spacing = fields.get("ElementSpacing") or fields.get("ElementSize")
    if spacing is None:
        raise VolumeError(source.name, "its header gives no ElementSpacing", "Write it with one, in mm")
    axes = fields.get("TransformMatrix")
    notes = () if axes else ("its header gives no TransformMatrix: axes taken towards L, P and S",)
    if not axes and fields.get("AnatomicalOrientation", "RAI").upper() not in _TOWARDS_LPS:
        reason = "its header gives no TransformMatrix, and its AnatomicalOrientation is not RAI"
        raise VolumeError(source.name, reason, "Write it with a TransformMatrix")
    offset = fields.get("Offset")
    count = len(fields["DimSize"].split())
    affine = np.eye(4)
    if axes:
        affine[:3, :3] = _directions_in_space(source, _numbers(source, "TransformMatrix", axes, count, count))
    spacing_mm = _numbers(source, "ElementSpacing", spacing, count)[:3]
    if not (spacing_mm > 0).all():
        raise VolumeError(source.name, f"its spacing is {tuple(spacing_mm.tolist())} mm", "Correct the header")
    if offset:
        affine[:3, 3] = _numbers(source, "Offset", offset, count)[:3]
    unit_mm, more = _unit(source, fields.get("DistanceUnits", ""))
    with np.errstate(all="ignore"):  # what is not finite is refused
        affine[:3, :3] *= spacing_mm
        affine = np.diag([unit_mm, unit_mm, unit_mm, 1.0]) @ _LPS_TO_RAS @ affine
    check_affine(source.name, affine)
    return affine, (*notes, *more)


def _directions_in_space(source: ByteSource, rows: np.ndarray) -> np.ndarray:
    """Unit columns of an affine from the axes that a header gives as rows; a fourth must be no part of them."""
    if rows[:3, 3:].any() or rows[3:, :3].any():
        raise VolumeError(source.name, "its TransformMatrix turns a fourth axis into space", "Write it with three axes")
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(rows[:3, :3], axis=1)
    if not (np.abs(lengths - 1) <= _LENGTH_TOLERANCE).all():  # perhaps they hold the spacing as well
        raise VolumeError(source.name, "its TransformMatrix is not made of unit vectors", "Correct the header")
    return rows[:3, :3].T / lengths  # which rounding makes other than 1, and the spacing with it


def _numbers(source: ByteSource, field: str, text: str, *shape: int) -> np.ndarray:
    try:
        numbers = np.array(text.split(), float)
    except ValueError as error:
        raise _bad_numbers(source, field, text) from error
    if numbers.size != math.prod(shape):
        raise VolumeError(source.name, f"its {field} is not that of {shape[0]} axes in mm", COPY_AGAIN)
    return numbers.reshape(shape)


def _meta_scale(
    source: ByteSource, fields: dict[str, str], rescale: bool
) -> tuple[tuple[float, float], tuple[str, ...]]:
    """Slope and intercept of a header, which ITK writes and does not apply."""
    slope, intercept = (
        _number(source, fields.get(f"ElementToIntensityFunction{part}", default), f"ElementToIntensityFunction{part}")
        for part, default in (("Slope", "1"), ("Offset", "0"))
    )
    if (slope, intercept) == (1, 0):
        return (1.0, 0.0), ()
    if rescale:
        refuse_second_rescale(source.name, slope, intercept)
    return (slope, intercept), (f"its header's intensity function was applied ({slope:g} x stored + {intercept:g})",)


def _meta_voxels(
    source: ByteSource,
    file: BinaryIO,
    fields: dict[str, str],
    shape: tuple[int, ...],
    dtype: np.dtype,
    is_detached: bool = False,
) -> np.ndarray:
    """Voxels from where a header stands, or from a file of their own."""
    if not _is_true(fields, "BinaryData", default="True"):
        return _text_voxels(source, file, shape, dtype)
    compressed = _is_true(fields, "CompressedData")
    promised = math.prod(shape) * dtype.itemsize
    check_promise(source, promised, compressed)
    try:
        header_size = int(fields.get("HeaderSize", "0"))
        stored = int(fields.get("CompressedDataSize", "0")) if compressed else promised
    except ValueError as error:
        raise VolumeError(source.name, "its MetaImage header is damaged", COPY_AGAIN) from error
    if header_size > 0:
        file.seek(header_size)
    elif header_size == -1 and 0 < stored <= source.size:
        file.seek(source.size - stored)
    is_alone = is_detached and header_size <= 0
    return read_array(source, ZlibFile(file) if compressed else file, shape, dtype, is_alone)


def _detached(source: ByteSource, find: Finder, name: str) -> ByteSource:
    """The file of voxels that a header names, if it lies beside the header or in a folder beside it."""
    name = name.removeprefix("./")
    written = name.encode("latin-1")  # as `_lines` decoded it
    names = {os.fsdecode(written)}
    for encoding in _NAME_ENCODINGS:
        with contextlib.suppress(UnicodeDecodeError):
            names.add(written.decode(encoding))
    names |= {each.replace("\\", "/") for each in names}  # as Windows writes folders
    if name and (voxels := find(names)) is not None:
        return voxels
    if not name or "/" in name or "\\" in name or name.upper().startswith("LIST") or re.search(r"%\d*d", name):
        raise VolumeError(
            source.name,
            "its voxels lie in other files",
            "Pass the path of the header with one file of voxels beside it, or in a folder beside it",
        )
    raise VolumeError(source.name, "the file of its voxels is not beside it", "Copy both files to one folder")
