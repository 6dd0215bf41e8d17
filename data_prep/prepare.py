r"""Archive of scans -> dataset directory.

    ctssl prepare --archive=dicom --input_dir=SCANS --output_dir=DATASET

SCANS is any tree of files, on this machine or on a store (gs://BUCKET/DIR with ctssl_jax[gcs],
s3://BUCKET/DIR with ctssl_jax[s3], see data_prep.system.stores). Zip, tar and gzip files are read
in place, on a store those whose names end in .zip, .tar or .gz. Files packed in another way
(.tar.gz, .xz, .7z ...) are named: unpack them first. DATASET is a folder on this machine. One
dataset serves every task.

Killed at any moment, the same command continues, with the same result to the byte. If new scans
have come to SCANS, it adds them. It knows new files by names and sizes, so it does not notice a
file that was replaced by a file of the same size.

DATASET-audit (--audit_dir) stays with the archive's owner: it links the pseudonyms to the scans. It
belongs to this dataset alone. Datasets can share a --pseudonym_key_file: a patient then has the
same pseudonym in each. Each dataset has its own splits, but with --same_splits_as=FIRST[,SECOND]
patients of these datasets keep their split. data_prep.merge makes one dataset of such datasets.

--archive: dicom is any tree of DICOM files. rsna_pe has train.csv beside them, lidc_idri the
readers' XML (among the scans, or in --annotations_dir). nifti is any tree of .nii and .nii.gz
files, with --metadata_csv=FILE (VolumeName and the facts that the files lack, as in CT-RATE: see
data_prep.scan.nifti_metadata). Beside any archive:

    --labels_csv=FILE       a key column (SOPInstanceUID: of a slice; SeriesInstanceUID,
                            StudyInstanceUID or VolumeName: of a volume; PatientID: of a patient)
                            and a column a label (cells: see data_prep.labels.tables)
    --attributes_csv=FILE   PatientID and any of age, sex, ethnic_group, which replace the headers
    --masks_dir=DIR         masks as DICOM-SEG, RTSTRUCT or NIfTI files

--runner=beam converts and writes the shards under Apache Beam, on many machines if --beam_options
name some (see data_prep.pipeline.beam). The dataset is the same to the byte.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

from pathlib import Path

from absl import flags

from data_prep.system import command_line, stores

FLAGS = flags.FLAGS
_UPLOAD = "write it to a local disk; upload it: `gcloud storage cp -r`, `aws s3 cp --recursive`"
# without --window; the second window shows pulmonary arteries
_WINDOWS = {"rsna_pe": ["50,350", "100,700"]}


def main(argv: list[str]) -> int:
    from data_prep.labels.lookup import LabelSources
    from data_prep.pipeline.accounting import dataset_text, print_dry_run
    from data_prep.pipeline.options import (
        Directories,
        Options,
        parse_beam_options,
        parse_megabytes,
        parse_splits,
    )
    from data_prep.pipeline.prepare import dry_run, prepare
    from data_prep.privacy.pseudonyms import default_audit_dir
    from data_prep.scan.remote_archives import archive_directory
    from data_prep.scan.rules import Rules
    from data_prep.scan.window import parse_window

    options = Options(
        archive=FLAGS.archive,
        windows=tuple(
            parse_window(text) for text in FLAGS.window or _WINDOWS.get(FLAGS.archive, ["50,350"])
        ),
        image_size=FLAGS.image_size,
        rules=Rules(
            max_slice_thickness_mm=FLAGS.max_slice_thickness_mm,
            min_slices=FLAGS.min_slices,
            require_lung=FLAGS.require_lung,
            irregular=FLAGS.irregular,
            reconstructions=FLAGS.reconstructions,
        ),
        splits=parse_splits(FLAGS.splits),
        holdout_volumes=FLAGS.holdout_volumes,
        shard_size_mb=parse_megabytes(FLAGS.shard_size_mb),
    )
    beam_options = parse_beam_options(FLAGS.runner, FLAGS.beam_options)
    names = ("attributes_csv", "metadata_csv", "masks_dir", "annotations_dir")
    paths = {name: _path(name) for name in names}
    tables = tuple(stores.local_path(path, "--labels_csv") for path in FLAGS.labels_csv)
    names = ("require_masks", "consensus", "min_area_px")
    sources = LabelSources(FLAGS.archive, tables, **paths, **{n: FLAGS[n].value for n in names})
    output_dir = stores.local_path(FLAGS.output_dir, "--output_dir", _UPLOAD)
    audit_dir = _path("audit_dir", "choose a directory here") or default_audit_dir(output_dir)
    directories = Directories(archive_directory(FLAGS.input_dir), output_dir, audit_dir)
    known = [stores.local_path(path, "--same_splits_as") for path in FLAGS.same_splits_as if path]
    shared = {"sources": sources, "num_workers": FLAGS.num_workers, "same_splits_as": known}
    if FLAGS.dry_run:
        print_dry_run(lambda: dry_run(options, directories, **shared))
        return 0
    shared["pseudonym_key_file"] = _path("pseudonym_key_file")
    prepared, changed = prepare(options, directories, beam_options=beam_options, **shared)
    print(dataset_text(prepared, changed, output_dir, audit_dir))
    command_line.suggest("describe", f"--dataset={output_dir}", "--verify")
    return 0


def _path(flag: str, remedy: str = "give a local copy") -> Path | None:
    text = FLAGS[flag].value
    return stores.local_path(text, f"--{flag}", remedy) if text else None


def define_flags() -> None:
    """Only where this module is the program: another one may define flags of the same names."""
    text, choice, yes = flags.DEFINE_string, flags.DEFINE_enum, flags.DEFINE_bool
    number, whole, repeated = flags.DEFINE_float, flags.DEFINE_integer, flags.DEFINE_multi_string
    choice(
        "archive",
        "dicom",
        ["dicom", "rsna_pe", "lidc_idri", "nifti"],
        "Kind of archive: dicom, nifti = any tree of DICOM or NIfTI files.",
    )
    text("input_dir", None, "Directory or URL of the scans.", required=True)
    text("output_dir", None, "Dataset directory to make, continue or add to.", required=True)
    text(
        "audit_dir", None, "Private directory of keys and source paths (default: OUTPUT_DIR-audit)."
    )
    repeated(
        "window",
        None,
        "Grey-level window as level,width in HU; repeat it for several channels (default: 50,350; "
        "with --archive=rsna_pe 50,350 and 100,700).",
    )
    whole(
        "image_size",
        512,
        "Height and width of the slices in pixels.",
        lower_bound=16,
        upper_bound=4096,
    )
    number("max_slice_thickness_mm", 3.0, "Thicker series are rejected; the limit itself is taken.")
    whole("min_slices", 20, "Series of fewer slices are rejected.", lower_bound=1)
    yes("require_lung", True, "Reject volumes that do not cover the chest.")
    choice("irregular", "keep", ["keep", "refuse"], "Volumes with gaps or uneven spacing.")
    choice(
        "reconstructions",
        "one_per_study",
        ["one_per_study", "all"],
        "Reconstructions to take of an exam.",
    )
    text("splits", "0.8,0.1,0.1", "Fractions of patients for training, validation and test.")
    whole(
        "holdout_volumes",
        0,
        "Test volumes, at most half of all: whole patients nearest to this number; --splits then "
        "divides the rest. 0: go by --splits.",
        lower_bound=0,
    )
    flags.DEFINE_list(
        "same_splits_as", [], "Datasets of the same key: their patients keep their split."
    )
    number("shard_size_mb", 1024.0, "Approximate size of a shard; volumes are never cut.")
    repeated("labels_csv", [], "Table of labels: a key column and a column a label; repeatable.")
    text("attributes_csv", None, "Table of PatientID and any of age, sex, ethnic_group.")
    text(
        "metadata_csv",
        None,
        "Table of VolumeName and the facts that NIfTI files lack (--archive=nifti).",
    )
    text("masks_dir", None, "Directory of masks, DICOM-SEG, RTSTRUCT or NIfTI.")
    yes("require_masks", False, "Reject scans without a mask; else their mask is unknown.")
    text(
        "annotations_dir", None, "XML of lidc_idri: folder or tar file (default: among the scans)."
    )
    number(
        "consensus",
        0.7,
        "Share of a nodule's readers that must have a voxel (--archive=lidc_idri).",
    )
    whole("min_area_px", 20, "Nodules' slices of at most so many pixels are left out (lidc_idri).")
    text(
        "pseudonym_key_file",
        None,
        "File with the secret key of the pseudonyms (default: made in the audit directory).",
    )
    whole("num_workers", None, "Worker processes (default: the usable cores).", lower_bound=1)
    choice(
        "runner",
        "local",
        ["local", "beam"],
        "Worker processes here, or Apache Beam: ctssl_jax[beam].",
    )
    text(
        "beam_options",
        "",
        "Options of Apache Beam, as on a command line: see data_prep.pipeline.beam.",
    )
    yes("dry_run", False, "Read headers only, print the expected result, write nothing.")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
