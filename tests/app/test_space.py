"""The folder that is a Space: its front matter, its code and what it needs."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import RepoCard

import medct

ROOT = Path(medct.__file__).parent
SPACE = ROOT / "space"
PORT = 7860
PATIENCE_S = 120


def pins(path: Path) -> dict[str, str]:
    """Versions by the names of packages, in lower case."""
    found = re.findall(r"^([\w.-]+)==(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {name.lower(): version for name, version in found}


def test_the_front_matter_is_that_of_a_gradio_space():
    card = RepoCard.load(SPACE / "README.md").data
    assert card.sdk == "gradio" and (SPACE / card.app_file).is_file() and card.license == "apache-2.0"
    assert str(card.sdk_version) == pins(ROOT / "constraints.txt")["gradio"]
    assert len(card.short_description) <= 60
    assert "synthetic" in card.tags and "patient data" in (SPACE / "README.md").read_text(encoding="utf-8")


def test_it_asks_for_what_the_app_needs_as_it_was_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["app"], *extras["dicom"]]
    names = {re.match(r"[\w.-]+", each)[0].lower() for each in needed} - {"medct"}
    tested = pins(ROOT / "constraints.txt")
    assert pins(SPACE / "requirements.txt") == {name: tested[name] for name in names}


def test_a_folder_without_all_of_its_code_has_no_name(tmp_path, monkeypatch):
    """It would be uploaded."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(SPACE, tmp_path / "space")
    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    git.write_text('#!/bin/sh\n[ "$2" = HEAD ] && exec tar -c space\necho torn\n', encoding="utf-8")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{git.parent}{os.pathsep}{os.environ['PATH']}")
    made = subprocess.run(["make", "--silent", "-C", str(tmp_path), "space"], stderr=subprocess.DEVNULL)
    assert made.returncode and (tmp_path / "dist" / "unfinished" / "space" / "app.py").is_file()
    assert not (tmp_path / "dist" / "space").exists()


@pytest.fixture
def built(tmp_path) -> Path:
    """The folder that `make space` makes of a clone."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone of the repository")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], check=True)
    subprocess.run(["make", "--silent", "-C", str(tmp_path / "clone"), "space"], check=True)
    return tmp_path / "clone" / "dist" / "space"


@pytest.mark.slow
def test_the_folder_serves_the_app_by_itself(built):
    pytest.importorskip("gradio")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            pytest.skip(f"port {PORT} is in use")
    assert sorted(path.name for path in built.iterdir()) == ["README.md", "app.py", "medct", "requirements.txt"]
    where = [sys.executable, "-c", "import medct; print(medct.__file__)"]
    assert Path(subprocess.check_output(where, cwd=built, text=True).strip()) == built / "medct" / "__init__.py"
    app = subprocess.Popen([sys.executable, "app.py"], cwd=built)
    try:
        assert "MedCT" in _page(app)
    finally:
        app.terminate()
        app.wait()


def _page(app: subprocess.Popen) -> str:
    """The page, once it is served."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and app.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}") as answer:
                return answer.read().decode()
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the app does not answer")
