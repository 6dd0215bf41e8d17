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

--manifest=FILE names the scans instead of --input_dir, for array jobs: tasks (--task_index,
--task_count) download and convert, in any order and on any machines that share DATASET and
DATASET-audit, then --assemble makes the dataset that one run would make (see
data_prep.pipeline.manifest and data_prep.pipeline.array). --assemble --dry_run shows how far they
are.

--runner=beam converts and writes the shards under Apache Beam, on many machines if --beam_options
name some, and --runner=dask does so on a cluster of Dask (see data_prep.pipeline.beam). The dataset
is the same to the byte.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from data_prep.pipeline import flags as command_flags
from data_prep.system import command_line, stores

if TYPE_CHECKING:
    from data_prep.labels.lookup import LabelSources
    from data_prep.pipeline.options import Directories, Options

FLAGS = flags.FLAGS
_UPLOAD = "write it to a local disk; upload it: `gcloud storage cp -r`, `aws s3 cp --recursive`"
# without --window; the second window shows pulmonary arteries
_WINDOWS = {"rsna_pe": ["50,350", "100,700"]}


def main(argv: list[str]) -> int:
    from data_prep.labels.lookup import LabelSources
    from data_prep.pipeline import array
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

    array.check_flags(FLAGS)
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
    beam_options = parse_beam_options(FLAGS.runner, FLAGS.beam_options, FLAGS.dask_scheduler)
    names = ("attributes_csv", "metadata_csv", "masks_dir", "annotations_dir")
    paths = {name: _path(name) for name in names}
    tables = tuple(stores.local_path(path, "--labels_csv") for path in FLAGS.labels_csv)
    names = ("require_masks", "consensus", "min_area_px")
    sources = LabelSources(FLAGS.archive, tables, **paths, **{n: FLAGS[n].value for n in names})
    output_dir = stores.local_path(FLAGS.output_dir, "--output_dir", _UPLOAD)
    audit_dir = _path("audit_dir", "choose a directory here") or default_audit_dir(output_dir)
    input_dir = None if FLAGS.manifest else archive_directory(FLAGS.input_dir)
    directories = Directories(input_dir, output_dir, audit_dir)
    known = [stores.local_path(path, "--same_splits_as") for path in FLAGS.same_splits_as if path]
    shared = {"sources": sources, "num_workers": FLAGS.num_workers, "same_splits_as": known}
    if FLAGS.manifest:
        return _run_array(options, directories, **shared)
    if FLAGS.dry_run:
        print_dry_run(lambda: dry_run(options, directories, **shared))
        return 0
    shared["pseudonym_key_file"] = _path("pseudonym_key_file")
    prepared, changed = prepare(options, directories, beam_options=beam_options, **shared)
    print(dataset_text(prepared, changed, output_dir, audit_dir))
    command_line.suggest("describe", f"--dataset={output_dir}", "--verify")
    return 0


def _run_array(
    options: "Options",
    directories: "Directories",
    *,
    sources: "LabelSources",
    num_workers: int | None,
    same_splits_as: list[Path],
) -> int:
    """With --manifest: a task, or --assemble, or with --dry_run how far the tasks are."""
    from data_prep.pipeline import array
    from data_prep.pipeline.accounting import dataset_text
    from data_prep.pipeline.downloads import Downloads
    from data_prep.pipeline.manifest import read_manifest

    folder = _path("download_dir") or directories.audit_dir / "downloads"
    access = stores.Access(FLAGS.anonymous, FLAGS.endpoint_url, FLAGS.read_timeout)
    job = array.Array(
        manifest=read_manifest(_path("manifest"), FLAGS.input_dir),
        options=options,
        directories=directories,
        sources=sources,
        downloads=Downloads(folder, access, FLAGS.remove_downloads),
        pseudonym_key_file=_path("pseudonym_key_file"),
    )
    if FLAGS.dry_run:
        print(array.progress_text(job))
        return 0
    if not FLAGS.assemble:
        index, count = FLAGS.task_index, FLAGS.task_count
        number, before = array.run_task(job, index, count, num_workers)
        print(f"task {index} of {count}: {number} entries are staged, {before} of them before")
        return 0
    prepared, changed, failed = array.assemble(
        job,
        task_count=FLAGS.task_count,
        num_workers=num_workers,
        same_splits_as=same_splits_as,
    )
    print(dataset_text(prepared, changed, directories.output_dir, directories.audit_dir))
    print(array.failed_text(failed), end="")
    command_line.suggest("describe", f"--dataset={directories.output_dir}", "--verify")
    return 0


def _path(flag: str, remedy: str = "give a local copy") -> Path | None:
    text = FLAGS[flag].value
    return stores.local_path(text, f"--{flag}", remedy) if text else None


if __name__ == "__main__":
    command_flags.define_flags()
    command_line.run(main)
