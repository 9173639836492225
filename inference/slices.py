"""Axial slices as radiologists look at them: the patient's right on the left of the picture, the front on top.

Whatever the scan's own axes, its slices are turned before they are drawn, so the letters at the edges of a picture are
always true. Slices count from the feet.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from matplotlib.axes import Axes
from matplotlib.font_manager import fontManager
from matplotlib.patheffects import withStroke

from medct.resampling_medct import reorient
from medct.volume_medct import CTVolume, axis_order

AXIAL = "SPL"
"""Slices towards the head, rows towards the back, columns towards the patient's left."""
WINDOWS_HU = {"Lung": (-1400, 200), "Soft tissue": (-160, 240), "Bone": (-450, 1050)}
"""Lowest and highest value shown: centres -600, 40 and 300, widths 1600, 400 and 1500."""
WIDE_WINDOW_HU = (-1000, 400)
"""Lung and soft tissue in one picture."""
LETTERS = (("R", 0.02, 0.5), ("L", 0.98, 0.5), ("A", 0.5, 0.97), ("P", 0.5, 0.03))
"""Sides of the patient, and where they are in a picture: shares of its width, and of its height from below."""
LETTER_COLOUR = "gold"
# Of names in scripts that matplotlib's own font lacks.
_OTHER_FONTS = ("Noto Sans CJK", "WenQuanYi", "Source Han Sans", "PingFang", "Hiragino", "Microsoft YaHei")
_THINNED = 4
"""Every so many rows are enough for a view that averages over them."""


@dataclass(frozen=True)
class AxialSlices:
    """A scan, turned for looking at its axial slices.

    Args:
        hu: `(slice, row, column)`, HU; a view of the scan.
        spacing_mm: `(slice, row, column)`, mm.
        z_mm: `(slices,)`, place of each slice's centre along the axis of the body, mm, growing towards the head.
        axis: The scan's axis that runs across the slices.
        is_from_feet: Whether its indices grow towards the head.
    """

    hu: np.ndarray
    spacing_mm: tuple[float, float, float]
    z_mm: np.ndarray
    axis: int
    is_from_feet: bool

    @classmethod
    def of(cls, volume: CTVolume) -> "AxialSlices":
        """Turn a scan of any axis order."""
        hu, (thickness, height, width) = reorient(volume, AXIAL)
        axes, signs = axis_order(volume.affine, AXIAL)
        centres = np.tile((np.array(volume.array.shape) - 1) / 2, (len(hu), 1))
        centres[:, axes[0]] = np.arange(len(hu))[:: signs[0]]
        z_mm = centres @ volume.affine[2, :3] + volume.affine[2, 3]
        return cls(hu, (thickness, height, width), z_mm, axes[0], signs[0] > 0)

    def __len__(self) -> int:
        return len(self.hu)

    @property
    def pixel_aspect(self) -> float:
        """Height of a pixel over its width."""
        return self.spacing_mm[1] / self.spacing_mm[2]

    def flipped(self, index: int) -> int:
        """A slice's index along the scan's own axis, and the other way round.

        Args:
            index: From 0.
        """
        return index if self.is_from_feet else len(self) - 1 - index

    def caption(self, index: int) -> str:
        """Which slice it is, and where it lies in the scan.

        Args:
            index: From 0, at the feet.
        """
        share = index / max(1, len(self) - 1)
        where = f"z {self.z_mm[index]:+.1f} mm, {share:.0%} of the way from feet to head"
        return f"slice {index + 1} of {len(self)}, {where}"

    def grey(self, index: int, window_hu: tuple[float, float]) -> np.ndarray:
        """A slice as it is shown.

        Args:
            index: From 0, at the feet.
            window_hu: Lowest and highest value shown, HU.

        Returns:
            `(row, column)`, 0 to 1, float32.
        """
        low, high = window_hu
        return ((self.hu[index].astype(np.float32) - low) / (high - low)).clip(0, 1)

    def coronal(self, window_hu: tuple[float, float]) -> np.ndarray:
        """The scan from the front, averaged from front to back, to show where slices lie.

        Args:
            window_hu: Lowest and highest value that counts, HU.

        Returns:
            `(slice, column)`, HU, float32.
        """
        return self.hu[:, ::_THINNED].clip(*window_hu).mean(axis=1, dtype=np.float32)


@lru_cache
def fonts() -> list[str]:
    """Font families for findings named in any script, as far as this machine has them."""
    names = sorted({font.name for font in fontManager.ttflist if font.name.startswith(_OTHER_FONTS)})
    return ["sans-serif", *names]


def letter(axes: Axes, text: str, x: float, y: float) -> None:
    """Write into a picture, readable on black and on white.

    Args:
        axes: Where to write.
        text: What.
        x, y: Shares of the width, and of the height from below.
    """
    sides = {"ha": side(x, ("left", "center", "right")), "va": side(y, ("bottom", "center", "top"))}
    outline = [withStroke(linewidth=2, foreground="black")]
    axes.text(x, y, text, transform=axes.transAxes, color=LETTER_COLOUR, path_effects=outline, **sides)


def side(share: float, names: tuple[str, str, str]) -> str:
    """On which side of its place a letter stands, so that it stays within the picture.

    Args:
        share: Of the width or the height, where the place is.
        names: Of the sides: at the beginning, in the middle, and at the end.
    """
    return names[0] if share < 0.25 else names[2] if share > 0.75 else names[1]


def draw_slice(axes: Axes, slices: AxialSlices, index: int, window_hu: tuple[float, float]) -> None:
    """Draw a slice with the letters of the patient's sides.

    Args:
        axes: Where to draw.
        slices: The scan.
        index: Which slice, from 0, at the feet.
        window_hu: Lowest and highest value shown, HU.
    """
    look = {"aspect": slices.pixel_aspect, "interpolation": "nearest", "cmap": "gray", "vmin": 0, "vmax": 1}
    axes.imshow(slices.grey(index, window_hu), **look)
    for each in LETTERS:
        letter(axes, *each)
    axes.set_axis_off()


def draw_places(axes: Axes, slices: AxialSlices, indices: list[int], window_hu: tuple[float, float]) -> None:
    """Draw the scan from the front, with a line for each of some slices.

    Args:
        axes: Where to draw.
        slices: The scan.
        indices: Slices, from 0, at the feet.
        window_hu: Lowest and highest value that counts, HU.
    """
    aspect = slices.spacing_mm[0] / slices.spacing_mm[2]
    axes.imshow(slices.coronal(window_hu), cmap="gray", aspect=aspect, origin="lower")
    for index in indices:
        axes.axhline(index, color=LETTER_COLOUR, linewidth=1)
        at_edge = {"textcoords": "offset points", "xytext": (-3, 1), "ha": "right", "color": LETTER_COLOUR}
        axes.annotate(str(index + 1), (slices.hu.shape[2] - 0.5, index), fontsize=8, **at_edge)
    for each in (("R", 0.02, 0.98), ("head", 0.5, 0.98), ("feet", 0.5, 0.02)):
        letter(axes, *each)
    axes.set_axis_off()
