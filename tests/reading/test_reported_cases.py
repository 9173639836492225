"""The scripts of reported cases: each makes its input and prints what it expects and what it got."""

import re
import sys

import pytest

from medct.inference import studies

NAMES = (
    "disc_of_several_folders",
    "names_and_folders",
    "nifti_qform_noise",
    "overlay_bits_compressed",
    "padding_above_air",
    "rescaletype_us_of_gdcm",
    "rounded_positions",
    "single_slice_files",
    "syntax_named_wrong",
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_expected_is_what_is_got(name, shared, capsys, monkeypatch, tmp_path):
    script = shared / "cases/reading" / f"{name}.py"
    if not script.is_file():
        pytest.skip(f"{script} is not at hand")
    monkeypatch.setitem(sys.modules, "medct.studies", studies)
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    monkeypatch.setattr("logging.disable", lambda level: None)
    exec(compile(script.read_text(encoding="utf-8"), str(script), "exec"), {"__name__": "script"})
    printed = capsys.readouterr().out
    pairs = re.findall(r"expected: (.*)\n   got: +(.*)", printed)
    assert pairs
    for expected, got in pairs:
        if expected.startswith("a refusal"):
            assert got.startswith("REFUSED"), got
        elif expected.startswith("one study of 12 slices"):
            assert got.endswith("scored; it holds 12 slices"), got
            assert printed.count("->") == 1
        else:
            assert ", 0.0% of voxels wrong" in got, (expected, got)
        if step := re.search(r"step ([0-9.]+)", expected):
            assert f"{float(step[1])})" in got
