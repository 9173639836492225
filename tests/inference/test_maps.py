"""Maps add up to the score they explain, and lie where the scan lies."""

import itertools
import re
import unicodedata

import nibabel
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from medct import CTVolume, MedCTImageProcessor, MedCTModel, ZeroShotCTClassificationPipeline
from medct.inference.maps import (
    CAVEAT,
    FindingMap,
    _highest,
    draw_map,
    file_names,
    map_findings,
    map_scan,
    save_nifti,
    strongest_slice,
    to_scan,
)
from medct.inference.slices import AXIAL, AxialSlices
from medct.resampling_medct import reorient
from medct.volume_io_medct import affine_from_spacing

LABELS = ["a", "b"]


@pytest.mark.parametrize(
    "templates", [None, [("{label} is present", "not {label}"), ("{label} present", "not {label}")]]
)
def test_patches_add_up_to_the_margin(pipe, batch, templates):
    volume = batch["pixel_values"][:1]
    prompts = {"candidate_labels": LABELS} | ({"prompt_templates": templates} if templates else {})
    results = pipe.postprocess(pipe.forward({"pixel_values": volume}, **prompts), **prompts)
    expected = {result["label"]: result for result in results}
    maps = map_findings(pipe, pipe.encode(volume), LABELS, templates)
    assert [finding.label for finding in maps] == LABELS
    for finding in maps:
        assert finding.patches.shape == pipe.model.config.vision_config.grid_size
        assert finding.patches.std() > 0
        assert finding.score == pytest.approx(expected[finding.label]["score"], abs=1e-6)
        assert finding.patches.sum().item() == pytest.approx(expected[finding.label]["logits_margin"], abs=1e-5)


@torch.no_grad()
def test_a_patch_is_its_token_through_its_slice_of_the_projection(pipe, model, batch):
    volume = batch["pixel_values"][:1]
    (finding,) = map_findings(pipe, pipe.encode(volume), ["a"])
    outputs = model.vision_model(pixel_values=volume)
    t, h, w = model.config.vision_config.grid_size
    tokens = outputs.last_hidden_state[0].view(t, h, w, -1)
    weight = model.visual_projection.weight.view(model.config.projection_dim, h, w, -1)
    length = (model.visual_projection.weight @ outputs.pooler_output[0]).norm()
    ((present, absent),) = pipe.prompt_embeds(["a"])
    for z, y, x in itertools.product(range(t), range(h), range(w)):
        part = model.logit_scale((present - absent) @ (weight[:, y, x] @ tokens[z, y, x]) / (t * length))
        assert finding.patches[z, y, x].item() == pytest.approx(part.item(), abs=1e-6)


@pytest.mark.parametrize("orientation", ["SLP", "RAS", "LPI", "PSR"])
def test_values_lie_at_their_patches_in_every_axis_order(orientation):
    """One hot patch; its centre in millimetres is where the map's centre of mass is."""
    processor = MedCTImageProcessor(image_size=(8, 12, 12), target_spacing_mm=(3.0, 2.0, 2.0))
    affine = affine_from_spacing((1.5, 1.0, 2.0), orientation)
    affine[:3, 3] = (5, -7, 11)
    volume = CTVolume(np.zeros((30, 32, 20), np.int16), affine)
    geometry = processor.geometry(volume)
    patches = torch.zeros(4, 3, 3)
    patches[2, 1, 1] = 1
    values = to_scan(patches, (2, 4, 4), geometry, volume.array.shape)
    assert values.shape == volume.array.shape
    assert values.max() == pytest.approx(1, abs=0.3)
    voxels = np.stack(np.meshgrid(*map(np.arange, values.shape), indexing="ij"), -1)
    centre = (values[..., None] * voxels).sum((0, 1, 2)) / values.sum()
    millimetres = affine[:3, :3] @ centre + affine[:3, 3]
    # (position + 0.5) / patch - 0.5 = index
    np.testing.assert_allclose(millimetres, geometry.to_mm((4.5, 5.5, 5.5)), atol=0.5)


def test_interpolation_is_torchs_and_zero_outside():
    """A scan on the model's own grid but for padding: torch's trilinear interpolation of the patches."""
    processor = MedCTImageProcessor(image_size=(8, 12, 12), target_spacing_mm=(3.0, 2.0, 2.0))
    volume = CTVolume(np.zeros((12, 20, 8), np.int16), affine_from_spacing((2.0, 2.0, 3.0), "LPS"))
    patches = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0))
    values = to_scan(patches, (2, 4, 4), processor.geometry(volume), volume.array.shape)
    expected = F.interpolate(patches[None, None], scale_factor=(2.0, 4.0, 4.0), mode="trilinear")[0, 0]
    # y runs along L, x along P: (z, y, x) is (k, i, j), and 8 of 20 voxels along j are cropped away.
    np.testing.assert_allclose(values.transpose(2, 0, 1)[:, :, 4:16], expected, atol=1e-5)
    assert not values[:, :4].any() and not values[:, 16:].any()


@pytest.mark.parametrize("orientation", ["SLP", "RAS", "PSR"])
def test_a_part_of_the_scan_is_that_part(orientation):
    processor = MedCTImageProcessor(image_size=(8, 12, 12), target_spacing_mm=(3.0, 2.0, 2.0))
    volume = CTVolume(np.zeros((30, 32, 20), np.int16), affine_from_spacing((1.5, 1.0, 2.0), orientation))
    patches = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0))
    where = (patches, (2, 4, 4), processor.geometry(volume), volume.array.shape)
    part = (slice(4, 11), slice(None), slice(13, 14))
    np.testing.assert_array_equal(to_scan(*where, part), to_scan(*where)[part])


