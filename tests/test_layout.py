"""Rules for all code: imports run downwards only, the command starts at once, and docstrings list arguments."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import medct
from medct.cli.arguments import make_parser

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"app", "cli", "common", "data", "evaluation", "inference", "publishing", "reporting", "training"}
# Which folders each may import, besides itself. "shipped" is what the root holds for the Hub.
MAY_IMPORT = {
    "common": set(),
    "shipped": set(),
    "data": {"common", "shipped"},
    "publishing": {"common", "shipped"},
    "evaluation": {"common", "shipped", "data"},
    "inference": {"common", "shipped", "data"},
    "reporting": {"common", "shipped", "inference"},
    "app": {"common", "shipped", "data", "inference", "reporting"},
    "training": {"common", "shipped", "data", "evaluation", "publishing"},
    "train": {"common", "shipped", "data", "evaluation", "publishing", "training"},
    "cli": {"shipped", "train", *FOLDERS},
}
# The paper's experiment is a run with other settings, so it stands above `train.py`, as the command does.
ABOVE_TRAIN = {"training/reproduce_paper.py", "__main__.py"}
# Public functions that do not list their arguments yet. Only ever shorten this.
TO_BE_LISTED: set[str] = set()
# Errors have one base class, which the lowest folder needs to end commands.
EVERYWHERE = {"medct.errors_medct"}


def room_of(module: str) -> str:
    """Folder of `medct.folder.name`; "train", or "shipped"."""
    first = module.split(".")[1]
    return first if first in FOLDERS or first == "train" else "shipped"


def modules() -> list[Path]:
    return [
        ROOT / "train.py",
        ROOT / "__main__.py",
        *(path for folder in sorted(FOLDERS) for path in sorted((ROOT / folder).rglob("*.py"))),
    ]


def documented() -> list[Path]:
    """Files whose public functions list their arguments: all but the tests."""
    return [*sorted(ROOT.glob("*.py")), *modules()[2:], *sorted((ROOT / "benchmarks").glob("*.py"))]


def imported(path: Path) -> set[str]:
    """Names of the package's modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "medct":
            assert not borrowed(node.module) & {alias.name for alias in node.names}, f"from {node.module}"


@functools.cache
def borrowed(module: str) -> set[str]:
    """Names that a module of the package has from another one."""
    path = ROOT.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    return {
        alias.asname or alias.name
        for node in nodes
        if node.level or node.module.startswith("medct.")
        for alias in node.names
    }


def test_no_folder_hides_another_package():
    """`python train.py` puts the root on the import path, ahead of all that is installed."""
    names = [path.parent.name for path in ROOT.glob("*/__init__.py")]
    names += [path.stem for path in ROOT.glob("*.py") if not path.stem.startswith("__")]
    code = "import importlib.util, sys\nprint([n for n in sys.argv[1:] if importlib.util.find_spec(n)])"
    found = subprocess.run(
        [sys.executable, "-P", "-c", code, *names], capture_output=True, encoding="utf-8", check=True, cwd=ROOT.parent
    )
    assert found.stdout.strip() == "[]"
    assert {"data", "training", "train"} <= set(names)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["predict", "--help"],
        ["predict"],
        ["predict", "nowhere"],
        ["map", "", "--labels", "x", "--output", "y"],
    ],
    ids=" ".join,
)
def test_the_command_reads_its_arguments_before_it_imports(arguments):
    """What takes seconds to import has not been imported once arguments are parsed, and scans known to be there."""
    code = """
import sys
sys.argv = ["medct", *sys.argv[1:]]
from medct.cli import main
try:
    main()
finally:
    slow = {"torch", "transformers", "pandas", "datasets"} & set(sys.modules)
    print("IMPORTED", sorted(slow))
"""
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, encoding="utf-8", check=False)
    assert found.stdout.splitlines()[-1] == "IMPORTED []", found.stderr
    assert found.returncode == (0 if arguments[-1].startswith("--") else 2)


@pytest.mark.parametrize("module", ["medct", "medct.cli"])
def test_the_package_is_the_command(module):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)

    assert run("--version").stdout == f"medct {medct.__version__}\n"
    assert "invalid choice" in run("nothing").stderr


@pytest.mark.parametrize(
    ("given", "is_command"),
    [
        ("python -u -m medct -m x", True),
        ("python -X dev -m medct.cli", True),
        ("python -m medct.training.reproduce_paper -m medct", False),
        ("python -c code", False),
    ],
)
def test_the_command_is_known_whatever_options_python_has(given, is_command, monkeypatch):
    given = given.split()
    option = next(index for index, word in enumerate(given) if word in ("-m", "-c"))
    monkeypatch.setattr(sys, "orig_argv", given)
    monkeypatch.setattr(sys, "argv", [given[option], *given[option + 2 :]])  # while the package is being imported
    assert medct._is_the_command() == is_command


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit):
        make_parser("").parse_args(["--version"])
    assert capsys.readouterr().out == f"medct {medct.__version__}\n"


