"""What a site's scanner makes of true densities: kernel, noise, calibration."""

from functools import lru_cache

import numpy as np

from medct.data.phantoms.sites import Point, Site


def smooth(volume: np.ndarray, weights: Point) -> np.ndarray:
    """Apply a three-point kernel along each axis; edge voxels stay as they are.

    Args:
        volume: Three axes, float32.
        weights: Weight of each neighbour, by axis; 0 skips the axis, a negative weight sharpens.
    """
    for axis, weight in enumerate(weights):
        if weight:
            moved = np.moveaxis(volume, axis, 0)
            result = moved.copy()
            result[1:-1] *= np.float32(1 - 2 * weight)
            result[1:-1] += np.float32(weight) * (moved[:-2] + moved[2:])
            volume = np.moveaxis(result, 0, axis)
    return volume


@lru_cache(maxsize=8)
def noise_field(site_index: int, passes: int) -> np.ndarray:
    """A site's noise, with mean 0 and deviation 1, the same in every process.

    Args:
        site_index: Seed; see `Site.index`.
        passes: How often it is smoothed.

    Returns:
        `(96, 144, 144)` float32.
    """
    field = np.random.default_rng([site_index, passes]).standard_normal((96, 144, 144), dtype=np.float32)
    for _ in range(passes):
        field = smooth(field, (0.25, 0.25, 0.25))
    return np.ascontiguousarray(field / field.std())


def crop(field: np.ndarray, shape: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """A random window of a field, randomly mirrored.

    Args:
        field: At least as large as `shape` along each axis.
        shape: Shape of the window.
        rng: Random generator.
    """
    window = []
    for have, want in zip(field.shape, shape, strict=True):
        start = int(rng.integers(have - want + 1))
        window.append(slice(start, start + want))
    mirror = tuple(slice(None, None, int(step)) for step in rng.choice((-1, 1), size=3))
    return field[tuple(window)][mirror]


def scan(hu: np.ndarray, site: Site, rng: np.random.Generator) -> np.ndarray:
    """What the site's scanner makes of the true densities.

    Args:
        hu: `(z, x, y)` float32, true HU.
        site: Decides kernel, noise and calibration.
        rng: Random generator.

    Returns:
        `(z, x, y)` int16, HU as stored, within [-1024, 3071].
    """
    hu = smooth(hu, site.kernel_weights)
    hu = hu + np.float32(site.noise_hu) * crop(noise_field(site.index, site.noise_passes), hu.shape, rng)
    hu *= np.float32(site.hu_gain)
    hu += np.float32(1000 * site.hu_gain - 1000 + site.hu_offset)
    return np.clip(hu, -1024, 3071, out=hu).astype(np.int16)
