"""Preprocessing compared with the recorded original, the specification and itself."""

import itertools
import json
import pickle

import nibabel
import numpy as np
import pytest
import torch
from scan_files import at, make_hu, write_series
from torch.nn import functional as F

from medct import CTVolume, MedCTConfig, MedCTImageProcessor, VolumeError, read_volume, resampling_medct
from medct.resampling_medct import AxisPlan, ScanPart, crop_window, inside, reorient, resampled_length, scale_hu
from medct.volume_io_medct import affine_from_spacing


def by_the_letter(volume: np.ndarray, spacing_mm, target_spacing_mm, size) -> torch.Tensor:
    """The specification's steps 3 to 6 on `(z, y, x)` HU, whole volumes at a time."""
    x = torch.from_numpy(volume.astype(np.float32)).clamp(-1000, 1000)
    shape = [int(n * (s / t)) for n, s, t in zip(x.shape, spacing_mm, target_spacing_mm, strict=True)]
    x = F.interpolate(x[None, None], size=shape, mode="trilinear", align_corners=False)[0, 0] / 1000
    for axis, (length, target) in enumerate(zip(shape, size, strict=True)):
        if length > target:
            x = x.narrow(axis, (length - target) // 2, target)
        else:
            before = (target - length) // 2
            pads = [0] * 6
            pads[4 - 2 * axis : 6 - 2 * axis] = before, target - length - before
            x = F.pad(x, pads, value=-1)
    return x


@pytest.mark.parametrize("case", ["crops_all_axes", "pads_all_axes"])
def test_equals_the_original(shared, case):
    folder = shared / "golden/preprocess"
    facts = json.loads((folder / f"{case}.json").read_text(encoding="utf-8"))
    expected = np.load(folder / f"{case}.expected.npz")
    rescale = {name: facts[name] for name in ("rescale_slope", "rescale_intercept")}
    batch = MedCTImageProcessor()(folder / f"{case}.nii.gz", return_tensors="pt", **rescale)
    pixel_values = batch["pixel_values"][0, 0].numpy()
    assert list(pixel_values.shape) == facts["expected_shape"]
    points = pixel_values[tuple(expected["points"].T)] - expected["values"]
    lattice = pixel_values[::12, ::24, ::24] - expected["lattice"]
    for difference in (np.abs(points), np.abs(lattice)):
        assert difference.max() < 1e-4
        assert difference.mean() < 1e-6
    assert pixel_values.mean(dtype=np.float64) == pytest.approx(float(expected["mean"]), abs=1e-6)
    assert pixel_values.std(dtype=np.float64) == pytest.approx(float(expected["std"]), abs=1e-6)


@pytest.mark.parametrize(
    ("shape", "spacing_mm"),
    [((30, 41, 37), (2.0, 1.3, 0.9)), ((9, 8, 70), (5.0, 0.75, 0.6)), ((16, 24, 24), (1.5, 0.75, 0.75))],
)
def test_equals_the_specification(shape, spacing_mm):
    size, target = (16, 25, 24), (1.5, 0.75, 0.75)
    volume = np.random.default_rng(0).integers(-1100, 1500, shape).astype(np.int16)
    processor = MedCTImageProcessor(image_size=size, target_spacing_mm=target)
    pixel_values = processor(volume, spacing_mm=spacing_mm, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 1, *size)
    expected = by_the_letter(volume, spacing_mm, target, size)
    torch.testing.assert_close(pixel_values[0, 0], expected, atol=1e-5, rtol=0)


ORIENTATIONS = [
    "".join(letters) for axes in itertools.permutations(("LR", "AP", "IS")) for letters in itertools.product(*axes)
]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_all_48_orientations_give_the_same_voxels(orientation):
    volume = np.random.default_rng(0).integers(-1000, 1000, (6, 8, 10)).astype(np.int16)
    image = nibabel.Nifti1Image(volume, affine_from_spacing((3.0, 2.0, 1.0), "SLP"))
    axes = nibabel.orientations.axcodes2ornt(orientation)
    turned = image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), axes))
    assert "".join(nibabel.aff2axcodes(turned.affine)) == orientation
    processor = MedCTImageProcessor(image_size=(6, 8, 10), target_spacing_mm=(3.0, 2.0, 1.0))
    pixel_values = processor(turned, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_values[0, 0], torch.from_numpy(volume / np.float32(1000)))


