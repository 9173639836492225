"""Pictures of a scan for looking at it: the slices through its middle, upright. Drawing needs matplotlib."""

import io

import numpy as np

from .resampling_medct import reorient
from .volume_medct import CTVolume

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = object

# Rows of a picture run towards the feet or the back, columns towards the back or the patient's left.
_UPRIGHT = "IPL"
_NOTEBOOK_DOTS_PER_INCH = 70
VIEWS = (("axial", "R", "L"), ("coronal", "R", "L"), ("sagittal", "A", "P"))
"""What the pictures show, with the sides at their left and right edges."""


class Picture(Figure):
    """A figure that a notebook shows by itself."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=_NOTEBOOK_DOTS_PER_INCH)
        return content.getvalue()


def middle_slices(volume: CTVolume) -> list[tuple[np.ndarray, float]]:
    """The axial, coronal and sagittal slices through the middle, upright.

    Args:
        volume: In any of the 48 axis orders and directions.

    Returns:
        For each of `VIEWS`, the picture `(rows, columns)` and the height of its pixels over their width.
    """
    upright, (down, back, left) = reorient(volume, _UPRIGHT)
    z, y, x = (length // 2 for length in upright.shape)
    return [(upright[z], back / left), (upright[:, y], down / left), (upright[:, :, x], down / back)]


def plot_volume(volume: CTVolume, window_hu: tuple[float, float]) -> Picture:
    """Draw the slices through the middle of a scan.

    Args:
        volume: The scan.
        window_hu: Values that are black and white, HU.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    if Figure is object:
        raise ImportError("A picture needs matplotlib: pip install matplotlib.")
    low, high = window_hu
    figure = Picture(figsize=(9, 3.2), layout="constrained")
    for axes, (picture, aspect), (view, left, right) in zip(
        figure.subplots(1, len(VIEWS)), middle_slices(volume), VIEWS, strict=True
    ):
        axes.imshow(picture, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="nearest")
        for x, letter in ((0.03, left), (0.97, right)):
            axes.text(x, 0.5, letter, transform=axes.transAxes, color="gold", ha="center", va="center")
        axes.set_title(f"{view}, {low:g}..{high:g} HU", fontsize=9)
        axes.set_axis_off()
    return figure


__all__ = ["Picture", "middle_slices", "plot_volume"]
