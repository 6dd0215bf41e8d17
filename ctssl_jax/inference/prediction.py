"""A label or a mask of one scan, by a fine-tuned model: the core of `ctssl_jax.predict`."""

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ctssl_jax.inference import label_prediction, mask_prediction
from ctssl_jax.inference.pretrained import PretrainedModel, load
from ctssl_jax.runs.run import Run
from data_prep.dataset.schema import notes_on_rules
from data_prep.privacy.pseudonyms import public_kernel
from data_prep.raw.scans import (
    Refused,
    Scan,
    ScanPlan,
    nothing_taken,
    plan_scans,
    prepared_volume,
    read_scan,
)
from data_prep.scan.headers import NIFTI
from data_prep.scan.rules import Rules
from data_prep.scan.series import SeriesCandidate
from data_prep.scan.volume import Volume
from data_prep.system.errors import InputError, RunFailed
from data_prep.system.extras import pip_install
from data_prep.system.files import filled_folder, lock_directory, write_json
from data_prep.system.stores import local_path

FILES = ("prediction.json", "prediction.png", "slices.csv", "mask.nii.gz", "segmentation.dcm")
_LISTED_VOLUMES = 8  # in the line that asks for --series_index


@dataclasses.dataclass(frozen=True)
class Request:
    """A scan, and the settings of its prediction.

    Attributes:
      input_path: directory, zip file, DICOM or NIfTI file.
      archive: `dicom`, `nifti` or `auto`.
      metadata_csv: table beside NIfTI files, see `data_prep.scan.nifti_metadata`.
      rules: by which scans are accepted; None takes the defaults of `data_prep.prepare`.
      series_index: of the volume, from 0; None where the input has one volume.
      evaluation: RESULT.json of `ctssl_jax.evaluate` of the same weights, for its thresholds.
      dicom_seg: write segmentation.dcm; None writes it where this is possible.
      segment_label: Segment Label of segmentation.dcm; "" takes `nodule` for a run on LIDC-IDRI,
        else `foreground`.
    """

    input_path: str | Path
    archive: str = "auto"
    metadata_csv: str | Path | None = None
    rules: Rules | None = None
    series_index: int | None = None
    evaluation: str | Path | None = None
    dicom_seg: bool | None = None
    segment_label: str = ""


def predict(
    workdir: str | Path,
    request: Request,
    output: str | Path,
    *,
    checkpoint: str = "best",
    batch_size: int = 0,
) -> dict[str, Any]:
    """Apply a run to one scan and write the prediction into a folder.

    Args:
      workdir: run directory of a label or segmentation recipe.
      request: the scan.
      output: folder of the results; it is made, and results of an earlier call are replaced.
      checkpoint: `best`, `last`, `last_good` or a step.
      batch_size: slices at a time at most; 0 chooses by memory.

    Returns:
      The contents of prediction.json.

    Raises:
      InputError: an unknown run, a run of another task, or an input without a volume or with
        several.
      RunFailed: the results cannot be written.
    """
    output = local_path(output, "--output", "choose a folder here")
    run = open_run(workdir)
    check_request(run.config.task in label_prediction.TASKS, request)
    plan = plan_scans(request.input_path, request.archive, request.rules, request.metadata_csv)
    exam = choose_exam(plan.exams, request.series_index, request.input_path)
    if request.dicom_seg and exam[0].headers[0].transfer_syntax == NIFTI:
        raise InputError(
            "--dicom_seg: a DICOM segmentation refers to a DICOM scan, and --input is NIfTI; leave "
            "it out"
        )
    model = load(run, checkpoint, batch_size=batch_size)
    thresholds = {}
    if request.evaluation:
        thresholds = label_prediction.read_thresholds(
            request.evaluation, run.config, model.fingerprint
        )
    with filled_folder(output, "--output"):
        return _predict_into(output, run, model, plan, exam, request, thresholds)


