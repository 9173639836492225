"""The folder that is a Space: its front matter, its code and what it needs."""

import ast
import re
from pathlib import Path

from huggingface_hub import RepoCard

import medct
from medct.cli.arguments import make_parser

ROOT = Path(medct.__file__).parent
SPACE = ROOT / "space"


def test_the_front_matter_is_that_of_a_gradio_space():
    card = RepoCard.load(SPACE / "README.md").data
    assert card.sdk == "gradio" and (SPACE / card.app_file).is_file() and card.license == "apache-2.0"
    pinned = re.search(r"^gradio==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert str(card.sdk_version) == pinned[1]
    assert len(card.short_description) <= 60
    assert "synthetic" in card.tags and "patient data" in (SPACE / "README.md").read_text(encoding="utf-8")


def test_it_runs_the_command():
    tree = ast.parse((SPACE / "app.py").read_text(encoding="utf-8"))
    (arguments,) = [ast.literal_eval(node) for node in ast.walk(tree) if isinstance(node, ast.List)]
    args = make_parser("").parse_args(arguments)
    assert (args.run, args.host, args.port) == ("app.run_app", "0.0.0.0", 7860)
    assert "medct[app]" in (SPACE / "requirements.txt").read_text(encoding="utf-8")
