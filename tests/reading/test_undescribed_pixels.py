"""Headers that lack what says which number a pixel is: the right one is read, or none."""

import itertools

import numpy as np
import pytest
import scan_files
from pydicom.uid import ImplicitVRLittleEndian, JPEGLSLossless, RLELossless
from scan_files import compress, write_series

from medct import VolumeError, read_volume

NAMES = ("BitsStored", "HighBit", "PixelRepresentation")
SUBSETS = [lacks for count in (1, 2, 3) for lacks in itertools.combinations(NAMES, count)]
LAYOUTS = [
    (bits, signed, lowest, highest, overlay)
    for bits, signed in itertools.product((12, 13, 16), (False, True))
    for lowest, highest in ((0, 1500), (0, 4000), (-1024, 1500), (-2048, 2047), (-1024, 4000))
    for overlay in (False, True)
    if signed or lowest == 0
    if -(2 ** (bits - 1)) * signed <= lowest and highest < 2 ** (bits - signed)
    if bits < 16 or not overlay
]


def stored(lowest: int, highest: int) -> np.ndarray:
    values = np.random.default_rng(0).integers(lowest, highest + 1, (2, 16, 12))
    values[0, 0, :2] = lowest, highest
    return values


def series(folder, values, bits, signed, lacks, overlay=False, syntax=None):
    def edit(ds, k):
        words = values[k] & (2**bits - 1) if overlay else values[k] & 0xFFFF
        scan_files.set_pixels(ds, words | (0x8000 if overlay else 0), bits_stored=bits)
        ds.PixelRepresentation = int(signed)
        if syntax == ImplicitVRLittleEndian:
            ds.file_meta.TransferSyntaxUID = syntax
        elif syntax is not None:
            compress(syntax)(ds)

    write_series(folder, values, edit)
    for path in folder.iterdir():
        ds = scan_files.pydicom.dcmread(path)
        for name in lacks:
            delattr(ds, name)
        ds.save_as(path)
    return folder


@pytest.mark.parametrize("lacks", SUBSETS, ids="-".join)
def test_the_right_numbers_or_none(lacks, tmp_path):
    for number, (bits, signed, lowest, highest, overlay) in enumerate(LAYOUTS):
        values = stored(lowest, highest)
        folder = series(tmp_path / str(number), values, bits, signed, lacks, overlay)
        try:
            array = read_volume(folder).array
        except VolumeError as error:
            assert any(f"it has no {name}, so it is not known" in str(error) for name in lacks)
        else:
            assert np.array_equal(array, (values - 1024).T), (bits, signed, lowest, highest, overlay)


@pytest.mark.parametrize("syntax", [None, ImplicitVRLittleEndian, RLELossless, JPEGLSLossless])
@pytest.mark.parametrize("lacks", SUBSETS, ids="-".join)
@pytest.mark.parametrize("signed", [False, True])
def test_numbers_that_leave_no_choice_are_read(lacks, signed, syntax, tmp_path):
    values = stored(0, 2047)
    folder = series(tmp_path, values, 16, signed, lacks, syntax=syntax)
    assert np.array_equal(read_volume(folder).array, (values - 1024).T)


@pytest.mark.parametrize(
    ("lacks", "bits", "signed", "lowest", "highest", "is_read"),
    [
        (["HighBit"], 16, True, -2000, 3071, True),
        (["BitsStored"], 16, True, -2000, 3071, True),
        (["BitsStored"], 12, False, 0, 4095, True),
        (["PixelRepresentation"], 16, False, 0, 4095, True),
        (["PixelRepresentation"], 12, False, 0, 4095, False),
        (["PixelRepresentation"], 16, True, -1, 4095, False),
        (["BitsStored", "HighBit"], 16, False, 0, 4095, True),
        (["BitsStored", "HighBit"], 16, True, -2048, 2047, True),
        (["BitsStored", "HighBit"], 16, True, -2048, 2048, False),
        (["BitsStored", "HighBit", "PixelRepresentation"], 16, False, 0, 2048, False),
    ],
)
def test_what_follows_from_the_rest_of_the_header(lacks, bits, signed, lowest, highest, is_read, tmp_path):
    values = stored(lowest, highest)
    folder = series(tmp_path, values, bits, signed, lacks)
    if is_read:
        assert np.array_equal(read_volume(folder).array, (values - 1024).T)
    else:
        with pytest.raises(VolumeError, match="so it is not known"):
            read_volume(folder)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
def test_a_sign_that_a_stream_of_fewer_bits_may_hold(syntax, tmp_path):
    values = stored(-1024, 1023)
    folder = series(tmp_path, values, 12, True, ["PixelRepresentation"], syntax=syntax)
    with pytest.raises(VolumeError, match="it has no PixelRepresentation"):
        read_volume(folder)


@pytest.mark.parametrize("signed", [2, 65535])
def test_a_sign_that_is_none(signed, tmp_path):
    folder = series(tmp_path, stored(-1024, 1023), 16, True, [])
    for path in folder.iterdir():
        ds = scan_files.pydicom.dcmread(path)
        ds.PixelRepresentation = signed
        ds.save_as(path)
    with pytest.raises(VolumeError, match="it has no PixelRepresentation"):
        read_volume(folder)


@pytest.mark.parametrize(("highest", "is_remarked"), [(30710, False), (30711, True), (64511, True)])
def test_values_that_no_ct_has_are_remarked_on(highest, is_remarked, tmp_path):
    volume = read_volume(series(tmp_path, stored(0, highest + 1024), 16, False, []))
    assert any("more than any CT has" in note for note in volume.notes) == is_remarked
