"""How findings are coded: each in a scheme of our own, and in SNOMED CT as well where that is certain.

A code of SNOMED CT stands here only where it means the finding itself, neither more nor less, and where independent
sources agree on it. The others (interlobular septal thickening, say) have none.
"""

import hashlib
import unicodedata
from typing import NamedTuple

SCHEME = "99MEDCT"
"""Private schemes of DICOM begin with 99."""
SCHEME_UID = "2.25.87947663692043549024089477397125115867"
SCHEME_NAME = "MedCT: what a model of chest CT was asked for"
_LONGEST_MEANING = 64
"""Letters of a code's meaning in DICOM."""


class Coded(NamedTuple):
    """A concept."""

    value: str
    scheme: str
    meaning: str


SCORE = Coded("SCORE", SCHEME, "Score, no probability of disease")
PROBABILITY = Coded("PROBABILITY", SCHEME, "Probability, calibrated for one site")
OPERATING_POINT = Coded("OPERATING-POINT", SCHEME, "Least score that is called present")
CALL = Coded("CALL", SCHEME, "Score compared with the operating point")
PRESENT = Coded("52101004", "SCT", "Present")
ABSENT = Coded("2667000", "SCT", "Absent")
CHEST_CT = Coded("24627-2", "LN", "CT Chest")

_SNOMED = {
    "Cardiomegaly": Coded("8186001", "SCT", "Cardiomegaly"),
    "Pericardial effusion": Coded("373945007", "SCT", "Pericardial effusion"),
    "Coronary artery wall calcification": Coded("445512009", "SCT", "Calcification of coronary artery"),
    "Hiatal hernia": Coded("84089009", "SCT", "Hiatal hernia"),
    "Lymphadenopathy": Coded("30746006", "SCT", "Lymphadenopathy"),
    "Emphysema": Coded("87433001", "SCT", "Pulmonary emphysema"),
    "Atelectasis": Coded("46621007", "SCT", "Atelectasis"),
    "Lung nodule": Coded("786838002", "SCT", "Nodule of lung"),
    "Pleural effusion": Coded("60046008", "SCT", "Pleural effusion"),
    "Consolidation": Coded("95436008", "SCT", "Lung consolidation"),
    "Bronchiectasis": Coded("12295008", "SCT", "Bronchiectasis"),
}


def own_code(label: str) -> Coded:
    """A finding in the scheme of our own: the same label always has the same code, whatever else is asked for."""
    text = unicodedata.normalize("NFC", " ".join(label.split()))
    digest = hashlib.sha256(text.casefold().encode()).hexdigest()[:12].upper()
    meaning = text.replace("\\", "/")
    if len(meaning) > _LONGEST_MEANING:
        # Not the one letter "…": it has three bytes, and some programs (dciodvfy) count bytes.
        meaning = meaning[: _LONGEST_MEANING - 3] + "..."
    return Coded(f"F-{digest}", SCHEME, meaning)


def standard_code(label: str) -> Coded | None:
    """A finding in SNOMED CT; `None` if no code is certain to mean it."""
    return _SNOMED.get(label)
