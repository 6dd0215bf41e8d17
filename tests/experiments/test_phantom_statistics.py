"""The statistics by which the phantom is tuned."""

import numpy as np
import pytest

from experiments.bench import phantom_statistics


def chest(rng: np.random.Generator, lung_radius: float = 20.0, noise: float = 0.02):
    """A round body with two lungs, 30 slices of 64 x 64 pixels of 5 mm, and its row."""
    y, x = np.mgrid[:64, :64] - 31.5
    slices = np.full((30, 64, 64), 0.0)
    slices[:, np.hypot(x, y) < 28] = 0.5
    for side in (-12, 12):
        slices[4:26, np.hypot(x - side, y) < lung_radius / 2] = 0.0
    slices += rng.normal(0, noise, slices.shape) * (slices > 0)
    row = {
        "pixel_spacing_row_mm": 5.0,
        "pixel_spacing_column_mm": 5.0,
        "source_rows": 64,
        "source_columns": 64,
        "slice_spacing_mm": 2.0,
        "first_lung_slice": 4,
        "last_lung_slice": 25,
    }
    return slices.astype(np.float32).clip(0, 1), row


def test_a_chest_of_known_lungs_and_noise():
    images, row = chest(np.random.default_rng(0))
    found = phantom_statistics.measure(images, row)
    litres = 2 * np.pi * 10**2 * 22 * 25 * 2 / 1e6
    assert found.lung_litres == pytest.approx(litres, rel=0.1)
    sd, beside, above, *bands = found.noise
    # White noise without its slope, of the quieter patches.
    assert 0.013 < sd < 0.02 and beside < 0.05 and abs(above) < 0.05
    assert sum(bands) == pytest.approx(1)
    assert np.all(np.diff(phantom_statistics.slice_differences(images, 2.0)) >= -1e-3)
    partly = phantom_statistics.measure(images[:20], {**row, "last_lung_slice": 19})
    assert partly.lung_litres is None


def test_patients_of_one_kind_lie_within_and_others_outside():
    rng = np.random.default_rng(1)

    def draw(shift: float) -> list[phantom_statistics.Chest]:
        radii = rng.normal(18 + shift, 1.5, 8)
        return [phantom_statistics.measure(*chest(rng, radius)) for radius in radii]

    known, same, other = (phantom_statistics.describe(draw(shift)) for shift in (0.0, 0.0, -8.0))
    rows = {row["name"]: row for row in phantom_statistics.compare(same, known)}
    assert sum(not row["inside"] for row in rows.values()) <= 1
    rows = {row["name"]: row for row in phantom_statistics.compare(other, known)}
    assert not rows["lungs, litres"]["inside"]
    assert not rows["grey histogram, Wasserstein distance"]["inside"]
    assert "**no**" in phantom_statistics.table(list(rows.values()))


def test_flip_scores_of_folds_have_a_tolerance_below_one():
    chests = [phantom_statistics.measure(*chest(np.random.default_rng(i))) for i in range(3)]
    known = {**phantom_statistics.describe(chests), "flip": [0.85, 0.88, 0.82, 0.85]}
    for flip, inside in (([0.83, 0.86], True), ([1.0, 1.0, 1.0, 1.0], False)):
        *_, row = phantom_statistics.compare({**known, "flip": flip}, known)
        assert row["name"] == "flip AUROC" and row["inside"] is inside
        assert row["low"] < 0.83 and row["high"] < 1
