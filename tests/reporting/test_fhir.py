"""FHIR R4: the structure by the standard's own tables, and nothing that says whose study it is."""

import json
import re

import pytest
from reports import ALGORITHM, CLOSE, FINDINGS

from medct.configuration_medct import CT_CLIP_LABELS
from medct.reporting import codes, fhir
from medct.reporting.findings import Algorithm, Finding

IDENTITY = fhir.Identity("SECRET-ID", "1.2.3.4", "SECRET-ACCESSION")
# Of R4 (4.0.1): the elements used here, which of them are required, and which are lists.
ELEMENTS = {
    "Bundle": {"type!", "entry*"},
    "Device": {"status", "deviceName*", "version*", "note*"},
    "Patient": {"identifier*"},
    "ImagingStudy": {"identifier*", "status!", "subject!"},
    "Observation": {
        *("status!", "category*", "code!", "subject", "device", "derivedFrom*", "valueQuantity", "interpretation*"),
        *("note*", "component*"),
    },
    "DiagnosticReport": {
        *("text", "status!", "category*", "code!", "subject", "result*", "imagingStudy*", "conclusion"),
    },
}
STATUS = {"Device": "active", "ImagingStudy": "available", "Observation": "preliminary"}
STATUS["DiagnosticReport"] = "preliminary"


def resources(bundle: dict) -> dict[str, list[dict]]:
    """Resources of a bundle by their types."""
    found: dict[str, list[dict]] = {}
    for entry in bundle["entry"]:
        found.setdefault(entry["resource"]["resourceType"], []).append(entry["resource"])
    return found


def check_elements(resource: dict) -> None:
    kind = resource["resourceType"]
    elements = {name.rstrip("!*"): name for name in ELEMENTS[kind]}
    assert set(resource) - {"resourceType"} <= set(elements)
    for name, marked in elements.items():
        assert name in resource or not marked.endswith("!")
        if name in resource:
            assert isinstance(resource[name], list) == marked.endswith("*") and resource[name] != []
    assert resource.get("status") == STATUS.get(kind)


def test_a_fingerprint_is_not_called_a_commit():
    of_folder = Algorithm("site", "sha256-bf16:0", "adapter", "sha256:1")
    of_hub = Algorithm("org/site", "0" * 40, "org/adapter", "1" * 40)
    for algorithm, what in ((of_folder, "fingerprint"), (of_hub, "commit")):
        (device,) = resources(fhir.bundle(FINDINGS, algorithm))["Device"]
        said = [version["type"]["text"] for version in device["version"]]
        assert said == ["software", "model", f"model {what}", "adapter", f"adapter {what}"]
        lines = [line.split(": ")[0] for line in algorithm.parameters]
        assert lines == ["model", what, "adapter", f"{what} of the adapter"]


