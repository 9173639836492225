"""One volume under every key that MetaImage, NRRD and NIfTI headers document, compared with independent readers.

What SimpleITK ignores or cannot read stands in the tests "beyond ITK", with what is made of it here.
"""

import bz2
import gzip
import itertools
import zlib

import nibabel
import nrrd
import numpy as np
import pytest
import SimpleITK
from scan_files import make_hu

from medct import VolumeError, read_volume

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ARRAY = make_hu((5, 6, 7))
"""`(i, j, k)`; in the files i runs fastest."""
SPACING_MM = (0.7, 0.8, 2.5)
ORIGIN_MM = (-10.0, 20.0, 30.0)


def body(dtype="<i2", array=ARRAY) -> bytes:
    return np.asarray(array).astype(dtype).tobytes(order="F")


def text(array=ARRAY) -> bytes:
    return (" ".join(map(str, array.ravel(order="F"))) + "\n").encode()


def assert_is(volume, array=ARRAY, spacing_mm=SPACING_MM, origin_mm=ORIGIN_MM) -> None:
    assert np.array_equal(volume.array, array)
    assert volume.array.dtype.isnative
    assert volume.spacing_mm == pytest.approx(spacing_mm)
    np.testing.assert_allclose(volume.affine[:3, 3] * (-1, -1, 1), origin_mm, atol=1e-6)


def assert_as_simpleitk(path, volume) -> None:
    image = SimpleITK.ReadImage(str(path))
    assert np.array_equal(SimpleITK.GetArrayFromImage(image).T, volume.array)
    for voxel in ((0, 0, 0), (4, 5, 6), (1, 3, 2)):
        lps = (volume.affine @ [*voxel, 1])[:3] * (-1, -1, 1)
        np.testing.assert_allclose(lps, image.TransformIndexToPhysicalPoint(voxel), atol=1e-6)


META = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1",
    "Offset": "-10 20 30",
    "ElementSpacing": "0.7 0.8 2.5",
    "DimSize": "5 6 7",
    "ElementType": "MET_SHORT",
    "ElementDataFile": "LOCAL",
}


def meta(folder, data: bytes, separator=" = ", end="\n", **changes):
    fields = {
        name: value for name, value in (META | changes).items() if value is not None and name != "ElementDataFile"
    }
    fields["ElementDataFile"] = changes.get("ElementDataFile", "LOCAL")
    path = folder / "scan.mha"
    path.write_bytes("".join(f"{name}{separator}{value}{end}" for name, value in fields.items()).encode() + data)
    return path


PACKED = zlib.compress(body())
TRUE, FALSE = ("True", "true", "T", "1"), ("False", "false", "F", "0")
META_KEYS = {
    "plain": ({}, body()),
    **{f"MSB {word}": ({"BinaryDataByteOrderMSB": word}, body(">i2")) for word in TRUE},
    **{f"MSB {word}": ({"BinaryDataByteOrderMSB": word}, body("<i2")) for word in FALSE},
    **{
        f"element MSB {word}": ({"BinaryDataByteOrderMSB": None, "ElementByteOrderMSB": word}, body(">i2"))
        for word in TRUE
    },
    **{f"compressed {word}": ({"CompressedData": word, "CompressedDataSize": len(PACKED)}, PACKED) for word in TRUE},
    **{f"compressed {word}": ({"CompressedData": word}, body()) for word in FALSE},
    **{f"spacing by {name}": ({"ElementSpacing": None, name: "0.7 0.8 2.5"}, body()) for name in ("ElementSize",)},
    "size beside spacing": ({"ElementSize": "3 3 3"}, body()),
    **{f"offset by {name}": ({"Offset": None, name: "-10 20 30"}, body()) for name in ("Position", "Origin")},
    **{
        f"axes by {name}": ({"TransformMatrix": None, name: "0 1 0 1 0 0 0 0 1"}, body())
        for name in ("Rotation", "Orientation")
    },
    **{
        f"{name}": ({name: value}, body())
        for name, value in {
            "CenterOfRotation": "9 9 9",
            "AnatomicalOrientation": "LPI",
            "Comment": "x = y",
            "ObjectSubType": "x",
            "Name": "a name",
            "ID": "3",
            "ParentID": "-1",
            "Color": "1 0 0 1",
            "Modality": "MET_MOD_CT",
            "SequenceID": "1 2 3",
            "ElementMin": "-1000",
            "ElementMax": "5",
            "ElementNumberOfChannels": "1",
            "HeaderSize": "0",
            "DistanceUnits": "mm",
        }.items()
    },
    **{f"LOCAL as {word}": ({"ElementDataFile": word}, body()) for word in ("local", "Local")},
}


