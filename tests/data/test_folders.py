"""Sources on the Hub: a miniature CT-RATE over HTTP, with dropped connections and 5xx responses."""

import pytest
from ct_rate_like import AFFINE, UNUSABLE, ct_rate_files, hu_of, nifti_bytes, volume_path, volumes
from hub_server import OWNER, HubServer

from medct import CT_CLIP_LABELS, MedCTConfig, VolumeError
from medct.data import DataError, StudyLoader, open_source, read_study
from medct.data.folders import MAX_RETRIES, HubFile

CONFIG = MedCTConfig()
REPO = "org/CT-RATE"
ADDRESS = f"hf://datasets/{REPO}"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = HubServer()
    server.connect(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    yield server
    server.close()


@pytest.fixture
def ct_rate(hub):
    hub.add_files("dataset", REPO, ct_rate_files())
    return hub


def volume_request(name):
    return rf"GET /datasets/{REPO}/resolve/\w+/{volume_path(name, 2)}"


def row_of(source, name):
    return next(row for row in source.stream() if row["id"] == f"{name}.nii.gz")


def test_ct_rate_streams_without_being_listed_or_kept(ct_rate, processor, tmp_path):
    source = open_source(ADDRESS, "train", CONFIG, tune_share=0)
    assert source.num_studies == 10
    assert {study.id.removesuffix(".nii.gz") for study in source.skipped} == UNUSABLE
    assert ct_rate.count(r"GET .*\.nii\.gz") == 0
    loader = StudyLoader(source, processor, CT_CLIP_LABELS, batch_size=3, with_text=True)
    assert sum(len(batch["ids"]) for batch in loader) == 9
    assert (loader.num_bad, loader.num_seen) == (1, 10)
    assert ct_rate.count(r"GET .*\.nii\.gz") == 10
    assert ct_rate.count(r"\w+ /api/datasets") == 0  # no listing, no paths-info
    assert not list((tmp_path / "cache").rglob("*.nii.gz"))
    assert list((tmp_path / "cache").rglob("train_reports.csv"))


def test_a_folder_with_metadata_on_the_hub(hub):
    config = MedCTConfig(id2label={0: "nodule"}, label2id={"nodule": 0})
    lines = ["file_name,report,nodule,split", "scans/a.nii.gz,Clear.,0,train", "scans/b.nii.gz,A nodule.,1,valid"]
    scan = nifti_bytes(hu_of("train_1_a_1"), AFFINE)
    files = {"metadata.csv": "\n".join(lines).encode(), "scans/a.nii.gz": scan, "scans/b.nii.gz": scan}
    hub.add_files("dataset", "org/own", {f"set/{path}": content for path, content in files.items()})
    (row,) = open_source("hf://datasets/org/own/set", "valid", config).stream()
    assert (row["id"], row["report"], row["labels"]) == ("scans/b.nii.gz", "A nodule.", [1])
    assert read_study(row, "SLP").array.max() == -599


def test_both_spellings_and_version_1(ct_rate):
    rows = list(open_source(ADDRESS, "valid", CONFIG, version=1, reconstructions="all").stream())
    assert [row["id"].removesuffix(".nii.gz") for row in rows] == volumes("valid")[:-1]
    assert read_study(rows[0], "SLP").array.max() == -199


def test_dropped_connections_and_5xx_are_retried(ct_rate):
    source = open_source(ADDRESS, "train", CONFIG, tune_share=0)
    request = volume_request("train_11_a_1")
    ct_rate.fail(request, status=503, times=2)
    ct_rate.cut_answer(request, after_bytes=40)
    ct_rate.cut_answer(request)
    assert read_study(row_of(source, "train_11_a_1"), "SLP").array.shape == (6, 8, 5)
    assert ct_rate.count(request) == 5


def test_what_cannot_be_fetched_is_given_up_and_counted(ct_rate, processor, tmp_path):
    source = open_source(ADDRESS, "train", CONFIG, tune_share=0)
    ct_rate.fail(volume_request("train_11_a_1"), status=500, times=100)
    ct_rate.cut_answer(volume_request("train_12_a_1"), after_bytes=40, times=100)
    listed = tmp_path / "bad.jsonl"
    loader = StudyLoader(source, processor, CT_CLIP_LABELS, batch_size=9, with_text=False, bad_samples_file=listed)
    (batch,) = loader
    assert len(batch["ids"]) == 7
    assert loader.num_bad == 3
    for name in ("train_11_a_1", "train_12_a_1"):
        assert ct_rate.count(volume_request(name)) == MAX_RETRIES + 1
        assert name in listed.read_text(encoding="utf-8")


def test_loader_processes_fetch_for_themselves(ct_rate, processor):
    source = open_source(ADDRESS, "train", CONFIG, tune_share=0)
    ct_rate.fail(volume_request("train_4_a_1"), status=503)
    loader = StudyLoader(source, processor, CT_CLIP_LABELS, batch_size=3, with_text=True, num_workers=2)
    assert sum(len(batch["ids"]) for batch in loader) == 9
    assert ct_rate.count(volume_request("train_4_a_1")) == 2


def test_a_run_stays_at_the_commit_that_it_started_with(ct_rate):
    source = open_source(ADDRESS, "train", CONFIG, tune_share=0)
    ct_rate.add_file("dataset", REPO, volume_path("train_11_a_1", 2), b"changed")
    assert read_study(row_of(source, "train_11_a_1"), "SLP").array.shape == (6, 8, 5)
    with pytest.raises(VolumeError):
        read_study(row_of(open_source(ADDRESS, "train", CONFIG, tune_share=0), "train_11_a_1"), "SLP")


def test_the_revision_of_an_address_goes_before_the_argument(ct_rate):
    with pytest.raises(DataError, match="no such revision"):
        open_source(ADDRESS.replace("CT-RATE", "CT-RATE@nowhere"), "train", CONFIG, revision="main")
    pinned = open_source(ADDRESS.replace("CT-RATE", "CT-RATE@main"), "train", CONFIG, revision="nowhere", tune_share=0)
    assert row_of(pinned, "train_11_a_1")


def test_a_missing_volume_is_a_bad_sample_with_a_reason_in_one_line(ct_rate):
    missing = HubFile(REPO, "dataset/nowhere.nii.gz", "main")
    with pytest.raises(VolumeError, match=r"hf://datasets/org/CT-RATE/dataset/nowhere.nii.gz: it does not exist"):
        read_study({"volume": missing}, "SLP")
    assert ct_rate.count("GET .*nowhere") == 1  # not a network fault


def test_a_token_that_is_passed_opens_what_is_private(ct_rate, monkeypatch):
    ct_rate.repo("dataset", REPO).private = True
    monkeypatch.delenv("HF_TOKEN")
    source = open_source(ADDRESS, "train", CONFIG, token=OWNER)
    with next(iter(source.stream()))["volume"].open() as volume:
        assert volume["bytes"]


@pytest.mark.parametrize(
    ("name", "error"),
    [("x.raw", None), ("voxels/x.raw", None), ("other.raw", "is not beside it"), ("../up.raw", "lie in other files")],
)
def test_voxels_beside_a_header(name, error, hub):
    """Fetched by the name in the header, but never from above it."""
    hu = hu_of("train_1_a_1")
    sizes = " ".join(map(str, hu.shape))
    header = f"NDims = 3\nDimSize = {sizes}\nElementSpacing = 1 1 2\nTransformMatrix = 1 0 0 0 1 0 0 0 1\n"
    header += f"ElementType = MET_SHORT\nElementDataFile = {name}\n"
    voxels = hu.astype("<i2").tobytes(order="F")
    paths = dict.fromkeys(("set/x.raw", "set/voxels/x.raw", "up.raw"), voxels)
    hub.add_files("dataset", "org/own", {"set/x.mhd": header.encode(), **paths})
    row = {"volume": HubFile("org/own", "set/x.mhd", "main")}
    if error is None:
        assert (read_study(row, "SLP").array == hu).all()
        return
    with pytest.raises(VolumeError, match=error):
        read_study(row, "SLP")
    assert hub.count("GET .*up.raw") == 0


def test_what_cannot_be_opened_is_refused_in_one_sentence(hub, monkeypatch):
    hub.create("dataset", REPO, gated=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        DataError, match=r"CT-RATE: access is gated. Accept its terms at .*/datasets/org/CT-RATE, then log in"
    ):
        open_source(ADDRESS, "train", CONFIG)
    with pytest.raises(DataError, match="no such dataset, or it is private"):
        open_source("hf://datasets/org/nothing", "train", CONFIG)
    with pytest.raises(DataError, match="no such revision"):
        hub.create("dataset", "org/open")
        open_source("hf://datasets/org/open", "train", CONFIG, revision="nowhere")
    with pytest.raises(DataError, match="not the address of a dataset"):
        open_source("hf://datasets/alone", "train", CONFIG)
    with pytest.raises(DataError, match="only local folders and hf://datasets/ORG/NAME"):
        open_source("s3://bucket/folder", "train", CONFIG)
    hub.fail("HEAD .*", status=503, times=1000)
    with pytest.raises(DataError, match="cannot be reached"):
        open_source("hf://datasets/org/open", "train", CONFIG)


def test_tables_are_resumed_or_refused_in_a_sentence(ct_rate):
    request = rf"GET /datasets/{REPO}/resolve/\w+/dataset/radiology_text_reports/.*"
    ct_rate.cut_answer(request, after_bytes=100)
    assert open_source(ADDRESS, "train", CONFIG, tune_share=0).num_studies == 10
    assert ct_rate.count(request) == 2
    ct_rate.fail(request, status=503, times=100)
    with pytest.raises(DataError, match=r"CT-RATE: cannot be reached \(HfHubHTTPError\). Check the network"):
        open_source(ADDRESS, "valid", CONFIG)
    assert ct_rate.count(request) == 2 + MAX_RETRIES + 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_requests_for_tables_are_retried(ct_rate, status):
    """Every request at the start: the commit, whether there is a table, and the table itself."""
    tables = ("multi_abnormality_labels", "radiology_text_reports", "metadata/train_", "metadata/no_chest")
    requests = [rf"{method} /.*{table}" for method in ("HEAD", "GET") for table in tables]
    for request in ("HEAD .*gitattributes", *requests):
        ct_rate.fail(request, status=status, times=2)
    assert open_source(ADDRESS, "train", CONFIG, tune_share=0).num_studies == 10
    assert not any(fault.times for fault in ct_rate.faults)
