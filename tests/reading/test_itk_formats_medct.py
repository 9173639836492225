"""NRRD and MetaImage, compared with the libraries that write them."""

import zlib

import nrrd
import numpy as np
import pytest
import SimpleITK
from scan_files import make_hu

from medct import VolumeError, VolumeWarning, itk_formats_medct, read_volume

DIRECTIONS = np.array([[0.7, 0, 0], [0, 0.8, 0], [0, 0, 2.5]])
ORIGIN = np.array([-10.0, 20.0, 30.0])


@pytest.fixture
def array() -> np.ndarray:
    return make_hu((5, 6, 7))


def header(**more) -> dict:
    return {"space": "left-posterior-superior", "space directions": DIRECTIONS, "space origin": ORIGIN, **more}


def lps(volume, voxel) -> np.ndarray:
    return (volume.affine @ [*voxel, 1])[:3] * (-1, -1, 1)


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2", "ascii"])
@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr"])
def test_nrrd_encodings(encoding, suffix, array, tmp_path):
    path = tmp_path / f"scan{suffix}"
    nrrd.write(str(path), array, header(encoding=encoding), index_order="F")
    volume = read_volume(path)
    assert np.array_equal(volume.array, array)
    np.testing.assert_allclose(lps(volume, (1, 2, 3)), ORIGIN + DIRECTIONS.T @ (1, 2, 3))


@pytest.mark.filterwarnings("ignore:.*holds no air")  # of unsigned and of short values
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<i4", "<f4", ">f8", "<u2", "i1"])
def test_nrrd_types(dtype, array, tmp_path):
    values = (array // 8 if dtype == "i1" else array).astype(dtype)
    nrrd.write(str(tmp_path / "scan.nrrd"), values, header(), index_order="F")
    found = read_volume(tmp_path / "scan.nrrd").array
    assert np.array_equal(found, values)
    assert found.dtype.isnative


@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("left-posterior-superior", (1, 1, 1)),
        ("LPS", (1, 1, 1)),
        ("right-anterior-superior", (-1, -1, 1)),
        ("RAS", (-1, -1, 1)),
        ("left-anterior-superior", (1, -1, 1)),
    ],
)
def test_nrrd_spaces(space, signs, array, tmp_path):
    nrrd.write(str(tmp_path / "scan.nrrd"), array, header(space=space), index_order="F")
    np.testing.assert_allclose(lps(read_volume(tmp_path / "scan.nrrd"), (0, 0, 0)), ORIGIN * signs)


def test_nrrd_of_permuted_axes_as_simpleitk_reads_it(array, tmp_path):
    directions = np.array([[0, 0, 2.5], [0.7, 0, 0], [0, -0.8, 0]])
    nrrd.write(str(tmp_path / "scan.nrrd"), array, header(**{"space directions": directions}), index_order="F")
    volume = read_volume(tmp_path / "scan.nrrd")
    image = SimpleITK.ReadImage(str(tmp_path / "scan.nrrd"))
    for voxel in ((0, 0, 0), (4, 5, 6), (1, 3, 2)):
        np.testing.assert_allclose(lps(volume, voxel), image.TransformIndexToPhysicalPoint(voxel), atol=1e-9)
        assert volume.array[voxel] == image[voxel]


def nrrd_text(array, **changes) -> bytes:
    fields = {
        "type": "short",
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": "5 6 7",
        "space directions": "(1,0,0) (0,1,0) (0,0,2)",
        "endian": "little",
        "encoding": "raw",
        "space origin": "(0,0,0)",
    } | {name.replace("_", " "): value for name, value in changes.items()}
    lines = [f"{name}: {value}" for name, value in fields.items() if value is not None]
    return "\n".join(["NRRD0005", "# a comment", *lines, "key:=SECRET", "", ""]).encode() + array.tobytes(order="F")


