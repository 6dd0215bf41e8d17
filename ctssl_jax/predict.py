r"""Predict a label or a mask of one scan with a fine-tuned model.

    ctssl predict --workdir=RUN --input=SCAN --output=DIR

SCAN is one CT volume: a folder, a zip file or a file, DICOM or NIfTI. RUN is a run of a label or a
segmentation recipe, such as `pe` and `nodules`. DIR gets prediction.json, written
last, and prediction.png. A label adds

    slices.csv        slice_index (0 is the lowest), position_mm along the slice normal, and the
                      probability of each class

A segmentation adds, in the geometry of the scan,

    mask.nii.gz       0 and 1; for NIfTI on the voxels of the scan, for DICOM placed by Image
                      Position (Patient)
    segmentation.dcm  DICOM segmentation for the PACS (DICOM scans; needs
                      `pip install '.[dicom-seg]'`)

segmentation.dcm carries the name, the identifiers and the dates of the patient, since it is filed
with the scan; --dicom_seg=false leaves it out. The other files do not name the patient. Research
software: nothing here is cleared for diagnosis.

With --watch SCAN is a folder that grows. Each exam is predicted once, when its files have stopped
coming (--settle_s), into DIR/PSEUDONYM; DIR-audit/predictions.jsonl has the files of each.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

from absl import flags

from ctssl_jax.inference import scan_flags
from data_prep.system import command_line
from data_prep.system.errors import InputError


def define_flags() -> None:
    """Only where this module is the program: others define flags of the same names."""
    flags.DEFINE_string(
        "workdir",
        None,
        "Run (or export) of a label or a segmentation recipe: directory, zip, hf-hub:ORG/NAME.",
    )
    flags.DEFINE_string("input", None, "The scan: a folder, zip file or file, DICOM or NIfTI.")
    flags.DEFINE_string(
        "output", None, "Folder of the results; results of an earlier scan are replaced."
    )
    flags.DEFINE_string(
        "checkpoint", "best", "best (by config.best_by), last, last_good (undamaged), or a step."
    )
    flags.DEFINE_string(
        "evaluation",
        None,
        "RESULT.json of ctssl_jax.evaluate of these weights: its thresholds are applied.",
    )
    flags.DEFINE_string(
        "segment_label",
        "",
        "Name of the segment in segmentation.dcm (default: nodule or foreground).",
    )
    flags.DEFINE_integer("series_index", None, "Which volume, where --input holds several.")
    flags.DEFINE_bool(
        "dicom_seg",
        None,
        "Write segmentation.dcm, which carries the patient's identity (default: where highdicom is "
        "installed).",
    )
    flags.DEFINE_integer("batch_size", 0, "Slices at a time at most; 0 chooses. Changes no result.")
    flags.DEFINE_string(
        "pseudonym_key_file",
        None,
        "With --watch: file with the key of the pseudonyms (default: made in DIR-audit).",
    )
    flags.DEFINE_integer(
        "num_workers",
        None,
        "With --watch: processes that decode scans (default: the usable cores, at most 4).",
        lower_bound=0,
    )
    scan_flags.define()
    scan_flags.define_watch()


def start(flag_values: flags.FlagValues) -> None:
    """Predict as the flags ask, in this process."""
    for name in ("workdir", "input", "output"):
        if not flag_values[name].value:
            raise InputError(f"give --{name}")
    only = ("pseudonym_key_file", "num_workers")
    scan_flags.check_watch(flag_values, only=only, never=("series_index",))
    from ctssl_jax.parallel.processes import configure_jax

    configure_jax()
    from ctssl_jax.inference.prediction import Request, predict, table
    from ctssl_jax.inference.serving import Watch, watch_predictions
    from ctssl_jax.release.opening import as_run

    request = Request(
        flag_values.input,
        archive=flag_values.archive,
        metadata_csv=flag_values.metadata_csv,
        rules=scan_flags.rules_of(flag_values),
        series_index=flag_values.series_index,
        evaluation=flag_values.evaluation,
        dicom_seg=flag_values.dicom_seg,
        segment_label=flag_values.segment_label,
    )
    run = as_run(flag_values.workdir)
    settings = dict(checkpoint=flag_values.checkpoint, batch_size=flag_values.batch_size)
    if flag_values.watch:
        settings |= {name: flag_values[name].value for name in only}
        watch = Watch(flag_values.settle_s, flag_values.idle_exit_s)
        number = watch_predictions(run, request, flag_values.output, watch, **settings)
        print(
            f"predictions of {number} scans in {flag_values.output}. Research software; not for "
            "diagnosis.",
            flush=True,
        )
        return
    result = predict(run, request, flag_values.output, **settings)
    print(table(result))
    written = f"written: {', '.join(result['files'])} in {flag_values.output}"
    print(f"{written}. Research software; not for diagnosis.", flush=True)
    run, folder = (
        f"--workdir={flag_values.workdir}",
        command_line.beside(flag_values.workdir, "-export"),
    )
    command_line.suggest("export", run, f"--output_dir={folder}", "--license=LICENCE")


def main(argv: list[str]) -> int:
    """Command line."""
    start(flags.FLAGS)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
