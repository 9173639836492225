"""Phantoms: the same bits every time, in CT-RATE's columns, with findings that can be seen."""

import itertools

import numpy as np
import pytest

from medct import CT_CLIP_LABELS, read_volume
from medct.data.phantoms import FINDINGS, SITES, make_phantom, report_sentences


@pytest.mark.parametrize("site", SITES)
def test_a_study_has_ct_rates_columns(site):
    study = make_phantom(3, site)
    assert study["VolumeName"] == f"phantom_{site.lower()}_3_a_1.nii.gz"
    assert set(study) == {
        "VolumeName",
        "ClinicalInformation_EN",
        "Technique_EN",
        "Findings_EN",
        "Impressions_EN",
        "volume",
        "affine",
        *CT_CLIP_LABELS,
    }
    volume = read_volume(study["volume"], affine=study["affine"])
    assert volume.array.dtype == np.int16
    spacing = SITES[site].spacing_mm  # (S, L, P); the array lies (L, P, S)
    assert volume.spacing_mm == pytest.approx((spacing[1], spacing[2], spacing[0]))
    assert volume.array.min() <= -950
    assert volume.array.max() > 250


def test_a_study_depends_on_patient_site_and_seed_alone():
    first = make_phantom(5, "B", seed=2)
    make_phantom(6, "B", seed=2)
    again = make_phantom(5, "B", seed=2)
    assert np.array_equal(first["volume"], again["volume"])
    assert first["Findings_EN"] == again["Findings_EN"]
    for other in (make_phantom(6, "B", seed=2), make_phantom(5, "B", seed=3), make_phantom(5, "A", seed=2)):
        assert other["volume"].shape != first["volume"].shape or not np.array_equal(other["volume"], first["volume"])


@pytest.fixture
def not_painted(monkeypatch):
    """Labels and reports are drawn before the volume, which takes all of the time."""
    monkeypatch.setattr("medct.data.phantoms.paint_volume", lambda *_: np.zeros((1, 1, 1), np.int16))


@pytest.mark.usefixtures("not_painted")
def test_labels_are_as_frequent_as_they_should_be():
    studies = [make_phantom(patient, "A") for patient in range(150)]
    for name in CT_CLIP_LABELS:
        share = np.mean([study[name] for study in studies])
        assert abs(share - FINDINGS[name].prevalence) < 0.15, name
    assert any(not any(study[name] for name in CT_CLIP_LABELS) for study in studies)


@pytest.mark.usefixtures("not_painted")
def test_reports_say_what_the_labels_say():
    for site in SITES:
        sentences = set(report_sentences(site))
        for patient in range(20):
            study = make_phantom(patient, site)
            for name in CT_CLIP_LABELS:
                words = [phrase.lower() for phrase in FINDINGS[name].phrases[site]]
                in_impression = any(word in study["Impressions_EN"].lower() for word in words)
                assert in_impression == bool(study[name]), (name, study["Impressions_EN"])
            assert any(sentence in study["Findings_EN"] for sentence in sentences)


def test_sites_share_no_wording_of_findings():
    words = {site: {phrase for finding in FINDINGS.values() for phrase in finding.phrases[site]} for site in SITES}
    for one, other in itertools.combinations(words, 2):
        assert not words[one] & words[other]
