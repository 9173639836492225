"""Paths of a machine in what is handed out."""

import json
import os
from pathlib import Path

import pytest

from medct.common.paths import find_paths, local_paths, without_paths


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("of /data/ward 3/x, and/or https://hf.co/a/b, org/name, 1/2, /", ["/data/ward"]),
        (r"in C:\Users\me", [r"C:\Users\me"]),
        (r"on \\ward3\scans\site-b now", [r"\\ward3\scans\site-b"]),
        ("from file:///home/me/scans", ["file:///home/me/scans"]),
        ("hf://datasets/org/name and a/b", []),
        ("</div> of /proc/self/status", []),
    ],
)
def test_unknown_paths_are_known_by_their_form(text, found):
    assert find_paths(text) == found


def test_paths_are_reduced_to_their_last_part():
    assert without_paths({"a": ["scans of /mnt/x/site-b."], "b": 1}) == {"a": ["scans of site-b."], "b": 1}
    assert without_paths({"/mnt/x/site-b": (r"\\w\s\b", "file:///home/me/scans")}) == {"site-b": ["b", "scans"]}


@pytest.mark.parametrize(
    "path",
    ["/Jane Doe (ward 3)/site b", "/data", "/数据/站点 b", "../jane/site b", r"D:\Jane Doe\site b", "/a/b,c/site#1"],
)
def test_known_paths_are_found_whatever_they_are_made_of(path, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda _: True)
    known = local_paths({"data": path, "model": "hf://datasets/org/name", "rank": 4, "revision": None})
    text = json.dumps({"said": f"12 studies of {path}, and {path}/scan.nii.gz; '{path}'"}, ensure_ascii=False)
    last = path.replace("\\", "/").split("/")[-1]
    said = without_paths(json.loads(text), known)["said"]
    assert said == f"12 studies of {last}, and scan.nii.gz; '{last}'"
    assert find_paths(said, known) == []


def test_words_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_paths({"data": "phantoms:A", "model": "org/name", "adaptation": "lora", "long": "x" * 5000}) == []
    (tmp_path / "org/name").mkdir(parents=True)
    assert {"org/name", str(tmp_path / "org/name"), str(tmp_path)} <= set(local_paths({"model": "org/name"}))


def test_what_lies_beside_a_known_path_is_known(tmp_path):
    known = local_paths({"data": "/mnt/Jane Doe (ward 3)/site b"})
    assert without_paths("read /mnt/Jane Doe (ward 3)/list.csv in /mnt", known) == "read list.csv in /mnt"


def test_the_home_folder_is_known(monkeypatch):
    monkeypatch.setenv("HOME", "/Users/Jane Doe")
    assert without_paths("read /Users/Jane Doe/scans/a.nii.gz") == "read a.nii.gz"


@pytest.mark.skipif(os.name == "nt", reason="users of Windows have names")
def test_a_user_without_a_name_and_a_home_has_paths_all_the_same(monkeypatch):
    """In a container, where the end of hours of work must not fail for it."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 3)
    assert without_paths("read /mnt/ward 3/a.nii.gz in ~", ["/mnt/ward 3"]) == "read a.nii.gz in ~"
