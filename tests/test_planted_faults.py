"""The list of planted faults names files and tests that exist."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
LINES = (TESTS / "planted_faults.md").read_text(encoding="utf-8").splitlines()
ROWS = [row.groups() for line in LINES if (row := re.fullmatch(r"\| (\S+) \| .+ \| `(\S+)::(\w+)` \|", line))]


def names_in(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_row_names_a_file_and_a_test():
    assert len(ROWS) == sum(line.startswith("|") for line in LINES) - 2 > 0  # but for the two of the heading
    assert [file for file, _, _ in ROWS if not (TESTS.parent / file).is_file()] == []
    found = {file: names_in(file) for file in {file for _, file, _ in ROWS}}
    assert [f"{file}::{test}" for _, file, test in ROWS if test not in found[file]] == []
