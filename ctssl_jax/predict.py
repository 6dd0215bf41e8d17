r"""What a fine-tuned model says of one scan.

    python -m ctssl_jax.predict --workdir=RUN --input=SCAN --output=DIR

SCAN is a folder, a zip file or a file, DICOM or NIfTI, of one CT volume; RUN is a run of the label or the segmentation
recipes (configs/pe.py, configs/nodules.py and those like them). DIR gets prediction.json, written last, prediction.png,
and of a label

    slices.csv        slice_index (0 is the lowest), position_mm along the slice normal, a probability a class

of a segmentation, in the scan's own geometry,

    mask.nii.gz       0 and 1; of a NIfTI scan voxel for voxel on it, of DICOM placed by Image Position (Patient)
    segmentation.dcm  DICOM segmentation for the PACS (DICOM scans; needs `pip install ctssl_jax[dicom_seg]`)

segmentation.dcm carries the name, the identifiers and the dates of the patient, since it has to be filed with the scan;
--dicom_seg=false leaves it out. The other files hold nothing that names the patient. Research software: nothing here is
cleared for diagnosis.
"""

import functools
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from ctssl_jax import scan_flags
from ctssl_jax.parallel.processes import configure_jax
from data_prep.system import command_line
from data_prep.system.errors import InputError, RunFailed
from data_prep.system.files import make_folder, write_json

if TYPE_CHECKING:
    from data_prep.scan.rules import Rules
    from data_prep.series import SeriesCandidate
    from data_prep.volume import Volume

FILES = ("prediction.json", "prediction.png", "slices.csv", "mask.nii.gz", "segmentation.dcm")
_LISTED_VOLUMES = 8  # in the line that asks for --series_index


def predict(
    workdir: str | Path,
    input_path: str | Path,
    output: str | Path,
    *,
    checkpoint: str = "best",
    archive: str = "auto",
    metadata_csv: str | Path | None = None,
    rules: "Rules | None" = None,
    series_index: int | None = None,
    evaluation: str | Path | None = None,
    dicom_seg: bool | None = None,
    segment_label: str = "",
    batch_size: int = 0,
) -> dict:
    """Apply a run to one scan and write what it says into a folder; results of an earlier call there are replaced.

    Args:
      workdir: run directory of a label or segmentation recipe.
      input_path: directory, zip file, DICOM or NIfTI file.
      output: folder of the results; made.
      checkpoint: `best`, `last` or a step.
      archive: `dicom`, `nifti` or `auto`.
      metadata_csv: table beside NIfTI files, see `data_prep.nifti_metadata`.
      rules: `data_prep.scan.rules.Rules`; None takes the defaults of `data_prep.prepare`.
      series_index: which volume, where the input holds several.
      evaluation: RESULT.json of `ctssl_jax.evaluate` of the same weights, for its thresholds.
      dicom_seg: write segmentation.dcm; None does where it can be done.
      segment_label: Segment Label of segmentation.dcm; "" takes `nodule` for a run on LIDC-IDRI, else `foreground`.
      batch_size: slices at a time; 0 takes the training's.

    Returns:
      The contents of prediction.json.

    Raises:
      InputError: no such run, one of another task, an input that holds no volume or several, or no room to write.
    """
    from ctssl_jax import predict_label, predict_mask, pretrained
    from data_prep.headers import NIFTI
    from data_prep.raw import scans

    # ---- What is asked for, and can it work? ----
    workdir, output = Path(workdir), Path(output)
    config = read_config(workdir)
    of_label = config.task in predict_label.TASKS
    _check_flags(of_label, evaluation, dicom_seg, segment_label)
    plan = scans.plan_scans(input_path, archive, rules, metadata_csv)
    exam = choose_exam(plan.exams, series_index, input_path)
    if dicom_seg and exam[0].headers[0].transfer_syntax == NIFTI:
        raise InputError("--dicom_seg: a DICOM segmentation refers to a DICOM scan, and --input is NIfTI; leave it out")
    model = pretrained.load(workdir, checkpoint, batch_size=batch_size)
    thresholds = predict_label.read_thresholds(evaluation, config, model.fingerprint) if evaluation else {}
    make_folder(output, "--output")

    # ---- The scan ----
    try:
        scan = scans.read_scan(plan.input_dir, exam, model.windows, config.image_size, rules)
    except OSError as error:
        raise InputError(f"--input={input_path} cannot be read any more ({error}); try again") from None
    if isinstance(scan, scans.Refused):
        raise InputError(scans.nothing_taken(input_path, [scan]))
    notes = _note_choice(exam, scan.volume.candidate)
    trained_on_synthetic = bool(model.preparation["synthetic"])
    synthetic_scan = scan.volume.headers[0].quality_control_subject
    title = f"{config.recipe}, step {model.step}{', trained on SYNTHETIC data' * trained_on_synthetic}"
    title += ", SYNTHETIC scan" * synthetic_scan
    result = {
        "task": config.task,
        "recipe": config.recipe,
        "checkpoint_step": model.step,
        "model_fingerprint": model.fingerprint,
        "windows": [{"level": level, "width": width} for level, width in model.windows],
        "image_size": config.image_size,
        "normalize": config.normalize,
        "synthetic": trained_on_synthetic or synthetic_scan,
        "trained_on_synthetic": trained_on_synthetic,
        "scan": _describe(scan.volume, series_index or 0, len(plan.exams), len(exam)),
        "versions": {"ctssl_jax": version("ctssl_jax"), "jax": version("jax")},
    }

    # ---- What the model says of it ----
    try:
        for name in FILES:  # of another scan, maybe
            (output / name).unlink(missing_ok=True)
        if of_label:
            found = predict_label.predict_label(model, scan, thresholds, output, title)
        else:
            settings = {"dicom_seg": dicom_seg, "segment_label": segment_label}
            found, more = predict_mask.predict_mask(model, scan, plan.input_dir, output, title, **settings)
            notes = notes + more
        result |= found | {"notes": notes}
        result["files"] = [name for name in FILES if name == "prediction.json" or (output / name).exists()]
        write_json(output / "prediction.json", result)
    except OSError as error:
        raise RunFailed(
            f"--output={output} could not be written ({error.strerror or error}); make room or choose another folder"
        ) from None
    return result