@pytest.mark.parametrize("case", META_KEYS)
def test_metaimage_keys(case, tmp_path):
    changes, data = META_KEYS[case]
    path = meta(tmp_path, data, **changes)
    volume = read_volume(path)
    assert np.array_equal(volume.array, ARRAY)
    assert_as_simpleitk(path, volume)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("MET_CHAR", "i1"),
        ("MET_UCHAR", "u1"),
        ("MET_SHORT", "i2"),
        ("MET_USHORT", "u2"),
        ("MET_INT", "i4"),
        ("MET_UINT", "u4"),
        ("MET_LONG", "i4"),
        ("MET_ULONG", "u4"),
        ("MET_LONG_LONG", "i8"),
        ("MET_ULONG_LONG", "u8"),
        ("MET_FLOAT", "f4"),
        ("MET_DOUBLE", "f8"),
    ],
)
@pytest.mark.parametrize("order", "<>")
def test_metaimage_types(name, dtype, order, tmp_path):
    array = (np.abs(ARRAY) if dtype[0] == "u" else ARRAY) // (16 if dtype[1] == "1" else 1)
    path = meta(tmp_path, body(order + dtype, array), ElementType=name, BinaryDataByteOrderMSB=str(order == ">"))
    volume = read_volume(path)
    assert np.array_equal(volume.array, array)
    assert_as_simpleitk(path, volume)


@pytest.mark.parametrize("separator", [" = ", "=", ": ", ":"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("first", ["NDims", "ObjectType", "Comment", "Name", "BinaryData"])
def test_metaimage_spellings(separator, end, first, tmp_path):
    path = meta(tmp_path, body(), separator, end)
    head = f"{first}{separator}{META.get(first, 'x')}{end}".encode()
    path.write_bytes(head + path.read_bytes())
    assert_is(read_volume(path))


@pytest.mark.parametrize(
    ("header_size", "data"),
    [(None, body()), ("0", body()), ("8", b"01234567" + body()), ("-1", b"of any length" + body())],
)
def test_metaimage_voxels_of_their_own_file(header_size, data, tmp_path):
    (tmp_path / "scan.raw").write_bytes(data)
    path = meta(tmp_path, b"", HeaderSize=header_size, ElementDataFile="scan.raw")
    assert_is(read_volume(path))
    assert_as_simpleitk(path, read_volume(path))


# What ITK ignores or cannot read, and what is made of it here.
@pytest.mark.parametrize(
    ("changes", "data", "array", "factor", "remark"),
    [
        ({"BinaryData": "False"}, text(), ARRAY, 1, None),
        ({"BinaryData": "0"}, text(), ARRAY, 1, None),
        ({"CompressedData": "True"}, gzip.compress(body()), ARRAY, 1, None),
        ({"DistanceUnits": "cm"}, body(), ARRAY, 10, "converted to mm"),
        ({"DistanceUnits": "um"}, body(), ARRAY, 0.001, "converted to mm"),
        (
            {"ElementToIntensityFunctionSlope": "2", "ElementToIntensityFunctionOffset": "-10"},
            body(),
            ARRAY * 2 - 10,
            1,
            "intensity function was applied",
        ),
    ],
)
def test_metaimage_beyond_itk(changes, data, array, factor, remark, tmp_path):
    path = meta(tmp_path, data, **changes)
    volume = read_volume(path)
    assert_is(volume, array, np.array(SPACING_MM) * factor, np.array(ORIGIN_MM) * factor)
    assert remark is None or remark in " ".join(volume.notes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"Modality": "MET_MOD_MR"}, "Modality is not CT"),
        ({"DistanceUnits": "furlong"}, "unit of length"),
        ({"ElementSpacing": "0,7 0,8 2,5"}, "ElementSpacing is written with decimal commas"),
        ({"Offset": "1,5 2 3"}, "Offset is written with decimal commas"),
        ({"ElementDataFile": "LIST"}, "lie in other files"),
        ({"ElementDataFile": "s%02d.raw 0 6 1"}, "lie in other files"),
        ({"ElementDataFile": "long.raw"}, "more than the 420 bytes of voxels that its header promises"),
        ({"HeaderSize": "x"}, "header is damaged"),
    ],
)
def test_metaimage_refused(changes, reason, tmp_path):
    (tmp_path / "long.raw").write_bytes(body() + bytes(10))
    with pytest.raises(VolumeError, match=reason):
        read_volume(meta(tmp_path, body(), **changes))


