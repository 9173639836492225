"""One slice of a CT series in DICOM: what is known of it, and its pixels as HU.

Unusual:
- Bits outside of BitsStored, which may hold overlays, are dropped here, however pixels are stored.
- Where the header does not say which bits of a pixel count, or whether it has a sign, a slice is read if its pixels are
  the same numbers either way.
- Padding (PixelPaddingValue, and all up to PixelPaddingRangeLimit) becomes air, wherever its value lies: everywhere if
  that is no more than air, or more than any CT has. Between these it is padding only where it surrounds the scan, since
  tissue and saturated metal may have its value too: what hangs together with a corner of a slice; and if other voxels
  of the scan come within `_TISSUE_HU` of it, only what runs in straight from the edges of a slice with four such
  corners.

Source: DICOM PS3.3 (C.7.6.3, C.7.5.1.1.2), PS3.5 (A).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .byte_sources_medct import ByteSource
from .dicom_elements_medct import Elements
from .dicom_frames_medct import AGAIN, DEFLATED, EXPLICIT_BIG, EXPLICIT_LITTLE, UNCOMPRESSED, Frames, stored_pixels
from .volume_medct import AIR_HU, HIGHEST_HU, MAX_VOXELS, VolumeError

_LEAST_BITS = 12
"""Of a pixel of CT."""
AIR_HU_RANGE = (-1100, -900)
"""What air has in HU, and hardly any other unit."""
_TISSUE_HU = 100
"""How near other voxels must come to a padding value for it to be one that tissue has."""


@dataclass(frozen=True)
class PixelLayout(Frames):
    """How the pixels of a file are stored, and which bits and values are of the scan; one for all its frames."""

    high_bit: int
    padding: tuple[int, int] | None
    """Lowest and highest stored value that is not part of the scan."""
    missing: tuple[str, ...]
    """Attributes that say what a pixel is, and that the header lacks."""


@dataclass(frozen=True)
class Slice:
    """One frame of one file: where it lies, what its values mean, and how to get at them."""

    file: ByteSource
    frame: int | None
    remarks: tuple[str, ...]
    """What a user should know of it, though it is read."""
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
    def instance_number(self) -> Any:
        """As the header has it: a number, if it is sound."""
        return self.told[-1]

    @property
    def padding_hu(self) -> tuple[float, float] | None:
        """Lowest and highest padding, HU."""
        if self.pixels.padding is None:
            return None
        lowest, highest = sorted(_scaled(np.array(self.pixels.padding), self.slope, self.intercept).tolist())
        return lowest, highest

    @property
    def is_padded_with_air(self) -> bool:
        """Whether padding has values of air, so that it shows that pixels are HU."""
        lowest, highest = self.padding_hu or (math.nan, math.nan)
        return AIR_HU_RANGE[0] <= lowest and highest <= AIR_HU_RANGE[1]


def name_of(file: ByteSource, frame: int | None) -> str:
    """What to call a slice in messages.

    Args:
        file: The file that holds it.
        frame: Its index in a multi-frame file, from 0; `None` in a single-frame file.
    """
    return file.name if frame is None else f"{file.name} frame {frame + 1}"


def layout_of(header: Elements, offset: int) -> PixelLayout:
    """How the pixels of a file are stored.

    Args:
        header: The file's data set.
        offset: Where the pixel data element begins, bytes.

    Raises:
        ValueError: If the header is damaged.
    """
    bits_allocated, sign = int(header.get("BitsAllocated") or 16), header.get("PixelRepresentation")
    bits_stored, high_bit, missing = _bits_of(header, bits_allocated)
    is_signed = sign == 1
    _, is_little = header.original_encoding
    return PixelLayout(
        syntax=str(header.file_meta.get("TransferSyntaxUID") or (EXPLICIT_LITTLE if is_little else EXPLICIT_BIG)),
        shape=(int(header.Rows), int(header.Columns)),
        count=int(header.get("NumberOfFrames") or 1),
        bits_allocated=bits_allocated,
        bits_stored=bits_stored,
        is_signed=is_signed,
        is_little=is_little,
        offset=offset,
        table=header.get("ExtendedOffsetTable"),
        high_bit=high_bit,
        padding=_padding_of(header, bits_allocated, is_signed),
        missing=missing if sign in (0, 1) else (*missing, "PixelRepresentation"),
    )


def _bits_of(header: Elements, bits_allocated: int) -> tuple[int, int, tuple[str, ...]]:
    """BitsStored, HighBit, and which of them is assumed because neither says it; each follows from the other."""
    bits_stored, high_bit = int(header.get("BitsStored") or 0), header.get("HighBit")
    if bits_stored:
        return (bits_stored, bits_stored - 1, ("HighBit",)) if high_bit is None else (bits_stored, int(high_bit), ())
    if high_bit is not None and int(high_bit) + 1 >= min(_LEAST_BITS, bits_allocated):
        return int(high_bit) + 1, int(high_bit), ()
    return bits_allocated, bits_allocated - 1, ("BitsStored",)


def _padding_of(header: Elements, bits: int, is_signed: bool) -> tuple[int, int] | None:
    """Lowest and highest padding as pixels hold it, modulo 2^bits: that of signed ones is often written unsigned."""
    written = [header.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if written[0] is None:
        return None
    numbers = [_whole(value) % 2**bits for value in written if value is not None]
    numbers = [number - 2**bits if is_signed and number >= 2 ** (bits - 1) else number for number in numbers]
    return min(numbers), max(numbers)


def _whole(value: Any) -> int:
    """A whole number, or the bytes of one whose kind is not known."""
    return int.from_bytes(value, "little") if isinstance(value, bytes) else int(value)


def decode(slices: list[Slice], source: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Decode slices to HU.

    Args:
        slices: In the order of the result.
        source: What to call them in messages.

    Returns:
        HU `(k, row, column)`, int16 if all slopes are 1 and all values fit, else float32; how many voxels of each slice
        `(k,)` are air only because they are padding, which says nothing of the scan; and remarks.

    Raises:
        VolumeError: If a slice is damaged, or the headers promise too many voxels.
    """
    shape = (len(slices), *slices[0].pixels.shape)
    if np.prod(shape, dtype=float) > MAX_VOXELS:
        raise VolumeError(source, f"its headers promise shape {shape}", "Check the files, or crop the scan")
    for one in slices:
        _check_pixel_bytes(one)
    whole = all(one.slope == 1 and one.intercept.is_integer() for one in slices)
    hu, padded = np.empty(shape, np.int16 if whole else np.float32), np.zeros(len(slices), int)
    cache: dict[ByteSource, Any] = {}
    for k, one in enumerate(slices):
        values, padded[k] = hu_of(one, cache)
        if hu.dtype == np.int16 and values.dtype != np.int16:
            whole_hu, hu = hu[:k], np.empty(shape, np.float32)
            hu[:k] = whole_hu
        hu[k] = values
    notes = _clear_padding(hu, slices, padded)
    if whole and hu.dtype != np.int16 and _fits_int16(hu.min(), hu.max()):  # but for padding
        hu = hu.astype(np.int16)
    return hu, padded, notes


