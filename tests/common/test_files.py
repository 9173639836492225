"""Outputs appear whole or not at all."""

import errno
import os
import stat
from pathlib import Path

import pytest

import medct
from medct.common import files
from medct.common.errors import FAILED, _end_of
from medct.common.files import (
    OtherSettingsError,
    Reserve,
    append_line,
    flush_to_disk,
    refuse_other_settings,
    whole_file,
    whole_folder,
    with_version,
)
from medct.training.run_folder import RunFolder


def test_appears_when_complete(tmp_path):
    with whole_folder(tmp_path / "a/out") as folder:
        (folder / "file").write_text("content", encoding="utf-8")
        assert not (tmp_path / "a/out").exists()
    assert (tmp_path / "a/out/file").read_text(encoding="utf-8") == "content"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


def test_an_empty_folder_is_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert (tmp_path / "out/file").exists()


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_as_output_stays_and_what_it_points_to_is_made(tmp_path, is_there):
    """On another disk, as a rule; a folder cannot take the place of a link, which showed once all work was done."""
    if is_there:
        (tmp_path / "disk/out").mkdir(parents=True)
    (tmp_path / "out").symlink_to("disk/out")
    with whole_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert (tmp_path / "out").is_symlink()
    assert [path.name for path in (tmp_path / "disk/out").iterdir()] == ["file"]


@pytest.mark.parametrize("what", ["the current folder", "where a disk is mounted"])
def test_a_folder_that_no_other_can_replace_is_refused_before_any_work(tmp_path, monkeypatch, what):
    if what == "the current folder":
        monkeypatch.chdir(tmp_path)
    else:
        monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path.resolve())
        (tmp_path.parent / "link").symlink_to(tmp_path)
    for path in (Path(), tmp_path) if what == "the current folder" else (tmp_path, tmp_path.parent / "link"):
        with pytest.raises(OSError, match=what), whole_folder(path):
            pytest.fail("must not begin")
        with pytest.raises(OSError, match=what):
            RunFolder(str(path), resume=False)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_behind(tmp_path, error):
    with pytest.raises(error), whole_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
        raise error
    assert not list(tmp_path.iterdir())