def test_quantized_values_are_read_where_the_caller_says_what_they_stand_for(array):
    quantized = nrrd_text(array, old_min="-1000", old_max="2000")
    with pytest.raises(VolumeError, match="were quantized"):
        read_volume(quantized)
    assert np.array_equal(read_volume(quantized, rescale_slope=1, rescale_intercept=5).array, array + 5)
    whole = nrrd_text(array, old_min="-32768", old_max="32767")
    assert np.array_equal(read_volume(whole).array, array), "each value stands for itself"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"space": None}, "does not name the patient's axes"),
        ({"space": "3D-right-handed"}, "does not name the patient's axes"),
        ({"space_directions": None}, "not give three `space directions`"),
        ({"space_directions": "none (1,0,0) (0,1,0) (0,0,1)"}, "not give three `space directions`"),
        ({"space_directions": "(1,0,0) (0,1,0) (0,0,0)"}, "affine is singular"),
        ({"sizes": "5 6 7 2"}, r"shape \(5, 6, 7, 2\)"),
        ({"sizes": "5 6 -7"}, r"shape \(5, 6, -7\)"),
        ({"sizes": "5 6 9000000"}, r"header promises 540000000 bytes"),
        ({"sizes": "5 6 8"}, "voxels cannot be read"),
        ({"type": "block"}, "known type"),
        ({"encoding": "hex"}, "encoding is not known"),
        ({"encoding": "gzip"}, "gzip stream is damaged"),
        ({"data_file": "../../etc/passwd"}, "lie in other files"),
        ({"data_file": "LIST"}, "list of files"),
        ({"space_origin": "(0,0,0"}, "not give three `space directions`"),
        ({"line_skip": "two"}, "NRRD header is damaged"),
        ({"old_min": "low", "old_max": "9"}, "old min does not hold the numbers"),
        ({"old_min": "-1,5", "old_max": "9"}, "old min is written with decimal commas"),
        ({"encoding": "gzip", "byte_skip": "9"}, "compressed stream is damaged"),
        ({"content": "long\n" + 10_000 * "#\n"}, "header has no end"),
        ({"content": 2**20 * "x"}, "header has no end"),
    ],
)
def test_bad_nrrd(changes, reason, array, tmp_path):
    path = tmp_path / "scan.nrrd"
    path.write_bytes(nrrd_text(array, **changes))
    with pytest.raises(VolumeError, match=reason) as refused:
        read_volume(path)
    assert "SECRET" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "is_said_again"),
    [
        ("space origin", "(1,2,3)", False),
        ("space origin", "(0,0,0)", True),
        ("Space Directions", "(1,0,0) (0,1,0) (0,0,1)", False),
        ("endian", "big", False),
        ("type", "ushort", False),
        ("sizes", "5 7 6", False),
        ("byteskip", "2", False),
        ("spacings", "1 1 1", False),
        ("spacings", "nan nan nan", True),
        ("spacings", "1 1 2", True),
        ("content", "another text", True),
    ],
)
def test_what_an_nrrd_header_says_twice(name, value, is_said_again, array):
    content = nrrd_text(array, byte_skip="0", content="text").replace(b"key:=", f"{name}: {value}\nkey:=".encode())
    if is_said_again:
        assert np.array_equal(read_volume(content).array, array)
    else:
        with pytest.raises(VolumeError, match="contradicts itself about its "):
            read_volume(content)


def test_nrrd_text_is_sound(array, tmp_path):
    (tmp_path / "scan.nrrd").write_bytes(nrrd_text(array))
    assert np.array_equal(read_volume(tmp_path / "scan.nrrd").array, array)


def test_numbers_of_a_long_text_are_read_whole(array, monkeypatch):
    """It is read in pieces, which end between numbers."""
    monkeypatch.setattr(itk_formats_medct, "_TEXT_PIECE_BYTES", 7)
    header = nrrd_text(array, encoding="text").removesuffix(array.tobytes(order="F"))
    assert np.array_equal(read_volume(header + " ".join(map(str, array.flatten("F"))).encode()).array, array)


@pytest.fixture
def image(array):
    image = SimpleITK.GetImageFromArray(array.T)
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin(ORIGIN.tolist())
    image.SetDirection((0, 0, 1, 1, 0, 0, 0, 1, 0))
    return image


