"""A patient's body, and the volume that it is painted into."""

from dataclasses import dataclass

import numpy as np

from medct.data.phantoms.scanner import crop, noise_field
from medct.data.phantoms.sites import Point, Site

RIGHT, LEFT = -1, 1

Box = tuple[slice, slice, slice]


@dataclass
class Canvas:
    """A volume being drawn.

    Attributes:
        hu: `(z, x, y)` float32, HU.
        lung: `(z, x, y)` bool, true in lung tissue.
        spacing_mm: Voxel size.
        origin_mm: Coordinates of voxel (0, 0, 0).
    """

    hu: np.ndarray
    lung: np.ndarray
    spacing_mm: Point
    origin_mm: Point

    def box(self, low: Point, high: Point) -> tuple[Box, list[np.ndarray]]:
        """Voxels between two corners, and their coordinates.

        Args:
            low: Corner with the lower coordinates, mm.
            high: Corner with the higher coordinates, mm.

        Returns:
            Slices, and coordinates in mm as three arrays that broadcast to their shape.
        """
        slices, coordinates = [], []
        for axis, (step, origin, length) in enumerate(zip(self.spacing_mm, self.origin_mm, self.hu.shape, strict=True)):
            start = min(max(int((low[axis] - origin) // step), 0), length)
            stop = min(max(int((high[axis] - origin) // step) + 2, start), length)
            slices.append(slice(start, stop))
            line = np.arange(start, stop, dtype=np.float32) * np.float32(step) + np.float32(origin)
            coordinates.append(line.reshape([-1 if other == axis else 1 for other in range(3)]))
        return tuple(slices), coordinates

    def ellipsoid(self, centre: Point, radii: Point) -> tuple[Box, np.ndarray]:
        """Box around an ellipsoid, and the share of each voxel that it covers, in [0, 1].

        Args:
            centre: Its centre, mm.
            radii: Half its axes, mm.
        """
        margin = [r + s for r, s in zip(radii, self.spacing_mm, strict=True)]
        low = tuple(c - m for c, m in zip(centre, margin, strict=True))
        high = tuple(c + m for c, m in zip(centre, margin, strict=True))
        box, coordinates = self.box(low, high)
        z, x, y = (((line - c) / r) ** 2 for line, c, r in zip(coordinates, centre, radii, strict=True))
        return box, self.coverage((1 - np.sqrt(z + x + y)) * min(radii))

    def tube(self, start: Point, end: Point, radius: float) -> tuple[Box, np.ndarray]:
        """Box around a round-ended tube, and the share of each voxel that it covers, in [0, 1].

        Args:
            start: One end of its centre line, mm.
            end: The other end, mm.
            radius: Its radius, mm.
        """
        margin = radius + max(self.spacing_mm)
        low = tuple(min(pair) - margin for pair in zip(start, end, strict=True))
        high = tuple(max(pair) + margin for pair in zip(start, end, strict=True))
        box, coordinates = self.box(low, high)
        offsets = [line - np.float32(s) for line, s in zip(coordinates, start, strict=True)]
        axis = [np.float32(e - s) for s, e in zip(start, end, strict=True)]
        length2 = max(sum(a * a for a in axis), np.float32(1e-3))
        along = sum(o * (a / length2) for o, a in zip(offsets, axis, strict=True)).clip(0, 1)
        distance2 = sum((o - along * a) ** 2 for o, a in zip(offsets, axis, strict=True))
        return box, self.coverage(radius - np.sqrt(distance2))

    def coverage(self, depth_mm: np.ndarray) -> np.ndarray:
        """Share of a voxel inside a surface, from its centre's depth below it: a cheap partial-volume effect."""
        return (depth_mm / np.float32(self.spacing_mm[1]) + np.float32(0.5)).clip(0, 1)

    def fill(self, shape: tuple[Box, np.ndarray], hu: float, in_lung: bool = False, organ: bool = False) -> None:
        """Give a shape one density.

        Args:
            shape: Box and coverage, as from `ellipsoid` or `tube`.
            hu: Density.
            in_lung: Leave what is not lung unchanged.
            organ: Whether filled voxels cease to be lung.
        """
        box, share = shape
        if in_lung:
            share = share * self.lung[box]
        self.hu[box] += share * (np.float32(hu) - self.hu[box])
        if organ:
            self.lung[box] &= share < 0.5

    def add(self, shape: tuple[Box, np.ndarray], hu: float) -> None:
        """Add to the density of the lung inside a shape.

        Args:
            shape: Box and coverage, as from `ellipsoid` or `tube`.
            hu: What to add, HU.
        """
        box, share = shape
        self.hu[box] += share * self.lung[box] * np.float32(hu)


@dataclass
class Body:
    """One patient's anatomy, mm and HU; drawn from the same distribution at every site.

    Attributes:
        size: Scale of the whole body, about 1.
        lung_centres, lung_radii: Centre and radii of the lung, by side.
        dome_tops: Height of the diaphragm, by side.
        heart: Centre of the heart.
        heart_radii: Radii of the heart; cardiomegaly enlarges them while findings are painted.
        aorta: Centre line from the heart over the arch down to the diaphragm.
        blood_hu: Density of heart and vessels.
    """

    size: float
    lung_centres: dict[int, Point]
    lung_radii: dict[int, Point]
    dome_tops: dict[int, float]
    heart: Point
    heart_radii: Point
    aorta: list[Point]
    blood_hu: float

    def lung_point(
        self, rng: np.random.Generator, side: int, up=(-0.5, 0.7), out=(-0.2, 0.6), back=(-0.6, 0.6)
    ) -> Point:
        """A random point in one lung.

        Args:
            rng: Random generator.
            side: `RIGHT` or `LEFT`.
            up: Range towards superior, in fractions of the lung's radius.
            out: Range towards lateral, likewise.
            back: Range towards posterior, likewise.
        """
        z, x, y = (rng.uniform(*span) for span in (up, out, back))
        shrink = min(1.0, 0.85 / np.sqrt(z * z + x * x + y * y))
        (cz, cx, cy), (rz, rx, ry) = self.lung_centres[side], self.lung_radii[side]
        return cz + shrink * z * rz, cx + side * shrink * x * rx, cy + shrink * y * ry

    def hilum(self, side: int) -> Point:
        """Where bronchi and vessels enter a lung."""
        return 25 * self.size, side * 30 * self.size, 8 * self.size


def jitter(rng: np.random.Generator, point: Point, spread_mm: float) -> Point:
    """Move a point at random.

    Args:
        rng: Random generator.
        point: The point, mm.
        spread_mm: Largest move along each axis, either way.
    """
    return tuple(p + rng.uniform(-spread_mm, spread_mm) for p in point)


def draw_body(rng: np.random.Generator, site: Site) -> Body:
    """Draw one patient's anatomy.

    Args:
        rng: Random generator.
        site: Decides the density of blood, and nothing else.
    """
    size = rng.uniform(0.94, 1.06)
    heart_size = size * rng.uniform(0.9, 1.08)
    widths = {side: rng.uniform(54, 62) * size for side in (RIGHT, LEFT)}
    arch = jitter(rng, (75 * size, 8, 0), 5)
    return Body(
        size=size,
        lung_centres={side: jitter(rng, (12, side * 74 * size, 0), 4) for side in (RIGHT, LEFT)},
        lung_radii={side: (rng.uniform(115, 130), widths[side], 88 * size) for side in (RIGHT, LEFT)},
        dome_tops={RIGHT: rng.uniform(-62, -45), LEFT: rng.uniform(-72, -55)},
        heart=jitter(rng, (-28, 16 * size, -28 * size), 5),
        heart_radii=tuple(r * heart_size for r in (44, 50, 40)),
        aorta=[jitter(rng, (5, -8, -22), 4), (arch[0] - 15, -10, -18), arch, (arch[0] - 15, 24, 38), (-150, 14, 46)],
        blood_hu=site.blood_hu + rng.uniform(-25, 25),
    )


def blank_canvas(site: Site, centre_mm: Point) -> Canvas:
    """A canvas full of air.

    Args:
        site: Decides shape and voxel size.
        centre_mm: Where the patient's centre lies in the volume.
    """
    origin = tuple(-(n - 1) / 2 * s - c for n, s, c in zip(site.shape, site.spacing_mm, centre_mm, strict=True))
    return Canvas(np.full(site.shape, -1000, np.float32), np.zeros(site.shape, bool), site.spacing_mm, origin)


def paint_trunk(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """Paint skin, fat, muscle, spine and sternum: one cross-section for all slices, then ribs across it.

    Args:
        canvas, body, rng: See `Finding.paint`.
    """
    _, (z, x, y) = canvas.box((-1e3,) * 3, (1e3,) * 3)
    x, y, s = x[0], y[0], body.size
    fat_mm = rng.uniform(8, 24)
    wall = np.sqrt((x / (150 * s)) ** 2 + (y / (104 * s)) ** 2)  # 1 at the outer edge of the muscle
    section = np.where(wall < 1 + fat_mm / 125, np.float32(-100), np.float32(-1000))
    section[wall < 1] = 45
    section[x**2 + (y - 78 * s) ** 2 < (19 * s) ** 2] = 280
    section[(x / 18) ** 2 + ((y + 97 * s) / 6) ** 2 < 1] = 250
    canvas.hu[:] = section
    ring = (np.abs(wall - 0.95) < 0.04) & (np.abs(x) > 25)
    pitch = (z[:, :, 0] - 0.35 * np.broadcast_to(-y, wall.shape)[ring]) % 30  # ribs slope down towards the front
    canvas.hu[:, ring] += np.where(pitch < 11, np.float32(330), np.float32(0))


def paint_lungs(canvas: Canvas, body: Body, rng: np.random.Generator, site: Site) -> None:
    """Paint both lungs with texture and gravity's gradient, and the diaphragm below them.

    Args:
        canvas, body, rng: See `Finding.paint`.
        site: Decides density and texture of the lungs.
    """
    lung_hu = site.lung_hu + rng.uniform(-25, 25)
    texture = crop(noise_field(site.index, 6), canvas.hu.shape, rng)
    for side in (RIGHT, LEFT):
        box, share = canvas.ellipsoid(body.lung_centres[side], body.lung_radii[side])
        _, (_, _, y) = canvas.box((-1e3,) * 3, (1e3,) * 3)
        tissue = texture[box] * np.float32(18) + (np.float32(lung_hu) + np.float32(0.3) * y[:, :, box[2]])
        canvas.hu[box] += share * (tissue - canvas.hu[box])
        canvas.lung[box] |= share > 0.5
    for side, top in body.dome_tops.items():
        paint_dome(canvas, body, side, top)


def paint_dome(canvas: Canvas, body: Body, side: int, top_mm: float) -> None:
    """Paint one half of the diaphragm and the organ below it.

    Args:
        canvas, body: See `Finding.paint`.
        side: `RIGHT` or `LEFT`.
        top_mm: Height of its highest point.
    """
    centre = (top_mm - 90, side * 70 * body.size, -8)
    canvas.fill(canvas.ellipsoid(centre, (90, 78 * body.size, 92 * body.size)), 70, organ=True)


def paint_mediastinum(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """Paint fat, airways, aorta, heart, and vessels fanning out from the hila.

    Args:
        canvas, body, rng: See `Finding.paint`.
    """
    s = body.size
    canvas.fill(canvas.ellipsoid((20, 0, 5), (125, 34 * s, 68 * s)), -80, organ=True)
    for start, end in zip(body.aorta, body.aorta[1:], strict=False):
        canvas.fill(canvas.tube(start, end, 13 * s), body.blood_hu, organ=True)
    carina = (42 * s, 0, 12)
    canvas.fill(canvas.tube((160, 0, 8), carina, 8), -990, organ=True)
    for side in (RIGHT, LEFT):
        paint_airway(canvas, carina, body.hilum(side), 6, 2, in_lung=False)
        for _ in range(6):
            end = body.lung_point(rng, side, up=(-0.8, 0.7), out=(-0.3, 0.8), back=(-0.8, 0.8))
            canvas.fill(canvas.tube(body.hilum(side), end, rng.uniform(1.2, 2.2)), -250, in_lung=True)
    paint_heart(canvas, body)


def paint_airway(canvas: Canvas, start: Point, end: Point, radius: float, wall: float, in_lung: bool = True) -> None:
    """Paint a tube of air with a wall.

    Args:
        canvas: Volume to paint on.
        start: One end, mm.
        end: The other end, mm.
        radius: Radius of the lumen, mm.
        wall: Thickness of the wall, mm.
        in_lung: Leave what is not lung unchanged.
    """
    canvas.fill(canvas.tube(start, end, radius + wall), -20, in_lung=in_lung)
    canvas.fill(canvas.tube(start, end, radius), -990, in_lung=in_lung)


def paint_heart(canvas: Canvas, body: Body, rim_mm: float = 4, rim_hu: float = -90) -> None:
    """Paint the heart inside a rim, of fat by default.

    Args:
        canvas, body: See `Finding.paint`.
        rim_mm: Thickness of the rim.
        rim_hu: Density of the rim.
    """
    rim = tuple(r + rim_mm for r in body.heart_radii)
    canvas.fill(canvas.ellipsoid(body.heart, rim), rim_hu, organ=True)
    canvas.fill(canvas.ellipsoid(body.heart, body.heart_radii), body.blood_hu, organ=True)
