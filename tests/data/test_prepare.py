"""Prepared shards: written whole, the same however the work is divided, and read back as they went in."""

import dataclasses
import hashlib
import json
import shutil
import warnings
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from ct_rate_like import ct_rate_files, write_files
from datasets import load_dataset
from pyarrow import parquet
from scan_files import write_noise

import medct
from medct import CTVolume, MedCTConfig, MedCTImageProcessor, VolumeError, read_volume
from medct.cli import data_commands, main
from medct.cli.arguments import make_parser
from medct.common.files import VERSION, OtherSettingsError
from medct.common.lock import LockedError, only_run
from medct.configuration_medct import CT_CLIP_LABELS
from medct.data import PhantomCohort, StudyLoader, open_source, phantom_source, prepare
from medct.data.ct_rate import METADATA_COLUMNS
from medct.data.prepared import (
    _ROW,
    MANIFEST,
    PreparedVolume,
    _ReadRow,
    decode_nifti,
    nifti_header,
    prepared_source,
    read_manifest,
    with_revision,
)
from medct.data.sources import DataError, Skipped, Source, read_study
from medct.data.tables import Selection
from medct.workers_medct import Place

SETTINGS = {"reconstructions": "one", "studies_per_shard": 3, "compression": "zstd"}
SPACING_MM = (20.0, 15.0, 20.0)


@pytest.fixture(scope="module")
def config() -> MedCTConfig:
    """The published model on a coarse grid with three different lengths."""
    vision = {"image_size": [16, 24, 20], "patch_size": [4, 4, 4], "target_spacing_mm": SPACING_MM}
    return MedCTConfig(vision_config=vision)


def phantoms(first: int, last: int) -> Source:
    return phantom_source("A", range(first, last), seed=0)


@pytest.fixture(scope="module")
def sources() -> dict[str, Source]:
    return {"train": phantoms(0, 7), "valid": phantoms(7, 9)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, config, sources):
    """Seven and two phantoms in four files."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare.prepare(sources, config, folder, SETTINGS)
    return folder


def contents(folder) -> dict[str, str]:
    """SHA-256 of all files that go to the Hub."""
    files = [folder / "manifest.json", folder / "README.md", *(folder / "data").iterdir()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def opened(row) -> torch.Tensor:
    return row["volume"].load(Place())


def stored(config, row) -> torch.Tensor:
    """A row's volume, rounded as in a shard, HU."""
    processor = MedCTImageProcessor.from_config(config.vision_config)
    return processor.process_volume(read_study(row, processor.orientation)).mul(processor.hu_per_unit)


def test_what_is_read_back_is_within_half_an_hu(folder, config, sources):
    for split, source in sources.items():
        rows = list(prepared_source(folder, Selection(split), config).stream())
        assert [row["id"] for row in rows] == [row["id"] for row in source.stream()]
        for row, original in zip(rows, source.stream(), strict=True):
            assert {name: row[name] for name in ("patient", "report", "labels")} == {
                name: original[name] for name in ("patient", "report", "labels")
            }
            volume = opened(row)
            assert (volume.dtype, tuple(volume.shape)) == (torch.int16, (16, 24, 20))
            difference = volume.double() - stored(config, original).double()
            assert difference.abs().max() <= 0.5 + 1e-3  # the float32 of `pixel_values` has steps of 6e-5 HU


def test_a_real_scan_is_read_back_in_its_place(shared, tmp_path):
    scan = shared / "realdata/07_cip_chest_64/ct-64.nii.gz"
    if not scan.is_file():
        pytest.skip("no real scan at hand")
    config = MedCTConfig(vision_config={"image_size": [80, 120, 100], "target_spacing_mm": [4.0, 3.0, 3.5]})
    row = {"id": "chest", "patient": "p", "report": "", "labels": [float("nan")] * 18, "volume": str(scan)}
    prepare.prepare({"valid": one(row)}, config, tmp_path, SETTINGS)
    (read,) = prepared_source(tmp_path, Selection("valid"), config).stream()
    assert np.isnan(read["labels"]).all()
    hu = opened(read)
    assert (hu.double() - stored(config, row).double()).abs().max() <= 0.5 + 1e-3
    # A voxel lies where the scan has the same value: sampled through the file's affine.
    (bare,) = load_dataset(str(tmp_path), split="valid")
    image, volume = bare["volume"], read_volume(scan)
    geometry = MedCTImageProcessor.from_config(config.vision_config).geometry(volume)
    for position in ((40, 60, 50), (0, 0, 0), (79, 3, 97)):
        np.testing.assert_allclose((image.affine @ [*position[::-1], 1])[:3], geometry.to_mm(position), atol=1e-3)
        assert image.dataobj[position[::-1]] == hu[position]


