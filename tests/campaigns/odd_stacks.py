"""Odd acquisitions and geometry of sound scans."""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.campaigns.odd_base import AIR_HU, OddScan, Sound, drop, kind, put, set_stored

# ---- acquisitions -----------------------------------------------------------------------------


@kind
def nothing_odd(scan: Sound) -> OddScan:
    return scan.odd(scan.datasets())


@kind
def times_of_each_slice(scan: Sound) -> OddScan:
    """Acquisition and Content Time of each slice, as axial scanning writes them."""
    datasets = scan.datasets()
    step = scan.choice([0.35, 0.5, 1.7])
    put(datasets, "AcquisitionTime", lambda i: _clock(17, i * step))
    put(datasets, "ContentTime", lambda i: _clock(19, i * step))
    put(datasets, "AcquisitionDateTime", lambda i: "20190107" + _clock(17, i * step))
    return scan.odd(datasets)


def _clock(minute: int, seconds: float) -> str:
    """A time of the day (TM), so many seconds behind a minute after ten."""
    return f"10{minute + int(seconds // 60):02d}{seconds % 60:09.6f}"


@kind
def acquisition_numbers_alternate(scan: Sound) -> OddScan:
    """Two detectors or two rows of one rotation, counted 1, 2, 1, 2."""
    datasets = scan.datasets()
    put(datasets, "AcquisitionNumber", lambda i: 1 + i % 2)
    if scan.rng.random() < 0.5:
        put(datasets, "AcquisitionTime", lambda i: f"1017{(i // 2) * 0.5:05.2f}")
    return scan.odd(datasets)


@kind
def acquisition_number_of_each_slice(scan: Sound) -> OddScan:
    datasets = scan.datasets()
    first = scan.choice([0, 1, 301])
    put(datasets, "AcquisitionNumber", lambda i: first + i)
    return scan.odd(datasets)


