"""One volume in every encoding of DICOM that can be written here, compared with pydicom and SimpleITK.

The readers must agree. Where they do not, the case stands in `OTHERS_DIFFER`, with who differs.
"""

import itertools
from pathlib import Path

import numpy as np
import pydicom
import pytest
import scan_files
import SimpleITK
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from scan_files import make_hu

from medct import VolumeError, read_volume

gdcm = pytest.importorskip("gdcm")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

UNCOMPRESSED = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
COMPRESSED = (RLELossless, JPEG2000Lossless, JPEGLSLossless, JPEGLossless, JPEGLosslessSV1)
SHAPE = (2, 40, 36)
"""`(slice, row, column)`."""


def stored_values(bits: int, signed: bool) -> np.ndarray:
    """Values over the whole range of so many bits, and how they become about the HU of a scan."""
    hu = make_hu(SHAPE).astype(np.int32)
    share = (hu - hu.min()) / np.ptp(hu)
    lowest = -(2 ** (bits - 1)) if signed else 0
    return (lowest + share * (2**bits - 1)).round().astype(np.int32)


def write_slices(
    folder: Path, stored: np.ndarray, syntax: str, bits: int, signed: bool, junk: bool, split: bool
) -> Path:
    """Slices of stored values: with something in the unused bits, and each in several fragments."""
    allocated = 8 if bits <= 8 else 16
    words = stored & (2**bits - 1)
    if junk:
        words = words | np.random.default_rng(1).integers(0, 2 ** (allocated - bits), stored.shape) << bits
    elif signed:
        words = stored & (2**allocated - 1)  # with the sign over the unused bits
    folder.mkdir(parents=True)
    for k, slice_words in enumerate(words):
        ds = scan_files.new_slice(np.zeros(SHAPE[1:]), k)
        ds.BitsAllocated, ds.RescaleSlope, ds.RescaleIntercept = allocated, 1, 0
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = (
            (allocated, allocated - 1, 0) if junk else (bits, bits - 1, int(signed))
        )
        order = ">" if syntax == ExplicitVRBigEndian else "<"
        ds.add_new(
            0x7FE00010, "OB" if allocated == 8 else "OW", slice_words.astype(f"{order}u{allocated // 8}").tobytes()
        )
        path = folder / f"{k}.dcm"
        write_as(ds, path, syntax)
        ds = pydicom.dcmread(path)
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, bits - 1, int(signed)
        if split:
            frame = next(generate_frames(ds.PixelData, number_of_frames=1))
            ds.PixelData = encapsulate([frame], fragments_per_frame=3)
        save(ds, path)
    return folder


def write_as(ds, path: Path, syntax: str) -> None:
    if syntax in UNCOMPRESSED or syntax in (JPEGLossless, JPEGLosslessSV1):
        ds.file_meta.TransferSyntaxUID = syntax if syntax in UNCOMPRESSED else ExplicitVRLittleEndian
        save(ds, path)
    else:
        scan_files.compress(syntax)(ds)
        save(ds, path)
    if syntax in (JPEGLossless, JPEGLosslessSV1):
        by_gdcm(path, syntax)


def save(ds, path: Path) -> None:
    if ds.file_meta.TransferSyntaxUID == ExplicitVRBigEndian:
        pydicom.dcmwrite(path, ds, implicit_vr=False, little_endian=False, force_encoding=True)
    else:
        ds.save_as(path, enforce_file_format=True)


def by_gdcm(path: Path, syntax: str) -> None:
    kinds = {
        JPEGLossless: gdcm.TransferSyntax.JPEGLosslessProcess14,
        JPEGLosslessSV1: gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    }
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(kinds[syntax]))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    ds = pydicom.dcmread(path)
    ds.RescaleType = "HU"  # gdcm has made it US
    ds.save_as(path)


def read_by_pydicom(folder: Path) -> np.ndarray | None:
    try:
        return np.array([pydicom.dcmread(path).pixel_array for path in sorted(folder.iterdir())])
    except Exception:
        return None


def read_by_simpleitk(folder: Path) -> np.ndarray | None:
    try:
        images = [SimpleITK.ReadImage(str(path)) for path in sorted(folder.iterdir())]
        return np.array([SimpleITK.GetArrayFromImage(image)[0] for image in images])
    except Exception:
        return None


# What others make of unused bits that a lossless compressor kept: (syntax, signed) to who gives other values.
OTHERS_DIFFER = {
    (JPEG2000Lossless, False): {"pydicom", "SimpleITK"},
    (JPEG2000Lossless, True): {"pydicom"},
    (JPEGLSLossless, False): {"pydicom"},
    (JPEGLSLossless, True): {"pydicom"},
}