def one(row: dict) -> Source:
    return Source([(0,)], lambda key: row, MedCTConfig().label_names, "one study")


def test_load_dataset_reads_it_without_this_project(folder, config):
    dataset = load_dataset(str(folder), streaming=True)
    assert set(dataset) == {"train", "valid"}
    rows = list(dataset["train"])
    assert len(rows) == 7
    volume = opened(next(iter(prepared_source(folder, Selection("train"), config).stream())))
    image = rows[0]["volume"]
    assert isinstance(image, nibabel.Nifti1Image)
    assert image.get_data_dtype() == np.int16
    assert np.array_equal(np.asanyarray(image.dataobj).transpose(2, 1, 0), volume)
    # Patient axes of "SLP", and the spacing to which whole voxels were fitted.
    assert nibabel.aff2axcodes(image.affine) == ("P", "L", "S")
    np.testing.assert_allclose(image.header.get_zooms()[::-1], SPACING_MM, rtol=0.1)
    voxels = np.asanyarray(image.dataobj).tobytes(order="F")
    assert rows[0]["sha256"] == hashlib.sha256(voxels).hexdigest()


def test_any_division_gives_the_same_files(folder, tmp_path, config, sources):
    for rank in (2, 0):
        assert prepare.prepare(sources, config, tmp_path, SETTINGS, rank, world_size=3) is None
        assert read_manifest(tmp_path) is None
    assert prepare.prepare(sources, config, tmp_path, SETTINGS, 1, world_size=3) is not None
    assert contents(tmp_path) == contents(folder)


def test_shards_of_another_version_are_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": 1}', encoding="utf-8")
    with pytest.raises(DataError, match=r"these shards are of another version\. Prepare the source again\."):
        read_manifest(str(tmp_path))


def test_a_stopped_run_is_resumed(folder, tmp_path, config, sources, monkeypatch):
    written = []
    write_table = parquet.ParquetWriter.write_table

    def stop_at_the_fifth(self, table, **options):
        written.append(table["id"][0].as_py())
        if len(written) == 5:
            raise KeyboardInterrupt
        write_table(self, table, **options)

    monkeypatch.setattr(parquet.ParquetWriter, "write_table", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(sources, config, tmp_path, SETTINGS)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["train-00000-of-00003.parquet"]
    prepare.prepare(sources, config, tmp_path, SETTINGS)
    assert written[5] == written[3]  # the second file from its start, and the first not again
    assert len(written) == 5 + 6
    assert contents(tmp_path) == contents(folder)
    prepare.prepare(sources, config, tmp_path, SETTINGS)
    assert len(written) == 5 + 6


def test_other_settings_are_refused(folder, config, sources):
    before = contents(folder)
    with pytest.raises(OtherSettingsError, match=r"was started with studies_per_shard 3, not 4. Resume with the same "):
        prepare.prepare(sources, config, folder, {**SETTINGS, "studies_per_shard": 4})
    with pytest.raises(OtherSettingsError, match=r"started with num_studies {'train': 7, 'valid': 2}, not {'train': 7"):
        prepare.prepare({**sources, "valid": phantoms(7, 8)}, config, folder, SETTINGS)
    other = MedCTConfig(vision_config={**config.vision_config.to_dict(), "hu_min": -1200})
    with pytest.raises(OtherSettingsError, match=r"started with hu_min -1000.0, not -1200.0"):
        prepare.prepare(sources, other, folder, SETTINGS)
    assert contents(folder) == before


def test_shards_of_another_version_are_not_added_to(folder, config, sources, monkeypatch):
    monkeypatch.setattr(medct, "__version__", "tomorrow's")
    with pytest.raises(OtherSettingsError, match="was started with MedCT "):
        prepare.prepare(sources, config, folder, SETTINGS)


@pytest.mark.parametrize("compression", prepare.COMPRESSION_LEVELS)
def test_every_compression_gives_the_same_volumes(compression, tmp_path, folder, config, sources):
    prepare.prepare(sources, config, tmp_path, {**SETTINGS, "compression": compression})
    assert read_manifest(str(tmp_path))["settings"]["compression"] == compression
    path = min(tmp_path.glob("data/*.parquet"))
    column = parquet.read_metadata(path).row_group(0).column(parquet.read_schema(path).names.index("volume"))
    assert column.compression.startswith(compression.upper())
    one, another = (open_source(str(each), "train", config) for each in (tmp_path, folder))
    for key in range(one.num_studies):
        assert torch.equal(opened(one.read(key)), opened(another.read(key)))


def test_the_command_offers_every_compression():
    args = make_parser("").parse_args(["prepare", "source", "output"])
    assert args.compression == prepare.DEFAULTS["compression"]
    for compression in prepare.COMPRESSION_LEVELS:
        make_parser("").parse_args(["prepare", "source", "output", "--compression", compression])


def test_a_window_that_int16_cannot_hold_is_refused(tmp_path, sources):
    with pytest.raises(DataError, match="does not fit int16"):
        prepare.prepare(sources, MedCTConfig(vision_config={"hu_max": 40000}), tmp_path / "new", SETTINGS)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("image_size", [16, 24, 24], r"for `image_size` \[16, 24, 20\], but the model has \[16, 24, 24\]"),
        ("target_spacing_mm", [20.0, 15.0, 21.0], "for `target_spacing_mm`"),
        ("orientation", "SAR", "for `orientation` SLP, but the model has SAR"),
        ("hu_max", 900, "for `hu_max` 1000.0, but the model has 900.0"),
    ],
)
def test_shards_of_another_grid_are_refused(folder, config, setting, value, message):
    other = MedCTConfig(vision_config={**config.vision_config.to_dict(), setting: value})
    with pytest.raises(DataError, match=message):
        prepared_source(folder, Selection("train"), other)


