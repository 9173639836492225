"""Headers as pydicom has them, without a word of its own, in any thread."""

import io
import logging
import re
import struct
import tomllib
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import damage
import numpy as np
import pydicom
import pytest
import scan_files
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless

from medct import VolumeError, read_volume
from medct.dicom_elements_medct import INSTALL, Elements, read_data_set, read_meta

SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian)


def header_of(raw: bytes) -> tuple[Elements, int]:
    stream = io.BytesIO(raw)
    meta = read_meta(stream)
    header = read_data_set(stream, meta.get("TransferSyntaxUID") != ExplicitVRBigEndian)
    header.file_meta = meta
    return header, stream.tell()


def saved(ds, syntax: str = ExplicitVRLittleEndian) -> bytes:
    file = io.BytesIO()
    damage.as_syntax(syntax)(ds)
    if syntax == ExplicitVRBigEndian:
        pydicom.dcmwrite(file, ds, implicit_vr=False, little_endian=False, force_encoding=True)
    else:
        ds.save_as(file, enforce_file_format=True)
    return file.getvalue()


def odd_slice() -> pydicom.Dataset:
    """A slice with values of every kind, sequences in sequences, and what is to be passed over."""
    ds = scan_files.new_slice(scan_files.make_hu((1, 8, 6))[0], 0)
    inner = scan_files.item(RescaleSlope="2.5", ImageComments="in the deep")
    middle = scan_files.item(PixelMeasuresSequence=[inner, scan_files.item()], SeriesDescription="x")
    ds.SharedFunctionalGroupsSequence = [middle, middle]
    ds.PixelPaddingValue, ds.PixelRepresentation = -2000, 1
    ds.add_new(0x00280106, "SS", -5)
    ds.WindowCenter, ds.WindowWidth = [40, -600.25], []
    ds.add_new(0x00181063, "DS", "1e-3")
    ds.add_new(0x00189311, "FD", 0.33)
    ds.add_new(0x00209057, "UL", 2**31)
    ds.add_new(0x00090010, "LO", "PRIVATE")
    ds.add_new(0x00091001, "UN", b"anything")
    ds.add_new(0x60003000, "OW", bytes(2**21))
    return ds


def assert_same(ds, header: Elements) -> None:
    for element in ds:
        if element.tag.is_private or element.tag in (0x60003000, 0x7FE00010):
            continue
        found, expected = header.get(element.keyword), element.value
        if element.VR == "SQ":
            for item, other in zip(expected, found, strict=True):
                assert_same(item, other)
        elif element.VM == 0:
            assert found is None
        elif element.VR in ("DS", "IS", "US", "SS", "UL", "FD"):
            assert np.array_equal(np.array(found, float), np.array(expected, float))
        elif element.VR not in ("OB", "OW"):
            assert np.array_equal(np.array(found, str), np.array(expected, str)) or str(found) == str(expected)


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("undefined_length", [False, True])
def test_values_are_those_of_pydicom(syntax, undefined_length):
    ds = odd_slice()
    ds["SharedFunctionalGroupsSequence"].is_undefined_length = undefined_length
    for item in ds.SharedFunctionalGroupsSequence:
        item.is_undefined_length_sequence_item = undefined_length
    raw = saved(ds, syntax)
    header, at = header_of(raw)
    assert_same(pydicom.dcmread(io.BytesIO(raw)), header)
    assert_same(pydicom.dcmread(io.BytesIO(raw)).file_meta, header.file_meta)
    assert raw[at : at + 4] in (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")
    assert header.original_encoding == (syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian)
    assert "Rows" in header
    assert "PatientComments" not in header
    assert header.get("PatientComments", 7) == 7
    with pytest.raises(AttributeError):
        _ = header.PatientComments


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("is_sequence_undefined", [False, True])
@pytest.mark.parametrize("is_item_undefined", [False, True])
@pytest.mark.parametrize("fragments", [[], [bytes(range(64))], [b"\xfe\xff\xdd\xe0\0\0\0\0", bytes(2**21)]])
def test_a_compressed_icon_is_passed_over(fragments, is_item_undefined, is_sequence_undefined, syntax):
    """Whatever its fragments hold, the end of a sequence too."""
    ds = odd_slice()
    icon = scan_files.item(Rows=8, Columns=8, ImageComments="before the pixels")
    icon.add_new(0x7FE00010, "OB", pydicom.encaps.encapsulate(fragments) if fragments else b"\xfe\xff\0\xe0\0\0\0\0")
    icon["PixelData"].is_undefined_length = True
    icon.is_undefined_length_sequence_item = is_item_undefined
    ds.IconImageSequence = [icon, scan_files.item(Rows=3)]
    ds["IconImageSequence"].is_undefined_length = is_sequence_undefined
    raw = saved(ds, syntax)
    header, at = header_of(raw)
    assert [found.Rows for found in header.IconImageSequence] == [8, 3]
    assert header.IconImageSequence[0].ImageComments == "before the pixels"
    assert "PixelData" not in header.IconImageSequence[0]
    assert raw[at:].startswith(b"\xe0\x7f\x10\0")
    assert header.get("RescaleIntercept") == -1024


@pytest.mark.parametrize("fragment", [struct.pack("<HHI", 8, 5, 0), struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)])
def test_what_is_no_fragment_is_damage(fragment):
    element = struct.pack("<HH2sHI", 0x7FE1, 0x1010, b"OB", 0, 0xFFFFFFFF)
    with pytest.raises(ValueError, match="no fragment"):
        read_data_set(io.BytesIO(element + fragment), True)


