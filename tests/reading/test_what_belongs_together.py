"""Folders, archives and discs: which files are one scan, which never were one, and what messages say of the others."""

import gc
import gzip
import json
import shutil
import tarfile
import unicodedata
import warnings
import zipfile

import nibabel
import numpy as np
import pydicom
import pytest
import scan_files
from pydicom.uid import ImplicitVRLittleEndian, MediaStorageDirectoryStorage
from scan_files import SECRET, make_hu, write_series

from medct import VolumeError, VolumeWarning, read_volume
from medct.dicom_frames_medct import _DECODERS

HU = make_hu()
AFFINE = np.diag([-0.7, -0.8, 2.5, 1.0])
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 52428\n"
HTML = b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>"


def nifti_bytes(hu=HU) -> bytes:
    return nibabel.Nifti1Image(np.ascontiguousarray(hu.T), AFFINE).to_bytes()


def meta_header(name: str, encoding="utf-8") -> bytes:
    text = (
        "ObjectType = Image\nNDims = 3\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nElementSpacing = 0.7 0.8 2.5\n"
        f"DimSize = 12 16 6\nElementType = MET_SHORT\nElementDataFile = {name}\n"
    )
    return text.encode(encoding)


def nrrd_header(name: str, encoding="utf-8") -> bytes:
    text = (
        "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 12 16 6\nendian: little\n"
        f"space directions: (0.7,0,0) (0,0.8,0) (0,0,2.5)\nencoding: raw\ndata file: {name}\n\n"
    )
    return text.encode(encoding)


VOXELS = HU.T.tobytes(order="F")
SCANS = {
    "scan.nii": {"scan.nii": nifti_bytes()},
    "scan.nii.gz": {"scan.nii.gz": gzip.compress(nifti_bytes())},
    "scan.mhd": {"scan.mhd": meta_header("scan.raw"), "scan.raw": VOXELS},
    "scan.nhdr": {"scan.nhdr": nrrd_header("scan.raw"), "scan.raw": VOXELS},
}
SIDECARS = {
    "scan.json": json.dumps({"Modality": "CT"}).encode(),
    "README": b"a text",
    "dataset_description.json": b"{}",
    "scan.bval": b"0 0 0\n",
    ".DS_Store": b"\0\0\0\1Bud1",
}


@pytest.mark.parametrize("scan", SCANS)
def test_a_scan_and_what_programs_write_beside_it(scan, tmp_path):
    for parent in ("flat", "a/b"):
        folder = tmp_path / parent
        folder.mkdir(parents=True)
        for name, data in (SCANS[scan] | SIDECARS).items():
            (folder / name).write_bytes(data)
    archive = shutil.make_archive(str(tmp_path / "scan"), "zip", tmp_path / "a")
    for source in (tmp_path / "flat", tmp_path / "a", archive, (tmp_path / "scan.zip").read_bytes()):
        assert np.array_equal(read_volume(source).array, HU.T)


def test_two_scans_are_named(tmp_path):
    for name in ("ct.nii", "mask.nii"):
        (tmp_path / name).write_bytes(nifti_bytes())
    with pytest.raises(VolumeError, match=r"2 scans \(ct\.nii, mask\.nii\)"):
        read_volume(tmp_path)


NAMES = (
    "plain.raw",
    "Brust ü.raw",
    unicodedata.normalize("NFD", "Brüste.raw"),
    "胸部.raw",
    "грудь.raw",
    "50%.raw",
    "scan%20one.raw",
    "a #1.raw",
    "a%03d.raw",
    "LISTE.raw",
    "x = y.raw",
    "a: b.raw",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("header", [meta_header, nrrd_header])
def test_names_of_voxels(name, header, tmp_path):
    (tmp_path / name).write_bytes(VOXELS)
    suffix = "mhd" if header is meta_header else "nhdr"
    for written in (name, f"./{name}", unicodedata.normalize("NFC", name)):
        (tmp_path / f"x.{suffix}").write_bytes(header(written))
        assert np.array_equal(read_volume(tmp_path / f"x.{suffix}").array, HU.T)
    archive = shutil.make_archive(str(tmp_path.parent / f"{tmp_path.name}-zipped"), "zip", tmp_path)
    assert np.array_equal(read_volume(archive).array, HU.T)


@pytest.mark.parametrize(("name", "encoding"), [("Brust ü.raw", "cp1252"), ("胸部.raw", "gb18030")])
def test_names_in_the_encoding_of_another_system(name, encoding, tmp_path):
    (tmp_path / name).write_bytes(VOXELS)
    (tmp_path / "x.mhd").write_bytes(meta_header(name, encoding))
    assert np.array_equal(read_volume(tmp_path / "x.mhd").array, HU.T)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.raw",
        "/etc/passwd",
        "sub/../../secret.raw",
        "sub",
        "link/secret.raw",
        "..\\secret.raw",
        "C:\\scan.raw",
    ],
)
def test_names_never_lead_out_of_the_folder(name, tmp_path):
    (tmp_path / "secret.raw").write_bytes(VOXELS)
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/link").symlink_to(tmp_path)
    (tmp_path / "in/x.mhd").write_bytes(meta_header(name))
    with pytest.raises(VolumeError, match=r"lie in other files|not a regular file|file of its voxels is not beside it"):
        read_volume(tmp_path / "in/x.mhd")


