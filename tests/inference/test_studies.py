"""From folders to studies, and studies that are read ahead."""

import contextlib
import errno
import faulthandler
import gzip
import multiprocessing
import os
import re
import shutil
import signal
import socket
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePath

import nibabel
import numpy as np
import pytest
import torch
from pydicom.uid import MediaStorageDirectoryStorage
from scan_files import SECRET, make_hu, new_slice, write_series

from medct import MedCTImageProcessor, read_volume
from medct.inference import studies
from medct.inference.studies import (
    FailedStudy,
    LoadStudy,
    ReadStudy,
    Study,
    batched_reads,
    find_studies,
    read_ahead,
    read_study,
    stacked,
)


@pytest.fixture
def load() -> LoadStudy:
    return LoadStudy(MedCTImageProcessor(image_size=(4, 6, 6), target_spacing_mm=(4.0, 2.0, 2.0)))


def write_nifti(path, seed: int = 0):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(-1000, 1000, (6, 7, 5)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([2.0, 2, 4, 1])), path)
    return path


@pytest.fixture
def hospital(tmp_path):
    """Six studies among other files."""
    folder = tmp_path / "hospital"
    write_nifti(folder / "b.nii.gz")
    write_nifti(folder / "a/scan.nii")
    series = write_series(folder / "a/series", make_hu((3, 8, 8)))
    write_series(folder / "mixed/1", make_hu((3, 8, 8)))
    shutil.make_archive(str(folder / "zipped"), "zip", series)
    write_series(folder / "mixed", make_hu((3, 8, 8)))
    for name in ("README.md", "a/series/notes.txt", ".hidden.nii.gz", "._b.nii.gz", "a/.git/x.nii.gz"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no scan", encoding="utf-8")
    (folder / "a/loop").symlink_to(folder)
    return folder


def test_every_file_and_every_dicom_folder_is_a_study(hospital, load):
    found = find_studies([hospital])
    names = [study.id.removeprefix(f"{hospital}/") for study in found]
    assert names == ["a/scan.nii", "a/series", "b.nii.gz", "mixed", "mixed/1", "zipped.zip"]
    for study in found:
        assert isinstance(read_study(study, load.image_processor), ReadStudy), study


def test_each_study_once_in_the_order_given(hospital):
    found = [
        study.id for study in find_studies([hospital / "mixed", hospital / "b.nii.gz", hospital / "a/..", hospital])
    ]
    assert found[:3] == [str(hospital / name) for name in ("mixed", "mixed/1", "b.nii.gz")]
    assert len(found) == 6


def test_files_given_by_name_are_taken_whatever_their_suffix(hospital):
    path = write_nifti(hospital / "c.nii").rename(hospital / "c.scan")
    assert [study.id for study in find_studies([path])] == [str(path)]
    assert find_studies(["hf://datasets/org/name/scan.nii.gz"])[0].source == "hf://datasets/org/name/scan.nii.gz"
    (signed,) = find_studies(["https://user:password@host/scan.nii.gz"])
    assert signed == Study("https://host/scan.nii.gz", "https://user:password@host/scan.nii.gz")


def test_missing_paths_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        find_studies([tmp_path / "nothing"])
    with pytest.raises(FileNotFoundError, match="no studies in this folder"):
        find_studies([tmp_path])
    with pytest.raises(FileNotFoundError, match=f"{os.devnull} is a pipe or a device. Save what it holds as a file"):
        find_studies([os.devnull])


def test_a_failure_names_its_study_and_nothing_from_a_header(hospital, load, monkeypatch):
    (hospital / "a/scan.nii").write_bytes(b"nothing")
    failed = read_study(Study("a", str(hospital / "a/scan.nii")), load.image_processor)
    assert isinstance(failed, FailedStudy)
    assert "it is not a NIfTI" in failed.reason
    for path in list((hospital / "mixed").glob("*.dcm"))[:2]:
        path.unlink()
    mixed = find_studies([hospital / "mixed"])[0]
    assert read_study(mixed, load.image_processor).reason.startswith(f"{hospital}/mixed: it holds one slice")

    def broken(*_, **__):
        raise RuntimeError(f"{SECRET} in an unknown message")

    monkeypatch.setattr(studies, "read_volume", broken)
    failed = read_study(Study("a", "a"), load.image_processor)
    assert "RuntimeError in test_studies.py" in failed.reason
    assert SECRET not in failed.reason


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_studies_come_in_order_and_alike_however_many_processes_read(tmp_path, load, num_workers):
    paths = [write_nifti(tmp_path / f"{index}.nii.gz", index) for index in range(9)]
    paths[4].write_bytes(b"nothing")
    found = list(read_ahead([Study(str(path), str(path)) for path in paths], load, num_workers))
    assert [read.study.id for read in found] == [str(path) for path in paths]
    assert isinstance(found[4], FailedStudy) and "it is not a NIfTI" in found[4].reason
    for path, read in zip(paths, found, strict=True):
        if path != paths[4]:
            expected = load.image_processor(path, return_tensors="pt")["pixel_values"]
            assert torch.equal(stacked([read]), expected)
    assert stacked([found[0], found[1]]).shape == (2, 1, 4, 6, 6)


@dataclass(frozen=True)
class LoadOrDie(LoadStudy):
    """Ends its process at one of the studies, as a decoder that crashes does, or the system that needs memory."""

    deadly: str = ""
    signal: int = signal.SIGKILL

    def __call__(self, study, place):
        if study.id == self.deadly:
            place.begin(study.id)
            faulthandler.disable()  # or it would look like a crash of the tests
            os.kill(os.getpid(), self.signal)
        return super().__call__(study, place)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_process_that_dies_costs_its_study_and_is_replaced(tmp_path, load, number):
    paths = [str(write_nifti(tmp_path / f"{index}.nii.gz", index)) for index in range(7)]
    load = LoadOrDie(load.image_processor, deadly=paths[3], signal=number)
    found = list(read_ahead([Study(path, path) for path in paths], load, num_workers=2))
    assert [read.study.id for read in found] == paths
    assert [read.study.id for read in found if isinstance(read, FailedStudy)] == [paths[3]]
    said = re.escape(f"{paths[3]}: reading failed (its loader process was killed by {number.name}")
    assert re.match(rf"{said}.*\)\. Try it alone\.$", found[3].reason)
    assert not multiprocessing.active_children()


def test_batches_are_full_and_failures_are_passed_on():
    good = [ReadStudy(Study(str(index), None), None) for index in range(5)]
    bad = FailedStudy(Study("bad", None), "reason")
    found = list(batched_reads([good[0], bad, *good[1:]], 2))
    assert found == [bad, good[:2], good[2:4], good[4:]]


def write_contents(folder, name="DICOMDIR"):
    """The table of contents of a disc."""
    contents = new_slice(make_hu((1, 8, 8))[0], 0)
    contents.SOPClassUID = contents.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    contents.save_as(folder / name, enforce_file_format=True)


def of_series(uid, only):
    def edit(ds, k):
        ds.SeriesInstanceUID = uid
        return k in only

    return edit


@pytest.mark.parametrize("name", ["DICOMDIR", "dicomdir"])
def test_a_disc_with_one_series_over_several_folders(name, tmp_path, load):
    hu = make_hu((9, 8, 8))
    for k in range(3):
        write_series(tmp_path / f"disc/DICOM/S{k}", hu, of_series("1.2.7", range(3 * k, 3 * k + 3)))
    write_contents(tmp_path / "disc", name)
    for given in (tmp_path, tmp_path / "disc", tmp_path / "disc/DICOM"):
        (study,) = find_studies([given])
        assert study.id == str(tmp_path / "disc/DICOM")
        assert np.array_equal(read_volume(study.source).array, hu.T)
        assert isinstance(read_study(study, load.image_processor), ReadStudy)
    assert [study.id for study in find_studies([tmp_path / "disc/DICOM/S1"])] == [str(tmp_path / "disc/DICOM/S1")]


def test_a_disc_with_several_series(tmp_path, load):
    """Of which one has a folder of its own, and two share theirs with none and with each other."""
    hu = make_hu((6, 8, 8))
    disc = tmp_path / "disc"
    disc.mkdir()
    write_contents(disc)
    write_series(disc / "A/1", hu, of_series("1.2.1", range(3)))
    write_series(disc / "B/1", hu, of_series("1.2.1", range(3, 6)))
    write_series(disc / "A/2", hu, of_series("1.2.2", range(3)))
    write_series(disc / "B/2", hu, of_series("1.2.2", range(3, 6)))
    write_series(disc / "C", hu, of_series("1.2.3", range(6)))
    found = find_studies([tmp_path])
    assert sorted(study.id.removeprefix(f"{tmp_path}/") for study in found) == ["disc", "disc/A/2", "disc/C"]
    for study in found:
        assert np.array_equal(read_volume(study.source).array, hu.T)


def test_each_study_of_a_disc_has_a_name_of_its_own(tmp_path):
    """Two series in pieces lie in the root, and a third one in a folder that is a piece itself."""
    hu = make_hu((6, 8, 8))
    write_contents(tmp_path)
    pieces = {"1.2.1": ("A", "B"), "1.2.2": ("C", "D"), "1.2.3": ("C/1", "C/2")}
    for uid, folders in pieces.items():
        for k, folder in enumerate(folders):
            write_series(tmp_path / folder, hu, of_series(uid, range(3 * k, 3 * k + 3)))
    found = find_studies([tmp_path])
    assert [os.path.relpath(study.id, tmp_path) for study in found] == [".", "C", "D"]
    assert all(read_volume(study.source).array.shape == (8, 8, 6) for study in found)


def test_without_a_table_of_contents_each_folder_is_a_study_and_pieces_are_remarked_on(tmp_path, load):
    """By folder and by path alike; copies look the same, and joined they would be no study at all."""
    hu = make_hu((6, 8, 8))
    for k, name in enumerate("abc"):
        write_series(tmp_path / name, hu, of_series("1.2.7", range(2 * k, 2 * k + 2)))
    hu = hu[:1]
    write_series(tmp_path / "other", hu, of_series("1.2.8", range(1)))
    write_series(tmp_path / "none", hu, lambda ds, k: delattr(ds, "SeriesInstanceUID"))
    write_series(tmp_path / "none either", hu, lambda ds, k: delattr(ds, "SeriesInstanceUID"))
    others = {"a": "b (and 1 more)", "b": "a (and 1 more)", "c": "a (and 1 more)"}
    for given in ([tmp_path], sorted(tmp_path.iterdir())):
        found = {study.id.removeprefix(f"{tmp_path}/"): study for study in find_studies(given)}
        assert list(found) == ["a", "b", "c", "none", "none either", "other"]
        for name, study in found.items():
            assert len(study.notes) == (name in others)
            assert all(f"lie in {tmp_path}/{others[name]} too" in note for note in study.notes)
            assert "1.2.7" not in str(study.notes)
    assert found["a"].notes[0] in read_study(found["a"], load.image_processor).notes


def test_of_a_folder_no_more_files_are_asked_for_than_tell_that_it_is_a_study(tmp_path, monkeypatch):
    """Hospitals have millions of slices."""
    write_series(tmp_path / "few", make_hu((3, 8, 8)))
    write_series(tmp_path / "many", make_hu((30, 8, 8)))
    asked, path_stat = [], Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **options: asked.append(path) or path_stat(path, **options))
    assert len(find_studies([tmp_path])) == 2
    counts = Counter(path.parent.name for path in asked)
    assert counts["few"] == counts["many"]


