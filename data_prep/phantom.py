"""Makes a synthetic archive of chest CT: one folder a patient, genuine DICOM files, no real patient behind them.

    python -m data_prep.phantom --output_dir=DIR --num_patients=24 --seed=0

Patient i of a seed is always the same, whatever the number of patients or workers, so an archive can be continued
after an interruption or grown with a larger `--num_patients` in the same folder. The whole chest, apex to base, takes
about 90 to 160 slices at the spacings of 2 to 3 mm that the scanners use; `--slice_spacing_mm=3` keeps it near 100,
and `--num_slices` takes a random contiguous part of it.

`--layout` decides the folders and what is written down of the findings; patients of different layouts or seeds are
different people:

    dicom       P0000/... as scanners name files. Some patients have lung nodules or pulmonary emboli, without labels.
    rsna_pe     train.csv and train/<study>/<series>/<instance>.dcm as the RSNA STR Pulmonary Embolism data; about half
                of the exams have emboli. Headers have no age, sex and group: they stand in attributes.csv.
    lidc_idri   PHANTOM-0001/<study>/<series>/ with the files and the XML of four readers who outline lung nodules.

With `--num_slices` the part of the chest holds the central pulmonary arteries in rsna_pe, nearly always a nodule in
lidc_idri. Ethnic Group (0010,2160) holds a made-up group (group_a, group_b, group_c) that leaves a faint trace in
muscle and fat, independent of age and sex. `phantom.json` in the folder holds the options.
"""

import dataclasses
import json
import os
from pathlib import Path

from absl import flags
from tqdm import tqdm

from data_prep import phantom_layouts
from data_prep.phantom_exam import LAYOUTS, Options
from data_prep.system import command_line
from data_prep.system.errors import InputError, RunFailed
from data_prep.system.files import PARTIAL, folder_written_whole, write_text
from data_prep.workers import WorkerDied, WorkerPool

OPTIONS_FILE = "phantom.json"

FLAGS = flags.FLAGS


def _finish_patient(output_dir: Path, index: int, options: Options) -> int:
    """Writes one patient under a temporary name, so that a patient's folder is always complete."""
    folder = phantom_layouts.patient_folder(output_dir, index, options)
    with folder_written_whole(folder, output_dir / f".P{index:04d}{PARTIAL}") as temporary:
        return phantom_layouts.write_patient(temporary, output_dir, index, options)


def make_archive(output_dir: Path, num_patients: int, options: Options, num_workers: int = 1) -> int:
    """Writes patients 0..num_patients-1 that are not there yet; returns the number of files written.

    Raises InputError if the folder holds something else or was made with other options, or an option is impossible.
    """
    if num_patients < 1:
        raise InputError(f"--num_patients={num_patients}: at least 1 is needed")
    if not 32 <= options.image_size <= 1024:
        raise InputError(f"--image_size={options.image_size}: choose 32 to 1024")
    if options.num_slices < 0:
        raise InputError(f"--num_slices={options.num_slices}: 0 for the whole chest, or a number of slices")
    if options.slice_spacing_mm != 0 and not 0.5 <= options.slice_spacing_mm <= 10:
        raise InputError(f"--slice_spacing_mm={options.slice_spacing_mm:g}: 0 (the scanner's choice) or 0.5 to 10")
    if options.layout not in LAYOUTS:
        raise InputError(f"--layout={options.layout}: choose {', '.join(LAYOUTS)}")
    if options.seed < 0:
        raise InputError(f"--seed={options.seed}: 0 or larger")
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir={output_dir}: is a file; give a folder")
    output_dir.mkdir(parents=True, exist_ok=True)
    marker = output_dir / OPTIONS_FILE
    recorded = {"synthetic": True, **dataclasses.asdict(options)}
    if marker.exists():
        if json.loads(marker.read_text()) != recorded:
            raise InputError(
                f"--output_dir={output_dir}: holds a phantom archive made with other options; "
                "choose another folder or the options in its phantom.json"
            )
    elif any(output_dir.iterdir()):
        raise InputError(f"--output_dir={output_dir}: is not empty and no phantom archive; choose another folder")
    write_text(marker, json.dumps(recorded, indent=1) + "\n")
    missing = [i for i in range(num_patients) if not phantom_layouts.patient_folder(output_dir, i, options).exists()]
    count = _write_missing(output_dir, missing, options, num_workers)
    phantom_layouts.write_tables(output_dir, options)
    return count


def _write_missing(output_dir: Path, missing: list[int], options: Options, num_workers: int) -> int:
    """Writes the patients of these numbers, in processes if there are more workers than one."""
    if num_workers <= 1:
        return sum(_finish_patient(output_dir, i, options) for i in tqdm(missing, unit="patient"))
    # One thread of linear algebra a worker; the variable is read when a worker starts.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    count, tasks = 0, [(output_dir, i, options) for i in missing]
    with WorkerPool(num_workers) as pool:
        for (_, i, _), written in tqdm(pool.run(_finish_patient, tasks), total=len(tasks), unit="patient"):
            if isinstance(written, WorkerDied):
                raise RunFailed(f"making patient {i} was killed, probably for memory; give a smaller --num_workers")
            count += written
    return count


def main(argv: list[str]) -> None:
    options = Options(FLAGS.seed, FLAGS.image_size, FLAGS.num_slices, FLAGS.slice_spacing_mm, FLAGS.layout)
    count = make_archive(Path(FLAGS.output_dir), FLAGS.num_patients, options, FLAGS.num_workers)
    print(f"{count} files written; {FLAGS.output_dir} holds {FLAGS.num_patients} synthetic patients")


def _define_flags() -> None:
    flags.DEFINE_string("output_dir", None, "Folder of the archive; made, continued or grown.", required=True)
    flags.DEFINE_enum("layout", "dicom", list(LAYOUTS), "Folders and labels: see the top of this module.")
    flags.DEFINE_integer("num_patients", 24, "Number of patients.")
    flags.DEFINE_integer("seed", 0, "Seed of everything.")
    flags.DEFINE_integer("image_size", 512, "Rows and columns of a slice.")
    flags.DEFINE_integer("num_slices", 0, "Slices of a random contiguous part of the chest; 0: apex to base.")
    flags.DEFINE_float("slice_spacing_mm", 0.0, "Slice spacing and thickness; 0: the scanner's choice, at most 3.")
    flags.DEFINE_integer("num_workers", os.cpu_count() or 1, "Processes.")


if __name__ == "__main__":
    _define_flags()
    command_line.run(main)
