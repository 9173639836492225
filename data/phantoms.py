"""Synthetic chest CT phantoms with 18 findings and reports, so that training runs without a network.

These are drawings, not patients: ellipsoids and tubes with plausible densities. They are made without any patient
data, and no score on them says anything about clinical use. They exist to exercise the whole path from volume and
report to adapted model.

What is unusual:
    * Every finding is drawn large and with generous contrast, to survive resampling to 6 x 3.75 x 3.75 mm;
      its prevalence is raised to 0.15-0.45, and findings are independent of each other, as they are not in patients.
    * Sites B and C differ from site A in scanner, protocol and wording, never in anatomy or in how findings are drawn.
      Nothing is chosen by results on C: it shows whether what was chosen on B holds elsewhere.
    * Findings are painted in label order, each over what is already there: a later one may hide an earlier one.
    * Image noise is a random crop of one fixed field per site, far cheaper than fresh noise.
    * A study depends only on (patient, site, seed), never on the studies drawn before it.

Coordinates inside this file are `(z, x, y)` in mm from the centre of the volume: z towards superior, x towards
the patient's left, y towards posterior. Volumes are drawn as (S, L, P) and returned as CT-RATE's (L, P, S).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from medct.configuration_medct import CT_CLIP_LABELS

NORMAL_FRACTION = 0.05  # patients without any finding, besides those left without one by chance
RIGHT, LEFT = -1, 1

Point = tuple[float, float, float]  # (z, x, y), mm
Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Site:
    """Scanner, protocol and wording of one synthetic hospital.

    Attributes:
        index: Position in `SITES`; part of every random seed.
        spacing_mm: Voxel size `(z, x, y)`.
        noise_hu: Standard deviation of the noise.
        noise_passes: How often the noise is smoothed: more passes, coarser grain.
        kernel_weights: Weight of each neighbour along `(z, x, y)` in the reconstruction kernel, at most 1/3;
            negative sharpens.
        hu_gain: Calibration slope, with air (-1000 HU) fixed.
        hu_offset: Calibration offset, HU.
        isocentre_mm: Where the patient's centre lies in the volume, `(z, x, y)`.
        lung_hu: Density of normal lung, which depends on the breath-hold.
        blood_hu: Density of heart and vessels, which depends on the contrast medium.
        technique: Sentence for `Technique_EN`.
        present: Templates for a finding that is present; `{phrase}` or `{Phrase}` stands for its name.
        absent: Templates for a finding that is absent.
        impression: Template for the findings, joined by commas.
        normal: Impression of a study without findings.
        extent_mm: What a scan covers, `(z, x, y)`.
    """

    index: int
    spacing_mm: Point
    noise_hu: float
    noise_passes: int
    kernel_weights: Point
    hu_gain: float
    hu_offset: float
    isocentre_mm: Point
    lung_hu: float
    blood_hu: float
    technique: str
    present: tuple[str, ...]
    absent: tuple[str, ...]
    impression: str
    normal: str
    extent_mm: Point = (300.0, 350.0, 350.0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along `(z, x, y)`."""
        return tuple(int(extent / step) for extent, step in zip(self.extent_mm, self.spacing_mm, strict=True))