@pytest.mark.parametrize("syntax", (*UNCOMPRESSED, *COMPRESSED), ids=lambda syntax: syntax.name[:24])
@pytest.mark.parametrize(("bits", "junk"), [(8, False), (12, False), (12, True), (16, False)])
def test_slices(syntax, bits, junk, tmp_path):
    for signed, split in itertools.product((False, True), (False, True)):
        if split and (syntax in UNCOMPRESSED or bits != 12):
            continue
        stored = stored_values(bits, signed)
        folder = write_slices(tmp_path / f"{signed}{split}", stored, syntax, bits, signed, junk, split)
        assert np.array_equal(read_volume(folder).array, stored.T)
        others = {"pydicom": read_by_pydicom(folder), "SimpleITK": read_by_simpleitk(folder)}
        differ = {name for name, found in others.items() if not np.array_equal(found, stored)}
        assert differ == (OTHERS_DIFFER.get((syntax, signed), set()) if junk else set())


TABLES = ("basic offsets", "no offsets", "extended offsets", "fragments", "extended offsets of fragments")


@pytest.mark.parametrize(
    ("syntax", "table"), [(ExplicitVRLittleEndian, None), *itertools.product(COMPRESSED[:3], TABLES)]
)
@pytest.mark.parametrize("signed", [False, True])
def test_frames(syntax, signed, table, tmp_path):
    """Of Enhanced files, in any order and however their code streams are found."""
    hu, order = make_hu((4, 40, 36)), [2, 0, 3, 1]

    def edit(ds):
        shift = ds.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence[0]
        shift.RescaleIntercept = 0 if signed else -1024
        scan_files.set_pixels(ds, hu[order].astype(np.int32) - int(shift.RescaleIntercept), signed)
        if syntax == ExplicitVRLittleEndian:
            return
        scan_files.compress(syntax)(ds)
        frames = list(generate_frames(ds.PixelData, number_of_frames=4))
        if table == "extended offsets":
            ds.PixelData, ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = encapsulate_extended(frames)
        elif table.endswith("fragments"):
            ds.PixelData = encapsulate(frames, fragments_per_frame=3)
            if table != "fragments":
                basic = np.frombuffer(ds.PixelData[8 : 8 + 4 * len(frames)], "<u4")
                ds.PixelData = b"\xfe\xff\x00\xe0" + bytes(4) + ds.PixelData[8 + 4 * len(frames) :]
                ds.ExtendedOffsetTable = basic.astype("<u8").tobytes()
                ds.ExtendedOffsetTableLengths = np.array([len(frame) for frame in frames], "<u8").tobytes()
        else:
            ds.PixelData = encapsulate(frames, has_bot=table == "basic offsets")

    path = scan_files.write_enhanced(tmp_path / "enhanced.dcm", hu, edit, order)
    assert np.array_equal(read_volume(path).array, hu.T)
    if table != "extended offsets of fragments":  # which pydicom joins otherwise
        decoded = pydicom.dcmread(path).pixel_array.astype(np.int32) - (0 if signed else 1024)
        assert np.array_equal(decoded, hu[order])


@pytest.mark.parametrize("syntax", COMPRESSED[1:3], ids=lambda syntax: syntax.name[:24])
def test_streams_with_fewer_bits_than_the_header_says_keep_their_sign(syntax, tmp_path):
    stored = stored_values(12, signed=True)
    folder = write_slices(tmp_path / "slices", stored, syntax, 12, True, junk=False, split=False)
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        ds.BitsStored, ds.HighBit = 16, 15
        save(ds, path)
    assert np.array_equal(read_volume(folder).array, stored.T)


@pytest.mark.parametrize("syntax", [JPEGLossless, JPEGLosslessSV1], ids=lambda syntax: syntax.name[-20:])
def test_a_lossless_jpeg_whose_end_was_lost_is_refused(syntax, tmp_path):
    """Decoders make pixels of the zeros that a broken copy leaves."""
    folder = write_slices(tmp_path / "slices", stored_values(16, False), syntax, 16, False, junk=False, split=False)
    last = max(folder.iterdir())
    ds = pydicom.dcmread(last)
    frame = next(generate_frames(ds.PixelData, number_of_frames=1))
    for lost in (3, 30, 300):
        for rest in (b"", bytes(lost)):
            ds.PixelData = encapsulate([frame[: -lost - 2] + rest + b"\xff\xd9"])
            save(ds, last)
            with pytest.raises(VolumeError, match="pixels cannot be decoded"):
                read_volume(folder)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [20, 32])
@pytest.mark.parametrize("syntax", UNCOMPRESSED[:3])
def test_pixels_of_32_bits(syntax, bits, signed, tmp_path):
    stored = stored_values(12, signed)

    def edit(ds, k):
        order = ">" if syntax == ExplicitVRBigEndian else "<"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 32, bits, bits - 1, int(signed)
        ds.add_new(0x7FE00010, "OW", stored[k].astype(f"{order}i4").tobytes())
        ds.RescaleIntercept, ds.file_meta.TransferSyntaxUID = 0, syntax

    folder = scan_files.write_series(tmp_path, stored, edit)
    assert np.array_equal(read_volume(folder).array, stored.T)
    assert np.array_equal(read_by_pydicom(folder), stored)


