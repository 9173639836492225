"""Where bytes come from: reading always ends, and never unpacks more than is plausible."""

import gzip
import io
import os
import tracemalloc
import zipfile

import fsspec
import numpy as np
import pytest
from scan_files import make_hu, write_series

from medct import VolumeError, byte_sources_medct, read_volume
from medct.byte_sources_medct import without_secrets

META_HEADER = """NDims = 3
DimSize = {}
ElementSpacing = 1 1 2
TransformMatrix = 1 0 0 0 1 0 0 0 1
ElementType = MET_SHORT
ElementDataFile = {}
"""


@pytest.fixture
def hu() -> np.ndarray:
    return make_hu()


def test_links_are_followed_but_never_in_a_circle(hu, tmp_path):
    blobs = write_series(tmp_path / "blobs", hu)
    series = tmp_path / "series"
    series.mkdir()
    for file in blobs.iterdir():  # as in the Hub's cache
        (series / file.name).symlink_to(file)
    (series / "again").symlink_to(series)
    (series / "upwards").symlink_to(tmp_path / "series", target_is_directory=True)
    assert np.array_equal(read_volume(series).array, hu.T)
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(VolumeError, match="symbolic links"):
        read_volume(tmp_path / "a")


def test_a_dangling_link_among_slices_is_a_missing_slice(hu, tmp_path):
    folder = write_series(tmp_path / "series", hu)
    (folder / "99.dcm").symlink_to(tmp_path / "nowhere")
    with pytest.raises(VolumeError, match=r"99.dcm: it cannot be read \(No such file"):
        read_volume(folder)


def test_pipes_and_devices_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(VolumeError, match="not a regular file"):
        read_volume(tmp_path / "pipe")
    with pytest.raises(VolumeError, match="not a regular file"):
        read_volume("/dev/zero")
    with pytest.raises(VolumeError, match=r"no CT slices \(it is empty\)"):
        read_volume(tmp_path)  # the pipe is not a file of the folder


def test_folders_without_slices(tmp_path):
    (tmp_path / "deep/deeper").mkdir(parents=True)
    with pytest.raises(VolumeError, match="it is empty"):
        read_volume(tmp_path)
    for name in "ab":
        (tmp_path / "deep" / name).write_text("no scan", encoding="utf-8")
    with pytest.raises(VolumeError, match="2 x not a DICOM file"):
        read_volume(tmp_path)


def test_a_folder_of_one_nifti_is_that_nifti(nifti, hu):
    path = nifti(hu)
    assert np.array_equal(read_volume(path.parent).array, hu)


def test_too_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr(byte_sources_medct, "MAX_FILES", 3)
    for name in "abcd":
        (tmp_path / name).write_text("", encoding="utf-8")
    memory = fsspec.filesystem("memory")
    for name in "abcd":
        memory.pipe(f"/many/{name}", b"")
    for source in (tmp_path, "memory://many", zipped(dict.fromkeys("abcd", b""))):
        with pytest.raises(VolumeError, match="more than 3 files"):
            read_volume(source)


class OneFile:
    """Stands for a file system somewhere else that holds one file, and counts how often it is opened."""

    protocol = "elsewhere"

    def __init__(self, size, content=b""):
        self.size, self.content, self.opened = size, content, 0

    def info(self, path):
        return {"type": "file", "size": self.size}

    def open(self, path, mode):
        self.opened += 1
        return io.BytesIO(self.content)


@pytest.fixture
def elsewhere(monkeypatch):
    """`elsewhere(size, content)`: the file that the only address leads to."""

    def elsewhere(*args):
        file_system = OneFile(*args)
        monkeypatch.setattr(byte_sources_medct.fsspec, "url_to_fs", lambda address: (file_system, "scan"))
        return file_system

    return elsewhere


@pytest.mark.parametrize("says_its_size", [True, False])
def test_a_file_elsewhere_is_fetched_once_however_often_it_is_opened(elsewhere, says_its_size):
    file_system = elsewhere(3 if says_its_size else None, b"abc")
    (source,) = byte_sources_medct.of_address("elsewhere://scan")
    assert [source.open().read() for _ in range(3)] == [b"abc"] * 3
    assert (source.size, file_system.opened) == (3, 1)


def test_a_file_elsewhere_that_is_too_large_is_not_fetched(elsewhere):
    file_system = elsewhere(byte_sources_medct.MAX_BYTES + 1)
    with pytest.raises(VolumeError, match=r"it holds 8589934593 bytes\. Download the scan"):
        read_volume("elsewhere://scan")
    assert file_system.opened == 0