def test_a_scale_of_the_header_and_of_the_caller(tmp_path):
    path = meta(tmp_path, body(), ElementToIntensityFunctionSlope="2")
    with pytest.raises(VolumeError, match="already rescales"):
        read_volume(path, rescale_slope=1, rescale_intercept=0)


NRRD = {
    "type": "short",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "5 6 7",
    "space directions": "(0.7,0,0) (0,0.8,0) (0,0,2.5)",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(-10,20,30)",
}


def write_nrrd(folder, data: bytes, version=5, separator=": ", **changes):
    fields = {name: value for name, value in (NRRD | changes).items() if value is not None}
    lines = [f"NRRD000{version}", *(f"{name}{separator}{value}" for name, value in fields.items()), "", ""]
    path = folder / "scan.nrrd"
    path.write_bytes("\n".join(lines).encode() + data)
    return path


NRRD_KEYS = {
    "plain": ({}, body()),
    "big": ({"endian": "big"}, body(">i2")),
    "BIG": ({"endian": "BIG"}, body(">i2")),
    **{name: ({"encoding": name}, gzip.compress(body())) for name in ("gzip", "gz", "GZIP")},
    **{name: ({"encoding": name}, text()) for name in ("text", "txt", "ascii")},
    "hex": ({"encoding": "hex"}, body().hex().encode()),
    **{kinds: ({"kinds": kinds}, body()) for kinds in ("space space space", "Domain ??? none")},
    **{
        name: ({name: value}, body())
        for name, value in {
            "content": "a: b",
            "thicknesses": "nan nan 3",
            "centerings": "cell cell cell",
            "kinds": "domain domain domain",
            "labels": '"x" "y" "z"',
            "space units": '"mm" "mm" "mm"',
            "measurement frame": "(1,0,0) (0,1,0) (0,0,1)",
            "sample units": '"HU"',
            "line skip": "0",
            "byte skip": "0",
        }.items()
    },
}


@pytest.mark.parametrize("case", NRRD_KEYS)
def test_nrrd_keys(case, tmp_path):
    changes, data = NRRD_KEYS[case]
    path = write_nrrd(tmp_path, data, **changes)
    volume = read_volume(path)
    assert_is(volume)
    assert_as_simpleitk(path, volume)


TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}


@pytest.mark.parametrize(("dtype", "name"), [(dtype, name) for dtype, names in TYPES.items() for name in names])
def test_nrrd_types(dtype, name, tmp_path):
    array = (np.abs(ARRAY) if dtype[0] == "u" else ARRAY) // (16 if dtype[1] == "1" else 1)
    path = write_nrrd(tmp_path, body(">" + dtype, array), type=name, endian="big")
    assert_is(read_volume(path), array)
    assert np.array_equal(nrrd.read(str(path), index_order="F")[0], array)


@pytest.mark.parametrize(
    ("changes", "data", "factor"),
    [
        ({"encoding": "bzip2"}, bz2.compress(body()), 1),
        ({"encoding": "bz2"}, bz2.compress(body()), 1),
        ({"byte skip": "5"}, b"12345" + body(), 1),
        ({"byteskip": "-1"}, b"of any length" + body(), 1),
        ({"line skip": "2"}, b"one\ntwo\n" + body(), 1),
        ({"lineskip": "1", "byteskip": "3"}, b"one\n123" + body(), 1),
        ({"encoding": "gzip", "byte skip": "5"}, gzip.compress(b"12345" + body()), 1),
        ({"space units": '"cm" "cm" "cm"'}, body(), 10),
        ({"old min": "-32768", "old max": "32767"}, body(), 1),
    ],
)
def test_nrrd_beyond_itk(changes, data, factor, tmp_path):
    path = write_nrrd(tmp_path, data, **changes)
    assert_is(read_volume(path), ARRAY, np.array(SPACING_MM) * factor, np.array(ORIGIN_MM) * factor)
    if not {"old min", "space units"} & set(changes) and not {"encoding", "byte skip"} <= set(changes):
        assert np.array_equal(nrrd.read(str(path), index_order="F")[0], ARRAY)


