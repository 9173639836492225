"""One slice of a CT series in DICOM: what is known of it, and its pixels as HU.

Unusual: uncompressed pixels are read straight from the file. For compressed ones the decoder is named, because pydicom
would try one after the other until one "decodes" a damaged stream.

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
_UNCOMPRESSED = (_IMPLICIT_LITTLE, _EXPLICIT_LITTLE, "1.2.840.10008.1.2.2", DEFLATED)
_JPEG_SIZE = re.compile(rb"\xff[\xc0-\xc3\xf7]..[\x02-\x10](....)", re.DOTALL)


@dataclass(frozen=True)
class PixelLayout:
    """How the pixels of a file are stored; one for all its frames."""

    shape: tuple[int, int]
    syntax: str
    bits_allocated: int
    bits_stored: int
    high_bit: int
    is_signed: bool
    padding: int | None
    offset: int | None
    """Where their element begins in the file; none if that is deflated."""


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

    @property
    def name(self) -> str:
        return name_of(self.file, self.frame)


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
    bits_stored = int(header.get("BitsStored") or 16)
    high_bit, padding = header.get("HighBit"), header.get("PixelPaddingValue")
    return PixelLayout(
        shape=(int(header.Rows), int(header.Columns)),
        syntax=str(header.file_meta.get("TransferSyntaxUID") or _IMPLICIT_LITTLE),
        bits_allocated=int(header.get("BitsAllocated") or 16),
        bits_stored=bits_stored,
        high_bit=bits_stored - 1 if high_bit is None else int(high_bit),
        is_signed=int(header.get("PixelRepresentation") or 0) == 1,
        padding=None if padding is None or padding == "" else int(padding),
        offset=offset,
    )


def decode(slices: list[Slice], source: str) -> np.ndarray:
    """HU of ordered slices, `(k, row, column)`: int16 if slopes are 1 and all values fit, else float32."""
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
    return hu


def _check_pixel_bytes(one: Slice) -> None:
    """Refuse uncompressed images that are longer than their file."""
    (rows, columns), pixels = one.pixels.shape, one.pixels
    if pixels.syntax in _UNCOMPRESSED and pixels.syntax != DEFLATED:
        promised = rows * columns * pixels.bits_allocated // 8 * ((one.frame or 0) + 1)
        if promised > one.file.size:
            raise VolumeError(one.name, f"it is cut short ({one.file.size} bytes for {rows} x {columns} pixels)", AGAIN)


def hu_of(one: Slice, data_sets: dict[ByteSource, Any]) -> np.ndarray:
    """HU of one slice, `(row, column)`: int16 if exact, else float32; padding outside the scan becomes air."""
    try:
        stored = _plain_pixels(one)
        if stored is None:
            stored = _decoded_pixels(one, data_sets)
    except VolumeError:
        raise
    except Exception as error:  # decoders raise many kinds; as above for their texts
        raise VolumeError(one.name, f"its pixels cannot be decoded ({type(error).__name__})", AGAIN) from None
    if stored.shape != one.pixels.shape:
        raise VolumeError(one.name, f"its pixels have shape {stored.shape} instead of {one.pixels.shape}", AGAIN)
    hu = _scaled(stored, one.slope, one.intercept)
    if one.pixels.padding is not None:
        # Modulo 2^16, because a padding of signed pixels is often written as if it were unsigned.
        outside = (stored.astype(np.int32) & 0xFFFF) == (one.pixels.padding & 0xFFFF)
        if outside.any() and hu[outside].flat[0] < AIR_HU:
            hu[outside] = AIR_HU
    return hu


def _scaled(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    if slope == 1 and intercept.is_integer():
        lowest, highest = int(stored.min()) + int(intercept), int(stored.max()) + int(intercept)
        if lowest >= -(2**15) and highest < 2**15:
            return (stored.astype(np.int32) + int(intercept)).astype(np.int16)
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _plain_pixels(one: Slice) -> np.ndarray | None:
    """Pixels of 16 bits straight from the file, without pydicom reading it again; none where they lie otherwise."""
    pixels = one.pixels
    if (
        pixels.offset is None
        or pixels.syntax not in (_IMPLICIT_LITTLE, _EXPLICIT_LITTLE)
        or pixels.bits_allocated != 16
        or not 1 <= pixels.bits_stored <= 16
        or pixels.high_bit != pixels.bits_stored - 1
    ):
        return None
    rows, columns = pixels.shape
    count = rows * columns * 2
    with one.file.open() as stream:
        stream.seek(pixels.offset)
        element = stream.read(8 if pixels.syntax == _IMPLICIT_LITTLE else 12)
        is_known = pixels.syntax == _IMPLICIT_LITTLE or element[4:6] in (b"OW", b"OB")
        if element[:4] != b"\xe0\x7f\x10\x00" or not is_known:
            return None
        length = int.from_bytes(element[-4:], "little")
        if length < count * ((one.frame or 0) + 1):
            raise VolumeError(one.name, f"it is cut short ({length} bytes of pixels)", AGAIN)
        stream.seek(count * (one.frame or 0), 1)
        data = stream.read(count)
    if len(data) != count:
        raise VolumeError(one.name, f"it is cut short ({len(data)} of {count} bytes of pixels)", AGAIN)
    stored = np.frombuffer(data, "<i2" if pixels.is_signed else "<u2").reshape(rows, columns)
    unused = 16 - pixels.bits_stored
    # Some scanners keep overlays in the unused bits; shifting up and down drops them and restores the sign.
    return stored if unused == 0 else (stored << unused) >> unused


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
    syntax, options = one.pixels.syntax, {}
    if syntax not in _UNCOMPRESSED:
        options["decoding_plugin"] = _decoder(one.name, syntax)
        _check_code_stream(one, bytes(data_set.PixelData[: 2**12]))
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