@kind
def step_and_shoot(scan: Sound) -> OddScan:
    """A block of slices for each position of the table, in either direction."""
    datasets = scan.datasets()
    block, count = scan.choice([2, 4, 8, 16]), len(datasets)
    upwards = scan.rng.random() < 0.5
    order = (lambda i: i // block) if upwards else (lambda i: (count - 1 - i) // block)
    put(datasets, "AcquisitionNumber", lambda i: 1 + order(i))
    put(datasets, "AcquisitionTime", lambda i: _clock(17, 2.4 * order(i)))
    return scan.odd(datasets)


@kind
def acquisition_number_missing(scan: Sound) -> OddScan:
    datasets = scan.datasets()
    if scan.rng.random() < 0.5:
        drop(datasets, "AcquisitionNumber")
    else:
        put(datasets, "AcquisitionNumber", None)
    return scan.odd(datasets)


@kind
def trigger_times(scan: Sound) -> OddScan:
    """A gated scan of one phase: each slice has its own trigger time, the phase is the same."""
    datasets = scan.datasets()
    put(datasets, "TriggerTime", lambda i: f"{430 + 7 * ((i // 4 * 13) % 11)}")
    put(datasets, "NominalPercentageOfCardiacPhase", 75.0)
    put(datasets, "HeartRate", lambda i: str(61 + i // 4 % 5))
    return scan.odd(datasets)


@kind
def temporal_position_of_each_slice(scan: Sound) -> OddScan:
    datasets = scan.datasets()
    put(datasets, "TemporalPositionIdentifier", lambda i: i + 1)
    put(datasets, "NumberOfTemporalPositions", len(datasets))
    return scan.odd(datasets)


@kind
def exposure_of_each_slice(scan: Sound) -> OddScan:
    """Dose modulation, and a tube voltage or thickness written in several ways."""
    datasets = scan.datasets()
    put(datasets, "XRayTubeCurrent", lambda i: str(120 + 11 * (i % 9)))
    put(datasets, "Exposure", lambda i: str(60 + 3 * (i % 9)))
    put(datasets, "SliceThickness", lambda i: f"{scan.thickness_mm:.{3 + i % 3}f}")
    put(datasets, "KVP", lambda i: ("120", "120.0", "120.000")[i % 3])
    return scan.odd(datasets)


@kind
def halves_with_other_elements(scan: Sound) -> OddScan:
    """The upper half has another kernel's spelling, Image Type, or frame of reference: one scan
    whose console wrote on after a pause. Positions run on evenly."""
    datasets = scan.datasets()
    upper = datasets[len(datasets) // 2 :]
    which = int(scan.rng.integers(4))
    if which == 0:
        put(upper, "ImageType", [*scan.vendor.image_type[:3], "OTHER"])
    elif which == 1:
        put(upper, "FrameOfReferenceUID", "")
    elif which == 2:
        put(upper, "AcquisitionTime", "101905.5")
        put(upper, "AcquisitionNumber", 2)
    else:
        put(upper, "StationName", "CT2")
        put(upper, "SoftwareVersions", "other")
    return scan.odd(datasets)


@kind
def two_reconstructions(scan: Sound) -> OddScan:
    """Soft and sharp kernel as two series of one study that share the frame of reference; the soft
    one is the right one."""
    sharp_hu = np.clip(
        scan.hu + scan.rng.integers(-30, 31, scan.hu.shape, dtype=np.int16), AIR_HU, 3000
    )
    sharp = scan.datasets(sharp_hu, series=3)
    put(sharp, "ConvolutionKernel", scan.vendor.sharp_kernels[0])
    put(sharp, "SeriesDescription", "LUNG")
    return scan.odd(scan.datasets() + sharp, scan.right())


@kind
def thin_and_thick_series(scan: Sound) -> OddScan:
    """The thin series is the right one."""
    scan.spacing_mm = scan.thickness_mm = scan.choice([0.625, 1.0, 1.25])
    thick = scan.datasets(
        ((scan.hu[:-1:2].astype(np.int32) + scan.hu[1::2]) // 2).astype(np.int16), series=3
    )
    for i, ds in enumerate(thick):
        scan.place(ds, 2 * i)
    put(thick, "SliceThickness", f"{2 * scan.spacing_mm:g}")
    return scan.odd(scan.datasets() + thick, scan.right())


@kind
def energies_as_series(scan: Sound) -> OddScan:
    """80 and 140 kV of one scan as two series: either may be taken."""
    other = np.clip(
        scan.hu + scan.rng.integers(-12, 13, scan.hu.shape, dtype=np.int16), AIR_HU, 3000
    )
    low, high = scan.datasets(), scan.datasets(other, series=3)
    put(low, "KVP", "80")
    put(high, "KVP", "140")
    put(high, "AcquisitionNumber", 2)
    return scan.odd(low + high, [scan.right(), scan.right(other)])


@kind
def several_studies(scan: Sound) -> OddScan:
    """Two or three studies of one patient: all are taken."""
    files, exams = [], []
    for study in range(1, 2 + int(scan.rng.integers(1, 3))):
        hu = np.clip(
            scan.hu + scan.rng.integers(-9, 10, scan.hu.shape, dtype=np.int16), AIR_HU, 3000
        )
        files += scan.datasets(hu, study=study)
        exams.append(scan.right(hu))
    return scan.odd(files, *exams)


# ---- geometry ---------------------------------------------------------------------------------


@kind
def gantry_tilt(scan: Sound) -> OddScan:
    scan.tilt_degrees = float(scan.choice([-25, -18.5, -7, 4.5, 12, 20]))
    datasets = scan.datasets()
    written = scan.choice([f"{scan.tilt_degrees:g}", f"{-scan.tilt_degrees:g}", "0", ""])
    put(datasets, "GantryDetectorTilt", written)
    return scan.odd(datasets)


@kind
def hrct_gaps(scan: Sound) -> OddScan:
    """Thin slices ten and more times their thickness apart: a sound scan without pairs."""
    scan.thickness_mm, scan.spacing_mm = scan.choice([(1.0, 10.0), (1.25, 20.0), (0.625, 10.0)])
    return scan.odd(scan.datasets(), scan.right(pairs=0))


@kind
def slices_that_overlap(scan: Sound) -> OddScan:
    """Reconstructed at half of the thickness."""
    scan.thickness_mm = scan.choice([1.0, 2.0, 3.0])
    scan.spacing_mm = scan.thickness_mm * scan.choice([0.3, 0.5, 0.6])
    return scan.odd(scan.datasets())


@kind
def orientations(scan: Sound) -> OddScan:
    """All eight ways to store an axial image."""
    scan.orientation = tuple(bool(v) for v in scan.rng.integers(0, 2, 3))
    datasets = scan.datasets()
    put(datasets, "PatientPosition", scan.choice(["HFS", "FFS", "HFP", "FFP", "HFDR", ""]))
    return scan.odd(datasets)


@kind
def feet_first(scan: Sound) -> OddScan:
    scan.orientation = scan.choice([(False, False, True), (False, True, False)])
    datasets = scan.datasets()
    put(datasets, "PatientPosition", "FFS" if scan.orientation[2] else "FFP")
    put(datasets, "InstanceNumber", lambda i: len(datasets) - i)
    return scan.odd(datasets)


@kind
def alternate_slices_turned(scan: Sound) -> OddScan:
    """Every second slice, or some, saved by a viewer turned by 180 degrees or mirrored, with the
    orientation that belongs to it."""
    datasets = scan.datasets()
    other = tuple(a != b for a, b in zip(scan.orientation, (False, True, True), strict=True))
    values = scan.stored(scan.hu)
    for i in range(0, len(datasets), int(scan.choice([2, 3, 7]))):
        scan.place(datasets[i], i, other)
        set_stored(datasets[i], scan.lay(values[i], other))
    return scan.odd(datasets)


@kind
def slightly_rotated(scan: Sound) -> OddScan:
    """A head that lies a little askew: turned within the plane by less than 5 degrees."""
    scan.rotation_degrees = float(scan.choice([-4, -1.5, 0.2, 2, 4.5]))
    return scan.odd(scan.datasets())


@kind
def positions_rounded(scan: Sound) -> OddScan:
    """Positions to a tenth or a hundredth of a millimetre where the step has more digits."""
    scan.spacing_mm = float(scan.choice([0.6875, 0.833333, 1.171875, 1.953125]))
    digits = 1 if scan.spacing_mm > 1.1 else 2
    datasets = scan.datasets()
    for ds in datasets:
        x, y, z = (float(v) for v in ds.ImagePositionPatient)
        ds.ImagePositionPatient = [f"{x:.9g}", f"{y:.9g}", f"{z:.{digits}f}"]
    right = scan.right()
    measured = np.diff([float(ds.ImagePositionPatient[2]) for ds in datasets])
    spacing = float(np.median(measured))
    return scan.odd(datasets, dataclasses.replace(right, spacing_mm=spacing))


@kind
def positions_drift(scan: Sound) -> OddScan:
    """The table sways, or is lowered, by parts of a millimetre from slice to slice."""
    datasets = scan.datasets()
    for i, ds in enumerate(datasets):
        x, y, z = (float(v) for v in ds.ImagePositionPatient)
        x, y = x + 0.2 * np.sin(i), y + 0.01 * i
        ds.ImagePositionPatient = [f"{v:.9g}" for v in (x, y, z)]
    return scan.odd(datasets)


@kind
def pixel_spacing_rounded(scan: Sound) -> OddScan:
    """Pixel Spacing with other digits in some slices, and cosines that are not quite 1 and 0."""
    datasets = scan.datasets()
    for i, ds in enumerate(datasets):
        ds.PixelSpacing = [f"{scan.pixel_mm:.{3 + (i % 3) * 2}f}"] * 2
        across = [float(v) for v in ds.ImageOrientationPatient]
        noise = scan.rng.uniform(-2e-5, 2e-5, 6) * (i % 2)
        ds.ImageOrientationPatient = [f"{v:.6e}" for v in np.array(across) + noise]
    return scan.odd(datasets)


@kind
def a_slice_is_missing(scan: Sound) -> OddScan:
    """One slice was lost in a transfer: no pair crosses the hole."""
    at = int(scan.rng.integers(4, len(scan.hu) - 4))
    datasets = scan.datasets()
    del datasets[at]
    hu = np.delete(scan.hu, at, axis=0)
    return scan.odd(datasets, scan.right(hu, pairs=len(hu) - 2))


@kind
def spacing_tags_wrong(scan: Sound) -> OddScan:
    """Spacing Between Slices and Slice Location contradict the positions, which count."""
    datasets = scan.datasets()
    put(datasets, "SpacingBetweenSlices", scan.choice(["-1.25", "0", "7", ""]))
    put(datasets, "SliceLocation", lambda i: f"{-3.0 * i:g}")
    return scan.odd(datasets)


@kind
def thickness_missing(scan: Sound) -> OddScan:
    datasets = scan.datasets()
    which = int(scan.rng.integers(3))
    if which == 0:
        drop(datasets, "SliceThickness")
    elif which == 1:
        put(datasets, "SliceThickness", None)
    else:
        put(datasets, "SliceThickness", "0")
    return scan.odd(datasets)


@kind
def one_odd_thickness(scan: Sound) -> OddScan:
    """One slice says 5 mm, or nothing, where all others and the steps say another thickness."""
    datasets = scan.datasets()
    at = int(scan.rng.integers(len(datasets)))
    datasets[at].SliceThickness = scan.choice(["5", "10", None])
    return scan.odd(datasets)


@kind
def instance_numbers(scan: Sound) -> OddScan:
    datasets = scan.datasets()
    count = len(datasets)
    numbers = scan.choice([
        lambda i: 1,
        lambda i: None,
        lambda i: count - i,
        lambda i: 1 + i // 2,
        lambda i: 70000 + 3 * i,
        lambda i: (i * 7919) % 1009,
        lambda i: -i,
    ])  # fmt: skip
    put(datasets, "InstanceNumber", numbers)
    return scan.odd(datasets)
