"""FHIR R4: one Bundle of a DiagnosticReport, an Observation for each finding, and the Device that made them.

Plain JSON, without a library. All of it is preliminary. Nothing that could name a patient is in it unless the caller
passes the study that it belongs to.

Source: HL7 FHIR R4 (4.0.1): Bundle, DiagnosticReport, Observation, Device, Patient, ImagingStudy.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from medct.reporting import codes
from medct.reporting.findings import NO_PROBABILITY, Algorithm, Finding, kind_of, said_of_scan

_SYSTEMS = {"SCT": "http://snomed.info/sct", "LN": "http://loinc.org", codes.SCHEME: f"urn:oid:{codes.SCHEME_UID}"}
_HL7 = "http://terminology.hl7.org/CodeSystem"

Resource = dict[str, Any]


@dataclass(frozen=True)
class Identity:
    """Whose study it is, for those who ask for it.

    Args:
        patient_id: As the hospital writes it; may be empty.
        study_uid: StudyInstanceUID.
        accession_number: May be empty.
    """

    patient_id: str
    study_uid: str
    accession_number: str = ""


def bundle(
    findings: Sequence[Finding], algorithm: Algorithm, identity: Identity | None = None, notes: Sequence[str] = ()
) -> Resource:
    """The findings of one study.

    Args:
        findings: In the order wanted.
        algorithm: What they were made with.
        identity: Whose study it is; without it nothing in the bundle says so.
        notes: On the scan, from reading it.

    Returns:
        Ready for JSON; the same for the same arguments.
    """
    entries: list[Resource] = []

    def add(resource: Resource) -> Resource:
        """Put a resource into the bundle; returns a reference to it."""
        # A patient without an id looks like any other one.
        study = identity and identity.study_uid
        content = json.dumps([len(entries), resource, entries[:1], study], sort_keys=True)
        entries.append({"fullUrl": uuid.uuid5(uuid.NAMESPACE_OID, content).urn, "resource": resource})
        return {"reference": entries[-1]["fullUrl"]}

    device = add(_device(algorithm))
    about, derived, images = {}, {}, {}
    if identity is not None:
        about = {"subject": add(_patient(identity))}
        study = add(_imaging_study(identity, about["subject"]))
        derived, images = {"derivedFrom": [study]}, {"imagingStudy": [study]}
    results = [add({**_observation(finding, algorithm), **about, "device": device, **derived}) for finding in findings]
    add({**_report(findings, algorithm, notes), **about, "result": results, **images})
    return {"resourceType": "Bundle", "type": "collection", "entry": entries}


def is_bundle(path: Path) -> bool:
    """Whether a file is a bundle that `bundle` made, so that a new one may replace it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        device = found["entry"][0]["resource"]
        return device["deviceName"][0]["name"] == Algorithm.name
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _concept(*coded: codes.Coded, text: str = "") -> Resource:
    codings = [{"system": _SYSTEMS[each.scheme], "code": each.value, "display": each.meaning} for each in coded]
    return {"coding": codings, "text": text or coded[0].meaning}


def _category(system: str, code: str, display: str) -> list[Resource]:
    return [{"coding": [{"system": f"{_HL7}/{system}", "code": code, "display": display}]}]


def _number(value: float) -> Resource:
    return {"value": value, "system": "http://unitsofmeasure.org", "code": "1"}


def _device(algorithm: Algorithm) -> Resource:
    names = [("software", algorithm.version)]
    for what, name, commit in (
        ("model", algorithm.model, algorithm.model_commit),
        ("adapter", algorithm.adapter, algorithm.adapter_commit),
    ):
        names += [(what, name), (f"{what} {kind_of(commit)}", commit)]
    prompts = (f"prompts: {each}" for each in algorithm.own_prompts)
    return {
        "resourceType": "Device",
        "status": "active",
        "deviceName": [{"name": algorithm.name, "type": "model-name"}],
        "version": [{"type": {"text": what}, "value": value} for what, value in names if value],
        "note": [{"text": text} for text in (*prompts, algorithm.warning)],
    }


def _patient(identity: Identity) -> Resource:
    named = {"identifier": [{"value": identity.patient_id}]} if identity.patient_id else {}
    return {"resourceType": "Patient", **named}


def _imaging_study(identity: Identity, subject: Resource) -> Resource:
    identifiers: list[Resource] = [{"system": "urn:dicom:uid", "value": f"urn:oid:{identity.study_uid}"}]
    if identity.accession_number:
        kind = {"coding": [{"system": f"{_HL7}/v2-0203", "code": "ACSN", "display": "Accession ID"}]}
        identifiers.append({"type": kind, "value": identity.accession_number})
    return {"resourceType": "ImagingStudy", "identifier": identifiers, "status": "available", "subject": subject}


def _observation(finding: Finding, algorithm: Algorithm) -> Resource:
    standard = codes.standard_code(finding.label)
    own = codes.own_code(finding.label)
    components = []
    if finding.threshold is not None:
        components.append((codes.OPERATING_POINT, finding.threshold))
    if finding.probability is not None:
        components.append((codes.PROBABILITY, finding.probability))
    observation = {
        "resourceType": "Observation",
        "status": "preliminary",
        "category": _category("observation-category", "imaging", "Imaging"),
        "code": _concept(*([standard] if standard else []), own, text=finding.label),
        "valueQuantity": {**_number(finding.score), "unit": "score"},
        "note": [{"text": f"{algorithm.warning} {NO_PROBABILITY}"}],
    }
    if finding.is_present is not None:
        code, display = ("POS", "Positive") if finding.is_present else ("NEG", "Negative")
        (called,) = _category("v3-ObservationInterpretation", code, display)
        observation["interpretation"] = [{**called, "text": f"{finding.call} the operating point"}]
    if components:
        observation["component"] = [
            {"code": _concept(coded), "valueQuantity": _number(value)} for coded, value in components
        ]
    return observation


def _report(findings: Sequence[Finding], algorithm: Algorithm, notes: Sequence[str]) -> Resource:
    called = [finding.label for finding in findings if finding.is_present]
    counted = [finding for finding in findings if finding.is_present is not None]
    said = f"At or above their operating points: {', '.join(called) or 'none'}." if counted else "No operating points."
    rows = "".join(
        f"<tr><td>{escape(each.label)}</td><td>{each.figures[0]}</td><td>{each.call}</td></tr>" for each in findings
    )
    about = "; ".join([*said_of_scan(notes), *algorithm.parameters])
    head = f"<p>{algorithm.warning} {NO_PROBABILITY}</p><p>{escape(about)}</p>"
    table = f"<table><tr><th>finding</th><th>score</th><th>operating point</th></tr>{rows}</table>"
    return {
        "resourceType": "DiagnosticReport",
        "text": {"status": "generated", "div": f'<div xmlns="http://www.w3.org/1999/xhtml">{head}{table}</div>'},
        "status": "preliminary",
        "category": _category("v2-0074", "RAD", "Radiology"),
        "code": _concept(codes.CHEST_CT),
        "conclusion": " ".join([algorithm.warning, said, *(f"{note}." for note in said_of_scan(notes))]),
    }
