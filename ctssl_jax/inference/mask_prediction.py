"""The mask of one scan in the geometry of the scan, and its regions."""

import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from ctssl_jax.inference.pictures import save_regions
from ctssl_jax.inference.pretrained import PretrainedModel
from ctssl_jax.tasks.interface import item_slices
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training.state import abstract_model
from data_prep.masks import regions as mask_regions
from data_prep.masks import writing
from data_prep.raw.scans import Scan
from data_prep.scan.headers import NIFTI
from data_prep.scan.volume import Volume
from data_prep.scan.window import window_to_uint8
from data_prep.system.extras import pip_install

TASKS = ("segmentation", "segmentation_standard_unet")
THRESHOLD = 0.5  # as `ctssl_jax.evaluate` measures masks
_LISTED_REGIONS = 200  # the largest ones, in prediction.json
_SHOWN = 6
_LUNG_WINDOW = (-600.0, 1500.0)
IDENTITY_NOTE = (
    "segmentation.dcm carries the patient's name and identifiers, as the scan does; the other "
    "files carry none (--dicom_seg=false leaves it out)"
)


def predict_mask(
    model: PretrainedModel,
    scan: Scan,
    slices: np.ndarray,
    input_dir: Path,
    output: Path,
    title: str,
    *,
    dicom_seg: bool | None = None,
    segment_label: str = "",
) -> tuple[dict[str, Any], list[str]]:
    """Write mask.nii.gz, segmentation.dcm and prediction.png.

    Probabilities are resized to the matrix of the scan, and cut at `THRESHOLD` there.

    Args:
      model: of one of `TASKS`.
      scan: prepared with the windows and the image size of the model.
      slices: [S, size, size] of `slice_probabilities`.
      input_dir: of the scan's sources.
      output: folder.
      title: of the picture; the volume is added.
      dicom_seg: whether to write segmentation.dcm; None writes it where this is possible.
      segment_label: Segment Label; "" takes `nodule` for a run on LIDC-IDRI, else `foreground`.

    Returns:
      Fields of prediction.json; and notes: files that could not be written, and the warning that
      segmentation.dcm identifies the patient.
    """
    volume = scan.volume
    probabilities = np.empty(volume.hu.shape, np.float32)
    for values, out in zip(slices, probabilities, strict=True):
        out[:] = writing.resize_back(values, volume.hu.shape[1:], volume.pixel_spacing_mm)
    mask = probabilities > THRESHOLD
    regions = mask_regions.regions_of(mask, probabilities, volume)
    num_voxels = int(np.count_nonzero(mask))
    volume_ml = num_voxels * mask_regions.voxel_ml(volume)
    total = f"{len(regions)} regions, {volume_ml:.2f} ml" if regions else "no foreground"
    _save_picture(
        output / "prediction.png", model, volume, mask, probabilities, regions, f"{title}: {total}"
    )
    prediction = {
        "threshold": THRESHOLD,
        "volume_ml": round(volume_ml, 4),
        "num_foreground_voxels": num_voxels,
        "num_foreground_slices": int(np.count_nonzero(mask.any(axis=(1, 2)))),
        "highest_probability": round(float(probabilities.max()), 6),
        "num_regions": len(regions),
        "regions": regions[:_LISTED_REGIONS],
    }
    notes = []
    try:
        writing.mask_image(mask, volume, input_dir).to_filename(output / "mask.nii.gz")
    except writing.MaskOutputError as error:
        notes.append(f"mask.nii.gz was not written: {error}")
    return prediction, notes + _write_dicom_seg(
        mask, model, volume, input_dir, output, dicom_seg, segment_label
    )


def slice_probabilities(model: PretrainedModel, images: np.ndarray) -> np.ndarray:
    """Probability of foreground: slices [S, size, size, C] uint8 -> [S, size, size] float32."""
    return model.in_batches(slice_program(model), {"images": images})


def slice_program(model: PretrainedModel) -> Callable:
    """The function of `PretrainedModel.in_batches` that computes `slice_probabilities`."""
    graph, *_ = abstract_model(model.config, get_task(model.config.task))

    @jax.jit
    def probabilities(state: dict, batch: dict) -> jax.Array:
        network = nnx.merge(graph, state["params"], state["variables"], copy=True)
        inputs = item_slices(batch["images"], 0, model.config)
        return jax.nn.sigmoid(network(inputs, train=False).logits)

    return probabilities


def can_write_dicom_seg() -> bool:
    """Whether highdicom is installed."""
    return importlib.util.find_spec("highdicom") is not None


def _write_dicom_seg(
    mask: np.ndarray,
    model: PretrainedModel,
    volume: Volume,
    input_dir: Path,
    output: Path,
    dicom_seg: bool | None,
    segment_label: str,
) -> list[str]:
    if dicom_seg is False or (dicom_seg is None and volume.headers[0].transfer_syntax == NIFTI):
        return []
    if not can_write_dicom_seg():
        return [f"segmentation.dcm was not written: it needs highdicom, {pip_install('dicom-seg')}"]
    of_nodules = _of_nodules(model)
    segment = writing.Segment(
        label=segment_label or ("nodule" if of_nodules else "foreground"),
        nodule=of_nodules,
        algorithm="ctssl_jax",
        algorithm_version=version("ctssl_jax"),
        model=model.config.recipe,
        serial_number=model.fingerprint[:16],
    )
    try:
        writing.dicom_segmentation(mask, volume, input_dir, segment).save_as(
            output / "segmentation.dcm"
        )
    except writing.MaskOutputError as error:
        return [f"segmentation.dcm was not written: {error}"]
    return [IDENTITY_NOTE]


def _of_nodules(model: PretrainedModel) -> bool:
    return model.preparation["archive"] == "lidc_idri"


def _save_picture(
    path: Path,
    model: PretrainedModel,
    volume: Volume,
    mask: np.ndarray,
    probabilities: np.ndarray,
    regions: list[dict],
    title: str,
) -> None:
    """The largest regions, each on the slice of its largest area; if there are no regions, the
    slice of the highest probability. Nodules are shown in a lung window."""
    window = _LUNG_WINDOW if _of_nodules(model) else model.windows[0]
    shown = list(dict.fromkeys(region["largest_slice"] for region in regions))[:_SHOWN]
    captions = []
    for k in shown:
        area_mm2 = np.count_nonzero(mask[k]) * float(np.prod(volume.pixel_spacing_mm))
        captions.append(f"slice {k} at {volume.position_mm[k]:.1f} mm: {area_mm2:.0f} mm²")
    if not shown:
        shown = [int(probabilities.max(axis=(1, 2)).argmax())]
        highest = probabilities[shown[0]].max()
        captions = [
            f"slice {shown[0]} at {volume.position_mm[shown[0]]:.1f} mm: highest probability "
            f"{highest:.3f}"
        ]
    save_regions(
        path,
        [window_to_uint8(volume.hu[k], [window])[..., 0] for k in shown],
        [mask[k] for k in shown],
        captions,
        volume.pixel_spacing_mm,
        title=title,
        window=window,
    )
