"""What errors of positions and axes do to voxels decides, and equally in every format."""

from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from scan_files import STEP_MM, at, make_hu, write_series

from medct import CTVolume, VolumeError, dicom_geometry_medct, read_volume
from medct.nifti_io_medct import _qform

REMARK = "voxels off the straight and even grid"


def remarked(volume) -> bool:
    return REMARK in " ".join(volume.notes)


def placed(z_of, count=12, thickness=None, shape=(16, 12)):
    def write(folder, **more):
        def edit(ds, k):
            ds.ImagePositionPatient = at(*z_of(k)) if isinstance(z_of(k), tuple) else at(0, 0, z_of(k))
            if thickness:
                ds.SliceThickness = thickness

        return write_series(folder, make_hu((count, *shape)), edit)

    return write


@pytest.mark.parametrize(
    ("off", "verdict"),
    [(0.0, "read"), (0.08, "read"), (0.12, "remark"), (-0.3, "remark"), (0.45, "remark"), (0.55, "no"), (-0.7, "no")],
)
@pytest.mark.parametrize("step", [0.5, 2.5, 5.0])
def test_one_slice_off_its_place(off, verdict, step, tmp_path):
    folder = placed(lambda k: step * (k + off * (k == 5)))(tmp_path)
    if verdict == "no":
        with pytest.raises(VolumeError, match="slice steps are uneven"):
            read_volume(folder)
        return
    volume = read_volume(folder)
    assert np.array_equal(volume.array, make_hu((12, 16, 12)).T)
    assert volume.spacing_mm[2] == pytest.approx(step)
    assert remarked(volume) == (verdict == "remark")
    assert np.array_equal(read_volume(folder, resample_irregular=True).array, volume.array)


@pytest.mark.parametrize(
    ("step", "digits"),
    [
        (0.625, 1),
        (1.25, 1),
        (0.75, 1),
        (3.27, 1),
        (0.488281, 2),
        (2.5, 0),
        (0.5, 1),
        (0.33, 1),
        (1.5, 0),
        (0.7, 1),
        (6.25, 0),
    ],
)
@pytest.mark.parametrize(("count", "start"), [(7, 0.0), (12, 0.0), (40, -311.37)])
def test_rounded_positions(step, digits, count, start, tmp_path):
    places = [round(start + step * k, digits) for k in range(count)]
    folder = placed(lambda k: places[k], count, thickness=step, shape=(3, 2))(tmp_path)
    for resample_irregular in (False, True):
        volume = read_volume(folder, resample_irregular=resample_irregular)
        assert volume.array.shape == (2, 3, count)
        assert volume.spacing_mm[2] == pytest.approx(step, abs=1e-6)
        assert np.abs(volume.affine[2, 3] + volume.affine[2, 2] * np.arange(count) - 30 - places).max() < step / 2
    rounding = 10.0**-digits / 2 / step
    assert remarked(volume) or rounding <= 0.2
    assert not remarked(volume) or rounding > 0.04


@pytest.mark.parametrize("turn", [(0, 0), (5, 0), (3, 8)], ids=str)
@pytest.mark.parametrize("written", [(), (5.0,)])
@pytest.mark.parametrize(("step", "digits"), [(0.625, 2), (0.75, 1), (0.7, 1), (0.45, 1), (1.25, 1), (3.0, 2)])
def test_a_step_that_rounded_positions_alone_tell(step, digits, written, turn):
    """Is the roundest of those that fit them, so that a scan has as many voxels as its NIfTI, however it is turned."""
    (a, b), (c, d) = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))
    orientation, normal = np.array((b, 0, -d, d * c, a, b * c)), np.array((d * a, -c, b * a))
    for count in range(100, 700, 97):
        for start in np.linspace(-311.375, -310.125, 5).round(3):
            positions = (start + step * np.outer(np.arange(count), normal)).round(digits)
            slices = [
                SimpleNamespace(written_steps_mm=written, position_mm=position, orientation=orientation)
                for position in positions
            ]
            assert dicom_geometry_medct._exact_step(slices, positions @ normal) == step


@pytest.mark.parametrize("digits", [1, 6])
def test_a_step_that_is_written_with_a_sign(digits, tmp_path):
    """As some scanners do, by the direction in which slices were made."""

    def write(sign):
        def edit(ds, k):
            ds.SpacingBetweenSlices, ds.SliceThickness = sign * 0.625, 5
            ds.ImagePositionPatient = [0, 0, round(-311.37 + 0.625 * k, digits)]

        return write_series(tmp_path / str(sign), make_hu((40, 2, 3)), edit)

    affines = [read_volume(write(sign)).affine for sign in (1, -1)]
    assert np.array_equal(*affines)
    assert affines[0][2, 2] == 0.625


