"""Predictions of one scan: what evaluation says of it, in the scan's own geometry, and nothing of
whose scan it is."""

import csv
import functools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import nibabel
import numpy as np
import pydicom
import pytest
from flax import nnx
from PIL import Image

from ctssl_jax.evaluation import predictions
from ctssl_jax.evaluation.measure import evaluate
from ctssl_jax.inference import mask_prediction, prediction, pretrained, serving
from ctssl_jax.inference.prediction import Request, predict, table
from ctssl_jax.inference.serving import Watch, watch_predictions
from ctssl_jax.runs.run import open_workdir
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training.state import abstract_model
from data_prep.dataset.reader import Dataset
from data_prep.masks.reading import read_mask
from data_prep.masks.writing import resize_back
from data_prep.privacy import pseudonyms
from data_prep.privacy.pseudonyms import volume_id
from data_prep.raw import scans
from data_prep.scan.rules import Rules
from data_prep.synthetic.archive import make_archive
from data_prep.synthetic.exam import Options
from data_prep.system.errors import InputError
from tests.helpers import dicom_files
from tests.helpers.example_dataset import write_example_dataset
from tests.helpers.training_runs import save_scored, tiny_recipe

PROJECT = Path(__file__).resolve().parents[3]
WINDOW = ((50, 350),)


def predict_scan(workdir, scan, output, checkpoint="best", batch_size=0, **fields):
    return predict(
        workdir, Request(scan, **fields), output, checkpoint=checkpoint, batch_size=batch_size
    )


