"""What the figures say; their appearance was checked by eye."""

import re

import numpy as np
import PIL.Image
import pytest
from matplotlib.text import Text

from medct.evaluation.plots import STYLES, calibration_plot, change_plot, roc_plot, save_plot

NAMES = ["Lung nodule", "Coronary artery wall calcification", "Emphysema", "Mass"]
NOTE = "SYNTHETIC phantoms of site B: drawings, no patients, and no clinical meaning; " * 2


@pytest.fixture
def study():
    """Two models and labels of 80 scans; one label is sometimes unknown, the last never present."""
    generator = np.random.default_rng(0)
    labels = (generator.random((80, 4)) < [0.5, 0.2, 0.4, 0]).astype(float)
    labels[:5, 0] = np.nan
    present = np.nan_to_num(labels)
    models = {
        name: 1 / (1 + np.exp(-generator.normal(size=labels.shape) - strength * present))
        for name, strength in (("base", 0.5), ("adapted", 2.0))
    }
    return models, labels


def texts(figure) -> list[str]:
    """All text in a figure."""
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_roc_plot_names_models_labels_and_data(study, tmp_path):
    models, labels = study
    figure = roc_plot(models, labels, NAMES, NOTE)
    written = " ".join(texts(figure)).replace("\n", " ")
    assert "80 scans" in written and " ".join(NOTE.split()) in written
    assert all(name in written for name in NAMES)
    assert "base: AUROC 0." in written and "adapted: AUROC 0." in written
    assert texts(figure).count("none") == 2  # of the label that is never present
    figure.savefig(tmp_path / "roc.png")
    with PIL.Image.open(tmp_path / "roc.png") as image:
        assert image.format == "PNG" and min(image.size) > 600


def test_roc_curves_are_drawn_where_they_belong(study):
    """From (0, 0) on, a perfect model's curve goes through the corner, an inverted one's along the floor."""
    _, labels = study
    labels = np.nan_to_num(labels[:, :1])
    figure = roc_plot({"right": labels, "wrong": 1 - labels}, labels, NAMES[:1])
    curves = {line.get_label(): line.get_xydata() for line in figure.subfigs[0].axes[0].lines}
    right, wrong = curves["right: AUROC 1.000"], curves["wrong: AUROC 0.000"]
    assert right[0].tolist() == wrong[0].tolist() == [0, 0]
    assert right[1].tolist() == [0, 1] and (right[1:, 1] == 1).all()
    assert (wrong[:-1, 1] == 0).all() and wrong[-1].tolist() == [1, 1]


def test_every_curve_goes_from_corner_to_corner(study):
    models, labels = study
    figure = roc_plot(models, labels, NAMES)
    panels = [figure.subfigs[0].axes[0], *figure.subfigs[1].axes[:3]]
    lines = [line.get_xydata() for panel in panels for line in panel.lines if np.isfinite(line.get_ydata()).all()]
    assert len(lines) > 2 * len(panels)
    for line in lines:
        assert (line[0].tolist(), line[-1].tolist()) == ([0, 0], [1, 1])
        assert (np.diff(line, axis=0) >= 0).all()


def test_ticks_are_numbers(study):
    models, labels = study
    for figure in (roc_plot(models, labels, NAMES), calibration_plot(models, labels)):
        figure.draw_without_rendering()
        panels = figure.axes or [panel for part in figure.subfigs for panel in part.axes]
        said = [tick.get_text() for panel in panels for tick in (*panel.get_xticklabels(), *panel.get_yticklabels())]
        assert said
        for text in filter(None, said):
            assert re.fullmatch(r"[−-]?[\d.,]+", text), text


def test_an_axis_says_score_where_it_is_one(study):
    models, labels = study
    assert calibration_plot(models, labels).axes[1].get_xlabel() == "score, in 10 bins"
    assert calibration_plot(models, labels, what="probability").axes[1].get_xlabel() == "probability, in 10 bins"


def test_a_saved_plot_says_its_title_to_programs(study, tmp_path):
    models, labels = study
    save_plot(roc_plot(models, labels, NAMES, "of site b"), tmp_path / "roc.png")
    with PIL.Image.open(tmp_path / "roc.png") as image:
        assert image.info["Title"] == "ROC curves, 80 scans\nof site b"