@pytest.mark.parametrize("orientation", ["SLP", "RAS", "PIL"])
def test_axes_of_an_array_run_as_those_of_the_result(orientation):
    volume = np.random.default_rng(0).integers(-1000, 1000, (6, 8, 10)).astype(np.int16)
    processor = MedCTImageProcessor(image_size=(6, 8, 10), target_spacing_mm=(3, 2, 1), orientation=orientation)
    pixel_values = processor(volume, spacing_mm=(3, 2, 1), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_values[0, 0], torch.from_numpy(volume / np.float32(1000)))


def test_reorient_follows_the_nearest_axes_of_an_oblique_scan():
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-0.7, -0.8, 2.5])
    array = np.arange(24).reshape(2, 3, 4)
    turned, spacing_mm = reorient(CTVolume(array, affine), "SLP")
    np.testing.assert_array_equal(turned, array.transpose(2, 0, 1))
    assert spacing_mm == (2.5, 0.7, 0.8)


@pytest.mark.parametrize(
    ("length", "spacing_mm", "target_mm", "expected"),
    [
        (300, 0.7, 1.5, 139),  # 139.99999999999997 of doubles
        (512, 0.75, 0.75, 512),
        (99, 3.0, 1.5, 198),
        (100, 1.0, 1.5, 66),
        (1, 0.5, 1.5, 1),
        (79, 3.98734, 1.5, 209),
        (79, 315 / 79, 1.5, 210),
        (70, 0.6, 0.75, 55),
    ],
)
def test_resampled_length(length, spacing_mm, target_mm, expected):
    assert resampled_length(length, spacing_mm, target_mm) == expected


def test_resampled_lengths_are_the_originals():
    """Of every spacing that headers write, also with the noise of float32, and round ones with that of a matrix."""
    generator = np.random.default_rng(0)
    spacings = [*np.arange(0.25, 6, 0.05).round(2), *generator.uniform(0.3, 3, 300).round(6)]
    for spacing_mm, target_mm in itertools.product(map(float, spacings), (0.75, 1.5)):
        for length in (*range(20, 700, 13), 300, 512):
            expected = int(length * (spacing_mm / target_mm))
            noise_mm = 3e-7 if round(spacing_mm, 2) == spacing_mm else 0
            for noisy in (spacing_mm, float(np.float32(spacing_mm)), spacing_mm + noise_mm, spacing_mm - noise_mm):
                assert resampled_length(length, noisy, target_mm) == max(1, expected)


@pytest.mark.parametrize("pixels", [256, 400, 480, 512, 640, 693, 768, 800, 920, 1024])
def test_resampled_lengths_of_fields_of_view(pixels):
    """Spacings of more decimals than six: 330 mm over 512 pixels are exactly 440 voxels of 0.75 mm."""
    for field_mm in np.arange(150, 510, 0.5):
        spacing_mm = float(field_mm / pixels)
        expected = int(pixels * (spacing_mm / 0.75))
        for noisy in (spacing_mm, float(np.float32(spacing_mm)), spacing_mm + 1e-8, spacing_mm - 1e-8):
            assert resampled_length(pixels, noisy, 0.75) == expected


@pytest.mark.parametrize("pixels", [340, 512])
def test_spacings_that_fill_a_field_of_view(pixels):
    """As the float32 of a NIfTI and as the text of a DICOM."""
    spacing_mm = 330 / pixels
    for written in (float(np.float32(spacing_mm)), float(f"{spacing_mm:.14g}")):
        volume = CTVolume(np.broadcast_to(np.int16(0), (pixels, pixels, 2)), np.diag([-written, -written, 5, 1]))
        assert volume.spacing_mm == (spacing_mm, spacing_mm, 5.0)


@pytest.mark.parametrize(("spacing_mm", "slices", "expected"), [(0.7, 300, 139), (0.6, 50, 20), (1.1, 150, 110)])
def test_every_format_gives_the_original_number_of_slices(spacing_mm, slices, expected, tmp_path, nifti):
    """As float32 in a NIfTI, as text in a DICOM, and as it is."""
    assert int(slices * (spacing_mm / 1.5)) == expected
    hu = make_hu((slices, 4, 5))
    affine = np.diag([-0.7, -0.8, spacing_mm, 1])
    folder = write_series(
        tmp_path / "dicom", hu, lambda ds, k: setattr(ds, "ImagePositionPatient", at(0, 0, round(spacing_mm * k, 4)))
    )
    for volume in (CTVolume(hu.T, affine), read_volume(nifti(hu.T, affine)), read_volume(folder)):
        array, spacing = reorient(volume, "SLP")
        assert resampled_length(len(array), spacing[0], 1.5) == expected


