"""The whole path of somebody with sixty scans of her own: other language, other labels, two scans a patient, Excel."""

import csv
import json

import nibabel
import numpy as np
import pytest

from medct.cli import main
from medct.data.phantoms import make_phantom
from medct.training.settings import PHANTOM_BASE

PATIENTS = 30
# Her columns, what the phantoms call them, and what the model is asked.
LABELS = {
    "Pleuraerguss": ("erguss", "Pleural effusion", "pleural effusion"),
    "Konsolidierung": ("konsolidierung", "Consolidation", "consolidation"),
    "Großes Herz": ("herz", "Cardiomegaly", "cardiomegaly"),
}
WORDS = {0: "nein", 1: "ja"}


def write_rows(path, rows):
    """As Excel saves it where commas stand in numbers."""
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=";").writerows(rows)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kohorte")
    rows = [["file_name", "patient", "report", *(column for column, *_ in LABELS.values()), "alter"]]
    for number in range(2 * PATIENTS):
        study = make_phantom(number, "B", seed=5)
        name = f"ct/scan{number:02d}.nii.gz"
        (folder / "ct").mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(np.asarray(study["volume"]), study["affine"]), folder / name)
        labels = [WORDS[int(study[finding])] for _, finding, _ in LABELS.values()]
        if number == 7:
            labels[0] = ""
        if number == 8:
            labels[1] = "0,5"
        rows.append([name, f"P{number // 2:02d}", "Thorax; unauffällig.", *labels, "61,5"])
    write_rows(folder / "metadata.csv", rows)
    write_rows(
        folder / "labels.csv",
        [["label", "data", "words"], *([label, column, words] for label, (column, _, words) in LABELS.items())],
    )
    return folder


@pytest.mark.slow
def test_from_overview_to_prediction(cohort, tmp_path, capsys):
    labels = ["--labels", str(cohort / "labels.csv")]
    base = ["--model", str(PHANTOM_BASE)]

    sheet = tmp_path / "sheet.png"
    overview = ["overview", str(cohort), *base, *labels, "--samples", "2", "--sheet", str(sheet), "--json"]
    assert main(overview) == 0
    summary = json.loads(capsys.readouterr().out)
    assert list(summary["labels"]) == list(LABELS)
    assert summary["num_studies"] == 2 * summary["num_patients"] and sheet.is_file()

    shards, run = tmp_path / "shards", tmp_path / "run"
    assert main(["prepare", str(cohort), str(shards), *base, *labels]) == 0
    for data in (cohort, shards):
        train = ["train", *base, *labels, "--data", str(data), "--output_dir", str(run / data.name)]
        options = "--epochs 2 --batch_size 4 --bootstrap_resamples 50 --num_workers 0 --cpu True"
        assert main([*train, *options.split()]) == 0
    capsys.readouterr()
    described = [json.loads((run / each.name / "medct_adapter.json").read_text("utf-8")) for each in (cohort, shards)]
    assert described[0]["label_names"] == described[1]["label_names"] == list(LABELS)
    assert described[0]["prompts"] == {label: words for label, (*_, words) in LABELS.items()}
    results = json.loads((run / cohort.name / "results.json").read_text("utf-8"))
    assert results["label_names"] == list(LABELS)
    assert not any("tokenizer" in remark for remark in results["remarks"])
    assert all(label in (run / cohort.name / "README.md").read_text("utf-8") for label in LABELS)

    adapter = ["--adapter", str(run / cohort.name), "--cpu"]
    scores = tmp_path / "scores.csv"
    scans = [str(cohort / f"ct/scan{number:02d}.nii.gz") for number in range(4)]
    assert main(["predict", *scans, *adapter, "--output", str(scores)]) == 0
    with scores.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and all(0 < float(row[label]) < 1 for row in rows for label in LABELS)

    output = tmp_path / "evaluated.json"
    evaluate = ["evaluate", "--data", str(cohort), *labels, *adapter, "--num_workers", "0", "--output", str(output)]
    assert main(evaluate) == 0
    evaluated = json.loads(output.read_text(encoding="utf-8"))
    assert evaluated["label_names"] == list(LABELS)
    assert list(evaluated["prompts"].values()) == [results["prompts"]]
