"""One slice of a CT series in DICOM: what is known of it, and its pixels as HU.

Unusual:
- Uncompressed pixels are read straight from the file. Whether they are that is seen from their own element, because
  file meta information often names another transfer syntax; what is not certain goes to pydicom.
- For compressed ones the decoder is named, because pydicom would try one after the other until one "decodes" a damaged
  stream.
- Bits outside of BitsStored, which may hold overlays, are dropped here whatever decoded the pixels.
- Padding (PixelPaddingValue, and all up to PixelPaddingRangeLimit) becomes air, wherever its value lies: everywhere if
  that is no more than air, or if no other voxel of the scan comes within `_TISSUE_HU` of it. Else tissue has that value
  too, and only what runs in from the edges of a slice with all four corners of it is padding.

Source: DICOM PS3.3 (C.7.6.3, C.7.5.1.1.2), PS3.5 (A).
"""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .byte_sources_medct import ByteSource
from .volume_medct import AIR_HU, MAX_VOXELS, VolumeError

try:
    import pydicom
    import pydicom.pixels
except ImportError:
    pydicom = None

AGAIN = "Copy or export the file again"
DEFLATED = "1.2.840.10008.1.2.1.99"
_IMPLICIT_LITTLE, _EXPLICIT_LITTLE = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
_EXPLICIT_BIG = "1.2.840.10008.1.2.2"
# Decoders that refuse damaged streams, the first that is installed is used. For JPEG-LS gdcm goes first: pyjpegls is
# faster, but works for seconds on a stream that is cut short before it refuses it.
_DECODERS = {
    "1.2.840.10008.1.2.5": ("pydicom",),
    "1.2.840.10008.1.2.4.50": ("gdcm",),
    "1.2.840.10008.1.2.4.57": ("gdcm",),
    "1.2.840.10008.1.2.4.70": ("gdcm",),
    "1.2.840.10008.1.2.4.80": ("gdcm", "pyjpegls"),
    "1.2.840.10008.1.2.4.81": ("gdcm", "pyjpegls"),
    "1.2.840.10008.1.2.4.90": ("pylibjpeg", "gdcm"),
    "1.2.840.10008.1.2.4.91": ("pylibjpeg", "gdcm"),
    "1.2.840.10008.1.2.4.201": ("pylibjpeg",),
    "1.2.840.10008.1.2.4.202": ("pylibjpeg",),
    "1.2.840.10008.1.2.4.203": ("pylibjpeg",),
}
_UNCOMPRESSED = (_IMPLICIT_LITTLE, _EXPLICIT_LITTLE, _EXPLICIT_BIG, DEFLATED)
_UNDEFINED_LENGTH = 0xFFFFFFFF
_TISSUE_HU = 100
"""How near other voxels must come to a padding value for it to be one that tissue has."""
_JPEG_SIZE = re.compile(rb"\xff[\xc0-\xc3\xf7]..[\x02-\x10](....)", re.DOTALL)


