"""Scans of any kind, and files damaged at random: a volume or the project's own error, in bounded time and memory."""

import io
import itertools
import os
import sys
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import damage
import numpy as np
import pytest
import scan_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medct import MedCTImageProcessor, VolumeError, read_volume
from medct.volume_medct import affine_from_spacing

ORIENTATIONS = [
    "".join(letters) for axes in itertools.permutations(("LR", "AP", "IS")) for letters in itertools.product(*axes)
]
MOST_SECONDS = 5.0
MOST_BYTES = 2**25
"""Of memory for a damaged file of a few kilobytes."""


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=hnp.arrays(
        st.sampled_from([np.int16, np.int32, np.uint8, np.uint16, np.float32, np.float64]),
        hnp.array_shapes(min_dims=3, max_dims=3, min_side=2, max_side=9),
        elements=st.integers(0, 255),
    ),
    spacing_mm=st.tuples(*[st.floats(0.2, 8.0)] * 3),
    orientation=st.sampled_from(ORIENTATIONS),
    name=st.sampled_from(["scan.nii", "scan.nii.gz"]),
    rescale=st.sampled_from([(None, None), (1, -1024), (2.5, -100)]),
)
def test_any_volume_on_disk_is_that_volume_in_memory(values, spacing_mm, orientation, name, rescale, nifti):
    values[0, 0, 0] = 2  # no mask
    affine = affine_from_spacing(spacing_mm, orientation)
    options = dict(zip(("rescale_slope", "rescale_intercept"), rescale, strict=True))
    stored = read_volume(nifti(values, affine, name), **options)
    assert np.array_equal(stored.array, read_volume(values, affine=affine, **options).array)
    np.testing.assert_allclose(stored.affine, affine, rtol=1e-6, atol=1e-6)
    processor = MedCTImageProcessor(image_size=(6, 8, 4), target_spacing_mm=(2.0, 1.0, 1.5))
    pixel_values = processor(stored, return_tensors="np")["pixel_values"]
    assert pixel_values.shape == (1, 1, 6, 8, 4)
    assert np.abs(pixel_values).max() <= 1


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(*[st.integers(2, 40)] * 3),
    spacing_mm=st.tuples(*[st.floats(0.3, 6.0)] * 3),
    orientation=st.sampled_from(ORIENTATIONS),
    positions=hnp.arrays(float, (5, 3), elements=st.floats(-20, 60)),
)
def test_every_position_has_a_way_back(shape, spacing_mm, orientation, positions):
    affine = affine_from_spacing(spacing_mm, orientation)
    affine[:3, 3] = 11, -7, 300
    processor = MedCTImageProcessor(image_size=(10, 12, 14), target_spacing_mm=(1.5, 0.75, 0.8))
    volume = read_volume(np.zeros(shape, np.int16), affine=affine)
    geometry = processor.geometry(volume)
    np.testing.assert_allclose(geometry.from_voxel(geometry.to_voxel(positions)), positions, atol=1e-6)
    np.testing.assert_allclose(geometry.from_mm(geometry.to_mm(positions)), positions, atol=1e-6)
    voxels = geometry.to_voxel(positions)
    np.testing.assert_allclose(geometry.to_mm(positions), voxels @ affine[:3, :3].T + affine[:3, 3], atol=1e-6)


def damage_and_read(make_source, count: int, seed: int) -> int:
    """How many of some damaged sources were refused; asserts that the others are volumes."""
    generator, refused = np.random.default_rng(seed), 0
    for attempt in range(count):
        source = make_source(generator)
        irregular = bool(attempt % 2)
        tracemalloc.reset_peak()
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.simplefilter("ignore", UserWarning)  # the project's own
                volume = read_volume(source, resample_irregular=irregular)
            assert volume.array.ndim == 3
            assert np.isfinite(volume.array).all()
        except VolumeError as error:
            refused += 1
            assert "\n" not in str(error)
            assert scan_files.SECRET not in str(error)
            assert error.remedy
        assert time.perf_counter() - start < MOST_SECONDS
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    return refused


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("kind", damage.SOURCES)
def test_damaged_files(kind, tmp_path, traced):
    assert damage_and_read(damage.SOURCES[kind](tmp_path), 30, seed=1) > 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", damage.SOURCES)
def test_thousands_of_damaged_files(kind, tmp_path, traced):
    assert damage_and_read(damage.SOURCES[kind](tmp_path), 1000, seed=2) > 100


# ---------------------------------------------------------------------------------------------------------------------
# What inflates
# ---------------------------------------------------------------------------------------------------------------------

BOMB_BYTES = 2**25
"""More than any of these may take; each bomb is a few hundred kilobytes at most."""


def zip_bomb(method: int, claimed: int) -> bytes:
    """A member of `BOMB_BYTES` zeros of which the directory claims fewer."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", method) as file, file.open("scan.nii", "w") as member:
        for _ in range(BOMB_BYTES // 2**22):
            member.write(bytes(2**22))
    data = bytearray(archive.getvalue())
    for sign, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.rfind(sign) + offset
        data[at : at + 4] = claimed.to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (zipfile.ZIP_DEFLATED, "zip member is damaged"),
        (zipfile.ZIP_BZIP2, "packed in an unusual way"),
        (zipfile.ZIP_LZMA, "packed in an unusual way"),
    ],
)
def test_a_zip_member_gives_no_more_than_its_directory_says(method, reason, traced):
    bomb = zip_bomb(method, 1000)
    tracemalloc.reset_peak()
    with pytest.raises(VolumeError, match=reason):
        read_volume(bomb)
    assert tracemalloc.get_traced_memory()[1] < BOMB_BYTES // 2


def test_a_text_of_voxels_is_read_in_pieces(traced):
    raw = damage.nrrd_bytes("text")
    head = raw[: raw.index(b"\n\n") + 2].replace(b"8 9 7", b"50 50 40")
    tracemalloc.reset_peak()
    volume = read_volume(head + b"7 " * 99_999 + b"-1000")
    assert volume.array.shape == (50, 50, 40)
    assert volume.array[-1, -1, -1] == -1000
    assert tracemalloc.get_traced_memory()[1] < 2**25
    for text in (b"7 " * 99_999, b"7 " * 100_001, b"7"):
        with pytest.raises(VolumeError, match="text encoding"):
            read_volume(head + text)


def test_the_large_run_finds_what_it_is_for(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    import fuzz_reading

    def read(source):
        if len(source) % 7 == 0:
            raise KeyError("foreign")
        if len(source) % 11 == 0:
            os._exit(3)
        raise VolumeError("it", "is damaged", "Copy it")

    monkeypatch.setattr(fuzz_reading, "read_volume", read)
    monkeypatch.setattr(sys, "argv", ["fuzz_reading.py", "--kind", "nifti", "--count", "60"])
    assert fuzz_reading.main() == 1
    told = capsys.readouterr().out
    assert "KeyError escaped" in told
    assert "ended or hung the process" in told
