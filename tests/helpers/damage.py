"""Sound scans of every kind, and ways to damage them that know where lengths, offsets, counts and markers stand.

for kind, source in sources(folder).items():
    damaged = source(np.random.default_rng(seed))  # bytes, or a list of the bytes of files
"""

import bz2
import gzip
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import jpeg_lossless
import nibabel
import numpy as np
import pydicom
import scan_files
from PIL import Image
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

Generator = np.random.Generator
Source = Callable[[Generator], bytes | list[bytes]]
SHAPE = (3, 40, 36)
_EXTREMES = (0, 1, 2, 3, 7, 8, 15, 16, 17, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF, 0x10000, 10**6)
_EXTREMES_32 = (*_EXTREMES, 2**24, 2**30, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)
_TEXTS = (b"0", b"-1", b"1", b"65535", b"99999", b"2147483648", b"1e30", b"1e-30", b"nan", b"inf", b"", b"9" * 40, b"x")


# ---------------------------------------------------------------------------------------------------------------------
# Sound scans
# ---------------------------------------------------------------------------------------------------------------------


def nifti_bytes(nifti_class=nibabel.Nifti1Image) -> bytes:
    image = nifti_class(scan_files.make_hu((8, 9, 7)), np.diag([-2.0, -2, 3, 1]))
    image.header.set_qform(image.affine, code=1)
    return image.to_bytes()


def nrrd_bytes(encoding: str = "raw") -> bytes:
    header = (
        "NRRD0005\ntype: short\ndimension: 3\nspace: LPS\nsizes: 8 9 7\nspace directions: (2,0,0) (0,2,0) (0,0,3)\n"
        f"endian: little\nencoding: {encoding}\nspace origin: (0,0,0)\n\n"
    )
    voxels = scan_files.make_hu((8, 9, 7))
    raw = voxels.tobytes(order="F")
    text = " ".join(map(str, voxels.flatten("F"))).encode()
    packed = {"raw": raw, "gzip": gzip.compress(raw), "bzip2": bz2.compress(raw), "text": text}
    return header.encode() + packed[encoding]