# ---- the run -----------------------------------------------------------------------------------------------


def read_config(workdir: Path) -> Any:
    """The configuration of a run that predicts a label or a mask.

    Raises:
      InputError: no run, or one of a pretraining task.
    """
    from ctssl_jax import configuration, predict_label, predict_mask

    config, _ = configuration.read_run(workdir)
    if config.task not in predict_label.TASKS + predict_mask.TASKS:
        labels, masks = (", ".join(module.TASKS) for module in (predict_label, predict_mask))
        raise InputError(
            f"--workdir={workdir} is a run of the task {config.task}; predict takes runs of {labels} (configs/pe.py) "
            f"and {masks} (configs/nodules.py); for what another run makes of a scan use ctssl_jax.embed"
        )
    return config


def _check_flags(of_label: bool, evaluation: str | Path | None, dicom_seg: bool | None, segment_label: str) -> None:
    from ctssl_jax.predict_mask import can_write_dicom_seg

    if of_label and (dicom_seg or segment_label):
        flag = "--dicom_seg" if dicom_seg else "--segment_label"
        raise InputError(f"{flag}: the run predicts a label and draws no mask; leave the flag out")
    if evaluation and not of_label:
        raise InputError("--evaluation: only labels have thresholds, masks are cut at probability .5; leave it out")
    if dicom_seg and not can_write_dicom_seg():
        raise InputError("--dicom_seg needs highdicom: pip install ctssl_jax[dicom_seg], or give --dicom_seg=false")
    if len(segment_label) > 64:
        raise InputError(f"--segment_label has {len(segment_label)} characters; DICOM takes up to 64")


# ---- the scan ----------------------------------------------------------------------------------------------


def choose_exam(
    exams: list[list["SeriesCandidate"]], series_index: int | None, input_path: str | Path
) -> list["SeriesCandidate"]:
    """The exam that is asked for: its reconstructions, the preferred one first.

    Args:
      exams: of a plan.
      series_index: the user's choice; None where there has to be only one.
      input_path: for the message.

    Raises:
      InputError: several, and no choice; or no such one.
    """
    if series_index is None and len(exams) > 1:
        listed = ", ".join(f"{i} ({_in_words(exam[0])})" for i, exam in enumerate(exams[:_LISTED_VOLUMES]))
        more = f" and {len(exams) - _LISTED_VOLUMES} more" if len(exams) > _LISTED_VOLUMES else ""
        raise InputError(
            f"--input={input_path} holds {len(exams)} CT volumes; choose one by --series_index: {listed}{more}"
        )
    if series_index is not None and not 0 <= series_index < len(exams):
        raise InputError(f"--series_index={series_index}: --input holds {len(exams)} CT volumes, counted from 0")
    return exams[series_index or 0]


def _note_choice(exam: list["SeriesCandidate"], taken: "SeriesCandidate") -> list[str]:
    """Which reconstruction was taken, where there are several."""
    if len(exam) == 1:
        return []
    why = "the preferred one was taken" if taken == exam[0] else "the preferred one was refused, another was taken"
    return [
        f"the exam has {len(exam)} reconstructions; {why} ({_in_words(taken)}), as data_prep.prepare does; "
        "--reconstructions=all with --series_index takes another"
    ]


