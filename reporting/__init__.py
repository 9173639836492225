"""The findings of one study in forms that others can store and show: DICOM reports and pages, FHIR."""