@pytest.mark.parametrize("orientation", ["SLP", "RAS", "PSR", "LPI"])
def test_the_strongest_slice_is_that_of_the_highest_voxel(orientation):
    processor = MedCTImageProcessor(image_size=(12, 12, 12), target_spacing_mm=(3.0, 2.0, 2.0))
    volume = CTVolume(np.zeros((20, 22, 24), np.int16), affine_from_spacing((1.5, 1.0, 1.5), orientation))
    patches = torch.zeros(6, 3, 3)
    where = (patches, (2, 4, 4), processor.geometry(volume), volume.array.shape)
    slices = AxialSlices.of(volume)
    for z in (1, 2, 4):
        patches[z, 1, 1] += 1 + z  # more than those before
        turned, _ = reorient(CTVolume(to_scan(*where), volume.affine), AXIAL)
        highest = int(turned.reshape(len(turned), -1).max(axis=1).argmax())
        assert abs(strongest_slice(*where, slices) - highest) * slices.spacing_mm[0] <= 1.5
    patches[0] = patches[5] = 100  # of the padding above and below most of the scans
    assert 0 <= strongest_slice(*where, slices) < len(slices)


def test_slices_are_the_highest_and_apart():
    values = np.zeros((12, 3, 3))
    values[:, 1, 1] = [0, 9, 8, 7, 0, 0, 5, 0, 0, 0, 0, 6]
    assert _highest(values, 3, reach=2) == [1, 6, 11]
    assert _highest(values[:2], 4, reach=5) == [1]


def test_files_say_what_they_are_not(tmp_path):
    affine = affine_from_spacing((2.0, 2.0, 3.0), "LPS")
    volume = CTVolume(np.zeros((12, 12, 8), np.int16), affine)
    values = np.random.default_rng(0).normal(size=(12, 12, 8)).astype(np.float32)
    save_nifti(tmp_path / "map.nii.gz", values, affine)
    image = nibabel.load(tmp_path / "map.nii.gz")
    assert image.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(image.affine, affine)
    np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), values)
    assert image.header["descrip"].item().decode() == CAVEAT[:79]
    no_formula = r"a $\x or $"
    draw_map(FindingMap(no_formula, 0.5, 0.0, torch.zeros(1)), values, volume).savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[1:4] == b"PNG"


ALIKE = [
    ["Pleural effusion", "pleural-effusion", "PLEURAL EFFUSION", "pleural effusion!"],
    ["胸腔积液", "心脏扩大"],
    ["Ödem", "O\u0308dem", "Odem", "ödem"],
    ["ﬁbrosis", "fibrosis"],
    ["?", "!", "  ", "😀", "..", "/", "\\"],
    ["x" * 300, "x" * 299, "x" * 300 + "y"],
    ["Straße", "STRASSE"],
]


@pytest.mark.parametrize("labels", [*ALIKE, [label for group in ALIKE for label in group]])
def test_each_label_has_a_file_name_of_its_own_on_every_file_system(labels):
    names = file_names(labels)
    assert len({unicodedata.normalize("NFKD", name).casefold() for name in names}) == len(labels)
    assert all(name.endswith("_debugging-aid") and len(f"{name}.nii.gz".encode()) < 256 for name in names)
    assert all(re.fullmatch(r"[\w-]+", name) and not name.startswith("-") for name in names)


def test_a_file_name_says_its_label():
    names = ["Rib fracture", "胸腔积液", "Ground-glass opacity (GGO), 2 mm"]
    assert file_names(names) == [
        "rib-fracture_debugging-aid",
        "胸腔积液_debugging-aid",
        "ground-glass-opacity-ggo-2-mm_debugging-aid",
    ]
    assert file_names(["A", "a"])[1] == file_names(["b", "a", "A"])[1], "whatever else is asked for in the same order"


def test_one_call_from_a_scan_to_its_maps(pipe, nifti):
    array = np.random.default_rng(0).integers(-1000, 1000, (9, 12, 5)).astype(np.int16)
    scan = nifti(array)
    first, second = map_scan(pipe, str(scan), ["a", "b"])
    scores = {each["label"]: each["score"] for each in pipe(str(scan), candidate_labels=["a", "b"])}
    for label, each in (("a", first), ("b", second)):
        assert each.finding.label == label
        assert each.finding.score == pytest.approx(scores[label], abs=1e-6)
        assert each.values.shape == each.volume.array.shape == (9, 12, 5)
        assert repr(each).startswith(f"ScanMap(FindingMap('{label}', score 0.") and repr(each).count("\n") == 0
        assert "CTVolume(" in repr(each)
    assert first.plot(slices=1)._repr_png_().startswith(b"\x89PNG")
    first.save(scan.parent / "map.nii.gz")
    np.testing.assert_array_equal(nibabel.load(scan.parent / "map.nii.gz").get_fdata(), first.values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_in_half_precision_and_in_inference_mode(converted, processor, batch, dtype):
    """The codebook stays in float32, the projection does not."""
    model = MedCTModel.from_pretrained(converted, dtype=dtype)
    half = ZeroShotCTClassificationPipeline(model=model, processor=processor, device="cpu")
    with torch.inference_mode():
        maps = map_findings(half, half.encode(batch["pixel_values"][:1]), "a")
    assert [finding.label for finding in maps] == ["a"], "one finding may stand alone"
    assert maps[0].patches.sum().item() == pytest.approx(maps[0].logits_margin, abs=0.02)