@pytest.mark.parametrize(("count", "missing"), [(4, 1), (4, 2), (6, 1), (6, 3), (12, 1), (12, 5), (12, 10), (40, 20)])
@pytest.mark.parametrize("thickness", [2.5, 5.0, None])
def test_a_missing_slice_is_never_read_over(missing, count, thickness, tmp_path):
    folder = placed(lambda k: STEP_MM * (k + (k >= missing)), count - 1, thickness)(tmp_path)
    with pytest.raises(VolumeError, match="slice steps are uneven"):
        read_volume(folder)
    volume = read_volume(folder, resample_irregular=True)
    assert volume.array.shape[2] == count
    assert volume.spacing_mm[2] == pytest.approx(STEP_MM)


@pytest.mark.parametrize("off", [0.55, -0.55, 0.7, -0.7])
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_uneven_slices_are_resampled_to_their_mean_step(missing, off, tmp_path):
    """A slice beside its place makes no other one, and a gap of missing slices is several steps."""
    folder = placed(lambda k: STEP_MM * (k + off * (k == 3) + missing * (k >= 8)))(tmp_path)
    volume = read_volume(folder, resample_irregular=True)
    assert volume.array.shape[2] == 12 + missing
    assert volume.spacing_mm[2] == pytest.approx(STEP_MM)


@pytest.mark.parametrize(
    ("places", "step"),
    [((0, 5, 10, 15, 20, 25, 38), 38 / 8), ((0, 2, 4, 6, 8, 10, 15, 17, 19, 21), 2.1)],
)
def test_a_grid_that_slices_are_interpolated_to_has_the_step_that_it_was_made_with(places, step, tmp_path):
    """Whole positions are not taken for rounded ones of a rounder step: the last slice would lie a millimetre off."""
    volume = read_volume(placed(lambda k: places[k], len(places))(tmp_path), resample_irregular=True)
    assert volume.affine[2, 2] == pytest.approx(step, abs=1e-9)
    assert volume.array.shape[2] == round(places[-1] / step) + 1


@pytest.mark.parametrize("off", [0.0, 0.3])
def test_slices_off_their_place_are_remarked_on_in_a_tilted_stack(off, tmp_path):
    folder = placed(lambda k: tuple((k + off * (k == 5)) * np.array((0, 1.0, STEP_MM))))(tmp_path)
    assert remarked(read_volume(folder, resample_irregular=True)) == bool(off)


@pytest.mark.parametrize(("start", "is_numbered", "is_read"), [(0, True, False), (0, False, True), (0.3, False, False)])
@pytest.mark.parametrize("count", [5, 6])
@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_thickness_that_fits_by_chance(start, is_numbered, is_read, missing, count, tmp_path):
    """Steps of 1.25 mm rounded to whole ones, and of 1 mm with a slice missing, are the same positions."""

    def edit(ds, k):
        if k == missing:
            return False
        ds.ImagePositionPatient, ds.SliceThickness = at(0, 0, start + k), 1.25
        ds.InstanceNumber = k + 1 if is_numbered else k + (k < missing)
        return True

    folder = write_series(tmp_path, make_hu((count, 16, 12)), edit)
    if is_read:
        assert remarked(read_volume(folder))
        return
    with pytest.raises(VolumeError, match="slice steps are uneven"):
        read_volume(folder)
    assert read_volume(folder, resample_irregular=True).spacing_mm[2] == 1