def _in_words(candidate: "SeriesCandidate") -> str:
    kernel = f", kernel {candidate.headers[0].kernel}" if candidate.headers[0].kernel else ""
    return f"{len(candidate.headers)} slices of {candidate.slice_thickness_mm:g} mm{kernel}"


def _describe(volume: "Volume", index: int, num_volumes: int, num_reconstructions: int) -> dict:
    """Of the volume what names nobody."""
    return {
        "series_index": index,
        "num_volumes_in_input": num_volumes,
        "num_reconstructions": num_reconstructions,
        "num_slices": len(volume.hu),
        "num_dropped_images": len(volume.dropped),
        "rows": volume.hu.shape[1],
        "columns": volume.hu.shape[2],
        "pixel_spacing_mm": [round(float(value), 6) for value in volume.pixel_spacing_mm],
        "slice_spacing_mm": round(float(volume.slice_spacing_mm), 6),
        "slice_thickness_mm": round(float(volume.slice_thickness_mm), 6),
        "notes": list(volume.notes),
    }


# ---- command line ------------------------------------------------------------------------------------------


def table(result: dict) -> str:
    """The prediction as lines for the screen."""
    scan = result["scan"]
    lines = [
        f"{result['recipe']}, step {result['checkpoint_step']:,}"
        f"{', trained on SYNTHETIC data' * result['trained_on_synthetic']}: "
        f"{scan['num_slices']} slices of {scan['slice_thickness_mm']:g} mm, {scan['rows']} x {scan['columns']}"
    ]
    if "label" in result:
        exam, top = result["exam"], result["top_slice"]
        values = ", ".join(f"{name} {value:.4f}" for name, value in exam["probabilities"].items())
        lines.append(f"{result['label']} ({exam['rule']}): {values}")
        if "threshold" in exam:
            lines.append(f"{'at or above' if exam['positive'] else 'below'} the threshold {exam['threshold']:.4f}")
        lines.append(f"highest slice: {top['slice_index']} at {top['position_mm']:.1f} mm")
    else:
        lines.append(
            f"{result['num_regions']} regions on {result['num_foreground_slices']} slices, {result['volume_ml']:.3f} ml"
            f" (highest probability {result['highest_probability']:.3f})"
        )
        for region in result["regions"][:5]:
            lines.append(
                f"  {region['equivalent_diameter_mm']:.1f} mm, {region['volume_ml']:.3f} ml, around slice "
                f"{region['centre_slice']} at {region['centre_position_mm']:.1f} mm"
            )
    return "\n".join([*lines, *(f"NOTE: {note}" for note in result["notes"])])


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
    """Only where this module is the program: another one may define flags of the same names."""
    text = functools.partial(flags.DEFINE_string, flag_values=given)
    text("workdir", None, "Run directory of ctssl_jax.train, of a label or a segmentation recipe.")
    text("input", None, "The scan: a folder, zip file or file, DICOM or NIfTI.")
    text("output", None, "Folder of the results; those of an earlier scan there are replaced.")
    text("checkpoint", "best", "best (by validation loss), last, last_good (undamaged), or a step.")
    text("evaluation", None, "RESULT.json of ctssl_jax.evaluate of these weights: its thresholds are applied.")
    text("segment_label", "", "Name of the segment in segmentation.dcm (default: nodule or foreground).")
    flags.DEFINE_integer("series_index", None, "Which volume, where --input holds several.", flag_values=given)
    flags.DEFINE_bool(
        "dicom_seg",
        None,
        "Write segmentation.dcm, which carries the patient's identity (default: where highdicom is installed).",
        flag_values=given,
    )
    flags.DEFINE_integer(
        "batch_size", 0, "Slices at a time; 0 takes the training's. Changes no result.", flag_values=given
    )
    scan_flags.define(given)


def main(argv: list[str]) -> int:
    """Command line."""
    given = flags.FLAGS
    for name in ("workdir", "input", "output"):
        if not given[name].value:
            raise InputError(f"give --{name}")
    configure_jax()
    result = predict(
        given.workdir,
        given.input,
        given.output,
        checkpoint=given.checkpoint,
        archive=given.archive,
        metadata_csv=given.metadata_csv,
        rules=scan_flags.rules_of(given),
        series_index=given.series_index,
        evaluation=given.evaluation,
        dicom_seg=given.dicom_seg,
        segment_label=given.segment_label,
        batch_size=given.batch_size,
    )
    print(table(result))
    print(f"written: {', '.join(result['files'])} in {given.output}. Research software; not for diagnosis.", flush=True)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