@pytest.mark.parametrize("header", [meta_header, nrrd_header])
@pytest.mark.parametrize("name", ["data/x.raw", "./a/b/x.raw", "data\\x.raw", "Brüste/胸部.raw"])
def test_voxels_in_a_folder_below_their_header(header, name, tmp_path):
    path = tmp_path / "in" / ("x.mhd" if header is meta_header else "x.nhdr")
    voxels = tmp_path / "in" / unicodedata.normalize("NFD", name.replace("\\", "/"))
    voxels.parent.mkdir(parents=True)
    voxels.write_bytes(VOXELS)
    (tmp_path / "in" / "x.raw").write_bytes(bytes(len(VOXELS)))  # of the same name, in another folder
    path.write_bytes(header(name))
    archive = shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path / "in")
    for source in (path, path.parent, archive):
        assert np.array_equal(read_volume(source).array, HU.T)


LIKE_DICOM = [b"\x08\x00\x05\x00\x0c\x00\x00\x00", b"\x08\x00\x05\x00CS\x0a\x00", b"\x02\x00\x00\x00UL\x04\x00"]


@pytest.mark.parametrize("first", LIKE_DICOM)
@pytest.mark.parametrize("kind", ["mhd", "nhdr", "hdr", "below"])
def test_voxels_that_begin_as_dicom_does(first, kind, tmp_path):
    hu = np.frombuffer(first + VOXELS[len(first) :], np.int16).reshape(HU.T.shape, order="F")
    files = {
        "mhd": {"scan.mhd": meta_header("scan.raw"), "scan.raw": hu},
        "nhdr": {"scan.nhdr": nrrd_header("scan.raw"), "scan.raw": hu},
        "hdr": {"scan.hdr": nibabel.Nifti1Pair(hu, AFFINE).header.binaryblock, "scan.img": hu},
        "below": {"scan.mhd": meta_header("scan.raw"), "scan.raw": hu, "scan.json": b"{}"},
    }[kind]
    folder = tmp_path / ("below/it" if kind == "below" else "flat")
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.tobytes(order="F"))
    assert read_volume(folder / next(iter(files))).array.tobytes() == hu.tobytes()
    assert np.array_equal(read_volume(tmp_path).array, hu)
    if kind == "mhd":  # the voxels of no header
        (folder / "scan.raw").rename(folder / "other.raw")
        with pytest.raises(VolumeError):
            read_volume(tmp_path)


def test_slices_without_a_mark_beside_a_scan_of_another_format(tmp_path):
    write_series(tmp_path, HU)
    for path in tmp_path.iterdir():
        dataset = pydicom.dcmread(path)
        pydicom.dcmwrite(path, pydicom.Dataset(dataset), implicit_vr=False, little_endian=True)
        assert path.read_bytes()[128:132] != b"DICM"
    (tmp_path / "mask.nii").write_bytes(nifti_bytes(HU[::-1]))
    assert np.array_equal(read_volume(tmp_path).array, HU.T)


def without_mark(raw: bytes) -> bytes:
    return raw[:128] + bytes(4) + raw[132:]


STANDS_FOR_A_SLICE = {
    "empty": (lambda raw: b"", "empty"),
    "zeros": (lambda raw: bytes(len(raw)), "nothing but zeros"),
    "zeros where it begins": (lambda raw: bytes(800) + raw[800:], "nothing but zeros"),
    "without its mark": (without_mark, "lacks the mark"),
    "another beginning": (lambda raw: b"\x17\xf0\x91" * 80 + raw[240:], "lacks the mark"),
    "pointer": (lambda raw: LFS, "Git LFS pointer"),
    "page": (lambda raw: HTML, "HTML page"),
    "cut": (lambda raw: raw[:400], "damaged"),
}