@pytest.mark.parametrize(
    ("pixels", "verdict"), [(0.05, "read"), (0.15, "read"), (0.3, "remark"), (0.9, "remark"), (1.1, "no"), (5, "no")]
)
def test_a_lean_is_the_same_in_every_format(pixels, verdict, tmp_path):
    """In pixels from end to end; shared between both ends, each is half of that off."""
    hu = make_hu((12, 16, 12))
    sideways = pixels * 0.7
    folder = placed(lambda k: (sideways * k / 11, 0.0, STEP_MM * k))(tmp_path / "dicom")
    affine = np.diag([-0.7, -0.8, STEP_MM, 1.0])
    affine[:3, 3], affine[0, 2] = (10, 20, 30), -sideways / 11
    nibabel.save(nibabel.Nifti1Image(hu.T, affine), tmp_path / "scan.nii.gz")
    matrix = (affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0) * [[-1], [-1], [1]]).T
    header = (
        (
            "ObjectType = Image\nNDims = 3\nDimSize = 12 16 12\nElementType = MET_SHORT\nOffset = -10 -20 30\n"
            f"ElementSpacing = 0.7 0.8 {np.linalg.norm(affine[:3, 2])!r}\n"
            f"TransformMatrix = {' '.join(map(repr, matrix.ravel().tolist()))}\nElementDataFile = LOCAL\n"
        )
        .replace("np.float64(", "")
        .replace(")", "")
    )
    (tmp_path / "scan.mha").write_bytes(header.encode() + hu.T.tobytes(order="F"))
    sources = (folder, tmp_path / "scan.nii.gz", tmp_path / "scan.mha", CTVolume(hu.T, affine))
    volumes = []
    for source in sources:
        if verdict == "no":
            with pytest.raises(VolumeError, match=r"off their normal|not perpendicular"):
                read_volume(source)
            continue
        volumes.append(read_volume(source))
        assert np.array_equal(volumes[-1].array, hu.T)
        assert remarked(volumes[-1]) == (verdict == "remark")
        np.testing.assert_allclose(volumes[-1].affine, volumes[0].affine, atol=1e-3)


@pytest.mark.parametrize(("off", "verdict"), [(0.05, "read"), (0.3, "remark"), (0.45, "remark"), (0.6, "no")])
def test_slices_beside_the_line(off, verdict, tmp_path):
    folder = placed(lambda k: (off * 0.7 * (k == 4), 0.0, STEP_MM * k))(tmp_path)
    if verdict == "no":
        with pytest.raises(VolumeError, match="do not lie on a line"):
            read_volume(folder)
    else:
        assert remarked(read_volume(folder)) == (verdict == "remark")


@pytest.mark.parametrize(("digits", "is_read"), [(6, True), (4, True), (3, True), (2, False)])
def test_cosines_of_few_digits(digits, is_read, tmp_path):
    """Of a head rest turned by 5 degrees; a hundredth is two pixels at the edge of an image of 512."""
    angle = np.deg2rad(5.0)
    cosines = np.array([np.cos(angle), np.sin(angle), 0, -np.sin(angle), np.cos(angle), 0])

    def edit(ds, k):
        ds.ImageOrientationPatient = (cosines.round(digits) if k % 2 else cosines).tolist()

    folder = write_series(tmp_path, make_hu(), edit)
    if is_read:
        read_volume(folder)
    else:
        with pytest.raises(VolumeError, match="its orientation"):
            read_volume(folder)


AFFINE = np.diag([-0.7, -0.8, 2.5, 1.0])


def nifti_bytes(qform_code: int, sform_code: int, **fields) -> bytes:
    """A header that no library would write."""
    array = make_hu((12, 16, 10))
    header = nibabel.Nifti1Header()
    header.set_data_dtype("<i2")
    header.set_data_shape(array.shape)
    header.set_zooms((0.7, 0.8, 2.5))
    header.set_qform(AFFINE, qform_code)
    header.set_sform(AFFINE, sform_code)
    header["vox_offset"], header["magic"], header["scl_slope"] = 352, b"n+1", 1
    for name, value in fields.items():
        if name == "qfac":
            header["pixdim"][0] = value
        else:
            header[name] = value
    return header.binaryblock + bytes(4) + array.tobytes(order="F")


@pytest.mark.parametrize("noise", [0, 1e-7, 1e-6, 1e-4, 5e-3])
@pytest.mark.parametrize("qfac", [1, 0, np.nan, 7])
@pytest.mark.parametrize(("qform_code", "sform_code"), [(1, 1), (1, 0)])
def test_noise_of_a_quaternion(noise, qfac, qform_code, sform_code):
    volume = read_volume(nifti_bytes(qform_code, sform_code, quatern_d=1 + noise, qfac=qfac))
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert volume.notes == ()


def test_a_sign_of_pixdim_says_nothing_beside_an_sform():
    content = nifti_bytes(0, 1, pixdim=[1, -0.7, 0.8, 2.5001, 0, 0, 0, 0])
    for source in (content, nibabel.Nifti1Image.from_bytes(content)):
        volume = read_volume(source)
        np.testing.assert_allclose(volume.affine, AFFINE @ np.diag([1, 1, 2.5001 / 2.5, 1]), atol=1e-6)
        assert volume.notes == ()


