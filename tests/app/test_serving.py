"""The example of docs/serving.md, on loopback: many requests at once, and bad files among them."""

import gzip
import io
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scan_files import SECRET, make_hu, write_series

import medct

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
ROOT = Path(medct.__file__).parent
REQUESTS = 50


def example() -> str:
    text = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```py\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return code


@pytest.fixture
def served(converted, monkeypatch):
    """Names of the example, with the address that it is served at."""
    monkeypatch.setenv("MEDCT_MODEL", str(converted))
    names: dict = {}
    exec(compile(example(), "serving.md", "exec", dont_inherit=True), names)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(names["app"], port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    names["address"] = f"http://127.0.0.1:{port}"
    yield names
    server.should_exit = True
    thread.join(10)


def post(served: dict, body: bytes) -> tuple[int, dict]:
    request = urllib.request.Request(f"{served['address']}/predict", body, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def nifti_bytes(seed: int) -> bytes:
    array = np.random.default_rng(seed).integers(-1000, 1000, (9, 12, 5)).astype(np.int16)
    return gzip.compress(nibabel.Nifti1Image(array, np.diag([-3.0, -2, 4, 1])).to_bytes())


def zip_of_series(tmp_path, edit=None) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for path in write_series(tmp_path, make_hu((4, 12, 12)), edit).iterdir():
            archive.write(path, path.name)
    return stream.getvalue()


def test_fifty_requests_at_once_get_their_own_answers(served, tmp_path):
    scans = [*(nifti_bytes(seed) for seed in range(4)), zip_of_series(tmp_path / "good")]
    expected = [{each["label"]: each["score"] for each in served["pipe"](scan)} for scan in scans]
    bad = [b"nothing", b"", scans[0][:200], zip_of_series(tmp_path / "bad", lambda ds, k: k != 1)]
    sent = [(scans[index % 5], index % 5) for index in range(REQUESTS - 12)]
    for index in range(12):
        sent.insert(4 * index, (bad[index % 4], None))
    assert len(sent) == REQUESTS
    with ThreadPoolExecutor(REQUESTS) as pool:
        answers = list(pool.map(lambda one: post(served, one[0]), sent))
    for (_, which), (status, answer) in zip(sent, answers, strict=True):
        if which is None:
            assert status == 422 and answer["detail"].endswith(".") and SECRET not in answer["detail"]
            assert "`" not in answer["detail"], "who posts a scan has no arguments of Python"
        else:
            assert status == 200
            scores = {each["label"]: each["score"] for each in answer["findings"]}
            assert scores == pytest.approx(expected[which], abs=1e-6)
    with urllib.request.urlopen(f"{served['address']}/health") as answer:
        assert json.load(answer)["waiting"] == 0


def test_limits_are_kept(served):
    scan = nifti_bytes(0)
    served["MAX_BYTES"] = 100
    assert post(served, scan)[0] == 413
    served["MAX_BYTES"], served["MOST_WAITING"] = 10**6, 0
    assert post(served, scan)[0] == 503
    served["MOST_WAITING"], served["TIMEOUT_S"] = 4, 0
    assert post(served, scan)[0] == 504
    served["TIMEOUT_S"] = 60
    assert post(served, scan)[0] == 200 and served["waiting"] == 0


def test_the_image_is_made_of_what_is_here():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", text)
    assert all(re.search(rf"^{extra} = \[", declared, re.MULTILINE) for extra in extras.split(","))
    assert "http" not in text, "from the registries alone"
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".git", ".venv"} <= set(ignored)