@pytest.mark.parametrize(
    ("length", "size", "expected"), [(10, 4, (3, 7)), (11, 4, (3, 7)), (4, 4, (0, 4)), (3, 4, (0, 3))]
)
def test_crop_window(length, size, expected):
    assert crop_window(length, size) == expected


def test_resampling_keeps_the_centre():
    ramp = torch.arange(12, dtype=torch.float32).view(12, 1, 1).expand(12, 3, 3)
    part = ScanPart.of(CTVolume(ramp.numpy(), affine_from_spacing((1, 1, 1), "SLP")), "SLP", (2.0, 1.0, 1.0), (4, 3, 3))
    halved = torch.cat(list(part.resampled(-1000, 1000)))
    assert halved[:, 1, 1].tolist() == [2.5, 4.5, 6.5, 8.5]


def test_scale_hu_divides():
    assert scale_hu(torch.tensor([-1000.0, 250.0]), 1000).tolist() == [-1.0, 0.25]


def test_padding_puts_the_odd_voxel_at_the_end():
    out = torch.full((2, 1, 5), torch.nan)
    inside(out, (1, 1, 2), value=-1.0).fill_(1)
    assert out[0, 0].tolist() == [-1, 1, 1, -1, -1]
    assert out[1, 0].tolist() == [-1] * 5


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "u1", "u2", "i4", "f4", "f8"])
def test_any_dtype(dtype):
    volume = np.random.default_rng(0).integers(0, 255, (4, 4, 4)).astype(dtype)
    processor = MedCTImageProcessor(image_size=(4, 4, 4), target_spacing_mm=(1, 1, 1))
    pixel_values = processor(volume, spacing_mm=(1, 1, 1), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_values[0, 0], torch.from_numpy(volume.astype(np.float32)) / 1000)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_torchs_default_precision_is_not_the_results(default):
    """Which whoever trains other models in half precision may have set for the whole process."""
    processor = MedCTImageProcessor(image_size=(6, 8, 8))
    volume = np.random.default_rng(0).integers(-1100, 1500, (7, 9, 5)).astype(np.int16)

    def results():
        with_axes = processor(volume, spacing_mm=(1.5, 1.3, 0.9))["pixel_values"]
        return with_axes, processor.process_volume(read_volume(volume, spacing_mm=(1.5, 1.3, 0.9)))

    expected = results()
    try:
        torch.set_default_dtype(default)
        found = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected)) and {each.dtype for each in found} == {torch.float32}


def test_batches_take_one_value_or_one_each():
    processor = MedCTImageProcessor(image_size=(4, 4, 4), target_spacing_mm=(1, 1, 1))
    volumes = [np.full((4, 4, 4), value, np.int16) for value in (100, 200)]
    together = processor(volumes, spacing_mm=(1, 1, 1), rescale_intercept=[0, -100], return_tensors="np")
    assert together["pixel_values"].shape == (2, 1, 4, 4, 4)
    np.testing.assert_allclose(together["pixel_values"], 0.1)
    with pytest.raises(ValueError, match="3 values were given for 2 images"):
        processor(volumes, spacing_mm=[(1, 1, 1)] * 3)


def test_belongs_to_a_configuration(tmp_path):
    own = {
        "image_size": [20, 40, 40], "target_spacing_mm": [3.0, 2.0, 2.5], "orientation": "RAS",
        "hu_min": -500, "hu_max": 700, "hu_per_unit": 500,
    }  # fmt: skip
    processor = MedCTImageProcessor.from_config(MedCTConfig(vision_config=own).vision_config)
    processor.save_pretrained(tmp_path)
    again = MedCTImageProcessor.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in own} == own
    assert MedCTImageProcessor().to_dict() == MedCTImageProcessor.from_config(MedCTConfig().vision_config).to_dict()


