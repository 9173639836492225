"""RAD-ChestCT: its arrays as they lie in the patient, its labels by exact names, and its traps."""

import io
import json
import math
import pickle
import zipfile

import numpy as np
import pytest
from ct_rate_like import write_files
from rad_chestct_like import SCANS, SHAPE, hu_of, npz_bytes, patient_of, rad_chestct_files
from transformers import AutoConfig

from medct import CT_CLIP_LABELS, MedCTConfig
from medct.byte_sources_medct import of_bytes
from medct.cli import main
from medct.data import DataError, StudyLoader, open_source, read_study
from medct.data.label_space import merge_columns, told_apart
from medct.data.rad_chestct import read_npz
from medct.data.sources import Merged
from medct.volume_medct import VolumeError

CONFIG = MedCTConfig()
METADATA = "CT_Scan_Metadata_Complete_35747.csv"
MERGED = "Arterial wall calcification or Coronary artery wall calcification"


@pytest.fixture
def folder(tmp_path):
    return write_files(tmp_path / "rad", rad_chestct_files())


def rows_of(address, split, config=CONFIG, **options):
    return {row["id"]: row for row in open_source(str(address), split, config, **options).stream()}


def labels_of(row, names=CT_CLIP_LABELS):
    return dict(zip(names, row["labels"], strict=True))


def test_axes_run_inferior_posterior_left_and_nothing_is_rescaled(folder):
    row = rows_of(folder, "valid")["tst00002.npz"]
    volume = read_study(row, "IPL")
    assert np.array_equal(volume.array, hu_of("tst00002")), "HU as they are, whatever slope the metadata have"
    axes_mm = volume.affine[:3, :3]
    assert np.allclose(axes_mm, [[0, 0, -0.8], [0, -0.8, 0], [-0.8, 0, 0]]), "columns: towards I, P and L in RAS"
    assert read_study(rows_of(folder, "train")["trn00003.npz"], "IPL").array[-1].max() == 8, "taken as it is"


def test_the_model_sees_it_upright(folder, processor):
    """Bone lies superior, anterior and right: last in z, first in y and x of a tensor that grows to S, L and P."""
    source = open_source(str(folder), "valid", CONFIG)
    (batch, *_) = StudyLoader(source, processor, CONFIG.label_names, batch_size=6, with_text=False)
    z, y, x = (
        (indices.float().mean() / size).item()
        for indices, size in zip(
            (batch["pixel_values"][0, 0] > 0.9).nonzero(as_tuple=True), batch["pixel_values"].shape[2:], strict=True
        )
    )
    assert z > 0.5 and y < 0.5 and x < 0.5


def test_labels_are_joined_by_name_and_read_by_exact_names(folder):
    rows = rows_of(folder, "train") | rows_of(folder, "tune")
    assert set(rows) == {"trn00001.npz", "trn00002.npz", "trn00003.npz", "trn00006.npz", "val00001.npz", "val00002.npz"}
    first, second = (labels_of(rows[f"trn0000{number}.npz"]) for number in (1, 2))
    assert first["Lung nodule"] == 1 and first["Medical material"] == 0
    assert second["Lung nodule"] == 0 and second["Medical material"] == 1
    assert labels_of(rows["trn00006.npz"])["Lung nodule"] == 1
    alone = rows_of(folder, "train", mapping="hlip")["trn00006.npz"]
    assert labels_of(alone)["Lung nodule"] == 0, "`nodule` is not `nodulegr1cm`"
    assert all(row["report"] == "" for row in rows.values())


def test_what_has_no_counterpart_is_unknown(folder):
    for row in rows_of(folder, "valid").values():
        assert math.isnan(labels_of(row)["Mosaic attenuation pattern"])
    extended = rows_of(folder, "valid", mapping="radfinder-extended")
    assert labels_of(extended["tst00006.npz"])["Mosaic attenuation pattern"] == 1
    hlip = labels_of(rows_of(folder, "valid", mapping="hlip")["tst00005.npz"])
    assert math.isnan(hlip["Medical material"]) and math.isnan(hlip["Lymphadenopathy"])


