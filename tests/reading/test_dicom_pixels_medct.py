"""Pixels in every transfer syntax that can be written here, whole and damaged."""

import tracemalloc
import zipfile
import zlib

import numpy as np
import pydicom
import pytest
import scan_files
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)
from scan_files import compress, make_hu, write_enhanced, write_series

from medct import VolumeError, byte_sources_medct, dicom_frames_medct, dicom_pixels_medct, read_volume
from medct.dicom_frames_medct import _DECODERS

COMPRESSED = (RLELossless, JPEG2000Lossless, JPEGLSLossless)
HTJ2K = bytes.fromhex(
    "ff4fff5100294000000000040000000600000000000000000000000400000006000000000000000000010f0101ff50000800020000000aff52"
    "000c00020001000504044001ff5c00132088909090909090909090909090888888ff90000a00000000004c0001ff93c0002665f90507740000"
    "00c0001300f2fb03077400c00013400012809429018b7400d900877400c0002a600013803299ec004231027600ce3afb8082b400ffd9"
)
"""OpenJPH's of 0, 90, 180, ..., 6 x 4 pixels of 16 bits."""


def as_syntax(syntax: str):
    """An `edit` that writes slices in an uncompressed syntax."""

    def edit(ds, k):
        ds.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            ds.add_new(0x7FE00010, "OW", np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes())

    return edit


@pytest.fixture
def hu() -> np.ndarray:
    return make_hu((4, 64, 48))


@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_uncompressed(syntax, hu, tmp_path):
    folder = write_series(tmp_path, hu, as_syntax(syntax))
    assert pydicom.dcmread(next(folder.iterdir())).file_meta.TransferSyntaxUID == syntax
    assert np.array_equal(read_volume(folder).array, hu.T)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless])
def test_an_archive_is_not_unpacked_for_each_frame(syntax, tmp_path, monkeypatch):
    unpacked, read_member = [], byte_sources_medct._read_member
    monkeypatch.setattr(byte_sources_medct, "_read_member", lambda *each: unpacked.append(each) or read_member(*each))
    counts, edit = [], compress(syntax) if syntax == RLELossless else as_syntax(syntax)
    for frames in (4, 40):
        hu = make_hu((frames, 8, 8))
        file = write_enhanced(tmp_path / f"{frames}.dcm", hu, lambda ds: edit(ds, 0))
        archive = tmp_path / f"{frames}.zip"
        with zipfile.ZipFile(archive, "w") as members:
            members.write(file, "scan.dcm")
        unpacked.clear()
        assert np.array_equal(read_volume(archive).array, hu.T)
        counts.append(len(unpacked))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("syntax", COMPRESSED)
def test_compressed_without_loss(syntax, hu, tmp_path):
    folder = write_series(tmp_path, hu, compress(syntax))
    assert np.array_equal(read_volume(folder).array, hu.T)


def test_syntaxes_may_differ_within_a_series(hu, tmp_path):
    folder = write_series(tmp_path, hu, lambda ds, k: compress(COMPRESSED[k])(ds) if k < 3 else None)
    assert np.array_equal(read_volume(folder).array, hu.T)


@pytest.mark.parametrize("syntax", COMPRESSED)
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_file_cut_short_is_refused(syntax, share, hu, tmp_path):
    folder = write_series(tmp_path, hu, compress(syntax))
    victim = sorted(folder.iterdir())[1]
    raw = victim.read_bytes()
    pixels = raw.index(b"\xe0\x7f\x10\x00")
    victim.write_bytes(raw[: pixels + int(share * (len(raw) - pixels))])
    with pytest.raises(VolumeError, match=r"holds no pixels|cannot be decoded"):
        read_volume(folder)