def test_every_package_is_installed():
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"medct.{folder}"' in declared for folder in FOLDERS)
    unknown = {path.parent.name for path in ROOT.glob("*/__init__.py")} - FOLDERS
    assert not unknown


def test_extras_have_names_that_every_pip_knows():
    """The pip that comes with Python 3.11 finds no extra whose name holds an underscore, and goes on without it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    assert all(re.fullmatch("[a-z]+", name) for name in extras)
    assert {each for listed in re.findall(r"medct\[([^\]]*)\]", text) for each in listed.split(",")} <= set(extras)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names of a function's parameters, without `self`, `cls`, `*args` and `**kwargs`."""
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def rest(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names of `*args` and `**kwargs`, without their stars."""
    return [each.arg for each in (function.args.vararg, function.args.kwarg) if each]


def public_functions(path: Path) -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions of a file and methods of its classes, with their qualified names; nothing with a leading underscore."""
    found = []

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
                continue
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            else:
                found.append((prefix + node.name, node))

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


def listed(docstring: str) -> list[str]:
    """Names in the `Args:` section of a docstring; several may share a line, as in `a, b: ...`."""
    section = re.search(r"^Args:\n((?: .*\n?|\n)*)", docstring, re.MULTILINE)
    entries = re.findall(r"^ {4}((?:\*{0,2}\w+, )*\*{0,2}\w+): ", section[1], re.MULTILINE) if section else []
    return [name.lstrip("*") for entry in entries for name in entry.split(", ")]


def argument_faults(path: Path) -> dict[str, str]:
    """What is wrong with the lists of arguments in a file's docstrings, by function."""
    faults = {}
    for name, function in public_functions(path):
        names, found = parameters(function), listed(ast.get_docstring(function) or "")
        if len(names) > 1 and not found:
            faults[name] = f"line {function.lineno}: no `Args:` section that lists {', '.join(names)}"
        elif found and (missing := [each for each in names if each not in found]):
            faults[name] = f"line {function.lineno}: `Args:` does not list {', '.join(missing)}"
        elif unknown := [each for each in found if each not in [*names, *rest(function)]]:
            faults[name] = f"line {function.lineno}: `Args:` lists {', '.join(unknown)}, which it does not take"
    return faults


@pytest.mark.parametrize("path", documented(), ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_list_the_arguments(path):
    """Every public function of two parameters or more says what its annotations cannot: shapes, units, ranges."""
    name = path.relative_to(ROOT).as_posix()
    faults = {f"{name}:{function}": fault for function, fault in argument_faults(path).items()}
    wrong = "".join(f"\n  {function}: {fault}" for function, fault in faults.items() if function not in TO_BE_LISTED)
    assert not wrong, f"add or correct these Google-style `Args:` sections:{wrong}"


MODULE = """
def none(a, b):
    'Add.'

def some(a, b):
    '''Add.

    Args:
        a: One.
    '''

def other(a, b):
    '''Add.

    Args:
        a, b: Both.
        c: More.
    '''

def one(a):
    'Not.'

def _private(a, b):
    'Add.'

class Public:
    def method(self, a, *args, b, **options):
        'Add.'

    def fine(self, a, *, b, **options):
        '''Add.

        Args:
            a: One,
                of: several lines.
            b: Two.
            **options: More.

        Returns:
            c: Not an argument.
        '''

class _Private:
    def method(self, a, b):
        'Add.'
"""


def test_what_a_list_of_arguments_must_hold(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(MODULE, encoding="utf-8")
    assert argument_faults(path) == {
        "none": "line 2: no `Args:` section that lists a, b",
        "some": "line 5: `Args:` does not list b",
        "other": "line 12: `Args:` lists c, which it does not take",
        "Public.method": "line 27: no `Args:` section that lists a, b",
    }


def test_predicting_imports_nothing_that_it_does_not_use():
    """Tables, plots and PEFT take longer to import than the rest of a prediction; those who need them import them.

    And what is imported is not looked through for garbage when the process ends, which takes as long as half of it.
    """
    code = """
import gc, sys
sys.argv = ["medct"]
from medct.cli import _imported
for name in ("publishing.registration", "common.host", "common.progress", "publishing.loading", "cli.scan_commands"):
    _imported(name)
print({"datasets", "evaluate", "matplotlib", "pandas", "peft", "pyarrow", "scipy.stats", "sklearn"} & set(sys.modules))
print(gc.isenabled(), len(gc.get_objects()) < gc.get_freeze_count() / 10)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert found.stdout.splitlines()[-2:] == ["set()", "True True"]