class Broken(io.BytesIO):
    """A file whose connection is lost as it is read."""

    def read(self, *_):
        raise ConnectionResetError


def test_a_connection_that_is_lost(elsewhere, monkeypatch):
    monkeypatch.setattr(elsewhere(3), "open", lambda *_: Broken())
    with pytest.raises(VolumeError, match=r"it cannot be fetched \(ConnectionResetError\)\. Download the scan"):
        read_volume("elsewhere://scan")
    with pytest.raises(VolumeError, match=r"it cannot be read \(ConnectionResetError\)\. Check the file object"):
        read_volume(Broken())


@pytest.mark.parametrize("name", ["v.raw", "data/v.raw", "50% ü.raw", "../v.raw", "%2e%2e/v.raw", "/v.raw"])
def test_voxels_beside_a_header(name, hu, tmp_path):
    """Or below it, and never above it: the same in another file system, and for a list of one file."""
    is_above = name.startswith(("..", "%2e", "/"))
    header = META_HEADER.format(" ".join(map(str, hu.shape)), name).encode()
    files = {"in/h.mhd": header, "v.raw" if is_above else f"in/{name}": hu.astype("<i2").tobytes(order="F")}
    memory = fsspec.filesystem("memory")
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
        memory.pipe(f"{tmp_path}/{path}", content)
    path = tmp_path / "in" / "h.mhd"
    for source in (path, [path], f"file://{path}", f"memory://{path}"):
        if is_above:
            with pytest.raises(VolumeError, match="its voxels lie in other files"):
                read_volume(source)
        else:
            assert np.array_equal(read_volume(source).array, hu)


def test_files_of_a_folder_come_in_the_order_of_their_names(tmp_path):
    """In whichever order the system lists folders: the numbers of series are counted in it."""
    names = [f"{number:02}/{letter}" for number in range(20) for letter in "ab"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [os.path.relpath(source.name, tmp_path) for source in byte_sources_medct.of_path(tmp_path)]
    assert found == names


def test_what_programs_keep_in_hidden_folders_is_no_part_of_a_scan(hu, tmp_path):
    """Snapshots of a file server, deleted slices, and what the links of git-annex lead to."""
    series = write_series(tmp_path / ".top is hidden, too", hu)
    write_series(series / ".snapshot/daily", hu + 1)
    (series / ".git").mkdir()
    for number, path in enumerate(sorted(series.glob("*.dcm"))):
        path.symlink_to(path.rename(series / f".git/{number}"))
    assert np.array_equal(read_volume(series).array, hu.T)


def zipped(members: dict[str, bytes], **options) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, **options) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return archive.getvalue()


def test_zip_archives(hu, tmp_path, nifti):
    files = {f"DATA/{k % 2}/{k // 2}": path.read_bytes() for k, path in enumerate(write_series(tmp_path, hu).iterdir())}
    archive = zipped({**files, "__MACOSX/._0": b"x" * 200, "DATA/": b""})
    assert np.array_equal(read_volume(archive).array, hu.T)
    assert np.array_equal(read_volume(zipped({"scan.nii.gz": nifti(hu).read_bytes()})).array, hu)
    with pytest.raises(VolumeError, match="not a NIfTI, DICOM"):
        read_volume(zipped({"inner.zip": archive}))


def test_zip_bombs_are_refused_before_unpacking(monkeypatch):
    monkeypatch.setattr(byte_sources_medct, "MODEST_BYTES", 2**22)
    bomb = zipped({f"{k}.dcm": bytes(2**22) for k in range(6)}, compresslevel=9)
    tracemalloc.start()
    with pytest.raises(VolumeError, match="would unpack to 25165824 bytes"):
        read_volume(bomb)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda raw: raw[: len(raw) // 2], "zip archive is damaged"),
        (lambda raw: raw.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"), "encrypted"),
        (lambda raw: raw[:60] + b"xxxxxxxx" + raw[68:], "zip member is damaged"),
    ],
)
def test_damaged_archives(damage, reason, hu, tmp_path):
    files = {path.name: path.read_bytes() for path in write_series(tmp_path, hu).iterdir()}
    with pytest.raises(VolumeError, match=reason):
        read_volume(damage(zipped(files)))


def test_gzip_bombs_are_refused_before_unpacking(nifti):
    raw = bytearray(nifti(np.zeros((4, 4, 4), np.int16), name="small.nii").read_bytes())
    raw[40:56] = np.array([3, 1024, 1024, 256, 1, 1, 1, 1], "<i2").tobytes()
    bomb = gzip.compress(raw) + 32 * gzip.compress(bytes(2**24))
    tracemalloc.start()
    with pytest.raises(VolumeError, match="voxels cannot be read"):
        read_volume(bomb)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    endless = gzip.compress(nifti(np.zeros((4, 4, 4), np.int16), name="small.nii").read_bytes())
    endless += 8 * gzip.compress(bytes(2**24))
    with pytest.raises(VolumeError, match="more than the 128 bytes of voxels"):
        read_volume(endless)


