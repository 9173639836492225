"""Reports in each site's words."""

import numpy as np

from medct.data.phantoms.findings import FINDINGS
from medct.data.phantoms.sites import SITES

INDICATIONS = ("Cough.", "Dyspnea.", "Chest pain.", "Follow-up.", "Not given.")


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
