"""A folder of synthetic patients: made, continued after an interruption, or grown."""

import dataclasses
import json
import os
from pathlib import Path

from tqdm import tqdm

from data_prep.synthetic.exam import FIELDS, LAYOUTS, Options
from data_prep.synthetic.layouts import patient_folder, write_patient, write_tables
from data_prep.system.errors import InputError, RunFailed
from data_prep.system.files import (
    PARTIAL,
    folder_written_whole,
    lock_directory,
    make_folder,
    read_json,
    write_text,
)
from data_prep.system.workers import WorkerDied, WorkerPool

OPTIONS_FILE = "phantom.json"
# numpy's names of what some processors have beyond AVX2, in its release 2.4 and before: with them
# its functions differ in their last bits, and one pixel in a million by a grey value.
_NOT_EVERYWHERE = "X86_V4 AVX512_ICL AVX512_SPR AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL"


def _finish_patient(output_dir: Path, index: int, options: Options) -> int:
    """Writes one patient under a temporary name, so that a patient's folder is always complete."""
    folder = patient_folder(output_dir, index, options)
    with folder_written_whole(folder, output_dir / f".P{index:04d}{PARTIAL}") as temporary:
        return write_patient(temporary, output_dir, index, options)


def make_archive(
    output_dir: Path, num_patients: int, options: Options, num_workers: int = 1
) -> int:
    """Writes the missing patients of 0..num_patients-1; returns the number of files written.

    Raises:
        InputError: an impossible option, a folder with other files, an archive of other options, or
            another process at work in it.
        RunFailed: a worker was killed.
    """
    spacing = options.slice_spacing_mm
    for flag, value, is_possible, remedy in (
        ("num_patients", num_patients, num_patients >= 1, "at least 1 is needed"),
        ("image_size", options.image_size, 32 <= options.image_size <= 1024, "choose 32 to 1024"),
        (
            "num_slices",
            options.num_slices,
            options.num_slices >= 0,
            "0 for the whole chest, or a number of slices",
        ),
        (
            "slice_spacing_mm",
            f"{spacing:g}",
            spacing == 0 or 0.5 <= spacing <= 10,
            "0 (the scanner's choice) or 0.5 to 10",
        ),
        ("layout", options.layout, options.layout in LAYOUTS, f"choose {', '.join(LAYOUTS)}"),
        ("field", options.field, options.field in FIELDS, f"choose {', '.join(FIELDS)}"),
        (
            "min_embolus_mm2",
            f"{options.min_embolus_mm2:g}",
            options.min_embolus_mm2 > 0,
            "a positive number of mm^2",
        ),
        ("seed", options.seed, options.seed >= 0, "0 or larger"),
    ):
        if not is_possible:
            raise InputError(f"--{flag}={value}: {remedy}")
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir={output_dir}: is a file; give a folder")
    make_folder(output_dir, "--output_dir")
    with lock_directory(output_dir):
        return _continue_archive(output_dir, num_patients, options, num_workers)


def _continue_archive(
    output_dir: Path, num_patients: int, options: Options, num_workers: int
) -> int:
    marker = output_dir / OPTIONS_FILE
    recorded = {"synthetic": True, **dataclasses.asdict(options)}
    if marker.exists():
        if read_json(marker) != recorded:
            raise InputError(
                f"--output_dir={output_dir}: holds a phantom archive made with other options; "
                "choose another folder or the options in its phantom.json"
            )
    elif any(output_dir.iterdir()):
        raise InputError(
            f"--output_dir={output_dir}: is not empty and not a phantom archive; choose another "
            "folder"
        )
    write_text(marker, json.dumps(recorded, indent=1) + "\n")
    missing = [
        i for i in range(num_patients) if not patient_folder(output_dir, i, options).exists()
    ]
    count = _write_missing(output_dir, missing, options, num_workers)
    write_tables(output_dir, options)
    return count


def _write_missing(output_dir: Path, missing: list[int], options: Options, num_workers: int) -> int:
    """Writes the patients of these numbers, in processes of their own."""
    # Read when a worker starts. One thread of linear algebra a worker; and the same patients on x86
    # processors with AVX2 and with AVX-512 (OpenBLAS's kernels for both gave equal pixels).
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("NPY_DISABLE_CPU_FEATURES", _NOT_EVERYWHERE)
    count, tasks = 0, [(output_dir, i, options) for i in missing]
    with WorkerPool(max(1, num_workers)) as pool:
        for (_, i, _), written in tqdm(
            pool.run(_finish_patient, tasks), total=len(tasks), unit="patient"
        ):
            if isinstance(written, WorkerDied):
                raise RunFailed(
                    f"making patient {i} was killed, probably for memory; give a smaller "
                    "--num_workers"
                )
            count += written
    return count