def test_shards_of_other_labels_are_refused(folder, config):
    vision = config.vision_config.to_dict()
    names = ["Fracture", *config.label_names[1:]]
    said = r"`label_names` 18 labels, but the model has 18 \(Fracture\)\. .*, or say with --mapping \(or --keep_m"
    with pytest.raises(DataError, match=said):
        prepared_source(folder, Selection("train"), MedCTConfig(vision_config=vision, id2label=dict(enumerate(names))))
    names = config.label_names[::-1]
    with pytest.raises(DataError, match="in another order"):
        prepared_source(folder, Selection("train"), MedCTConfig(vision_config=vision, id2label=dict(enumerate(names))))


@pytest.mark.parametrize(
    "version, said",
    [
        (medct.__version__, None),
        (f"{medct.__version__.rpartition('.')[0]}.99", None),
        ("0.1.7", "prepared with MedCT 0.1.7"),
        (None, "prepared with a version of MedCT before 0.2.0"),
    ],
)
def test_shards_of_a_version_that_may_read_otherwise_are_described_so(folder, tmp_path, config, version, said):
    shutil.copytree(folder, tmp_path / "shards")
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["settings"].pop(VERSION) == medct.__version__
    settings = manifest["settings"] | ({} if version is None else {VERSION: version})
    (tmp_path / "shards" / MANIFEST).write_text(json.dumps(manifest | {"settings": settings}))
    for split in ("train", "all"):
        description = open_source(str(tmp_path / "shards"), split, config).description
        assert (said in description) if said else ("prepared with" not in description)


def test_what_is_not_a_finished_folder_is_refused(folder, tmp_path, config, sources):
    with pytest.raises(DataError, match=r"no manifest.json, so the shards are unfinished"):
        prepared_source(tmp_path, Selection("train"), config)
    with pytest.raises(DataError, match="has the splits train, valid, not tune"):
        prepared_source(folder, Selection("tune"), config)
    copy = tmp_path / "copy"
    prepare.prepare(sources, config, copy, SETTINGS)
    file = copy / "data/train-00001-of-00003.parquet"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train-00001-of-00003.parquet: has .* bytes instead of"):
        prepared_source(copy, Selection("train"), config)
    file.unlink()
    with pytest.raises(DataError, match=r"train-00001-of-00003.parquet: is missing. Copy the folder again, or"):
        prepared_source(copy, Selection("train"), config)
    (copy / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"manifest.json cannot be read"):
        prepared_source(copy, Selection("train"), config)


