"""One slice of a CT series in DICOM: what is known of it, and its pixels as HU.

Unusual: uncompressed pixels are read straight from the file; all others are the matter of `dicom_frames_medct`.

Source: DICOM PS3.3 (C.7.6.3, C.7.5.1.1.2), PS3.5 (A).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .byte_sources_medct import ByteSource
from .dicom_elements_medct import Elements
from .dicom_frames_medct import AGAIN, DEFLATED, EXPLICIT_LITTLE, IMPLICIT_LITTLE, UNCOMPRESSED, Frames, decoded_pixels
from .volume_medct import AIR_HU, MAX_VOXELS, VolumeError


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
    padding: int | None
    offset: int
    """Where their element begins, in the inflated data set if that is deflated."""
    table: bytes | None
    """Extended offset table of their frames."""

    @property
    def stored(self) -> Frames:
        bits = self.bits_allocated, self.bits_stored
        return Frames(self.syntax, self.shape, self.frames, *bits, self.is_signed, self.offset, self.table)


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


def layout_of(header: Elements, offset: int) -> PixelLayout:
    bits_stored = int(header.get("BitsStored") or 16)
    high_bit, padding = header.get("HighBit"), header.get("PixelPaddingValue")
    return PixelLayout(
        shape=(int(header.Rows), int(header.Columns)),
        frames=int(header.get("NumberOfFrames") or 1),
        syntax=str(header.file_meta.get("TransferSyntaxUID") or IMPLICIT_LITTLE),
        bits_allocated=int(header.get("BitsAllocated") or 16),
        bits_stored=bits_stored,
        high_bit=bits_stored - 1 if high_bit is None else int(high_bit),
        is_signed=int(header.get("PixelRepresentation") or 0) == 1,
        padding=None if padding is None or padding == "" else int(padding),
        offset=offset,
        table=header.get("ExtendedOffsetTable"),
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
            whole_hu, hu = hu[:k], np.empty(shape, np.float32)
            hu[:k] = whole_hu
        hu[k] = values
    return hu


def _check_pixel_bytes(one: Slice) -> None:
    """Refuse uncompressed images that are longer than their file."""
    (rows, columns), pixels = one.pixels.shape, one.pixels
    if pixels.syntax in UNCOMPRESSED and pixels.syntax != DEFLATED:
        promised = rows * columns * pixels.bits_allocated // 8 * ((one.frame or 0) + 1)
        if promised > one.file.size:
            raise VolumeError(one.name, f"it is cut short ({one.file.size} bytes for {rows} x {columns} pixels)", AGAIN)


def hu_of(one: Slice, data_sets: dict[ByteSource, Any]) -> np.ndarray:
    """HU of one slice, `(row, column)`: int16 if exact, else float32; padding outside the scan becomes air."""
    try:
        stored = _plain_pixels(one)
        if stored is None:
            stored = _used_bits(decoded_pixels(one.file, one.pixels.stored, one.frame or 0, data_sets), one.pixels)
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


def _used_bits(words: np.ndarray, pixels: PixelLayout) -> np.ndarray:
    """Stored values without what lies above BitsStored."""
    unused = max(8 * words.itemsize - pixels.bits_stored, 0)
    return words if unused == 0 else (words << unused) >> unused


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
        pixels.syntax not in (IMPLICIT_LITTLE, EXPLICIT_LITTLE)
        or pixels.bits_allocated != 16
        or not 1 <= pixels.bits_stored <= 16
        or pixels.high_bit != pixels.bits_stored - 1
    ):
        return None
    rows, columns = pixels.shape
    count = rows * columns * 2
    with one.file.open() as stream:
        stream.seek(pixels.offset)
        element = stream.read(8 if pixels.syntax == IMPLICIT_LITTLE else 12)
        is_known = pixels.syntax == IMPLICIT_LITTLE or element[4:6] in (b"OW", b"OB")
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
