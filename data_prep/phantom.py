"""Makes a synthetic archive of chest CT: one folder a patient, genuine DICOM files, no real patient behind them.

    python -m data_prep.phantom --output_dir=DIR --num_patients=24 --seed=0

Patient i of a seed is always the same, whatever the number of patients or workers, so an archive can be continued
after an interruption or grown with a larger `--num_patients` in the same folder. The whole chest, apex to base, takes
about 90 to 160 slices at the spacings of 2 to 3 mm that the scanners use; `--slice_spacing_mm=3` keeps it near 100,
and `--num_slices` takes a random contiguous part of it.
"""

import dataclasses
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from absl import app, flags
from tqdm import tqdm

from data_prep import phantom_anatomy, phantom_dicom, phantom_render

OPTIONS_FILE = "phantom.json"

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides the bytes of a patient's files, beside the patient's number. `num_slices` 0 is the whole chest;
    `slice_spacing_mm` 0 leaves the spacing to the scanner."""

    seed: int
    image_size: int
    num_slices: int
    slice_spacing_mm: float


def write_patient(folder: Path, index: int, options: Options) -> int:
    """Renders patient `index` and writes its series below `folder`, which must not exist; returns the slice count."""
    rng = np.random.default_rng([options.seed, index])
    patient = phantom_anatomy.sample_patient(rng)
    vendor = phantom_dicom.VENDORS[int(rng.integers(len(phantom_dicom.VENDORS)))]
    scan = sample_scan(patient, vendor, options, rng)
    position = str(rng.choice(["HFS", "FFS", "HFP", "FFP"], p=[0.7, 0.17, 0.08, 0.05]))
    scan = dataclasses.replace(scan, prone=position.endswith("P"))
    mirrored = position == "FFS" and rng.random() < 0.4
    study = ("phantom", str(options.seed), str(index))
    reconstructions = ["soft", "sharp"] if rng.random() < 0.2 else [str(rng.choice(["soft", "sharp"], p=[0.8, 0.2]))]
    with_localizer = rng.random() < 0.3
    origin = (*scan.first_voxel_mm, scan.z_mm[0] - round(float(rng.uniform(0, 600)), 1))
    shared = _study_attributes(patient, vendor, scan, study, options, index, rng)
    syntax = phantom_dicom.choose_transfer_syntax(vendor, rng)
    naming = int(rng.integers(len(NAMINGS)))
    anatomy = phantom_anatomy.build_anatomy(patient)
    count = 0
    for number, reconstruction in enumerate(reconstructions, start=2):
        kernels = vendor.soft_kernels if reconstruction == "soft" else vendor.sharp_kernels
        entropy = (*study, reconstruction)
        series = phantom_dicom.Series(
            hu=phantom_render.render_volume(anatomy, dataclasses.replace(scan, kernel=reconstruction), rng),
            position_mm=origin,
            pixel_spacing_mm=scan.pixel_spacing_mm,
            slice_spacing_mm=scan.slice_spacing_mm,
            slice_thickness_mm=scan.slice_thickness_mm,
            outside=phantom_render.outside_field_of_view(scan),
            vendor=vendor,
            transfer_syntax=syntax,
            patient_position=position,
            mirrored=bool(mirrored),
            attributes={
                **shared,
                "ConvolutionKernel": str(rng.choice(kernels)).split("\\"),
                "SeriesInstanceUID": phantom_dicom.series_uid(entropy),
                "SeriesNumber": number,
                "SeriesDescription": f"Chest {scan.slice_thickness_mm:g} {reconstruction}",
            },
            entropy=entropy,
        )
        paths = NAMINGS[naming](folder, number, rng.permutation(len(series.hu)))
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        phantom_dicom.write_series(series, paths)
        count += len(paths)
        if with_localizer and number == 2:
            path = NAMINGS[naming](folder, 1, np.array([0]))[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            phantom_dicom.write_localizer(series, path)
            count += 1
    return count


def sample_scan(
    patient: phantom_anatomy.Patient,
    vendor: phantom_dicom.Vendor,
    options: Options,
    rng: np.random.Generator,
) -> phantom_render.Scan:
    """Slice positions, field of view, contrast and dose of a supine scan with the soft kernel."""
    thickness, spacing = vendor.collimations[int(rng.integers(len(vendor.collimations)))]
    if options.slice_spacing_mm:
        thickness = spacing = options.slice_spacing_mm
    base, apex = patient.chest_extent_mm
    count = int((apex - base) / spacing) + 1
    start = 0
    if options.num_slices and options.num_slices < count:
        # A part stays where the lungs are, as far as it fits there.
        low, high = (int((z - base) / spacing) for z in patient.lung_extent_mm)
        last = max(low, high - options.num_slices)
        start = min(int(rng.integers(low, last + 1)), count - options.num_slices)
        count = options.num_slices
    body_width = patient.body_width_mm
    return phantom_render.Scan(
        image_size=options.image_size,
        field_of_view_mm=round(float(np.clip(body_width * rng.uniform(0.95, 1.08), 300, 480))),
        centre_mm=(float(rng.normal(0, 5)), float(rng.normal(4, 4))),
        z_mm=tuple(round(base + (start + i) * spacing, 3) for i in range(count)),
        slice_spacing_mm=spacing,
        slice_thickness_mm=thickness,
        contrast=str(rng.choice(["none", "pulmonary", "venous"], p=[0.4, 0.35, 0.25])),
        bolus=float(rng.uniform(0.7, 1.3)),
        kernel="soft",
        noise_hu=float(rng.uniform(7, 13)),
        rotation_degrees=float(rng.normal(0, 2.0)),
        circular=vendor.outside is not None,
        prone=False,
        flat_table=vendor.name in ("Philips", "TOSHIBA"),
    )


def _study_attributes(
    patient: phantom_anatomy.Patient,
    vendor: phantom_dicom.Vendor,
    scan: phantom_render.Scan,
    study: tuple[str, ...],
    options: Options,
    index: int,
    rng: np.random.Generator,
) -> dict[str, object]:
    """Patient, study and acquisition attributes, all made up from the seed."""
    year, month, day = 2008 + int(rng.integers(15)), int(rng.integers(1, 13)), int(rng.integers(1, 29))
    date = f"{year:04d}{month:02d}{day:02d}"
    clock = f"{int(rng.integers(7, 20)):02d}{int(rng.integers(60)):02d}{int(rng.integers(60)):02d}"
    attributes = {
        "PatientID": f"PHANTOM-{options.seed}-{index:04d}",
        "PatientName": f"SYNTHETIC^{index:04d}",
        "PatientSex": patient.sex,
        "PatientAge": f"{patient.age:03d}Y",
        "PatientBirthDate": f"{year - patient.age:04d}0101",
        "StudyInstanceUID": phantom_dicom.series_uid((*study, "study")),
        "FrameOfReferenceUID": phantom_dicom.series_uid((*study, "frame of reference")),
        "StudyID": str(int(rng.integers(1, 10000))),
        "StudyDate": date,
        "SeriesDate": date,
        "AcquisitionDate": date,
        "ContentDate": date,
        "StudyTime": clock,
        "SeriesTime": clock,
        "AcquisitionTime": clock,
        "ContentTime": clock,
        "AccessionNumber": f"{int(rng.integers(10**7)):08d}",
        "StudyDescription": "CT CHEST",
        "ReferringPhysicianName": "SYNTHETIC^REFERRER",
        "PositionReferenceIndicator": "",
        "InstitutionName": "SYNTHETIC INSTITUTION",
        "ManufacturerModelName": str(rng.choice(vendor.models)),
        "KVP": int(rng.choice(vendor.tube_voltages)),
        "XRayTubeCurrent": int(rng.integers(80, 400)),
        "ReconstructionDiameter": scan.field_of_view_mm,
        "AcquisitionNumber": 1,
    }
    if scan.contrast != "none":
        attributes["ContrastBolusAgent"] = str(rng.choice(["OMNIPAQUE 350", "Ultravist 370", "IV", "CONTRAST"]))
    return attributes


def _numbered(folder: Path, series: int, order: np.ndarray) -> list[Path]:
    return [folder / "DICOM" / f"SE{series:05d}" / f"IM{number:05d}" for number in order]


def _with_extension(folder: Path, series: int, order: np.ndarray) -> list[Path]:
    return [folder / f"series_{series}" / f"{number + 1:06d}.dcm" for number in order]


def _one_folder(folder: Path, series: int, order: np.ndarray) -> list[Path]:
    return [folder / f"CT.{series}.{number * 7919 % 100003}.img" for number in order]


NAMINGS = (_numbered, _with_extension, _one_folder)


def _finish_patient(output_dir: Path, index: int, options: Options) -> int:
    """Writes one patient under a temporary name, so that a folder `P0000` is always complete."""
    partial = output_dir / f".P{index:04d}.partial"
    if partial.exists():
        for path in sorted(partial.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        partial.rmdir()
    count = write_patient(partial, index, options)
    partial.rename(output_dir / f"P{index:04d}")
    return count


def make_archive(output_dir: Path, num_patients: int, options: Options, num_workers: int = 1) -> int:
    """Writes patients 0..num_patients-1 that are not there yet; returns the number of files written.

    Raises ValueError if the folder holds something else or was made with other options, or an option is impossible.
    """
    if num_patients < 1:
        raise ValueError(f"--num_patients={num_patients}: at least 1 is needed")
    if not 32 <= options.image_size <= 1024:
        raise ValueError(f"--image_size={options.image_size}: choose 32 to 1024")
    if options.num_slices < 0:
        raise ValueError(f"--num_slices={options.num_slices}: 0 for the whole chest, or a number of slices")
    if options.slice_spacing_mm != 0 and not 0.5 <= options.slice_spacing_mm <= 10:
        raise ValueError(f"--slice_spacing_mm={options.slice_spacing_mm:g}: 0 (the scanner's choice) or 0.5 to 10")
    if options.seed < 0:
        raise ValueError(f"--seed={options.seed}: 0 or larger")
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir={output_dir}: is a file; give a folder")
    output_dir.mkdir(parents=True, exist_ok=True)
    marker = output_dir / OPTIONS_FILE
    recorded = {"synthetic": True, **dataclasses.asdict(options)}
    if marker.exists():
        if json.loads(marker.read_text()) != recorded:
            raise ValueError(
                f"--output_dir={output_dir}: holds a phantom archive made with other options; "
                "choose another folder or the options in its phantom.json"
            )
    elif any(output_dir.iterdir()):
        raise ValueError(f"--output_dir={output_dir}: is not empty and no phantom archive; choose another folder")
    marker.write_text(json.dumps(recorded, indent=1) + "\n")
    missing = [i for i in range(num_patients) if not (output_dir / f"P{i:04d}").exists()]
    if num_workers <= 1:
        return sum(_finish_patient(output_dir, i, options) for i in tqdm(missing, unit="patient"))
    # One thread of linear algebra a worker; the variable is read when a worker starts.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_finish_patient, output_dir, i, options) for i in missing]
        return sum(future.result() for future in tqdm(as_completed(futures), total=len(futures), unit="patient"))


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    options = Options(FLAGS.seed, FLAGS.image_size, FLAGS.num_slices, FLAGS.slice_spacing_mm)
    try:
        count = make_archive(Path(FLAGS.output_dir), FLAGS.num_patients, options, FLAGS.num_workers)
    except (ValueError, OSError, BrokenProcessPool) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{count} files written; {FLAGS.output_dir} holds {FLAGS.num_patients} synthetic patients")


def _define_flags() -> None:
    flags.DEFINE_string("output_dir", None, "Folder of the archive; made, continued or grown.", required=True)
    flags.DEFINE_integer("num_patients", 24, "Number of patients.")
    flags.DEFINE_integer("seed", 0, "Seed of everything.")
    flags.DEFINE_integer("image_size", 512, "Rows and columns of a slice.")
    flags.DEFINE_integer("num_slices", 0, "Slices of a random contiguous part of the chest; 0: apex to base.")
    flags.DEFINE_float("slice_spacing_mm", 0.0, "Slice spacing and thickness; 0: the scanner's choice, at most 3.")
    flags.DEFINE_integer("num_workers", os.cpu_count() or 1, "Processes.")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