def _predict_into(
    output: Path,
    run: Run,
    model: PretrainedModel,
    plan: ScanPlan,
    exam: list[SeriesCandidate],
    request: Request,
    thresholds: dict[str, Any],
) -> dict[str, Any]:
    try:
        scan = read_scan(plan.input_dir, exam, model.windows, model.image_size, request.rules)
    except OSError as error:
        raise InputError(
            f"--input={request.input_path} cannot be read any more ({error}); try again"
        ) from None
    if isinstance(scan, Refused):
        raise InputError(nothing_taken(request.input_path, [scan]))
    place = {
        "series_index": request.series_index or 0,
        "num_volumes_in_input": len(plan.exams),
    }
    if run.config.task in label_prediction.TASKS:
        values = model.outputs(prepared_volume(scan))["probabilities"]
    else:
        values = mask_prediction.slice_probabilities(model, scan.images)
    try:
        with lock_directory(output):  # one folder holds the results of one scan
            for name in FILES:  # maybe of another scan
                (output / name).unlink(missing_ok=True)
            return write_prediction(
                output, model, plan.input_dir, exam, scan, values, place, request, thresholds
            )
    except OSError as error:
        raise not_written(output, error) from None


def not_written(output: Path, error: OSError) -> RunFailed:
    """The error for results that cannot be written."""
    return RunFailed(
        f"--output={output} could not be written ({error.strerror or error}); make room or "
        "choose another folder"
    )


def write_prediction(
    output: Path,
    model: PretrainedModel,
    input_dir: Path,
    exam: list[SeriesCandidate],
    scan: Scan,
    values: np.ndarray,
    place: dict[str, Any],
    request: Request,
    thresholds: dict[str, Any],
) -> dict[str, Any]:
    """Write the prediction of one scan into a folder, prediction.json last.

    Args:
      output: folder without earlier results.
      model: of a label or segmentation recipe.
      input_dir: of the scan's sources.
      exam: the candidates of the volume, the preferred one first.
      scan: the volume.
      values: probabilities of its slices, of the classes or of each pixel.
      place: fields of `scan` in prediction.json that name it.
      request: the settings.
      thresholds: of `label_prediction.read_thresholds`.

    Returns:
      The contents of prediction.json.
    """
    config = model.config
    trained_on_synthetic = bool(model.preparation["synthetic"])
    synthetic_scan = scan.volume.headers[0].quality_control_subject
    title = f"{config.recipe}, step {model.step}"
    title += ", trained on SYNTHETIC data" * trained_on_synthetic
    title += ", SYNTHETIC scan" * synthetic_scan
    result = {
        "task": config.task,
        "recipe": config.recipe,
        **model.checkpoint.facts,
        "model_fingerprint": model.fingerprint,
        "windows": [{"level": level, "width": width} for level, width in model.windows],
        "image_size": model.image_size,
        "normalize": config.normalize,
        "synthetic": synthetic_scan,
        "trained_on_synthetic": trained_on_synthetic,
        "scan": {**place, "num_reconstructions": len(exam), **_volume_facts(scan.volume)},
        "versions": {"ctssl_jax": version("ctssl_jax"), "jax": version("jax")},
    }
    notes = _note_choice(exam, scan.volume.candidate)
    notes += notes_on_rules(model.preparation, None)
    if config.task in label_prediction.TASKS:
        result |= label_prediction.predict_label(model, scan, values, thresholds, output, title)
    else:
        prediction, more = mask_prediction.predict_mask(
            model,
            scan,
            values,
            input_dir,
            output,
            title,
            dicom_seg=request.dicom_seg,
            segment_label=request.segment_label,
        )
        result |= prediction
        notes += more
    result["notes"] = notes
    result["files"] = [
        name for name in FILES if name == "prediction.json" or (output / name).exists()
    ]
    write_json(output / "prediction.json", result)
    return result


def open_run(workdir: str | Path) -> Run:
    """A run that predicts a label or a mask.

    Raises:
      InputError: not a run, or a run of a pretraining task.
    """
    run = Run.open(workdir)
    if run.config.task not in label_prediction.TASKS + mask_prediction.TASKS:
        labels, masks = (", ".join(module.TASKS) for module in (label_prediction, mask_prediction))
        raise InputError(
            f"--workdir={workdir} is a run of the task {run.config.task}; predict takes runs of "
            f"{labels} (recipe pe) and {masks} (recipe nodules); for embeddings use "
            "ctssl embed"
        )
    return run


def check_request(predicts_label: bool, request: Request) -> None:
    """Refuse settings that the kind of run has not; raises InputError."""
    if predicts_label and (request.dicom_seg or request.segment_label):
        flag = "--dicom_seg" if request.dicom_seg else "--segment_label"
        raise InputError(f"{flag}: the run predicts a label, not a mask; leave the flag out")
    if request.evaluation and not predicts_label:
        raise InputError(
            "--evaluation: only labels have thresholds, masks are cut at probability .5; leave it "
            "out"
        )
    if request.dicom_seg and not mask_prediction.can_write_dicom_seg():
        raise InputError(
            f"--dicom_seg needs highdicom: {pip_install('dicom-seg')}, or give --dicom_seg=false"
        )
    if len(request.segment_label) > 64:
        raise InputError(
            f"--segment_label has {len(request.segment_label)} characters; DICOM takes up to 64"
        )