@pytest.mark.parametrize(("dtype", "ends"), [("int16", (-33792, 31743)), ("uint16", (-1024, 64511))])
def test_a_nrrd_that_shifts_its_values(dtype, ends, tmp_path):
    """As dcm2niix writes a slope of 1 and an intercept of -1024."""
    stored = np.abs(ARRAY)
    names = {"oldmin": f"{ends[0]:.8f}", "oldmax": f"{ends[1]:.8f}"}
    path = write_nrrd(tmp_path, body(np.dtype(dtype).newbyteorder("<").str, stored), type=dtype, **names)
    volume = read_volume(path)
    assert_is(volume, stored - 1024)
    assert volume.notes == ("its header's `old min` and `old max` were applied (stored -1024)",)
    assert_is(read_volume(path, rescale_slope=1, rescale_intercept=-1024), stored - 1024)  # not twice


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"endian": None}, "names no byte order"),
        ({"endian": "middle"}, "names no byte order"),
        ({"old min": "-1024", "old max": "3071"}, "were quantized"),
        ({"oldmin": "-1024", "oldmax": "3071"}, "were quantized"),
        ({"space units": '"mm" "mm" "cm"'}, "unit of length"),
        ({"space directions": "(0,7,0,0) (0,0,8,0) (0,0,2,5)"}, "geometry is written with decimal commas"),
        ({"space origin": "(-10,5,20,30)"}, "geometry is written with decimal commas"),
        ({"spacings": "0,7 0,8 2,5"}, "geometry is written with decimal commas"),
        ({"space": None, "space dimension": "3"}, "does not name the patient's axes"),
        ({"space": "scanner-xyz"}, "does not name the patient's axes"),
        ({"kinds": "domain domain time"}, r"shape \(5, 6, 7\) and an axis that is not of space"),
        ({"byte skip": "-2"}, "skips -2 bytes"),
        ({"encoding": "hex"}, "its encoding is not known"),
    ],
)
def test_nrrd_refused(changes, reason, tmp_path):
    with pytest.raises(VolumeError, match=reason):
        read_volume(write_nrrd(tmp_path, body(), **changes))


def test_a_nrrd_axis_that_itk_does_not_take_for_one_of_space_is_none(tmp_path):
    """But for time, which ITK reads as space where the axis has a direction."""
    for kind in ("list", "vector", "point", "RGB-color", "3-vector", "covariant-vector", "3D-matrix"):
        for kinds in itertools.permutations((kind, "domain", "domain")):
            path = write_nrrd(tmp_path, body(), kinds=" ".join(kinds))
            with pytest.raises(RuntimeError):
                SimpleITK.ReadImage(str(path))
            with pytest.raises(VolumeError, match="an axis that is not of space"):
                read_volume(path)


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_nifti_types_and_scales(dtype, order, suffix, tmp_path):
    array = (np.abs(ARRAY) if dtype[0] == "u" else ARRAY) // (16 if dtype[1] == "1" else 1)
    for image_class, scale in itertools.product(
        (nibabel.Nifti1Image, nibabel.Nifti2Image), [(1, 0), (1, -1024), (2, -8), (0.5, 3.25), (-1, 0)]
    ):
        header = image_class.header_class(endianness=order)
        header.set_data_dtype(order + dtype)
        image = image_class(array.astype(order + dtype), np.diag([-0.7, -0.8, 2.5, 1]), header)
        image.header.set_slope_inter(*scale)
        path = tmp_path / f"scan.{suffix}"
        image.to_filename(path)
        found, loaded = read_volume(path), nibabel.load(path)
        np.testing.assert_allclose(found.array, loaded.get_fdata(), rtol=1e-6)
        np.testing.assert_allclose(found.affine, loaded.affine)
        assert np.array_equal(read_volume(loaded).array, found.array)


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1000), ("mm", 1), ("micron", 0.001), ("unknown", 1)])
@pytest.mark.parametrize(("qform", "sform"), [(1, 1), (0, 1), (1, 0), (2, 4)])
def test_nifti_units_and_forms(unit, factor, qform, sform, tmp_path):
    affine = np.diag([-0.7 / factor, -0.8 / factor, 2.5 / factor, 1])
    affine[:3, 3] = (np.array(ORIGIN_MM) * (-1, -1, 1)) / factor
    image = nibabel.Nifti1Image(ARRAY, None)
    image.set_qform(affine, qform)
    image.set_sform(affine, sform)
    image.header.set_xyzt_units(unit)
    image.to_filename(tmp_path / "scan.nii")
    volume = read_volume(tmp_path / "scan.nii")
    assert_is(volume)
    assert ("converted to mm" in " ".join(volume.notes)) == (factor != 1)
    if unit != "unknown":
        assert SimpleITK.ReadImage(str(tmp_path / "scan.nii")).GetSpacing() == pytest.approx(SPACING_MM)


