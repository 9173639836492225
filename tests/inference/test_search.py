"""Embeddings in Parquet, exact search."""

import unicodedata

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from medct.data import DataError
from medct.inference.bulk import KEY
from medct.inference.search import (
    SearchError,
    nearest,
    read_embeddings,
    read_reports,
    refuse_shared,
    report_of,
    write_embeddings,
)

SETTINGS = {"model": "base", "adapter": None}


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def make_rows(count: int = 130, width: int = 8, missing: int = 7) -> list[dict]:
    """Reports that resemble their scans; some of them shared by two studies, some missing."""
    random = np.random.default_rng(0)
    images = unit(random.normal(size=(count, width)))
    texts = unit(images + 0.6 * random.normal(size=(count, width)))
    texts[1] = texts[0]
    rows = [
        {KEY: f"{k}.nii.gz", "image_embeds": images[k].tolist(), "text_embeds": texts[k].tolist(), "report_id": k + 1}
        for k in range(count)
    ]
    rows[1]["report_id"] = rows[0]["report_id"]
    for row in rows[-missing:]:
        row.update(text_embeds=None, report_id=None)
    return rows


@pytest.fixture
def embeddings(tmp_path):
    write_embeddings(tmp_path / "index.parquet", make_rows(), SETTINGS)
    return read_embeddings(tmp_path / "index.parquet")


def test_rows_come_back(embeddings):
    rows = make_rows()
    assert embeddings.settings == SETTINGS
    assert embeddings.ids == [row[KEY] for row in rows]
    assert embeddings.image_embeds.dtype == np.float32
    np.testing.assert_array_equal(embeddings.image_embeds, np.float32([row["image_embeds"] for row in rows]))
    assert embeddings.has_report.tolist() == [row["text_embeds"] is not None for row in rows]
    again = embeddings.rows()
    assert [row["report_id"] for row in again] == [row["report_id"] for row in rows]
    np.testing.assert_array_equal(again[3]["text_embeds"], np.float32(rows[3]["text_embeds"]))
    assert again[-1]["text_embeds"] is None


def test_others_can_read_the_file(tmp_path):
    write_embeddings(tmp_path / "index.parquet", make_rows(3, missing=1), SETTINGS)
    table = pq.read_table(tmp_path / "index.parquet")
    assert table.column_names == ["id", "image_embeds", "text_embeds", "report_id"]
    assert table["text_embeds"].null_count == 1


def test_nearest_is_the_sorted_cosine(embeddings):
    for query in embeddings.text_embeds[:5]:
        similarities, indices = nearest(embeddings.image_embeds, torch.from_numpy(query), 10)
        cosines = embeddings.image_embeds.astype(float) @ query.astype(float)
        order = np.argsort(-cosines)[:10]
        assert indices == order.tolist()
        np.testing.assert_allclose(similarities, cosines[order], atol=1e-6)
    assert len(nearest(embeddings.image_embeds[:3], torch.from_numpy(query), 10)[1]) == 3


def test_reports_that_say_nothing_count_as_missing(tmp_path):
    """As in training: otherwise all such studies would share a report and count as right answers for it."""
    path = tmp_path / "reports.csv"
    path.write_text(
        "VolumeName,Findings_EN,Impressions_EN\n"
        "a.nii.gz,Not given.,Not given.\nb.nii.gz,Not given.,Clear lungs.\nc.nii.gz,,\n",
        encoding="utf-8",
    )
    assert read_reports(path) == {"b.nii.gz": "Clear lungs."}
    path.write_text('file_name,report\na,"unclosed\n', encoding="utf-8")
    with pytest.raises(DataError, match="not a readable csv file"):
        read_reports(path)


def test_what_is_not_an_index_is_refused(tmp_path):
    with pytest.raises(SearchError, match="no such file"):
        read_embeddings(tmp_path / "index.parquet")
    (tmp_path / "index.parquet").write_text("no parquet", encoding="utf-8")
    with pytest.raises(SearchError, match=r"index.parquet: not a readable file of embeddings \(ArrowInvalid\)"):
        read_embeddings(tmp_path / "index.parquet")