def test_unreadable_studies_are_skipped_with_the_reason_and_can_be_retried(tmp_path, config, nifti):
    array = np.zeros((8, 9, 10), np.int16)
    array[0] = -1000
    paths = [nifti(array, name=f"{k}.nii.gz") for k in range(5)]
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[: len(whole) // 2])

    def read(key: int) -> dict:
        about = {"about": {"sex": "F"}} if key == 2 else {}
        return {"id": f"s{key}", "patient": "p", "report": "", "labels": [0.0] * 18, "volume": str(paths[key])} | about

    left_out = (Skipped("head", "no chest"),)
    source = Source([(key,) for key in range(5)], read, config.label_names, "5 studies", left_out)
    manifest = prepare.prepare({"train": source}, config, tmp_path / "out", SETTINGS)
    found = manifest["splits"]["train"]
    assert found["num_studies"] == 4
    assert [study["id"] for study in found["skipped"]] == ["head", "s1"]
    assert "gzip" in found["skipped"][1]["reason"]
    assert str(tmp_path) not in json.dumps(manifest)
    opened_again = prepared_source(tmp_path / "out", Selection("train"), config)
    assert [row["id"] for row in opened_again.stream()] == ["s0", "s2", "s3", "s4"]
    assert [row["about"] for row in opened_again.stream()] == [{}, {"sex": "F"}, {}, {}]
    assert [study.id for study in opened_again.skipped] == ["head", "s1"]
    paths[1].write_bytes(whole)
    kept = (tmp_path / "out/data/train-00001-of-00002.parquet").stat().st_mtime_ns
    manifest = prepare.prepare({"train": source}, config, tmp_path / "out", SETTINGS, retry_skipped=True)
    assert [study["id"] for study in manifest["splits"]["train"]["skipped"]] == ["head"]
    assert (tmp_path / "out/data/train-00001-of-00002.parquet").stat().st_mtime_ns == kept


def test_a_source_that_cannot_be_read_stops_the_run(tmp_path, config):
    def read(key: int) -> dict:
        return {"id": f"s{key}", "patient": "p", "report": "", "labels": [0.0] * 18, "volume": f"nowhere/{key}.nii"}

    source = Source([(key,) for key in range(60)], read, config.label_names, "60 studies")
    with pytest.raises(DataError, match=r"6 of 6 studies could not be read, more than the allowed share of 0.05; the"):
        prepare.prepare({"train": source}, config, tmp_path, SETTINGS)


def test_reconstructions_of_a_scan_stay_together(tmp_path, config):
    scans = phantoms(0, 6)
    source = Source([(0, 1), (2,), (3, 4, 5)], scans.read, scans.label_names, "3 scans")
    manifest = prepare.prepare({"train": source}, config, tmp_path / "one", SETTINGS)
    assert manifest["splits"]["train"]["num_studies"] == 3
    prepare.prepare({"train": source}, config, tmp_path / "all", {**SETTINGS, "reconstructions": "all"})
    prepared = prepared_source(tmp_path / "all", Selection("train"), config)
    assert [list(group) for group in prepared.groups] == [[0, 1], [2], [3, 4, 5]]
    assert prepared_source(tmp_path / "all", Selection("train", reconstructions="all"), config).num_studies == 6


COLUMNS = ("id", "patient", "report", "labels.list.element", "sha256", "volume.bytes")


@pytest.mark.parametrize("column", range(6), ids=COLUMNS)
def test_a_flipped_bit_is_one_bad_sample(column, folder, tmp_path, config, processor):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "data/train-00000-of-00003.parquet"
    chunk = parquet.read_metadata(path).row_group(1).column(column)
    assert chunk.path_in_schema == COLUMNS[column]
    damaged = bytearray(path.read_bytes())
    damaged[chunk.data_page_offset + chunk.total_compressed_size - 5] ^= 1
    path.write_bytes(damaged)
    source = prepared_source(tmp_path, Selection("train"), config)
    rows = list(source.stream())
    assert len({row["report"] for row in rows}) == 7
    with pytest.raises(VolumeError, match=r"row 1: it cannot be read .*verify page integrity"):
        opened(rows[1])
    processor.image_processor = MedCTImageProcessor.from_config(config.vision_config)
    loader = StudyLoader(source, processor, config.label_names, batch_size=2, with_text=False)
    assert [len(batch["ids"]) for batch in loader] == [2, 2, 2]
    assert loader.num_bad == 1


def test_no_flipped_bit_is_read_silently(folder, tmp_path, config):
    whole = (folder / "data/valid-00000-of-00001.parquet").read_bytes()
    sound = [(row, opened(row)) for row in prepared_source(folder, Selection("valid"), config).stream()]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    generator = np.random.default_rng(0)
    found = Counter()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    places = [generator.integers(0, len(whole), 100), generator.integers(footer, len(whole), 200)]
    for position in np.concatenate(places):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << generator.integers(8)
        (tmp_path / "data/valid-00000-of-00001.parquet").write_bytes(damaged)
        rows = prepared_source(tmp_path, Selection("valid"), config).stream()
        for row, (expected, volume) in zip(rows, sound, strict=True):
            try:
                assert torch.equal(opened(row), volume)
            except VolumeError:
                found["refused"] += 1
                continue
            found["unharmed"] += 1
            assert [row[name] for name in ("id", "patient", "report", "labels")] == [
                expected[name] for name in ("id", "patient", "report", "labels")
            ]
    assert min(found["refused"], found["unharmed"]) > 100


def test_volumes_are_read_from_where_they_were_written(folder, config, monkeypatch):
    rows = list(prepared_source(folder, Selection("train"), config).stream())
    expected = [dataclasses.replace(row["volume"], chunk=None).load(Place()) for row in rows]
    monkeypatch.setattr(PreparedVolume, "_read", lambda *_: pytest.fail("Arrow is asked"))
    assert all(torch.equal(opened(row), volume) for row, volume in zip(rows, expected, strict=True))


def test_shards_that_do_not_say_where_volumes_lie_are_read_by_arrow(folder, tmp_path, config):
    older = shutil.copytree(folder, tmp_path / "older")
    manifest = json.loads((older / "manifest.json").read_text(encoding="utf-8"))
    for file in manifest["splits"]["train"]["files"]:
        del file["chunks"]
    (older / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    one, other = (prepared_source(each, Selection("train"), config) for each in (folder, older))
    assert all(torch.equal(opened(row), opened(same)) for row, same in zip(one.stream(), other.stream(), strict=True))


def test_a_damaged_footer_affects_its_file_alone(folder, tmp_path, config, sources):
    prepare.prepare({"train": sources["train"]}, config, tmp_path / "out", SETTINGS)
    path = tmp_path / "out/data/train-00001-of-00003.parquet"
    path.write_bytes(path.read_bytes()[:-4] + b"0000")
    rows = list(prepared_source(tmp_path / "out", Selection("train"), config).stream())
    assert [row["id"].endswith((".parquet, row 0", "row 1", "row 2")) for row in rows] == 3 * [False] + 3 * [True] + [
        False
    ]
    with pytest.raises(VolumeError, match="cannot be read"):
        opened(rows[3])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_come_in_the_models_unit_without_a_warning(num_workers, folder, config, processor):
    processor.image_processor = MedCTImageProcessor.from_config(config.vision_config)
    source = prepared_source(folder, Selection("train"), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = {"batch_size": 4, "with_text": False, "num_workers": num_workers}
        batches = list(StudyLoader(source, processor, config.label_names, **options))
    assert [batch["pixel_values"].dtype for batch in batches] == [torch.float32] * 2
    assert batches[0]["pixel_values"].shape == (4, 1, 16, 24, 20)
    hu = opened(source.read(source.keys()[0]))
    assert torch.equal(batches[0]["pixel_values"][0, 0], hu.float() / processor.image_processor.hu_per_unit)


def test_resume_is_exact(folder, config, processor):
    processor.image_processor = MedCTImageProcessor.from_config(config.vision_config)
    source = prepared_source(folder, Selection("train"), config)

    def loader() -> StudyLoader:
        return StudyLoader(source, processor, config.label_names, batch_size=2, with_text=False, seed=1)

    uninterrupted = loader()
    whole = [batch["ids"] for _ in range(2) for batch in uninterrupted]
    assert sorted(whole[0] + whole[1] + whole[2] + whole[3]) == sorted(row["id"] for row in source.stream())
    assert whole[:4] != whole[4:]
    first = loader()
    batches = iter(first)
    head = [next(batches)["ids"] for _ in range(2)]
    second = loader()
    second.load_state_dict(first.state_dict())
    assert head + [batch["ids"] for batch in second] + [batch["ids"] for batch in second] == whole


def test_a_limit_takes_the_same_studies_each_time(folder, config):
    few = [row["id"] for row in prepared_source(folder, Selection("train", limit=3), config).stream()]
    assert len(few) == 3
    assert few == [row["id"] for row in prepared_source(folder, Selection("train", limit=3), config).stream()]
    assert set(few) < {row["id"] for row in prepared_source(folder, Selection("train", limit=5), config).stream()}


def header_of(shape=(2, 3, 4)) -> bytearray:
    return bytearray(nifti_header(shape, np.diag([4.0, 3, 2, 1])) + bytes(2 * 24))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, b"\0\0\1\x5c", "not a little-endian single-file NIfTI-1"),
        (344, b"ni1\0", "not a little-endian single-file NIfTI-1"),
        (42, b"\5\0", r"has the axes \(5, 3, 2\), not \(4, 3, 2\)"),
        (40, b"\4\0", "has the axes"),
        (70, b"\x10\0", "not int16 in HU"),
        (112, np.float32(2).tobytes(), "not int16 in HU"),
        (116, np.float32(-1024).tobytes(), "not int16 in HU"),
        (108, np.float32(348).tobytes(), "do not fit its header"),
    ],
)
def test_another_nifti_in_the_column_is_refused(position, value, message):
    data = header_of()
    assert decode_nifti(torch.frombuffer(data, dtype=torch.uint8), (2, 3, 4), "it").shape == (2, 3, 4)
    data[position : position + len(value)] = value
    with pytest.raises(VolumeError, match=f"it: its volume .*{message}"):
        decode_nifti(torch.frombuffer(data, dtype=torch.uint8), (2, 3, 4), "it")


