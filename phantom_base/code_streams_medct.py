"""Compressed frames, before and after a decoder sees them: which bytes are whose, what they promise, what was consumed.

Decoders ask memory for what a code stream claims, and some go on after damage with wrong pixels and no word. So each
frame is walked from marker to marker first, to its very end: its size must be the header's, and it must have an end.
Of lossless JPEG the bits that the decoded pixels took are counted, and of run lengths every byte; both must come out
even. In run lengths and JPEG 2000 a lost block of a disk shows as zeros, more than any encoder writes. Other changes
inside coded data that no count tells, and no decoder, cannot be known: none of these formats has a checksum.

Source: DICOM PS3.5 (A.4, G), ITU-T T.81 (B, H), T.87 (C), T.800 (A).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_ITEM, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
_MAX_RLE_RATIO = 64
_RLE_PADDING_BYTES = 16
# Most zeros in a row in sound streams: 128 pixels as they are, and padding; an empty packet of JPEG 2000 is one.
_RLE_ZEROS, _JPEG2000_ZEROS = 160, 256


class StreamError(Exception):
    """A frame that is damaged or not what the header says; the message says how."""


def _check_holes(stream: bytes, most: int) -> None:
    if bytes(most + 1) in stream:
        raise StreamError(f"there is a hole of more than {most} zeros in the compressed pixels")


# ---------------------------------------------------------------------------------------------------------------------
# Fragments to frames
# ---------------------------------------------------------------------------------------------------------------------


def frames_of(element: bytes, count: int, offsets: list[int] | None = None) -> list[bytes]:
    """The code streams of a file's frames.

    Args:
        element: Value of its pixel data, from the first item on.
        count: How many frames.
        offsets: Extended offset table, if there is one.

    Raises:
        StreamError: If fragments are missing, or do not make so many frames.
    """
    starts, fragments = _fragments(element)
    table, starts, fragments = fragments[0], starts[1:], fragments[1:]
    if offsets is None:
        offsets = np.frombuffer(table[: len(table) // 4 * 4], "<u4").tolist()
    if count == 1:
        return [b"".join(fragments)]
    if len(fragments) == count:
        return fragments
    if len(offsets) == count:
        numbers = {start - starts[0]: number for number, start in enumerate(starts)}
        firsts = [numbers.get(offset, -1) for offset in offsets]
        if firsts[0] != 0 or any(a >= b for a, b in itertools.pairwise(firsts)):
            raise StreamError("the table of frames does not fit the fragments")
    else:
        # A frame ends with the fragment that ends with the end of an image.
        lasts = [number for number, part in enumerate(fragments) if b"\xff\xd9" in part[-10:]]
        firsts = [0, *(last + 1 for last in lasts[:-1])]
        if len(firsts) != count or lasts[-1:] != [len(fragments) - 1]:
            raise StreamError(f"{len(fragments)} fragments do not make {count} frames")
    return [b"".join(fragments[a:b]) for a, b in zip(firsts, [*firsts[1:], len(fragments)], strict=True)]


def _fragments(element: bytes) -> tuple[list[int], list[bytes]]:
    """Where items begin, and what they hold; the first is the table of frames."""
    at, starts, fragments = 0, [], []
    while element[at : at + 4] == _ITEM:
        length = int.from_bytes(element[at + 4 : at + 8], "little")
        starts.append(at)
        fragments.append(element[at + 8 : at + 8 + length])
        at += 8 + length
    if element[at : at + 4] != _END or len(fragments) < 2:
        raise StreamError("the fragments are cut short or damaged")
    return starts, fragments


# ---------------------------------------------------------------------------------------------------------------------
# JPEG and JPEG-LS
# ---------------------------------------------------------------------------------------------------------------------

_SOI, _EOI, _SOS, _DHT, _DRI, _DNL = 0xD8, 0xD9, 0xDA, 0xC4, 0xDD, 0xDC
_LOSSLESS, _LS = 0xC3, 0xF7
_FRAMES = {*range(0xC0, 0xD0), _LS} - {_DHT, 0xC8, 0xCC}


@dataclass
class Jpeg:
    """What a JPEG or JPEG-LS stream says of itself."""

    kind: int
    precision: int
    end: int
    """Behind its last marker; padding may follow."""
    coded: bytes = b""
    code_lengths: np.ndarray | None = None
    """Bits of the code of each category, 0 where there is none."""
    predictor: int = 0
    shift: int = 0
    restarts: int = 0


def check_jpeg(stream: bytes, shape: tuple[int, int]) -> Jpeg:
    """Walk a JPEG or JPEG-LS stream from its first marker to its last.

    Args:
        stream: The code stream of one frame.
        shape: `(row, column)` according to the header, pixels.

    Returns:
        What the stream says about itself.

    Raises:
        StreamError: If it is not a single grey image of that size, or ends too early.
    """
    if stream[:2] != b"\xff\xd8":
        raise StreamError("the compressed pixels are damaged (without a beginning)")
    found, tables, at = None, {}, 2
    restarts = 0
    while True:
        code, at = _marker(stream, at)
        if code == _EOI:
            break
        length = int.from_bytes(stream[at : at + 2], "big")
        segment = stream[at + 2 : at + length]
        if length < 2 or at + length > len(stream):
            raise StreamError("the compressed pixels are cut short or damaged")
        at += length
        if code in _FRAMES:
            if found is not None:
                raise StreamError("the compressed pixels hold more than one image")
            found = _frame_header(code, segment, shape)
        elif code == _DHT:
            tables |= _huffman_lengths(segment)
        elif code == _DRI:
            restarts = int.from_bytes(segment, "big")
        elif code == _DNL or (code == 0xF8 and segment[:1] == b"\x04"):
            raise StreamError("the compressed pixels change their size")
        elif code == _SOS:
            if found is None or found.coded or len(segment) < 6 or segment[0] != 1:
                raise StreamError("the compressed pixels are damaged (scans)")
            end = _end_of_coded(stream, at, found.kind == _LS)
            found.coded, at = stream[at:end], end
            found.code_lengths = tables.get(segment[2] >> 4)
            found.predictor, found.shift, found.restarts = segment[3], segment[5] & 15, restarts
    if found is None or not found.coded:
        raise StreamError("the compressed pixels are damaged (without any)")
    found.end = at
    if b"\xff\xd8\xff" in stream[at:]:
        raise StreamError("the compressed pixels hold more than one image")
    return found


def _marker(stream: bytes, at: int) -> tuple[int, int]:
    """The marker at a position, whatever fills stand before it, and where its segment begins."""
    if stream[at : at + 1] != b"\xff":
        raise StreamError("the compressed pixels are cut short or damaged")
    while stream[at : at + 1] == b"\xff":
        at += 1
    if at >= len(stream):
        raise StreamError("the compressed pixels are cut short or damaged (without an end)")
    return stream[at], at + 1


def _end_of_coded(stream: bytes, at: int, is_ls: bool) -> int:
    """Where the first marker stands that is not part of coded data."""
    data = np.frombuffer(stream, np.uint8, offset=at)
    places = np.flatnonzero(data[:-1] == 0xFF)
    following = data[places + 1]
    # There a byte of 255 is followed by 0, by the number of a restart, or in JPEG-LS by a bit that is 0.
    is_marker = (following >= (0x80 if is_ls else 1)) & ((following < 0xD0) | (following > 0xD7))
    if not is_marker.any():
        raise StreamError("the compressed pixels are cut short or damaged (without an end)")
    return at + int(places[is_marker.argmax()])


def _frame_header(code: int, segment: bytes, shape: tuple[int, int]) -> Jpeg:
    if len(segment) < 9:
        raise StreamError("the compressed pixels are damaged")
    size = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
    _check_size(size, shape, segment[5])
    if not 2 <= segment[0] <= 16:
        raise StreamError(f"the compressed pixels have {segment[0]} bits")
    return Jpeg(code, segment[0], 0)


def _check_size(size: tuple[int, int], shape: tuple[int, int], samples: int) -> None:
    if size != shape:
        raise StreamError(f"the compressed pixels are {size[0]} x {size[1]} instead of {shape}")
    if samples != 1:
        raise StreamError(f"the compressed pixels have {samples} colours")


def _huffman_lengths(segment: bytes) -> dict[int, np.ndarray]:
    """Lengths of codes by category, for each table of a segment."""
    tables = {}
    while len(segment) >= 17:
        lengths, total = np.zeros(256, np.uint8), sum(segment[1:17])
        lengths[list(segment[17 : 17 + total])] = np.repeat(np.arange(1, 17), list(segment[1:17]))[: len(segment) - 17]
        tables[segment[0] & 15] = lengths
        segment = segment[17 + total :]
    return tables


def check_consumed(stream: Jpeg, pixels: np.ndarray) -> None:
    """Compare the bits of a lossless JPEG with those that its pixels take; a tail of nothing decodes without a word.

    Args:
        stream: As `check_jpeg` found it; other kinds are let pass.
        pixels: `(row, column)`, as decoded.

    Raises:
        StreamError: If bits are left over or missing.
    """
    rows, columns = pixels.shape
    # Predictions begin anew, and coded data with a whole byte, every so many rows.
    step = stream.restarts // columns if stream.restarts else rows
    if stream.kind != _LOSSLESS or stream.code_lengths is None or stream.restarts % columns:
        return
    values = (pixels >> stream.shift).astype(np.uint16)
    magnitude = np.abs(np.arange(2**16, dtype=np.uint16).view(np.int16).astype(np.int32))
    category = np.frexp(magnitude.astype(np.float32))[1]  # bit length
    bits = (stream.code_lengths[category] + np.where(category == 16, 0, category)).astype(np.uint8)
    needed = 0
    for row in range(0, rows, step):
        part = values[row : row + step]
        needed += (int(bits[part - _predicted(part, stream)].sum(dtype=np.int64)) + 7) // 8
    available = len(stream.coded) - stream.coded.count(b"\xff\x00") - 2 * ((rows - 1) // step)
    if needed != available:
        raise StreamError(f"the compressed pixels are damaged ({available} bytes of them, {needed} were needed)")


def _predicted(values: np.ndarray, stream: Jpeg) -> np.ndarray:
    """What each pixel was predicted to be from those before it, modulo 2^16."""
    predicted = np.empty_like(values)
    predicted[0, 0] = 1 << (stream.precision - stream.shift - 1)
    predicted[0, 1:] = values[0, :-1]
    predicted[1:, 0] = values[:-1, 0]
    left, above, corner = (part.astype(np.int32) for part in (values[1:, :-1], values[:-1, 1:], values[:-1, :-1]))
    rule = _PREDICTORS.get(stream.predictor)
    if rule is None:
        raise StreamError("the compressed pixels are damaged (predictor)")
    predicted[1:, 1:] = rule(left, above, corner).astype(np.uint16)
    return predicted


_PREDICTORS: dict[int, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    1: lambda left, above, corner: left,
    2: lambda left, above, corner: above,
    3: lambda left, above, corner: corner,
    4: lambda left, above, corner: left + above - corner,
    5: lambda left, above, corner: left + ((above - corner) >> 1),
    6: lambda left, above, corner: above + ((left - corner) >> 1),
    7: lambda left, above, corner: (left + above) >> 1,
}


# ---------------------------------------------------------------------------------------------------------------------
# JPEG 2000
# ---------------------------------------------------------------------------------------------------------------------


def check_jpeg2000(stream: bytes, shape: tuple[int, int]) -> int:
    """Walk a JPEG 2000 code stream, bare or in a JP2 file, from tile-part to tile-part.

    Args:
        stream: The code stream of one frame.
        shape: `(row, column)` according to the header, pixels.

    Returns:
        Bits per pixel.

    Raises:
        StreamError: If it is not a single grey image of that size, or ends too early.
    """
    at = 0 if stream[:4] == b"\xff\x4f\xff\x51" else _in_jp2(stream)
    if stream[at : at + 4] != b"\xff\x4f\xff\x51":
        raise StreamError("the compressed pixels are damaged (without a beginning)")
    at, precision, packets = at + 2, None, 0
    while stream[at : at + 2] not in (b"\xff\xd9", b"\xff\x90"):
        length = int.from_bytes(stream[at + 2 : at + 4], "big")
        if stream[at : at + 1] != b"\xff" or length < 2 or at + length > len(stream):
            raise StreamError("the compressed pixels are cut short or damaged")
        if stream[at + 1] == 0x51:
            if precision is not None:
                raise StreamError("the compressed pixels hold more than one image")
            precision = _check_siz(stream[at + 4 : at + 2 + length], shape)
        elif stream[at + 1] == 0x52 and length >= 12:  # layers, resolutions
            packets = int.from_bytes(stream[at + 6 : at + 8], "big") * (stream[at + 9] + 1)
        at += 2 + length
    _check_holes(stream[at:], _JPEG2000_ZEROS + packets)
    while stream[at : at + 2] == b"\xff\x90":
        length = int.from_bytes(stream[at + 6 : at + 10], "big")
        if length == 0:  # up to the end
            at = max(stream.rfind(b"\xff\xd9"), at + 12)
        elif length < 14:
            raise StreamError("the compressed pixels are damaged")
        else:
            at += length
    if stream[at : at + 2] != b"\xff\xd9":
        raise StreamError("the compressed pixels are cut short or damaged (without an end)")
    return precision


def _in_jp2(stream: bytes) -> int:
    """Where the code stream begins in the boxes of a JP2 file."""
    at = 0
    while at + 8 <= len(stream):
        length, kind = int.from_bytes(stream[at : at + 4], "big"), stream[at + 4 : at + 8]
        header = 16 if length == 1 else 8
        if kind == b"jp2c":
            return at + header
        if length == 1:
            length = int.from_bytes(stream[at + 8 : at + 16], "big")
        if length < header:
            break
        at += length
    return len(stream)


def _check_siz(segment: bytes, shape: tuple[int, int]) -> int:
    if len(segment) < 37:
        raise StreamError("the compressed pixels are damaged")
    x1, y1, x0, y0, tile_x, tile_y, tile_x0, tile_y0 = np.frombuffer(segment[2:34], ">u4").tolist()
    _check_size((y1 - y0, x1 - x0), shape, int.from_bytes(segment[34:36], "big"))
    precision, step_x, step_y = (segment[36] & 0x7F) + 1, segment[37:38], segment[38:39]
    if precision > 32 or (step_x, step_y) != (b"\x01", b"\x01") or not tile_x or not tile_y:
        raise StreamError("the compressed pixels are damaged")
    if -((tile_x0 - x1) // tile_x) * -((tile_y0 - y1) // tile_y) > 2**16:
        raise StreamError("the compressed pixels are damaged (tiles)")
    return precision


# ---------------------------------------------------------------------------------------------------------------------
# Run lengths
# ---------------------------------------------------------------------------------------------------------------------


def decode_rle(stream: bytes, shape: tuple[int, int], bits_allocated: int) -> np.ndarray:
    """The pixels of one grey frame in run lengths.

    Args:
        stream: Of one frame.
        shape: `(row, column)`.
        bits_allocated: Of a pixel.

    Returns:
        `shape`, unsigned.

    Raises:
        StreamError: If any of its segments holds more or fewer bytes than the frame.
    """
    count, item_size = shape[0] * shape[1], bits_allocated // 8
    number = int.from_bytes(stream[:4], "little")
    starts = np.frombuffer(stream[4:64].ljust(60, b"\0"), "<u4").tolist()
    if bits_allocated not in (8, 16, 32) or number != item_size:
        raise StreamError(f"the compressed pixels have {number} bytes each instead of {bits_allocated} bits")
    starts, others = [*starts[:number], len(stream)], starts[number:]
    if starts[0] != 64 or any(others) or any(a >= b for a, b in itertools.pairwise(starts)):
        raise StreamError("the compressed pixels are damaged (segments)")
    if count > _MAX_RLE_RATIO * len(stream):
        raise StreamError("the compressed pixels are cut short or damaged")
    _check_holes(stream[64:], _RLE_ZEROS)
    pixels = np.empty((count, item_size), np.uint8)
    for k in range(number):  # the highest byte first
        segment = _unpacked(stream[starts[k] : starts[k + 1]], count)
        pixels[:, item_size - 1 - k] = np.frombuffer(segment, np.uint8)
    return pixels.view(f"<u{item_size}").reshape(shape)


def _unpacked(packed: bytes, count: int) -> bytearray:
    """Exactly so many bytes of run lengths, after which only padding follows."""
    unpacked, at, end = bytearray(), 0, len(packed)
    while len(unpacked) < count and at < end:
        head = packed[at]
        if head < 128:
            unpacked += packed[at + 1 : at + 2 + head]
            at += 2 + head
        elif head > 128:
            unpacked += packed[at + 1 : at + 2] * (257 - head)
            at += 2
        else:
            at += 1
    rest = packed[at:]
    if len(unpacked) != count or at > end or len(rest) > _RLE_PADDING_BYTES or any(rest):
        raise StreamError(
            f"the compressed pixels are damaged ({len(unpacked)} of {count} bytes, {len(rest)} are left over)"
        )
    return unpacked


__all__ = ["StreamError", "check_consumed", "check_jpeg", "check_jpeg2000", "decode_rle", "frames_of"]