def test_a_thousand_discs_take_as_long_each_as_one(tmp_path, monkeypatch):
    hashed, path_hash = [], PurePath.__hash__
    monkeypatch.setattr(PurePath, "__hash__", lambda path: hashed.append(path) or path_hash(path))
    counts = []
    for number in (10, 40):
        folder = tmp_path / f"{number}"
        for k in range(number):
            disc = folder / f"{k}"
            disc.mkdir(parents=True)
            write_contents(disc)
            write_series(disc / "A", make_hu((2, 8, 8)), of_series(f"1.2.{k}", range(2)))
        hashed.clear()
        assert len(find_studies([folder])) == number
        counts.append(len(hashed))
    assert counts[1] <= 4 * counts[0]


def test_a_table_of_contents_alone_is_no_study(tmp_path):
    write_contents(tmp_path)
    with pytest.raises(FileNotFoundError, match="no studies in this folder"):
        find_studies([tmp_path])


def test_a_header_with_its_voxels_is_a_study(tmp_path, load):
    """But not every file that is called so: ENVI has text, and a picture of high range is no scan."""
    array = np.random.default_rng(0).integers(-1000, 1000, (6, 7, 5)).astype(np.int16)
    for name in ("pair.hdr", "packed.hdr.gz"):
        nibabel.save(nibabel.Nifti1Pair(array, np.diag([2.0, 2, 4, 1])), tmp_path / name)
    (tmp_path / "envi.hdr").write_text("ENVI\nsamples = 3\n")
    (tmp_path / "gone.hdr").symlink_to(tmp_path / "nowhere")
    reads = [read_study(study, load.image_processor) for study in find_studies([tmp_path])]
    assert [Path(read.study.id).name for read in reads] == ["gone.hdr", "packed.hdr.gz", "pair.hdr"]
    assert [type(read) for read in reads] == [FailedStudy, ReadStudy, ReadStudy]