@pytest.mark.parametrize("image_class", [nibabel.Nifti1Pair, nibabel.Nifti2Pair])
def test_nifti_pairs(image_class, tmp_path):
    image_class(ARRAY, np.diag([-0.7, -0.8, 2.5, 1])).to_filename(tmp_path / "scan.hdr")
    assert np.array_equal(read_volume(tmp_path / "scan.hdr").array, ARRAY)
    assert np.array_equal(read_volume(tmp_path).array, ARRAY)
    with pytest.raises(VolumeError, match=r"voxels without their header.* \.hdr"):
        read_volume(tmp_path / "scan.img")
    (tmp_path / "scan.img").write_bytes(b"short")
    with pytest.raises(VolumeError, match=r"scan\.img: .*the header promises 420 bytes, the file has 5"):
        read_volume(tmp_path / "scan.hdr")
    (tmp_path / "scan.img").unlink()
    with pytest.raises(VolumeError, match=r"second file \(.img\)"):
        read_volume(tmp_path / "scan.hdr")


UNITY = "1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1"
FOUR = {"NDims": "4", "DimSize": "5 6 7 1", "TransformMatrix": UNITY, "Offset": "-10 20 30 5"}
FOUR |= {"ElementSpacing": "0.7 0.8 2.5 3", "CenterOfRotation": "0 0 0 0"}


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("suffix", ["mha", "mhd", "nrrd", "nhdr", "nii"])
def test_a_fourth_axis_of_length_one(suffix, compressed, tmp_path):
    image = SimpleITK.JoinSeries([SimpleITK.GetImageFromArray(ARRAY.T)])
    image.SetSpacing((*SPACING_MM, 3))
    image.SetOrigin((*ORIGIN_MM, 5))
    if suffix not in ("nrrd", "nhdr"):  # where ITK names no space of four axes
        SimpleITK.WriteImage(image, str(tmp_path / f"scan.{suffix}"), useCompression=compressed)
        assert_is(read_volume(tmp_path / f"scan.{suffix}"))
    assert_is(read_volume(meta(tmp_path, body(), **FOUR)))
    assert_is(read_volume(meta(tmp_path, body(), **FOUR | {"TransformMatrix": None, "CenterOfRotation": None})))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"DimSize": "5 6 7 2"}, r"shape \(5, 6, 7, 2\)"),
        ({"DimSize": "1 5 6 7"}, r"shape \(1, 5, 6, 7\)"),
        ({"TransformMatrix": "1 0 0 0 0 1 0 0 0 0 0 1 0 0 1 0"}, "turns a fourth axis into space"),
        ({"TransformMatrix": "1 0 0 0 1 0 0 0 1"}, "not that of 4 axes"),
        ({"ElementSpacing": "0.7 0.8 2.5"}, "not that of 4 axes"),
        ({"DimSize": "5 6 7" + 200_000 * " 1"}, "not that of 200003 axes"),
    ],
)
def test_a_fourth_axis_that_is_more(changes, reason, tmp_path):
    with pytest.raises(VolumeError, match=reason):
        read_volume(meta(tmp_path, body(), **FOUR | changes))


