"""The main job end to end at its smallest, and the same again on real scans."""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from ctssl_jax.__main__ import commands
from data_prep.system.errors import InputError
from experiments import quickstart
from experiments.study import quickstart_report, runner
from tests.helpers import browser
from tests.helpers.command_parser import refusals
from tests.helpers.own_flags import main_of
from tests.helpers.real_scans import parts_of_scans

PROJECT = Path(__file__).resolve().parents[2]
NARROW, WIDE = 390, 1300
needs_chromium = pytest.mark.skipif(
    browser.CHROMIUM is None, reason="no `chromium` in PATH (Debian: apt-get install chromium)"
)


def run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "experiments.quickstart", *flags],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=900,
    )


SMALL = ("--num_patients=6", "--num_slices=24", "--num_steps=3")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("quickstart") / "out"
    result = run(f"--output_dir={output}", *SMALL)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " the mean slice's and " in result.stdout and "SYNTHETIC" in result.stdout
    (output.parent / "printed.txt").write_text(result.stdout)
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


def test_the_commands_that_are_named_next_can_be_typed(finished):
    printed = (finished.parent / "printed.txt").read_text()
    named = [shlex.split(line) for line in re.findall("^next: +ctssl (.*)", printed, re.MULTILINE)]
    doors = [door for door, *_ in named]
    assert doors == ["prepare", "describe", "train", "evaluate", "export", "quickstart"]
    doors = {door: module for group in commands().values() for door, (module, _) in group.items()}
    assert set(refusals([(doors[door], words) for door, *words in named])) == {""}
    assert any(word.startswith("--license=") for word in named[-2])  # `export` asks for it


def test_a_larger_error_is_called_larger():
    assert quickstart_report.compared(2.6) == "2.6 times smaller than"
    assert quickstart_report.compared(0.5) == "2.0 times LARGER than"


def test_the_curve_s_legend_names_only_what_was_measured(monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *path, **options: drawn.append(self))
    scores = {"step": 6, "loss": 1.0, "masked_mse": 0.1, "ssim": 0.5}
    quickstart_report.loss_curve([], [scores])
    quickstart_report.loss_curve([scores], [scores])
    legends = [figure.axes[0].get_legend().get_texts() for figure in drawn]
    assert [[text.get_text() for text in one] for one in legends] == [
        ["validation"],
        ["training", "validation"],
    ]
    assert drawn[1].axes[0].lines[0].get_marker() == "x"  # a line of one point cannot be seen


def test_one_patient_gives_a_dataset_and_says_where_it_ends(finished, tmp_path, capfd):
    """Without `--splits` that is refused; two patients can be validated on (below)."""
    output = tmp_path / "out"
    with pytest.raises(InputError, match="3 splits take 3 patients or more") as refused:
        main_of(quickstart, f"--output_dir={output}", "--num_patients=1")
    assert "\n" not in str(refused.value) and not output.exists()
    scans = min(path for path in (finished / "dicom").iterdir() if path.is_dir())
    options = (f"--output_dir={output}", f"--input_dir={scans}", "--splits=1,0,0")
    assert main_of(quickstart, *options) == 0
    printed = capfd.readouterr().out
    assert "--splits=1,0,0 ends here" in printed and (output / "cohort/cohort.csv").exists()
    assert not (output / "run").exists()
    assert printed.splitlines()[-1].endswith(f"describe --dataset={output / 'dataset'} --html")


def test_the_report_of_validation_patients_is_called_no_test(finished):
    result = json.loads((finished / "result.json").read_text())
    page = quickstart_report.report_html({**result, "split": "validation"}, [], {}, b"", b"", b"")
    assert "this is no test" in page and "held-out" not in page.lower()
    assert "this is no test" not in (finished / "report.html").read_text()


def test_the_report_is_one_page_for_narrow_and_wide_screens(finished):
    page = (finished / "report.html").read_text()
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page
    assert not re.search(r"(src|href)=.?(https?:|//)", page)
    assert page.count("<table>") == page.count("<div class=wide><table>")
    assert "the error inside the mask is" in page  # what the picture shows, for who cannot see it


@needs_chromium
def test_the_report_in_a_browser(finished, tmp_path):
    """No sideways scrolling, every picture loaded, nothing asked for from anywhere."""
    page = (finished / "report.html").read_text()
    assert "://" not in page
    for found, width in zip(
        browser.measure(page, (NARROW, WIDE), tmp_path), (NARROW, WIDE), strict=True
    ):
        assert found.width == width and found.scroll_width <= width
        assert len(found.pictures) == 3 and all(found.pictures)
        assert [name for name in found.requests if not name.startswith("data:")] == []


@needs_chromium
def test_the_browser_notices_what_is_wrong(tmp_path):
    page = (
        "<!doctype html><body style='margin:0'><div style='width:800px'>wide</div>"
        "<img src='data:image/png;base64,AAAA'><img src='http://example.invalid/a.png'>"
    )
    narrow, wide = browser.measure(page, (NARROW, WIDE), tmp_path)
    assert (narrow.scroll_width, wide.scroll_width) == (800, WIDE)
    assert narrow.pictures == [0, 0]
    assert "http://example.invalid/a.png" in narrow.requests


def test_a_second_run_asks_for_the_same_again_and_removes_nothing(finished, monkeypatch):
    """Each of its commands goes on from what is there, which their own tests look at."""

    def state() -> dict[Path, tuple[int, int]]:
        files = [path for path in finished.rglob("*") if path.is_file()]
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}

    asked, during = [], []

    def run_stage(title: str, module: str, *arguments: str) -> float:
        asked.append(f"$ {runner.typed(module, *arguments)}")
        during.append(state())
        return 0.0

    monkeypatch.setattr(quickstart, "run_stage", run_stage)
    before, seconds = state(), json.loads((finished / "seconds.json").read_text())
    assert main_of(quickstart, f"--output_dir={finished}", *SMALL) == 0
    printed = (finished.parent / "printed.txt").read_text().splitlines()
    assert asked == [line for line in printed if line.startswith("$ ctssl ")] and len(asked) == 5
    own = {finished / "seconds.json", finished / "report.html"}
    kept = {path: seen for path, seen in before.items() if path not in own}
    assert all(kept.items() <= seen.items() and seen.keys() == before.keys() for seen in during)
    assert kept.items() <= state().items()
    assert json.loads((finished / "seconds.json").read_text()) == seconds  # of the longest run


def test_missing_input_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^--input_dir=.*none: no such folder$"):
        main_of(quickstart, f"--input_dir={tmp_path / 'none'}", f"--output_dir={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_real_scans(real_data, tmp_path):
    """A part of each of three real chest scans, a patient a split."""
    scans = parts_of_scans(real_data, tmp_path / "scans")
    result = run(f"--input_dir={scans}", f"--output_dir={tmp_path / 'out'}", "--num_steps=2")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    measured = json.loads((tmp_path / "out" / "result.json").read_text())
    assert not measured["synthetic"] and measured["metrics"]["ssim"]["num_patients"] == 1
    assert measured["metrics"]["ssim"]["ci95"] is None, "one patient gives no interval"
    assert "SYNTHETIC" not in (tmp_path / "out" / "report.html").read_text()
