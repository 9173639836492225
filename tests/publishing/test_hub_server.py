"""The loopback Hub answers the real client, and fails on demand."""

import os
from pathlib import Path

import pytest
from hub_server import READER, WITHOUT_WAITS
from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

LARGE = os.urandom(300_000)


@pytest.fixture
def api(hub, monkeypatch) -> HfApi:
    hub.connect(monkeypatch)
    return HfApi()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(LARGE)
    (folder / "sub/notes.txt").write_text("a", encoding="utf-8")
    return folder


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_what_is_uploaded_can_be_downloaded(hub, api, folder, tmp_path, repo_type):
    repo = {"repo_id": "org/name", "repo_type": repo_type}
    api.create_repo(**repo)
    api.create_repo(**repo, exist_ok=True)
    first = api.upload_folder(folder_path=folder, **repo)
    (folder / "sub/notes.txt").write_text("b", encoding="utf-8")
    second = api.upload_folder(folder_path=folder, parent_commit=first.oid, **repo)
    assert hub.count("PUT /lfs/") == 1  # what did not change is not sent again
    assert api.upload_folder(folder_path=folder, **repo).oid == second.oid

    api.create_tag(tag="v1", revision=first.oid, **repo)
    for revision, text in (("main", "b"), (second.oid, "b"), ("v1", "a"), (first.oid, "a")):
        path = api.hf_hub_download(filename="sub/notes.txt", revision=revision, cache_dir=tmp_path / "cache", **repo)
        assert Path(path).read_text(encoding="utf-8") == text
    path = api.snapshot_download(cache_dir=tmp_path / "cache", **repo)
    assert Path(path, "model.safetensors").read_bytes() == LARGE

    assert api.repo_info(**repo).sha == second.oid
    assert [commit.commit_id for commit in api.list_repo_commits(**repo)][:2] == [second.oid, first.oid]
    assert api.list_repo_refs(**repo).tags[0].target_commit == first.oid
    (info,) = api.get_paths_info(paths=["model.safetensors"], **repo)
    assert info.lfs.size == len(LARGE)
    hub.tree_page_size = 2
    listed = [entry.path for entry in api.list_repo_tree(recursive=True, **repo)]
    assert listed == [".gitattributes", "model.safetensors", "sub", "sub/notes.txt"]
    assert hub.count("GET .*cursor=2") == 1


def test_errors_are_those_of_the_hub(hub, api, folder, monkeypatch):
    hub.create("model", "org/name")
    hub.create("model", "org/gated", gated=True)
    hub.create("model", "org/private", private=True)
    with pytest.raises(RepositoryNotFoundError):
        api.hf_hub_download("org/other", "a")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download("org/name", "a", revision="v7")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("org/name", "a")
    with pytest.raises(GatedRepoError):
        api.hf_hub_download("org/gated", ".gitattributes", token=False)
    with pytest.raises(RepositoryNotFoundError):
        api.hf_hub_download("org/private", ".gitattributes", token=READER)
    with pytest.raises(HfHubHTTPError, match="403"):
        api.upload_folder(repo_id="org/name", folder_path=folder, token=READER)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        api.model_info("org/name", token="hf_nobody")
    first = hub.repo("model", "org/name").head.sha
    hub.add_file("model", "org/name", "a", b"a")
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.upload_folder(repo_id="org/name", folder_path=folder, parent_commit=first)


def test_files_put_there_directly_are_read_in_ranges(hub, api):
    revision = hub.add_file("dataset", "org/scans", "valid/a/scan.nii.gz", LARGE)
    files = HfFileSystem(endpoint=hub.url, skip_instance_cache=True)
    assert files.find("datasets/org/scans/valid") == ["datasets/org/scans/valid/a/scan.nii.gz"]
    with files.open(f"datasets/org/scans@{revision}/valid/a/scan.nii.gz", block_size=1000) as file:
        file.seek(1234)
        assert file.read(10) == LARGE[1234:1244]
    assert hub.count("GET /datasets/org/scans/resolve/.*scan.nii.gz") == 1


def test_faults_reach_the_client_and_its_retries_overcome_them(hub, tmp_path):
    """In another process, where the client's waits are skipped."""
    hub.add_file("model", "org/name", "model.safetensors", LARGE)
    hub.fail("HEAD .*model", status=503)
    hub.fail("GET .*model", status=429, retry_after=7)
    hub.cut_answer("GET .*model", after_bytes=100_000)
    hub.fail("PUT /lfs/", status=500, times=2)
    hub.cut_upload("PUT /lfs/", after_bytes=100_000)
    code = """
from huggingface_hub import HfApi
api = HfApi()
content = open(api.hf_hub_download("org/name", "model.safetensors"), "rb").read()
api.create_repo("org/copy")
api.upload_file(repo_id="org/copy", path_or_fileobj=content + b"!", path_in_repo="model.safetensors")
"""
    run = hub.run(WITHOUT_WAITS + code, home=tmp_path / "home")
    assert run.returncode == 0, run.stderr
    assert "waits 8" in run.stdout  # Retry-After, and a second
    assert hub.files("org/copy")["model.safetensors"] == LARGE + b"!"
    assert hub.count("GET .*model") == 3
    assert hub.count("PUT /lfs/") == 4