@pytest.mark.parametrize("syntax", COMPRESSED)
def test_a_code_stream_cut_short_is_refused(syntax, hu, tmp_path):
    def edit(ds, k):
        compress(syntax)(ds)
        if k == 2:
            frame = next(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=1))
            ds.PixelData = pydicom.encaps.encapsulate([frame[: len(frame) * 6 // 10]])

    with pytest.raises(VolumeError, match="cannot be decoded"):
        read_volume(write_series(tmp_path, hu, edit))


def test_a_code_stream_of_another_size_is_refused_before_decoding(hu, tmp_path):
    for syntax in (JPEG2000Lossless, JPEGLSLossless):

        def edit(ds, k, syntax=syntax):
            compress(syntax)(ds)
            ds.Rows, ds.Columns = 48, 64

        with pytest.raises(VolumeError, match=r"compressed pixels are 64 x 48 instead of \(48, 64\)"):
            read_volume(write_series(tmp_path / syntax, hu, edit))


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203"])
def test_high_throughput_jpeg_2000(syntax, tmp_path):
    stored = np.arange(0, 24 * 90, 90).reshape(6, 4)

    def edit(ds, k):
        scan_files.set_pixels(ds, stored)
        ds.PixelData, ds["PixelData"].is_undefined_length = pydicom.encaps.encapsulate([HTJ2K]), True
        ds.file_meta.TransferSyntaxUID = syntax

    assert np.array_equal(read_volume(write_series(tmp_path, make_hu((3, 6, 4)), edit)).array[..., 1], stored.T - 1024)


@pytest.mark.parametrize(("name", "bits"), [("FloatPixelData", 32), ("DoubleFloatPixelData", 64)])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_floating_point_pixels_are_named_as_the_cause(name, bits, syntax, hu, tmp_path):
    def edit(ds, k):
        del ds.PixelData
        ds.BitsAllocated, ds.file_meta.TransferSyntaxUID = bits, syntax
        setattr(ds, name, hu[k].astype(f"f{bits // 8}").tobytes())

    with pytest.raises(VolumeError, match="its pixels are floating-point numbers"):
        read_volume(write_series(tmp_path, hu, edit))


def test_missing_decoders_name_the_extra(hu, tmp_path, monkeypatch):
    folder = write_series(tmp_path, hu, compress(JPEGLSLossless))
    monkeypatch.setitem(_DECODERS, JPEGLSLossless, ("jpeg", "not_installed"))
    with pytest.raises(VolumeError, match=r"JPEG-LS Lossless.*pip install .*pyjpegls"):
        read_volume(folder)
    monkeypatch.delitem(_DECODERS, JPEGLSLossless)
    with pytest.raises(VolumeError, match="compressed in a way not supported"):
        read_volume(folder)


def deflated(raw: bytes, more: bytes = b"") -> bytes:
    """A file of an explicit little-endian one, with something behind its pixels."""
    start = 144 + int.from_bytes(raw[140:144], "little")
    meta = raw[:start].replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    meta = meta.replace(b"\x02\x00\x10\x00UI\x14\x00", b"\x02\x00\x10\x00UI\x16\x00")
    meta = meta[:140] + (len(meta) - 144).to_bytes(4, "little") + meta[144:]
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return meta + deflater.compress(raw[start:] + more) + deflater.flush()


def test_a_deflated_file_is_inflated_no_further_than_its_pixels(hu, tmp_path):
    files = [path.read_bytes() for path in sorted(write_series(tmp_path, hu).iterdir())]
    assert np.array_equal(read_volume([deflated(raw) for raw in files]).array, hu.T)
    files, nothing = [deflated(raw, bytes(2**25)) for raw in files], deflated(files[0][:300] + bytes(2**25))
    assert max(map(len, files)) < 2**17
    tracemalloc.start()
    try:
        assert np.array_equal(read_volume(files).array, hu.T)
        with pytest.raises(VolumeError, match="damaged"):
            read_volume(nothing)
        assert tracemalloc.get_traced_memory()[1] < 2.5 * dicom_frames_medct._MOST_HEADER_BYTES
    finally:
        tracemalloc.stop()


def test_a_deflated_file_that_promises_too_much_is_refused(hu, tmp_path, monkeypatch):
    monkeypatch.setattr(byte_sources_medct, "MODEST_BYTES", 2**22)

    def edit(ds, k):
        ds.Rows = ds.Columns = 8000

    files = [deflated(path.read_bytes()) for path in sorted(write_series(tmp_path, hu, edit).iterdir())]
    with pytest.raises(VolumeError, match="would inflate to 128"):
        read_volume(files)


def test_eight_bit_slices(tmp_path):
    stored = np.random.default_rng(0).integers(0, 255, (3, 8, 10)).astype(np.uint8)

    def edit(ds, k):
        scan_files.set_pixels(ds, stored[k])
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.RescaleSlope = 8, 8, 7, 4
        ds.add_new(0x7FE00010, "OB", stored[k].tobytes())

    volume = read_volume(write_series(tmp_path, stored, edit))
    assert np.array_equal(volume.array, stored.T.astype(np.float32) * 4 - 1024)


@pytest.mark.parametrize("place", [0, 3])
def test_a_slice_that_was_cut_is_refused_before_others_are_read(tmp_path, monkeypatch, place):
    folder = write_series(tmp_path, make_hu((4, 64, 64)))
    path = next(folder.glob(f"*-{place}.dcm"))
    path.write_bytes(path.read_bytes()[:4000])
    monkeypatch.setattr(dicom_pixels_medct, "hu_of", lambda *_: pytest.fail("no slice is read for it"))
    with pytest.raises(VolumeError, match="cut short"):
        read_volume(folder)


@pytest.mark.parametrize("named", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
@pytest.mark.parametrize("place", [0, 3])
def test_compressed_pixels_under_an_uncompressed_name_are_called_so(named, place, tmp_path):
    """They are shorter than the header says, and were not cut."""

    def edit(ds, k):
        if k == place:
            ds.compress(RLELossless)

    folder = write_series(tmp_path, np.zeros((4, 64, 64), np.int16), edit)
    path = next(folder.glob(f"*-{place}.dcm"))
    true = RLELossless.encode() + b"\0"
    path.write_bytes(path.read_bytes().replace(true, named.encode().ljust(len(true), b"\0")))
    with pytest.raises(VolumeError, match="its pixels are compressed, and its transfer syntax says they are not"):
        read_volume(folder)