@pytest.mark.parametrize("orientation", ["SLP", "RAS", "LPI", "AIL"])
@pytest.mark.parametrize("shape", [(30, 31, 29), (9, 8, 70)])
def test_geometry_leads_to_the_voxel_and_back(orientation, shape):
    """One bright voxel is found where the geometry says, whether cropped or padded."""
    size = (16, 24, 20)
    affine = affine_from_spacing((1.0, 0.7, 1.4), orientation)
    affine[:3, 3] = 12, -40, 300
    voxel = tuple(length // 2 + shift for length, shift in zip(shape, (1, -1, 2), strict=True))
    array = np.full(shape, -1000, np.int16)
    array[voxel] = 1000
    processor = MedCTImageProcessor(image_size=size, target_spacing_mm=(0.5, 0.4, 0.45))
    batch = processor(CTVolume(array, affine), return_tensors="pt", return_geometry=True)
    (geometry,) = batch["geometry"]
    brightest = np.array(np.unravel_index(int(batch["pixel_values"].argmax()), size))
    step = np.abs(geometry.voxel_of_position[:3, :3]).max(axis=0)
    assert (np.abs(geometry.from_voxel(voxel) - brightest) <= 0.5 / step + 0.5).all()
    np.testing.assert_allclose(geometry.to_voxel(geometry.from_voxel(voxel)), voxel)
    np.testing.assert_allclose(geometry.to_mm(geometry.from_voxel(voxel)), affine[:3] @ [*voxel, 1])
    np.testing.assert_allclose(geometry.from_mm(affine[:3] @ [*voxel, 1]), geometry.from_voxel(voxel))
    assert np.array_equal(pickle.loads(pickle.dumps(geometry)).affine, affine)


@pytest.mark.parametrize("spacing_mm", [(3.0, 1.1, 0.9), (1.5, 0.75, 0.75), (0.9, 0.5, 0.4)])
def test_geometry_is_that_of_the_values(spacing_mm):
    """In a field that is linear in patient millimetres, every value says where it comes from."""
    shape, direction = (20, 30, 34), np.array([4.0, -3.0, 5.0])
    affine = affine_from_spacing(spacing_mm, "SRA")
    affine[:3, 3] = 3, -5, 7
    mm = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    processor = MedCTImageProcessor(image_size=(12, 16, 40), target_spacing_mm=(1.5, 0.75, 0.75))
    batch = processor((mm @ direction).astype(np.float32), affine=affine, return_tensors="np", return_geometry=True)
    positions = np.moveaxis(np.indices((12, 16, 40)), 0, -1)
    voxels = batch["geometry"][0].to_voxel(positions)
    is_inside = ((voxels >= 0) & (voxels <= np.array(shape) - 1)).all(axis=-1)
    assert is_inside.sum() > 1000
    expected = (batch["geometry"][0].to_mm(positions) @ direction).clip(-1000, 1000) / 1000
    np.testing.assert_allclose(batch["pixel_values"][0, 0][is_inside], expected[is_inside], atol=2e-4)


def test_images_are_never_changed():
    array = np.linspace(-3000, 3000, 4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)
    before = array.copy()
    processor = MedCTImageProcessor(image_size=(4, 5, 6), target_spacing_mm=(1, 1, 1))
    processor(array, spacing_mm=(1, 1, 1), return_tensors="pt")
    assert np.array_equal(array, before)


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
def test_memory_order_does_not_matter(axes):
    volume = np.random.default_rng(0).integers(-1000, 1000, (9, 12, 14)).astype(np.int16)
    processor = MedCTImageProcessor(image_size=(6, 16, 8), target_spacing_mm=(1.5, 0.75, 0.8))
    stored = np.ascontiguousarray(volume.transpose(axes)).transpose(np.argsort(axes))
    first, second = (processor(array, spacing_mm=(1, 1.1, 1.2))["pixel_values"] for array in (volume, stored))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)


def test_real_scan_in_two_orientations(shared):
    """The second file is every other voxel of the first, mirrored: the same scan up to what that loses."""
    folder = shared / "realdata/01b_cptac_lscc_chest_nifti_derived"
    files = [folder / f"cptac_C3N-00247_chest_{name}.nii.gz" for name in ("2.26x2.26x3mm_LPS", "4.5x4.5x3mm_RAS")]
    processor = MedCTImageProcessor(image_size=(60, 60, 60), target_spacing_mm=(4.5, 4.5, 4.5))
    first, second = processor(files, return_tensors="pt")["pixel_values"][:, 0]
    assert torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1] > 0.97
    for flipped in ((0,), (1,), (2,), (1, 2)):
        mirrored = torch.stack([first.flatten(), second.flip(flipped).flatten()])
        assert torch.corrcoef(mirrored)[0, 1] < 0.9


