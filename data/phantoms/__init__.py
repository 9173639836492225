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

Coordinates in these files are `(z, x, y)` in mm from the centre of the volume: z towards superior, x towards
the patient's left, y towards posterior. Volumes are drawn as (S, L, P) and returned as CT-RATE's (L, P, S).
"""

import numpy as np

from medct.data.phantoms.anatomy import blank_canvas, draw_body, jitter, paint_lungs, paint_mediastinum, paint_trunk
from medct.data.phantoms.findings import FINDINGS
from medct.data.phantoms.reports import report_sentences, write_report
from medct.data.phantoms.scanner import scan
from medct.data.phantoms.sites import SITES, Site

NORMAL_FRACTION = 0.05  # patients without any finding, besides those left without one by chance


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


__all__ = ["FINDINGS", "SITES", "Site", "make_phantom", "report_sentences"]