@pytest.mark.parametrize("identity", [None, IDENTITY])
def test_the_structure_is_that_of_the_standard(identity):
    bundle = json.loads(json.dumps(fhir.bundle(FINDINGS, ALGORITHM, identity), allow_nan=False))
    check_elements(bundle)
    for entry in bundle["entry"]:
        check_elements(entry["resource"])
    addresses = [entry["fullUrl"] for entry in bundle["entry"]]
    assert len(set(addresses)) == len(addresses)
    assert all(re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", each) for each in addresses)
    assert set(re.findall(r'"reference": "([^"]*)"', json.dumps(bundle))) <= set(addresses)
    found = resources(bundle)
    (report,) = found["DiagnosticReport"]
    assert len(found["Observation"]) == len(report["result"]) == 18 and len(found["Device"]) == 1
    assert report["code"]["coding"] == [{"system": "http://loinc.org", "code": "24627-2", "display": "CT Chest"}]
    assert report["text"]["div"].startswith('<div xmlns="http://www.w3.org/1999/xhtml">')


@pytest.mark.parametrize("identity", [None, IDENTITY])
def test_another_reader_takes_it(identity):
    r4b = pytest.importorskip("fhir.resources.R4B.bundle")
    read = r4b.Bundle.model_validate(fhir.bundle(FINDINGS, ALGORITHM, identity))
    assert len(read.entry) == 20 + (2 if identity else 0)


def test_each_finding_says_what_is_known_of_it():
    observations = resources(fhir.bundle(FINDINGS, ALGORITHM))["Observation"]
    assert [each["code"]["text"] for each in observations] == list(CT_CLIP_LABELS)
    for finding, each in zip(FINDINGS, observations, strict=True):
        assert each["valueQuantity"]["value"] == finding.score
        numbers = {
            part["code"]["coding"][0]["code"]: part["valueQuantity"]["value"] for part in each.get("component", [])
        }
        expected = {"OPERATING-POINT": finding.threshold, "PROBABILITY": finding.probability}
        assert numbers == {name: value for name, value in expected.items() if value is not None}
        called = [one["coding"][0]["code"] for one in each.get("interpretation", [])]
        assert called == ([] if finding.threshold is None else ["POS" if finding.score >= 0.45 else "NEG"])
        assert "Research only" in each["note"][0]["text"]


def test_numbers_and_calls_agree_however_close_they_are():
    written = json.loads(json.dumps(fhir.bundle(CLOSE, ALGORITHM)))
    for finding, each in zip(CLOSE, resources(written)["Observation"], strict=True):
        numbers = [each["valueQuantity"]["value"], *(part["valueQuantity"]["value"] for part in each["component"])]
        expected = [finding.score, finding.threshold, finding.probability]
        assert numbers == [value for value in expected if value is not None]


def test_it_names_the_model_and_warns():
    found = resources(fhir.bundle(FINDINGS, Algorithm("phantoms", "sha256", is_synthetic=True)))
    values = [version["value"] for version in found["Device"][0]["version"]]
    assert {"phantoms", "sha256"} <= set(values)
    assert "synthetic drawings" in found["DiagnosticReport"][0]["conclusion"]


def test_nothing_says_whose_study_it_is_unless_asked():
    assert not {"Patient", "ImagingStudy"} & set(resources(fhir.bundle(FINDINGS, ALGORITHM)))
    found = resources(fhir.bundle(FINDINGS, ALGORITHM, IDENTITY))
    assert found["Patient"][0]["identifier"] == [{"value": "SECRET-ID"}]
    study = [(each.get("system"), each["value"]) for each in found["ImagingStudy"][0]["identifier"]]
    assert study == [("urn:dicom:uid", "urn:oid:1.2.3.4"), (None, "SECRET-ACCESSION")]
    assert all("subject" in each for each in (*found["Observation"], *found["DiagnosticReport"]))


def test_the_same_findings_make_the_same_bundle():
    assert fhir.bundle(FINDINGS, ALGORITHM) == fhir.bundle(FINDINGS, ALGORITHM)
    other = fhir.bundle(FINDINGS[1:], ALGORITHM)
    assert fhir.bundle(FINDINGS, ALGORITHM)["entry"][-1]["fullUrl"] != other["entry"][-1]["fullUrl"]


def test_patients_without_an_id_are_not_one_patient():
    names = []
    for study in ("1.2.3", "1.2.4"):
        bundle = fhir.bundle(FINDINGS, ALGORITHM, fhir.Identity("", study))
        names += [each["fullUrl"] for each in bundle["entry"] if each["resource"]["resourceType"] == "Patient"]
    assert len(set(names)) == 2


def test_a_finding_in_words_is_text_and_no_markup():
    bundle = fhir.bundle([Finding('<b>x</b> & "y"', 0.5)], ALGORITHM)
    div = resources(bundle)["DiagnosticReport"][0]["text"]["div"]
    assert "<b>" not in div and "&lt;b&gt;x&lt;/b&gt; &amp; &quot;y&quot;" in div


def has_check_digit(number: str) -> bool:
    """Whether the last digit is Verhoeff's, as of every code of SNOMED CT: no digit is wrong, no two are swapped."""
    turned, total = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4), 0
    for place, digit in enumerate(map(int, reversed(number))):
        for _ in range(place % 8):
            digit = turned[digit]
        # The product of turns (below 5) and reflections of a pentagon.
        total = (total + (digit if total < 5 else -digit)) % 5 + 5 * ((total < 5) != (digit < 5))
    return total == 0


def test_codes_of_snomed_ct_are_codes_of_snomed_ct():
    known = [each for each in map(codes.standard_code, CT_CLIP_LABELS) if each] + [codes.PRESENT, codes.ABSENT]
    assert len({each.value for each in known}) == len(known) == 13
    assert all(has_check_digit(each.value) for each in known)


def test_codes_are_short_their_own_and_stay():
    labels = [*CT_CLIP_LABELS, "胸腔积液", "Rib fracture", "rib-fracture", "x" * 200]
    own = [codes.own_code(label) for label in labels]
    assert len({each.value for each in own}) == len(labels)
    assert all(len(each.value) <= 16 and len(each.meaning.encode()) <= 64 and each.scheme == "99MEDCT" for each in own)
    assert codes.own_code(" Rib  Fracture ").value == codes.own_code("rib fracture").value
    assert codes.own_code("Pleural effusion").value == "F-1E80DA0961E4"
    assert codes.standard_code("Pleural effusion") == ("60046008", "SCT", "Pleural effusion")
    assert codes.standard_code("Interlobular septal thickening") is None