@pytest.mark.parametrize(("length", "resampled"), [(4, 8), (5, 13), (9, 4), (7, 6), (1, 3), (2, 11)])
def test_resampling_is_torchs_linear_interpolation_to_the_ends(length, resampled):
    """Beyond the first and the last centre the value there goes on, and is not extrapolated."""
    values = torch.rand(length, 2, 2, generator=torch.Generator().manual_seed(0)) * 2000 - 1000
    plan = AxisPlan.make(length, resampled, (0, resampled))
    lines = values.permute(1, 2, 0)  # (2, 2, length)
    expected = torch.nn.functional.interpolate(lines, resampled, mode="linear", align_corners=False).permute(2, 0, 1)
    torch.testing.assert_close(plan.apply(values, 0), expected, rtol=0, atol=1e-3)  # HU, of a thousand
    assert plan.weight.min() >= 0 and plan.weight.max() <= 1


def test_what_is_listed_belongs_to_one_image_each():
    processor = MedCTImageProcessor(image_size=(8, 8, 8), target_spacing_mm=(2, 2, 2))
    arrays = [np.random.default_rng(k).integers(-1000, 1000, (9, 8, 7)).astype(np.int16) for k in range(3)]
    listed = {
        "affine": [affine_from_spacing((2, 1.5, 3), axes) for axes in ("RAS", "LPS", "SLP")],
        "rescale_slope": [1, 0.5, 0.25],
        "rescale_intercept": [-20, 0, 100],
    }
    together = processor(arrays, return_tensors="pt", **listed)["pixel_values"]
    for k, array in enumerate(arrays):
        alone = processor(array, return_tensors="pt", **{name: values[k] for name, values in listed.items()})
        assert torch.equal(together[k], alone["pixel_values"][0])
    assert len({tensor.numpy().tobytes() for tensor in together}) == 3


@pytest.mark.parametrize("orientation", ["SLP", "RAS", "LPI", "AIL", "PIR"])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "u1", "u2", "i4", "f4", "f8"])
def test_what_crosses_to_a_gpu_gives_the_same_voxels(orientation, dtype, monkeypatch):
    """Packed by a loader process, as integers only where these hold every value, and resampled in larger slabs."""
    values = np.random.default_rng(0).uniform(-1200, 1200, (19, 23, 17))
    stored = values.astype(dtype) if np.dtype(dtype).kind != "u" else np.abs(values / 5).astype(dtype)
    stored = np.asfortranarray(stored) if orientation in ("RAS", "LPI") else stored[::-1]
    volume = CTVolume(stored, affine_from_spacing((1.2, 0.6, 0.9), orientation))
    processor = MedCTImageProcessor(image_size=(16, 18, 12), target_spacing_mm=(1.5, 0.75, 0.8))
    expected = processor.process_volume(volume)
    packed = processor.crop(volume).packed()
    assert packed.values.is_contiguous()
    is_short = dtype in ("<i2", ">i2", "u1")
    assert packed.values.dtype == (torch.int16 if is_short else torch.float32)
    monkeypatch.setattr(resampling_medct, "_SLAB", resampling_medct._SLAB_OF_GPU)
    assert torch.equal(processor.finish(pickle.loads(pickle.dumps(packed))), expected)


def test_fractions_of_a_hu_survive():
    """A slope with fractions gives values that int16 would round."""
    hu = np.random.default_rng(0).integers(-1000, 1000, (9, 12, 14)).astype(np.int16)
    processor = MedCTImageProcessor(image_size=(9, 12, 14), target_spacing_mm=(1, 1, 1))
    volume = read_volume(hu, spacing_mm=(1, 1, 1), rescale_slope=0.3, rescale_intercept=-0.25)
    packed = processor.crop(volume).packed()
    assert packed.values.dtype == torch.float32
    expected = (hu * np.float32(0.3) + np.float32(-0.25)) / 1000
    torch.testing.assert_close(processor.finish(packed), torch.from_numpy(expected), rtol=0, atol=1e-7)


