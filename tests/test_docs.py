"""What README and docs/ show can be run: every block tagged `bash` or `python`, in the order of its page.

Blocks tagged `sh` or `py` need the Hub, GPUs, a network or minutes and are only shown.
"""

import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from adapter_files import RESULTS, save_adapter
from notebook import code_cells, run_all
from scan_files import make_hu, write_series

import medct
from medct import CT_CLIP_LABELS
from medct import train as training
from medct.cli import main
from medct.data.phantoms import make_phantom

ROOT = Path(medct.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_WORDS = {"README.md": 900}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def save_phantom(path: Path, study: dict) -> None:
    nibabel.save(nibabel.Nifti1Image(np.asarray(study["volume"]), study["affine"]), path)


@pytest.fixture(scope="module")
def cast(tmp_path_factory) -> Path:
    """The folders and files that the pages mention."""
    folder = tmp_path_factory.mktemp("cast")
    shutil.copytree(ROOT / "phantom_base", folder / "ct-clip")
    save_adapter(folder / "ct-clip", folder / "runs/site-b", results=RESULTS)
    phantoms = [make_phantom(patient, "B", 0) for patient in range(14)]
    save_phantom(folder / "scan.nii.gz", phantoms[0])
    write_series(folder / "series", make_hu((6, 16, 12)))
    (folder / "studies").mkdir()
    (folder / "my-studies").mkdir()
    rows = []
    for number, study in enumerate(phantoms):
        path = folder / ("studies" if number < 2 else "my-studies") / study["VolumeName"]
        save_phantom(path, study)
        split = "valid" if number < 6 else "tune" if number < 8 else "train"
        labels = {name: study[name] for name in CT_CLIP_LABELS}
        rows.append({"file_name": path.name, "report": study["Findings_EN"], "split": split, **labels})
    pd.DataFrame(rows[:2]).to_csv(folder / "reports.csv", index=False)
    pd.DataFrame(rows[2:]).to_csv(folder / "my-studies/metadata.csv", index=False)
    return folder


def run_command(words: list[str]) -> None:
    """Run a line of a shell block in this process."""
    match words:
        case ["medct", *arguments]:
            try:
                status = main(arguments)
            except SystemExit as stop:
                status = stop.code
            assert status == 0, shlex.join(words)
        case ["accelerate", "launch", "train.py", *arguments]:
            training.main([*arguments, "--cpu", "--num_workers", "0"])
        case _:
            raise AssertionError(f"Nothing here runs {shlex.join(words)}: tag the block `sh`.")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_runs(page, cast, tmp_path, monkeypatch, capsys):
    found = [(language, text) for language, text in blocks(page) if language in ("bash", "python")]
    if not found:
        pytest.skip("only shows what needs the Hub, GPUs or minutes")
    shutil.copytree(cast, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if any("--output_dir runs/site-b" in text for _, text in found):
        shutil.rmtree("runs")
    names: dict = {}
    for language, text in found:
        if language == "python":
            exec(compile(text, page.name, "exec"), names)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                run_command(words)


def test_every_block_says_whether_it_is_run():
    tags = {language for page in PAGES for language, _ in blocks(page)}
    assert tags == {"bash", "python", "sh", "py"}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
    assert len(page.read_text(encoding="utf-8").split()) <= MOST_WORDS.get(page.name, 3000)


BENCHMARK = re.compile(r"`python\s(benchmarks/\w+\.py)([^`]*)`")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_benchmarks_take_the_flags_that_pages_name(page):
    """Those that their `--help` shows: others are for processes that a benchmark starts by itself."""
    for path, words in BENCHMARK.findall(page.read_text(encoding="utf-8")):
        code = (ROOT / path).read_text(encoding="utf-8")
        for flag in re.findall(r"--\w+", words):
            assert re.search(rf'add_argument\((?!.*SUPPRESS)\s*"{flag}"', code), f"{path} {flag}"


def test_the_stable_names_are_those_that_the_package_gives():
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(medct.__all__)
    assert (ROOT / "py.typed").is_file()


def own_functions(name: str) -> Iterator[tuple[str, Callable]]:
    """The public functions of a stable name that are written here."""
    thing = getattr(medct, name)
    parts = [each for each in dir(thing) if not each.startswith("_") or each == "__call__"]
    found = {name: thing} if inspect.isfunction(thing) else {}
    if inspect.isclass(thing):
        found = {f"{name}.{each}": inspect.getattr_static(thing, each) for each in parts}
    for title, each in found.items():
        function = getattr(each, "fget", None) or getattr(each, "__func__", each)
        if inspect.isfunction(function) and function.__module__.startswith("medct."):
            yield title, function


@pytest.mark.parametrize("name", medct.__all__)
def test_stable_names_are_typed_and_described(name):
    assert inspect.getdoc(getattr(medct, name))
    for title, function in own_functions(name):
        signature = inspect.signature(function)
        named = [
            each for each in signature.parameters.values() if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        ]
        untyped = [each.name for each in named if each.annotation is each.empty and each.name not in ("self", "cls")]
        assert (signature.return_annotation is signature.empty, untyped) == (False, []), title
        assert function.__doc__ or title.endswith("_input_embeddings"), title  # transformers' own are described there


def test_the_notebook_runs_and_shows_what_it_gives(tmp_path, monkeypatch):
    """By plain Python; renewed with `tests/helpers/notebook.py`. Numbers may differ from machine to machine."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "docs/notebook.ipynb").read_text(encoding="utf-8"))
    for cell, outputs in zip(code_cells(notebook), run_all(notebook), strict=True):
        shown, given = (re.sub(r"[\d.+-]+", "0", text_of(each)) for each in (cell["outputs"], outputs))
        assert shown == given, "".join(cell["source"])
    assert (ROOT / "docs/notebook.ipynb").stat().st_size < 300_000


def text_of(outputs: list[dict]) -> str:
    return "".join("".join(each.get("text") or each["data"]["text/plain"]) for each in outputs)


def test_readme_names_every_page():
    named = {Path(target).name for target in LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert {page.name for page in PAGES[1:]} <= named


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_make_finds_each_python_that_the_readme_names(version, tmp_path):
    (tmp_path / f"python{version}").symlink_to(sys.executable)
    command = [shutil.which("make"), "-n", "-C", ROOT, f"VENV={tmp_path}/venv", f"{tmp_path}/venv/installed"]
    said = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True).stdout
    assert "With Python 3.11 to 3.13" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"python{re.escape(version)} -m venv", said)