def test_a_short_nifti_is_refused():
    for length in (0, 100, 352, 399):
        with pytest.raises(VolumeError, match="it: its volume"):
            decode_nifti(torch.tensor(header_of()[:length], dtype=torch.uint8), (2, 3, 4), "it")


def test_an_oblique_scan_keeps_its_place(tmp_path, config):
    angle = np.deg2rad(5)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([-9.0, 8.0, -7.0])
    affine[:3, 3] = (40, -30, 20)
    array = np.random.default_rng(0).integers(-1000, 500, (30, 31, 32), dtype=np.int16)
    volume = CTVolume(array, affine)
    row = {"id": "a", "patient": "p", "report": "", "labels": [0.0] * 18, "volume": volume}
    prepare.prepare({"train": one(row)}, config, tmp_path, SETTINGS)
    (bare,) = load_dataset(str(tmp_path), split="train")
    geometry = MedCTImageProcessor.from_config(config.vision_config).geometry(volume)
    for position in ((3, 4, 5), (15, 0, 19)):
        np.testing.assert_allclose(
            (bare["volume"].affine @ [*position[::-1], 1])[:3], geometry.to_mm(position), atol=1e-3
        )
    qform, sform = bare["volume"].get_qform(), bare["volume"].get_sform()
    np.testing.assert_allclose(qform, sform, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ct_rate(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("ct_rate"), ct_rate_files())


@pytest.fixture(scope="module")
def small_model(tmp_path_factory, config):
    """A folder with nothing but the configuration of a model."""
    folder = tmp_path_factory.mktemp("small_model")
    config.save_pretrained(folder)
    return folder


def test_the_command_prepares_ct_rate(ct_rate, small_model, tmp_path, config, capsys, monkeypatch):
    monkeypatch.setattr(data_commands, "push_shards", lambda folder, repo: f"{folder.name} in {repo}")
    command = [str(ct_rate), str(tmp_path), "--model", str(small_model), "--max_skipped_share", "1"]
    main(
        [
            "prepare",
            *command,
            "--reconstructions",
            "all",
            "--tune_share",
            "0.4",
            "--compression",
            "lz4",
            "--push_to_hub",
            "org/x",
        ]
    )
    told = capsys.readouterr().out
    assert "skipped, see manifest.json" in told and f"Uploaded: {tmp_path.name} in org/x" in told
    manifest = read_manifest(str(tmp_path))
    assert manifest["settings"]["compression"] == "lz4"
    skipped = {study["id"]: study["reason"] for study in manifest["splits"]["valid"]["skipped"]}
    assert set(skipped) == {"valid_3_a_1.nii.gz", "valid_4_a_1.nii.gz"}
    assert str(ct_rate) not in json.dumps(skipped)
    assert "may not be redistributed" in manifest["licence_note"]
    patients = {}
    for split in ("train", "tune", "valid"):
        options = {"tune_share": 0.4, "reconstructions": "all"}
        straight = open_source(str(ct_rate), split, config, **options)
        source = open_source(str(tmp_path), split, config, reconstructions="all")
        rows = {row["id"]: row for row in source.stream()}
        patients[split] = {row["patient"] for row in rows.values()}
        for row in straight.stream():
            if row["id"] in skipped or row["id"] == "train_6_a_1.nii.gz":
                assert row["id"] not in rows
                continue
            read = rows.pop(row["id"])
            np.testing.assert_array_equal(read["labels"], row["labels"])
            assert (read["patient"], read["report"]) == (row["patient"], row["report"])
            difference = opened(read).double() - stored(config, row).double()
            assert difference.abs().max() <= 0.5 + 1e-3
        assert not rows
        for with_reports in (False, True):
            one, other = (
                open_source(at, split, config, tune_share=0.4, need_reports=with_reports)
                for at in (str(ct_rate), str(tmp_path))
            )
            unreadable = {"train_6_a_1.nii.gz", "valid_3_a_1.nii.gz"}
            assert {row["id"] for row in other.stream()} == {row["id"] for row in one.stream()} - unreadable
        with pytest.raises(DataError, match=r"prepared with `tune_share` 0.4, not 0.1. Leave it out, or prepare the"):
            open_source(str(tmp_path), split, config, tune_share=0.1)
    assert all(patients.values())
    assert not (patients["train"] & patients["tune"] or patients["train"] & patients["valid"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "OUT"], "nowhere"),
        (["SOURCE", "OUT", "--model", "nowhere"], "nowhere: cannot load a model"),
        (["OUT", "OUT"], "no "),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, message, ct_rate, tmp_path, refused):
    places = {"SOURCE": str(ct_rate), "OUT": str(tmp_path)}
    assert message in refused("prepare", *(places.get(argument, argument) for argument in arguments))


