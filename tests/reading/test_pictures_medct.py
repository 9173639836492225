"""How volumes and geometries show themselves: in a line, and as pictures."""

import itertools
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from medct import CTVolume, MedCTImageProcessor
from medct.pictures_medct import VIEWS, middle_slices
from medct.volume_medct import affine_from_spacing, grid_in_words

ORIENTATIONS = [
    "".join(letters) for axes in itertools.permutations(("LR", "AP", "IS")) for letters in itertools.product(*axes)
]


def volume(orientation: str = "LPS") -> CTVolume:
    """Of other lengths and spacings along each axis; brighter towards the head, the left and the back."""
    spacing = {"LR": 2.0, "AP": 3.0, "IS": 5.0}
    length = {"LR": 6, "AP": 8, "IS": 10}
    kinds = [next(kind for kind in spacing if letter in kind) for letter in orientation]
    array = np.zeros([length[kind] for kind in kinds], np.int16)
    for axis, (letter, kind) in enumerate(zip(orientation, kinds, strict=True)):
        ramp = np.arange(length[kind]) * {"LR": 1, "AP": 10, "IS": 100}[kind]
        ramp = ramp if letter in "LPS" else ramp[::-1]
        array += ramp.reshape([-1 if dim == axis else 1 for dim in range(3)]).astype(np.int16)
    return CTVolume(array, affine_from_spacing([spacing[kind] for kind in kinds], orientation), "scan.nii.gz")


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_pictures_are_upright_in_every_axis_order(orientation):
    axial, coronal, sagittal = middle_slices(volume(orientation))
    # Columns towards the patient's left (or back), rows towards the back (or the feet).
    assert (np.diff(axial[0], axis=1) == 1).all() and (np.diff(axial[0], axis=0) == 10).all()
    assert (np.diff(coronal[0], axis=1) == 1).all() and (np.diff(coronal[0], axis=0) == -100).all()
    assert (np.diff(sagittal[0], axis=1) == 10).all() and (np.diff(sagittal[0], axis=0) == -100).all()
    assert [aspect for _, aspect in (axial, coronal, sagittal)] == pytest.approx([3 / 2, 5 / 2, 5 / 3])
    assert grid_in_words(volume(orientation).affine).endswith(f"mm towards {orientation}")


def test_a_volume_is_a_line():
    assert repr(volume()) == "CTVolume('scan.nii.gz', 6 x 8 x 10 int16, 2 x 3 x 5 mm towards LPS)"
    noted = CTVolume(volume().array, volume().affine, notes=("one", "two"))
    assert repr(noted).endswith(", 2 notes)")


def test_a_geometry_is_a_line():
    processor = MedCTImageProcessor(image_size=(4, 8, 8), target_spacing_mm=(4, 4, 4))
    said = repr(processor.geometry(volume()))
    assert said.startswith("VolumeGeometry(voxels of 2 x 3 x 5 mm towards LPS; pixel_values[0, 0, 0] at (")
    assert said.count("\n") == 0


def test_a_plot_shows_three_views_with_their_sides():
    figure = volume().plot(window_hu=(0, 1000))
    assert isinstance(figure, Figure)
    assert [axes.get_title() for axes in figure.axes] == [f"{view}, 0..1000 HU" for view, _, _ in VIEWS]
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [["R", "L"], ["R", "L"], ["A", "P"]]
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_without_matplotlib_a_picture_is_refused_and_nothing_else(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "medct.pictures_medct")
    with pytest.raises(ImportError, match="pip install matplotlib"):
        volume().plot()
    assert repr(volume())
