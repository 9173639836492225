"""Compressed frames: whose bytes are whose, what they promise, and whether what was consumed comes out even."""

import struct

import damage
import jpeg_lossless
import numpy as np
import pytest
import scan_files
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLosslessSV1, JPEGLSLossless, RLELossless

from medct import VolumeError, read_volume
from medct.code_streams_medct import (
    StreamError,
    check_consumed,
    check_jpeg,
    check_jpeg2000,
    decode_rle,
    frames_of,
)
from medct.decoders_medct import decode_frame

SHAPE = (40, 36)
SYNTAXES = (RLELossless, JPEG2000Lossless, JPEGLSLossless, JPEGLosslessSV1, JPEGBaseline8Bit)
END = b"\xfe\xff\xdd\xe0" + bytes(4)


@pytest.fixture(scope="module")
def stored() -> np.ndarray:
    """`(row, column)`, uint16."""
    return (scan_files.make_hu((1, *SHAPE))[0].astype(np.int32) + 1024).astype(np.uint16)


def stream_of(stored: np.ndarray, syntax: str) -> bytes:
    """One frame, compressed."""
    ds = scan_files.new_slice(stored.astype(np.int32) - 1024, 0)
    damage.compress(syntax)(ds)
    return damage.frames_of(ds)[0]


def items(*contents: bytes) -> bytes:
    return b"".join(b"\xfe\xff\x00\xe0" + struct.pack("<I", len(content)) + content for content in contents)


# ---------------------------------------------------------------------------------------------------------------------
# Fragments
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fragments_per_frame", [1, 3])
@pytest.mark.parametrize("has_table", [True, False])
def test_frames_are_those_of_pydicom(fragments_per_frame, has_table):
    frames = [bytes([k]) * (20 + 2 * k) + b"\xff\xd9" for k in range(5)]
    element = encapsulate(frames, fragments_per_frame=fragments_per_frame, has_bot=has_table)
    assert frames_of(element + END, 5) == frames
    assert frames_of(element + END, 5) == list(generate_frames(element, number_of_frames=5))


def test_an_extended_table_tells_frames_apart():
    element = items(b"", b"ab", b"cd", b"ef") + END
    assert frames_of(element, 2, [0, 20]) == [b"abcd", b"ef"]
    for offsets in ([0, 3], [10, 20], [20, 0], [0, 0]):
        with pytest.raises(StreamError, match="table of frames"):
            frames_of(element, 2, offsets)