@pytest.mark.parametrize("suffix", [".dcm", ".IMA", "", ".1"])
@pytest.mark.parametrize("kind", STANDS_FOR_A_SLICE)
def test_what_lies_in_the_place_of_a_slice_is_never_left_out(kind, suffix, tmp_path):
    if kind == "without its mark":
        # The preamble may hold anything, and zeros at both ends are zeros.
        pass
    folder = write_series(tmp_path / "series", HU)
    for path in list(folder.iterdir()):
        path.rename(path.with_suffix(suffix))
    victim = sorted(folder.iterdir())[-1]
    damage, reason = STANDS_FOR_A_SLICE[kind]
    victim.write_bytes(damage(victim.read_bytes()))
    with pytest.raises(VolumeError, match=reason) as refused:
        read_volume(folder)
    assert victim.name in str(refused.value)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("name", ["{}.dcm.gz", "{}.dcm", "slice-{}", "elsewhere/{}.bin"])
@pytest.mark.parametrize("which", [[0], [3], [5], range(6)])
@pytest.mark.parametrize("is_bare", [False, True])
def test_slices_in_gzip_are_never_left_out(which, name, is_bare, tmp_path):
    files = sorted(write_series(tmp_path, HU).iterdir())
    for path in (files[k] for k in which):
        start = 144 + pydicom.dcmread(path).file_meta.FileMetaInformationGroupLength if is_bare else 0
        packed = tmp_path / name.format(path.stem)
        packed.parent.mkdir(exist_ok=True)
        raw = path.read_bytes()[start:]
        path.unlink()
        packed.write_bytes(gzip.compress(raw))
    with pytest.raises(VolumeError, match="it is a DICOM file in gzip, which may be a slice") as refused:
        read_volume(tmp_path)
    assert "Unpack" in refused.value.remedy


@pytest.mark.parametrize(
    "name", ["readme.txt", "report.pdf", "VIEWER.EXE", "autorun.inf", "index.html", "a.jpg", "x.json"]
)
def test_what_never_was_dicom_is_left_out(name, tmp_path):
    heads = {"pdf": b"%PDF-1.4\0\0", "EXE": b"MZ\x90\0\3", "jpg": b"\xff\xd8\xff\xe0\0\x10JFIF", "json": b"{}"}
    folder = write_series(tmp_path / "series", HU)
    (folder / name).write_bytes(heads.get(name.rpartition(".")[2], HTML if name == "index.html" else b"a text\n"))
    with pytest.warns(VolumeWarning, match=r"files left out: 1 \(1 x not a DICOM file\)"):
        assert np.array_equal(read_volume(folder).array, HU.T)


@pytest.mark.parametrize("is_implicit", [True, False])
@pytest.mark.parametrize("which", ["all", "one"])
@pytest.mark.parametrize("meta", ["without meta", "without preamble"])
def test_data_sets_without_the_mark_are_read(is_implicit, which, meta, tmp_path):
    """As they were stored before there were files, and by some programs since."""

    def edit(ds, k):
        if is_implicit:
            ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian

    folder = write_series(tmp_path / "series", HU, edit)
    for path in sorted(folder.iterdir())[: None if which == "all" else 1]:
        length = pydicom.dcmread(path).file_meta.FileMetaInformationGroupLength
        path.write_bytes(path.read_bytes()[132 if meta == "without preamble" else 144 + length :])
    assert np.array_equal(read_volume(folder).array, HU.T)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("scan.nii.gz", LFS, "a Git LFS pointer, which stands for a file that was not downloaded. Fetch"),
        ("scan.dcm", LFS, "a Git LFS pointer"),
        ("scan.nii.gz", HTML, "an HTML page, as servers send for a login or an error"),
        ("scan.mha", b"<html>", "an HTML page"),
        ("scan.nii", b"", "empty"),
        ("scan.nii", bytes(4000), "nothing but zeros"),
        ("scan.nii", b'{"error": "no access"}', "a JSON text"),
        ("scan.nii", b"<?xml version='1.0'?><Error/>", "an XML text"),
        ("scan.nii", b"%PDF-1.7\0\1", "a PDF"),
        ("scan.nii", b"\x89PNG\r\n\x1a\n\0", "a PNG picture"),
        ("scan.nii.gz", gzip.compress(b"no scan at all, but a text", mtime=0), "a text in gzip"),
        ("scan.img", b"\x17\xf0" * 400, r"voxels without their header. Pass the path of the \.hdr"),
        ("scan.img.gz", gzip.compress(b"\x17\xf0" * 400, mtime=0), "voxels without their header"),
        ("scan.npy", b"\x93NUMPY\1\0" + bytes(200), "a NumPy array"),
        ("scan.bin", b"\x17\xf0" * 400, "MetaImage file. Pass a"),
    ],
)
def test_messages_name_what_a_file_is(name, data, reason, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(VolumeError, match=reason) as refused:
        read_volume(tmp_path / name)
    assert "damaged" not in str(refused.value)


def test_archives_in_archives_are_named(tmp_path):
    write_series(tmp_path / "series", HU)
    with tarfile.open(tmp_path / "scan.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "series")
    slice_ = next((tmp_path / "series").iterdir())
    (tmp_path / "slice.dcm.gz").write_bytes(gzip.compress(slice_.read_bytes()))
    for name, reason in (("scan.tar.gz", "a tar archive in gzip"), ("slice.dcm.gz", "a DICOM file in gzip")):
        with pytest.raises(VolumeError, match=f"{reason}. Unpack it"):
            read_volume(tmp_path / name)


def test_analyze_is_refused_for_its_orientation(tmp_path):
    nibabel.AnalyzeImage(np.ascontiguousarray(HU.T), AFFINE).to_filename(tmp_path / "scan.hdr")
    with pytest.raises(VolumeError, match=r"Analyze 7\.5 header, which does not say where right and left are"):
        read_volume(tmp_path / "scan.hdr")
    image = nibabel.load(tmp_path / "scan.hdr")
    with pytest.raises(VolumeError, match="right and left"):
        read_volume(image)
    assert np.array_equal(read_volume(image, affine=AFFINE).array, HU.T)


def patch(path, tag: bytes, value: bytes) -> None:
    """Put raw bytes where an explicit element has its value."""
    raw = path.read_bytes()
    at = raw.index(tag)
    length = int.from_bytes(raw[at + 6 : at + 8], "little")
    path.write_bytes(raw[: at + 6] + len(value).to_bytes(2, "little") + value + raw[at + 8 + length :])


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        (b"\x28\x00\x30\x00DS", b"0,8\\0,7 "),
        (b"\x20\x00\x32\x00DS", b"1,5\\0,7\\3,5 "),
        (b"\x20\x00\x37\x00DS", b"1,0\\0\\0\\0\\1,0\\0 "),
        (b"\x28\x00\x53\x10DS", b"1,0 "),
        (b"\x28\x00\x52\x10DS", b"-1024,0 "),
    ],
)
def test_decimal_commas_are_named(tag, value, tmp_path):
    folder = write_series(tmp_path, HU)
    patch(sorted(folder.iterdir())[2], tag, value)
    with pytest.raises(VolumeError, match="its numbers are written with decimal commas"):
        read_volume(folder)


