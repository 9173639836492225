"""The architecture that the folders show: imports run downwards only, and the command starts at once."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import medct
from medct.cli.arguments import make_parser

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"cli", "common", "data", "evaluation", "inference", "publishing", "training"}
# Which folders each may import, besides itself. "shipped" is what the root holds for the Hub.
MAY_IMPORT = {
    "common": set(),
    "shipped": set(),
    "data": {"common", "shipped"},
    "publishing": {"common", "shipped"},
    "evaluation": {"common", "shipped", "data"},
    "inference": {"common", "shipped", "data"},
    "training": {"common", "shipped", "data", "evaluation", "publishing"},
    "train": {"common", "shipped", "data", "evaluation", "publishing", "training"},
    "cli": {"common", "shipped", "data", "evaluation", "inference", "publishing", "training", "train"},
}
# The paper's experiment is a run with other settings, so it stands above `train.py`.
ABOVE_TRAIN = {"training/reproduce_paper.py"}
# Errors have one base class, which the lowest folder needs to end commands.
EVERYWHERE = {"medct.errors_medct"}


def room_of(module: str) -> str:
    """Folder of `medct.folder.name`; "train", or "shipped"."""
    first = module.split(".")[1]
    return first if first in FOLDERS or first == "train" else "shipped"


def modules() -> list[Path]:
    return [ROOT / "train.py", *(path for folder in sorted(FOLDERS) for path in sorted((ROOT / folder).rglob("*.py")))]


def imported(path: Path) -> set[str]:
    """Names of the package's modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "medct":
            found |= {node.module} if node.module != "medct" else {f"medct.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("medct.")}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path):
    name = path.relative_to(ROOT).as_posix()
    room = "train" if name == "train.py" else "cli" if name in ABOVE_TRAIN else path.relative_to(ROOT).parts[0]
    for module in imported(path) - EVERYWHERE:
        assert room_of(module) in MAY_IMPORT[room] | {room}, f"{name} imports {module}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_names_come_from_the_file_that_defines_them(path):
    """`from medct import ...` would be empty in the command's process, which imports only what it needs."""
    public = set(medct.__all__)
    assert not {module.removeprefix("medct.") for module in imported(path)} & public


def test_no_folder_hides_another_package():
    """`python train.py` puts the root on the import path, ahead of all that is installed."""
    names = [path.name.removesuffix(".py") for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"]
    names = [name for name in names if name.isidentifier() and name not in ("__init__", "build", "tests")]
    code = "import importlib.util, sys\nprint([n for n in sys.argv[1:] if importlib.util.find_spec(n)])"
    found = subprocess.run(
        [sys.executable, "-P", "-c", code, *names], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    assert found.stdout.strip() == "[]"
    assert {"data", "training", "train"} <= set(names)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["predict", "--help"], ["predict"]], ids=" ".join)
def test_the_command_reads_its_arguments_before_it_imports(arguments):
    """What takes seconds to import has not been imported once the arguments are parsed."""
    code = """
import sys
sys.argv = ["medct", *sys.argv[1:]]
from medct.cli import main
try:
    main()
finally:
    slow = {"torch", "transformers", "numpy", "pandas", "datasets"} & set(sys.modules)
    print("IMPORTED", sorted(slow))
"""
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert found.stdout.splitlines()[-1] == "IMPORTED []", found.stderr
    assert found.returncode == (0 if arguments[-1].startswith("--") else 2)


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit):
        make_parser("").parse_args(["--version"])
    assert capsys.readouterr().out == f"medct {medct.__version__}\n"


def test_every_package_is_installed():
    declared = (ROOT / "pyproject.toml").read_text()
    assert all(f'"medct.{folder}"' in declared for folder in FOLDERS)
    unknown = {path.parent.name for path in ROOT.glob("*/__init__.py")} - FOLDERS
    assert not unknown