def choose_exam(
    exams: list[list[SeriesCandidate]], series_index: int | None, input_path: str | Path
) -> list[SeriesCandidate]:
    """The exam of the request: its reconstructions, the preferred one first.

    Args:
      exams: all exams of the input.
      series_index: the choice of the user; None accepts an input of one exam only.
      input_path: for the message.

    Raises:
      InputError: several without a choice, or a choice that does not exist.
    """
    if series_index is None and len(exams) > 1:
        listed = ", ".join(
            f"{i} ({_in_words(exam[0])})" for i, exam in enumerate(exams[:_LISTED_VOLUMES])
        )
        more = f" and {len(exams) - _LISTED_VOLUMES} more" if len(exams) > _LISTED_VOLUMES else ""
        raise InputError(
            f"--input={input_path} holds {len(exams)} CT volumes; choose one by --series_index: "
            f"{listed}{more}"
        )
    if series_index is not None and not 0 <= series_index < len(exams):
        raise InputError(
            f"--series_index={series_index}: --input holds {len(exams)} CT volumes, counted from 0"
        )
    return exams[series_index or 0]


def _note_choice(exam: list[SeriesCandidate], taken: SeriesCandidate) -> list[str]:
    """The note on the choice of a reconstruction, if there are several."""
    if len(exam) == 1:
        return []
    why = "the preferred one was taken"
    if taken != exam[0]:
        why = "the preferred one was refused, another was taken"
    return [
        f"the exam has {len(exam)} reconstructions; {why} ({_in_words(taken)}), as "
        "data_prep.prepare does; --reconstructions=all with --series_index takes another"
    ]


def _in_words(candidate: SeriesCandidate) -> str:
    kernel = public_kernel(candidate.headers[0].kernel)
    kernel = f", kernel {kernel}" if kernel else ""
    return f"{len(candidate.headers)} slices of {candidate.slice_thickness_mm:g} mm{kernel}"


def _volume_facts(volume: Volume) -> dict[str, Any]:
    """Facts of the volume that do not identify the patient."""
    return {
        "num_slices": len(volume.hu),
        "num_dropped_images": len(volume.dropped),
        "rows": volume.hu.shape[1],
        "columns": volume.hu.shape[2],
        "pixel_spacing_mm": [round(float(value), 6) for value in volume.pixel_spacing_mm],
        "slice_spacing_mm": round(float(volume.slice_spacing_mm), 6),
        "slice_thickness_mm": round(float(volume.slice_thickness_mm), 6),
        "notes": list(volume.notes),
    }


def table(result: dict) -> str:
    """The prediction as lines for the screen."""
    scan = result["scan"]
    synthetic = ", trained on SYNTHETIC data" * result["trained_on_synthetic"]
    lines = [
        f"{result['recipe']}, step {result['checkpoint_step']:,}{synthetic}: {scan['num_slices']} "
        f"slices of {scan['slice_thickness_mm']:g} mm, {scan['rows']} x {scan['columns']}"
    ]
    if "label" in result:
        exam, top = result["exam"], result["top_slice"]
        values = ", ".join(f"{name} {value:.4f}" for name, value in exam["probabilities"].items())
        lines.append(f"{result['label']} ({exam['rule']}): {values}")
        if "threshold" in exam:
            side = "at or above" if exam["positive"] else "below"
            lines.append(f"{side} the threshold {exam['threshold']:.4f}")
        lines.append(f"highest slice: {top['slice_index']} at {top['position_mm']:.1f} mm")
    else:
        lines.append(
            f"{result['num_regions']} regions on {result['num_foreground_slices']} slices, "
            f"{result['volume_ml']:.3f} ml (highest probability "
            f"{result['highest_probability']:.3f})"
        )
        for region in result["regions"][:5]:
            lines.append(
                f"  {region['equivalent_diameter_mm']:.1f} mm, {region['volume_ml']:.3f} ml, "
                f"around slice {region['centre_slice']} at {region['centre_position_mm']:.1f} mm"
            )
    return "\n".join([*lines, *(f"NOTE: {note}" for note in result["notes"])])
