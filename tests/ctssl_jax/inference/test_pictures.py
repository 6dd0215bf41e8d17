"""Pictures of a prediction: what is written on them."""

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from ctssl_jax.inference import pictures
from ctssl_jax.inference.mask_prediction import _save_picture
from data_prep.scan.window import window_to_uint8

LONG = "nodules_small, step 80, trained on SYNTHETIC data, SYNTHETIC scan: no foreground"


@pytest.fixture
def drawn(monkeypatch):
    """Figures instead of files."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *path, **options: figures.append(self))
    return figures


def test_the_curve_names_what_is_drawn(drawn, tmp_path):
    pictures.save_curve(
        tmp_path / "a.png",
        np.array([0.0, 5.0, 10.0]),
        {"P(1)": np.array([0.1, 0.9, 0.2])},
        np.zeros((8, 8), np.uint8),
        1,
        thresholds={"exam": 0.75},
        title=LONG,
    )
    left, right = drawn[0].axes
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels == ["P(1)", "slice on the right", "threshold of the exam 0.75"]
    assert len(left.lines) == 3 and right.get_title() == "slice at 5.0 mm: 0.900"


@pytest.mark.parametrize(("archive", "window"), [("lidc_idri", (-600, 1500)), ("dicom", (50, 350))])
def test_nodules_are_drawn_in_a_lung_window(drawn, tmp_path, archive, window):
    """Masks of other archives may be of anything, and keep the window of the model."""

    model = SimpleNamespace(preparation={"archive": archive}, windows=((50, 350), (40, 400)))
    volume = SimpleNamespace(
        hu=np.linspace(-1000, 400, 2 * 8 * 8).reshape(2, 8, 8),
        pixel_spacing_mm=(0.7, 0.7),
        position_mm=np.array([0.0, 2.5]),
    )
    probabilities = np.zeros((2, 8, 8), np.float32)
    probabilities[1, 0, 0] = 0.25
    empty = probabilities > 0.5
    _save_picture(tmp_path / "a.png", model, volume, empty, probabilities, [], LONG)
    (axis,) = drawn[0].axes
    expected = window_to_uint8(volume.hu[1], [window])[..., 0]
    np.testing.assert_array_equal(axis.images[0].get_array(), expected)
    level, width = window
    footer = f"Window {level}/{width} HU. {pictures.FOOTER}"
    assert drawn[0].get_supxlabel() == footer
    assert max(map(len, drawn[0].get_suptitle().splitlines())) <= 66  # as wide as the picture