DIRECTIONS = ["(0.7,0,0)", "(0,0.8,0)", "(0,0,2.5)"]


@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("space", [" ", "  ", ""])
def test_nrrd_axes_without_a_direction(at, space, tmp_path):
    sizes, directions = ["5", "6", "7"], list(DIRECTIONS)
    sizes.insert(at, "1")
    directions.insert(at, "none")
    kinds = ["domain"] * 3
    kinds.insert(at, "list")
    changes = {"dimension": "4", "sizes": " ".join(sizes), "space directions": (space or " ").join(directions)}
    changes["kinds"] = " ".join(kinds)
    if not space:
        changes["space directions"] = changes["space directions"].replace(") (", ")(").replace(",", " , ")
    path = write_nrrd(tmp_path, body(), **changes)
    assert_is(read_volume(path))
    assert not space or np.array_equal(nrrd.read(str(path), index_order="F")[0].squeeze(), ARRAY)
    for other in (
        {"sizes": changes["sizes"].replace("1", "2")},
        {"space directions": " ".join([*DIRECTIONS, "(0,0,1)"])},
    ):
        with pytest.raises(VolumeError):
            read_volume(write_nrrd(tmp_path, body() * 2, **changes | other))


def nifti_file(folder, data: bytes, suffix="nii"):
    """A single file of ARRAY's header and any voxels."""
    image = nibabel.Nifti1Image(ARRAY, np.diag([-0.7, -0.8, 2.5, 1]))
    whole = image.to_bytes()[:352] + data
    path = folder / f"scan.{suffix}"
    path.write_bytes(gzip.compress(whole) if suffix.endswith("gz") else whole)
    return path


def nifti_pair(folder, data: bytes, suffix="img"):
    nibabel.Nifti1Pair(ARRAY, np.diag([-0.7, -0.8, 2.5, 1])).to_filename(folder / "scan.hdr")
    (folder / "scan.img").unlink()
    (folder / f"scan.{suffix}").write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    return folder / "scan.hdr"


def detached(write, data: bytes, folder, name: str, **changes):
    (folder / "scan.raw").write_bytes(data)
    return write(folder, b"", **{name: "scan.raw"}, **changes)


WITH_OTHERS = {
    "nii": nifti_file,
    "nii.gz": lambda folder, data: nifti_file(folder, data, "nii.gz"),
    "nrrd": write_nrrd,
    "nrrd gzip": lambda folder, data: write_nrrd(folder, gzip.compress(data), encoding="gzip"),
    "nrrd bzip2": lambda folder, data: write_nrrd(folder, bz2.compress(data), encoding="bzip2"),
    "nrrd skip": lambda folder, data: detached(write_nrrd, b"12" + data, folder, "data file", **{"byte skip": "2"}),
    "mha": meta,
    "mha zlib": lambda folder, data: meta(folder, zlib.compress(data), CompressedData="True"),
    "mhd skip": lambda folder, data: detached(meta, b"12" + data, folder, "ElementDataFile", HeaderSize="2"),
}
ALONE = {
    "img": nifti_pair,
    "img.gz": lambda folder, data: nifti_pair(folder, data, "img.gz"),
    "nhdr": lambda folder, data: detached(write_nrrd, data, folder, "data file"),
    "nhdr gzip": lambda folder, data: detached(write_nrrd, gzip.compress(data), folder, "data file", encoding="gzip"),
    "mhd": lambda folder, data: detached(meta, data, folder, "ElementDataFile"),
    "mhd zlib": lambda folder, data: detached(
        meta, zlib.compress(data), folder, "ElementDataFile", CompressedData="True"
    ),
}
SLICE_BYTES = 5 * 6 * 2


@pytest.mark.parametrize("case", WITH_OTHERS | ALONE)
@pytest.mark.parametrize("surplus", [0, 1, SLICE_BYTES - 1, SLICE_BYTES, 7 * SLICE_BYTES, 3 * 7 * SLICE_BYTES])
def test_voxels_that_go_on_are_other_voxels(case, surplus, tmp_path):
    path = (WITH_OTHERS | ALONE)[case](tmp_path, body() + bytes(surplus))
    if surplus < (1 if case in ALONE else SLICE_BYTES):
        assert_is(read_volume(path), origin_mm=read_volume(path).affine[:3, 3] * (-1, -1, 1))
    else:
        with pytest.raises(VolumeError, match="more than the 420 bytes of voxels that its header promises"):
            read_volume(path)


