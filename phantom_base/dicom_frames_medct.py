"""Pixels of DICOM files that are not simply there: compressed frames, and uncompressed ones in an unusual layout.

Run lengths are decoded here. Other code streams are checked here and decoded by a helper process (`decoders_medct`),
which pydicom runs in as well for layouts that are rare: eight bits, big-endian, deflated.

Source: DICOM PS3.5 (A, G).
"""

import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from .byte_sources_medct import ByteSource, too_inflated
from .code_streams_medct import StreamError, check_consumed, check_jpeg, check_jpeg2000, decode_rle, frames_of
from .decoders_medct import DecodeError, decode_file, decode_frame, is_installed, warm_up
from .dicom_elements_medct import read_meta
from .volume_medct import VolumeError

try:
    from pydicom.uid import UID
except ImportError:
    UID = None

AGAIN = "Copy or export the file again"
IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
UNCOMPRESSED = (IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG, DEFLATED)
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
_PIXELS, _PIXELS_BIG, _UNDEFINED = b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10", b"\xff\xff\xff\xff"


@dataclass(frozen=True)
class Frames:
    """How the frames of a file are stored.

    Args:
        syntax: UID of the transfer syntax.
        shape: `(row, column)`.
        count: Of frames.
        bits_allocated: Of a pixel.
        bits_stored: Of those.
        is_signed: Whether pixels are.
        offset: Where the element of the pixels begins, in the inflated data set if that is deflated.
        table: Extended offset table.
    """

    syntax: str
    shape: tuple[int, int]
    count: int
    bits_allocated: int
    bits_stored: int
    is_signed: bool
    offset: int
    table: bytes | None = None

    @property
    def num_bytes(self) -> int:
        """Of all frames, uncompressed."""
        return self.count * (self.shape[0] * self.shape[1] * self.bits_allocated // 8)


def decoded_pixels(file: ByteSource, frames: Frames, index: int, cache: dict[ByteSource, Any]) -> np.ndarray:
    """Stored values of one frame.

    Args:
        file: Of the frames.
        frames: How they are stored.
        index: Which.
        cache: Holds what was found of the file that was read last; the caller keeps it from frame to frame.

    Returns:
        `(row, column)`, integers, unused bits as the decoder gives them.

    Raises:
        VolumeError: If it is damaged, or its decoder is not installed.
    """
    try:
        if frames.shape[0] * frames.shape[1] > _MOST_PIXELS:
            raise StreamError(f"{frames.shape[0]} x {frames.shape[1]} are more than any scanner makes")
        if file not in cache:
            cache.clear()
            cache[file] = _frames_of(file, frames)
        found = cache[file][index]
        return found if isinstance(found, np.ndarray) else _decoded(file, frames, found)
    except (StreamError, DecodeError) as error:
        name = file.name if frames.count == 1 else f"{file.name} frame {index + 1}"
        raise VolumeError(name, f"its pixels cannot be decoded ({error})", AGAIN) from None


def _frames_of(file: ByteSource, frames: Frames) -> Any:
    """The code streams of a file, or its pixels, `(frame, row, column)`."""
    with file.open() as stream:
        data = _undeflated(file, stream, frames) if frames.syntax == DEFLATED else stream.read()
    at = len(data) - frames.num_bytes - 12 if frames.syntax == DEFLATED else frames.offset
    head = data[at : at + 12]
    if head[:4] not in (_PIXELS, _PIXELS_BIG):
        raise VolumeError(file.name, "it holds no pixels (cut short?)", AGAIN)
    if frames.syntax in UNCOMPRESSED:
        if _UNDEFINED in (head[4:8], head[8:12]):
            raise VolumeError(file.name, "its pixels are compressed, and its transfer syntax says they are not", AGAIN)
        syntax = EXPLICIT_LITTLE if frames.syntax == DEFLATED else frames.syntax
        return decode_file(data, syntax, (frames.count, *frames.shape))
    _decoder(file.name, frames.syntax)
    start = 8 if head[4:8] == _UNDEFINED else 12
    if head[start - 4 : start] != _UNDEFINED:
        raise VolumeError(file.name, "its pixels are not compressed, and its transfer syntax says they are", AGAIN)
    table = None if not frames.table else np.frombuffer(frames.table, "<u8").tolist()
    return frames_of(data[at + start :], frames.count, table)


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
    # All bits as they are in the stream: gdcm would blank those above BitsStored, and they are counted.
    pixels = decode_frame(decoder, stream, frames.shape, (frames.bits_allocated, frames.bits_allocated))
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
    kind = UID(syntax).name
    if syntax not in _DECODERS:
        kind = kind if kind != syntax else "an unknown transfer syntax"
        raise VolumeError(name, f"its pixels are compressed in a way not supported ({kind})", "Export it uncompressed")
    if not is_installed(_DECODERS[syntax][1]):
        raise VolumeError(
            name, f"its pixels are compressed ({kind}), which needs a decoder", "Install it: pip install medct[dicom]"
        )
    return _DECODERS[syntax]


def warm_up_for(syntax: str) -> None:
    """Start what decodes a transfer syntax, if anything, while other headers are read."""
    if syntax in _DECODERS:
        warm_up()


def inflated_header(file: ByteSource, stream: BinaryIO) -> bytes:
    """What of a deflated data set, at which a stream stands, may be needed to read all but its pixels."""
    return _inflate(file, stream, _MOST_HEADER_BYTES)


def _undeflated(file: ByteSource, stream: BinaryIO, frames: Frames) -> bytes:
    """A file of a deflated one that holds its data set inflated, up to the last of its pixels."""
    count = frames.offset + 12 + frames.num_bytes
    if too_inflated(count, file.size):
        raise VolumeError(file.name, f"its {file.size} bytes would inflate to {count}", "Check the file")
    read_meta(stream)
    syntax = EXPLICIT_LITTLE.encode().ljust(20, b"\0")
    element = b"\x02\x00\x10\x00UI" + len(syntax).to_bytes(2, "little") + syntax
    meta = b"\x02\x00\x00\x00UL\x04\x00" + len(element).to_bytes(4, "little") + element
    return bytes(128) + b"DICM" + meta + _inflate(file, stream, count)


def _inflate(file: ByteSource, stream: BinaryIO, most: int) -> bytes:
    """A raw deflate stream, and no more of it than so many bytes."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    parts, missing = [], most
    while missing > 0 and not inflater.eof and (packed := inflater.unconsumed_tail or stream.read(2**16)):
        parts.append(inflater.decompress(packed, missing))
        missing -= len(parts[-1])
    return b"".join(parts)


__all__ = ["AGAIN", "DEFLATED", "Frames", "decoded_pixels", "inflated_header", "warm_up_for"]