def test_no_more_than_the_crop_crosses():
    """Of a scan that is larger than the model's field, only what the result is made of."""
    volume = CTVolume(np.zeros((60, 50, 40), np.int16), affine_from_spacing((1, 1, 1), "RAS"))
    packed = MedCTImageProcessor(image_size=(8, 10, 12), target_spacing_mm=(2, 1, 1)).crop(volume).packed()
    assert packed.values.shape == (16, 12, 10) or packed.values.shape == (16, 10, 12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_voxels_of_the_cpu():
    volume = CTVolume(
        np.random.default_rng(0).integers(-1200, 1500, (200, 210, 90)).astype(np.int16),
        affine_from_spacing((0.7, 0.8, 1.2), "LPS"),
    )
    processor = MedCTImageProcessor(image_size=(60, 200, 240))
    expected = processor.process_volume(volume)
    found = processor(volume, return_tensors="pt", device="cuda")["pixel_values"][0, 0]
    assert found.is_cuda
    difference = (found.cpu() - expected).abs()
    assert difference.max() < 1e-4 and difference.mean() < 1e-6


def test_what_is_listed_may_be_none_for_some_images(tmp_path):
    processor = MedCTImageProcessor(image_size=(8, 8, 8), target_spacing_mm=(2, 2, 2))
    array = np.random.default_rng(0).integers(-1000, 1000, (9, 8, 7)).astype(np.int16)
    affine, other = affine_from_spacing((2, 1.5, 3), "SLP"), affine_from_spacing((3, 2, 1.5), "RAS")
    volume = CTVolume(array, other)
    for listed, alone in (
        ({"spacing_mm": [None, (2, 1.5, 3)]}, {"spacing_mm": (2, 1.5, 3)}),
        ({"spacing_mm": (None, [2, 1.5, 3])}, {"spacing_mm": (2, 1.5, 3)}),
        ({"affine": [None, affine]}, {"affine": affine}),
        ({"affine": [None, affine], "series": [None, 1]}, {"affine": affine}),
    ):
        together = processor([volume, array], return_tensors="pt", **listed)["pixel_values"]
        assert torch.equal(together[0], processor(volume, return_tensors="pt")["pixel_values"][0])
        assert torch.equal(together[1], processor(array, return_tensors="pt", **alone)["pixel_values"][0])
    assert len(processor([volume] * 3, spacing_mm=[None] * 3)["pixel_values"]) == 3


@pytest.mark.parametrize("name", ["spacing_mm", "affine", "rescale_slope", "rescale_intercept"])
@pytest.mark.parametrize("value", ["abc", [None, "abc"], [[1, 2], [1]], [1, None]])
def test_listed_nonsense_is_refused_in_a_sentence(name, value):
    processor = MedCTImageProcessor(image_size=(8, 8, 8))
    array = np.random.default_rng(0).integers(-1000, 1000, (9, 8, 7)).astype(np.int16)
    geometry = {} if name in ("spacing_mm", "affine") else {"spacing_mm": (1, 1, 1)}
    if (name, value) == ("rescale_slope", [1, None]) or (name, value) == ("rescale_intercept", [1, None]):
        assert processor([array, array], **geometry, **{name: value})
    else:
        with pytest.raises(VolumeError):
            processor([array, array], **geometry, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hu_min", 1000),
        ("hu_max", None),
        ("hu_max", float("nan")),
        ("hu_per_unit", -1000),
        ("image_size", [8, 8]),
        ("image_size", [8.0, 8, 8]),
        ("target_spacing_mm", [0, 1, 1]),
        ("orientation", "XYZ"),
    ],
)
def test_settings_without_a_meaning_are_refused(tmp_path, name, value):
    """Whoever edits the file of a processor; a window without values would make all scans the same."""
    MedCTImageProcessor().save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=name):
        MedCTImageProcessor.from_pretrained(tmp_path)


def test_arguments_that_there_are_not():
    processor = MedCTImageProcessor(image_size=(8, 8, 8))
    array = np.random.default_rng(0).integers(-1000, 1000, (9, 8, 7)).astype(np.int16)
    for name in ("hu_min", "image_size", "orientation"):
        with pytest.raises(TypeError, match=f"'{name}' is set where the processor is made"):
            processor(array, spacing_mm=(1, 1, 1), **{name: -500})
    for name in ("rescale_intersept", "spacing", "do_resize", "size"):
        for call in (processor, processor.preprocess):
            with pytest.raises(TypeError, match=f"There is no argument '{name}'"):
                call(array, spacing_mm=(1, 1, 1), **{name: -1024})
    passed_by_the_library = {"data_format": "channels_first", "disable_grouping": True, "do_resize": None, "size": None}
    assert processor(array, spacing_mm=(1, 1, 1), **passed_by_the_library)


def test_an_empty_list_is_refused():
    for none in ([], ()):
        with pytest.raises(VolumeError, match="images: it is an empty list"):
            MedCTImageProcessor()(none)