def test_addresses(hu, tmp_path, nifti):
    memory = fsspec.filesystem("memory")
    memory.pipe("/scans/scan.nii.gz", nifti(hu).read_bytes())
    for path in write_series(tmp_path / "series", hu).iterdir():
        memory.pipe(f"/scans/series/{path.name}", path.read_bytes())
    assert np.array_equal(read_volume("memory://scans/scan.nii.gz").array, hu)
    assert np.array_equal(read_volume("memory://scans/series").array, hu.T)
    with pytest.raises(VolumeError, match=r"address cannot be opened \(FileNotFoundError\)"):
        read_volume("memory://scans/missing.nii.gz")
    assert np.array_equal(read_volume(f"file://{tmp_path}/series").array, hu.T)
    with pytest.raises(VolumeError, match=r"^/dev/zero: it is not a regular file\. Pass a file or a folder\.$"):
        read_volume("file:///dev/zero")
    with pytest.raises(VolumeError, match="address cannot be opened"):
        read_volume("nosuchprotocol://host/scan.nii.gz")
    with pytest.raises(VolumeError, match="address cannot be opened"):
        read_volume("hf://datasets/nobody/nothing/scan.nii.gz")  # the tests are offline


def test_what_gives_access_to_an_address_is_not_said(hu, nifti):
    secret = "SECRET"
    signed = f"https://{secret}:{secret}@host/a/scan.nii.gz?versionId=7&X-Amz-Signature={secret}&access_token={secret}1"
    said = without_secrets(signed)
    assert secret not in said and said.startswith("https://host/a/scan.nii.gz?versionId=7&X-Amz-Signature=")
    assert without_secrets(signed) == said != without_secrets(signed.replace(f"{secret}1", f"{secret}2"))
    for plain in ("hf://datasets/org/name@main/a.nii.gz", "s3://bucket/a@b/c.nii?versionId=3", "/data/a?token=7.nii"):
        assert without_secrets(plain) == plain
    fsspec.filesystem("memory").pipe("/a.nii.gz?token=SECRET", nifti(hu).read_bytes())
    assert read_volume("memory://a.nii.gz?token=SECRET").source == without_secrets("memory://a.nii.gz?token=SECRET")
    with pytest.raises(VolumeError) as refusal:
        read_volume("memory://missing.nii.gz?token=SECRET")
    assert secret not in f"{refusal.value} {refusal.value.source}"


def test_addresses_without_fsspec(monkeypatch):
    monkeypatch.setattr(byte_sources_medct, "fsspec", None)
    with pytest.raises(VolumeError, match="pip install fsspec"):
        read_volume("https://example.org/scan.nii.gz")


def test_bytes_file_objects_and_columns(hu, nifti):
    path = nifti(hu)
    raw = path.read_bytes()
    for source in (raw, bytearray(raw), memoryview(raw), io.BytesIO(raw)):
        assert np.array_equal(read_volume(source).array, hu)
    for row in ({"bytes": raw, "path": "train/scan.nii.gz"}, {"bytes": None, "path": str(path)}, {"bytes": raw}):
        assert np.array_equal(read_volume(row).array, hu)
    with path.open("rb") as file:
        assert np.array_equal(read_volume(file).array, hu)
    with pytest.raises(VolumeError, match="opened as text"):
        read_volume(io.StringIO("text"))
    with pytest.raises(VolumeError, match=r"scan.nii.gz: .*gzip stream is damaged"):
        read_volume({"bytes": raw[:-100], "path": "train/scan.nii.gz"})


def test_datasets_columns(hu, nifti):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"volume": [str(nifti(hu))]})
    decoded = rows.cast_column("volume", datasets.Nifti())[0]["volume"]
    undecoded = rows.cast_column("volume", datasets.Nifti(decode=False))[0]["volume"]
    for source in (decoded, undecoded):
        assert np.array_equal(read_volume(source).array, hu)


def test_without_the_fast_inflater(hu, nifti, monkeypatch):
    path = nifti(hu)
    fast = read_volume(path)
    monkeypatch.setattr(byte_sources_medct, "fast_gzip", gzip)
    assert np.array_equal(read_volume(path).array, fast.array)
    with pytest.raises(VolumeError, match="gzip stream is damaged"):
        read_volume(path.read_bytes()[:-100])
