"""Which mask file of a folder is of which scan."""

import re
from pathlib import Path

import pydicom
from pydicom.uid import RTStructureSetStorage, SegmentationStorage, SurfaceSegmentationStorage

from data_prep.masks.dicom_masks import LABEL_MAP_STORAGE, referenced_series
from data_prep.masks.grid import MaskError
from data_prep.scan.elements import read_elements
from data_prep.scan.nifti_metadata import EXTENSION, without_extension
from data_prep.scan.packed_files import PACKED_START, how_packed, is_of_system
from data_prep.scan.reasons import LeftOut

_SUFFIX = re.compile(r"[_-](mask|seg|label)$", re.IGNORECASE)
_READ = {
    SegmentationStorage: "a segmentation",
    LABEL_MAP_STORAGE: "a label map segmentation",
    RTStructureSetStorage: "a structure set",
}
_OTHER_MASKS = (SurfaceSegmentationStorage,)
_TAGS = [  # that tell the series; whether frames have positions
    *(0x00080016, 0x0020000E, 0x00081115, 0x52009230),
    *(0x30060010, 0x30060012, 0x30060014),
]


def index_masks(
    masks_dir: Path, left_out: list[LeftOut] | None = None
) -> dict[str, tuple[Path, ...]]:
    """Mask files below `masks_dir` by the key of their scan, in the order of their paths; files of
    other kinds are skipped.

    The key of a DICOM segmentation or structure set is the Series Instance UID that it refers to.
    The key of a NIfTI file is its name without .nii or .nii.gz and without a last `_mask`, `_seg`
    or `_label`: the name of a NIfTI scan, or a Series Instance UID.

    Args:
        masks_dir: the folder.
        left_out: collects the files that cannot be used, such as damaged ones; None raises.

    Raises:
        MaskError: a file cannot be used.
        OSError: a file cannot be read.
    """
    masks: dict[str, tuple[Path, ...]] = {}
    for path in sorted(path for path in Path(masks_dir).rglob("*") if path.is_file()):
        name = path.relative_to(masks_dir).as_posix()
        found = _key_of(path, name)
        if isinstance(found, str):
            masks[found] = (*masks.get(found, ()), path)
        elif found is not None and left_out is not None:
            left_out.append(found)
        elif found is not None:
            raise MaskError(f"{path}: {found.detail}; leave the file out")
    return masks


def _key_of(path: Path, name: str) -> str | LeftOut | None:
    """The key of a mask file; None for other files."""
    with open(path, "rb") as file:
        start = file.read(PACKED_START)
        file.seek(0)
        if is_of_system(path.name, start):
            return LeftOut(name, "system_file", "a file of the operating system")
        if EXTENSION.search(path.name):
            return _SUFFIX.sub("", without_extension(path.name))
        if kind := how_packed(start):
            return LeftOut(name, "packed", f"{kind}; unpack it first")
        if start[128:132] != b"DICM":
            return None
        try:
            dataset, _ = read_elements(file, path.stat().st_size, _TAGS)
            sop_class = str(dataset.get("SOPClassUID") or dataset.file_meta.MediaStorageSOPClassUID)
            series = referenced_series(dataset) if sop_class in _READ else set()
        except OSError:
            raise
        except Exception as error:  # pydicom raises a dozen kinds on damaged bytes
            return LeftOut(name, "damaged", f"damaged ({type(error).__name__})")
    return _key_of_dataset(dataset, name, sop_class, series)


def _key_of_dataset(
    dataset: pydicom.Dataset, name: str, sop_class: str, series: set[str]
) -> str | LeftOut | None:
    if sop_class in _OTHER_MASKS:
        return LeftOut(name, "other_mask", "a mask of surfaces, which is not read")
    if (kind := _READ.get(sop_class)) is None:
        return None
    if sop_class != RTStructureSetStorage and "PerFrameFunctionalGroupsSequence" not in dataset:
        return LeftOut(name, "damaged", f"{kind} without the positions of its frames")
    if len(series) != 1:
        reason = "of_several_series" if series else "of_no_series"
        return LeftOut(name, reason, f"{kind} that refers to {len(series)} series, not to one")
    return series.pop()
