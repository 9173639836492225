"""DICOM Structured Report: one Comprehensive 3D SR a study, after TID 1500, with a group for each finding.

Each group holds the finding in the scheme of our own, with the standard code as its equivalent where one is certain;
its score; its operating point and whether the score reaches it, where there is one; its probability, where it is
calibrated; what computed them; and one image of the series, without which some viewers show nothing. The report is
partial, preliminary and unverified.

Source: DICOM PS3.16, TID 1500, 1501, 4019; PS3.3, A.35.13.
"""

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from medct.reporting import codes
from medct.reporting.findings import Algorithm, Finding, said_of_scan
from medct.reporting.source import INSTALL, UTF_8, ReportError, SourceStudy, quietly

if TYPE_CHECKING:
    from pydicom import Dataset

SERIES_DESCRIPTION = "MedCT findings: research only, not a diagnosis"
MANUFACTURER = "MedCT"
SERIES_NUMBER = 9901
"""Of the reports; behind those of scanners."""


def need_highdicom() -> None:
    """Refuse to go on without the library that writes reports."""
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        raise ReportError(f"DICOM reports need highdicom, which is not installed: {INSTALL}.") from error


def equipment(algorithm: Algorithm) -> dict[str, Any]:
    """What made an object, as highdicom takes it.

    Args:
        algorithm: What the findings were made with.
    """
    return {
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": algorithm.name,
        "software_versions": algorithm.version,
        "specific_character_set": UTF_8,
    }


def structured_report(
    findings: Sequence[Finding], algorithm: Algorithm, source: SourceStudy, notes: Sequence[str] = ()
) -> "Dataset":
    """The report of one study.

    Args:
        findings: In the order wanted.
        algorithm: What they were made with.
        source: The study that the report becomes a part of.
        notes: On the scan, from reading it.

    Returns:
        Ready to be saved.

    Raises:
        ReportError: If the headers of the study hold what the standard forbids.
    """
    need_highdicom()
    refusal = f"{source.name}: no report can be made from what its headers hold. Correct them, or export it again."
    return quietly(lambda: _report(findings, algorithm, source, notes), refusal)


def _report(findings: Sequence[Finding], algorithm: Algorithm, source: SourceStudy, notes: Sequence[str]) -> "Dataset":
    import highdicom as hd
    from highdicom.coding_schemes import CodingSchemeIdentificationItem
    from pydicom.sr.codedict import codes as dicom

    observer = hd.sr.ObserverContext(
        observer_type=dicom.DCM.Device,
        observer_identifying_attributes=hd.sr.DeviceObserverIdentifyingAttributes(
            uid=_device_uid(algorithm),
            name=algorithm.name,
            manufacturer_name=MANUFACTURER,
            model_name=algorithm.model,
        ),
    )
    content = hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(observer_device_context=observer),
        procedure_reported=_concept(codes.CHEST_CT),
        imaging_measurements=[_group(finding, algorithm, source, notes) for finding in findings],
        title=dicom.DCM.ImagingMeasurementReport,
    )
    scheme = CodingSchemeIdentificationItem(codes.SCHEME, name=codes.SCHEME_NAME, responsible_organization=MANUFACTURER)
    scheme.CodingSchemeUID = codes.SCHEME_UID
    return hd.sr.Comprehensive3DSR(
        evidence=source.headers,
        content=content,
        series_instance_uid=hd.UID(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        is_complete=False,
        is_final=False,
        is_verified=False,
        series_description=SERIES_DESCRIPTION,
        coding_schemes=[scheme],
        **equipment(algorithm),
    )


def _device_uid(algorithm: Algorithm) -> str:
    """Of what computes: the same for the same model, adapter and prompts."""
    said = "\n".join([algorithm.version, *algorithm.parameters])
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, said).int}"


def _group(finding: Finding, algorithm: Algorithm, source: SourceStudy, notes: Sequence[str]) -> Any:
    import highdicom as hd
    from pydicom.sr.codedict import codes as dicom

    numbers = [(codes.SCORE, finding.score), (codes.OPERATING_POINT, finding.threshold)]
    numbers.append((codes.PROBABILITY, finding.probability))
    measurements = [
        hd.sr.Measurement(_concept(name), value, dicom.UCUM.NoUnits) for name, value in numbers if value is not None
    ]
    calls = []
    if finding.is_present is not None:
        called = codes.PRESENT if finding.is_present else codes.ABSENT
        calls.append(hd.sr.QualitativeEvaluation(_concept(codes.CALL), _concept(called)))
    frames = None if source.frame is None else [source.frame]
    image = hd.sr.SourceImageForMeasurementGroup.from_source_image(source.middle, frames)
    return hd.sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(hd.UID(), finding.label),
        finding_type=_finding_type(finding.label),
        algorithm_id=hd.sr.AlgorithmIdentification(
            algorithm.name,
            algorithm.version,
            parameters=[*algorithm.parameters, *said_of_scan(notes), algorithm.warning],
            family=dicom.DCM.ArtificialIntelligence,
        ),
        measurements=measurements,
        qualitative_evaluations=calls,
        source_images=[image],
    )


def _finding_type(label: str) -> Any:
    """Our own code, with the standard one as what it is equivalent to."""
    coded = _concept(codes.own_code(label))
    standard = codes.standard_code(label)
    if standard is not None:
        coded.EquivalentCodeSequence = [_concept(standard)]
    return coded


def _concept(coded: codes.Coded) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept(coded.value, coded.scheme, coded.meaning)
