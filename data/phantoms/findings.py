"""The eighteen findings: how each is painted, how common it is, and what each site calls it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from medct.configuration_medct import CT_CLIP_LABELS
from medct.data.phantoms.anatomy import (
    LEFT,
    RIGHT,
    Body,
    Canvas,
    jitter,
    paint_airway,
    paint_dome,
    paint_heart,
)


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