def test_calibration_plot_shows_error_and_counts(study, tmp_path):
    models, labels = study
    figure = calibration_plot({"perfect": np.nan_to_num(labels), **models}, labels, NOTE)
    written = " ".join(texts(figure)).replace("\n", " ")
    assert "80 scans" in written and " ".join(NOTE.split()) in written
    assert "perfect: expected calibration error 0.000" in written
    assert "adapted: expected calibration error 0." in written
    upper, lower = figure.axes
    assert len(upper.lines) == 1 + 3
    heights = np.array([bar.get_height() for bar in lower.patches]).reshape(3, 10)
    assert (heights.sum(axis=1) == 4 * 80 - 5).all()
    assert (heights[0] == [np.sum(labels == 0), *[0] * 8, np.sum(labels == 1)]).all()
    figure.savefig(tmp_path / "calibration.png")


def test_what_cannot_be_drawn_is_refused(study):
    models, labels = study
    with pytest.raises(ValueError, match="5 models do not fit"):
        roc_plot(dict.fromkeys("abcde", models["base"]), labels, NAMES)
    with pytest.raises(ValueError, match="always or never present"):
        roc_plot(models, labels * 0, NAMES)
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        calibration_plot({"base": models["base"] * 2}, labels)


@pytest.mark.filterwarnings("error")
def test_nothing_overlaps(study):
    """Titles of panels neither touch each other nor the panel above."""
    models, labels = study
    wide = [np.tile(scores, 5)[:, :18] for scores in models.values()]
    names = [NAMES[index % 2] for index in range(18)]
    figure = roc_plot(dict(zip(models, wide, strict=True)), np.tile(labels, 5)[:, :18], names)
    figure.draw_without_rendering()
    boxes = [panel.title.get_window_extent() for panel in figure.subfigs[1].axes]
    boxes += [panel.get_window_extent() for panel in figure.subfigs[1].axes]
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])


def test_each_model_has_the_look_of_its_place(study):
    models, labels = study
    panel = roc_plot(models, labels, NAMES).subfigs[0].axes[0]
    drawn = {line.get_label().split(":")[0]: line for line in panel.lines if ": AUROC" in line.get_label()}
    assert [line.get_color() for line in drawn.values()] == [style.colour for style in STYLES[: len(models)]]
    assert list(drawn) == list(models)


def changed(auroc: dict[str, float | None], scans: int = 300) -> dict:
    """What `compare` gives, as far as it is drawn."""
    around = {
        key: {"value": value, "low": None if value is None else value - 0.02, "high": value and value + 0.02}
        for key, value in auroc.items()
    }
    return {"scans": scans, "difference": around}


def test_change_plot_has_two_dots_a_finding(tmp_path):
    new = {"auroc": 0.1, "auroc/a": 0.05, "auroc/b": 0.2, "auroc/never here": None}
    old = {"auroc": -0.01, "auroc/a": -0.03, "auroc/b": 0.01, "auroc/never here": -0.02}
    figure = change_plot(changed(new), changed(old, scans=40), ["a", "b", "never here"], NOTE)
    (panel,) = figure.axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["mean", "never here", "a", "b"]
    learned, forgotten = (line for line in panel.lines if "scans)" in line.get_label())
    np.testing.assert_array_equal(learned.get_xdata(), [0.1, np.nan, 0.05, 0.2])
    np.testing.assert_array_equal(forgotten.get_xdata(), [-0.01, -0.02, -0.03, 0.01])
    assert "(40 scans)" in forgotten.get_label() and learned.get_marker() != forgotten.get_marker()
    written = " ".join(texts(figure)).replace("\n", " ")
    assert " ".join(NOTE.split()) in written
    figure.savefig(tmp_path / "learned.png")


def test_names_are_no_formulas(study, tmp_path):
    """matplotlib reads what stands between two "$" as one, and stops at what it cannot read."""
    models, labels = study
    models, names, note = (
        {f"{name} $\\x $": scores for name, scores in models.items()},
        ["$\\x $", "5$ to 10$"],
        "$\\x $",
    )
    change = changed({"auroc": 0.1, **{f"auroc/{name}": 0.1 for name in names}})
    figures = [roc_plot({name: each[:, :2] for name, each in models.items()}, labels[:, :2], names, note)]
    figures += [calibration_plot(models, labels, note), change_plot(change, change, names, note)]
    for figure in figures:
        save_plot(figure, tmp_path / "plot.png")
    with PIL.Image.open(tmp_path / "plot.png") as image:
        assert image.info["Title"].endswith(note)
