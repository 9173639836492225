"""Runs a notebook's code in this process, without Jupyter; as a program, it renews the outputs in the file.

python tests/helpers/notebook.py docs/notebook.ipynb
"""

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(cell: dict[str, Any], names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell; returns its outputs as the file holds them: what it printed, and the value of its last expression."""
    tree = ast.parse("".join(cell["source"]))
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    outputs = []
    if printed.getvalue():
        text = printed.getvalue().splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": text})
    if value is not None:
        data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
        if hasattr(value, "_repr_png_"):
            data = {"image/png": base64.b64encode(value._repr_png_()).decode(), "text/plain": ["<a picture>"]}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    return outputs


def run_all(notebook: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Outputs of every code cell, run in the current folder."""
    names: dict[str, Any] = {}
    return [run(cell, names) for cell in code_cells(notebook)]


if __name__ == "__main__":
    path = Path(sys.argv[1]).absolute()
    notebook = json.loads(path.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for count, (cell, outputs) in enumerate(zip(code_cells(notebook), run_all(notebook), strict=True), start=1):
            cell |= {"outputs": outputs, "execution_count": count}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
