r"""Voxels of real scans against SimpleITK: every volume that is taken, exact.

    python -m tests.campaigns.simple_itk --archive=SCANS

Reads every volume of DICOM and NIfTI files under SCANS by `data_prep.raw.scans` (any thickness, no
lung asked, all reconstructions), and its slices' files by SimpleITK (GDCM, ITK), orients these and
compares all voxels. Only padding may differ: values below -1500 HU, and declared Pixel Padding,
are air here. Needs the package SimpleITK.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from data_prep.raw.scans import Refused, plan_scans, read_scan
from data_prep.scan.archives import read_bytes
from data_prep.scan.headers import NIFTI
from data_prep.scan.hounsfield import has_rescale
from data_prep.scan.rules import Rules
from data_prep.scan.volume import Volume
from data_prep.system.errors import InputError

RULES = Rules(
    max_slice_thickness_mm=100, min_slices=2, require_lung=False, reconstructions="all",
    max_lost_fraction=0.5,
)  # fmt: skip
AIR_HU, BELOW_ANY_TISSUE_HU = -1000, -1500


def read_by_itk(input_dir: Path, volume: Volume) -> np.ndarray:
    """The volume [S, H, W] float32 as SimpleITK reads its files, in the same orientation."""
    import SimpleITK

    with tempfile.TemporaryDirectory() as folder:
        names = []
        for number, header in enumerate(volume.headers):
            ending = ".nii.gz" if header.source.path.endswith(".gz") else ".nii"
            ending = ending if header.transfer_syntax == NIFTI else ".dcm"
            path = Path(folder) / f"{number:05d}{ending}"
            if header.frame == 0 or header.transfer_syntax != NIFTI:
                path.write_bytes(read_bytes(input_dir, header.source))
            names.append(str(path))
        if volume.headers[0].transfer_syntax == NIFTI:
            (name,) = (name for name in names if Path(name).exists())
            image = SimpleITK.ReadImage(name, SimpleITK.sitkFloat32)
        else:
            # each file by itself, since its series reader needs even spacing
            slices = [SimpleITK.ReadImage(name, SimpleITK.sitkFloat32) for name in names]
            image = SimpleITK.JoinSeries([piece[:, :, 0] for piece in slices])
            across = np.array(slices[0].GetDirection()).reshape(3, 3)
            image.SetDirection(across.ravel().tolist())
            if across[2, 2] < 0:
                image.SetDirection((across * [1, 1, -1]).ravel().tolist())
        return SimpleITK.GetArrayFromImage(SimpleITK.DICOMOrient(image, "LPS"))


def differing(volume: Volume, expected: np.ndarray) -> int:
    """Voxels that differ otherwise than by padding that became air."""
    if expected.shape != volume.hu.shape:
        return volume.hu.size
    differ = volume.hu != expected
    air = (volume.hu == AIR_HU) & (expected < BELOW_ANY_TISSUE_HU)
    for index, header in enumerate(volume.headers):
        if header.padding_value is None or not has_rescale(header):
            continue
        limit = header.padding_value if header.padding_limit is None else header.padding_limit
        bounds = np.array(sorted((header.padding_value, limit)))
        low, high = bounds * header.rescale_slope + header.rescale_intercept
        padded = (expected[index] >= low) & (expected[index] <= high)
        air[index] |= (volume.hu[index] == AIR_HU) & padded
    return int(np.count_nonzero(differ & ~air))


def compare(path: Path, archive: str) -> tuple[int, int, int]:
    """Prints a line for each volume; (volumes, voxels, voxels that differ)."""
    try:
        plan = plan_scans(path, archive, RULES)
    except InputError as error:
        print(f"{path.name}: {error}", flush=True)
        return 0, 0, 0
    volumes = voxels = different = 0
    for exam in plan.exams:
        scan = read_scan(plan.input_dir, exam, ((50.0, 350.0),), 32, RULES)
        if isinstance(scan, Refused):
            print(f"{path.name}: refused {scan.reason} ({scan.detail})", flush=True)
            continue
        count = differing(scan.volume, read_by_itk(plan.input_dir, scan.volume))
        volumes, voxels, different = volumes + 1, voxels + scan.volume.hu.size, different + count
        shape = " x ".join(map(str, scan.volume.hu.shape))
        notes = ", ".join(scan.volume.notes)
        print(f"{path.name}: {shape}, {count} voxels differ; {notes}", flush=True)
    return volumes, voxels, different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--archive", type=Path, required=True, help="folder; it is only read")
    archive = parser.parse_args().archive
    sums = np.zeros(3, np.int64)
    for path in sorted(archive.iterdir()):
        if path.is_dir() or path.suffix == ".zip":
            nifti = path.is_dir() and any(path.glob("*.nii*"))
            sums += compare(path, "nifti" if nifti else "dicom")
    print(f"{sums[0]} volumes, {sums[1]} voxels, {sums[2]} differ")
    return 1 if sums[2] or not sums[0] else 0


if __name__ == "__main__":
    sys.exit(main())
