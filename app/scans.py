"""What the app does, without a browser: reads a scan, scores it, and draws its slices.

Nothing is kept: a `Scan` lives as long as its session, and no file is written.
"""

import base64
import io
import re
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch

from medct.data.phantoms import make_phantom
from medct.errors_medct import MedCTError, said_of
from medct.inference.maps import FindingMap, grid_in, map_findings, strongest_slice, to_scan
from medct.inference.slices import AXIAL, LETTER_COLOUR, LETTERS, WINDOWS_HU, AxialSlices, side
from medct.pipeline_medct import CTPipeline, ZeroShotCTClassificationPipeline
from medct.reporting.findings import Algorithm, Finding, findings_of
from medct.resampling_medct import reorient
from medct.volume_io_medct import read_volume
from medct.volume_medct import CTVolume, VolumeError, VolumeWarning

PHANTOM = "synthetic phantom"
_PHANTOM_PATIENT, _PHANTOM_SITE = 0, "A"  # with five findings, at the site that the phantom base knows
MOST_OWN_FINDINGS = 20
_LONGEST_FINDING = 200
_SIDE_PIXELS = 640
_LETTER_PIXELS = 22
_ADDS, _TAKES = (230, 60, 40), (60, 110, 230)
"""Colours of patches that add to a score, and that take from it."""
_MOST_OPACITY = 0.6
_ARGUMENT = re.compile(r"`\w+=[^`]*`")
"""Of Python, in a remedy."""
_BEYOND = " This page has no such setting: upload a file that needs none, or use `medct predict`."


class ScanError(MedCTError, ValueError):
    """A file that cannot be scored; the message says why and what to do."""


@dataclass
class Scan:
    """One scan of one session.

    Args:
        name: The file's own name.
        volume: In HU.
        slices: The same, turned for looking at it.
        encoded: From the pipeline's `encode`, what the model sees.
        findings: Of the model's own labels, then those asked for in words.
        notes: Remarks from reading it.
        maps: Of the findings that were looked at, by their labels.
    """

    name: str
    volume: CTVolume
    slices: AxialSlices
    encoded: dict[str, torch.Tensor]
    findings: list[Finding]
    notes: tuple[str, ...]
    maps: dict[str, FindingMap] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        return [finding.label for finding in self.findings]


