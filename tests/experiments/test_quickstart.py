"""The main job end to end at its smallest, and the same again on real scans."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.study import quickstart_report

PROJECT = Path(__file__).resolve().parents[2]


def run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "experiments.quickstart", *flags],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("quickstart") / "out"
    result = run(f"--output_dir={output}", "--num_patients=6", "--num_slices=24", "--num_steps=3")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " the mean slice's and " in result.stdout and "SYNTHETIC" in result.stdout
    return output


def test_report_shows_what_was_measured(finished):
    page = (finished / "report.html").read_text()
    result = json.loads((finished / "result.json").read_text())
    assert "SYNTHETIC DATA" in page and "Not for clinical use" in page
    assert page.count("data:image/png;base64,") == 3
    for predictor in (result["metrics"], *result["baselines"].values()):
        for name in quickstart_report.NAMES:
            assert f"{predictor[name]['mean']:.4f}" in page
    factors = quickstart_report.improvement(result)
    for baseline, factor in factors.items():
        ratio = (
            result["baselines"][baseline]["masked_mse"]["mean"]
            / result["metrics"]["masked_mse"]["mean"]
        )
        assert factor == pytest.approx(ratio)
        assert quickstart_report.compared(factor) in page
    assert not re.search(re.escape(str(finished)), page), "the report names a path of this machine"


def test_results_are_of_held_out_patients(finished):
    result = json.loads((finished / "result.json").read_text())
    assert (
        result["synthetic"]
        and result["split"] == "test"
        and result["num_patients_seen_in_training"] == 0
    )
    with open(finished / "dataset" / "volumes.csv", newline="") as file:
        volumes = list(csv.DictReader(file))
    held_out = [volume for volume in volumes if volume["split"] == "test"]
    assert result["num_slices"] == sum(int(volume["num_slices"]) for volume in held_out)
    training = {volume["patient_id"] for volume in volumes if volume["split"] == "train"}
    assert not training & {volume["patient_id"] for volume in held_out}


def test_a_larger_error_is_called_larger():
    assert quickstart_report.compared(2.6) == "2.6 times smaller than"
    assert quickstart_report.compared(0.5) == "2.0 times LARGER than"


def test_the_report_is_one_page_for_narrow_and_wide_screens(finished):
    page = (finished / "report.html").read_text()
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page
    assert not re.search(r"(src|href)=.?(https?:|//)", page)
    assert page.count("<table>") == page.count("<div class=wide><table>")
    assert "the error inside the mask is" in page  # what the picture shows, for who cannot see it


def test_a_second_run_repeats_nothing(finished):
    before = (finished / "result.json").read_text()
    again = run(f"--output_dir={finished}", "--num_patients=6", "--num_slices=24", "--num_steps=3")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "is complete already" in again.stdout
    assert "resuming     from step 3" in again.stdout
    assert (
        json.loads((finished / "result.json").read_text())["metrics"]
        == json.loads(before)["metrics"]
    )


def test_missing_input_is_one_line(tmp_path):
    result = run(f"--input_dir={tmp_path / 'none'}", f"--output_dir={tmp_path / 'out'}")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "no such folder" in result.stderr
    assert not (tmp_path / "out").exists()


def test_real_scans(real_data, tmp_path):
    """Three real chest scans, a patient a split; the archive's other series are refused on the
    way."""
    result = run(f"--input_dir={real_data}", f"--output_dir={tmp_path / 'out'}", "--num_steps=2")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    measured = json.loads((tmp_path / "out" / "result.json").read_text())
    assert not measured["synthetic"] and measured["metrics"]["ssim"]["num_patients"] == 1
    assert measured["metrics"]["ssim"]["ci95"] is None, "one patient gives no interval"
    assert "SYNTHETIC" not in (tmp_path / "out" / "report.html").read_text()
