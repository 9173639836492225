"""Stored pixels of DICOM files: plain ones in any layout, and compressed frames.

Which of both they are is seen from their own element, because file meta information often names another transfer
syntax. Run lengths are decoded here. Other code streams are checked here and decoded by a helper process
(`decoders_medct`).

Source: DICOM PS3.5 (A, G).
"""

import io
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from .byte_sources_medct import ByteSource, too_inflated
from .code_streams_medct import StreamError, check_consumed, check_jpeg, check_jpeg2000, decode_rle, frames_of
from .decoders_medct import DecodeError, decode_frame, is_installed, warm_up
from .dicom_elements_medct import INSTALL, name_of_uid, read_meta
from .volume_medct import VolumeError

AGAIN = "Copy or export the file again"
EXPLICIT_LITTLE, EXPLICIT_BIG = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
UNCOMPRESSED = ("1.2.840.10008.1.2", EXPLICIT_LITTLE, EXPLICIT_BIG, DEFLATED)
_RLE = "1.2.840.10008.1.2.5"
# Kind of code stream, and decoders that refuse damaged ones: the first that is installed is used.
_DECODERS = {
    "1.2.840.10008.1.2.4.50": ("jpeg", "gdcm"),
    "1.2.840.10008.1.2.4.57": ("jpeg", "gdcm"),
    "1.2.840.10008.1.2.4.70": ("jpeg", "gdcm"),
    "1.2.840.10008.1.2.4.80": ("jpeg", "jpeg_ls"),
    "1.2.840.10008.1.2.4.81": ("jpeg", "jpeg_ls"),
    "1.2.840.10008.1.2.4.90": ("jpeg 2000", "openjpeg"),
    "1.2.840.10008.1.2.4.91": ("jpeg 2000", "openjpeg"),
    "1.2.840.10008.1.2.4.201": ("jpeg 2000", "openjpeg"),
    "1.2.840.10008.1.2.4.202": ("jpeg 2000", "openjpeg"),
    "1.2.840.10008.1.2.4.203": ("jpeg 2000", "openjpeg"),
}
_MOST_HEADER_BYTES = 2**24
_MOST_PIXELS = 2**26
"""Of a frame: 8192 x 8192, since decoders ask memory for what is claimed."""
_PIXELS, _PIXELS_BIG, _UNDEFINED_LENGTH = b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10", 0xFFFFFFFF


