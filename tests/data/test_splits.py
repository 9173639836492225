"""All splits of a source together, and what a single one leaves out."""

import pandas as pd
import pytest
from ct_rate_like import ct_rate_files, write_files

from medct import CT_CLIP_LABELS, MedCTConfig
from medct.cli import main
from medct.data import ALL, DataError, PhantomCohort, open_source, open_splits, overview
from medct.data.prepare import prepare
from medct.data.sources import Skipped, joined
from medct.data.tables import SPLITS

CONFIG = MedCTConfig(
    vision_config={"image_size": [16, 24, 20], "patch_size": [4, 4, 4], "target_spacing_mm": [20.0, 15.0, 20.0]}
)
COHORT = PhantomCohort("A", train_patients=5, tune_patients=2, eval_patients=3)


@pytest.fixture
def own(tmp_path):
    """`own(split=[...])`: a folder with a metadata.csv; no volume is ever read here."""

    def make(count: int = 60, **columns):
        names = [f"{index}.nii.gz" for index in range(count)]
        for name in names:
            (tmp_path / name).touch()
        table = pd.DataFrame({"file_name": names, "patient": [f"p{index // 2}" for index in range(count)]})
        table = table.assign(**dict.fromkeys(CT_CLIP_LABELS, 0) | columns)
        table.to_csv(tmp_path / "metadata.csv", index=False)
        return str(tmp_path)

    return make


def ids(source) -> list[str]:
    return [row["id"] for row in source.stream()]


def test_all_are_those_of_every_split_once(own):
    address = own()
    splits = open_splits(address, CONFIG)
    every = open_source(address, ALL, CONFIG)
    assert list(splits) == list(SPLITS)
    assert ids(every) == [study for source in splits.values() for study in ids(source)]
    assert len(set(ids(every))) == every.num_studies == 60
    assert every.description == f"60 studies of train, tune, valid of {address}"
    for split, source in splits.items():
        others = {name: other.num_studies for name, other in splits.items() if name != split}
        assert source.elsewhere == others


def test_a_source_of_one_split_is_whole_with_all(own):
    address = own(6, split="test")
    assert sorted(ids(open_source(address, ALL, CONFIG))) == [f"{index}.nii.gz" for index in range(6)]
    assert open_source(address, "valid", CONFIG).elsewhere == {}
    with pytest.raises(DataError, match="no study of the train split is left"):
        open_source(address, "train", CONFIG)


def test_a_split_whose_files_are_missing_is_not_dropped_without_a_word(own):
    address = own(6, split=["train"] * 4 + ["valid"] * 2, file_name=["0.nii.gz", "1.nii.gz", "2.nii.gz", *"abc"])
    with pytest.warns(UserWarning, match=r"no study of the valid split is left \(no such file\)\. Check its tables"):
        assert open_splits(address, CONFIG, tune_share=0)["train"].num_studies == 3


def test_of_studies_that_are_nowhere_the_reason_is_said(own):
    with pytest.raises(DataError, match=r"is left \(no such file\)\. Check its tables"):
        open_splits(own(6, file_name=[rf"scans\{index}.nii.gz" for index in range(6)]), CONFIG)


def test_a_limit_takes_the_first_of_the_same_order(own):
    address = own()
    ten, five = (ids(open_source(address, ALL, CONFIG, limit=limit)) for limit in (10, 5))
    assert len(ten) == 10 and len(five) == 5 and set(five) < set(ten)


def test_ct_rate_and_shards_made_of_it(tmp_path):
    ct_rate = str(write_files(tmp_path / "ct_rate", ct_rate_files()))
    for reconstructions in ("one", "all"):
        splits = open_splits(ct_rate, CONFIG, reconstructions=reconstructions)
        every = open_source(ct_rate, ALL, CONFIG, reconstructions=reconstructions)
        assert ids(every) == [study for source in splits.values() for study in ids(source)]
        assert len(every.skipped) == sum(len(source.skipped) for source in splits.values())
        # An epoch takes another of two reconstructions, as it does in one split.
        assert len({every.read(key)["id"] for key in every.keys(1, 7)}) == every.num_studies
    sources = {split: open_source("phantoms", split, CONFIG, phantoms=COHORT) for split in ("train", "valid")}
    prepare(sources, CONFIG, tmp_path / "shards", {"reconstructions": "one", "studies_per_shard": 3})
    every = open_source(str(tmp_path / "shards"), ALL, CONFIG)
    assert sorted(ids(every)) == sorted(ids(sources["train"]) + ids(sources["valid"]))
    assert open_source(str(tmp_path / "shards"), "valid", CONFIG).elsewhere == {"train": 5}


def test_phantoms_of_all_splits():
    every = open_source("phantoms", ALL, CONFIG, phantoms=COHORT)
    assert every.is_synthetic and every.num_studies == 10
    assert len(set(ids(every))) == 10


def test_nothing_is_said_once():
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_source("nowhere", ALL, CONFIG)


def test_an_overview_shows_every_split(own, capsys):
    address = own(60, **{"Lung nodule": [1] * 40 + [0] * 20})
    assert main(["overview", address, "--samples", "0"]) == 0
    said = capsys.readouterr().out
    splits = open_splits(address, CONFIG)
    assert "60 studies, 30 patients" in said
    lines = [line.split() for line in said.splitlines()]
    assert ["with", "the", "finding", *SPLITS] in lines
    assert ["studies", *(str(source.num_studies) for source in splits.values())] in lines
    nodules = [
        sum(row["labels"][CT_CLIP_LABELS.index("Lung nodule")] for row in each.stream()) for each in splits.values()
    ]
    assert ["Lung", "nodule", *(f"{count:.0f}" for count in nodules)] in lines
    assert sum(nodules) == 40
    main(["overview", address, "--samples", "0", "--split", "valid"])
    said = capsys.readouterr().out
    assert f"{splits['valid'].num_studies} studies" in said and "with the finding" not in said


def test_the_counts_of_joined_splits_are_those_of_each(own):
    splits = open_splits(own(), CONFIG)
    counts = {split: source.num_studies for split, source in splits.items()}
    summary = overview.summarize(joined(list(splits.values()), "all"), splits=counts)
    for split, source in splits.items():
        alone = overview.summarize(source)
        assert summary["splits"][split] == {name: alone[name] for name in ("num_studies", "num_patients", "labels")}


def test_a_seed_chooses_the_samples(tmp_path, monkeypatch):
    """Which studies are drawn follows the seed, and only it."""
    drawn = []
    monkeypatch.setattr(overview, "_draw_study", lambda panel, row, *_: drawn.append(row["id"]))
    monkeypatch.setattr(overview.LoadRow, "load_row", lambda _, row, place: Skipped(row["id"], "not read here"))
    monkeypatch.setattr(overview.Figure, "savefig", lambda _, path, **options: path.touch())
    for seed in (1, 1, 2):
        source = open_source("phantoms", ALL, CONFIG, phantoms=COHORT)
        overview.contact_sheet(source, CONFIG, tmp_path / "sheet.png", samples=3, seed=seed)
    assert drawn[:3] == drawn[3:6] != drawn[6:]
    del drawn[:]
    for seed in ("1", "2"):
        arguments = ["overview", "phantoms", "--limit", "6", "--split", "valid", "--samples", "3", "--seed", seed]
        main([*arguments, "--sheet", str(tmp_path / "sheet.png")])
    assert drawn[:3] != drawn[3:]
