"""The statistics by which the phantom is tuned, and the folds of patients."""

import numpy as np
import pytest

from data_prep.dataset.reader import Dataset
from data_prep.dataset.verify import verify
from data_prep.system.workers import WorkerPool
from experiments.bench import patient_folds, phantom_statistics
from tests.helpers.example_dataset import write_example_dataset


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


def test_folds_test_every_patient_once_and_their_datasets_are_sound(tmp_path):
    assert patient_folds.deal("gfedcba") == [["a", "e"], ["b", "f"], ["c", "g"], ["d"]]
    whole = Dataset.open(write_example_dataset(tmp_path / "whole"))
    patients = sorted({volume["patient_id"] for volume in whole.volumes()})
    splits = {patient: ("train", "validation")[i % 2] for i, patient in enumerate(patients)}
    (tmp_path / "fold").mkdir()
    patient_folds.write_split(whole, tmp_path / "fold", splits)
    fold = Dataset.open(tmp_path / "fold")
    assert {v["patient_id"]: v["split"] for v in fold.volumes()} == splits
    assert len(fold.volumes()) == len(whole.volumes())
    for volume in fold.volumes():
        old = next(v for v in whole.volumes() if v["volume_id"] == volume["volume_id"])
        for index in (0, volume["num_slices"] - 1):
            a = fold.source(volume["split"])[volume["first_record"] + index]
            b = whole.source(old["split"])[old["first_record"] + index]
            assert np.array_equal(a["image"], b["image"]) and a["position_mm"] == b["position_mm"]
    with WorkerPool(1) as pool:
        assert verify(fold, pool) == []


def test_the_interval_holds_the_scores_mean_and_is_wider_than_they():
    low, high = patient_folds.interval([0.8, 0.9, 0.7, 0.8])
    assert low < 0.7 and 0.8 < high <= 1.0
