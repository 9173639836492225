"""Where a score comes from: what each patch of a scan adds to the logits margin of a finding. A debugging aid.

Published CT-CLIP localises poorly: its similarity maps overlap with annotated findings at a Dice of about 0.004. So a
map shows what moved this score, not where a finding is.

How: the margin is `scale * (u / |u|) . d`, where `d` is the embedding of "present" minus that of "not present" and
`u` the scan's embedding before normalisation to length 1. `u` is a linear function of the tokens: they are averaged
along z, laid end to end and multiplied by a matrix. So each token's part of the margin is exact, and the parts add up
to the margin itself. What it leaves out: a token has seen the whole scan through attention before it is pooled.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from matplotlib.cm import ScalarMappable

from medct.image_processing_medct import VolumeGeometry
from medct.inference.slices import AXIAL, WIDE_WINDOW_HU, AxialSlices, draw_places, draw_slice, fonts
from medct.pictures_medct import Picture
from medct.pipeline_medct import ZeroShotCTClassificationPipeline
from medct.resampling_medct import AxisPlan, reorient
from medct.volume_io_medct import Assumed, read_volume
from medct.volume_medct import CTVolume

CAVEAT = "Debugging aid, not a finding: published CT-CLIP localises poorly (Dice about 0.004)"
# Least distance between two slices in a picture; the published model's patches are 15 mm thick.
_APART_MM = 15
_LONGEST_NAME_BYTES = 180
"""File systems take 255 of the whole name."""


@dataclass(frozen=True)
class FindingMap:
    """What the patches of one scan add to the margin of one finding.

    Args:
        label: The finding.
        score: The pipeline's score.
        logits_margin: The pipeline's margin; the sum of `patches`.
        patches: `(z, y, x)`, one number per token.
    """

    label: str
    score: float
    logits_margin: float
    patches: torch.Tensor

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.patches.shape))
        return f"FindingMap({self.label!r}, score {self.score:.3f}, margin {self.logits_margin:+.2f}, {shape} patches)"


@torch.no_grad()
def map_findings(
    pipe: ZeroShotCTClassificationPipeline,
    encoded: Mapping[str, torch.Tensor],
    labels: Sequence[str] | Mapping[str, Any] | None = None,
    templates: Sequence[Sequence[str]] | None = None,
) -> list[FindingMap]:
    """Decompose the scores of a scan into its patches.

    Args:
        pipe: With or without an adapter.
        encoded: One scan, from the pipeline's `encode`.
        labels: Findings, see the pipeline's `candidate_labels`.
        templates: See the pipeline; the results are averaged.

    Returns:
        One map per finding, in the order of the labels.
    """
    model = pipe.model
    _, height, width = model.config.vision_config.grid_size
    _, prompts, _ = pipe._sanitize_parameters(labels or None, templates)
    names = list(prompts.get("candidate_labels", pipe.asked.label_names))
    results = {result["label"]: result for result in pipe.postprocess(pipe.forward(encoded, **prompts))}

    tokens = encoded["last_hidden_state"][0].to(pipe.device).unflatten(0, (-1, height * width))  # (z, y * x, d)
    pooled = tokens.mean(dim=0).flatten()[None].to(model.vision_model.precision)
    length = model.visual_projection(pooled).float().norm()
    text_embeds = torch.stack(pipe.prompt_embeds(**prompts)).mean(dim=0)
    present, absent = text_embeds.unflatten(0, (-1, 2)).unbind(1)  # (labels, dim) each
    maps = []
    for label, direction in zip(names, present - absent, strict=True):
        places = _pull_back(model.visual_projection, direction, pooled).view(height * width, -1)
        patches = model.logit_scale((tokens.float() * places).sum(-1) / (len(tokens) * length))
        score, margin = results[label]["score"], results[label]["logits_margin"]
        maps.append(FindingMap(label, score, margin, patches.float().unflatten(1, (height, width)).cpu()))
    return maps


def _pull_back(projection: torch.nn.Module, direction: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """How much each input of a linear module, adapted or not, adds along an output direction; same shape as `like`."""
    with torch.inference_mode(False), torch.enable_grad():
        inputs, direction = torch.zeros_like(like, requires_grad=True), direction.clone()
        return torch.autograd.grad((projection(inputs).float() @ direction).sum(), inputs)[0].float()


def grid_in(
    pipe: ZeroShotCTClassificationPipeline, volume: CTVolume
) -> tuple[Sequence[int], VolumeGeometry, Sequence[int]]:
    """How patches lie in a scan: `patch_size`, `geometry` and `shape`, as `to_scan` takes them.

    Args:
        pipe: The model's pipeline.
        volume: The scan.
    """
    geometry = pipe.processor.image_processor.geometry(volume)
    return pipe.model.config.vision_config.patch_size, geometry, volume.array.shape


def to_scan(
    patches: torch.Tensor,
    patch_size: Sequence[int],
    geometry: VolumeGeometry,
    shape: Sequence[int],
    part: Sequence[slice] = (slice(None),) * 3,
) -> np.ndarray:
    """Values of patches at the voxels of the scan, linear between the patches' centres, 0 outside the patches.

    Args:
        patches: `(z, y, x)`.
        patch_size: Voxels of `pixel_values` in a patch, `(z, y, x)`.
        geometry: The scan's geometry.
        shape: The scan's shape, `(i, j, k)`.
        part: Of the scan, which voxels along each axis; all by default.

    Returns:
        `(i, j, k)`, float32, of that part.
    """
    # The axis of `pixel_values` that each axis of the scan runs along.
    rows = np.abs(geometry.voxel_of_position[:3, :3]).argmax(axis=1)
    values = patches.float().permute(*rows.tolist())
    for axis, row in enumerate(rows):
        wanted = np.arange(shape[axis])[part[axis]]
        voxels = np.zeros((len(wanted), 3))
        voxels[:, axis] = wanted
        # Centres are whole numbers in both systems of coordinates.
        positions = (torch.from_numpy(geometry.from_voxel(voxels)[:, row]).float() + 0.5) / patch_size[row] - 0.5
        last = patches.shape[row] - 1
        is_inside = (positions >= -0.5) & (positions <= last + 0.5)
        positions = positions.clamp(0, last)
        lower = positions.long()
        values = AxisPlan(lower, (lower + 1).clamp(max=last), positions - lower).apply(values, axis)
        values = values * is_inside.view([-1 if dim == axis else 1 for dim in range(3)])
    return values.numpy()


def strongest_slice(
    patches: torch.Tensor,
    patch_size: Sequence[int],
    geometry: VolumeGeometry,
    shape: Sequence[int],
    slices: AxialSlices,
) -> int:
    """The axial slice with the highest value, to a quarter of a patch.

    Args:
        patches, patch_size, geometry, shape: See `to_scan`.
        slices: The scan.

    Returns:
        From 0, at the feet.
    """
    voxels = np.abs(geometry.voxel_of_position[:3, :3]) @ patch_size  # of a patch, along each axis of the scan
    steps = [max(1, int(length / 4)) for length in voxels]
    values = to_scan(patches, patch_size, geometry, shape, [slice(None, None, step) for step in steps])
    highest = np.unravel_index(values.argmax(), values.shape)
    return slices.flipped(int(highest[slices.axis]) * steps[slices.axis])


def file_names(labels: Sequence[str]) -> list[str]:
    """A name for the files of each label, without suffix: telling, and its own on every file system.

    Letters and digits of any script stay, lower-case, and all else becomes "-". What several labels have in common so,
    or a file system could take for the same, is told apart by the first digits of the label's SHA-256.
    """
    plain = [unicodedata.normalize("NFC", re.sub(r"[\W_]+", "-", label.casefold()).strip("-")) for label in labels]
    # Some take letters for the same that differ in width or in how an accent is put.
    alike = Counter(unicodedata.normalize("NFKD", name) for name in plain)
    names = []
    for label, name in zip(labels, plain, strict=True):
        is_own = name and len(name.encode()) <= _LONGEST_NAME_BYTES and alike[unicodedata.normalize("NFKD", name)] == 1
        short = name.encode()[:_LONGEST_NAME_BYTES].decode(errors="ignore")
        digest = hashlib.sha256(label.encode()).hexdigest()[:8]
        names.append((name if is_own else f"{short}-{digest}".strip("-")) + "_debugging-aid")
    return names


def save_nifti(path: Path, values: np.ndarray, affine: np.ndarray) -> None:
    """Write a map in the scan's space, so that a viewer can overlay the two.

    Args:
        path: File to write.
        values: `(i, j, k)`, from `to_scan`.
        affine: The scan's, `(4, 4)`, voxel to RAS+ mm.
    """
    image = nibabel.Nifti1Image(values.astype(np.float32), affine)
    image.header["descrip"] = CAVEAT.encode()[:79]
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def draw_map(finding: FindingMap, values: np.ndarray, volume: CTVolume, slices: int = 4) -> Picture:
    """Draw the axial slices with the highest values over the scan, and where they lie in it.

    Args:
        finding: The finding to draw.
        values: From `to_scan`.
        volume: The scan.
        slices: Number of slices.
    """
    scan = AxialSlices.of(volume)
    turned, _ = reorient(CTVolume(values, volume.affine), AXIAL)
    picked = _highest(turned, slices, reach=round(_APART_MM / scan.spacing_mm[0]))
    most = float(np.abs(turned).max()) or 1.0
    figure = Picture(figsize=(4 * len(picked) + 3, 5), layout="constrained")
    panels = figure.subplots(1, len(picked) + 1, width_ratios=[*[4] * len(picked), 3])
    for axes, k in zip(panels, picked, strict=False):
        draw_slice(axes, scan, k, WIDE_WINDOW_HU)
        look = {"aspect": scan.pixel_aspect, "interpolation": "nearest", "cmap": "coolwarm"}
        shown = axes.imshow(turned[k], vmin=-most, vmax=most, alpha=0.7 * np.abs(turned[k]) / most, **look)
        axes.set_title(f"slice {k + 1} of {len(scan)}, z {scan.z_mm[k]:+.1f} mm")
    draw_places(panels[-1], scan, picked, WIDE_WINDOW_HU)
    panels[-1].set_title("from the front")
    bar = figure.colorbar(ScalarMappable(shown.norm, shown.cmap), ax=panels, shrink=0.8)
    bar.set_label("logits that a patch adds")
    said = f"{finding.label}: score {finding.score:.3f}, margin {finding.logits_margin:+.2f}\n{CAVEAT}"
    figure.suptitle(said, fontfamily=fonts(), parse_math=False)
    return figure


@dataclass(frozen=True)
class ScanMap:
    """A map on the scan that it is of.

    Args:
        finding: What it shows, and its score.
        values: `(i, j, k)`, logits that a patch adds, at the voxels of the scan.
        volume: The scan.
    """

    finding: FindingMap
    values: np.ndarray
    volume: CTVolume

    def __repr__(self) -> str:
        return f"ScanMap({self.finding!r} on {self.volume!r})"

    def plot(self, slices: int = 4) -> Picture:
        """Draw the axial slices with the highest values; a notebook shows the figure by itself.

        Args:
            slices: Number of slices.
        """
        return draw_map(self.finding, self.values, self.volume, slices)

    def save(self, path: Path) -> None:
        """Write it as NIfTI, see `save_nifti`."""
        save_nifti(path, self.values, self.volume.affine)


def map_scan(
    pipe: ZeroShotCTClassificationPipeline,
    scan: Any,
    labels: Sequence[str] | None = None,
    templates: Sequence[Sequence[str]] | None = None,
    **reading: Any,
) -> list[ScanMap]:
    """From a scan to where its scores come from, in one call.

    Args:
        pipe: With or without an adapter.
        scan: What `read_volume` takes.
        labels: Findings; the model's own by default.
        templates: See the pipeline; the results are averaged.
        reading: Options of `read_volume`.

    Returns:
        One map per finding, in the order of the labels.

    Raises:
        VolumeError: If it is not a usable CT volume.
    """
    image_processor = pipe.processor.image_processor
    volume = read_volume(scan, **{"orientation": Assumed(image_processor.orientation), **reading})
    maps = map_findings(pipe, pipe.encode(image_processor.process_volume(volume)[None, None]), labels, templates)
    where = grid_in(pipe, volume)
    return [ScanMap(finding, to_scan(finding.patches, *where), volume) for finding in maps]


def _highest(values: np.ndarray, count: int, reach: int) -> list[int]:
    """Slices `(z, ...)` with the highest values, in order, none within `reach` of another."""
    heights = values.reshape(len(values), -1).max(axis=1).astype(float)
    picked: list[int] = []
    while len(picked) < count and np.isfinite(heights).any():
        k = int(heights.argmax())
        picked.append(k)
        heights[max(0, k - reach) : k + reach + 1] = -np.inf
    return sorted(picked)
