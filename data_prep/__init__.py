"""CT scans: archives -> datasets for training, and raw scans -> prepared volumes.

The names below are the package's face for Python; all else may move. Each is imported when it is
first used.

    >>> from data_prep import Dataset, Refused, Rules, plan_scans, prepare_images, read_scan
    >>> # a folder, a zip file or one file; this reads headers only
    >>> plan = plan_scans("scan", rules=Rules(min_slices=10))
    >>> scan = read_scan(plan.input_dir, plan.exams[0], windows=[(50.0, 350.0)], image_size=64)
    >>> isinstance(scan, Refused)  # then scan.reason and scan.detail say why
    False
    >>> scan.images.shape, scan.images.dtype, scan.volume.hu.shape
    ((21, 64, 64, 1), dtype('uint8'), (21, 56, 58))
    >>> volume = scan.volume
    >>> lung = prepare_images(volume.hu, volume.pixel_spacing_mm, [(-600.0, 1500.0)], image_size=32)
    >>> lung.shape
    (21, 32, 32, 1)
    >>> from data_prep import mask_image  # voxels of a scan -> a mask as `--masks_dir` takes it
    >>> mask_image(volume.hu > 250, volume, plan.input_dir).shape  # NIfTI: columns, rows, slices
    (58, 56, 21)

A directory that `ctssl prepare` wrote:

    >>> dataset = Dataset.open("dataset")
    >>> len(dataset.volumes("train")), dataset.source("train")[0]["image"].shape
    (5, (16, 16, 1))

A file at the top is a command (`ctssl prepare --help`). A folder is a part of the
program; it imports only the folders that stand before it here:

    system      errors, files, object stores, worker processes, the runner of commands
    scan        files -> headers -> series -> volume in HU, or the reason why not
    masks       segmentation masks: read, written, their regions
    dataset     the dataset directory: schema, `Dataset`, writers, cache, merged views
    labels      labels and attributes of an exam, from tables, RSNA-PE and LIDC-IDRI
    privacy     pseudonyms, and the search for what identifies a patient
    raw         one scan -> prepared slices, without a dataset (for inference)
    synthetic   the phantom: a synthetic archive, as DICOM
    pipeline    an archive -> a dataset directory, in steps that can be killed and resumed
"""

from typing import TYPE_CHECKING

from data_prep.system import lazy_names

if TYPE_CHECKING:
    from data_prep.dataset.reader import Dataset
    from data_prep.masks.writing import mask_image
    from data_prep.raw.scans import Refused, Scan, plan_scans, read_scan
    from data_prep.scan.rules import Rules
    from data_prep.scan.window import prepare_images

__all__ = [
    "Dataset",
    "Refused",
    "Rules",
    "Scan",
    "mask_image",
    "plan_scans",
    "prepare_images",
    "read_scan",
]

_HOMES = {
    "Dataset": "data_prep.dataset.reader",
    "Refused": "data_prep.raw.scans",
    "Rules": "data_prep.scan.rules",
    "Scan": "data_prep.raw.scans",
    "mask_image": "data_prep.masks.writing",
    "plan_scans": "data_prep.raw.scans",
    "prepare_images": "data_prep.scan.window",
    "read_scan": "data_prep.raw.scans",
}

__getattr__ = lazy_names.importer(__name__, _HOMES)