@pytest.mark.parametrize("reconstructions", ["one", "all"])
def test_a_limit_takes_the_same_scans_from_a_source_and_from_its_shards(reconstructions, small_model, config, tmp_path):
    volumes = tmp_path / "volumes"
    volumes.mkdir()
    rows = []
    for scan in range(6):
        for reconstruction in (1, 2):
            name = f"train_{scan}_a_{reconstruction}.nii.gz"
            write_noise(volumes / name, scan)
            rows.append(
                {"VolumeName": name, "Findings_EN": "x", "Impressions_EN": "y", **dict.fromkeys(CT_CLIP_LABELS, 0)}
            )
    pd.DataFrame(rows).to_csv(volumes / "train_all.csv", index=False)
    known = dict(zip(METADATA_COLUMNS, (1, 0, "[3.0, 2.0]", 4.0), strict=True))
    metadata = [{"VolumeName": row["VolumeName"], **known} for row in rows]
    pd.DataFrame(metadata).to_csv(volumes / "train_metadata.csv", index=False)
    main(["prepare", str(volumes), str(tmp_path / "shards"), "--model", str(small_model), "--splits", "train",
          "--tune_share", "0", "--reconstructions", reconstructions])  # fmt: skip

    def chosen(address: Path, limit: int) -> set[str]:
        source = open_source(str(address), "train", config, tune_share=0, reconstructions=reconstructions, limit=limit)
        return {row["id"].rsplit("_", 1)[0] for row in source.stream()}

    for limit in (2, 3, 5):
        assert chosen(volumes, limit) == chosen(tmp_path / "shards", limit)
    assert len({frozenset(chosen(volumes, limit)) for limit in (2, 3, 5)}) == 3


