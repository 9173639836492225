"""Slices are shown with the patient's right on the left, whatever the scan's axes, and say where they lie."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure

from medct import CTVolume
from medct.inference.slices import LETTERS, AxialSlices, draw_places, draw_slice
from medct.volume_io_medct import affine_from_spacing

ORIENTATIONS = [
    "".join(letters) for axes in itertools.permutations(("RL", "AP", "SI")) for letters in itertools.product(*axes)
]


@pytest.fixture(params=ORIENTATIONS)
def marked(request) -> CTVolume:
    """A scan whose brightest voxel lies to the right, in front and towards the head; the third lowest of 9 slices."""
    affine = affine_from_spacing((2.0, 2.0, 2.0), request.param)
    affine[:3, 3] = (4, -6, 8)
    shape = [{"R": 20, "L": 20, "A": 16, "P": 16, "S": 9, "I": 9}[letter] for letter in request.param]
    array = np.full(shape, -1000, np.int16)
    index = [
        {"R": n - 2, "L": 1, "A": n - 3, "P": 2, "S": 6, "I": n - 7}[letter]
        for letter, n in zip(request.param, shape, strict=True)
    ]
    array[tuple(index)] = 500
    return CTVolume(array, affine)


def test_right_is_left_and_front_is_on_top(marked):
    slices = AxialSlices.of(marked)
    assert slices.hu.shape == (9, 16, 20)
    assert np.argwhere(slices.hu == 500).tolist() == [[6, 2, 1]]


def test_the_position_is_that_of_the_affine(marked):
    slices = AxialSlices.of(marked)
    (voxel,) = np.argwhere(marked.array == 500)
    z = (marked.affine @ [*voxel, 1])[2]
    assert slices.z_mm[6] == pytest.approx(z)
    assert np.allclose(np.diff(slices.z_mm), 2)
    assert slices.caption(6) == f"slice 7 of 9, z {z:+.1f} mm, 75% of the way from feet to head"


def test_the_picture_says_what_is_where():
    volume = CTVolume(np.zeros((6, 8, 5), np.int16), affine_from_spacing((3.0, 2.0, 4.0), "LPS"))
    slices = AxialSlices.of(volume)
    assert slices.pixel_aspect == pytest.approx(2 / 3)
    axial, coronal = Figure().subplots(1, 2)
    draw_slice(axial, slices, 2, (-1000, 400))
    written = [(text.get_text(), *text.get_position()) for text in axial.texts]
    assert written == list(LETTERS)
    places = {name: (x, y) for name, x, y in LETTERS}
    assert places["R"][0] < 0.1 and places["L"][0] > 0.9 and places["A"][1] > 0.9 and places["P"][1] < 0.1
    draw_places(coronal, slices, [1, 4], (-1000, 400))
    assert {"R", "head", "feet", "2", "5"} == {text.get_text() for text in coronal.texts}
    assert coronal.get_ylim()[0] < coronal.get_ylim()[1], "the head is on top"


def test_a_window_is_clipped_and_scaled():
    array = np.array([-2000, -160, 40, 240, 3000], np.int16).reshape(1, 5, 1).repeat(2, 0).repeat(2, 2)
    slices = AxialSlices.of(CTVolume(array, affine_from_spacing((1, 1, 1), "SPL")))
    np.testing.assert_allclose(slices.grey(0, (-160, 240))[:, 0], [0, 0, 0.5, 1, 1])
