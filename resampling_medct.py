"""HU on the grid of a scan to HU on the grid of a model: reorient, clip, resample, crop and pad, on any device.

Unusual: only what survives the centre crop is read and resampled, one axis after the other. A trilinear interpolation
is the product of three linear ones, so this gives the values of `torch.nn.functional.interpolate` at a fraction of its
work. It goes slab by slab of the result, so that no float copy of the whole scan is ever made.

Source: specification of CT-CLIP, section 1.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from .volume_medct import CTVolume, axis_order, without_noise

# Slices of the result made at a time: few enough to stay in the caches of a core, enough to fill a GPU.
_SLAB, _SLAB_OF_GPU = 2, 64


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


def resampled_length(length: int, spacing_mm: float, target_spacing_mm: float) -> int:
    """Voxels along an axis after resampling: the number of whole target voxels that fit into its extent, at least one.

    This matches the original to the last bit, because one voxel more would move the whole scan by half a voxel: 300
    slices of 0.7 mm make 139 of 1.5 mm, not 140. Only the noise that headers add to a spacing is rounded off first.

    Args:
        length: Voxels along the axis.
        spacing_mm: Distance between them, mm.
        target_spacing_mm: Distance between voxels of the result, mm.
    """
    return max(1, int(length * (without_noise(spacing_mm, length) / target_spacing_mm)))


def crop_window(length: int, size: int) -> tuple[int, int]:
    """The central part of an axis, or the whole axis if it is shorter.

    Args:
        length: Voxels along the axis.
        size: Maximum number of voxels to keep.

    Returns:
        The first index, and the index after the last.
    """
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
        """The plan for a window of a resampled axis.

        Args:
            length: Voxels of the input along the axis.
            resampled: Voxels of the whole result along the axis.
            window: First index of the result that is wanted, and the index after the last.
        """
        if resampled == length:
            lower = torch.arange(*window)
            return cls(lower, lower, torch.zeros(len(lower), dtype=torch.float32))
        # In float32, as torch's own interpolation computes them.
        centres = torch.arange(*window, dtype=torch.float32) + 0.5
        positions = (centres * np.float32(length / resampled) - 0.5).clamp(min=0)
        lower = positions.long().clamp(max=length - 1)
        return cls(lower, (lower + 1).clamp(max=length - 1), positions - lower)

    @property
    def is_copy(self) -> bool:
        """Whether the result is a piece of the input as it is."""
        needed = self.needed
        return (
            len(self.lower) == needed.stop - needed.start
            and int(self.lower[0]) == needed.start
            and torch.equal(self.lower, self.upper)
        )

    @property
    def needed(self) -> slice:
        """The part of the input that is read."""
        return slice(int(torch.minimum(self.lower, self.upper).min()), int(self.upper.maximum(self.lower).max()) + 1)

    def part(self, index: slice, offset: int = 0) -> "AxisPlan":
        """The plan for some voxels of the result.

        Args:
            index: Which voxels of this plan.
            offset: Index at which the input of the new plan begins in the input of this one, voxels.
        """
        return AxisPlan(self.lower[index] - offset, self.upper[index] - offset, self.weight[index])

    def flipped(self, length: int) -> "AxisPlan":
        """The plan that gives the same result from an input that runs the other way.

        Args:
            length: Voxels of the input along the axis.
        """
        return AxisPlan(length - 1 - self.lower, length - 1 - self.upper, self.weight)

    def apply(self, volume: torch.Tensor, axis: int) -> torch.Tensor:
        """Interpolate a volume along an axis, on its device.

        Args:
            volume: Any shape, float32.
            axis: Which axis of `volume`.

        Returns:
            float32, with as many voxels along `axis` as the plan has.
        """
        if self.is_copy:
            return volume.narrow(axis, self.needed.start, len(self.lower))
        lower = volume.index_select(axis, self.lower.to(volume.device))
        if torch.equal(self.lower, self.upper):
            return lower
        weight = self.weight.view([-1 if dim == axis else 1 for dim in range(volume.ndim)])
        return lower.lerp_(volume.index_select(axis, self.upper.to(volume.device)), weight.to(volume.device))


@dataclass(frozen=True, eq=False)
class ScanPart:
    """The part of a scan that the result is made of, as it was read, and what is to become of each axis.

    It is what crosses from a loader process to the device of the model: less than the float32 result, and copied once.

    Args:
        values: `(z, rows, columns)`, HU; of an array any real dtype, of a tensor int16 or float32.
        plans: For the axes of `values`.
        is_turned: Whether rows go along x and columns along y, as they lie in NIfTI files, and not the other way round.
    """

    values: np.ndarray | torch.Tensor
    plans: tuple[AxisPlan, AxisPlan, AxisPlan]
    is_turned: bool = False

    @classmethod
    def of(
        cls, volume: CTVolume, orientation: str, target_spacing_mm: Sequence[float], size: Sequence[int]
    ) -> "ScanPart":
        """A view of a volume; nothing is copied.

        Args:
            volume: In HU.
            orientation: Of the result, such as "SLP".
            target_spacing_mm: Of the result, `(z, y, x)`.
            size: Most voxels of the result, `(z, y, x)`; the centre is kept.
        """
        array, spacing_mm = reorient(volume, orientation)
        plans = []
        for axis, size_along in enumerate(size):
            length = array.shape[axis]
            resampled = resampled_length(length, spacing_mm[axis], target_spacing_mm[axis])
            plan = AxisPlan.make(length, resampled, crop_window(resampled, size_along))
            if array.strides[axis] < 0:  # read as it lies in memory, and turned by its indices
                array, plan = np.flip(array, axis), plan.flipped(length)
            needed = plan.needed
            array = array[(slice(None),) * axis + (needed,)]
            plans.append(plan.part(slice(None), needed.start))
        z, y, x = plans
        if array.strides[1] < array.strides[2]:
            return cls(array.transpose(0, 2, 1), (z, x, y), is_turned=True)
        return cls(array, (z, y, x))

    @classmethod
    def whole(cls, values: torch.Tensor) -> "ScanPart":
        """What lies on the model's grid already.

        Args:
            values: `(z, y, x)`, HU, int16 or float32.
        """
        z, y, x = (AxisPlan.make(length, length, (0, length)) for length in values.shape)
        return cls(values, (z, y, x))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the result, `(z, y, x)`."""
        z, rows, columns = (len(plan.lower) for plan in self.plans)
        return (z, columns, rows) if self.is_turned else (z, rows, columns)

    def packed(self, empty: Callable[..., torch.Tensor] = torch.empty) -> "ScanPart":
        """A copy that lies in one piece, plane after plane: int16 where that holds all values of the type, or float32.

        Args:
            empty: Gives memory of a shape and `dtype`.
        """
        is_short = np.can_cast(self.values.dtype, np.int16)
        values = empty(self.values.shape, dtype=torch.int16 if is_short else torch.float32)
        np.copyto(values.numpy(), self.values, casting="unsafe")
        return replace(self, values=values)

    def to(self, device: torch.device | str) -> "ScanPart":
        """The same on a device. Afterwards the memory of this one may be used again.

        Args:
            device: Where to.
        """
        part = self.packed() if isinstance(self.values, np.ndarray) else self
        return replace(part, values=part.values.to(device))

    def resampled(self, hu_min: float, hu_max: float) -> Iterator[torch.Tensor]:
        """The result, a few slices at a time, so that no float copy of the whole scan is ever made.

        Args:
            hu_min: Lower end of the window, to which the scan is clipped before it is interpolated, HU.
            hu_max: Upper end of the window, HU.

        Yields:
            float32, HU, the next slices `(z, y, x)`.
        """
        z, rows, columns = self.plans
        # Slices that are scattered over the memory are gathered once rather than once each.
        values = self.values
        if isinstance(values, np.ndarray) and values.strides[0] < values.strides[1]:
            values = self.packed().values
        is_on_gpu = isinstance(values, torch.Tensor) and values.device.type != "cpu"
        num_slices = _SLAB_OF_GPU if is_on_gpu else _SLAB
        for first in range(0, len(z.lower), num_slices):
            slab = z.part(slice(first, first + num_slices))
            needed = slab.needed
            planes = _to_float(values[needed]).clamp_(hu_min, hu_max)
            # Rows that lie in one piece are gathered far faster than single voxels, so they go first.
            planes = rows.apply(slab.part(slice(None), needed.start).apply(planes, 0), 1)
            yield columns.apply(_turned(planes), 1) if self.is_turned else columns.apply(planes, 2)


