"""HU array and affine to `pixel_values`: reorient, clip, resample, scale, crop or pad.

Unusual: only what survives the centre crop is resampled, one axis after the other. A trilinear interpolation is the
product of three linear ones, so this gives the values of `torch.nn.functional.interpolate` at a fraction of its work.

Source: specification of CT-CLIP, section 1.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs

from .configuration_medct import MedCTVisionConfig
from .volume_io_medct import CTVolume, axis_order, read_volume

_DEFAULTS = MedCTVisionConfig()


def reorient(volume: CTVolume, orientation: str) -> tuple[np.ndarray, tuple[float, ...]]:
    """Turn a volume so that its indices grow in the given directions.

    Args:
        volume: In any of the 48 axis orders and directions.
        orientation: Such as "SLP".

    Returns:
        A view `(z, y, x)` of the array, and its spacing `(z, y, x)`, mm.
    """
    axes, signs = axis_order(volume.affine, orientation)
    turned = volume.array.transpose(axes)[tuple(slice(None, None, sign) for sign in signs)]
    return turned, tuple(volume.spacing_mm[axis] for axis in axes)


def clip_hu(volume: torch.Tensor, hu_min: float, hu_max: float) -> torch.Tensor:
    """Clip a volume `(z, y, x)` in HU to a window in HU; same dtype."""
    return volume.clamp(hu_min, hu_max)


def resampled_length(length: int, spacing_mm: float, target_spacing_mm: float) -> int:
    """Voxels of an axis after resampling: the whole target voxels that its extent holds, at least one."""
    return max(1, math.floor(length * spacing_mm / target_spacing_mm))


def crop_window(length: int, size: int) -> tuple[int, int]:
    """First index, and the one after the last, of the central `size` of an axis; the whole axis if it is shorter."""
    start = max(0, (length - size) // 2)
    return start, min(length, start + size)


def resample_axis(volume: torch.Tensor, axis: int, length: int, window: tuple[int, int]) -> torch.Tensor:
    """Linear interpolation along one axis, with half-pixel centres, of part of the result.

    Args:
        volume: `(z, y, x)`.
        axis: Which one.
        length: Voxels that the whole axis would have afterwards.
        window: First index, and the one after the last, of those wanted.

    Returns:
        float32, with `window[1] - window[0]` voxels along the axis.
    """
    if length == volume.shape[axis]:
        return volume.narrow(axis, window[0], window[1] - window[0]).float()
    # In float32, as torch's own interpolation computes them.
    centres = torch.arange(*window, dtype=torch.float32) + 0.5
    positions = (centres * np.float32(volume.shape[axis] / length) - 0.5).clamp(min=0)
    lower = positions.long().clamp(max=volume.shape[axis] - 1)
    upper = (lower + 1).clamp(max=volume.shape[axis] - 1)
    weight = (positions - lower).view([-1 if dim == axis else 1 for dim in range(3)])
    return torch.lerp(volume.index_select(axis, lower).float(), volume.index_select(axis, upper).float(), weight)


def resample_and_crop(
    volume: torch.Tensor, spacing_mm: Sequence[float], target_spacing_mm: Sequence[float], size: Sequence[int]
) -> torch.Tensor:
    """Resample to another spacing and keep the centre.

    Args:
        volume: `(z, y, x)`, HU.
        spacing_mm: Of the volume, `(z, y, x)`.
        target_spacing_mm: Of the result, `(z, y, x)`.
        size: Most voxels to keep, `(z, y, x)`.

    Returns:
        float32, HU, at most `size` along each axis.
    """
    lengths = [resampled_length(*axis) for axis in zip(volume.shape, spacing_mm, target_spacing_mm, strict=True)]
    windows = [crop_window(*axis) for axis in zip(lengths, size, strict=True)]
    # The axis that shrinks most goes first, so that the others have less to do.
    for axis in sorted(range(3), key=lambda axis: (windows[axis][1] - windows[axis][0]) / volume.shape[axis]):
        volume = resample_axis(volume, axis, lengths[axis], windows[axis])
    return volume


def scale_hu(volume: torch.Tensor, hu_per_unit: float) -> torch.Tensor:
    """HU to the unit of `pixel_values`, in place."""
    return volume.div_(hu_per_unit)


def pad_to_size(volume: torch.Tensor, size: Sequence[int], value: float) -> torch.Tensor:
    """Pad `(z, y, x)` to a size; an odd voxel goes behind."""
    before_and_after: list[int] = []
    for length, target in zip(reversed(volume.shape), reversed(size), strict=True):  # F.pad begins at the last axis
        before = (target - length) // 2
        before_and_after += [before, target - length - before]
    return F.pad(volume, before_and_after, value=value)


class MedCTImagesKwargs(ImagesKwargs, total=False):
    """What a call may say of its images; each either once for all, or a list with one entry an image."""

    spacing_mm: Any
    affine: Any
    rescale_slope: Any
    rescale_intercept: Any


class MedCTImageProcessor(BaseImageProcessor):
    """CT volumes to `pixel_values`. The defaults are those of `MedCTVisionConfig`, where each is explained.

    Args:
        image_size: Voxels of the result, `(z, y, x)`.
        target_spacing_mm: Spacing of the result, `(z, y, x)`, mm.
        orientation: Direction in which the z, y and x index grow.
        hu_min: Lower end of the window, HU; also what lies outside the scan.
        hu_max: Upper end of the window, HU.
        hu_per_unit: HU that make 1.0.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = MedCTImagesKwargs

    def __init__(
        self,
        image_size: Sequence[int] = _DEFAULTS.image_size,
        target_spacing_mm: Sequence[float] = _DEFAULTS.target_spacing_mm,
        orientation: str = _DEFAULTS.orientation,
        hu_min: float = _DEFAULTS.hu_min,
        hu_max: float = _DEFAULTS.hu_max,
        hu_per_unit: float = _DEFAULTS.hu_per_unit,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.image_size = list(image_size)
        self.target_spacing_mm = list(target_spacing_mm)
        self.orientation = orientation
        self.hu_min = hu_min
        self.hu_max = hu_max
        self.hu_per_unit = hu_per_unit

    @classmethod
    def from_config(cls, config: MedCTVisionConfig) -> "MedCTImageProcessor":
        """The image processor that belongs to a model."""
        names = ("image_size", "target_spacing_mm", "orientation", "hu_min", "hu_max", "hu_per_unit")
        return cls(**{name: getattr(config, name) for name in names})

    def fetch_images(self, images: Any) -> Any:
        """Leave the images as they are; the library's own would open paths as 2-D pictures."""
        return images

    def __call__(self, images: Any, return_tensors: str | None = None, **kwargs) -> BatchFeature:
        return self.preprocess(images, return_tensors=return_tensors, **kwargs)

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        spacing_mm: Any = None,
        affine: Any = None,
        rescale_slope: Any = None,
        rescale_intercept: Any = None,
        **kwargs,
    ) -> BatchFeature:
        """Make the model's input of one volume or a list of them.

        Args:
            images: What `read_volume` takes: NIfTI paths, nibabel images, `CTVolume`s, arrays `(i, j, k)`.
            return_tensors: "pt" or "np".
            spacing_mm: Of arrays whose axes run as `orientation` says, mm. This and the following: once, or a list.
            affine: `(4, 4)`, voxel indices to RAS+ mm, of arrays, or instead of a file's own.
            rescale_slope: HU of one stored unit, for stored values that are not HU yet.
            rescale_intercept: HU of the stored value 0, likewise.

        Returns:
            `pixel_values`: `(volumes, 1, z, y, x)`, float32 within the scaled window.

        Raises:
            VolumeError: If a source is no usable CT volume.
        """
        images = list(images) if isinstance(images, list | tuple) else [images]
        options = {
            "spacing_mm": _per_image(spacing_mm, len(images), ndim=1),
            "affine": _per_image(affine, len(images), ndim=2),
            "rescale_slope": _per_image(rescale_slope, len(images), ndim=0),
            "rescale_intercept": _per_image(rescale_intercept, len(images), ndim=0),
        }
        volumes = [
            self.process_volume(
                read_volume(image, orientation=self.orientation, **{name: of[index] for name, of in options.items()})
            )
            for index, image in enumerate(images)
        ]
        return BatchFeature({"pixel_values": torch.stack(volumes)[:, None]}, tensor_type=return_tensors)

    def process_volume(self, volume: CTVolume) -> torch.Tensor:
        """One volume in HU to `(z, y, x)`, float32."""
        array, spacing_mm = reorient(volume, self.orientation)
        tensor = clip_hu(_to_tensor(array), self.hu_min, self.hu_max)
        tensor = resample_and_crop(tensor, spacing_mm, self.target_spacing_mm, self.image_size)
        tensor = scale_hu(tensor, self.hu_per_unit)
        return pad_to_size(tensor, self.image_size, value=self.hu_min / self.hu_per_unit)


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor of an array of any byte order, direction and dtype; int16 stays, as most scans hold it."""
    dtype = (
        np.int16 if array.dtype.kind in "iu" and array.dtype.itemsize <= 2 and array.dtype != np.uint16 else np.float32
    )
    return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))


def _per_image(value: Any, count: int, ndim: int) -> list[Any]:
    """One value for each image, from one for all (of `ndim` dimensions) or a list of them."""
    if value is None or np.ndim(value) == ndim:
        return [value] * count
    values = list(value)
    if len(values) != count:
        raise ValueError(f"{len(values)} values were given for {count} images.")
    return values


__all__ = ["MedCTImageProcessor"]
