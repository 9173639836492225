"""What decided a figure: it is recorded, names no patient, and what differs is found."""

import copy
import json
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import medct
from medct.evaluation import provenance as module
from medct.evaluation.provenance import changed_figures, code, list_checksum, provenance, reasons, versions
from medct.evaluation.scoring import ScoredStudies


def studies(order=(0, 1, 2)) -> ScoredStudies:
    labels = np.array([[1, 0], [0, np.nan], [1, 1]])
    scored = ScoredStudies(
        ["JOHN_DOE.nii", "b.nii", "c.nii"], ["doe", "doe", "x"], np.zeros((3, 2)), labels, names=["a", "b"]
    )
    return scored.take(list(order))


def test_a_list_of_studies_is_known_by_its_checksum_alone():
    found = list_checksum(studies())
    assert (found["scans"], found["patients"]) == (3, 2)
    assert found == list_checksum(studies((2, 0, 1)))
    assert "DOE" not in json.dumps(found)
    fewer, other = list_checksum(studies((0, 1))), studies()
    other.labels[1, 1] = 0  # was unknown
    assert fewer["ids_sha256"] != found["ids_sha256"]
    assert list_checksum(other)["ids_sha256"] == found["ids_sha256"]
    assert list_checksum(other)["labels_sha256"] != found["labels_sha256"]


def test_everything_is_recorded(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/opt/my env/bin/medct", "evaluate", "--data", "/scans of mine/site b"])
    two = SimpleNamespace(device=torch.device("cpu"), num_processes=2, mixed_precision="bf16")
    found = provenance({"seed": 3}, {"m": {"fingerprint": "f"}}, {"b": {}}, two, seed=3)
    assert found["command"] == ["medct", "evaluate", "--data", "site b"]
    assert (found["seed"], found["settings"], found["models"]) == (3, {"seed": 3}, {"m": {"fingerprint": "f"}})
    assert found["versions"]["torch"] == torch.__version__
    assert {"python", "transformers", "peft", "numpy"} <= set(found["versions"])
    of_two = {"type": "cpu", "processes": 2, "mixed_precision": "bf16"}
    of_none = {"type": "cpu", "processes": 1, "mixed_precision": "no"}
    assert of_two.items() <= found["machine"].items()
    assert of_none.items() <= provenance(None, {}, {}, seed=3)["machine"].items()
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(found)) == found


def test_the_commit_is_that_of_the_code_and_of_no_repository_around_it(monkeypatch, tmp_path):
    def git(*arguments, folder=tmp_path):
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", "-C", folder, *names, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init")
    (tmp_path / "code.py").write_text("1", encoding="utf-8")
    git("add", ".")
    git("commit", "-m", "one")
    monkeypatch.setattr(module, "_ROOT", tmp_path.resolve())
    assert code() == {"version": medct.__version__, "commit": git("rev-parse", "HEAD"), "modified": False}
    (tmp_path / "code.py").write_text("2", encoding="utf-8")
    assert code()["modified"] is True
    (tmp_path / "env").mkdir()
    monkeypatch.setattr(module, "_ROOT", (tmp_path / "env").resolve())
    assert code()["commit"] != git("rev-parse", "HEAD")
    monkeypatch.setenv("PATH", "")  # no git
    assert code()["modified"] is None
    assert "not-installed" not in versions()


RESULTS = {
    "sources": [
        {
            "source": "b",
            "scans": 10,
            "scores": {"auroc": {"value": 0.8125, "low": 0.7, "high": 0.9}, "f1": {"value": None, "low": None}},
            "subgroups": [{"groups": [{"group": "F", "auroc": None}]}],
        }
    ]
}


def test_digits_that_differ_are_found():
    same, changed = changed_figures(RESULTS, RESULTS)
    assert (same, changed) == (7, [])
    now = copy.deepcopy(RESULTS)
    now["sources"][0]["scores"]["auroc"] = {"value": 0.81253, "low": 0.7, "high": -0.9}
    now["sources"][0]["scores"]["f1"]["value"] = 0.5
    now["sources"][0]["subgroups"][0]["scans"] = np.nextafter(0.3, 1)
    before = copy.deepcopy(RESULTS)
    before["sources"][0]["subgroups"][0]["scans"] = 0.3
    now["sources"][0]["scores"]["new"] = 1  # a later version may report more
    del now["sources"][0]["scans"]
    same, changed = changed_figures(before, now)
    assert same == 3
    place = "source 1: scores: "
    assert [(each["figure"].removeprefix(place), each["digits"]) for each in changed] == [
        ("source 1: scans", 0),
        ("auroc: value", 4),
        ("auroc: high", 0),
        ("f1: value", 0),
        ("source 1: subgroups: 1: scans", 15),
    ]


@pytest.mark.parametrize(
    ("before", "now", "digits"), [(0.8, 0.8 + 1e-15, 14), (0.5, 0.4, 0), (0.123456, 0.123457, 5), (1, 1, 17)]
)
def test_digits_that_agree_are_counted(before, now, digits):
    assert module._equal_digits(before, now) in (digits, digits + 1 if digits == 14 else digits)


def test_what_differs_is_named():
    before = {"versions": {"torch": "2.9", "numpy": "2"}, "machine": {"device": "A"}, "command": ["a"], "seed": 0}
    now = {
        "versions": {"torch": "2.10", "numpy": "2"},
        "machine": {"device": "A", "threads": 2},
        "command": ["b"],
        "seed": 0,
    }
    assert reasons(before, now) == ["versions torch: 2.9, now 2.10", "machine threads: not recorded, now 2"]
    assert reasons(before, before) == []