@dataclass(frozen=True)
class PixelLayout:
    """How the pixels of a file are stored; one for all its frames."""

    shape: tuple[int, int]
    frames: int
    syntax: str
    bits_allocated: int
    bits_stored: int
    high_bit: int
    is_signed: bool
    padding: tuple[int, int] | None
    """Lowest and highest stored value that is no part of the scan."""
    offset: int | None
    """Where their element begins in the file; none if that is deflated."""

    @property
    def bytes(self) -> int:
        """Of all frames, uncompressed."""
        return self.frames * (self.shape[0] * self.shape[1] * self.bits_allocated // 8)


@dataclass(frozen=True)
class Slice:
    """One frame of one file: where it lies, what its values mean, and how to get at them."""

    file: ByteSource
    frame: int | None
    has_modality: bool
    pixels: PixelLayout
    position_mm: np.ndarray
    orientation: np.ndarray
    spacing_mm: np.ndarray
    written_steps_mm: tuple[float, ...]
    slope: float
    intercept: float
    is_hu: bool
    """Whether the header says that its slope and intercept give HU, or the caller does."""
    told: tuple[Any, ...]
    """What may tell it from slices of another scan; see `dicom_stacks_medct`."""

    @property
    def name(self) -> str:
        return name_of(self.file, self.frame)

    @property
    def padding_hu(self) -> tuple[float, float] | None:
        """Lowest and highest padding, HU."""
        if self.pixels.padding is None:
            return None
        lowest, highest = sorted(_scaled(np.array(self.pixels.padding), self.slope, self.intercept).tolist())
        return lowest, highest


def name_of(file: ByteSource, frame: int | None) -> str:
    return file.name if frame is None else f"{file.name} frame {frame + 1}"


@contextlib.contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Without pydicom's warnings and log lines, which hold values of the header."""
    logger = logging.getLogger("pydicom")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = was_disabled


def layout_of(header: Any, offset: int | None) -> PixelLayout:
    bits_stored, bits_allocated = int(header.get("BitsStored") or 16), int(header.get("BitsAllocated") or 16)
    high_bit, is_signed = header.get("HighBit"), int(header.get("PixelRepresentation") or 0) == 1
    is_little = header.original_encoding[1] is not False
    return PixelLayout(
        shape=(int(header.Rows), int(header.Columns)),
        frames=int(header.get("NumberOfFrames") or 1),
        syntax=str(header.file_meta.get("TransferSyntaxUID") or (_EXPLICIT_LITTLE if is_little else _EXPLICIT_BIG)),
        bits_allocated=bits_allocated,
        bits_stored=bits_stored,
        high_bit=bits_stored - 1 if high_bit is None else int(high_bit),
        is_signed=is_signed,
        padding=_padding_of(header, bits_allocated, is_signed),
        offset=offset,
    )


def _padding_of(header: Any, bits: int, is_signed: bool) -> tuple[int, int] | None:
    """Lowest and highest padding as pixels hold it, modulo 2^bits: that of signed ones is often written unsigned."""
    written = [header.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if written[0] is None or written[0] == "":
        return None
    numbers = [_whole(value) % 2**bits for value in written if value is not None and value != ""]
    numbers = [number - 2**bits if is_signed and number >= 2 ** (bits - 1) else number for number in numbers]
    return min(numbers), max(numbers)


def _whole(value: Any) -> int:
    """A whole number, or the bytes of one whose kind pydicom does not know."""
    return int.from_bytes(value, "little") if isinstance(value, bytes) else int(value)


def decode(slices: list[Slice], source: str) -> tuple[np.ndarray, list[str]]:
    """HU of ordered slices, `(k, row, column)`: int16 if slopes are 1 and all values fit, else float32; and remarks."""
    shape = (len(slices), *slices[0].pixels.shape)
    if np.prod(shape, dtype=float) > MAX_VOXELS:
        raise VolumeError(source, f"its headers promise shape {shape}", "Check the files, or crop the scan")
    for one in slices:
        _check_pixel_bytes(one)
    whole = all(one.slope == 1 and one.intercept.is_integer() for one in slices)
    hu = np.empty(shape, np.int16 if whole else np.float32)
    data_sets: dict[ByteSource, Any] = {}
    for k, one in enumerate(slices):
        values = hu_of(one, data_sets)
        if hu.dtype == np.int16 and values.dtype != np.int16:
            hu = hu.astype(np.float32)
        hu[k] = values
    notes = _clear_padding(hu, slices)
    if whole and hu.dtype != np.int16 and _fits_int16(hu.min(), hu.max()):  # but for padding
        hu = hu.astype(np.int16)
    return hu, notes


def _fits_int16(lowest: float, highest: float) -> bool:
    return lowest >= -(2**15) and highest < 2**15


def _clear_padding(hu: np.ndarray, slices: list[Slice]) -> list[str]:
    """Air instead of padding that lies above it, in place, by the rule at the top of this file."""
    ranges = [one.padding_hu for one in slices]
    padded = [(hu[k], *found) for k, found in enumerate(ranges) if found is not None and found[1] > AIR_HU]
    is_tissue, is_remarkable = any(_is_used(*one) for one in padded), False
    for values, lowest, highest in padded:
        outside = (values >= lowest) & (values <= highest)
        is_remarkable |= is_tissue and bool(outside.any())
        values[_from_edges(outside) if is_tissue else outside] = AIR_HU
    if not is_remarkable:
        return []
    return ["tissue has the value of its padding: taken for padding only where it surrounds the scan"]


def _is_used(hu: np.ndarray, lowest: float, highest: float) -> bool:
    """Whether other voxels of a slice come near its padding."""
    near = (hu >= lowest - _TISSUE_HU) & (hu <= highest + _TISSUE_HU)
    return bool((near & ((hu < lowest) | (hu > highest))).any())


def _from_edges(mask: np.ndarray) -> np.ndarray:
    """What of a mask `(row, column)` runs in straight from an edge; nothing if a corner lacks."""
    if not mask[[0, 0, -1, -1], [0, -1, 0, -1]].all():
        return np.zeros_like(mask)
    runs = np.logical_and.accumulate
    found = runs(mask, axis=0) | runs(mask[::-1], axis=0)[::-1]
    return found | runs(mask, axis=1) | runs(mask[:, ::-1], axis=1)[:, ::-1]


def _check_pixel_bytes(one: Slice) -> None:
    """Refuse uncompressed images that are longer than their file."""
    (rows, columns), pixels = one.pixels.shape, one.pixels
    if pixels.syntax in _UNCOMPRESSED and pixels.syntax != DEFLATED:
        promised = rows * columns * pixels.bits_allocated // 8 * ((one.frame or 0) + 1)
        if promised > one.file.size:
            raise VolumeError(one.name, f"it is cut short ({one.file.size} bytes for {rows} x {columns} pixels)", AGAIN)


def hu_of(one: Slice, data_sets: dict[ByteSource, Any]) -> np.ndarray:
    """HU of one slice, `(row, column)`: int16 if exact, else float32; padding that is no more than air becomes air."""
    try:
        words = _plain_pixels(one)
        if words is None:
            words = _decoded_pixels(one, data_sets)
        stored = _used_bits(words, one)
    except VolumeError:
        raise
    except Exception as error:  # decoders raise many kinds; as above for their texts
        raise VolumeError(one.name, f"its pixels cannot be decoded ({type(error).__name__})", AGAIN) from None
    if stored.shape != one.pixels.shape:
        raise VolumeError(one.name, f"its pixels have shape {stored.shape} instead of {one.pixels.shape}", AGAIN)
    hu = _scaled(stored, one.slope, one.intercept)
    padding, padding_hu = one.pixels.padding, one.padding_hu
    if padding_hu is not None and padding_hu[1] <= AIR_HU:
        hu[(stored >= padding[0]) & (stored <= padding[1]) & (hu < AIR_HU)] = AIR_HU
    if padding is not None and stored is not words:
        # Some write the padding over the unused bits as well.
        hu[(words == padding[0]) & (words != stored)] = AIR_HU
    return hu


def _used_bits(words: np.ndarray, one: Slice) -> np.ndarray:
    """Stored values of pixels: the bits in use, with their sign; the same array if all are."""
    width = 8 * words.dtype.itemsize
    # Of a compressed pixel that is narrower than the header says, all bits are in use.
    high_bit, bits = min(one.pixels.high_bit, width - 1), min(one.pixels.bits_stored, width)
    if bits == width:
        return words
    # Some scanners keep overlays in the unused bits; shifting up and down drops them and restores the sign.
    lowest = (words << (width - bits)) >> (width - bits)
    if high_bit == bits - 1 or np.array_equal(lowest, words):  # a HighBit of 15 is often wrong
        return lowest
    if (words & ((1 << (high_bit + 1 - bits)) - 1)).any():
        raise VolumeError(one.name, "its pixels do not lie where its HighBit says", AGAIN)
    return (words << (width - 1 - high_bit)) >> (width - bits)


def _scaled(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    is_whole = slope == 1 and intercept.is_integer()
    if is_whole and _fits_int16(int(stored.min()) + int(intercept), int(stored.max()) + int(intercept)):
        return (stored.astype(np.int32) + int(intercept)).astype(np.int16)
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _plain_pixels(one: Slice) -> np.ndarray | None:
    """Words of 16 bits straight from the file, without pydicom reading it again; none where they lie otherwise."""
    pixels = one.pixels
    if pixels.offset is None or pixels.bits_allocated != 16 or not 1 <= pixels.bits_stored <= pixels.high_bit + 1 <= 16:
        return None
    rows, columns = pixels.shape
    count = rows * columns * 2
    with one.file.open() as stream:
        stream.seek(pixels.offset)
        element = stream.read(12)
        is_explicit = element[4:8] in (b"OW\0\0", b"OB\0\0")
        length = int.from_bytes(element[8:12] if is_explicit else element[4:8], "little")
        # An odd length is none: letters of a kind of value that is not known here.
        if element[:4] != b"\xe0\x7f\x10\x00" or length == _UNDEFINED_LENGTH or length % 2:
            return None
        if pixels.syntax not in _UNCOMPRESSED and length != pixels.bytes:
            return None
        _check_length(one, length)
        stream.seek(pixels.offset + (12 if is_explicit else 8) + count * (one.frame or 0))
        data = stream.read(count)
    if len(data) != count:
        raise VolumeError(one.name, f"it is cut short ({len(data)} of {count} bytes of pixels)", AGAIN)
    return np.frombuffer(data, "<i2" if pixels.is_signed else "<u2").reshape(rows, columns)


def _check_length(one: Slice, length: int) -> None:
    """Refuse uncompressed pixels that are too few, or that hold whole frames more than the header says."""
    expected = one.pixels.bytes
    if length < expected:
        raise VolumeError(one.name, f"it is cut short ({length} of {expected} bytes of pixels)", AGAIN)
    if length >= expected + max(expected // one.pixels.frames, 2):
        raise VolumeError(
            one.name, f"its header promises {expected} bytes of pixels and it holds {length}", "Export the file again"
        )


def _decoded_pixels(one: Slice, data_sets: dict[ByteSource, Any]) -> np.ndarray:
    """Pixels by pydicom and its decoders; a multi-frame file is read once."""
    data_set = data_sets.get(one.file)
    if data_set is None:
        data_sets.clear()
        with one.file.open() as stream:
            data_set = pydicom.dcmread(stream)
        data_sets[one.file] = data_set
    # Of a compressed file that is cut short, pydicom makes a data set without any elements.
    if "PixelData" not in data_set:
        raise VolumeError(one.name, "it holds no pixels (cut short?)", AGAIN)
    syntax, options = one.pixels.syntax, {"correct_unused_bits": False}
    data_set.file_meta.TransferSyntaxUID = syntax
    if syntax not in _UNCOMPRESSED:
        options["decoding_plugin"] = _decoder(one.name, syntax)
        _check_code_stream(one, bytes(data_set.PixelData[: 2**12]))
    elif data_set["PixelData"].is_undefined_length:
        raise VolumeError(one.name, "its pixels are compressed, and its transfer syntax says they are not", AGAIN)
    else:
        _check_length(one, len(data_set.PixelData))
    return np.asarray(pydicom.pixels.pixel_array(data_set, index=one.frame or 0, **options))


def _decoder(name: str, syntax: str) -> str:
    known = _DECODERS.get(syntax)
    kind = pydicom.uid.UID(syntax).name
    if known is None:
        kind = kind if kind != syntax else "an unknown transfer syntax"
        raise VolumeError(name, f"its pixels are compressed in a way not supported ({kind})", "Export it uncompressed")
    available = pydicom.pixels.get_decoder(syntax).available_plugins
    for plugin in known:
        if plugin in available:
            return plugin
    raise VolumeError(
        name, f"its pixels are compressed ({kind}), which needs a decoder", "Install it: pip install medct[dicom]"
    )


def _check_code_stream(one: Slice, head: bytes) -> None:
    """Refuse a first code stream whose own size is not the header's, since decoders ask memory for what it claims."""
    size = None
    if (at := head.find(b"\xff\x4f\xff\x51")) >= 0:  # JPEG 2000: start of code stream, SIZ
        x1, y1, x0, y0 = (int.from_bytes(head[at + 8 + 4 * k : at + 12 + 4 * k], "big") for k in range(4))
        size = (y1 - y0, x1 - x0)
    elif head.find(b"\xff\xd8\xff") >= 0 and (found := _JPEG_SIZE.search(head)):
        size = (int.from_bytes(found[1][:2], "big"), int.from_bytes(found[1][2:], "big"))  # JPEG: start of frame
    if size is not None and size != one.pixels.shape:
        raise VolumeError(
            one.name, f"its compressed pixels are {size[0]} x {size[1]} instead of {one.pixels.shape}", AGAIN
        )