def test_what_stands_in_the_place_of_a_study_is_not_passed_over_in_silence(tmp_path, load, monkeypatch):
    """Files that were not fetched, broken links, DICOM in gzip, and folders that may not be entered."""
    write_nifti(tmp_path / "scan.nii")
    for name in ("empty", "pointers", "links", "links without suffix", "packed", "barred"):
        write_series(tmp_path / name, make_hu((3, 8, 8)))
    for path in (tmp_path / "empty").iterdir():
        path.write_bytes(b"")
    for path in (tmp_path / "pointers").iterdir():
        path.rename(path.with_suffix(".IMA")).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    for name, suffix in (("links", ".dcm"), ("links without suffix", ".1")):
        for path in (tmp_path / name).iterdir():
            path.unlink()
            path.with_suffix(suffix).symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "packed").iterdir():
        packed = gzip.compress(path.read_bytes())
        path.rename(f"{path}.gz").write_bytes(packed)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/README.md").symlink_to(tmp_path / "nowhere")
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name == "barred":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)  # a user who may do everything is never refused
    reads = {Path(study.id).name: read_study(study, load.image_processor) for study in find_studies([tmp_path])}
    assert isinstance(reads.pop("scan.nii"), ReadStudy)
    reasons = {name: read.reason for name, read in reads.items()}
    assert list(reasons) == ["barred", "empty", "links", "links without suffix", "packed", "pointers"]
    said = ("Permission denied", "but empty", "cannot be read", "cannot be read", "in gzip", "a Git LFS pointer")
    for part, reason in zip(said, reasons.values(), strict=True):
        assert part in reason


def test_data_sets_without_a_mark_are_a_study(tmp_path, load):
    folder = write_series(tmp_path / "old", make_hu((3, 8, 8)))
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[132:])
    (study,) = find_studies([tmp_path])
    assert isinstance(read_study(study, load.image_processor), ReadStudy)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_pipes_and_sockets_among_the_files_are_passed_by(tmp_path):
    """Opening one would wait for ever for somebody to write."""
    write_series(tmp_path / "study", make_hu((3, 8, 6)))
    nibabel.save(nibabel.Nifti1Image(make_hu((4, 5, 3)), np.eye(4)), tmp_path / "scan.nii")
    for folder in (tmp_path, tmp_path / "study"):
        os.mkfifo(folder / "pipe")
        os.mkfifo(folder / "pipe.nii.gz")
        (folder / "device").symlink_to("/dev/zero")
    end = socket.socket(socket.AF_UNIX)
    with contextlib.chdir(tmp_path / "study"):  # names of sockets are short
        end.bind("socket")
    found = find_studies([tmp_path])
    end.close()
    assert {Path(study.id).name for study in found} == {"study", "scan.nii"}
    assert read_volume(tmp_path / "study").array.shape == (6, 8, 3)
