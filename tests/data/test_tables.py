"""Which studies of a table a split and a limit take."""

import numpy as np
import pandas as pd
import pytest

from medct.data.tables import TUNE_SHARE, Selection, Sieve, belongs, table_source


def source_of(names, limit=None, scans=None):
    table = pd.DataFrame({"id": names, "patient": names, "report": "", "volume": "x.nii.gz", "one": 1.0})
    if scans is not None:
        table["scan"] = scans
    return table_source(Sieve(table), ["one"], str, Selection("train", limit=limit), "a table")


def ids(source):
    return [source.read(key)["id"] for (key, *_) in source.groups]


def test_a_limit_takes_a_sample_that_depends_on_names_alone():
    names = [f"s{number:04d}" for number in range(1000)]
    chosen = ids(source_of(names, limit=100))
    assert len(chosen) == 100 and chosen == sorted(chosen)
    assert 400 < np.mean([int(name[1:]) for name in chosen]) < 600, "neither the first ones nor the last"
    assert set(ids(source_of(names[::-1], limit=100))) == set(chosen)
    assert set(ids(source_of(names, limit=50))) < set(chosen)
    assert ids(source_of(names, limit=2000)) == names


def test_a_limit_counts_scans_where_one_reconstruction_of_each_is_taken():
    names = [f"s{number:04d}" for number in range(300)]
    source = source_of(names, limit=20, scans=[name[:4] for name in names])
    assert source.num_studies == 20
    assert all(len(group) == 10 for group in source.groups)


def test_a_tenth_of_the_patients_is_held_out_to_tune_on():
    assert Selection("tune").tune_share == TUNE_SHARE == 0.1
    patients = pd.Series([f"p{number}" for number in range(5000)])
    assert belongs(patients, "tune", TUNE_SHARE).mean() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_a_patient_stands_in_one_split_however_many_scans_there_are(share):
    patients = pd.Series([f"p{number % 50}" for number in range(500)])
    train, tune = (belongs(patients, split, share) for split in ("train", "tune"))
    assert (train ^ tune).all()
    assert not set(patients[train]) & set(patients[tune])
    assert bool(tune.sum()) == bool(share)
