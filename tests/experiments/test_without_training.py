"""What copying and filling cost: on slices made by hand, and the command on a dataset."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from ctssl_jax.ops.corruptions import example_keys, salt_and_pepper
from data_prep.dataset.reader import Dataset
from experiments import without_training
from experiments.study import easy_answers
from tests.helpers.training_runs import PROJECT

KEPT = PROJECT / "experiments" / "results" / "without_training_real"
VOLUME = {"slice_spacing_mm": 2.5, "num_slices": 6, "gap_positions": "2"}


def run(*arguments):
    command = [sys.executable, "-m", "experiments.without_training", *map(str, arguments)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("distance", "mm", "firsts", "gap"),
    [(0, 2.5, [0, 1, 3, 4], 1), (1, 2.5, [0, 1, 3, 4], 1), (5.2, 5.0, [0, 3], 2), (8, 7.5, [], 3)],
)
def test_pairs_cross_no_gap(distance, mm, firsts, gap):
    pairs, found = easy_answers.pairs_at(VOLUME, distance)
    assert pairs.tolist() == [[first, first + gap] for first in firsts] and found == mm


def test_a_single_slice_has_no_pair():
    alone = VOLUME | {"num_slices": 1, "gap_positions": "", "slice_spacing_mm": None}
    assert len(easy_answers.pairs_at(alone, 0)[0]) == 0


def test_noisy_pixels_are_means_of_clean_ones():
    rows, columns = np.mgrid[:32, :32] / 31.0
    images = (
        np.stack([rows + columns, rows - columns + 1], axis=0)[..., None].astype(np.float32) / 2
    )
    noisy = np.zeros((2, 32, 32, 1), np.float32)
    noisy[:, 8, 8], noisy[1, 20, 5:9] = 1, 1
    filled = easy_answers.filled(np.where(noisy > 0, 7.0, images), noisy)
    assert np.all(filled[noisy == 0] == images[noisy == 0])
    np.testing.assert_allclose(filled[noisy > 0], images[noisy > 0], atol=0.02)


def test_noise_is_that_of_the_pretext():
    records = np.arange(3)
    noisy = np.asarray(easy_answers._in_blocks(easy_answers.noise_of_size(16, 5), records))
    grey = np.full((3, 16, 16, 1), 0.3, np.float32)
    seen = salt_and_pepper(example_keys(jax.random.key(5), records), grey, fraction=0.5)
    assert np.array_equal(noisy > 0, np.asarray(seen) != grey)


def test_the_command_tells_each_size_and_distance(tiny_dataset, tmp_path):
    output = tmp_path / "table"
    done = run(f"--dataset={tiny_dataset}", f"--output_dir={output}", "--distances_mm=0,100")
    assert done.returncode == 0, done.stderr
    rows = json.loads((output / "without_training.json").read_text())
    assert without_training.table(rows) == (output / "without_training.md").read_text()
    assert rows[0]["without training"] == "fill" and rows[1]["without training"] == "copy"
    dataset = Dataset.open(tiny_dataset)
    of_volumes = []
    for split in ("train", "validation", "test"):
        source = dataset.source(split)
        for volume in dataset.volumes(split):
            first, number = volume["first_record"], volume["num_slices"]
            images = np.stack([source[first + n]["image"] for n in range(number)]) / 255.0
            of_volumes.append(np.mean(np.square(np.diff(images, axis=0))))
    assert rows[1]["mse"] == pytest.approx(np.mean(of_volumes), rel=1e-4)
    assert rows[1]["minus_fill"] == pytest.approx(rows[1]["mse"] - rows[0]["mse"], rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--output_dir=T"], "give --dataset=DIR"),
        (
            ["--dataset=D", "--output_dir=T", "--distances_mm=near"],
            "--distances_mm=near: give numbers",
        ),
        (["--dataset=no/where", "--output_dir=T"], "no/where"),
    ],
)
def test_wrong_flags_end_in_one_line(flags, words):
    done = run(*flags)
    assert done.returncode == 2 and words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_kept_table_follows_from_its_numbers():
    rows = json.loads((KEPT / "without_training.json").read_text())
    assert without_training.table(rows) == (KEPT / "without_training.md").read_text()
