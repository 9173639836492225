"""HU array and affine to `pixel_values`, and the way back: reorient, clip, resample, scale, crop or pad.

Source: specification of CT-CLIP, section 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs

from .configuration_medct import MedCTVisionConfig, check_voxels, refuse_unknown
from .resampling_medct import ScanPart, crop_window, inside, resampled_length, scale_hu
from .volume_io_medct import Assumed, read_volume
from .volume_medct import CTVolume, VolumeError, axis_order, grid_in_words
from .workers_medct import PicklesAnywhere, Place

_DEFAULTS = MedCTVisionConfig()
_OF_PICTURES = ("data_format", "input_data_format", "disable_grouping")
"""Options of transformers for the channels and sizes of pictures, without a meaning for volumes."""


@dataclass(frozen=True, eq=False)
class VolumeGeometry:
    """Where the voxels of `pixel_values` come from, and the way back.

    Positions may be fractional; the centre of a voxel is a whole number. They continue beyond the crop and into the
    padding. All methods take and return `(..., 3)`.

    Args:
        voxel_of_position: `(4, 4)`, from a position `(z, y, x)` in `pixel_values` to an input voxel `(i, j, k)`. Of
            DICOM these are column, row and slice, in the order of positions along the slices' normal; of a scan
            resampled to a straight grid they are that grid's.
        affine: `(4, 4)`, from an input voxel `(i, j, k)` to patient millimetres, RAS+.
    """

    voxel_of_position: np.ndarray
    affine: np.ndarray

    def __repr__(self) -> str:
        origin = ", ".join(f"{each:.1f}" for each in self.to_mm((0, 0, 0)))
        return f"VolumeGeometry(voxels of {grid_in_words(self.affine)}; pixel_values[0, 0, 0] at ({origin}) mm RAS+)"

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


class MedCTImagesKwargs(ImagesKwargs, total=False):
    """Arguments of a call about its images: each once for all of them, or a list with one entry per image."""

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

    Raises:
        ValueError: If one of them is impossible, such as a window without values.
    """

    _auto_class = "AutoImageProcessor"
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
        refuse_unknown(vars(self), "The image processor")
        self.image_size = list(image_size)
        self.target_spacing_mm = list(target_spacing_mm)
        self.orientation = orientation
        self.hu_min = hu_min
        self.hu_max = hu_max
        self.hu_per_unit = hu_per_unit
        check_voxels(self)

    @classmethod
    def from_config(cls, config: MedCTVisionConfig) -> "MedCTImageProcessor":
        """The image processor that belongs to a model."""
        names = ("image_size", "target_spacing_mm", "orientation", "hu_min", "hu_max", "hu_per_unit")
        return cls(**{name: getattr(config, name) for name in names})

    def fetch_images(self, images: Any) -> Any:
        """Leave the images as they are; the library's own would open paths as 2-D pictures."""
        return images

    def __call__(self, images: Any, return_tensors: str | None = None, **kwargs) -> BatchFeature:
        """See `preprocess`."""
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
        device: torch.device | str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Turn one volume or a list of them into the model's input.

        Args:
            images: What `read_volume` takes: paths and addresses of NIfTI, DICOM, NRRD and MetaImage, bytes, file
                objects, nibabel images, `CTVolume`s, arrays `(i, j, k)`. A list, or a column of a data set, holds one
                volume an entry, so a series as a list of DICOM files is a list in a list.
            return_tensors: "pt" or "np".
            spacing_mm: Of arrays whose axes run as `orientation` says ("SLP": towards superior, left, posterior), mm.
                This and the following: once, or a list.
            affine: `(4, 4)`, voxel indices to RAS+ mm, of arrays, or instead of a file's own.
            rescale_slope: HU of one stored unit, for stored values that are not HU yet.
            rescale_intercept: HU of the stored value 0, likewise.
            series: Which of several DICOM series, see `read_volume`.
            resample_irregular: Resample tilted, oblique and unevenly spaced scans instead of refusing them.
            return_geometry: Whether to return the way back, too.
            device: Where to compute the result, and to leave it; the CPU by default.
            kwargs: What transformers passes to every image processor and means nothing here; nothing else.

        Returns:
            `pixel_values`: `(volumes, 1, z, y, x)`, float32 within the scaled window. With `return_geometry` also
            `geometry`: a list of `VolumeGeometry`.

        Raises:
            VolumeError: If a source is not a usable CT volume, or the list is empty.
            ValueError: If a list has not one entry an image.
            TypeError: If there is no such argument.
        """
        self._refuse_unknown(kwargs)
        images = list(images) if isinstance(images, list | tuple) or is_column(images) else [images]
        if not images:
            raise VolumeError("images", "it is an empty list", "Pass at least one scan")
        options = {
            "spacing_mm": _per_image(spacing_mm, len(images), ndim=1),
            "affine": _per_image(affine, len(images), ndim=2),
            "rescale_slope": _per_image(rescale_slope, len(images), ndim=0),
            "rescale_intercept": _per_image(rescale_intercept, len(images), ndim=0),
            "series": _per_image(series, len(images), ndim=0),
            "resample_irregular": _per_image(resample_irregular, len(images), ndim=0),
        }
        pixel_values = torch.empty(len(images), 1, *self.image_size, dtype=torch.float32, device=device)
        geometry = []
        for index, image in enumerate(images):
            of_image = {name: of[index] for name, of in options.items()}
            volume = read_volume(image, orientation=Assumed(self.orientation), **of_image)
            self.process_volume(volume, out=pixel_values[index, 0])
            geometry.append(self.geometry(volume))
        batch = BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)
        if return_geometry:
            batch["geometry"] = geometry
        return batch

    def _refuse_unknown(self, given: dict[str, Any]) -> None:
        """Refuse arguments of a call that would not be heeded, misspelt ones above all."""
        for name, value in given.items():
            if name in _OF_PICTURES or (value is None and name in ImagesKwargs.__annotations__):
                continue
            if hasattr(self, name):
                raise TypeError(f"{name!r} is set where the processor is made: `MedCTImageProcessor({name}=...)`.")
            raise TypeError(f"There is no argument {name!r}; see `help(MedCTImageProcessor.preprocess)`.")

    def process_volume(self, volume: CTVolume, out: torch.Tensor | None = None) -> torch.Tensor:
        """Convert one volume to the model's input.

        Args:
            volume: In HU.
            out: Where to write the result, on any device, `image_size` voxels `(z, y, x)`; a new float32 tensor by
                default.

        Returns:
            `(z, y, x)`, float32 within the scaled window; `out` if it was given.
        """
        return self.finish(self.crop(volume), out)

    def crop(self, volume: CTVolume) -> ScanPart:
        """The part of a volume that its result is made of: a view, `finish` does the rest.

        Args:
            volume: In HU.
        """
        return ScanPart.of(volume, self.orientation, self.target_spacing_mm, self.image_size)

    def load(self, volume: CTVolume, place: Place, device: torch.device | str) -> ScanPart | torch.Tensor:
        """What a loader process hands over of a volume, for `finish`: if the model is on a CPU, the result itself.

        Args:
            volume: In HU.
            place: Has the memory for it.
            device: Where the model is.
        """
        if torch.device(device).type == "cpu":
            return self.process_volume(volume, out=place.empty(self.image_size))
        return self.crop(volume).packed(place.empty)

    def finish(self, part: ScanPart | torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Clip, resample, scale and pad, on the device of the result.

        Args:
            part: From `crop` or `load`.
            out: As in `process_volume`.

        Returns:
            As `process_volume`.
        """
        if isinstance(part, torch.Tensor):
            return part if out is None else out.copy_(part)
        out = torch.empty(*self.image_size, dtype=torch.float32) if out is None else out
        part = part if out.device.type == "cpu" else part.to(out.device)
        inner = inside(out, part.shape, self.hu_min / self.hu_per_unit)
        first = 0
        for slab in part.resampled(self.hu_min, self.hu_max):
            scale_hu(slab, self.hu_per_unit, out=inner[first : first + len(slab)])
            first += len(slab)
        return out

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


def is_column(images: Any) -> bool:
    """Whether these are several scans, in another sequence than a list: a column of a data set gives none."""
    return isinstance(images, Sequence) and not isinstance(images, str | bytes | bytearray | memoryview | list | tuple)


def _per_image(value: Any, count: int, ndim: int) -> list[Any]:
    """One value for each image: one for all, of `ndim` dimensions, or those of a list, in which `None` is for none."""
    if isinstance(value, str) or not np.iterable(value) or _dimensions(value) == ndim:
        return [value] * count
    values = list(value)
    if len(values) != count:
        raise ValueError(f"{len(values)} values were given for {count} images.")
    return values


def _dimensions(value: Any) -> int | None:
    """Of an array, or of nested lists that could be one; none of those that could not."""
    if isinstance(value, list | tuple) and any(each is None for each in value):
        return None
    try:
        return np.ndim(value)
    except ValueError:
        return None


__all__ = ["MedCTImageProcessor", "VolumeGeometry"]
