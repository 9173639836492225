"""Messages name flags where Python has arguments, and only flags that the command has."""

import nibabel
import numpy as np
import pytest
from scan_files import make_hu, write_series

from medct.cli import main
from medct.cli.arguments import make_parser
from medct.cli.wording import in_flags
from medct.inference.studies import find_studies


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("Pass `series=` with the number of one, or its UID.", "Pass --series with the number of one, or its UID."),
        ("Pass `resample_irregular=True` to have it", "Pass --resample_irregular to have it"),
        ("Pass both `rescale_slope=` and `rescale_intercept=`", "Pass both --rescale_slope and --rescale_intercept"),
        ("`candidate_labels` is a list; `prompt_templates` too", "--labels is a list; --templates too"),
        ("Pass `spacing_mm=(z, y, x)` or", "Pass `spacing_mm=(z, y, x)` in Python or"),
        ("(`xyzt_units`) of `scans`", "(`xyzt_units`) of `scans`"),
    ],
)
def test_arguments_become_flags(message, said):
    args = make_parser("").parse_args(["predict", "scan.nii.gz"])
    assert in_flags(message, args) == said


def test_a_command_names_only_flags_that_it_has():
    args = make_parser("").parse_args(["prepare", "source", "output"])
    assert in_flags("`series=1`, `tune_share`, `source`", args) == "`series=1` in Python, --tune_share, `source`"
    assert in_flags("`series=1`", None) == "`series=1`"


def of_another_series(dataset, _) -> None:
    dataset.SeriesInstanceUID = "1.2.9"


@pytest.fixture
def folder(tmp_path):
    """Two series in one folder, and a tilted scan."""
    write_series(tmp_path / "scans/two", make_hu((4, 12, 12)))
    write_series(tmp_path / "scans/two", make_hu((4, 12, 12)), of_another_series, prefix="b")
    affine = np.diag([-3.0, -2, 4, 1])
    affine[1, 2] = 1.5
    nibabel.save(nibabel.Nifti1Image(make_hu((9, 12, 5)), affine), tmp_path / "scans/tilted.nii.gz")
    return tmp_path / "scans"


def test_a_remedy_can_be_typed(folder, converted, capfd):
    """In the refusal of one scan, in the lines of many, and in the list of what failed."""
    model = ["--model", str(converted), "--cpu"]
    assert len(find_studies([folder])) == 2
    output = folder.parent / "scores.csv"
    assert main(["predict", str(folder), *model, "--output", str(output)]) == 1
    err = capfd.readouterr().err
    listed = (output.parent / "scores.csv.failed.csv").read_text(encoding="utf-8")
    for text in (err, listed):
        assert "Pass --series with" in text
        assert "Pass --resample_irregular to" in text
        assert "`" not in text
    with pytest.raises(SystemExit):
        main(["map", str(folder / "tilted.nii.gz"), *model, "--labels", "a", "--output", str(folder.parent / "maps")])
    assert "Pass --resample_irregular to" in capfd.readouterr().err
    for name, remedy in (("tilted.nii.gz", ["--resample_irregular"]), ("two", ["--series", "1"])):
        assert main(["predict", str(folder / name), *model, *remedy]) == 0


def test_what_a_classifier_cannot_be_asked_is_said_in_flags(folder, classifier_folder, refused):
    asked = ["predict", folder / "tilted.nii.gz", "--cpu", "--model", classifier_folder]
    assert refused(*asked, "--templates", "{label}|no {label}").endswith("Leave out --templates.")
    assert refused(*asked, "--labels", "Rib fracture").startswith("This classifier was not trained on Rib fracture.")