@pytest.mark.parametrize("case", WITH_OTHERS | ALONE)
@pytest.mark.parametrize("dtype", ["i1", "<i4", "<f4", "<f8"])
def test_a_type_of_another_width_is_refused(case, dtype, tmp_path):
    with pytest.raises(VolumeError, match=r"bytes of voxels that its header promises|voxels cannot be read"):
        read_volume((WITH_OTHERS | ALONE)[case](tmp_path, body(dtype)))


INTEGERS = {"i1": "MET_CHAR", "u1": "MET_UCHAR", "i2": "MET_SHORT", "u2": "MET_USHORT", "i4": "MET_INT"}


def in_text(folder, words: list[str], dtype: str):
    """The same numbers as a MetaImage and as an NRRD file in text."""
    data = " ".join(words).encode()
    name = {"f4": "MET_FLOAT"}.get(dtype) or INTEGERS[dtype]
    yield meta(folder, data, ElementType=name, BinaryData="False")
    yield write_nrrd(folder, data, type=TYPES[dtype][0], encoding="ascii")


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_numbers_in_text_that_a_type_can_and_cannot_hold(dtype, beyond, tmp_path):
    limits = np.iinfo(dtype)
    for extreme in (int(limits.min) - beyond, int(limits.max) + beyond):
        words = [str(extreme), *["0"] * (ARRAY.size - 2), "100"]
        for path in in_text(tmp_path, words, dtype):
            if beyond <= 0:
                assert read_volume(path).array[0, 0, 0] == extreme
            else:
                with pytest.raises(VolumeError, match="not all numbers of the type in its header"):
                    read_volume(path)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(
    ("word", "as_short", "as_float"),
    [
        ("-1024", -1024, -1024),
        ("-1024.0", -1024, -1024),
        ("1e3", 1000, 1000),
        ("1.5", None, 1.5),
        ("nan", None, None),
        ("inf", None, None),
        ("-inf", None, None),
        ("1e39", None, None),
        ("1e999", None, None),
        ("1." + 40 * "0" + "e3", None, None),
        ("x", None, None),
        ("0x10", None, None),
    ],
)
def test_words_of_a_text(word, as_short, as_float, tmp_path):
    words = [word, *text().decode().split()[1:]]
    for dtype, expected in (("i2", as_short), ("f4", as_float)):
        for path in in_text(tmp_path, words, dtype):
            if expected is None:
                with pytest.raises(VolumeError, match="text encoding"):
                    read_volume(path)
            else:
                assert read_volume(path).array[0, 0, 0] == expected


@pytest.mark.parametrize("image_class", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_where_voxels_of_a_single_file_begin(image_class, tmp_path):
    """Not in the header, nor in the four bytes after it; 0 stands for right behind them."""
    image = image_class(ARRAY, np.diag([-0.7, -0.8, 2.5, 1]))
    raw = image.to_bytes()
    first = len(raw) - ARRAY.nbytes
    for offset in (0, 1, first // 2, first - 4, first - 2, first - 1, first, first + 2, first + 16):
        header = image.header.copy()
        header["vox_offset"] = offset
        path = tmp_path / "scan.nii"
        path.write_bytes(header.binaryblock + bytes(4) + bytes(max(0, offset - first)) + body())
        if offset == 0 or offset >= first:
            assert np.array_equal(read_volume(path).array, ARRAY)
        else:
            with pytest.raises(VolumeError, match=f"header is damaged.*voxels from byte {offset}"):
                read_volume(path)


@pytest.mark.parametrize("slope", [0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("intercept", [0, -1024])
def test_a_slope_that_is_none_is_remarked_on_where_there_is_an_intercept(slope, intercept):
    raw = bytearray(nibabel.Nifti1Image(ARRAY, np.diag([-0.7, -0.8, 2.5, 1])).to_bytes())
    raw[112:120] = np.array([slope, intercept], "<f4").tobytes()
    volume = read_volume(bytes(raw))
    assert np.array_equal(volume.array, ARRAY)
    assert ("its scl_inter of -1024 is not applied" in " ".join(volume.notes)) == (intercept != 0)