SITES: dict[str, Site] = {
    "A": Site(
        index=0,
        spacing_mm=(5.0, 3.0, 3.0),
        noise_hu=20.0,
        noise_passes=0,
        kernel_weights=(0.0, -0.06, -0.06),
        hu_gain=1.0,
        hu_offset=0.0,
        isocentre_mm=(0.0, 0.0, 0.0),
        lung_hu=-830.0,
        blood_hu=170.0,
        technique="Contrast-enhanced chest CT, sharp kernel, 5 mm slices.",
        present=("{Phrase} is present.", "There is {phrase}.", "{Phrase} is observed."),
        absent=("{Phrase} is not present.", "No {phrase} is detected."),
        impression="Findings: {phrases}.",
        normal="No finding is present.",
    ),
    "B": Site(
        index=1,
        spacing_mm=(4.0, 3.4, 3.4),
        noise_hu=60.0,
        noise_passes=2,
        kernel_weights=(0.1, 0.25, 0.25),
        hu_gain=1.05,
        hu_offset=35.0,
        isocentre_mm=(-14.0, 4.0, 18.0),
        lung_hu=-780.0,
        blood_hu=100.0,
        technique="Low-dose thoracic computed tomography, soft kernel, 4 mm reconstruction.",
        present=("{Phrase} noted.", "Images show {phrase}.", "Appearances in keeping with {phrase}."),
        absent=("No sign of {phrase}.", "Study free of {phrase}."),
        impression="Conclusion: {phrases}.",
        normal="Conclusion: unremarkable examination of the thorax.",
    ),
    "C": Site(
        index=2,
        spacing_mm=(6.0, 2.8, 2.8),
        noise_hu=45.0,
        noise_passes=1,
        kernel_weights=(0.15, -0.1, -0.1),
        hu_gain=0.96,
        hu_offset=-25.0,
        isocentre_mm=(10.0, -8.0, -12.0),
        lung_hu=-870.0,
        blood_hu=45.0,
        technique="Unenhanced scan of the chest, small field of view, 6 mm slabs.",
        present=("Evidence of {phrase}.", "{Phrase}, as before.", "One sees {phrase}."),
        absent=("Without {phrase}.", "{Phrase} excluded."),
        impression="Opinion: {phrases}.",
        normal="Opinion: no abnormality.",
        extent_mm=(270.0, 310.0, 310.0),
    ),
}

INDICATIONS = ("Cough.", "Dyspnea.", "Chest pain.", "Follow-up.", "Not given.")


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Findings
# ---------------------------------------------------------------------------------------------------------------------


def some_sides(rng: np.random.Generator, both: float = 0.4) -> tuple[int, ...]:
    """Choose one side at random, or both.

    Args:
        rng: Random generator.
        both: Probability of both, in [0, 1].
    """
    return (RIGHT, LEFT) if rng.random() < both else (int(rng.choice((RIGHT, LEFT))),)


