"""The flags of `ctssl prepare`. Imports nothing that takes time: `--help` reads this file."""

from absl import flags


def define_flags() -> None:
    """Only where `ctssl prepare` is the program: another one may define flags of the same names."""
    text, choice, yes = flags.DEFINE_string, flags.DEFINE_enum, flags.DEFINE_bool
    number, whole, repeated = flags.DEFINE_float, flags.DEFINE_integer, flags.DEFINE_multi_string
    choice(
        "archive",
        "dicom",
        ["dicom", "rsna_pe", "lidc_idri", "nifti"],
        "Kind of archive: dicom, nifti = any tree of DICOM or NIfTI files.",
    )
    text(
        "input_dir",
        None,
        "Directory or URL of the scans. With --manifest: what its paths are relative to (default: "
        "the deepest folder that holds them all; give it if the manifest will grow).",
    )
    text("manifest", None, "Text file of URLs or paths, in place of --input_dir, for array jobs.")
    whole("task_index", None, "Take this part of --manifest, from 0.", lower_bound=0)
    whole("task_count", None, "Number of parts of --manifest.", lower_bound=1)
    yes("assemble", False, "Make the dataset of what all tasks of --manifest have staged.")
    text("download_dir", None, "Private scratch of --manifest (default: in the audit directory).")
    yes("remove_downloads", False, "Remove what --manifest downloaded once it is converted.")
    yes("anonymous", True, "Read the stores of --manifest without credentials.")
    text("endpoint_url", "", "Server of the s3:// and gs:// URLs of --manifest.")
    number(
        "read_timeout",
        60.0,
        "Seconds without a byte after which a download of --manifest is tried again.",
        lower_bound=0.1,
    )
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
        "File with the secret key of the pseudonyms (default: made in the audit directory); with "
        "--manifest there must be one.",
    )
    whole("num_workers", None, "Worker processes (default: the usable cores).", lower_bound=1)
    choice(
        "runner",
        "local",
        ["local", "beam", "dask"],
        "Worker processes here, Apache Beam (ctssl_jax[beam]), or Beam on Dask (ctssl_jax[dask]).",
    )
    text("dask_scheduler", None, "Address of a running Dask scheduler, tcp://HOST:PORT.")
    text(
        "beam_options",
        "",
        "Options of Apache Beam, as on a command line: see data_prep.pipeline.beam.",
    )
    yes("dry_run", False, "Read headers only, print the expected result, write nothing.")