@pytest.mark.parametrize("name", ["scan.mha", "scan.mhd"])
@pytest.mark.parametrize("compressed", [True, False])
def test_metaimage_as_simpleitk_writes_it(name, compressed, image, array, tmp_path):
    SimpleITK.WriteImage(image, str(tmp_path / name), useCompression=compressed)
    volume = read_volume(tmp_path / name)
    assert np.array_equal(volume.array, array)
    for voxel in ((0, 0, 0), (4, 5, 6), (1, 3, 2)):
        np.testing.assert_allclose(lps(volume, voxel), image.TransformIndexToPhysicalPoint(voxel), atol=1e-9)
    if name == "scan.mha":
        assert np.array_equal(read_volume((tmp_path / name).read_bytes()).array, array)


def meta_text(array, **changes) -> bytes:
    fields = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "0 0 0",
        "ElementSpacing": "1 1 2",
        "DimSize": "5 6 7",
        "ElementType": "MET_SHORT",
    }
    fields = fields | changes | {"ElementDataFile": changes.get("ElementDataFile", "LOCAL")}
    lines = [f"{name} = {value}" for name, value in fields.items() if value is not None]
    return "\n".join([*lines, ""]).encode() + array.tobytes(order="F")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ElementSpacing": None}, "no ElementSpacing"),
        ({"ElementSpacing": "1 0 1"}, r"spacing is \(1.0, 0.0, 1.0\) mm"),
        ({"ElementSpacing": "1 1"}, "not that of 3 axes"),
        ({"ElementType": "MET_OTHER"}, "known ElementType"),
        ({"DimSize": "5 6 7 2"}, r"shape \(5, 6, 7, 2\)"),
        ({"DimSize": "5 6 70000"}, "header promises"),
        ({"ElementNumberOfChannels": "3"}, "3 channels"),
        ({"CompressedData": "True"}, "zlib stream is damaged"),
        ({"ElementDataFile": "/etc/passwd"}, "lie in other files"),
        ({"ElementDataFile": "missing.raw"}, "not beside it"),
        ({"ElementDataFile": None}, "header has no end|lie in other files"),
        ({"TransformMatrix": "1 0 0 0 1 0 0 0 0"}, "not made of unit vectors"),
        ({"TransformMatrix": "1 0 0 0 1 0 0 0 2"}, "not made of unit vectors"),
        ({"TransformMatrix": "1 0 0 0 1 0 0 0 0.98"}, "not made of unit vectors"),
        ({"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, "affine is singular"),
        ({"ElementToIntensityFunctionSlope": "1,5"}, "Slope is written with decimal commas"),
        ({"HeaderSize": "many"}, "MetaImage header is damaged"),
    ],
)
def test_bad_metaimage(changes, reason, array, tmp_path):
    path = tmp_path / "scan.mha"
    path.write_bytes(meta_text(array, **changes))
    with pytest.raises(VolumeError, match=reason):
        read_volume(path)


