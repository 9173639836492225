"""The app's model, and scans that show which side is which."""

from pathlib import Path

import nibabel
import numpy as np

import medct
from medct.app.scans import Engine
from medct.publishing.loading import load_model, pipeline_of
from medct.reporting.findings import algorithm_of

PHANTOM_BASE = str(Path(medct.__file__).with_name("phantom_base"))
SHAPE = (40, 30, 20)
"""Voxels towards the right, the front and the head."""


def engine_of(folder: str = PHANTOM_BASE, adapter: str | None = None) -> Engine:
    """The app's model.

    Args:
        folder: Of the model.
        adapter: Folder of an adapter.
    """
    pipe = pipeline_of(*load_model(folder), device="cpu", adapter=adapter)
    return Engine(pipe, algorithm_of(pipe, folder, adapter))


def write_marked(path: Path, flips: tuple[int, ...] = ()) -> Path:
    """A scan with something bright in front on the patient's right; some of its axes run the other way.

    Args:
        path: File to write.
        flips: Which axes, of 0 to 2.
    """
    array = np.full(SHAPE, -1000, np.int16)
    array[4:36, 4:26] = 0
    array[28:34, 20:25] = 1000
    affine = np.diag([8.0, 8.0, 12.0, 1.0])  # towards the right, the front, the head
    for axis in flips:
        array = np.flip(array, axis)
        affine[:3, 3] += affine[:3, axis] * (SHAPE[axis] - 1)
        affine[:3, axis] *= -1
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def centre_of_bright(picture: np.ndarray) -> tuple[float, float]:
    """Where the bright thing is: shares of the height and of the width, without the letters at the edges.

    Args:
        picture: `(row, column, 3)`.
    """
    grey = picture[..., :3].min(axis=-1)
    rows, columns = np.nonzero(grey > 230)
    return float(rows.mean() / grey.shape[0]), float(columns.mean() / grey.shape[1])