def test_a_damaged_index_is_refused_or_holds_the_vectors_that_were_written(tmp_path):
    path, vectors = tmp_path / "index.parquet", np.random.default_rng(0).random((20, 8), np.float32)
    write_embeddings(path, [{KEY: f"{row}", "image_embeds": each} for row, each in enumerate(vectors)], {})
    content, refused = path.read_bytes(), 0
    for place in range(0, len(content), 17):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        try:
            assert np.array_equal(read_embeddings(path).image_embeds, vectors)
        except SearchError:
            refused += 1
    assert refused > len(content) / 17 / 2


@pytest.mark.parametrize(
    ("header", "row", "report"),
    [
        ("file_name,report", "a/1.nii.gz,text", "text"),
        ("VolumeName,Findings_EN,Impressions_EN", "1.nii.gz,first,second", "first second"),
        ("VolumeName,Impressions_EN,other", "1.nii.gz,second,x", "second"),
    ],
)
def test_reports_are_found_by_the_end_of_a_path(tmp_path, header, row, report):
    (tmp_path / "reports.csv").write_text(
        f"{header}\n{row}\n2.nii.gz,{',' * (header.count(',') - 1)}\n", encoding="utf-8"
    )
    reports = read_reports(tmp_path / "reports.csv")
    assert report_of("/data/a/1.nii.gz", reports) == report
    assert report_of("/data/a/11.nii.gz", reports) is None
    assert report_of("/data/2.nii.gz", reports) is None  # empty


def test_the_longest_end_of_a_path_is_the_studys(tmp_path):
    (tmp_path / "reports.csv").write_text("file_name,report\n1.nii.gz,Short.\na/1.nii.gz,Long.\n", encoding="utf-8")
    reports = read_reports(tmp_path / "reports.csv")
    assert report_of("/data/a/1.nii.gz", reports) == "Long."
    assert report_of("/data/b/1.nii.gz", reports) == "Short."


def test_several_reports_under_one_name_are_refused(tmp_path):
    path = tmp_path / "reports.csv"
    path.write_text("file_name,report\na.nii,One.\na.nii,One.\na.nii,\n", encoding="utf-8")
    assert read_reports(path) == {"a.nii": "One."}
    path.write_text("file_name,report\na.nii,One.\na.nii,Another.\n", encoding="utf-8")
    with pytest.raises(SearchError, match=r"reports.csv: 'a.nii' has several rows with different reports. Keep one"):
        read_reports(path)


@pytest.mark.parametrize(("in_table", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_are_the_same_however_they_are_composed(tmp_path, in_table, on_disk):
    path, name = tmp_path / "reports.csv", "Brüche/Überblick.nii"
    path.write_text(f"file_name,report\n{unicodedata.normalize(in_table, name)},Clear.\n", encoding="utf-8")
    study = f"/data/{unicodedata.normalize(on_disk, name)}"
    reports = read_reports(path)
    assert report_of(study, reports) == "Clear."
    with pytest.raises(SearchError, match="could be of"):  # two files, of which a table names one
        refuse_shared(reports, [study, f"/data/{unicodedata.normalize(in_table, name)}"], path)


def test_a_report_of_several_studies_is_refused(tmp_path):
    path, reports = tmp_path / "reports.csv", {"1.nii.gz": "Short.", "a/1.nii.gz": "Long."}
    refuse_shared(reports, ["x/a/1.nii.gz", "x/b/1.nii.gz", "x/b/2.nii.gz", "x/c/2.nii.gz"], path)
    with pytest.raises(SearchError) as refusal:
        refuse_shared(reports, ["x/a/1.nii.gz", "x/b/1.nii.gz", "x/c/1.nii.gz"], path)
    assert str(refusal.value) == (
        f"{path}: its row '1.nii.gz' could be of x/b/1.nii.gz and of x/c/1.nii.gz. Write more of their paths into it."
    )


def test_a_csv_without_reports_is_refused(tmp_path):
    (tmp_path / "reports.csv").write_text("name,text\na,b\n", encoding="utf-8")
    with pytest.raises(SearchError, match="Name one file_name or VolumeName"):
        read_reports(tmp_path / "reports.csv")
