"""The rules for values and space."""

import warnings

import numpy as np
import pytest

from medct import CTVolume, VolumeError, VolumeWarning, read_volume
from medct.volume_medct import (
    affine_from_spacing,
    check_values,
    is_straight,
    obliqueness_of,
    rescale_to_hu,
    shear_of,
    straighten,
    voxels_off,
)

AXIAL = np.diag([-1.0, -1.0, 2.0, 1.0])


def turned(degrees: float, affine: np.ndarray = AXIAL) -> np.ndarray:
    """An affine rotated about the patient's x axis."""
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn = np.eye(4)
    turn[1:3, 1:3] = [[cosine, -sine], [sine, cosine]]
    return turn @ affine


@pytest.mark.parametrize(
    ("dtype", "slope", "intercept", "expected"),
    [
        ("i2", 1, -1024, "i2"),
        ("u2", 1, -1024, "i2"),
        ("i4", 1, -8192, "i2"),
        ("i2", 2, -1024, "f4"),
        ("i2", 1, 0.5, "f4"),
        ("i2", 1, 40000, "f4"),
        ("f8", 1, -1024, "f4"),
    ],
)
def test_rescale_takes_the_smallest_exact_type(dtype, slope, intercept, expected):
    array = np.asfortranarray(np.arange(24).reshape(2, 3, 4) * 100).astype(dtype, order="F")
    hu = rescale_to_hu(array, slope, intercept)
    assert hu.dtype == expected
    assert hu.flags.f_contiguous
    np.testing.assert_array_equal(hu, array.astype(float) * slope + intercept)


def test_rescale_leaves_hu_alone():
    array = np.zeros((2, 2, 2), np.int16)
    assert rescale_to_hu(array, 1, 0) is array


def judge(lowest: float, highest: float, dtype="f4") -> tuple[str, ...]:
    return check_values(CTVolume(np.linspace(lowest, highest, 27).reshape(3, 3, 3).astype(dtype), AXIAL, "scan"))


@pytest.mark.parametrize(("lowest", "highest"), [(0, 1), (-1, 1), (0.2, 0.9)])
def test_scaled_values_are_refused(lowest, highest):
    with pytest.raises(VolumeError, match="which no scan in HU does"):
        judge(lowest, highest)


def test_masks_are_refused():
    with pytest.raises(VolumeError, match=r"within 0\.\.1"):
        judge(0, 1, "u1")


@pytest.mark.parametrize(
    ("lowest", "highest", "remark"),
    [
        (0, 255, "windowed picture or labels"),
        (0, 3000, "no air"),
        (-200, 900, "no air"),
        (-1024, 3071, None),
        (-1000, 30710, None),
        (-1000, 30711, "more than any CT has"),
    ],
)
def test_values_are_remarked_on(lowest, highest, remark):
    remarks = judge(lowest, highest)
    assert len(remarks) == (remark is not None)
    assert remark is None or remark in remarks[0]


@pytest.mark.parametrize(("count", "is_remarked"), [(0, True), (9, True), (10, False), (499, False), (500, False)])
def test_a_scan_holds_tissue(count, is_remarked):
    array = np.linspace(-1000, -600, 500, dtype="f4").reshape(5, 10, 10)
    array.reshape(-1)[:count] = 40
    remarks = check_values(CTVolume(array, AXIAL, "scan"))
    assert bool(remarks) == is_remarked
    assert not is_remarked or "hardly any tissue" in remarks[0]


def test_a_scan_that_is_rescaled_twice_is_remarked_on():
    hu = np.full((64, 64, 70), -1000, np.int16)
    hu[16:48, 16:48] = 40
    hu[30:34, 30:34] = 900
    assert check_values(CTVolume(hu, AXIAL, "scan")) == ()
    (remark,) = check_values(CTVolume(hu - np.int16(1024), AXIAL, "scan"))
    assert "rescaled twice" in remark


def test_a_single_value_is_not_judged():
    assert judge(0, 0) == ()


def test_remarks_are_warnings_once():
    array = np.arange(27, dtype=np.int16).reshape(3, 3, 3)
    with pytest.warns(VolumeWarning, match=r"^array \(3, 3, 3\): its values lie within 0\.\.26") as caught:
        volume = read_volume(array, affine=AXIAL)
    assert len(caught) == len(volume.notes) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_volume(volume).notes == volume.notes


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_numbers(value):
    array = np.linspace(-1000, 1000, 27).reshape(3, 3, 3)
    array[1, 1, 1] = array[2, 0, 0] = value
    with pytest.raises(VolumeError, match="2 of its 27 voxels are NaN or infinite"):
        read_volume(array, affine=AXIAL)


@pytest.mark.parametrize("spacing_mm", [(1, 0, 1), (1, -1, 1), (1, np.nan, 1), (1, 1), 2.0])
def test_spacings_are_positive(spacing_mm):
    with pytest.raises(VolumeError, match="its spacing is"):
        read_volume(np.zeros((2, 2, 2), np.int16), spacing_mm=spacing_mm)


@pytest.mark.parametrize(
    "affine", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.diag([1, 1, 1, 2]), np.diag([1e8, 1, 1, 1])]
)
def test_affines_that_place_nothing(affine):
    with pytest.raises(VolumeError, match="affine is singular"):
        read_volume(np.zeros((2, 2, 2), np.int16), affine=affine)