def _fits_int16(lowest: float, highest: float) -> bool:
    return lowest >= -(2**15) and highest < 2**15


def _clear_padding(hu: np.ndarray, slices: list[Slice], padded: np.ndarray) -> list[str]:
    """Air instead of padding that lies above it, and its count, in place, by the rule at the top of this file."""
    ranges = [(k, *found) for k, one in enumerate(slices) if (found := one.padding_hu) and found[1] > AIR_HU]
    is_tissue, cleared, is_kept = any(_is_used(hu[k], *ends) for k, *ends in ranges), 0, False
    for k, lowest, highest in ranges:
        values = hu[k]
        found = (values >= lowest) & (values <= highest)
        around = _from_edges(found) if is_tissue else _from_corners(found)
        beyond = found & ~around & (values > HIGHEST_HU)
        cleared += int(np.count_nonzero(beyond))
        is_kept |= bool((found if is_tissue else found & ~around & ~beyond).any())
        values[around | beyond] = AIR_HU
        padded[k] += 0 if slices[k].is_padded_with_air else np.count_nonzero(around | beyond)
    return _remarks_on_padding(is_kept, cleared)


def _remarks_on_padding(is_kept: bool, cleared: int) -> list[str]:
    notes = []
    if is_kept:
        notes.append(
            "tissue has the value of its padding, or metal: taken for padding only where it surrounds the scan"
        )
    if cleared:
        notes.append(f"{cleared} voxels within the scan have the value of its padding: set to {AIR_HU} HU")
    return notes


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


def _from_corners(mask: np.ndarray) -> np.ndarray:
    """What of a mask `(row, column)` hangs together with a corner, side by side."""
    result, corners = np.zeros_like(mask), np.ix_((0, -1), (0, -1))
    result[corners] = mask[corners]
    if not result.any():
        return result
    found = result[mask]
    lines = _runs_of(mask)[mask], _runs_of(mask.T).T[mask]
    before, count = 0, np.count_nonzero(found)
    while before < count < len(found):
        for runs in lines:
            reached = np.zeros(runs.max() + 1, bool)
            reached[runs[found]] = True
            found = reached[runs]
        before, count = count, np.count_nonzero(found)
    result[mask] = found
    return result


