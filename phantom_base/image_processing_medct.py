"""HU array and affine to `pixel_values`, and the way back: reorient, clip, resample, scale, crop or pad.

Unusual: only what survives the centre crop is read and resampled, one axis after the other. A trilinear interpolation
is the product of three linear ones, so this gives the values of `torch.nn.functional.interpolate` at a fraction of its
work. It goes slab by slab of the result, so that no float copy of the whole scan is ever made.

Source: specification of CT-CLIP, section 1.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers.dynamic_module_utils import init_hf_modules
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs

from .configuration_medct import MedCTVisionConfig
from .volume_io_medct import CTVolume, axis_order, read_volume
from .volume_medct import SPACING_DECIMALS

_DEFAULTS = MedCTVisionConfig()
# Slices of the result made at a time: enough to keep two cores busy, few enough to stay in their caches.
_SLAB = 4


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
    """Voxels of an axis after resampling: the whole target voxels that its extent holds, at least one.

    To the last bit as the original computes it, because one voxel more moves the whole scan by half a voxel: 300 slices
    of 0.7 mm make 139 of 1.5 mm, and not 140. Only the noise that headers add to a spacing is rounded off before.
    """
    return max(1, int(length * (round(spacing_mm, SPACING_DECIMALS) / target_spacing_mm)))


def crop_window(length: int, size: int) -> tuple[int, int]:
    """First index, and the one after the last, of the central `size` of an axis; the whole axis if it is shorter."""
    start = max(0, (length - size) // 2)
    return start, min(length, start + size)


@dataclass(frozen=True)
class AxisPlan:
    """Linear interpolation along one axis, with half-pixel centres, of the part of the result that is wanted.

    Args:
        lower: For each voxel of the result the one of the input before it.
        upper: The one after it.
        weight: Share of the one after it, float32.
    """

    lower: torch.Tensor
    upper: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def make(cls, length: int, resampled: int, window: tuple[int, int]) -> "AxisPlan":
        """The plan for a window (first index, and the one after the last) of an axis of `resampled` voxels."""
        if resampled == length:
            lower = torch.arange(*window)
            return cls(lower, lower, torch.zeros(len(lower)))
        # In float32, as torch's own interpolation computes them.
        centres = torch.arange(*window, dtype=torch.float32) + 0.5
        positions = (centres * np.float32(length / resampled) - 0.5).clamp(min=0)
        lower = positions.long().clamp(max=length - 1)
        return cls(lower, (lower + 1).clamp(max=length - 1), positions - lower)

    @property
    def is_copy(self) -> bool:
        """Whether the result is a piece of the input as it is."""
        return len(self.lower) == self.needed.stop - self.needed.start and bool(torch.equal(self.lower, self.upper))

    @property
    def needed(self) -> slice:
        """The part of the input that is read."""
        return slice(int(self.lower.min()), int(self.upper.max()) + 1)

    def part(self, index: slice, offset: int = 0) -> "AxisPlan":
        """The plan for some voxels of the result, on an input that begins at `offset`."""
        return AxisPlan(self.lower[index] - offset, self.upper[index] - offset, self.weight[index])

    def apply(self, volume: torch.Tensor, axis: int) -> torch.Tensor:
        """Interpolate a float32 volume along an axis."""
        if self.is_copy:
            return volume.narrow(axis, self.needed.start, len(self.lower))
        lower = volume.index_select(axis, self.lower)
        weight = self.weight.view([-1 if dim == axis else 1 for dim in range(volume.ndim)])
        return lower.lerp_(volume.index_select(axis, self.upper), weight)


def resampled_slabs(
    array: np.ndarray,
    spacing_mm: Sequence[float],
    target_spacing_mm: Sequence[float],
    size: Sequence[int],
    hu_window: tuple[float, float] | None = None,
) -> Iterator[torch.Tensor]:
    """Resample to another spacing and keep the centre, a few slices of the result at a time.

    Args:
        array: `(z, y, x)`, HU, of any real dtype and memory order.
        spacing_mm: Of the array, `(z, y, x)`.
        target_spacing_mm: Of the result, `(z, y, x)`.
        size: Most voxels to keep, `(z, y, x)`.
        hu_window: Lowest and highest value, to which the scan is clipped before interpolation, HU.

    Yields:
        float32, HU, the next slices `(z, y, x)`.
    """
    lengths = [resampled_length(*axis) for axis in zip(array.shape, spacing_mm, target_spacing_mm, strict=True)]
    windows = [crop_window(*axis) for axis in zip(lengths, size, strict=True)]
    z, y, x = (AxisPlan.make(*axis) for axis in zip(array.shape, lengths, windows, strict=True))
    array = array[:, y.needed, x.needed]
    y, x = y.part(slice(None), y.needed.start), x.part(slice(None), x.needed.start)
    if abs(array.strides[0]) < max(map(abs, array.strides[1:])):
        # Slices that are scattered over the memory are gathered once rather than once each.
        needed = z.needed
        array, z = np.ascontiguousarray(array[needed]), z.part(slice(None), needed.start)
    is_y_fastest = abs(array.strides[1]) < abs(array.strides[2])
    for first in range(0, len(z.lower), _SLAB):
        slab = z.part(slice(first, first + _SLAB))
        needed = slab.needed
        values = array[needed].transpose(0, 2, 1) if is_y_fastest else array[needed]
        values = slab.part(slice(None), needed.start).apply(_to_float(values, hu_window), 0)
        # Rows that lie in one piece are gathered far faster than single voxels: so the slower axis of the plane goes
        # first, and the other one after the plane is turned.
        slower, faster = (x, y) if is_y_fastest else (y, x)
        values = slower.apply(values, 1).transpose(1, 2).contiguous()
        values = faster.apply(values, 1)
        yield values if is_y_fastest else values.transpose(1, 2)


def _to_float(array: np.ndarray, hu_window: tuple[float, float] | None) -> torch.Tensor:
    """A float32 copy of an array of any byte order, direction and dtype, clipped."""
    values = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
    return values if hu_window is None else clip_hu(values, *hu_window)


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


@dataclass(frozen=True, eq=False)
class VolumeGeometry:
    """Where the voxels of `pixel_values` come from, and the way back.

    Positions are fractional: the centre of a voxel is a whole number. Outside of the crop or in the padding they go on
    in the same way. All methods take and give `(..., 3)`.

    Args:
        voxel_of_position: `(4, 4)`, from a position `(z, y, x)` in `pixel_values` to an input voxel `(i, j, k)`. Of
            DICOM these are column, row and slice, in the order of positions along the slices' normal; of a scan
            resampled to a straight grid they are that grid's.
        affine: `(4, 4)`, from an input voxel `(i, j, k)` to patient millimetres, RAS+.
    """

    voxel_of_position: np.ndarray
    affine: np.ndarray

    def to_voxel(self, position: Any) -> np.ndarray:
        """Position `(z, y, x)` in `pixel_values` to input voxel `(i, j, k)`."""
        return _transform(self.voxel_of_position, position)

    def to_mm(self, position: Any) -> np.ndarray:
        """Position `(z, y, x)` in `pixel_values` to patient millimetres, RAS+."""
        return _transform(self.affine @ self.voxel_of_position, position)

    def from_voxel(self, voxel: Any) -> np.ndarray:
        """Input voxel `(i, j, k)` to position `(z, y, x)` in `pixel_values`."""
        return _transform(np.linalg.inv(self.voxel_of_position), voxel)

    def from_mm(self, millimetres: Any) -> np.ndarray:
        """Patient millimetres, RAS+, to position `(z, y, x)` in `pixel_values`."""
        return _transform(np.linalg.inv(self.affine @ self.voxel_of_position), millimetres)


def _transform(matrix: np.ndarray, points: Any) -> np.ndarray:
    return np.asarray(points, float) @ matrix[:3, :3].T + matrix[:3, 3]


class PicklesAnywhere:
    """Objects whose class came as remote code, and that other processes can unpickle all the same.

    `datasets.map(num_proc=2)` and spawned loader processes begin with an interpreter that does not know yet where the
    library keeps remote code.
    """

    def __reduce_ex__(self, protocol):
        if not type(self).__module__.startswith("transformers_modules."):
            return super().__reduce_ex__(protocol)
        reduced = (object.__new__, (type(self),), self.__dict__)
        # Parts are unpickled in their order: first the place of remote code, then the object.
        return operator.getitem, ((_AsReduced((init_hf_modules, ())), _AsReduced(reduced)), 1)


class _AsReduced:
    """Pickles as something else."""

    def __init__(self, reduced: tuple):
        self.reduced = reduced

    def __reduce_ex__(self, protocol):
        return self.reduced


class MedCTImagesKwargs(ImagesKwargs, total=False):
    """What a call may say of its images; each either once for all, or a list with one entry an image."""

    spacing_mm: Any
    affine: Any
    rescale_slope: Any
    rescale_intercept: Any
    series: Any
    resample_irregular: Any
    return_geometry: bool


class MedCTImageProcessor(PicklesAnywhere, BaseImageProcessor):
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
        series: Any = None,
        resample_irregular: Any = False,
        return_geometry: bool = False,
        **kwargs,
    ) -> BatchFeature:
        """Make the model's input of one volume or a list of them.

        Args:
            images: What `read_volume` takes: paths and addresses of NIfTI, DICOM, NRRD and MetaImage, bytes, file
                objects, nibabel images, `CTVolume`s, arrays `(i, j, k)`. A list holds one volume an entry, so a series
                as a list of DICOM files is a list in a list.
            return_tensors: "pt" or "np".
            spacing_mm: Of arrays whose axes run as `orientation` says, mm. This and the following: once, or a list.
            affine: `(4, 4)`, voxel indices to RAS+ mm, of arrays, or instead of a file's own.
            rescale_slope: HU of one stored unit, for stored values that are not HU yet.
            rescale_intercept: HU of the stored value 0, likewise.
            series: Which of several DICOM series, see `read_volume`.
            resample_irregular: Resample tilted, oblique and unevenly spaced scans instead of refusing them.
            return_geometry: Whether to give the way back too.

        Returns:
            `pixel_values`: `(volumes, 1, z, y, x)`, float32 within the scaled window. With `return_geometry` also
            `geometry`: a list of `VolumeGeometry`.

        Raises:
            VolumeError: If a source is no usable CT volume.
        """
        images = list(images) if isinstance(images, list | tuple) else [images]
        options = {
            "spacing_mm": _per_image(spacing_mm, len(images), ndim=1),
            "affine": _per_image(affine, len(images), ndim=2),
            "rescale_slope": _per_image(rescale_slope, len(images), ndim=0),
            "rescale_intercept": _per_image(rescale_intercept, len(images), ndim=0),
            "series": _per_image(series, len(images), ndim=0),
            "resample_irregular": _per_image(resample_irregular, len(images), ndim=0),
        }
        pixel_values = torch.empty(len(images), 1, *self.image_size)
        geometry = []
        for index, image in enumerate(images):
            volume = read_volume(
                image, orientation=self.orientation, **{name: of[index] for name, of in options.items()}
            )
            self.process_volume(volume, out=pixel_values[index, 0])
            geometry.append(self.geometry(volume))
        batch = BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)
        if return_geometry:
            batch["geometry"] = geometry
        return batch

    def process_volume(self, volume: CTVolume, out: torch.Tensor | None = None) -> torch.Tensor:
        """One volume in HU to `(z, y, x)`, float32; into `out` if there is one."""
        pixel_values = torch.empty(*self.image_size) if out is None else out
        pad_value = self.hu_min / self.hu_per_unit
        array, spacing_mm = reorient(volume, self.orientation)
        z_length = min(self.image_size[0], resampled_length(len(array), spacing_mm[0], self.target_spacing_mm[0]))
        z = (self.image_size[0] - z_length) // 2
        pixel_values[:z] = pad_value
        pixel_values[z + z_length :] = pad_value
        window = (self.hu_min, self.hu_max)
        for slab in resampled_slabs(array, spacing_mm, self.target_spacing_mm, self.image_size, window):
            slab = scale_hu(slab, self.hu_per_unit)
            pixel_values[z : z + len(slab)] = pad_to_size(slab, (len(slab), *self.image_size[1:]), pad_value)
            z += len(slab)
        return pixel_values

    def geometry(self, volume: CTVolume) -> VolumeGeometry:
        """Where the voxels of `process_volume(volume)` come from."""
        axes, signs = axis_order(volume.affine, self.orientation)
        matrix = np.zeros((4, 4))
        matrix[3, 3] = 1
        for row, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
            length = volume.array.shape[axis]
            resampled = resampled_length(length, volume.spacing_mm[axis], self.target_spacing_mm[row])
            first, last = crop_window(resampled, self.image_size[row])
            step = length / resampled
            # With half-pixel centres, as in `AxisPlan.make`; the padding comes before the crop.
            start = (first - (self.image_size[row] - (last - first)) // 2 + 0.5) * step - 0.5
            matrix[axis, row] = sign * step
            matrix[axis, 3] = start if sign > 0 else length - 1 - start
        return VolumeGeometry(matrix, volume.affine)


def _per_image(value: Any, count: int, ndim: int) -> list[Any]:
    """One value for each image, from one for all (of `ndim` dimensions) or a list of them."""
    if value is None or np.ndim(value) == ndim:
        return [value] * count
    values = list(value)
    if len(values) != count:
        raise ValueError(f"{len(values)} values were given for {count} images.")
    return values


__all__ = ["MedCTImageProcessor", "VolumeGeometry"]