@pytest.mark.parametrize(
    ("name", "value", "is_said_again"),
    [
        *((name, "1 2 3", False) for name in ("Offset", "Position", "Origin")),
        *((name, "0.0 0 -0", True) for name in ("Offset", "Position", "Origin")),
        *((name, "", True) for name in ("Offset", "Position", "Origin")),
        *((name, "0 1 0 1 0 0 0 0 1", False) for name in ("TransformMatrix", "Rotation", "Orientation")),
        *((name, "True", False) for name in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")),
        *((name, "false", True) for name in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")),
        ("ElementSpacing", "1 1 1", False),
        ("ElementSize", "1 1 5", True),  # of a slice that is thicker than the step
        ("Comment", "another text", True),
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_what_a_metaimage_header_says_twice(name, value, is_said_again, is_first, array):
    content = meta_text(array, Comment="text")
    at = content.index(b"NDims" if is_first else b"ElementDataFile")
    content = content[:at] + f"{name} = {value}\n".encode() + content[at:]
    if is_said_again:
        volume = read_volume(content)
        assert np.array_equal(volume.array, array)
        assert volume.spacing_mm == (1, 1, 2)
    else:
        with pytest.raises(VolumeError, match="contradicts itself about its "):
            read_volume(content)


def test_a_metaimage_with_rounded_axes_has_the_spacing_of_its_header(array, tmp_path):
    path = tmp_path / "scan.mha"
    path.write_bytes(meta_text(array, TransformMatrix="1 0 0 0 0.9962 0.0872 0 -0.0872 0.9962"))
    volume, image = read_volume(path), SimpleITK.ReadImage(str(path))
    assert volume.spacing_mm == image.GetSpacing() == (1, 1, 2)
    for voxel in ((0, 0, 0), (4, 5, 6), (1, 3, 2)):
        np.testing.assert_allclose(lps(volume, voxel), image.TransformIndexToPhysicalPoint(voxel), atol=1e-3)


@pytest.mark.parametrize(
    ("letters", "is_read"), [("RAI", True), ("???", True), ("", True), ("ASL", False), ("LPS", False)]
)
def test_letters_of_a_metaimage_without_axes(letters, is_read, array):
    """Which readers ignore, and which beside axes are often wrong."""
    assert read_volume(meta_text(array, AnatomicalOrientation=letters)).spacing_mm == (1, 1, 2)
    content = meta_text(array, TransformMatrix=None, AnatomicalOrientation=letters)
    with (
        pytest.warns(VolumeWarning, match="no TransformMatrix") if is_read else pytest.raises(VolumeError, match="RAI")
    ):
        assert np.array_equal(read_volume(content).array, array)


def test_metaimage_without_axes_is_remarked_on(array, tmp_path):
    (tmp_path / "scan.mha").write_bytes(meta_text(array, TransformMatrix=None))
    with pytest.warns(VolumeWarning, match="no TransformMatrix"):
        assert np.array_equal(read_volume(tmp_path / "scan.mha").array, array)


def test_a_zlib_stream_cut_short(array, tmp_path):
    whole = meta_text(array, CompressedData="True")
    start = whole.index(b"LOCAL\n") + 6
    packed = zlib.compress(whole[start:])
    (tmp_path / "scan.mha").write_bytes(whole[:start] + packed)
    assert np.array_equal(read_volume(tmp_path / "scan.mha").array, array)
    (tmp_path / "scan.mha").write_bytes(whole[:start] + packed[:-9])
    with pytest.raises(VolumeError, match="zlib stream is damaged"):
        read_volume(tmp_path / "scan.mha")


@pytest.mark.parametrize("name", ["scan.nhdr", "scan.mhd"])
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n", b"\r\n"])
def test_a_detached_header_may_end_with_its_file(name, compressed, end, image, array, tmp_path):
    SimpleITK.WriteImage(image, str(tmp_path / name), useCompression=compressed)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes().rstrip(b"\n") + end)
    for source in (tmp_path / name, tmp_path):
        volume = read_volume(source)
        assert np.array_equal(volume.array, array)
        for voxel in ((0, 0, 0), (4, 5, 6), (1, 3, 2)):
            np.testing.assert_allclose(lps(volume, voxel), image.TransformIndexToPhysicalPoint(voxel), atol=1e-9)


@pytest.mark.parametrize("name", ["scan.nhdr", "scan.mhd"])
def test_a_header_cut_anywhere_gives_the_scan_or_none(name, image, array, tmp_path):
    SimpleITK.WriteImage(image, str(tmp_path / name))
    whole = read_volume(tmp_path / name)
    header = (tmp_path / name).read_bytes()
    for length in range(12, len(header) - 1):
        (tmp_path / name).write_bytes(header[:length])
        with pytest.raises(VolumeError):
            read_volume(tmp_path / name)
    (tmp_path / name).write_bytes(header[:-1])
    assert np.array_equal(read_volume(tmp_path / name).affine, whole.affine)


def test_an_origin_cut_in_the_middle_of_a_number(array, tmp_path):
    header = nrrd_text(array, data_file="scan.raw", space_origin="(0,0,-123.5)")
    (tmp_path / "scan.raw").write_bytes(array.tobytes(order="F"))
    lines = [line for line in header.split(b"\n\n")[0].split(b"\n") if not line.startswith((b"space origin", b"key"))]
    for cut, is_read in ((b"(0,0,-123.5)", True), (b"(0,0,-12", False), (b"(0,0,", False), (b"(", False)):
        (tmp_path / "scan.nhdr").write_bytes(b"\n".join([*lines, b"space origin: " + cut]))
        if is_read:
            assert lps(read_volume(tmp_path / "scan.nhdr"), (0, 0, 0))[2] == -123.5
        else:
            with pytest.raises(VolumeError, match="three `space directions`"):
                read_volume(tmp_path / "scan.nhdr")