def _to_float(values: np.ndarray | torch.Tensor) -> torch.Tensor:
    """A float32 copy, of an array of any byte order and dtype."""
    if isinstance(values, torch.Tensor):
        return values.to(torch.float32, copy=True)
    return torch.from_numpy(np.array(values, dtype=np.float32, order="C"))


def _turned(planes: torch.Tensor) -> torch.Tensor:
    """`(z, rows, columns)` -> `(z, columns, rows)`, in one piece."""
    if planes.device.type != "cpu":
        return planes.transpose(1, 2).contiguous()
    turned = planes.new_empty(planes.shape[0], planes.shape[2], planes.shape[1])
    for plane, source in zip(turned, planes, strict=True):
        plane.copy_(source.t())  # of matrices, torch copies block by block: several times as fast
    return turned


def scale_hu(volume: torch.Tensor, hu_per_unit: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """Convert HU to the unit of `pixel_values`.

    Args:
        volume: Any shape, HU, float32.
        hu_per_unit: HU that make 1.0.
        out: Where to write the result.
    """
    return torch.div(volume, hu_per_unit, out=out)


def inside(out: torch.Tensor, shape: Sequence[int], value: float) -> torch.Tensor:
    """The part of a volume that a smaller one fills, after the rest was padded; an odd voxel goes behind.

    Args:
        out: `(z, y, x)`, the volume.
        shape: Of the smaller one, no longer than `out` along any axis.
        value: What to pad with.

    Returns:
        A view of `out`, of that shape.
    """
    for axis, length in enumerate(shape):
        before = (out.shape[axis] - length) // 2
        out.narrow(axis, 0, before).fill_(value)
        out.narrow(axis, before + length, out.shape[axis] - before - length).fill_(value)
        out = out.narrow(axis, before, length)
    return out