@pytest.mark.parametrize("length", [1.02, 2.0, 1e9, np.nan])
def test_what_is_no_quaternion(length):
    with pytest.raises(VolumeError, match="orientation cannot be read"):
        read_volume(nifti_bytes(1, 0, quatern_d=length))
    volume = read_volume(nifti_bytes(1, 1, quatern_d=length))
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
    assert "its qform disagrees with its sform" in " ".join(volume.notes)


HALF = 0.5**0.5


@pytest.mark.parametrize("turn", [(0.1, 0.2, 0.3), (0, 0.05, 0), (0.7, 0.1, 0), (0, 0, 1), (HALF, HALF, 0)])
@pytest.mark.parametrize("qfac", [-1, 1])
def test_quaternions_are_those_of_nibabel(turn, qfac):
    fields = dict(zip(("quatern_b", "quatern_c", "quatern_d"), turn, strict=True))
    image = nibabel.Nifti1Image.from_bytes(nifti_bytes(1, 0, qfac=qfac, **fields))
    np.testing.assert_allclose(_qform(image.header), image.affine, atol=1e-5)


@pytest.mark.parametrize(("shift", "is_remarked"), [(0.0, False), (0.05, False), (0.1, True), (50, True)])
def test_a_qform_elsewhere_is_remarked_on(shift, is_remarked):
    volume = read_volume(nifti_bytes(1, 1, qoffset_x=shift))
    assert volume.affine[0, 3] == 0
    assert bool(volume.notes) == is_remarked


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_single_slice_is_no_volume_in_any_format(axis, tmp_path):
    array = make_hu((12, 16, 10)).take([4], axis)
    nibabel.save(nibabel.Nifti1Image(array, AFFINE), tmp_path / "scan.nii.gz")
    header = (
        f"ObjectType = Image\nNDims = 3\nDimSize = {' '.join(map(str, array.shape))}\nElementType = MET_SHORT\n"
        "ElementSpacing = 0.7 0.8 2.5\nElementDataFile = LOCAL\n"
    )
    (tmp_path / "scan.mha").write_bytes(header.encode() + array.tobytes(order="F"))
    image = nibabel.Nifti1Image(array, AFFINE)
    sources = (tmp_path / "scan.nii.gz", tmp_path / "scan.mha", CTVolume(array, AFFINE), image)
    for source, options in (*((source, {}) for source in sources), (array, {"affine": AFFINE})):
        with pytest.raises(VolumeError, match=r"one slice .* which is not a volume"):
            read_volume(source, **options)


def test_axes_that_are_rounded_are_made_perpendicular(tmp_path):
    """As a scan lies turned by half a degree in a header with three decimals."""

    def edit(ds, k):
        ds.ImageOrientationPatient = [1.0, 0.009, 0.0, -0.008, 1.0, 0.0]

    affine = read_volume(write_series(tmp_path, make_hu(), edit)).affine[:3, :3]
    axes = affine / np.linalg.norm(affine, axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), rtol=0, atol=1e-12)


def test_a_step_with_the_six_digits_of_c_has_all_of_its_digits(tmp_path):
    """315 mm in 79 slices, as a header has it: 3.98734."""
    step = 315 / 79

    def edit(ds, k):
        ds.SpacingBetweenSlices = "3.98734"
        ds.ImagePositionPatient = [0, 0, f"{step * k:.6g}"]

    assert read_volume(write_series(tmp_path, make_hu((79, 2, 3)), edit)).affine[2, 2] == step


def test_a_rounded_position_of_the_first_slice_does_not_move_the_scan(tmp_path):
    def edit(ds, k):
        ds.SpacingBetweenSlices, ds.ImagePositionPatient = 0.73, [0, 0, round(0.43 + 0.73 * k, 1)]

    start = read_volume(write_series(tmp_path, make_hu((31, 2, 3)), edit)).affine[2, 3]
    assert start == pytest.approx(0.43, abs=0.01)


@pytest.mark.parametrize("skew", [0.0, 0.003, -0.009])
def test_axes_that_are_almost_perpendicular_do_not_move_the_scan(tmp_path, skew):
    """However far from the origin it lies: axes that are not perpendicular would lead elsewhere than they came from."""

    def edit(ds, k):
        ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, skew, 1, 0], [-250, -240, 2.5 * k]

    affine = read_volume(write_series(tmp_path, make_hu((4, 2, 3)), edit)).affine
    assert affine[:3, 3] == pytest.approx([250, 240, 0], abs=1e-6)
    assert affine[:3, 0] @ affine[:3, 1] == pytest.approx(0, abs=1e-9)