def test_splits_and_patients(folder):
    rows = {split: rows_of(folder, split) for split in ("train", "tune", "valid")}
    patients = [{row["patient"] for row in of_split.values()} for of_split in rows.values()]
    assert sum(map(len, patients)) == len(set().union(*patients))
    assert rows["train"]["trn00001.npz"]["patient"] == rows["train"]["trn00002.npz"]["patient"] == "p1"
    assert len(rows["valid"]) == len(SCANS["test"])
    source = open_source(str(folder), "train", CONFIG)
    assert {(study.id, study.reason) for study in source.skipped} == {
        ("trn00004.npz", "no such file"),
        ("trn00005.npz", f"no row in {METADATA}, so nobody knows whose it is"),
    }
    assert source.description.startswith("4 train studies of RAD-ChestCT (")
    assert source.description.endswith("), 16 labels by radfinder-standard")


def test_volumes_may_lie_in_a_folder_of_their_own(folder):
    (folder / "npz").mkdir()
    for path in folder.glob("*.npz"):
        path.rename(folder / "npz" / path.name)
    row = rows_of(folder, "valid")["tst00001.npz"]
    assert np.array_equal(read_study(row, "IPL").array, hu_of("tst00001"))


def test_it_is_streamed_from_the_hub(hub, monkeypatch, tmp_path):
    hub.connect(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.add_files("dataset", "org/rad", rad_chestct_files())
    row = rows_of("hf://datasets/org/rad", "valid")["tst00003.npz"]
    assert hub.count(r"GET .*\.npz") == 0, "volumes are fetched when they are read"
    assert np.array_equal(read_study(row, "IPL").array, hu_of("tst00003"))


def test_other_labels_are_the_names_of_its_abnormalities(folder):
    config = MedCTConfig(id2label={0: "groundglass", 1: "calcification*heart"})
    row = rows_of(folder, "valid", config)["tst00001.npz"]
    assert row["labels"] == [0, 1]
    with pytest.raises(DataError, match=r"no abnormality 'glass', but air_trapping, .* column `data` of --mapping"):
        open_source(str(folder), "valid", MedCTConfig(id2label={0: "glass"}))


def test_calcification_is_scored_as_one_and_not_learned_from(folder):
    source = open_source(str(folder), "valid", CONFIG)
    assert [each.name for each in source.merged] == [MERGED]
    learned = {row["id"]: labels_of(row) for row in told_apart(source).stream()}
    arterial, coronary = CT_CLIP_LABELS[1], CT_CLIP_LABELS[4]
    assert math.isnan(learned["tst00001.npz"][arterial]) and math.isnan(learned["tst00001.npz"][coronary])
    assert learned["tst00005.npz"][arterial] == learned["tst00005.npz"][coronary] == 0
    assert learned["tst00001.npz"]["Cardiomegaly"] == 1

    labels = np.array([row["labels"] for row in source.stream()])
    merged, names = merge_columns(labels, source.label_names, source.merged)
    assert names[1] == MERGED and len(names) == 17 and "Coronary artery wall calcification" not in names
    assert merged[:, 1].sum() == 3


def test_rules_for_one_score_of_two():
    scores = np.array([[0.2, 0.4], [0.6, 0.4], [0.5, 0.1]])
    for rule, expected in (("max", [0.4, 0.6, 0.5]), ("max_or_min", [0.2, 0.6, 0.1])):
        found, names = merge_columns(scores, ["a", "b"], [Merged(("a", "b"), rule)])
        assert found[:, 0].tolist() == expected and names == ("a or b",)


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda rad: (rad / METADATA).unlink(),
            f"it has no {METADATA}, which says",
        ),
        (lambda rad: _edit(rad, "train", ",1,", ",2,"), "neither 0 nor 1"),
        (lambda rad: _edit(rad, "train", "NoteAcc_DEID", "Note"), "has no column 'NoteAcc_DEID'"),
        (lambda rad: (rad / METADATA).write_bytes(_one_patient(rad)), "1 patients are in several splits"),
    ],
    ids=["no metadata", "label 2", "no id", "shared patient"],
)
def test_damaged_tables_are_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message):
        open_source(str(folder), "train", CONFIG)


def test_a_split_that_is_not_there_is_named(folder):
    (folder / "imgvalid_Abnormality_and_Location_Labels.csv").unlink()
    assert open_source(str(folder), "train", CONFIG).num_studies == 4
    with pytest.raises(DataError, match=r"it has no imgvalid_Abnormality_and_Location_Labels\.csv"):
        open_source(str(folder), "tune", CONFIG)


def _edit(rad, split, old, new):
    path = rad / f"img{split}_Abnormality_and_Location_Labels.csv"
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")


def _one_patient(rad):
    return (rad / METADATA).read_bytes().replace(patient_of("val00001").encode(), b"p1")