@dataclass(frozen=True)
class Frames:
    """How the frames of a file are stored.

    Args:
        syntax: UID of the transfer syntax, as named.
        shape: `(row, column)`.
        count: Of frames.
        bits_allocated: Of a pixel.
        bits_stored: Of those.
        is_signed: Whether pixels are.
        is_little: Whether the lowest byte of a number is the first.
        offset: Where the element of the pixels begins, in the inflated data set if that is deflated.
        table: Extended offset table.
    """

    syntax: str
    shape: tuple[int, int]
    count: int
    bits_allocated: int
    bits_stored: int
    is_signed: bool
    is_little: bool
    offset: int
    table: bytes | None

    @property
    def num_bytes(self) -> int:
        """Of all frames, uncompressed."""
        return self.count * (self.shape[0] * self.shape[1] * self.bits_allocated // 8)


def stored_pixels(file: ByteSource, frames: Frames, index: int, cache: dict[ByteSource, Any]) -> np.ndarray:
    """Pixels of one frame as they are stored.

    Args:
        file: Of the frames.
        frames: How they are stored.
        index: Which.
        cache: Holds what was found of the file that was read last; the caller keeps it from frame to frame.

    Returns:
        `(row, column)`, integers; unused bits as they are.

    Raises:
        VolumeError: If it is damaged, or its decoder is not installed.
    """
    name = file.name if frames.count == 1 else f"{file.name} frame {index + 1}"
    try:
        if not 1 <= frames.bits_stored <= frames.bits_allocated:
            raise StreamError(f"{frames.bits_stored} bits of {frames.bits_allocated}")
        streams = cache.get(file)
        if not isinstance(streams, list):
            with _opened(file, frames, cache) as stream:
                start, length = _find_value(file, stream, frames)
                if length is not None:
                    return _plain(name, stream, frames, start, index)
                streams = _code_streams(file, stream, frames, start)
            cache.clear()
            cache[file] = streams
        return _decoded(file, frames, streams[index])
    except (StreamError, DecodeError) as error:
        raise VolumeError(name, f"its pixels cannot be decoded ({error})", AGAIN) from None


def _opened(file: ByteSource, frames: Frames, cache: dict[ByteSource, Any]) -> BinaryIO:
    """A file, or its data set inflated up to the last of its pixels; what lies in memory is kept for other frames."""
    if file in cache:
        return io.BytesIO(cache[file])
    stream = file.open()
    if frames.syntax == DEFLATED:
        with stream:
            stream = io.BytesIO(_inflated(file, frames, stream))
    if isinstance(stream, io.BytesIO):  # a member of an archive is unpacked whole each time it is opened
        cache.clear()
        cache[file] = stream.getvalue()
    return stream


def _inflated(file: ByteSource, frames: Frames, stream: BinaryIO) -> bytes:
    count = frames.offset + 12 + frames.num_bytes
    if too_inflated(count, file.size):
        raise VolumeError(file.name, f"its {file.size} bytes would inflate to {count}", "Check the file")
    read_meta(stream)
    return _inflate(stream, count)


def _find_value(file: ByteSource, stream: BinaryIO, frames: Frames) -> tuple[int, int | None]:
    """Where the value of the pixels begins, and its length; none of compressed ones."""
    stream.seek(frames.offset)
    element = stream.read(12)
    pixels = _PIXELS if frames.is_little else _PIXELS_BIG
    if element[:2] == pixels[:2] and element[:4] != pixels:  # the two other elements of pixels
        raise VolumeError(file.name, "its pixels are floating-point numbers", "Export it with whole numbers, as CT has")
    if element[:4] != pixels:
        raise VolumeError(file.name, "it holds no pixels (cut short?)", AGAIN)
    # Without the letters of a kind the length is there at once; none is odd, as those letters would be.
    size = 12 if element[4:6] in (b"OW", b"OB", b"UN") else 8
    length = int.from_bytes(element[size - 4 : size], "little" if frames.is_little else "big")
    is_named_plain = frames.syntax in UNCOMPRESSED
    if length == _UNDEFINED_LENGTH:
        if is_named_plain:
            reason = "its pixels are compressed, and its transfer syntax says they are not"
            raise VolumeError(file.name, reason, AGAIN)
        return frames.offset + size, None
    if not is_named_plain and length - frames.num_bytes not in (0, frames.num_bytes % 2):
        raise VolumeError(file.name, "its pixels are not compressed, and its transfer syntax says they are", AGAIN)
    if length % 2:
        raise StreamError("damaged length")
    if element[4:6] == b"OW" and frames.bits_allocated == 8 and not frames.is_little:
        raise StreamError("bytes in big-endian words")
    _check_length(file, frames, length)
    return frames.offset + size, length


def _check_length(file: ByteSource, frames: Frames, length: int) -> None:
    """Refuse uncompressed pixels that are too few, or that hold whole frames more than the header says."""
    expected = frames.num_bytes
    if length < expected:
        raise VolumeError(file.name, f"it is cut short ({length} of {expected} bytes of pixels)", AGAIN)
    if length >= expected + max(expected // frames.count, 2):
        reason = f"its header promises {expected} bytes of pixels and it holds {length}"
        raise VolumeError(file.name, reason, "Export the file again")


def _plain(name: str, stream: BinaryIO, frames: Frames, start: int, index: int) -> np.ndarray:
    if frames.bits_allocated not in (8, 16, 32):
        raise StreamError(f"they have {frames.bits_allocated} bits each")
    count = frames.num_bytes // frames.count
    stream.seek(start + index * count)
    data = stream.read(count)
    if len(data) != count:
        raise VolumeError(name, f"it is cut short ({len(data)} of {count} bytes of pixels)", AGAIN)
    kind = f"{'<' if frames.is_little else '>'}{'ui'[frames.is_signed]}{frames.bits_allocated // 8}"
    return np.frombuffer(data, kind).astype(kind.replace(">", "<"), copy=False).reshape(frames.shape)


def _code_streams(file: ByteSource, stream: BinaryIO, frames: Frames, start: int) -> list[bytes]:
    if frames.shape[0] * frames.shape[1] > _MOST_PIXELS:
        raise StreamError(f"{frames.shape[0]} x {frames.shape[1]} are more than any scanner makes")
    _decoder(file.name, frames.syntax)
    table = None if not frames.table else np.frombuffer(frames.table, "<u8").tolist()
    stream.seek(start)
    return frames_of(stream.read(), frames.count, table)


def _decoded(file: ByteSource, frames: Frames, stream: bytes) -> np.ndarray:
    """The pixels of a code stream."""
    if frames.syntax == _RLE:
        pixels = decode_rle(stream, frames.shape, frames.bits_allocated)
        return pixels.view(f"<{'ui'[frames.is_signed]}{pixels.itemsize}")
    kind, decoder = _decoder(file.name, frames.syntax)
    jpeg = None
    if kind == "jpeg":
        jpeg = check_jpeg(stream, frames.shape)
        precision, stream = jpeg.precision, stream[: jpeg.end]
    else:
        precision = check_jpeg2000(stream, frames.shape)
    pixels = decode_frame(decoder, stream, frames.shape, frames.bits_allocated)
    if jpeg is not None:
        check_consumed(jpeg, pixels)
    pixels = pixels.view(f"<{'ui'[frames.is_signed]}{pixels.itemsize}")
    # The sign is the header's to say: streams are often written without one.
    unused = 8 * pixels.itemsize - precision
    return (pixels << unused) >> unused if unused > 0 and frames.is_signed else pixels


def _decoder(name: str, syntax: str) -> tuple[str, str]:
    """Kind of code stream of a transfer syntax, and the decoder for it."""
    if syntax == _RLE:
        return "rle", ""
    kind = name_of_uid(syntax) or "an unknown transfer syntax"
    if syntax not in _DECODERS:
        raise VolumeError(name, f"its pixels are compressed in a way not supported ({kind})", "Export it uncompressed")
    if not is_installed(_DECODERS[syntax][1]):
        raise VolumeError(name, f"its pixels are compressed ({kind}), which needs a decoder", f"Install it: {INSTALL}")
    return _DECODERS[syntax]


def warm_up_for(syntax: str) -> None:
    """Start what decodes a transfer syntax, if anything, while other headers are read."""
    if syntax in _DECODERS:
        warm_up()


def inflated_header(stream: BinaryIO) -> bytes:
    """What of a deflated data set, at which a stream stands, may be needed to read all but its pixels."""
    return _inflate(stream, _MOST_HEADER_BYTES)


def _inflate(stream: BinaryIO, most: int) -> bytes:
    """A raw deflate stream, and no more of it than so many bytes."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    parts, missing = [], most
    while missing > 0 and not inflater.eof and (packed := inflater.unconsumed_tail or stream.read(2**16)):
        parts.append(inflater.decompress(packed, missing))
        missing -= len(parts[-1])
    return b"".join(parts)


__all__ = ["AGAIN", "DEFLATED", "Frames", "inflated_header", "stored_pixels", "warm_up_for"]