def test_whether_studies_are_synthetic_is_a_field(small_model, config, tmp_path):
    """Not read from a description, and kept by the shards."""
    cohort = PhantomCohort(train_patients=4, tune_patients=2, eval_patients=2)
    source = open_source("phantoms", "train", config, limit=2, phantoms=cohort)
    prepare.prepare({"train": source}, config, tmp_path / "shards", SETTINGS)
    shards = open_source(str(tmp_path / "shards"), "train", config)
    assert source.is_synthetic and shards.is_synthetic
    assert list(shards.names) == list(source.names)
    plain = dataclasses.replace(source, is_synthetic=False)
    prepare.prepare({"train": plain}, config, tmp_path / "plain", SETTINGS)
    assert not open_source(str(tmp_path / "plain"), "train", config).is_synthetic


def test_prepared_shards_are_not_prepared_again(folder, tmp_path, small_model, refused):
    command = ["prepare", folder, tmp_path / "out", "--model", small_model, "--splits", "train"]
    assert "The source is already prepared" in refused(*command)


def test_impossible_flags_are_refused(refused, capfd):
    assert "Ranks count from 0" in refused("prepare", "source", "output", "--rank", "2", "--world_size", "2")
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", "source", "output", "--studies_per_shard", "0"])
    assert "not a whole number of at least 1" in capfd.readouterr().err
    for share in ("2", "-1", "nan", "some"):
        with pytest.raises(SystemExit, match="2"):
            main(["prepare", "source", "output", "--max_skipped_share", share])
        assert f"'{share}' is not a share, 0 to 1" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["overview", "source", "--seed", "-1"])
    assert "not a whole number of at least 0" in capfd.readouterr().err


# two at once, and what a kill leaves


def test_a_shard_that_another_run_makes_is_refused(tmp_path, config, sources):
    path = prepare.shards_of(tmp_path, "train", sources["train"], SETTINGS)[0].path
    with only_run(path), pytest.raises(LockedError, match=rf"{path.name} is being written by another run \(process"):
        prepare.prepare(sources, config, tmp_path, SETTINGS)


def test_what_a_killed_run_left_is_cleared_away(folder, tmp_path, config, sources):
    """Whichever file it was writing; those of a shard that another process is writing again stay."""
    shards = prepare.shards_of(folder, "train", sources["train"], SETTINGS)
    shutil.copytree(folder, tmp_path / "out")
    places = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    for place in places:
        (tmp_path / "out" / place.with_name(f".{place.name}.partial-0a1b")).touch()
    (tmp_path / "out" / "data" / f".{shards[0].path.name}.lock").touch()
    held = tmp_path / "out" / "data" / shards[1].path.name
    (tmp_path / "out" / "manifest.json").unlink()
    with only_run(held):
        left = held.with_name(f".{held.name}.partial-0a1b")
        left.touch()
        prepare.prepare(sources, config, tmp_path / "out", SETTINGS)
        hidden = set((tmp_path / "out").rglob(".*"))
        assert {path.name.split(".")[1] for path in hidden} == {shards[1].name}
    prepare.prepare(sources, config, tmp_path / "out", SETTINGS)
    assert not list((tmp_path / "out").rglob(".*"))
    assert contents(tmp_path / "out") == contents(folder)