@pytest.mark.parametrize(
    ("element", "reason"),
    [
        (items(b"", b"ab"), "cut short"),
        (items(b"", b"ab")[:-1] + END, "cut short"),
        (items(b""), "cut short"),
        (b"", "cut short"),
        (items(b"", b"ab") + b"\xfe\xff\x0d\xe0" + bytes(4), "cut short"),
        (items(b"", b"a", b"b", b"c") + END, "3 fragments do not make 2 frames"),
        (items(b"", b"a\xff\xd9", b"b\xff\xd9", b"c") + END, "3 fragments do not make 2 frames"),
        (items(struct.pack("<2I", 0, 5), b"ab", b"cd", b"ef") + END, "table of frames"),
    ],
)
def test_fragments_that_are_no_frames_are_refused(element, reason):
    with pytest.raises(StreamError, match=reason):
        frames_of(element, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Code streams
# ---------------------------------------------------------------------------------------------------------------------


def check(stream: bytes, syntax: str) -> None:
    (check_jpeg2000 if syntax == JPEG2000Lossless else check_jpeg)(stream, SHAPE)


@pytest.mark.parametrize("syntax", SYNTAXES[1:])
def test_sound_streams_pass_padded_or_not(syntax, stored):
    stream = stream_of(stored, syntax)
    for padding in (b"", b"\0", bytes(3)):
        check(stream + padding, syntax)


@pytest.mark.parametrize("syntax", SYNTAXES[1:])
def test_no_stream_may_end_early_or_be_of_another_size(syntax, stored):
    stream = stream_of(stored, syntax).rstrip(b"\0")
    for end in range(0, len(stream) - 1):
        with pytest.raises(StreamError):
            check(stream[:end], syntax)
    function = check_jpeg2000 if syntax == JPEG2000Lossless else check_jpeg
    for shape in ((36, 40), (40, 35), (39, 36), (40, 65535)):
        with pytest.raises(StreamError, match=rf"40 x 36 instead of \({shape[0]}, {shape[1]}\)"):
            function(stream, shape)


def test_what_stands_late_in_a_stream_counts(stored):
    """A size behind a long comment, a second one, one for after the pixels."""
    jpeg = stream_of(stored, JPEGLSLossless)
    at = jpeg.index(b"\xff\xf7")
    comment = b"\xff\xfe" + struct.pack(">H", 60_002) + bytes(60_000)
    bomb = jpeg[:at] + comment + jpeg[at : at + 5] + struct.pack(">2H", 20000, 20000) + jpeg[at + 9 :]
    header = jpeg[at : at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")]
    for stream in (bomb, jpeg[:at] + header + jpeg[at:], jpeg[:-2] + b"\xff\xdc\x00\x04\x4e\x20\xff\xd9"):
        with pytest.raises(StreamError):
            check_jpeg(stream, SHAPE)
    oversize = b"\xff\xf8" + struct.pack(">HBB2H", 8, 4, 2, 20000, 20000)
    with pytest.raises(StreamError, match="change their size"):
        check_jpeg(jpeg[:2] + oversize + jpeg[2:], SHAPE)
    check_jpeg(jpeg[:at] + comment + jpeg[at:], SHAPE)


@pytest.mark.parametrize("predictor", range(1, 8))
@pytest.mark.parametrize(
    ("shift", "precision", "restart_rows"), [(0, 16, 0), (2, 16, 0), (0, 12, 0), (0, 16, 1), (0, 16, 12)]
)
def test_the_bits_of_a_lossless_jpeg_come_out_even(predictor, shift, precision, restart_rows, stored):
    stored = stored & (2**precision - 1)
    stream = jpeg_lossless.encode(stored, predictor, shift, precision, restart_rows)
    decoded = decode_frame("gdcm", stream, SHAPE, 16)
    assert np.array_equal(decoded, stored >> shift << shift)  # as another decoder has it
    found = check_jpeg(stream, SHAPE)
    assert (found.predictor, found.shift, found.precision) == (predictor, shift, precision)
    check_consumed(found, stored >> shift << shift)
    for bits in (-9, 9, 500):  # pixels that took so many bits less or more
        found = check_jpeg(stream, SHAPE)
        found.coded = found.coded[:bits] if bits < 0 else found.coded + bytes(bits)
        with pytest.raises(StreamError, match="were needed"):
            check_consumed(found, stored >> shift << shift)


def test_differences_of_all_sizes_are_counted():
    """Among them 2^15, which alone has no further bits."""
    pixels = np.zeros(SHAPE, np.uint16)
    pixels[::2, ::3], pixels[5], pixels[7, 3] = 2**15, 65535, 12345
    check_consumed(check_jpeg(jpeg_lossless.encode(pixels), SHAPE), pixels)


# ---------------------------------------------------------------------------------------------------------------------
# Run lengths
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16])
def test_run_lengths_are_those_of_pydicom(bits):
    for seed in range(4):
        pixels = np.random.default_rng(seed).integers(0, 2 + 60 * seed, SHAPE).astype(f"<u{bits // 8}")
        ds = scan_files.new_slice(pixels, 0)
        ds.BitsAllocated = ds.BitsStored = bits
        ds.HighBit = bits - 1
        ds.add_new(0x7FE00010, "OB" if bits == 8 else "OW", pixels.tobytes())
        scan_files.compress(RLELossless)(ds)
        assert np.array_equal(decode_rle(damage.frames_of(ds)[0], SHAPE, bits), pixels)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_a_lost_block_is_noticed_wherever_it_lies(syntax):
    stored = (scan_files.make_hu((1, 120, 100))[0].astype(np.int32) + 1024).astype(np.uint16)
    stream = stream_of(stored, syntax)
    for start in range(200, len(stream) - 600, 97):
        holed = stream[:start] + bytes(512) + stream[start + 512 :]
        with pytest.raises(StreamError, match="hole"):
            decode_rle(holed, stored.shape, 16) if syntax == RLELossless else check_jpeg2000(holed, stored.shape)
    for pixels in (np.zeros_like(stored), np.where(np.arange(100) % 7, 0, stored).astype(np.uint16)):  # sound ones
        stream = stream_of(pixels, syntax)
        if syntax == JPEG2000Lossless:
            check_jpeg2000(stream, pixels.shape)
        else:
            assert np.array_equal(decode_rle(stream, pixels.shape, 16), pixels)