def make_run(config, workdir: Path) -> None:
    """A run directory with random weights by which slices differ, without the cost of a training
    step."""
    random = np.random.default_rng(0)

    def numbers(path, leaf):
        last = jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-1]
        middle = float(last in ("scale", "var"))
        spread = {"kernel": math.sqrt(2 / max(1, math.prod(leaf.shape[:-1]))), "var": 0}.get(
            last, 0.1
        )
        return (middle + random.normal(0, spread, leaf.shape)).astype(leaf.dtype)

    _, params, variables = abstract_model(config, get_task(config.task))
    state = jax.tree_util.tree_map_with_path(numbers, {"params": params, "variables": variables})
    preparation = Dataset.open(config.dataset).preparation
    open_workdir(workdir, config, preparation, {"train": [], "validation": []})
    save_scored(workdir, {2: (state, 0.5)})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of segmentation."""
    folder = tmp_path_factory.mktemp("runs")
    dataset = write_example_dataset(folder / "dataset", image_size=32, masks=True)
    make_run(tiny_recipe(dataset, "nodules", image_size=32), folder / "nodules")
    return folder


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """A prone scan of 64 x 60 pixels that are not square, in files of no order."""
    hu = dicom_files.thorax(22, size=66)[:, 1:65, 3:63]
    folder = tmp_path_factory.mktemp("scan") / "Doe Jane"
    datasets = dicom_files.slices(hu[:, ::-1, ::-1], orientation=(-1, 0, 0, 0, -1, 0), spacing=2.0)
    for ds in datasets:
        ds.PixelSpacing = ["5.5", "5"]
        ds.FrameOfReferenceUID = dicom_files.uid(7)
        ds.AccessionNumber, ds.StudyDate = "A4711", "20010203"
    dicom_files.write(folder, datasets)
    return folder


def loaded(path, image_size: int, windows=WINDOW, rules=None):
    plan = scans.plan_scans(path, rules=rules)
    return scans.read_scan(plan.input_dir, plan.exams[0], windows, image_size, rules)


def made_certain(monkeypatch, region=np.s_[8:14, 10:20, 6:17]):
    """A model that draws a box (slices, rows, columns of its own size) and nothing else."""

    def probabilities(model, images):
        found = np.full(images.shape[:3], 0.1, np.float32)
        found[region] = 0.9
        return found

    monkeypatch.setattr(mask_prediction, "slice_probabilities", probabilities)


# ---- masks ---------------------------------------------------------------------------------------


def test_the_mask_is_the_models_in_the_scans_geometry(runs, scan, tmp_path, monkeypatch):
    made_certain(monkeypatch)
    result = predict_scan(runs / "nodules", scan, tmp_path / "out")
    volume = loaded(scan, 32).volume
    expected = np.zeros(volume.hu.shape, bool)
    box = np.full((32, 32), 0.1, np.float32)
    box[10:20, 6:17] = 0.9
    expected[8:14] = resize_back(box, (64, 60), (5.5, 5)) > 0.5
    mask = read_mask(tmp_path / "out" / "mask.nii.gz", volume)
    np.testing.assert_array_equal(mask, expected)
    field_mm = 64 * 5.5
    assert mask.sum() * 5.5 * 5 * 2 == pytest.approx(
        6 * 2 * 10 * 11 * (field_mm / 32) ** 2, rel=0.05
    )
    # rows 10 to 20 of 32 cover the whole height; columns are centred in 352 mm
    rows, columns = np.nonzero(mask[8])
    assert (rows.min(), rows.max() + 1) == (20, 40)
    left_mm = (6 / 32 - 0.5) * field_mm + 30 * 5
    assert columns.min() == pytest.approx(left_mm / 5, abs=1)

    assert result == json.loads((tmp_path / "out" / "prediction.json").read_text())
    assert result["num_foreground_slices"] == 6 and result["num_regions"] == 1
    assert result["num_foreground_voxels"] == mask.sum()
    assert result["volume_ml"] == pytest.approx(mask.sum() * 0.055, abs=1e-4)
    (region,) = result["regions"]
    assert (region["first_slice"], region["last_slice"]) == (8, 13)
    assert result["trained_on_synthetic"]
    assert (result["synthetic"], result["checkpoint_step"], result["windows"]) == (
        False,
        2,
        [{"level": 50, "width": 350}],
    )
    assert result["model_fingerprint"] == pretrained.load(runs / "nodules").fingerprint
    assert "1 regions on 6 slices" in table(result)
    picture = np.asarray(Image.open(tmp_path / "out" / "prediction.png").convert("RGB")).astype(int)
    assert np.count_nonzero((picture[..., 0] > 200) & (picture[..., 1] < 100)) > 50  # the contour


def test_the_segmentation_holds_the_same_mask(runs, scan, tmp_path, monkeypatch):
    pytest.importorskip("highdicom")
    made_certain(monkeypatch)
    result = predict_scan(runs / "nodules", scan, tmp_path / "out", segment_label="left nodule")
    volume = loaded(scan, 32).volume
    path = tmp_path / "out" / "segmentation.dcm"
    mask = read_mask(path, volume)
    assert mask.any()
    np.testing.assert_array_equal(mask, read_mask(tmp_path / "out" / "mask.nii.gz", volume))
    assert pydicom.dcmread(path).SegmentSequence[0].SegmentLabel == "left nodule"
    assert mask_prediction.IDENTITY_NOTE in result["notes"]


def test_only_the_segmentation_says_whose_scan_it_is(runs, scan, tmp_path):
    pytest.importorskip("highdicom")
    predict_scan(runs / "nodules", scan, tmp_path / "out")
    named = [b"Doe", b"Jane", b"patient-1", b"A4711", b"20010203", dicom_files.uid(1).encode()]
    by_file = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(by_file) == {"prediction.json", "prediction.png", "mask.nii.gz", "segmentation.dcm"}
    assert all(name in by_file["segmentation.dcm"] for name in named)
    by_file["mask.nii.gz"] = nibabel.load(tmp_path / "out" / "mask.nii.gz").to_bytes()
    for name, content in by_file.items():
        if name != "segmentation.dcm":
            assert not [text for text in (*named, str(tmp_path).encode()) if text in content], name
    # the earlier one must not stay
    result = predict_scan(runs / "nodules", scan, tmp_path / "out", dicom_seg=False)
    assert not (tmp_path / "out" / "segmentation.dcm").exists()
    assert (
        result["files"] == ["prediction.json", "prediction.png", "mask.nii.gz"]
        and result["notes"] == []
    )


def test_probabilities_are_those_of_the_evaluated_model(runs):
    """More slices than a batch, on eight devices: equal to what the task computes, slice by
    slice."""
    model = pretrained.load(runs / "nodules", batch_size=8)
    brightest = np.linspace(20, 255, 22).astype(int)[:, None, None, None]
    images = np.random.default_rng(0).integers(0, brightest, (22, 32, 32, 1), np.uint8)
    assert len(images) > model.batch_size
    found = mask_prediction.slice_probabilities(model, images)
    assert found.shape == (22, 32, 32) and found.dtype == np.float32
    network = get_task("segmentation").build(model.config, nnx.Rngs(1))
    nnx.update(network, model.state["params"], model.state["variables"])
    batch = {"images": images[:, None], "mask": np.zeros(images.shape[:3], np.uint8)}
    keys = jax.random.split(jax.random.key(0), len(images))
    apply = get_task("segmentation").apply
    output = nnx.jit(lambda network: apply(network, batch, keys, None, model.config, train=False))(
        network
    )
    # cross-entropy with an empty mask
    against_nothing = -np.log1p(-found.astype(np.float64)).mean(axis=(1, 2))
    np.testing.assert_allclose(output.scores["binary_cross_entropy"], against_nothing, rtol=2e-5)
    assert np.ptp(against_nothing) > 1e-3  # slices that are alike would show nothing
    np.testing.assert_array_equal(
        np.count_nonzero(found > 0.5, axis=(1, 2)), output.scores["predicted_px"]
    )


def test_a_scan_without_findings(runs, scan, tmp_path, monkeypatch):
    made_certain(monkeypatch, np.s_[0:0, :, :])
    result = predict_scan(runs / "nodules", scan, tmp_path / "out")
    assert (result["num_regions"], result["volume_ml"], result["regions"]) == (0, 0, [])
    assert not np.asarray(nibabel.load(tmp_path / "out" / "mask.nii.gz").dataobj).any()


def test_without_highdicom_the_rest_is_written(runs, scan, tmp_path, monkeypatch):
    monkeypatch.setattr(mask_prediction, "can_write_dicom_seg", lambda: False)
    result = predict_scan(runs / "nodules", scan, tmp_path / "out")
    (note,) = result["notes"]
    assert "pip install 'highdicom" in note and "mask.nii.gz" in result["files"]
    with pytest.raises(
        InputError,
        match="--dicom_seg needs highdicom: pip install 'highdicom",
    ):
        predict_scan(runs / "nodules", scan, tmp_path / "other", dicom_seg=True)


@pytest.mark.parametrize("name", ["lidc_0001", "lidc_0003.zip"])
def test_real_scans(runs, real_data, tmp_path, monkeypatch, name):
    pytest.importorskip("highdicom")
    made_certain(monkeypatch, np.s_[40:50, 10:16, 20:27])
    read, taken = scans.read_scan, []
    monkeypatch.setattr(
        prediction, "read_scan", lambda *given: taken.append(read(*given)) or taken[0]
    )
    predict_scan(runs / "nodules", real_data / name, tmp_path / "out")
    volume = taken[0].volume
    image = nibabel.load(tmp_path / "out" / "mask.nii.gz")
    mask = np.asarray(image.dataobj)
    headers = [header for header in volume.headers if header.frame == 0]
    assert image.shape == (512, 512, len(headers))
    for k in (0, 17, len(headers) - 1):
        found = image.affine @ [0, 0, k, 1]
        np.testing.assert_allclose(found[:3] * [-1, -1, 1], headers[k].position, atol=0.01)
    np.testing.assert_allclose(
        nibabel.affines.voxel_sizes(image.affine)[:2], volume.pixel_spacing_mm, atol=1e-6
    )
    assert np.flatnonzero(mask.any(axis=(0, 1))).tolist() == list(range(40, 50))
    columns, rows = np.nonzero(mask[:, :, 45])
    np.testing.assert_allclose(
        [rows.min(), rows.max() + 1, columns.min(), columns.max() + 1], [160, 256, 320, 432]
    )
    for written in ("mask.nii.gz", "segmentation.dcm"):
        np.testing.assert_array_equal(
            read_mask(tmp_path / "out" / written, volume).transpose(2, 1, 0), mask
        )


def test_a_real_nifti_scan(runs, real_data, tmp_path):
    path = real_data / "nifti" / "example_ct.nii.gz"
    result = predict_scan(runs / "nodules", path, tmp_path / "out", rules=Rules(require_lung=False))
    scan_image, image = nibabel.load(path), nibabel.load(tmp_path / "out" / "mask.nii.gz")
    assert image.shape == scan_image.shape
    np.testing.assert_allclose(image.affine, scan_image.affine, atol=1e-5)
    assert "segmentation.dcm" not in result["files"]
    with pytest.raises(InputError, match=r"--dicom_seg: .* --input is NIfTI"):
        predict_scan(
            runs / "nodules",
            path,
            tmp_path / "out",
            rules=Rules(require_lung=False),
            dicom_seg=True,
        )


# ---- labels --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exams(tmp_path_factory):
    """A phantom RSNA archive, its dataset, and a run of each label recipe on it."""
    folder = tmp_path_factory.mktemp("rsna")
    make_archive(folder / "archive", 3, Options(5, 64, 20, 0.0, "rsna_pe"))
    options = ["--archive=rsna_pe", "--image_size=32", "--splits=0.34,0.33,0.33", "--num_workers=1"]
    prepared = subprocess.run(
        [
            *(sys.executable, "-m", "data_prep.prepare", *options),
            *(f"--input_dir={folder / 'archive'}", f"--output_dir={folder / 'dataset'}"),
        ],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert prepared.returncode == 0, prepared.stderr
    sizes = {"image_size": 32, "windows": ((100, 700),)}
    make_run(tiny_recipe(folder / "dataset", "pe", **sizes), folder / "pe")
    narrow = {"model__width": 4, "model__groups": 2, "model__layers": (1, 1, 1, 1)}
    make_run(
        tiny_recipe(folder / "dataset", "pe_se_resnext", **sizes, **narrow),
        folder / "pe_se_resnext",
    )
    return folder


@pytest.mark.parametrize("recipe", ["pe", "pe_se_resnext"])
def test_a_scan_is_told_what_evaluation_told_its_dataset(exams, tmp_path, recipe):
    """The second model sees three adjacent slices, cropped to the lungs and stretched."""
    evaluated = evaluate(exams / recipe, None, "test", tmp_path / "result.json", checkpoint="2")
    of_dataset = predictions.read(tmp_path / "result.json")
    assert np.ptp(of_dataset.probabilities[:, 1]) > 1e-3  # slices that are alike would show nothing
    plan = scans.plan_scans(exams / "archive")
    key = pseudonyms.read_key(exams / "dataset-audit" / "pseudonym_key")
    (index,) = [
        i for i, exam in enumerate(plan.exams) if volume_id(key, exam[0]) == of_dataset.volume_id[0]
    ]
    evaluated["thresholds"] = {
        "slice": float(np.median(of_dataset.probabilities[:, 1])),
        "exam": 0.999,
    }
    (tmp_path / "result.json").write_text(json.dumps(evaluated))
    result = predict_scan(
        exams / recipe,
        exams / "archive",
        tmp_path / "out",
        checkpoint="2",
        series_index=index,
        evaluation=tmp_path / "result.json",
    )
    with open(tmp_path / "out" / "slices.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["slice_index", "position_mm", "probability_0", "probability_1"]
    assert (
        [int(row["slice_index"]) for row in rows]
        == of_dataset.slice_index.tolist()
        == list(range(20))
    )
    found = np.array([[float(row[f"probability_{k}"]) for k in (0, 1)] for row in rows])
    np.testing.assert_allclose(found, of_dataset.probabilities, atol=2e-6)
    assert np.all(np.diff([float(row["position_mm"]) for row in rows]) > 0)
    positive = of_dataset.probabilities[:, 1]
    exam = result["exam"]
    assert exam["rule"] == "highest slice"
    assert exam["probabilities"]["1"] == pytest.approx(positive.max(), abs=2e-6)
    assert sum(exam["probabilities"].values()) == pytest.approx(1)
    assert result["top_slice"]["slice_index"] == positive.argmax()
    assert exam["threshold"] == 0.999 and exam["positive"] is False
    assert exam["slices_at_or_above_threshold"] == pytest.approx(10, abs=1)
    assert result["synthetic"] and result["windows"] == [{"level": 100, "width": 700}]
    assert result["files"] == ["prediction.json", "prediction.png", "slices.csv"]
    assert "below the threshold" in table(
        result
    ) and "pe_present_on_image (highest slice)" in table(result)


def test_several_volumes_are_never_chosen_in_silence(exams, tmp_path):
    with pytest.raises(
        InputError, match=r"holds 3 CT volumes; choose one by --series_index: 0 \(20 slices of"
    ) as error:
        predict_scan(exams / "pe", exams / "archive", tmp_path / "out")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"--series_index=3: --input holds 3 CT volumes"):
        predict_scan(exams / "pe", exams / "archive", tmp_path / "out", series_index=3)
    assert not (tmp_path / "out").exists()


def test_a_scan_whose_pixels_are_refused_leaves_no_folder(exams, tmp_path):
    datasets = dicom_files.slices(dicom_files.thorax(20))
    for ds in datasets:
        ds.PixelData = ds.PixelData[:-500]
    scan = dicom_files.write(tmp_path / "scan", datasets)
    with pytest.raises(InputError, match="The pixel data ends early"):
        predict_scan(exams / "pe", scan, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_the_choice_of_a_reconstruction_is_told(exams, tmp_path, real_data):
    given = {"rules": Rules(max_slice_thickness_mm=8)}
    result = predict_scan(
        exams / "pe", real_data / "lung_petct_dx_a0002", tmp_path / "out", **given
    )
    (note,) = result["notes"]
    assert "2 reconstructions; the preferred one was taken (30 slices of 8 mm, kernel B40f)" in note
    every = Rules(max_slice_thickness_mm=8, reconstructions="all")
    second = predict_scan(
        exams / "pe",
        real_data / "lung_petct_dx_a0002",
        tmp_path / "out",
        rules=every,
        series_index=1,
    )
    assert second["notes"] == [] and second["scan"]["num_volumes_in_input"] == 2


def test_labels_of_volumes_are_means_over_the_slices_that_were_learned(exams, tmp_path):
    run = shutil.copytree(exams / "pe", tmp_path / "run")
    preparation = json.loads((run / "preparation.json").read_text())
    preparation["labels"]["pe_present_on_image"]["level"] = "volume"
    (run / "preparation.json").write_text(json.dumps(preparation))
    result = predict_scan(run, exams / "archive", tmp_path / "out", series_index=0)
    with open(tmp_path / "out" / "slices.csv", newline="") as file:
        found = [float(row["probability_1"]) for row in csv.DictReader(file)]
    assert result["exam"]["rule"] == "mean over slices"
    assert result["exam"]["probabilities"]["1"] == pytest.approx(np.mean(found), abs=1e-5)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "slices": "middle", "label": "sex"}))
    shutil.rmtree(tmp_path / "out")
    result = predict_scan(run, exams / "archive", tmp_path / "out", series_index=0)
    with open(tmp_path / "out" / "slices.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    middle = loaded_middle(exams / "archive")
    assert int(row["slice_index"]) == middle == result["top_slice"]["slice_index"]
    # 3 patients make no classes
    assert float(row["probability_class_1"]) == pytest.approx(found[middle], abs=1e-5)


def loaded_middle(archive) -> int:
    return loaded(archive, 32).volume.chest.middle_slice


# ---- wrong input ---------------------------------------------------------------------------------


def test_other_runs_are_pointed_elsewhere(runs, scan, tmp_path):
    run = tmp_path / "pretraining"
    run.mkdir()
    config = json.loads((runs / "nodules" / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "task": "denoising"}))
    shutil.copy(runs / "nodules" / "preparation.json", run)
    expected = (
        r"a run of the task denoising; predict takes runs of slice_label, "
        r".*segmentation.*ctssl embed$"
    )
    with pytest.raises(InputError, match=expected):
        predict_scan(run, scan, tmp_path / "out")
    with pytest.raises(InputError, match="is not a run directory"):
        predict_scan(tmp_path, scan, tmp_path / "out")


def test_flags_that_mean_nothing_are_refused(runs, exams, scan, tmp_path):
    for flags, message in (
        ({"evaluation": "x.json"}, "--evaluation: only labels have thresholds"),
        ({"segment_label": "x" * 65}, "--segment_label has 65 characters"),
        ({"checkpoint": "9"}, "has no checkpoint '9'"),
        ({"batch_size": -1}, "--batch_size=-1"),
        ({"rules": Rules(min_slices=50)}, r"22 slices, at least 50 asked.*--min_slices"),
    ):
        with pytest.raises(InputError, match=message):
            predict_scan(runs / "nodules", scan, tmp_path / "out", **flags)
    with pytest.raises(InputError, match="--dicom_seg: the run predicts a label"):
        predict_scan(exams / "pe", scan, tmp_path / "out", dicom_seg=True)
    with pytest.raises(InputError, match="--segment_label: the run predicts a label"):
        predict_scan(exams / "pe", scan, tmp_path / "out", segment_label="nodule")
    assert not (tmp_path / "out").exists()


def test_thresholds_of_other_weights_are_refused(exams, tmp_path):
    path = tmp_path / "result.json"
    right = {
        "label": "pe_present_on_image",
        "thresholds": {"slice": 0.5},
        "model_fingerprint": "0",
        "checkpoint_step": 7,
    }
    for content, message in (
        (json.dumps(right), r"is of other weights \(step 7\) than the checkpoint"),
        (
            json.dumps({**right, "label": "other"}),
            "has no thresholds of the label pe_present_on_image",
        ),
        (json.dumps({"task": "denoising"}), "has no thresholds of the label"),
        ("no JSON", "has no thresholds of the label"),
        ("[]", "has no thresholds of the label"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            predict_scan(
                exams / "pe", exams / "archive", tmp_path / "out", series_index=0, evaluation=path
            )
    same = pretrained.load(exams / "pe").fingerprint
    path.write_text(
        json.dumps(
            {**right, "model_fingerprint": same, "thresholds": {"slice": None, "exam": None}}
        )
    )
    with pytest.raises(
        InputError, match="fixed no threshold: its validation split has one class only"
    ):
        predict_scan(
            exams / "pe", exams / "archive", tmp_path / "out", series_index=0, evaluation=path
        )
    with pytest.raises(InputError, match=r"cannot be read \(No such file"):
        predict_scan(
            exams / "pe",
            exams / "archive",
            tmp_path / "out",
            series_index=0,
            evaluation=tmp_path / "none.json",
        )


def test_the_command_line(exams, tmp_path):
    flags = [
        f"--workdir={exams / 'pe'}",
        f"--input={exams / 'archive'}",
        f"--output={tmp_path / 'out'}",
    ]
    command = [sys.executable, "-m", "ctssl_jax.predict", *flags, "--series_index=1"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "written: prediction.json, prediction.png, slices.csv" in done.stdout
        and "not for diagnosis" in done.stdout
    )


# ---- a folder that grows -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled_once():
    """The watches of these tests are of one run: its program is compiled once."""
    load, make_program = functools.cache(pretrained.load), mask_prediction.slice_program
    program = functools.cache(lambda workdir: make_program(load(workdir)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "load", lambda run, *_, **__: load(run.workdir))
        patch.setattr(mask_prediction, "slice_program", lambda model: program(model.run.workdir))
        yield


@pytest.mark.usefixtures("compiled_once")
def test_a_watched_folder_gets_the_predictions_of_its_scans(runs, scan, tmp_path, capsys):
    """Ended while a folder was half written, each scan has one whole folder, as `predict` fills."""
    growing, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(scan, growing / "first")
    plain = predict_scan(runs / "nodules", scan, tmp_path / "plain", dicom_seg=False)
    request = Request(growing, dicom_seg=False)
    watch = Watch(settle_s=0, idle_exit_s=0.01)

    def ends_with(error):
        def save_picture(*arguments):
            raise error

        return save_picture

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_prediction, "_save_picture", ends_with(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            watch_predictions(runs / "nodules", request, output, watch, num_workers=0)
    assert [path.name for path in output.iterdir()] == ["settings.json"]
    short = dicom_files.slices(dicom_files.thorax(4), study=3, patient="patient-3")
    dicom_files.write(growing / "short", short)
    (growing / "notes.txt").write_text("Doe^Jane")
    for _ in range(2):
        assert watch_predictions(runs / "nodules", request, output, watch, num_workers=0) == 1
    (folder,) = (path for path in output.iterdir() if path.is_dir())
    result = json.loads((folder / "prediction.json").read_text())
    place = {"volume_id": folder.name, "patient_id": result["scan"]["patient_id"]}
    assert result["scan"].items() > place.items() and len(place["patient_id"]) == 32
    for name in plain.keys() - {"scan"}:
        assert result[name] == plain[name], name
    for name in ("mask.nii.gz", "prediction.png"):
        assert (folder / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    printed = capsys.readouterr().out
    assert printed.count("too_few_slices") == 1 and printed.count("1 files not_dicom") == 1
    (growing / "late").mkdir()
    shutil.copyfile(growing / "first" / "IM0003", growing / "late" / "IM0003")
    watch_predictions(runs / "nodules", request, output, watch, num_workers=0)
    printed += capsys.readouterr().out
    assert "LATE         1 files came or changed after their exam was done" in printed
    assert f"remove {folder}/prediction.json, and it is done again" in printed
    for private in ("Doe", "patient-", "IM00", "1.2.826"):
        assert private not in printed
    (folder / "prediction.json").unlink()
    watch_predictions(runs / "nodules", request, output, watch, num_workers=0)
    assert json.loads((folder / "prediction.json").read_text())["scan"]["notes"] != []


@pytest.mark.usefixtures("compiled_once")
def test_a_scan_that_crashes_does_not_end_the_watch(runs, scan, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mask_prediction, "_save_picture", lambda *arguments: 1 / 0)
    watch, request = Watch(settle_s=0, idle_exit_s=0.01), Request(scan, dicom_seg=False)
    for _ in range(2):
        assert not watch_predictions(
            runs / "nodules", request, tmp_path / "out", watch, num_workers=0
        )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["settings.json"]
    printed = capsys.readouterr().out
    assert printed.count("refused ") == 1 and "please report it (ZeroDivisionError)" in printed