def medical_material(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """A generator under the skin of one side with a lead to the heart, or wires in the sternum.

    Args:
        canvas, body, rng: See `Finding.paint`.
    """
    s = body.size
    if rng.random() < 0.3:
        for z in range(-50, 80, 25):
            canvas.fill(canvas.ellipsoid((z, rng.uniform(-6, 6), -99 * s), (9, 14, 8)), 2500)
        return
    pocket = jitter(rng, (95, int(rng.choice((RIGHT, LEFT))) * 78 * s, -80 * s), 8)
    canvas.fill(canvas.ellipsoid(pocket, (26, 26, 13)), 2500)
    inlet = (100, -12, -15)
    canvas.fill(canvas.tube(pocket, inlet, 4.5), 2000)
    canvas.fill(canvas.tube(inlet, jitter(rng, body.heart, 12), 4.5), 2000)


def arterial_calcification(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """Bright plaques along the wall of the aorta.

    Args:
        canvas, body, rng: See `Finding.paint`.
    """
    for _ in range(rng.integers(6, 11)):
        leg = rng.choice(len(body.aorta) - 1, p=(0.1, 0.2, 0.3, 0.4))
        start, end = np.array(body.aorta[leg]), np.array(body.aorta[leg + 1])
        angle = rng.uniform(0, 2 * np.pi)
        wall = start + (0, 12 * np.cos(angle), 12 * np.sin(angle)) + rng.uniform(0, 0.6) * (end - start)
        plaque_mm = rng.uniform(8, 30) * (end - start) / np.linalg.norm(end - start)
        canvas.fill(canvas.tube(wall, wall + plaque_mm, rng.uniform(4.5, 6)), 1000)


def cardiomegaly(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """A heart a quarter to a half wider than usual.

    Args:
        canvas, body, rng: See `Finding.paint`.
    """
    factor = rng.uniform(1.25, 1.45)
    body.heart_radii = tuple(r * factor for r in body.heart_radii)
    paint_heart(canvas, body)


def pericardial_effusion(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """A rim of fluid in place of the fat around the heart.

    Args:
        canvas, body, rng: See `Finding.paint`.
    """
    paint_heart(canvas, body, rim_mm=rng.uniform(11, 18), rim_hu=10)


def coronary_calcification(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """Bright plaques down the front of the heart, where the coronary arteries run.

    Args:
        canvas, body, rng: See `Finding.paint`.
    """
    for _ in range(rng.integers(3, 6)):
        across, upper = rng.uniform(-0.6, 0.8), rng.uniform(0.3, 0.9)
        ends = np.array(((upper, across, -0.7), (upper - rng.uniform(0.3, 0.9), across + 0.15, -0.9)))
        ends /= np.linalg.norm(ends, axis=1, keepdims=True)
        start, end = ends * body.heart_radii + body.heart
        canvas.fill(canvas.tube(start, end, rng.uniform(5.5, 7.5)), 1000)


def hiatal_hernia(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """A pouch of stomach with air in it, behind the heart.

    Args:
        canvas, body, rng: See `Finding.paint`.
    """
    radius = rng.uniform(20, 28)
    centre = jitter(rng, (-58, 2, 38), 8)
    canvas.fill(canvas.ellipsoid(centre, (radius, radius, radius)), 40, organ=True)
    # air rises to the front of a patient lying supine
    bubble = (centre[0] + 3, centre[1], centre[2] - 0.3 * radius)
    canvas.fill(canvas.ellipsoid(bubble, (0.65 * radius, 0.7 * radius, 0.55 * radius)), -950)


def lymphadenopathy(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """Enlarged nodes beside the trachea, under the carina and at the hila, where they bulge into the lungs.

    Args:
        canvas, body, rng: See `Finding.paint`.
    """
    stations = ((78, -26, -4), (78, 26, -4), (55, -34, -6), (55, 34, -6), (22, 36, 8), (22, -36, 8), (20, 0, 16))
    for station in rng.permutation(stations)[: rng.integers(5, 8)]:
        radius = rng.uniform(13, 18)
        canvas.fill(canvas.ellipsoid(jitter(rng, station, 4), (radius, radius, radius)), 70, organ=True)


def emphysema(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """Holes of almost pure air, mostly in the upper lungs.

    Args:
        canvas, body, rng: See `Finding.paint`.
    """
    for side in (RIGHT, LEFT):
        for _ in range(rng.integers(8, 13)):
            radius = rng.uniform(14, 26)
            centre = body.lung_point(rng, side, up=(0.15, 0.85), out=(-0.4, 0.7), back=(-0.8, 0.8))
            canvas.fill(canvas.ellipsoid(centre, (radius, radius, radius)), -1000, in_lung=True)


def atelectasis(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """A dense plate above a raised diaphragm.

    Args:
        canvas, body, rng: See `Finding.paint`.
    """
    for side in some_sides(rng, both=0.25):
        top = body.dome_tops[side] + rng.uniform(8, 22)
        paint_dome(canvas, body, side, top)
        centre = (top + rng.uniform(10, 18), side * rng.uniform(65, 90) * body.size, rng.uniform(-15, 15))
        canvas.fill(canvas.ellipsoid(centre, (rng.uniform(8, 12), 32, 62)), 20, in_lung=True)


def lung_nodule(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """Four to nine dense balls of 18 to 26 mm.

    Args:
        canvas, body, rng: See `Finding.paint`.
    """
    for _ in range(rng.integers(4, 10)):
        radius = rng.uniform(9, 13)
        centre = body.lung_point(rng, int(rng.choice((RIGHT, LEFT))), up=(0.0, 0.6), out=(0.2, 0.7), back=(-0.5, 0.5))
        canvas.fill(canvas.ellipsoid(centre, (radius, radius, radius)), 100, in_lung=True)


def lung_opacity(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """Patches of ground glass: hazy, with vessels still visible through them.

    Args:
        canvas, body, rng: See `Finding.paint`.
    """
    for side in some_sides(rng, both=0.75):
        for _ in range(rng.integers(3, 6)):
            centre = body.lung_point(rng, side, up=(-0.4, 0.5), out=(0.0, 0.7))
            canvas.add(canvas.ellipsoid(centre, tuple(rng.uniform(24, 38, size=3))), rng.uniform(180, 300))


def fibrotic_sequela(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """Scars: a shrunken, dense apex and bands from it towards the hilum.

    Args:
        canvas, body, rng: See `Finding.paint`.
    """
    for side in some_sides(rng, both=0.6):
        apex = body.lung_point(rng, side, up=(0.85, 0.9), out=(-0.1, 0.1), back=(-0.1, 0.1))
        canvas.fill(canvas.ellipsoid(apex, (rng.uniform(14, 22), 26, 32)), 0, in_lung=True)
        for _ in range(rng.integers(4, 7)):
            end = body.lung_point(rng, side, up=(0.35, 0.6), out=(-0.3, 0.7), back=(-0.6, 0.6))
            canvas.fill(canvas.tube(apex, end, rng.uniform(4, 6)), 0, in_lung=True)


def pleural_effusion(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """Fluid in the lowest part of the chest of a patient lying supine.

    Args:
        canvas, body, rng: See `Finding.paint`.
    """
    for side in some_sides(rng):
        (cz, cx, cy), (rz, rx, ry) = body.lung_centres[side], body.lung_radii[side]
        box, (z, _, y) = canvas.box((cz - rz, cx - rx, cy), (cz + rz / 2, cx + rx, cy + ry))
        depth = (y - cy) - 0.25 * (z - cz) - rng.uniform(0.5, 0.75) * ry
        canvas.fill((box, canvas.coverage(depth)), 10, in_lung=True)


def mosaic_attenuation(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """Lobules of two densities side by side.

    Args:
        canvas, body, rng: See `Finding.paint`.
    """
    lobule_mm = rng.uniform(24, 34)
    _, lines = canvas.box((-1e3,) * 3, (1e3,) * 3)
    cells = [((line.ravel() + 200) / lobule_mm).astype(int) for line in lines]
    dark_or_bright = rng.choice(np.float32((-120, 220)), size=(24, 24, 24))
    canvas.hu += dark_or_bright[np.ix_(*cells)] * canvas.lung


def peribronchial_thickening(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """Thick walls around bronchi near the hila.

    Args:
        canvas, body, rng: See `Finding.paint`.
    """
    for side in (RIGHT, LEFT):
        for _ in range(rng.integers(4, 7)):
            end = body.lung_point(rng, side, up=(-0.35, 0.45), out=(-0.2, 0.2), back=(-0.4, 0.5))
            paint_airway(canvas, body.hilum(side), end, 3, rng.uniform(5, 7))


def consolidation(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """A large dense patch crossed by an air-filled bronchus.

    Args:
        canvas, body, rng: See `Finding.paint`.
    """
    for side in some_sides(rng, both=0.2):
        centre = body.lung_point(rng, side, up=(-0.3, 0.6), out=(0.1, 0.6), back=(-0.4, 0.6))
        canvas.fill(canvas.ellipsoid(centre, tuple(rng.uniform(32, 46, size=3))), 40, in_lung=True)
        canvas.fill(canvas.tube(body.hilum(side), centre, 3.5), -900, in_lung=True)


def bronchiectasis(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """Clusters of wide bronchi with visible walls in the outer lower lungs.

    Args:
        canvas, body, rng: See `Finding.paint`.
    """
    for side in some_sides(rng, both=0.75):
        for _ in range(rng.integers(6, 10)):
            start = body.lung_point(rng, side, up=(-0.4, 0.1), out=(0.1, 0.6), back=(-0.3, 0.6))
            end = (start[0] - rng.uniform(15, 45), start[1] + side * rng.uniform(0, 15), start[2] + rng.uniform(-5, 20))
            paint_airway(canvas, start, end, rng.uniform(6, 9), 4)


def septal_thickening(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """A net of lines at the bases of both lungs.

    Args:
        canvas, body, rng: See `Finding.paint`.
    """
    pitch_mm, top = rng.uniform(15, 20), rng.uniform(-10, 25)
    box, (z, x, y) = canvas.box((-150, -1e3, -1e3), (top, 1e3, 1e3))
    lines = ((x + 0.3 * z) % pitch_mm < 5) | ((y - 0.3 * z) % pitch_mm < 5)
    canvas.add((box, lines), 420)


@dataclass(frozen=True)
class Finding:
    """How one label looks, how common it is, and what each site calls it.

    Args:
        paint: Paints the finding. Takes the canvas to paint on, the patient's anatomy, and a random generator.
        prevalence: Share of patients, in [0, 1], before `NORMAL_FRACTION` is taken off.
        phrases: Names of the finding, by site.
    """

    paint: Callable[[Canvas, Body, np.random.Generator], None]
    prevalence: float
    phrases: dict[str, tuple[str, ...]]


# In the order of CT_CLIP_LABELS: painter, prevalence, site B's phrases. Site A uses the label's own name.
_FINDINGS = (
    (medical_material, 0.2, ("indwelling device", "metallic hardware with lead")),
    (arterial_calcification, 0.3, ("aortic atheroma", "calcified plaques of the aorta")),
    (cardiomegaly, 0.2, ("enlarged cardiac silhouette", "increased cardiothoracic ratio")),
    (pericardial_effusion, 0.15, ("fluid around the heart", "fluid in the pericardial sac")),
    (coronary_calcification, 0.25, ("calcified LAD plaques", "coronary atherosclerosis")),
    (hiatal_hernia, 0.2, ("intrathoracic stomach", "sliding herniation of the gastric fundus")),
    (lymphadenopathy, 0.25, ("enlarged mediastinal nodes", "bulky nodal stations")),
    (emphysema, 0.25, ("destroyed airspaces of the upper zones", "centrilobular and bullous air trapping")),
    (atelectasis, 0.3, ("basal volume loss", "subsegmental collapse")),
    (lung_nodule, 0.4, ("rounded pulmonary lesions", "focal solid densities")),
    (lung_opacity, 0.4, ("ground-glass haziness", "hazy increased density")),
    (fibrotic_sequela, 0.25, ("apical scarring", "old post-infectious bands")),
    (pleural_effusion, 0.2, ("dependent pleural fluid", "hydrothorax")),
    (mosaic_attenuation, 0.15, ("patchwork lung density", "geographic air trapping")),
    (peribronchial_thickening, 0.2, ("bronchial wall cuffing", "thick-walled central airways")),
    (consolidation, 0.25, ("airspace filling with air bronchogram", "lobar hepatization")),
    (bronchiectasis, 0.2, ("dilated bronchi", "tram-track airways")),
    (septal_thickening, 0.15, ("Kerley lines", "basal reticulation")),
)
_WORDS_OF_SITE_C = (
    ("foreign material", "port or pacing system"),
    ("sclerotic large vessels", "mural chalk of the arch"),
    ("big heart", "dilated heart shadow"),
    ("haemopericardium or transudate", "thick pericardial layer of fluid"),
    ("chalk in the coronaries", "heavy coronary calcium"),
    ("stomach above the diaphragm", "paraoesophageal hernia"),
    ("prominent glands", "lymph nodes above 1 cm"),
    ("rarefied parenchyma", "bullous lung"),
    ("plate-like collapse", "dystelectasis"),
    ("coin lesions", "round foci"),
    ("veil-like clouding", "frosted areas"),
    ("specific residues", "cicatricial strands"),
    ("liquid in the pleural space", "pleural transudate"),
    ("chequered parenchyma", "uneven aeration"),
    ("swollen bronchial walls", "peribronchial sleeves"),
    ("solid infiltrate", "pneumonic infiltration"),
    ("ectatic airways", "signet ring airways"),
    ("thick septa", "net-like lower zones"),
)
FINDINGS: dict[str, Finding] = {
    name: Finding(paint, prevalence, {"A": (name.lower(),), "B": words_b, "C": words_c})
    for name, (paint, prevalence, words_b), words_c in zip(CT_CLIP_LABELS, _FINDINGS, _WORDS_OF_SITE_C, strict=True)
}


# ---------------------------------------------------------------------------------------------------------------------
# Scanner
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Reports
# ---------------------------------------------------------------------------------------------------------------------


def sentences(name: str, present: bool, site: str) -> list[str]:
    """Every way in which a site says that a finding is present or absent.

    Args:
        name: Label of the finding.
        present: Which of the two.
        site: Key of `SITES`.
    """
    templates = SITES[site].present if present else SITES[site].absent
    phrases = FINDINGS[name].phrases[site]
    return [t.format(phrase=p, Phrase=p[0].upper() + p[1:]) for t in templates for p in phrases]


def report_sentences(site: str) -> list[str]:
    """Every sentence that a site's reports are composed of, for building a vocabulary."""
    findings = [text for name in FINDINGS for present in (True, False) for text in sentences(name, present, site)]
    impressions = [SITES[site].impression.format(phrases=p) for f in FINDINGS.values() for p in f.phrases[site]]
    return [*INDICATIONS, SITES[site].technique, *findings, *impressions, SITES[site].normal]


def write_report(labels: dict[str, int], site: str, rng: np.random.Generator) -> dict[str, str]:
    """Write a report of all findings present and three to six of those absent, in random order.

    Args:
        labels: 0 or 1 for each finding.
        site: Key of `SITES`.
        rng: Random generator.

    Returns:
        The four report columns of CT-RATE.
    """
    present = [name for name, there in labels.items() if there]
    absent = [name for name, there in labels.items() if not there]
    mentioned = [*present, *rng.permutation(absent)[: rng.integers(3, 7)]]
    lines = [str(rng.choice(sentences(name, bool(labels[name]), site))) for name in rng.permutation(mentioned)]
    phrases = [str(rng.choice(FINDINGS[name].phrases[site])) for name in present]
    return {
        "ClinicalInformation_EN": str(rng.choice(INDICATIONS)),
        "Technique_EN": SITES[site].technique,
        "Findings_EN": " ".join(lines),
        "Impressions_EN": SITES[site].impression.format(phrases=", ".join(phrases)) if present else SITES[site].normal,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Studies
# ---------------------------------------------------------------------------------------------------------------------


def draw_labels(rng: np.random.Generator) -> dict[str, int]:
    """Draw independent findings by prevalence, with an occasional patient without any."""
    healthy = rng.random() < NORMAL_FRACTION
    draws = rng.random(len(FINDINGS))
    return {
        name: int(not healthy and draw < finding.prevalence)
        for (name, finding), draw in zip(FINDINGS.items(), draws, strict=True)
    }


def paint_volume(labels: dict[str, int], site: Site, rng: np.random.Generator) -> np.ndarray:
    """Paint a patient with the given findings and scan them.

    Args:
        labels: 0 or 1 for each finding.
        site: Scanner and protocol.
        rng: Random generator.

    Returns:
        `(z, x, y)` int16, HU.
    """
    canvas = blank_canvas(site, jitter(rng, site.isocentre_mm, 4))
    body = draw_body(rng, site)
    paint_trunk(canvas, body, rng)
    paint_lungs(canvas, body, rng, site)
    paint_mediastinum(canvas, body, rng)
    for name, finding in FINDINGS.items():
        if labels[name]:
            finding.paint(canvas, body, rng)
    return scan(canvas.hu, site, rng)


def make_phantom(patient: int, site: str = "A", seed: int = 0) -> dict:
    """Make one synthetic study with CT-RATE's columns.

    Args:
        patient: Number of the patient, 0 or more.
        site: Key of `SITES`.
        seed: Seed for the whole cohort.

    Returns:
        `VolumeName`, four report columns, 18 label columns of 0 or 1, `volume`: int16 HU with axes (L, P, S), a view
        that is contiguous as (S, L, P), and `affine`: `(4, 4)` float64, voxel to RAS+ mm.

    Raises:
        KeyError: If there is no such site.
    """
    scanner = SITES[site]
    rng = np.random.default_rng([seed, scanner.index, patient])
    labels = draw_labels(rng)
    report = write_report(labels, site, rng)
    volume = paint_volume(labels, scanner, rng).transpose(1, 2, 0)  # (S, L, P) -> (L, P, S)
    dz, dx, dy = scanner.spacing_mm
    affine = np.diag((-dx, -dy, dz, 1.0))  # L and P run against RAS+
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(volume.shape) - 1) / 2)
    name = f"phantom_{site.lower()}_{patient}_a_1.nii.gz"
    return {"VolumeName": name, **report, **labels, "volume": volume, "affine": affine}