def test_processes_that_finish_at_once_do_not_disturb_each_other(folder, tmp_path, config, sources):
    shutil.copytree(folder, tmp_path / "out")
    with only_run(tmp_path / "out" / "manifest.json"):
        (tmp_path / "out" / ".manifest.json.partial-0a1b").touch()
        assert prepare.prepare(sources, config, tmp_path / "out", SETTINGS) is not None
        assert (tmp_path / "out" / ".manifest.json.partial-0a1b").exists()


@pytest.mark.parametrize("below", ["", "/some/folder"])
def test_a_revision_is_part_of_an_address(below):
    address = f"hf://datasets/org/scans{below}"
    assert with_revision(address, "abc") == f"hf://datasets/org/scans@abc{below}"
    assert with_revision(address, None) == address
    assert with_revision(below or "folder", "abc") == (below or "folder")


def test_a_shard_of_another_size_than_was_written_is_made_again(folder, tmp_path, config, sources):
    shutil.copytree(folder, tmp_path / "out")
    torn = sorted((tmp_path / "out" / "data").iterdir())[1]
    torn.write_bytes(torn.read_bytes()[:-100])
    prepare.prepare(sources, config, tmp_path / "out", SETTINGS)
    assert contents(tmp_path / "out") == contents(folder)


@pytest.mark.parametrize("setting", ["image_size", "target_spacing_mm", "orientation", "hu_min", "hu_max"])
def test_each_setting_of_the_grid_is_compared(folder, tmp_path, config, setting):
    shutil.copytree(folder, tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["settings"][setting] = {"orientation": "SLA", "image_size": [8, 8, 8], "target_spacing_mm": [1, 1, 1]}.get(
        setting, -777.0
    )
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(DataError, match=f"prepared for `{setting}`"):
        prepared_source(tmp_path / "out", Selection("train"), config)


@pytest.mark.parametrize("name", ["README.md", "data/train-0.parquet", "records/notes.txt"])
def test_shards_do_not_lie_among_files_of_others(name, tmp_path, config, sources):
    other = tmp_path / name
    other.parent.mkdir(exist_ok=True)
    other.write_text("of others", encoding="utf-8")
    with pytest.raises(DataError, match=r"it holds something else, such as .*Choose another folder"):
        prepare.prepare(sources, config, tmp_path, SETTINGS)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [other]
    assert other.read_text(encoding="utf-8") == "of others"


def test_a_folder_that_was_killed_at_its_start_is_begun_again(folder, tmp_path, config, sources):
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / ".settings.json.partial-0123abcd").write_text("{", encoding="utf-8")
    prepare.prepare(sources, config, tmp_path, SETTINGS)
    assert contents(tmp_path) == contents(folder)


@pytest.mark.parametrize("where", ["", "shards", "../link/shards"])
def test_shards_do_not_lie_in_their_source(where, small_model, tmp_path, refused):
    source = tmp_path / "source"
    source.mkdir()
    (source / "metadata.csv").write_text(
        "\n".join([",".join(["file_name", *CT_CLIP_LABELS]), *(f"{k}.nii.gz,{'1,' * 17}0" for k in range(60))]),
        encoding="utf-8",
    )
    for k in range(60):
        (source / f"{k}.nii.gz").write_bytes(b"never read")
    before = sorted(source.iterdir())
    (tmp_path / "link").symlink_to(source)
    assert "which is read. Choose a folder outside of it." in refused(
        "prepare", str(source), str(source / where), "--model", str(small_model)
    )
    assert sorted(source.iterdir()) == before


@pytest.mark.parametrize("table", ["metadata.csv", "train/metadata.csv", "own.csv"])
def test_shards_beside_tables_are_refused(folder, table, tmp_path, config):
    mixed = tmp_path / "mixed"
    shutil.copytree(folder, mixed)
    (mixed / table).parent.mkdir(exist_ok=True)
    (mixed / table).write_text(f"{'VolumeName' if table == 'own.csv' else 'file_name'}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"both prepared shards \(manifest.json\) and tables of studies. Move one"):
        open_source(str(mixed), "train", config)


def test_a_row_has_the_columns_and_labels_that_it_should_have():
    """What describes columns has no checksum."""
    row = {"id": ["a"], "patient": ["p"], "report": [""], "labels": [[0.0, 1.0]], "sha256": ["x"]}
    read = _ReadRow((), (), (1, 1, 1), 2, {}, (), ())
    assert read._to_dict(pa.table(row, _ROW)) == {"id": "a", "patient": "p", "report": "", "labels": [0, 1]}
    whole = _ROW.set(3, pa.field("labels", pa.list_(pa.int32())))
    with pytest.raises(ValueError, match="other columns"):
        read._to_dict(pa.table(row | {"labels": [[0, 1]]}, whole))
    with pytest.raises(ValueError, match="1 labels"):
        read._to_dict(pa.table(row | {"labels": [[0.0]]}, _ROW))