class Payload:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def _npy(header: bytes, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def _zip(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def _header(shape="(4, 4, 4)", descr="'<i2'") -> bytes:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()


@pytest.mark.parametrize(
    "content, message",
    [
        (npz_bytes(ct=np.array([Payload()], object)), "its values are of type object"),
        (npz_bytes(image=np.zeros(SHAPE, np.int16)), "it holds no array 'ct'"),
        (npz_bytes(ct=np.zeros(SHAPE, np.float32)), "its values are of type float32"),
        (npz_bytes(ct=np.zeros(SHAPE, np.uint16)), "its values are of type uint16"),
        (npz_bytes(ct=np.full(SHAPE, -2024, np.int16)), r"lie within -2024..-2024, .* rescaled twice"),
        (npz_bytes(ct=np.full(SHAPE, 3000, np.int16)), r"lie within 3000..3000"),
        (npz_bytes(ct=np.zeros((4, 4), np.int16)), "shape"),
        (npz_bytes(ct=hu_of("trn00001"))[:-40], "zip archive is damaged"),
        (_zip(ct=_npy(_header("(10**9, 10**9)"), b"")), "header of its array is damaged"),
        (_zip(ct=_npy(_header("(100000, 100000, 100000)"), b"")), "voxels"),
        (_zip(ct=_npy(_header("(4, 4, 5)"), bytes(128))), "128 bytes, which do not fit shape"),
        (_zip(ct=_npy(b"(" * 9000, bytes(128))), "header of its array is damaged"),
        (_zip(ct=b"nothing"), "header of its array is damaged"),
        (_zip(ct=pickle.dumps(Payload())), "header of its array is damaged"),
        (_zip(ct=_npy(_header(), bytes(2**28 + 2**20))), "would unpack to"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "not an .npz archive, but a Git LFS pointer"),
        (b"", "not an .npz archive, but empty"),
    ],
)
def test_a_file_that_is_none_of_its_own_is_refused_in_a_sentence(content, message):
    with pytest.raises(VolumeError, match=message) as refusal:
        read_npz(of_bytes(content, "trn00001.npz"))
    assert str(refusal.value).startswith("trn00001.npz: ") and "\n" not in str(refusal.value)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<i2", ">i2"])
def test_any_order_of_bytes_and_axes_gives_the_same(order, dtype):
    array = np.asarray(hu_of("trn00001").astype(dtype), order=order)
    found = read_npz(of_bytes(npz_bytes(ct=array), "scan.npz")).array
    assert np.array_equal(found, hu_of("trn00001")) and found.dtype == np.int16


def test_a_bad_volume_is_one_bad_sample(folder, processor):
    (folder / "tst00001.npz").write_bytes(npz_bytes(ct=np.full(SHAPE, -2024, np.int16)))
    loader = StudyLoader(
        open_source(str(folder), "valid", CONFIG), processor, CONFIG.label_names, batch_size=9, with_text=False
    )
    (batch,) = loader
    assert loader.num_bad == 1 and len(batch["ids"]) == 5


def test_overview_counts_what_is_scored(folder, capsys, tmp_path):
    sheet = tmp_path / "sheet.png"
    main(["overview", str(folder), "--split", "valid", "--json", "--samples", "0", "--sheet", str(sheet)])
    summary = json.loads(capsys.readouterr().out)
    assert summary["labels"][MERGED] == {"present": 3, "absent": 3, "unknown": 0, "prevalence": 0.5}
    assert summary["labels"]["Lung nodule"]["present"] == 3
    assert summary["labels"]["Mosaic attenuation pattern"]["unknown"] == 6
    assert summary["num_patients"] == 5


def test_shards_of_it_have_the_same_labels(folder, converted, tmp_path):
    shards = tmp_path / "shards"
    main(["prepare", str(folder), str(shards), "--model", str(converted)])
    config = AutoConfig.from_pretrained(converted)
    for split in ("train", "tune", "valid"):
        source, again = (open_source(str(address), split, config) for address in (folder, shards))
        assert (again.merged, again.mapping) == (source.merged, source.mapping)
        expected = {row["id"]: row["labels"] for row in source.stream()}
        found = {row["id"]: row["labels"] for row in again.stream()}
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name], equal_nan=True) for name in expected)
    with pytest.raises(DataError, match=r"its labels are mapped already\. Leave out --mapping"):
        open_source(str(shards), "train", config, mapping="hlip")