def meta_bytes(compressed: bool = False) -> bytes:
    raw = scan_files.make_hu((8, 9, 7)).tobytes(order="F")
    header = (
        f"ObjectType = Image\nNDims = 3\nCompressedData = {compressed}\nTransformMatrix = 1 0 0 0 1 0 0 0 1\n"
        "Offset = 0 0 0\nElementSpacing = 2 2 3\nDimSize = 8 9 7\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    return header.encode() + (zlib.compress(raw) if compressed else raw)


def code_stream(stored: np.ndarray, syntax: str) -> bytes:
    """One frame, `(row, column)`, uint16, as JPEG; lossy of eight bits if baseline."""
    if syntax == JPEGBaseline8Bit:
        file = io.BytesIO()
        Image.fromarray((stored >> 4).astype(np.uint8)).save(file, "JPEG", quality=95)
        return file.getvalue()
    return jpeg_lossless.encode(stored, predictor=1 if syntax == JPEGLosslessSV1 else 4)


def compress(syntax: str) -> Callable:
    """An `edit` that compresses the pixels of a data set."""
    if syntax not in (JPEGBaseline8Bit, JPEGLossless, JPEGLosslessSV1):
        return scan_files.compress(syntax)

    def edit(ds, k=0):
        stored = np.frombuffer(ds.PixelData, "<u2").reshape(-1, ds.Rows, ds.Columns)
        ds.file_meta.TransferSyntaxUID = syntax
        ds.add_new(0x7FE00010, "OB", encapsulate([code_stream(frame, syntax) for frame in stored]))
        ds["PixelData"].is_undefined_length = True
        if syntax == JPEGBaseline8Bit:
            ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.RescaleSlope = 8, 8, 7, 16

    return edit


def as_syntax(syntax: str) -> Callable:
    """An `edit` that writes a data set in an uncompressed syntax."""

    def edit(ds, k=0):
        ds.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            ds.add_new(0x7FE00010, "OW", np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes())

    return edit


def series(folder: Path, edit: Callable | None = None) -> list[bytes]:
    scan_files.write_series(folder, scan_files.make_hu(SHAPE), edit)
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def enhanced(folder: Path, edit: Callable | None = None) -> bytes:
    return scan_files.write_enhanced(folder / "enhanced.dcm", scan_files.make_hu(SHAPE), edit).read_bytes()


def zipped(files: list[bytes]) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for k, data in enumerate(files):
            file.writestr(f"{k}.dcm", data)
    return archive.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


def any_bytes(raw: bytes, generator: Generator) -> bytes:
    """A few bytes changed, most of them in the header; or a piece cut off, left out, repeated, blanked or moved."""
    data = bytearray(raw)
    reach = len(data) if generator.random() < 0.5 else min(len(data), 1000)
    start, length = int(generator.integers(reach)), int(generator.integers(1, 50))
    match generator.integers(8):
        case 0 | 1:
            for _ in range(generator.integers(1, 5)):
                value = generator.choice([0, 1, 127, 128, 255, generator.integers(256)])
                data[int(generator.integers(reach))] = int(value)
        case 2:
            del data[start:]
        case 3:
            del data[start : start + length]
        case 4:
            data[start:start] = data[start : start + length]
        case 5:
            data[start:] = bytes(len(data) - start)
        case 6:
            data[start : start + 10 * length] = bytes(len(data[start : start + 10 * length]))
        case 7:
            other = int(generator.integers(reach))
            data[start : start + length], data[other : other + length] = (
                data[other : other + length],
                data[start : start + length],
            )
    return bytes(data)


def write_number(data: bytearray, at: int, size: int, order: str, generator: Generator) -> None:
    """An extreme or neighbouring number in place of one that stands there."""
    found = int.from_bytes(data[at : at + size], order)
    number = int(generator.choice([found - 1, found + 1, found * 2, *_EXTREMES_32])) % 256**size
    data[at : at + size] = number.to_bytes(size, order)


def nifti_fields(raw: bytes, generator: Generator) -> bytes:
    """A field of a NIfTI-1 header: a length, a type, an offset, a scale."""
    data = bytearray(raw)
    at, size = [
        *((40 + 2 * k, 2) for k in range(8)),
        *((76 + 4 * k, 4) for k in range(8)),
        *((at, 2) for at in (70, 72, 123, 252, 254)),
        *((at, 4) for at in (0, 108, 112, 116, 256, 280, 344)),
    ][int(generator.integers(28))]
    if size == 4 and at not in (0, 344) and generator.random() < 0.5:
        value = generator.choice([0, -1, np.nan, np.inf, 1e30, 1e-30, 2.0**31, 352.5])
        struct.pack_into("<f", data, at, value)
    else:
        write_number(data, at, size, "little", generator)
    return bytes(data)


def words(raw: bytes, generator: Generator) -> bytes:
    """A number or a line of a text header."""
    end = min(max(raw.rfind(b"\n", 0, 600), 1), len(raw))
    head, body = raw[:end], raw[end:]
    if generator.random() < 0.7:
        places = list(re.finditer(rb"-?\d+|True|False|short|MET_SHORT|LOCAL|raw|gzip|bzip2|text|little", head))
        place = places[int(generator.integers(len(places)))]
        other = (*_TEXTS, b"True", b"gzip", b"bzip2", b"raw", b"text", b"double", b"MET_DOUBLE", b"uchar", b"MET_UCHAR")
        return head[: place.start()] + other[int(generator.integers(len(other)))] + head[place.end() :] + body
    lines = head.split(b"\n")
    k = int(generator.integers(len(lines)))
    more = (b"line skip: 999999", b"byte skip: -1", b"HeaderSize = -1", b"byte skip: 99999", b"dimension: 4")
    lines[k : k + 1] = [[], [lines[k]] * 2, [more[int(generator.integers(len(more)))], lines[k]]][generator.integers(3)]
    return b"\n".join(lines) + body


def dicom_elements(raw: bytes, generator: Generator) -> bytes:
    """The length, kind or value of an element, or of an item of one."""
    data = bytearray(raw)
    at = _an_element(raw, generator)
    is_long = raw[at + 4 : at + 6] in (b"OB", b"OW", b"SQ", b"UN", b"UT")
    length_at, size = (at + 8, 4) if is_long else (at + 6, 2)
    value_at, length = length_at + size, int.from_bytes(raw[length_at : length_at + size], "little")
    match generator.integers(5):
        case 0 | 1:
            write_number(data, length_at, size, "little", generator)
        case 2:
            kinds = (b"US", b"DS", b"SQ", b"UN", b"OB", b"UI", b"\0\0", b"zz", b"IS")
            data[at + 4 : at + 6] = kinds[int(generator.integers(len(kinds)))]
        case 3 if length <= 8:
            write_number(data, value_at, min(length, 4) or 2, "little", generator)
        case _:
            text = _TEXTS[int(generator.integers(len(_TEXTS)))]
            data[value_at : value_at + min(length, len(text))] = text[:length]
    return bytes(data)


def _an_element(raw: bytes, generator: Generator) -> int:
    """Where one of the elements, explicit and little-endian, begins."""
    places = [
        found.start()
        for found in re.finditer(rb"(?s)[\x02\x08\x10\x18\x20\x28\xe0][\x00\x7f\x52]..[A-Z]{2}", raw)
        if found.start() > 130
    ]
    return places[int(generator.integers(len(places)))] if places else 132


def fragments(raw: bytes, generator: Generator) -> bytes:
    """Items of compressed pixels: a length, the table of frames, one left out, repeated or moved."""
    start = raw.rfind(b"\xe0\x7f\x10\x00") + 12
    if raw[start : start + 4] != b"\xfe\xff\x00\xe0":
        return any_bytes(raw, generator)
    at, items = start, []
    while raw[at : at + 4] == b"\xfe\xff\x00\xe0":
        length = int.from_bytes(raw[at + 4 : at + 8], "little")
        items.append(raw[at : at + 8 + length])
        at += 8 + length
    rest = raw[at:]
    k = int(generator.integers(len(items)))
    match generator.integers(7):
        case 0 | 1:
            item = bytearray(items[k])
            write_number(item, 4, 4, "little", generator)
            items[k] = bytes(item)
        case 2 if len(items[0]) > 8:
            table = bytearray(items[0])
            write_number(table, 8 + 4 * int(generator.integers((len(table) - 8) // 4)), 4, "little", generator)
            items[0] = bytes(table)
        case 3:
            del items[k]
        case 4:
            items.insert(k, items[k])
        case 5:
            items[k], items[-1] = items[-1], items[k]
        case _:
            rest = rest[: int(generator.integers(len(rest) + 1))]
    return raw[:start] + b"".join(items) + rest


def markers(raw: bytes, generator: Generator) -> bytes:
    """What follows a marker of a code stream, or the marker itself."""
    start = max(raw.rfind(b"\xe0\x7f\x10\x00"), 0)
    places = [found.start() for found in re.finditer(rb"\xff[\x4f-\x64\x90-\x93\xc0-\xfe]", raw[start:])]
    if not places:
        return any_bytes(raw, generator)
    data, at = bytearray(raw), start + places[int(generator.integers(min(len(places), 40)))]
    match generator.integers(4):
        case 0:
            data[at + 1] = int(generator.choice([0xC0, 0xC3, 0xC4, 0xD8, 0xD9, 0xDA, 0xDD, 0xF7, 0x51, 0x90, 0x93, 0]))
        case 1:
            write_number(data, at + 2, 2, "big", generator)
        case _:
            size = int(generator.choice([1, 2, 4]))
            write_number(data, min(at + 2 + int(generator.integers(44)), len(data) - size), size, "big", generator)
    return bytes(data)


def run_lengths(raw: bytes, generator: Generator) -> bytes:
    """The header of a frame in run lengths: how many segments, and where they begin; or a run."""
    start = raw.rfind(b"\xe0\x7f\x10\x00")
    at = raw.find(b"\x02\x00\x00\x00\x40\x00\x00\x00", start)
    if start < 0 or at < 0:
        return any_bytes(raw, generator)
    data = bytearray(raw)
    if generator.random() < 0.5:
        write_number(data, at + 4 * int(generator.integers(5)), 4, "little", generator)
    else:
        data[at + 64 + int(generator.integers(len(raw) - at - 64))] = int(generator.choice([0, 127, 128, 129, 255]))
    return bytes(data)


def zip_fields(raw: bytes, generator: Generator) -> bytes:
    """A field of a member or of the directory: method, flags, sizes, offsets, counts."""
    data = bytearray(raw)
    sign, sizes = [
        (b"PK\x03\x04", {6: 2, 8: 2, 14: 4, 18: 4, 22: 4, 26: 2, 28: 2}),
        (b"PK\x01\x02", {8: 2, 10: 2, 16: 4, 20: 4, 24: 4, 28: 2, 30: 2, 32: 2, 42: 4}),
        (b"PK\x05\x06", {4: 2, 8: 2, 10: 2, 12: 4, 16: 4, 20: 2}),
    ][int(generator.integers(3))]
    places = [found.start() for found in re.finditer(re.escape(sign), raw)]
    offset = int(generator.choice(list(sizes)))
    write_number(data, places[int(generator.integers(len(places)))] + offset, sizes[offset], "little", generator)
    return bytes(data)


# ---------------------------------------------------------------------------------------------------------------------
# Both
# ---------------------------------------------------------------------------------------------------------------------


def single(raw: bytes, *ways: Callable, pack: Callable[[bytes], bytes] = bytes) -> Source:
    """One file damaged in one of some ways, then packed."""

    def make(generator: Generator) -> bytes:
        return pack(ways[int(generator.integers(len(ways)))](raw, generator))

    return make


def several(files: list[bytes], *ways: Callable, pack: Callable[[list[bytes]], bytes] | None = None) -> Source:
    """One of some files damaged in one of some ways."""

    def make(generator: Generator) -> bytes | list[bytes]:
        victim, way = int(generator.integers(len(files))), ways[int(generator.integers(len(ways)))]
        made = [way(file, generator) if k == victim else file for k, file in enumerate(files)]
        return made if pack is None else pack(made)

    return make


def _coded(syntax: str, *ways: Callable) -> Callable[[Path], Source]:
    return lambda folder: several(series(folder, compress(syntax)), any_bytes, dicom_elements, fragments, *ways)


def _enhanced(syntax: str, *ways: Callable) -> Callable[[Path], Source]:
    return lambda folder: single(enhanced(folder, compress(syntax)), any_bytes, dicom_elements, fragments, *ways)


SOURCES: dict[str, Callable[[Path], Source]] = {
    "nifti": lambda _: single(nifti_bytes(), any_bytes, nifti_fields),
    "nifti-2": lambda _: single(nifti_bytes(nibabel.Nifti2Image), any_bytes),
    "nifti in gzip": lambda _: single(nifti_bytes(), any_bytes, nifti_fields, pack=lambda raw: gzip.compress(raw, 1)),
    "gzip": lambda _: single(gzip.compress(nifti_bytes()), any_bytes),
    "nrrd": lambda _: single(nrrd_bytes(), any_bytes, words),
    "nrrd gzip": lambda _: single(nrrd_bytes("gzip"), any_bytes, words),
    "nrrd bzip2": lambda _: single(nrrd_bytes("bzip2"), any_bytes, words),
    "nrrd text": lambda _: single(nrrd_bytes("text"), any_bytes, words),
    "metaimage": lambda _: single(meta_bytes(), any_bytes, words),
    "metaimage zlib": lambda _: single(meta_bytes(compressed=True), any_bytes, words),
    "dicom": lambda folder: several(series(folder), any_bytes, dicom_elements),
    "dicom implicit": lambda folder: several(series(folder, as_syntax(ImplicitVRLittleEndian)), any_bytes),
    "dicom big-endian": lambda folder: several(series(folder, as_syntax(ExplicitVRBigEndian)), any_bytes),
    "dicom deflated": lambda folder: several(series(folder, as_syntax(DeflatedExplicitVRLittleEndian)), any_bytes),
    "rle": _coded(RLELossless, run_lengths, run_lengths),
    "jpeg 2000": _coded(JPEG2000Lossless, markers, markers),
    "jpeg-ls": _coded(JPEGLSLossless, markers, markers),
    "jpeg lossless": _coded(JPEGLosslessSV1, markers, markers),
    "jpeg lossless, predictor 4": _coded(JPEGLossless, markers, markers),
    "jpeg baseline": _coded(JPEGBaseline8Bit, markers, markers),
    "enhanced": lambda folder: single(enhanced(folder), any_bytes, dicom_elements),
    "enhanced rle": _enhanced(RLELossless, run_lengths, run_lengths),
    "enhanced jpeg-ls": _enhanced(JPEGLSLossless, markers, markers),
    "enhanced jpeg lossless": _enhanced(JPEGLosslessSV1, markers, markers),
    "zip": lambda folder: single(zipped(series(folder)), any_bytes, zip_fields),
    "zip of damaged files": lambda folder: several(series(folder), any_bytes, dicom_elements, pack=zipped),
}
"""For each kind of source what makes, in a folder, what makes damaged ones."""


def frames_of(ds: pydicom.Dataset) -> list[bytes]:
    return list(generate_frames(ds.PixelData, number_of_frames=int(ds.get("NumberOfFrames", 1))))
