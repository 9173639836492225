"""The process that decodes: what it survives, what it keeps to itself, and where it can be asked from."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scan_files
from pydicom.uid import JPEGLSLossless

from medct import VolumeError, decoders_medct, dicom_frames_medct, read_volume
from medct.decoders_medct import DecodeError, decode_frame
from medct.inference.studies import find_studies
from medct.volume_io_medct import dicom_slices

SHAPE = (2, 3)
# Does what a frame says.
FAKE = """
import os, time
def get_parameters(frame):
    return {"rows": 2, "columns": 3, "samples_per_pixel": 1, "precision": 16, "is_signed": False}
def decode_pixel_data(frame, version):
    word = bytes(frame).decode()
    if word == "die":
        os.abort()
    if word == "hang":
        time.sleep(100)
    if word == "grow":
        bytearray(2**31)
    if word == "speak":
        os.write(2, b"corrupt data")
    if word == "disk is full" and os.fstat(2).st_size > 1000:
        os.write(2, b"corrupt data")
    if word == "print":
        os.write(1, b"progress: 10 %")
    if word == "raise":
        raise RuntimeError("a text")
    return bytes(11) if word == "short" else (os.getpid() % 2**16).to_bytes(2, "little") * 6
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Helpers of a decoder that does what it is told: `fake(word)` gives the pixels, all of them its process number."""
    (tmp_path / "openjpeg.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(decoders_medct, "SECONDS", 1.0)
    monkeypatch.setattr(decoders_medct, "_helpers", decoders_medct._Helpers())
    yield lambda word: int(decode_frame("openjpeg", word.encode(), SHAPE, 16)[0, 0])
    decoders_medct._helpers.close()


def test_one_helper_serves_one_thread(fake):
    assert len({fake("decode") for _ in range(5)}) == 1
    assert fake("decode") != os.getpid() % 2**16


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("die", "crashes the decoder"),
        ("hang", "too long"),
        ("grow", "too much memory"),
        ("speak", "the decoder reports damage"),
        ("disk is full", "the decoder reports damage"),
        ("raise", "damaged"),
        ("short", "damaged"),
    ],
)
def test_a_bad_frame_is_refused_and_the_next_one_decoded(word, reason, fake, capfd):
    before = fake("decode")
    with pytest.raises(DecodeError, match=reason):
        fake(word)
    lives_on = fake("decode") == before
    assert lives_on == (word not in ("die", "hang"))
    assert fake("print") == fake("decode")  # what is printed does not get among the pixels
    assert len(decoders_medct._helpers.all) == 1
    assert capfd.readouterr() == ("", "")


def test_none_is_started_to_search_for_studies(tmp_path, monkeypatch):
    """Where loader processes read, each has its own."""
    started = []
    monkeypatch.setattr(dicom_frames_medct, "warm_up", lambda: started.append(True))
    folder = scan_files.write_series(tmp_path / "scan", scan_files.make_hu(), scan_files.compress(JPEGLSLossless))
    assert len(find_studies([tmp_path])) == 1
    assert not started
    dicom_slices(folder)
    assert started


def test_a_frame_whose_helper_is_killed_is_decoded_by_another(fake):
    fake("decode")
    (helper,) = decoders_medct._helpers.all
    helper._process.kill()
    helper._process.wait()
    assert fake("decode") != helper._process.pid % 2**16


def test_threads_have_helpers_of_their_own(fake):
    everyone = threading.Barrier(3)

    def decode(_):
        everyone.wait()
        return [fake("decode") for _ in range(20)]

    with ThreadPoolExecutor(3) as pool:
        assert len(list(pool.map(decode, range(3)))) == 3
    assert len(decoders_medct._helpers.all) <= 3
    assert len(decoders_medct._helpers.all) == len(decoders_medct._helpers.idle)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_a_helper_of_its_own(fake):
    mine = fake("decode")
    child = os.fork()
    if child == 0:
        os._exit(0 if fake("decode") != mine else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert fake("decode") == mine


def test_what_cannot_be_started_is_said(fake, monkeypatch):
    monkeypatch.setattr(decoders_medct.sys, "executable", "/no/such/python")
    with pytest.raises(DecodeError, match=r"cannot be started \(No such file"):
        fake("decode")


def test_no_helper_outlives_its_program(tmp_path):
    """Even one that is killed, and a program that guards nothing by `if __name__ == "__main__"`."""
    (tmp_path / "openjpeg.py").write_text(FAKE, encoding="utf-8")
    code = f"""
import os, sys
sys.path[:0] = [{str(tmp_path)!r}, {str(Path(decoders_medct.__file__).parent)!r}]
import decoders_medct as d
d.decode_frame("openjpeg", b"decode", (2, 3), 16)
print(*[helper._process.pid for helper in d._helpers.all], flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), 9)
"""
    for end in ("killed", "ended"):
        run = subprocess.run([sys.executable, "-c", code, end], capture_output=True, encoding="utf-8", check=False)
        assert run.stderr == ""
        pid = int(run.stdout)
        for _ in range(100):
            if not _is_running(pid):
                break
            time.sleep(0.05)
        assert not _is_running(pid)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_two_that_ended_the_process_are_refused(shared):
    folder = shared / "cases/crash"
    for source in (folder / "crash_jpeg/series", folder / "crash_jpegls/enhanced.dcm"):
        with pytest.raises(VolumeError, match="cannot be decoded"):
            read_volume(source)


def test_threads_read_compressed_series_at_once(tmp_path):
    volumes = [scan_files.make_hu((3, 40, 36), seed=seed) for seed in range(6)]
    folders = [
        scan_files.write_series(tmp_path / str(seed), hu, scan_files.compress(JPEGLSLossless))
        for seed, hu in enumerate(volumes)
    ]
    with ThreadPoolExecutor(4) as pool:
        for hu, volume in zip(volumes, pool.map(read_volume, folders), strict=True):
            assert np.array_equal(volume.array, hu.T)