@pytest.mark.parametrize(("degrees", "straight"), [(0, True), (9.9, True), (10.1, False), (45, False)])
def test_tolerance_of_oblique_scans(degrees, straight):
    affine = turned(degrees)
    assert obliqueness_of(affine) == pytest.approx(degrees, abs=1e-3)
    assert is_straight(affine) == straight
    array = np.linspace(-1000, 1000, 27).reshape(3, 3, 3)
    if straight:
        read_volume(array, affine=affine)
    else:
        with pytest.raises(VolumeError, match=f"{degrees:.1f} degrees off the patient's"):
            read_volume(array, affine=affine)


def test_ct_rate_second_version_is_never_rescaled(nifti, tmp_path):
    path = nifti(np.linspace(-1000, 1000, 27).reshape(3, 3, 3).astype(np.int16))
    fixed = tmp_path / "train_fixed" / "train_1" / "train_1_a_1.nii.gz"
    fixed.parent.mkdir(parents=True)
    fixed.write_bytes(path.read_bytes())
    read_volume(path, rescale_slope=1, rescale_intercept=-1024)
    read_volume(fixed)
    read_volume(fixed, rescale_slope=1, rescale_intercept=0)
    with pytest.raises(VolumeError, match=r"second version .* computed twice"):
        read_volume(fixed, rescale_slope=1, rescale_intercept=-1024)


@pytest.mark.parametrize("affine", [turned(20), turned(45), AXIAL + np.eye(4, k=2) * [0, 0, 0.7, 0]])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_straighten_keeps_a_field_where_it_is(affine, dtype):
    shape, direction = (12, 14, 10), np.array([20.0, -30, 40])
    voxels = np.moveaxis(np.indices(shape), 0, -1)
    mm = voxels @ affine[:3, :3].T + affine[:3, 3]
    volume = CTVolume((mm @ direction).astype(dtype), affine, "scan")
    straight = straighten(volume)
    assert shear_of(straight.affine) < 1e-6
    assert obliqueness_of(straight.affine) < 1e-3
    assert straight.array.dtype == dtype
    assert "straight" in straight.notes[-1]
    points = np.moveaxis(np.indices(straight.array.shape), 0, -1) @ straight.affine[:3, :3].T + straight.affine[:3, 3]
    inside = np.linalg.inv(affine)
    where = points @ inside[:3, :3].T + inside[:3, 3]
    is_inside = ((where >= 0) & (where <= np.array(shape) - 1)).all(axis=-1)
    assert is_inside.sum() > 0.2 * volume.array.size
    np.testing.assert_allclose(straight.array[is_inside], (points @ direction)[is_inside], atol=1.6)
    assert (straight.array[((where < -0.1) | (where > np.array(shape) - 0.9)).any(axis=-1)] == -1000).all()


@pytest.mark.parametrize("spacing_mm", [0.1, 0.3, 0.7, 0.976562])
@pytest.mark.parametrize("origin_mm", [-123.4, 7.7, -310.55])
def test_a_straight_grid_stays_what_it_is(spacing_mm, origin_mm):
    affine = np.diag([-spacing_mm, -spacing_mm, spacing_mm, 1])
    affine[:3, 3] = origin_mm, -origin_mm, 1.1 * origin_mm
    array = np.random.default_rng(0).integers(-1000, 1000, (12, 14, 10)).astype(np.int16)
    straight = straighten(CTVolume(array, affine, "scan", ("an earlier remark",)))
    np.testing.assert_array_equal(straight.array, array[::-1, ::-1])
    assert straight.notes[0] == "an earlier remark"


def test_the_voxel_that_is_farthest_off_is_a_corner():
    shape, generator = (5, 7, 4), np.random.default_rng(0)
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape) - 1)
    for _ in range(20):
        difference = generator.normal(size=(3, 4)) / 10
        other = AXIAL + np.vstack([difference, np.zeros(4)])
        off = corners @ difference[:, :3].T + difference[:, 3]
        expected = np.abs(off / np.diag(AXIAL)[:3]).max()
        assert voxels_off(AXIAL, shape, other) == pytest.approx(expected)


def test_straighten_refuses_grids_out_of_proportion():
    affine = affine_from_spacing((1, 1, 1), "RAS")
    affine[0, 2] = 5000.0
    with pytest.raises(VolumeError, match="a straight grid around it"):
        read_volume(np.linspace(-1000, 1000, 10**6).reshape(100, 100, 100), affine=affine, resample_irregular=True)


def test_a_straight_grid_holds_every_corner():
    shape = np.array((12, 14, 10))
    volume = CTVolume(np.zeros(shape, np.int16), turned(30), "scan")
    straight = straighten(volume)
    corners = np.array(list(np.ndindex(2, 2, 2))) * (shape - 1)
    mm = corners @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    to_straight = np.linalg.inv(straight.affine)
    places = mm @ to_straight[:3, :3].T + to_straight[:3, 3]
    assert (places > -1).all()
    assert (places < np.array(straight.array.shape)).all()
    assert straight.array.size < 3 * volume.array.size


@pytest.mark.parametrize(("lowest", "has_air"), [(-501, True), (-500, True), (-499, False), (-800, True)])
def test_air_lies_at_500_hu_below_water_or_lower(lowest, has_air):
    assert bool(judge(lowest, 900)) != has_air