def test_existing_output_is_kept(tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="not empty"), whole_folder(taken):
            pytest.fail("must not begin")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    with whole_file(path) as aside:
        aside.write_text("new", encoding="utf-8")
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "new"
    for error in (RuntimeError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), whole_file(path) as aside:
            aside.write_text("half", encoding="utf-8")
            raise error
    with pytest.raises(FileNotFoundError), whole_file(path):
        pass  # nothing written
    assert path.read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [path]


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_that_the_umask_says(tmp_path, monkeypatch, umask):
    """Whoever makes them: safetensors, and others that go by a temporary file, make them for their owner alone."""
    monkeypatch.setattr(files, "_UMASK", umask)
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "out") as folder:
            (folder / "below").mkdir()
            os.close(os.open(folder / "below" / "weights", os.O_CREAT | os.O_WRONLY, 0o600))
        with whole_file(tmp_path / "file") as aside:
            os.close(os.open(aside, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "out" / "below" / "weights") == mode_of(tmp_path / "file") == 0o666 & ~umask
    assert mode_of(tmp_path / "out") == mode_of(tmp_path / "out" / "below") == 0o777 & ~umask


def test_the_umask_is_the_processs_own():
    before = os.umask(0)
    os.umask(before)
    assert before == files._UMASK


@pytest.fixture
def noted(monkeypatch):
    """What was flushed and renamed, in order."""
    noted, fsync, replace = [], os.fsync, Path.replace

    def note_flush(handle):
        noted.append(("flush", str(Path(f"/proc/self/fd/{handle}").readlink())))
        fsync(handle)

    def note_rename(path, target):
        noted.append(("rename", str(path)))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(Path, "replace", note_rename)
    return noted


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks there for names")
def test_content_is_on_the_disk_before_the_name(tmp_path, noted):
    with whole_file(tmp_path / "file") as aside:
        aside.write_text("content", encoding="utf-8")
    assert noted == [("flush", str(aside)), ("rename", str(aside)), ("flush", str(tmp_path))]
    noted.clear()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert noted[:2] == [("flush", str(folder / "file")), ("rename", str(folder))]


@pytest.mark.parametrize("reason", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_what_cannot_be_flushed_is_no_error_and_a_full_disk_is(tmp_path, monkeypatch, reason):
    def fail(handle):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "fsync", fail)
    with whole_file(tmp_path / "file") as aside:
        aside.touch()
    reason = errno.ENOSPC
    with pytest.raises(OSError, match="No space"), whole_file(tmp_path / "other") as aside:
        aside.touch()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_room_is_reserved_with_and_without_the_systems_help(tmp_path, monkeypatch):
    def refuse(handle, offset, length):
        raise OSError(errno.EOPNOTSUPP, "not on this share")

    for change in (lambda: None, lambda: monkeypatch.setattr(os, "posix_fallocate", refuse)):
        change()
        reserve = Reserve(tmp_path / "reserve", 2**20 + 5)
        assert (tmp_path / "reserve").stat().st_size == 2**20 + 5
        assert (tmp_path / "reserve").stat().st_blocks * 512 >= 2**20
        reserve.release()
        assert not list(tmp_path.iterdir())
    monkeypatch.delattr(os, "posix_fallocate")
    Reserve(tmp_path / "reserve", 3)
    assert (tmp_path / "reserve").stat().st_blocks


def test_a_full_disk_refuses_the_reserve(tmp_path, monkeypatch):
    def refuse(handle, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="No space left") as error:
        Reserve(tmp_path / "reserve", 10)
    assert _end_of(error.value) == (FAILED, f"error: {tmp_path}: No space left on device.")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_opened_is_not_flushed(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "open", refuse)
    flush_to_disk(tmp_path)
    with pytest.raises(PermissionError):
        flush_to_disk(tmp_path / "file")


def fill_the_disk(path):
    raise OSError(errno.ENOSPC, "No space left on device")


def open_nothing(path):
    path.joinpath("no", "such").open("w", encoding="utf-8")


@pytest.mark.parametrize("fail", [fill_the_disk, open_nothing])
@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_an_error_names_the_output(tmp_path, whole, fail):
    with pytest.raises(OSError) as caught, whole(tmp_path / "out") as aside:
        fail(aside)
    assert _end_of(caught.value) == (FAILED, f"error: {tmp_path / 'out'}: {caught.value.strerror}.")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_an_output_where_nothing_can_be_written_is_named(tmp_path, whole):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught, whole(tmp_path / "file" / "below" / "out"):
        pytest.fail("must not begin")
    assert str(tmp_path / "file") in _end_of(caught.value)[1] and "partial" not in _end_of(caught.value)[1]


def test_an_error_elsewhere_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, whole_file(tmp_path / "out"):
        (tmp_path / "source").read_bytes()
    assert caught.value.filename == str(tmp_path / "source")


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_two_writers_of_one_output_do_not_meet(tmp_path, whole):
    """Not even two threads, or two machines, whose processes have the same number."""
    with pytest.raises(InterruptedError), whole(tmp_path / "out") as one, whole(tmp_path / "out") as other:
        assert one != other
        raise InterruptedError


@pytest.mark.parametrize(
    ("theirs", "ours", "refused"),
    [
        ("1.2.0", "1.2.0", None),
        ("1.2.0", "1.2.10", None),
        ("1.2.10", "1.2.0", None),
        ("1.2.0", "1.3.0", "started with MedCT 1.2.0, and 1.3.0 may read, .* Resume with that version, or choose "),
        ("1.2.0", "2.2.0", "started with MedCT 1.2.0, "),
        ("1.2.0", "11.2.0", "started with MedCT 1.2.0, "),
        ("1.2.0.dev1", "1.2.0", "started with MedCT 1.2.0.dev1, "),
        (None, "1.2.0", "started with a version of MedCT before 0.2.0, and 1.2.0 "),
    ],
)
def test_an_output_is_added_to_by_releases_that_give_the_same_numbers(theirs, ours, refused, monkeypatch):
    monkeypatch.setattr(medct, "__version__", theirs)
    before = {"rank": 4} if theirs is None else with_version({"rank": 4})
    monkeypatch.setattr(medct, "__version__", ours)
    if refused is None:
        refuse_other_settings(Path("out"), before, with_version({"rank": 4}))
    with pytest.raises(OtherSettingsError, match=refused or "rank 4, not 8"):
        refuse_other_settings(Path("out"), before, with_version({"rank": 8}))


def test_a_full_disk_costs_the_line_that_has_no_room(tmp_path):
    resource = pytest.importorskip("resource")
    path, limits = tmp_path / "lines", resource.getrlimit(resource.RLIMIT_FSIZE)
    append_line(path, "first", "1")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))  # of the next one only the beginning has room
    try:
        with pytest.warns(UserWarning, match="lines: step 2 was not recorded .* the run continues"):
            append_line(path, "second", "step 2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    append_line(path, "third", "3")
    assert path.read_text(encoding="utf-8") == "first\nthird\n"