def test_a_hole_in_run_lengths_is_noticed_where_a_length_lay(stored):
    """Two bytes of 0 are one pixel, so the count comes out wrong; inside of pixels as they are it does not."""
    stream, refused = stream_of(stored, RLELossless), 0
    for start in range(64, len(stream) - 30, 7):
        holed = stream[:start] + bytes(30) + stream[start + 30 :]
        try:
            pixels = decode_rle(holed, SHAPE, 16)
            assert len(np.unique(np.flatnonzero(pixels != stored))) <= 30
        except StreamError:
            refused += 1
    assert refused > 50


def test_run_lengths_may_hold_bytes_that_mean_nothing(stored):
    bytes_of = (stored >> 8).astype(np.uint8), stored.astype(np.uint8)
    segments = [b"".join(b"\x80" + bytes([35]) + row.tobytes() for row in part) for part in bytes_of]
    stream = struct.pack("<16I", 2, 64, 64 + len(segments[0]), *[0] * 13) + b"".join(segments)
    assert np.array_equal(decode_rle(stream, SHAPE, 16), stored)


@pytest.mark.parametrize(
    ("at", "value", "reason"), [(0, 3, "3 bytes each"), (4, 65, "segments"), (8, 64, "segments"), (12, 5, "segments")]
)
def test_a_damaged_header_of_run_lengths_is_refused(at, value, reason, stored):
    stream = bytearray(stream_of(stored, RLELossless))
    struct.pack_into("<I", stream, at, value)
    with pytest.raises(StreamError, match=reason):
        decode_rle(bytes(stream), SHAPE, 16)
    with pytest.raises(StreamError, match="cut short"):
        decode_rle(stream_of(stored, RLELossless), (60000, 60000), 16)


# ---------------------------------------------------------------------------------------------------------------------
# Through the reader
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", ["of the box", "to the end", "in eight bytes"])
def test_jpeg_2000_is_read_in_a_file_of_its_own(length, tmp_path):
    def box(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", 8 + len(content)) + kind + content

    def wrap(ds, k):
        scan_files.compress(JPEG2000Lossless)(ds)
        (code,) = damage.frames_of(ds)
        colours = box(b"ihdr", struct.pack(">2IH4B", *SHAPE, 1, 15, 7, 0, 0)) + box(b"colr", b"\1\0\0\0\0\0\x11")
        head = box(b"jP  ", b"\r\n\x87\n") + box(b"ftyp", b"jp2 \0\0\0\0jp2 ") + box(b"jp2h", colours)
        last = {"of the box": box(b"jp2c", code), "to the end": bytes(4) + b"jp2c" + code}
        last["in eight bytes"] = struct.pack(">I4sQ", 1, b"jp2c", 16 + len(code)) + code
        ds.PixelData = encapsulate([head + last[length]])
        ds["PixelData"].is_undefined_length = True

    hu = scan_files.make_hu((3, *SHAPE))
    assert np.array_equal(read_volume(scan_files.write_series(tmp_path, hu, wrap)).array, hu.T)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEGLosslessSV1, JPEGBaseline8Bit])
@pytest.mark.parametrize("is_enhanced", [False, True])
def test_a_tail_of_zeros_is_refused_in_every_frame(syntax, is_enhanced, tmp_path):
    hu = scan_files.make_hu((3, *SHAPE))

    def edit(ds, k=1):
        damage.compress(syntax)(ds)
        frames = damage.frames_of(ds)
        if k == 1:
            end = len(frames[-1].rstrip(b"\0")) - 2
            frames[-1] = frames[-1][: end // 2] + bytes(end - end // 2) + frames[-1][end:]
        ds.PixelData = encapsulate(frames)

    if is_enhanced:
        source = scan_files.write_enhanced(tmp_path / "enhanced.dcm", hu, edit)
    else:
        source = scan_files.write_series(tmp_path, hu, edit)
    with pytest.raises(VolumeError, match="cannot be decoded"):
        read_volume(source)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_signed_pixels_keep_their_sign(syntax, tmp_path):
    hu = scan_files.make_hu((3, *SHAPE))
    hu = np.clip(hu, -900, 900) & ~15  # what eight bits can hold

    def edit(ds, k):
        ds.RescaleIntercept = 0
        scan_files.set_pixels(ds, hu[k], signed=True)
        if syntax == JPEGBaseline8Bit:
            scan_files.set_pixels(ds, hu[k].astype(np.int32) + 1024)
            ds.RescaleIntercept = -1024
        damage.compress(syntax)(ds)

    array = read_volume(scan_files.write_series(tmp_path, hu, edit)).array
    assert np.abs(array - hu.T).max() <= (64 if syntax == JPEGBaseline8Bit else 0)