def test_frames_of_big_endian_and_deflated_files(tmp_path):
    hu = make_hu((4, 40, 36))
    for syntax in UNCOMPRESSED:
        path = scan_files.write_enhanced(tmp_path / f"{syntax}.dcm", hu)
        ds = pydicom.dcmread(path)
        ds.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            ds.add_new(0x7FE00010, "OW", np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes())
        _ = str(ds)  # has pydicom convert the values of sequences, which it would write in the other order
        save(ds, path)
        assert np.array_equal(read_volume(path).array, hu.T)


@pytest.mark.parametrize("high_bit", [11, 13, 15])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", (*UNCOMPRESSED[:3], RLELossless, JPEG2000Lossless))
def test_pixels_in_higher_bits(high_bit, signed, syntax, tmp_path):
    """Where the header says, as the standard had it until 2014, or in the lowest bits all the same."""
    stored = stored_values(12, signed)
    for shift in {0, high_bit - 11}:

        def edit(ds, k, shift=shift):
            order = ">" if syntax == ExplicitVRBigEndian else "<"
            ds.add_new(0x7FE00010, "OW", ((stored[k] << shift) & 0xFFFF).astype(f"{order}u2").tobytes())
            if syntax in UNCOMPRESSED:
                ds.file_meta.TransferSyntaxUID = syntax
            else:
                scan_files.compress(syntax)(ds)
            ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.RescaleIntercept = 12, high_bit, int(signed), 0

        folder = scan_files.write_series(tmp_path / str(shift), stored, edit)
        assert np.array_equal(read_volume(folder).array, stored.T)
        if shift == 0:  # elsewhere both take the lowest bits, which then hold noise
            assert np.array_equal(read_by_pydicom(folder), stored)
            assert np.array_equal(read_by_simpleitk(folder), stored)


def test_pixels_in_neither_place_are_refused(tmp_path):
    stored = stored_values(16, signed=False) | 1

    def edit(ds, k):
        scan_files.set_pixels(ds, stored[k])
        ds.BitsStored, ds.HighBit = 12, 15

    with pytest.raises(VolumeError, match="do not lie where its HighBit says"):
        read_volume(scan_files.write_series(tmp_path, stored, edit))


def rename_syntax(path: Path, syntax: str | None) -> None:
    """Name another transfer syntax in the file meta information, or none, and leave the data set as it is."""
    raw, meta = path.read_bytes(), pydicom.filereader.read_file_meta_info(path)
    data = raw[144 + meta.FileMetaInformationGroupLength :]
    if syntax is None:
        del meta.TransferSyntaxUID
    else:
        meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    file = pydicom.filebase.DicomBytesIO()
    pydicom.filewriter.write_file_meta_info(file, meta, enforce_standard=False)
    path.write_bytes(bytes(128) + b"DICM" + file.getvalue() + data)


NAMES = (*UNCOMPRESSED[:2], JPEG2000Lossless, RLELossless, "1.2.3.4", None)


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("named", NAMES)
@pytest.mark.parametrize("syntax", UNCOMPRESSED[:2])
def test_the_encoding_is_what_is_found(syntax, named, bits, tmp_path):
    """Whatever the file meta information names; refused where that leaves it open, never other voxels."""
    stored = stored_values(bits, signed=False)
    folder = write_slices(tmp_path / "series", stored, syntax, bits, False, False, False)
    rename_syntax(folder / "1.dcm", named)
    try:
        assert np.array_equal(read_volume(folder).array, stored.T)
    except VolumeError:
        assert bits == 8  # not read by the fast path
        assert named in (JPEG2000Lossless, RLELossless, "1.2.3.4")


@pytest.mark.parametrize("named", [ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_other_names_are_refused(named, tmp_path):
    folder = write_slices(tmp_path / "series", stored_values(16, True), ExplicitVRLittleEndian, 16, True, False, False)
    rename_syntax(folder / "1.dcm", named)
    with pytest.raises(VolumeError, match=r"1\.dcm"):
        read_volume(folder)


@pytest.mark.parametrize("syntax", COMPRESSED[:3])
def test_compressed_pixels_under_an_uncompressed_name_are_refused(syntax, tmp_path):
    folder = write_slices(tmp_path / "series", stored_values(16, False), syntax, 16, False, False, False)
    rename_syntax(folder / "1.dcm", ExplicitVRLittleEndian)
    with pytest.raises(VolumeError, match=r"1\.dcm: its pixels are compressed"):
        read_volume(folder)


@pytest.mark.parametrize(("surplus", "is_read"), [(0, True), (2, True), (40, True), (2880, False), (5760, False)])
def test_lengths_that_do_not_fit(surplus, is_read, tmp_path):
    """Bytes behind the pixels are padding, unless a whole frame more would fit: then the header is of another image."""
    hu = make_hu((3, 40, 36))
    folder = scan_files.write_series(
        tmp_path, hu, lambda ds, k: ds.add_new(0x7FE00010, "OW", ds.PixelData + bytes(surplus))
    )
    if is_read:
        assert np.array_equal(read_volume(folder).array, hu.T)
    else:
        with pytest.raises(VolumeError, match=f"promises 2880 bytes of pixels and it holds {2880 + surplus}"):
            read_volume(folder)
