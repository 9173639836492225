"""Padding of DICOM becomes air wherever its value lies, and tissue never does."""

import numpy as np
import pytest
import scan_files
import SimpleITK
from scan_files import write_series

from medct import VolumeError, read_volume
from medct.dicom_pixels_medct import _from_corners

SHAPE = (3, 40, 48)
Y, X = np.indices(SHAPE[1:])
OUTSIDE = ((Y - 19.5) / 20) ** 2 + ((X - 23.5) / 24) ** 2 > 1
"""Of a round field of view."""


@pytest.fixture
def hu() -> np.ndarray:
    """Air with noise, lung and tissue of 20 to 60 HU, nothing at the corners."""
    noise = np.random.default_rng(0).integers(-20, 21, SHAPE)
    body = ((Y - 20) / 16) ** 2 + ((X - 22) / 18) ** 2 < 1
    lung = ((Y - 18) / 8) ** 2 + ((X - 15) / 5) ** 2 < 1
    return (np.where(lung, -830, np.where(body, 40, -1000)) + noise).astype(np.int16)


def written(
    hu,
    folder,
    padding,
    *,
    bits=16,
    signed=False,
    intercept=-1024,
    slope=1,
    vr=None,
    limit=None,
    where=OUTSIDE,
    **attributes,
):
    """A series with the padding's stored value where the mask says, and with other attributes."""

    def edit(ds, k):
        stored = ((hu[k].astype(np.int64) - intercept) // slope) & 0xFFFF
        stored[where] = padding & (2**bits - 1 if padding >= 0 else 0xFFFF)
        scan_files.set_pixels(ds, stored, bits_stored=bits)
        ds.PixelRepresentation, ds.RescaleIntercept, ds.RescaleSlope = int(signed), intercept, slope
        kind = vr or ("SS" if signed else "US")
        ds.add_new(0x00280120, kind, padding)
        if limit is not None:
            ds.add_new(0x00280121, kind, limit)
        ds.update(attributes)

    return write_series(folder, hu, edit)


def with_air(hu: np.ndarray, where=OUTSIDE) -> np.ndarray:
    hu = hu.copy()
    hu[:, where] = -1000
    return hu


@pytest.mark.parametrize(
    ("padding", "options"),
    [
        (0, {}),
        (1, {}),
        (2500, {}),  # 1476 HU, above all that is there
        (4095, {"bits": 12}),
        (4095, {}),
        (32767, {"signed": True, "intercept": 0}),
        (32767, {}),
        (63536, {}),
        (65535, {}),
        (65535, {"slope": 2}),
        (-2000, {"signed": True, "intercept": 0}),
        (-2000, {"signed": True}),
        (63536, {"signed": True, "intercept": 0, "vr": "US"}),
        (-32768, {"signed": True, "intercept": 0}),
        (-1, {"signed": True, "intercept": 1000, "slope": -1}),
    ],
)
def test_padding_below_and_above_tissue(padding, options, hu, tmp_path):
    if options.get("slope") == -1:
        hu = -hu  # the scale turns it round: stored 1000 is air
        padding, options = 3000, {"signed": True}
        hu = -hu
    folder = written(hu, tmp_path, padding, **options)
    slope = options.get("slope", 1)
    intercept = options.get("intercept", -1024)
    expected = with_air((hu.astype(int) - intercept) // slope * slope + intercept)
    volume = read_volume(folder)
    assert np.array_equal(volume.array, expected.T)
    assert volume.notes == ()
    assert slope != 1 or volume.array.dtype == np.int16


def test_padding_over_the_unused_bits(hu, tmp_path):
    """-2000 as 16 bits in pixels of 12: what is left of it in 12 bits would be bone."""

    def edit(ds, k):
        stored = hu[k].astype(np.int32) + 1024
        stored[OUTSIDE] = -2000
        scan_files.set_pixels(ds, stored, bits_stored=12)
        ds.PixelPaddingValue = 63536

    assert np.array_equal(read_volume(write_series(tmp_path, hu, edit)).array, with_air(hu).T)


@pytest.mark.parametrize(("value", "limit"), [(60000, 65535), (65535, 60000), (63000, 64000)])
def test_a_range_of_padding(value, limit, hu, tmp_path):
    folder = written(hu, tmp_path, 63536, limit=limit)
    for path in folder.iterdir():
        ds = scan_files.pydicom.dcmread(path)
        ds.PixelPaddingValue = value
        ds.save_as(path)
    assert np.array_equal(read_volume(folder).array, with_air(hu).T)


@pytest.mark.parametrize("padding_hu", [-830, 0, 20, 40, 60, 150])
def test_tissue_of_the_padding_value_stays(padding_hu, hu, tmp_path):
    """It is padding only where it surrounds the scan, or where there is none at all."""
    hu[:, 18:22, 20:24] = padding_hu
    assert np.array_equal(read_volume(written(hu, tmp_path / "a", padding_hu + 1024, where=[])).array, hu.T)
    volume = read_volume(written(hu, tmp_path / "b", padding_hu + 1024))
    assert np.array_equal(volume.array, with_air(hu).T)
    assert "tissue has the value of its padding" in " ".join(volume.notes)


@pytest.mark.parametrize("distance", [1, 50, 99, 101, 500])
@pytest.mark.parametrize("where", [OUTSIDE, OUTSIDE & (X < 24), []])
def test_what_does_not_surround_the_scan_is_no_padding(distance, where, hu, tmp_path):
    """However steep the edges of metal are, so that no other voxel comes near."""
    hole = np.s_[:, 25:28, 30:33]
    padding_hu = int(hu.max()) + distance
    hu[hole] = padding_hu
    volume = read_volume(written(hu, tmp_path, padding_hu + 1024, where=where))
    assert (volume.array.T[hole] == padding_hu).all()
    assert (distance < 100 and where is not OUTSIDE) or (volume.array.T[:, where] == -1000).all()
    assert "tissue has the value of its padding, or metal" in " ".join(volume.notes)


@pytest.mark.parametrize(
    ("padding", "is_air"), [(4095, False), (30710 + 1024, False), (30711 + 1024, True), (65535, True)]
)
def test_padding_within_the_scan(padding, is_air, hu, tmp_path):
    """Is padding for certain where it is more than any CT has; one voxel of metal stays what it is."""
    where = OUTSIDE.copy()
    where[26, 30] = True
    volume = read_volume(written(hu, tmp_path, padding, where=where))
    expected = with_air(hu).astype(np.float32)
    expected[:, 26, 30] = -1000 if is_air else padding - 1024
    assert np.array_equal(volume.array, expected.T)
    assert ("3 voxels within the scan" if is_air else "or metal") in " ".join(volume.notes)


@pytest.mark.parametrize("seed", range(5))
def test_padding_is_what_hangs_together_with_a_corner(seed):
    """As SimpleITK's region growing has it, of shapes with bays and islands."""
    noise = SimpleITK.GetImageFromArray(np.random.default_rng(seed).normal(size=(60, 70)))
    mask = SimpleITK.GetArrayFromImage(SimpleITK.DiscreteGaussian(noise, 4.0)) > 0
    corners = [(x, y) for x in (0, 69) for y in (0, 59) if mask[y, x]]
    image = SimpleITK.GetImageFromArray(mask.astype(np.uint8))
    expected = (
        SimpleITK.GetArrayFromImage(SimpleITK.ConnectedThreshold(image, corners, 1, 1)) if corners else mask & False
    )
    assert np.array_equal(_from_corners(mask), expected.astype(bool))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("is_round", [True, False])
def test_small_metal_is_no_padding(seed, is_round, tmp_path):
    """Clips of a few voxels, saturated at the value of the padding, with and without a round field of view."""
    rng, shape = np.random.default_rng(seed), (4, 64, 64)
    y, x = np.indices(shape[1:]) - 31.5
    hu = np.where(y**2 + x**2 < 25**2, 40, -1000) + rng.normal(0, 15, shape)
    for k in range(4):
        clip_y, clip_x = rng.integers(20, 44, 2) - 31.5
        hu[k] += 5000 * rng.uniform(1, 2) * np.exp(-((y - clip_y) ** 2 + (x - clip_x) ** 2) / rng.uniform(0.3, 2))
    hu = hu.clip(-1024, 3071).round().astype(np.int16)
    outside = (y**2 + x**2 > 32**2) & is_round
    volume = read_volume(written(hu, tmp_path, 4095, bits=12, where=outside))
    assert (hu == 3071).any()
    assert np.array_equal(volume.array, with_air(hu, outside).T)


def test_saturated_metal_is_no_padding(hu, tmp_path):
    metal = np.s_[:, 25:28, 28:34]
    hu[metal] = np.linspace(2500, 3071, 54).reshape(3, 3, 6)
    volume = read_volume(written(hu, tmp_path, 4095, bits=12))
    assert np.array_equal(volume.array, with_air(hu).T)


def test_tissue_that_touches_the_edge(hu, tmp_path):
    """A wide patient: padding needs all four corners."""
    hu[:, :, :3] = 0
    assert np.array_equal(read_volume(written(hu, tmp_path, 1024, where=[])).array, hu.T)


@pytest.mark.parametrize(("padding", "signed"), [(0, False), (63536, False), (65535, False), (-2000, True)])
def test_padding_is_no_sign_of_air(padding, signed, hu, tmp_path):
    """Values that were not rescaled show none, however much of a slice is padding."""
    sound = read_volume(written(hu, tmp_path / "sound", padding, signed=signed))
    assert "no air" not in " ".join(sound.notes)
    unscaled = read_volume(written(hu, tmp_path / "unscaled", padding, signed=signed, RescaleIntercept=0))
    assert "it holds no air but its padding" in " ".join(unscaled.notes)
    folder = written(hu, tmp_path / "unit", padding, signed=signed, RescaleIntercept=0, RescaleType="US")
    with pytest.raises(VolumeError, match="its RescaleType is US, not HU, and it shows no air"):
        read_volume(folder)


@pytest.mark.parametrize(("padding", "is_air"), [(-1024, True), (-1000, True), (-2000, False)])
def test_padding_of_an_air_value_is_air(padding, is_air, hu, tmp_path):
    """Air is often cut off at the value of the padding."""
    folder = written(np.full_like(hu, 40), tmp_path, padding, signed=True, intercept=0, RescaleType="US")
    if is_air:
        assert "taken for HU" in " ".join(read_volume(folder).notes)
    else:
        with pytest.raises(VolumeError, match="it shows no air"):
            read_volume(folder)
