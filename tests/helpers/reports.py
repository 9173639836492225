"""Findings to report on, and programs that judge reports."""

import shutil
import subprocess
from pathlib import Path

import pytest

from medct.configuration_medct import CT_CLIP_LABELS
from medct.reporting.findings import Algorithm, Finding

ALGORITHM = Algorithm("ORG/BASE", "0" * 40, "ORG/SITE-B", "1" * 40)
FINDINGS = [
    Finding(label, index / 20, 0.45 if index % 2 else None, 0.125 if index % 3 == 0 else None)
    for index, label in enumerate(CT_CLIP_LABELS)
]
"""Every other one with an operating point, every third with a probability."""
CLOSE = [Finding("at 0", 2e-8, 3e-8, 1e-8), Finding("at 1", 1 - 2**-24, 1 - 2**-25), Finding("between", 0.1 + 0.2, 0.3)]
"""Near their operating points, as the scores of a sure model are."""


def dciodvfy_errors(path: Path) -> list[str]:
    """What dciodvfy, of David Clunie's dicom3tools, calls an error in a DICOM object."""
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not installed (Debian: dicom3tools)")
    found = subprocess.run(["dciodvfy", "-new", path], capture_output=True, encoding="utf-8", check=False)
    lines = (found.stdout + found.stderr).splitlines()
    assert any(line in ("SCImage", "Comprehensive3DSR") for line in lines), lines
    return [line for line in lines if line.startswith("Error")]
