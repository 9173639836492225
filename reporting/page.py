"""A page for people: scores, operating points and the highest slices, as one colour picture that every viewer shows.

Saved as a DICOM Secondary Capture it lies beside the scan in its study. The warning is part of the picture. Nothing in
the picture says whose scan it is.

Source: DICOM PS3.3, A.8.1 (Secondary Capture Image).
"""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from medct.inference.slices import WIDE_WINDOW_HU, AxialSlices, draw_slice, fonts
from medct.reporting.findings import (
    NO_PROBABILITY,
    SYNTHETIC,
    WARNING,
    Algorithm,
    Finding,
    said_of_scan,
    shown_probability,
)
from medct.reporting.source import SourceStudy, quietly
from medct.reporting.sr import SERIES_NUMBER, equipment, need_highdicom

if TYPE_CHECKING:
    from pydicom import Dataset

MOST_PICTURES = 4
SERIES_DESCRIPTION = "MedCT page: research only, not a diagnosis"
_WIDTH, _HEIGHT = 1280, 960
_DOTS_PER_INCH = 100
_MOST_LINES = 5
"""Below the scores: prompts of many labels have no end."""
_ABOVE, _BELOW, _UNKNOWN = "#D55E00", "#0072B2", "0.55"
"""Okabe and Ito's, which colour-blind readers can tell apart; words stand beside them."""
_LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")


class Picture(NamedTuple):
    """A slice that is shown beside the scores."""

    title: str
    index: int


def worth_a_picture(findings: Sequence[Finding]) -> list[Finding]:
    """The findings whose slices are shown: called present first, then by score."""
    return sorted(findings, key=lambda each: (not each.is_present, -each.score))[:MOST_PICTURES]


def draw_page(
    findings: Sequence[Finding],
    algorithm: Algorithm,
    slices: AxialSlices,
    pictures: Sequence[Picture],
    notes: Sequence[str] = (),
) -> np.ndarray:
    """Draw the page.

    Args:
        findings: In the order wanted.
        algorithm: What they were made with.
        slices: The scan.
        pictures: Slices to show, `MOST_PICTURES` at most.
        notes: On the scan, from reading it.

    Returns:
        `(row, column, 3)`, RGB, uint8.
    """
    size = (_WIDTH / _DOTS_PER_INCH, _HEIGHT / _DOTS_PER_INCH)
    figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, facecolor="white")
    banner = {"ha": "center", "va": "center", "color": "white", "weight": "bold"}
    figure.text(0.5, 0.97, WARNING.upper(), fontsize=13, backgroundcolor="#A00000", **banner)
    if algorithm.is_synthetic:
        figure.text(0.5, 0.93, SYNTHETIC, fontsize=11, backgroundcolor="#A00000", **banner)
    _draw_scores(figure.add_axes((0.2, 0.17, 0.175, 0.68)), findings)
    places = [(0.565, 0.53), (0.785, 0.53), (0.565, 0.13), (0.785, 0.13)]
    for picture, place in zip(pictures, places, strict=False):
        axes = figure.add_axes((*place, 0.2, 0.3))
        draw_slice(axes, slices, picture.index, WIDE_WINDOW_HU)
        where = slices.caption(picture.index).replace(" mm, ", " mm\n", 1)
        title = f"{textwrap.fill(picture.title, 34, max_lines=2)}\n{where}"
        axes.set_title(title, fontsize=8.5, fontfamily=fonts(), parse_math=False)
    of_slices = "A finding's slice: where its score comes from most; a debugging aid, not where the finding is."
    said = "   ".join([NO_PROBABILITY, of_slices, *said_of_scan(notes), *algorithm.parameters])
    lines = textwrap.wrap(f"{algorithm.name} {algorithm.version}.   {said}", 180, max_lines=_MOST_LINES)
    figure.text(0.02, 0.05, "\n".join(lines), fontsize=8.5, va="center", parse_math=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def _draw_scores(axes: Axes, findings: Sequence[Finding]) -> None:
    """A bar a finding, a line at its operating point, and the same in figures and words."""
    rows = np.arange(len(findings))
    size = min(9, 9 * 24 / len(findings))  # points
    colours = [{True: _ABOVE, False: _BELOW, None: _UNKNOWN}[each.is_present] for each in findings]
    axes.barh(rows, [each.score for each in findings], 0.62, color=colours)
    right = axes.get_yaxis_transform()  # shares of the width, rows of the bars
    columns = {"score": 1.1, "operating point": 1.43, "probability": 1.8}
    for title, x in columns.items():
        axes.text(x, -0.9, title, fontsize=8, ha="center", va="bottom", transform=right)
    for row, each in zip(rows, findings, strict=True):
        score, threshold = each.figures
        cells = [score, "none", "-"]
        if each.threshold is not None:
            axes.plot([each.threshold] * 2, [row - 0.42, row + 0.42], color="black", linewidth=2)
            cells[1] = f"{each.call} {threshold}"
        if each.probability is not None:
            cells[2] = shown_probability(each.probability)
        look = {"ha": "center", "va": "center", "fontsize": size, "transform": right}
        for x, cell in zip(columns.values(), cells, strict=True):
            axes.text(x, row, cell, weight="bold" if each.is_present else "normal", **look)
    names = [textwrap.fill(each.label, 36, max_lines=2) for each in findings]
    axes.set_yticks(rows, names, fontsize=size, fontfamily=fonts(), parse_math=False)
    axes.set_ylim(len(findings) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xlabel("score; black line: operating point,\nthe least score that is called present", fontsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)


def secondary_capture(page: np.ndarray, algorithm: Algorithm, source: SourceStudy) -> "Dataset":
    """The page as a part of the study.

    Args:
        page: From `draw_page`.
        algorithm: What the findings were made with.
        source: The study.

    Returns:
        Ready to be saved.

    Raises:
        ReportError: If the headers of the study hold what the standard forbids.
    """
    need_highdicom()
    refusal = f"{source.name}: no page can be made from what its headers hold. Correct them, or export it again."
    return quietly(lambda: _image(page, algorithm, source), refusal)


def _image(page: np.ndarray, algorithm: Algorithm, source: SourceStudy) -> "Dataset":
    import highdicom as hd
    from pydicom.uid import ExplicitVRLittleEndian

    image = hd.sc.SCImage.from_ref_dataset(
        source.middle,
        pixel_array=page,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "P"),
        series_instance_uid=hd.UID(),
        series_number=SERIES_NUMBER + 1,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        series_description=SERIES_DESCRIPTION,
        **equipment(algorithm),
    )
    image.ConversionType = "WSD"  # drawn by a program
    image.PatientOrientation = None  # of a page there is none; letters stand in its slices
    image.BodyPartExamined = "CHEST"
    is_burnt_in = any(header.get("BurnedInAnnotation") == "YES" for header in source.headers)
    image.BurnedInAnnotation = "YES" if is_burnt_in else "NO"  # but for its slices, nothing says whose scan it is
    lossy = next((header for header in source.headers if header.get("LossyImageCompression") == "01"), {})
    for name in _LOSSY:
        if name in lossy:  # once lossy, for ever
            setattr(image, name, lossy[name].value)
    image.ImageComments = algorithm.warning
    return image
