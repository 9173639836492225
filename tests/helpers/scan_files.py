"""Scans that the tests write themselves: DICOM series with one thing changed at a time, and volumes to put in them."""

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    generate_uid,
)

# Set in every identifying field; no message may contain it, or the date.
SECRET = "SECRET"
SECRET_DATE = "19991231"
STEP_MM = 2.5
SPACING_MM = (0.8, 0.7)  # of rows, of columns
ORIGIN_MM = np.array([-10.0, -20.0, 30.0])
AFFINE = np.array([[-0.7, 0, 0, 10], [0, -0.8, 0, 20], [0, 0, STEP_MM, 30], [0, 0, 0, 1.0]])
"""Of the series that `write_series` writes, `(column, row, slice)` to RAS+ mm."""


def at(x: float, y: float, z: float) -> list[float]:
    """An image position, LPS mm, at a distance from that of the first slice."""
    return (ORIGIN_MM + np.array((x, y, z))).tolist()


def make_hu(shape: tuple[int, ...] = (6, 16, 12), seed: int = 0) -> np.ndarray:
    """`(slice, row, column)`, smooth in space with noise, air at one end."""
    axes = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
    noise = np.random.default_rng(seed).integers(-30, 30, shape)
    return (1500 * sum(axes) / len(axes) - 1000 + noise).astype(np.int16)


def write_noise(path: Path, seed: int = 0) -> Path:
    """A small NIfTI scan of noise."""
    array = np.random.default_rng(seed).integers(-1000, 1000, (9, 12, 5)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([-3.0, -2, 4, 1])), path)
    return path


def new_slice(hu: np.ndarray, k: int) -> FileDataset:
    """Slice `k` of a plain axial series, stored unsigned with intercept -1024."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid()
    ds = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.FrameOfReferenceUID = "1.2.3", "1.2.4", "1.2.5"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = f"{SECRET}^NAME", f"{SECRET}-ID", SECRET_DATE
    ds.StudyDate, ds.StudyTime, ds.SeriesDescription = SECRET_DATE, "120000", f"{SECRET} chest"
    ds.AccessionNumber, ds.StudyID, ds.InstanceNumber = SECRET, SECRET, k + 1
    ds.Modality, ds.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.ImagePositionPatient = at(0, 0, STEP_MM * k)
    ds.ImageOrientationPatient, ds.PixelSpacing = [1, 0, 0, 0, 1, 0], list(SPACING_MM)
    ds.SliceThickness = 5  # slices overlap, so this does not measure their step
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
    set_pixels(ds, hu.astype(np.int32) + 1024)
    return ds


def set_pixels(ds: Dataset, stored: np.ndarray, signed: bool = False, bits_stored: int = 16) -> None:
    """Set the stored values of a slice or of frames."""
    ds.Rows, ds.Columns = stored.shape[-2:]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, bits_stored, bits_stored - 1, int(signed)
    ds.add_new(0x7FE00010, "OW", np.ascontiguousarray(stored).astype("<i2" if signed else "<u2").tobytes())


def write_series(
    folder: Path, hu: np.ndarray, edit: Callable[[FileDataset, int], object] | None = None, prefix: str = ""
) -> Path:
    """A folder of slices under scrambled names; `edit` may change each, or drop it by returning False."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, slice_hu in enumerate(hu):
        ds = new_slice(slice_hu, k)
        if edit is not None and edit(ds, k) is False:
            continue
        path = folder / f"{prefix}{(k * 7 + 3) % 11:02}-{k}.dcm"
        if ds.file_meta.TransferSyntaxUID == ExplicitVRBigEndian:
            pydicom.dcmwrite(path, ds, implicit_vr=False, little_endian=False, force_encoding=True)
        else:
            ds.save_as(path, enforce_file_format=True)
    return folder


def write_enhanced(path: Path, hu: np.ndarray, edit: Callable[[FileDataset], object] | None = None, order=None) -> Path:
    """Write an Enhanced CT as one file; frames may be stored in any order."""
    order = range(len(hu)) if order is None else order
    ds = new_slice(hu[0], 0)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    for flat in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"):
        delattr(ds, flat)
    ds.SharedFunctionalGroupsSequence = [
        item(
            PixelMeasuresSequence=[item(PixelSpacing=list(SPACING_MM))],
            PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
            PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")],
        )
    ]
    ds.PerFrameFunctionalGroupsSequence = [
        item(PlanePositionSequence=[item(ImagePositionPatient=at(0, 0, STEP_MM * k))]) for k in order
    ]
    ds.NumberOfFrames = len(order)
    set_pixels(ds, hu[list(order)].astype(np.int32) + 1024)
    if edit is not None:
        edit(ds)
    ds.save_as(path, enforce_file_format=True)
    return path


def item(**attributes) -> Dataset:
    ds = Dataset()
    for name, value in attributes.items():
        setattr(ds, name, value)
    return ds


def compress(syntax: str) -> Callable[[FileDataset, int], None]:
    """An `edit` that compresses each slice."""
    plugin = {pydicom.uid.JPEGLSLossless: "pyjpegls", pydicom.uid.JPEG2000Lossless: "pylibjpeg"}.get(syntax, "pydicom")
    return lambda ds, k=0: ds.compress(syntax, encoding_plugin=plugin, generate_instance_uid=False)