@pytest.mark.parametrize(
    "value", [b"\x01\x02\x03\x04", b"\x1b\x1b", b"a\0b\x07", b"\xff\xfe", b"NO SUCH SET ", b"\0\0", b"\n\n"]
)
def test_character_sets_do_not_hinder_or_are_named(value, tmp_path):
    """Text is not needed for a scan; only what pydicom cannot get past is refused."""
    folder = write_series(tmp_path, HU, lambda ds, k: setattr(ds, "SpecificCharacterSet", "ISO_IR 100"))
    for path in folder.iterdir():
        patch(path, b"\x08\x00\x05\x00CS", value)
    try:
        assert np.array_equal(read_volume(folder).array, HU.T)
    except VolumeError as error:
        assert "SpecificCharacterSet is no name of one but control characters" in str(error)
        assert b"\0" in value.strip(b"\0")


@pytest.mark.parametrize("last", ["1", "2", "3"])
def test_high_throughput_jpeg_2000_without_a_decoder(last, tmp_path, monkeypatch):
    syntax = f"1.2.840.10008.1.2.4.20{last}"

    def edit(ds, k):
        scan_files.compress(pydicom.uid.JPEG2000Lossless)(ds)
        ds.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)

    folder = write_series(tmp_path, make_hu((3, 40, 36)), edit)
    monkeypatch.setitem(_DECODERS, syntax, ("jpeg 2000", "not_installed"))
    with pytest.raises(VolumeError, match=r"High-Throughput JPEG 2000.*needs a decoder. Install it: pip install"):
        read_volume(folder)


@pytest.mark.parametrize("fails", [False, True])
def test_archives_are_closed(fails, tmp_path):
    folder = write_series(tmp_path / "series", HU[: 1 if fails else None])
    archive = shutil.make_archive(str(tmp_path / "series"), "zip", folder)
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as file:
        file.writestr("a.txt", "a text")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        for source in (archive, tmp_path / "text.zip"):
            try:
                read_volume(source)
            except VolumeError:
                assert fails or source != archive
        gc.collect()


def test_a_table_of_contents_is_no_scan(tmp_path):
    write_series(tmp_path / "A", HU[:3])
    write_series(tmp_path / "B", HU, lambda ds, k: k >= 3)
    contents = scan_files.new_slice(HU[0], 0)
    contents.SOPClassUID = contents.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    contents.save_as(tmp_path / "DICOMDIR", enforce_file_format=True)
    volume = read_volume(tmp_path)
    assert np.array_equal(volume.array, HU.T)
    assert volume.notes == ()
