r"""Predict a label or a mask of one scan with a fine-tuned model.

    python -m ctssl_jax.predict --workdir=RUN --input=SCAN --output=DIR

SCAN is a folder, a zip file or a file, DICOM or NIfTI, of one CT volume; RUN is a run of the label
or the segmentation recipes (configs/pe.py, configs/nodules.py and those like them). DIR gets
prediction.json, written last, prediction.png, and of a label

    slices.csv        slice_index (0 is the lowest), position_mm along the slice normal, a
    probability a class

of a segmentation, in the scan's own geometry,

    mask.nii.gz       0 and 1; of a NIfTI scan voxel for voxel on it, of DICOM placed by Image
    Position (Patient) segmentation.dcm  DICOM segmentation for the PACS (DICOM scans; needs
    `pip install ctssl_jax[dicom_seg]`)

segmentation.dcm carries the name, the identifiers and the dates of the patient, since it has to be
filed with the scan; --dicom_seg=false leaves it out. The other files hold nothing that names the
patient. Research software: nothing here is cleared for diagnosis.
"""

import functools

from absl import flags

from ctssl_jax.inference import scan_flags
from data_prep.system import command_line
from data_prep.system.errors import InputError


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
    """Only where this module is the program: another one may define flags of the same names."""
    text = functools.partial(flags.DEFINE_string, flag_values=given)
    text("workdir", None, "Run directory of ctssl_jax.train, of a label or a segmentation recipe.")
    text("input", None, "The scan: a folder, zip file or file, DICOM or NIfTI.")
    text("output", None, "Folder of the results; those of an earlier scan there are replaced.")
    text("checkpoint", "best", "best (by validation loss), last, last_good (undamaged), or a step.")
    text(
        "evaluation",
        None,
        "RESULT.json of ctssl_jax.evaluate of these weights: its thresholds are applied.",
    )
    text(
        "segment_label",
        "",
        "Name of the segment in segmentation.dcm (default: nodule or foreground).",
    )
    flags.DEFINE_integer(
        "series_index", None, "Which volume, where --input holds several.", flag_values=given
    )
    flags.DEFINE_bool(
        "dicom_seg",
        None,
        "Write segmentation.dcm, which carries the patient's identity (default: where highdicom is "
        "installed).",
        flag_values=given,
    )
    flags.DEFINE_integer(
        "batch_size",
        0,
        "Slices at a time; 0 takes the training's. Changes no result.",
        flag_values=given,
    )
    scan_flags.define(given)


def start(given: flags.FlagValues) -> bool:
    """Predict as the flags ask, in this process."""
    for name in ("workdir", "input", "output"):
        if not given[name].value:
            raise InputError(f"give --{name}")
    from ctssl_jax.parallel.processes import configure_jax

    configure_jax()
    from ctssl_jax.inference.prediction import Request, predict, table

    request = Request(
        given.input,
        archive=given.archive,
        metadata_csv=given.metadata_csv,
        rules=scan_flags.rules_of(given),
        series_index=given.series_index,
        evaluation=given.evaluation,
        dicom_seg=given.dicom_seg,
        segment_label=given.segment_label,
    )
    result = predict(
        given.workdir,
        request,
        given.output,
        checkpoint=given.checkpoint,
        batch_size=given.batch_size,
    )
    print(table(result))
    print(
        f"written: {', '.join(result['files'])} in {given.output}. Research software; not for "
        "diagnosis.",
        flush=True,
    )
    return True


def main(argv: list[str]) -> int:
    """Command line."""
    start(flags.FLAGS)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