def test_kinds_are_found_where_the_transfer_syntax_is_wrong():
    ds = odd_slice()
    raw = saved(ds, ImplicitVRLittleEndian).replace(b"1.2.840.10008.1.2\0", b"1.2.840.10008.1.2.1\0"[:18])
    assert header_of(raw)[0].Rows == 8


def test_any_header_cut_short_is_an_error_or_has_what_stands_before():
    ds = odd_slice()
    del ds[0x60003000]
    raw = saved(ds)
    whole, end = header_of(raw)
    for length in range(132, end, 3):
        try:
            assert len(header_of(raw[:length])[0]) <= len(whole)
        except (ValueError, EOFError):
            continue


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(
    ("name", "other", "is_read"),
    [
        ("RescaleIntercept", "0", False),
        ("ImagePositionPatient", [1, 2, 3], False),
        ("PixelRepresentation", 1, False),
        ("RescaleIntercept", -1024, True),
        ("PatientName", "SECRET", True),
    ],
)
def test_an_element_that_is_there_twice(name, other, is_read, is_first, syntax):
    """Readers take the first or the last; what is not asked for does not matter."""
    ds = scan_files.new_slice(scan_files.make_hu((1, 8, 6))[0], 0)
    own, more = (saved_item(scan_files.item(**{name: value}), syntax) for value in (ds.get(name), other))
    raw = saved(ds, syntax)
    assert raw.count(own) == 1
    header, _ = header_of(raw.replace(own, more + own if is_first else own + more))
    if is_read:
        assert header.get("RescaleIntercept") == -1024
    else:
        with pytest.raises(ValueError, match="twice"):
            header.get(name)


def saved_item(item: pydicom.Dataset, syntax: str) -> bytes:
    file = pydicom.filebase.DicomBytesIO()
    file.is_little_endian, file.is_implicit_VR = syntax != ExplicitVRBigEndian, syntax == ImplicitVRLittleEndian
    pydicom.filewriter.write_dataset(file, item)
    return file.getvalue()


def test_lengths_and_depths_are_bounded():
    element = struct.pack("<HH2sHI", 8, 0x1140, b"SQ", 0, 0xFFFFFFFF)
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    for data in ((element + item) * 500, struct.pack("<HH2sH", 8, 5, b"LO", 0) * 70_000):
        with pytest.raises(ValueError, match="too"):
            read_data_set(io.BytesIO(data), True)
    with pytest.raises(EOFError):
        read_data_set(io.BytesIO(struct.pack("<HH2sHI", 8, 5, b"UN", 0, 2**32 - 2) + bytes(100)), True)


# ---------------------------------------------------------------------------------------------------------------------
# Not a word
# ---------------------------------------------------------------------------------------------------------------------

NAME = b"MUSTERMANN^ERIKA^1964081"


def test_what_to_install_is_what_is_declared():
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.match(r"[\w-]+", line)[0] for line in declared["optional-dependencies"]["dicom"]}
    command, option, *packages = INSTALL.split()
    assert (command, option) == ("pip", "install")
    assert packages and set(packages) <= names


def talkative(kind: str):
    """An `edit` whose values pydicom remarks on."""

    def edit(ds, k):
        if kind == "uid":
            ds._dict[pydicom.tag.Tag(0x0020000E)] = raw_element(0x0020000E, "UI")
        elif kind == "character set":
            ds._dict[pydicom.tag.Tag(0x00080005)] = raw_element(0x00080005, "CS")
        elif kind == "kind of image":
            ds._dict[pydicom.tag.Tag(0x00080016)] = raw_element(0x00080016, "UI")
        elif kind == "transfer syntax":
            ds.file_meta.TransferSyntaxUID = pydicom.uid.UID(NAME.decode())
            ds.PixelData = ds.PixelData[:-2]  # so that its name is asked for
        elif kind == "number":
            ds._dict[pydicom.tag.Tag(0x00280030)] = raw_element(0x00280030, "DS")
        else:
            damage.compress(JPEGLSLossless)(ds)
            ds.PixelData = ds.PixelData[:-100] + NAME * 4 + bytes(4)

    return edit


def raw_element(tag: int, kind: str):
    return pydicom.dataelem.RawDataElement(pydicom.tag.Tag(tag), kind, len(NAME), NAME, 0, False, True)


@pytest.mark.parametrize("kind", ["uid", "character set", "kind of image", "transfer syntax", "number", "code stream"])
def test_nothing_of_a_header_gets_out_whatever_the_threads(kind, tmp_path, capfd, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of writing them
        folders = [
            scan_files.write_series(tmp_path / f"{n}", scan_files.make_hu((3, 40, 36), seed=n), talkative(kind))
            for n in range(6)
        ]
    caplog.clear()

    def read(folder):
        try:
            return read_volume(folder).notes
        except VolumeError as error:
            return str(error)

    logger = logging.getLogger("pydicom")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = (list(warnings.filters), warnings.showwarning, logger.level, logger.disabled, list(logger.filters))
        with caplog.at_level(logging.DEBUG, logger="pydicom"), ThreadPoolExecutor(4) as pool:
            told = list(pool.map(read, folders * 3))
            assert logger.disabled is False
        after = (list(warnings.filters), warnings.showwarning, logger.level, logger.disabled, list(logger.filters))
    assert before == after
    assert [str(warning.message) for warning in caught if "medct" not in str(warning.category)] == []
    assert [record for record in caplog.records if record.name.startswith("pydicom")] == []
    assert "MUSTERMANN" not in "".join(map(str, told)) + "".join(capfd.readouterr())