class Engine:
    """The model, for all sessions.

    Args:
        pipe: The model's pipeline.
        algorithm: What it is.
    """

    def __init__(self, pipe: CTPipeline, algorithm: Algorithm):
        self.pipe, self.algorithm = pipe, algorithm
        self.can_be_asked = isinstance(pipe, ZeroShotCTClassificationPipeline)
        self._one_at_a_time = threading.Lock()

    def read(self, path: str | Path) -> Scan:
        """Read a file and score the model's own findings.

        Args:
            path: NIfTI, NRRD, MetaImage or a zip of DICOM files.

        Raises:
            ScanError: If it cannot be read; the message names the file without its folder.
        """
        name = Path(path).name
        if not Path(path).is_file():  # the folder of all uploads, say, which a program may name in place of its own
            raise ScanError(f"{name}: it is no file, or has been read already. Upload a file.")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", VolumeWarning)  # the notes are shown
                volume = read_volume(path, orientation=self.pipe.processor.image_processor.orientation)
        except VolumeError as error:
            source = "" if error.source in (name, str(path)) else f"{Path(error.source).name}: "
            beyond = _BEYOND if _ARGUMENT.search(error.remedy) else ""
            raise ScanError(f"{name}: {source}{error.reason}. {error.remedy}.{beyond}") from None
        except Exception as error:
            raise ScanError(f"{name}: {said_of(error)}") from error
        return self._scored(name, volume)

    def phantom(self) -> Scan:
        """A drawn scan, for trying the app."""
        drawn = make_phantom(_PHANTOM_PATIENT, _PHANTOM_SITE, 0)
        volume = CTVolume(np.asarray(drawn["volume"]), np.asarray(drawn["affine"]), PHANTOM)
        return self._scored(PHANTOM, volume)

    def _scored(self, name: str, volume: CTVolume) -> Scan:
        pixel_values = self.pipe.processor.image_processor.process_volume(volume)[None, None]
        with self._one_at_a_time:
            # Not on a card, whose memory is not for sessions.
            encoded = {name: each.cpu() for name, each in self.pipe.encode(pixel_values).items()}
        findings = self._findings(encoded, self.pipe.asked.label_names)
        return Scan(name, volume, AxialSlices.of(volume), encoded, findings, volume.notes)

    def _findings(self, encoded: dict[str, torch.Tensor], labels: Sequence[str], **prompts: Any) -> list[Finding]:
        with self._one_at_a_time:
            results = self.pipe.postprocess(self.pipe.forward(encoded, **prompts), **prompts)
        return findings_of(results, labels, self.pipe.thresholds)

    def ask(self, scan: Scan, text: str) -> str | None:
        """Score findings in words, beside the model's own.

        Args:
            scan: Gets them, in place of those that it was asked for before.
            text: One finding a line.

        Returns:
            What should be said of words that the model does not know.

        Raises:
            ScanError: If there are too many, or they are too long.
        """
        own = self.pipe.asked.label_names
        lines = (" ".join(line.split()) for line in text.splitlines())  # cells of a table come with tabs
        labels = list(dict.fromkeys(line for line in lines if line and line not in own))
        if len(labels) > MOST_OWN_FINDINGS or any(len(label) > _LONGEST_FINDING for label in labels):
            raise ScanError(f"At most {MOST_OWN_FINDINGS} findings of {_LONGEST_FINDING} letters, one per line.")
        found = self._findings(scan.encoded, labels, candidate_labels=labels) if labels else []
        scan.findings = [*scan.findings[: len(own)], *found]
        return self.pipe.processor.remark_on_words(self.pipe.asked.label_prompts(labels), labels)

    def map_of(self, scan: Scan, label: str) -> FindingMap:
        """Where in a scan the score of a finding comes from.

        Args:
            scan: The scan.
            label: The finding.
        """
        if label not in scan.maps:
            with self._one_at_a_time:
                (scan.maps[label],) = map_findings(self.pipe, scan.encoded, [label])
        return scan.maps[label]

    def strongest_slice(self, scan: Scan, label: str | None) -> int:
        """The slice that adds most to a finding; the middle one where a model cannot say.

        Args:
            scan: The scan.
            label: The finding; `None` without one.
        """
        if label not in scan.labels or not self.can_be_asked:
            return len(scan.slices) // 2
        return strongest_slice(self.map_of(scan, label).patches, *grid_in(self.pipe, scan.volume), scan.slices)

    def picture(self, scan: Scan, index: int, window: str, label: str | None = None) -> PIL.Image.Image:
        """A slice with the letters of the patient's sides, and the map of a finding over it.

        Args:
            scan: The scan.
            index: From 0, at the feet.
            window: A key of `WINDOWS_HU`.
            label: The finding whose map is drawn; `None`: none.
        """
        grey = scan.slices.grey(index, WINDOWS_HU[window])
        colours = np.repeat(grey[..., None] * 255, 3, axis=2)
        if label in scan.labels and self.can_be_asked:
            colours = _blended(colours, self._map_slice(scan, index, label))
        rows, columns = grey.shape
        height, width = rows * scan.slices.pixel_aspect, float(columns)
        scale = _SIDE_PIXELS / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = PIL.Image.fromarray(colours.astype(np.uint8)).resize(size, PIL.Image.Resampling.BILINEAR)
        return _with_letters(image)

    def _map_slice(self, scan: Scan, index: int, label: str) -> np.ndarray:
        """`(row, column)`, -1 to 1: the share of the strongest patch."""
        patches = self.map_of(scan, label).patches
        part = [slice(None)] * 3
        at = scan.slices.flipped(index)
        part[scan.slices.axis] = slice(at, at + 1)
        values = to_scan(patches, *grid_in(self.pipe, scan.volume), part)
        turned, _ = reorient(CTVolume(values, scan.volume.affine), AXIAL)
        return turned[0] / (float(patches.abs().max()) or 1.0)


def _blended(colours: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Colour a picture `(row, column, 3)` by the sign and the size of values `(row, column)`."""
    opacity = (_MOST_OPACITY * np.abs(values).clip(0, 1))[..., None]
    tint = np.where(values[..., None] > 0, np.array(_ADDS), np.array(_TAKES))
    return colours * (1 - opacity) + tint * opacity


def _with_letters(image: PIL.Image.Image) -> PIL.Image.Image:
    draw = PIL.ImageDraw.Draw(image)
    font = PIL.ImageFont.load_default(_LETTER_PIXELS)
    width, height = image.size
    for text, x, y in LETTERS:
        anchor, place = side(x, ("l", "m", "r")) + side(y, ("b", "m", "t")), (x * width, (1 - y) * height)
        draw.text(place, text, LETTER_COLOUR, font, anchor, stroke_width=2, stroke_fill="black")
    return image


def data_uri(image: PIL.Image.Image) -> str:
    """A picture as an address that holds it, so that no file is written."""
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=90)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