def _runs_of(mask: np.ndarray) -> np.ndarray:
    """The number of the run along its row for each pixel of a mask `(row, column)`, different in every row."""
    starts = mask.copy()
    starts[:, 1:] &= ~mask[:, :-1]
    return np.cumsum(starts).reshape(mask.shape)


def _check_pixel_bytes(one: Slice) -> None:
    """Refuse what is named uncompressed and longer than its file."""
    (rows, columns), pixels = one.pixels.shape, one.pixels
    if pixels.syntax in UNCOMPRESSED and pixels.syntax != DEFLATED:
        promised = rows * columns * pixels.bits_allocated // 8 * ((one.frame or 0) + 1)
        if promised > one.file.size:
            stored_pixels(one.file, one.pixels, one.frame or 0, {})  # says whether it was cut, or is compressed


def hu_of(one: Slice, cache: dict[ByteSource, Any]) -> tuple[np.ndarray, int]:
    """HU of one slice; padding that is no more than air becomes air.

    Args:
        one: The slice.
        cache: As for `stored_pixels`.

    Returns:
        HU `(row, column)`, int16 if exact, else float32; and how many pixels are air only because they are padding.
    """
    try:
        words = stored_pixels(one.file, one.pixels, one.frame or 0, cache)
        stored = _used_bits(words, one)
        if one.pixels.missing:
            _check_no_choice(words, one)
    except VolumeError:
        raise
    except Exception as error:  # of many kinds
        raise VolumeError(one.name, f"its pixels cannot be decoded ({type(error).__name__})", AGAIN) from None
    hu = _scaled(stored, one.slope, one.intercept)
    if (padding := one.pixels.padding) is None:
        return hu, 0
    found = np.zeros(hu.shape, bool)
    if one.padding_hu[1] <= AIR_HU:
        found = (stored >= padding[0]) & (stored <= padding[1]) & (hu < AIR_HU)
    if stored is not words:
        # Some write the padding over the unused bits as well.
        found |= (words == padding[0]) & (words != stored)
    hu[found] = AIR_HU
    return hu, 0 if one.is_padded_with_air else int(np.count_nonzero(found))


def _used_bits(words: np.ndarray, one: Slice) -> np.ndarray:
    """Stored values of pixels: the bits in use, with their sign; the same array if all are."""
    width = 8 * words.dtype.itemsize
    # Of a compressed pixel that is narrower than the header says, all bits are in use.
    high_bit, bits = min(one.pixels.high_bit, width - 1), min(one.pixels.bits_stored, width)
    if bits == width:
        return words
    # Some scanners keep overlays in the unused bits.
    lowest = _lowest_bits(words, bits)
    if high_bit == bits - 1 or np.array_equal(lowest, words):  # a HighBit of 15 is often wrong
        return lowest
    if high_bit < bits or (words & ((1 << (high_bit + 1 - bits)) - 1)).any():
        raise VolumeError(one.name, "its pixels do not lie where its HighBit says", AGAIN)
    return (words << (width - 1 - high_bit)) >> (width - bits)


def _lowest_bits(words: np.ndarray, bits: int) -> np.ndarray:
    """So many bits of pixels: shifting up and down drops the others and restores the sign."""
    unused = 8 * words.dtype.itemsize - bits
    return (words << unused) >> unused if unused else words


def _check_no_choice(words: np.ndarray, one: Slice) -> None:
    """Refuse pixels that may be other numbers than those read, since the header does not say what they are."""
    pixels = one.pixels
    least = min(_LEAST_BITS if "BitsStored" in pixels.missing else pixels.bits_stored, 8 * words.dtype.itemsize)
    lowest = _lowest_bits(words, least)
    if pixels.missing[0] != "PixelRepresentation" and not np.array_equal(lowest, words):
        raise _undescribed(one.name, pixels.missing[0], "which bits of its pixels count")
    # A compressed pixel may have its sign below the bits in use, in a stream of fewer bits.
    sign = least if pixels.syntax in UNCOMPRESSED else min(least, _LEAST_BITS)
    if "PixelRepresentation" in pixels.missing and (lowest >= 1 << (sign - 1)).any():
        raise _undescribed(one.name, "PixelRepresentation", "whether its pixels have a sign")


def _undescribed(name: str, attribute: str, what: str) -> VolumeError:
    return VolumeError(name, f"it has no {attribute}, so it is not known {what}", "Export it with that attribute")


def _scaled(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    is_whole = slope == 1 and intercept.is_integer()
    if is_whole and _fits_int16(int(stored.min()) + int(intercept), int(stored.max()) + int(intercept)):
        return (stored.astype(np.int32) + int(intercept)).astype(np.int16)
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
