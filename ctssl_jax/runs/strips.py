"""Pictures of predictions: strips of input, target, prediction and difference."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_prep.system.files import written_whole

COLUMNS = ("input", "target", "prediction", "difference")
_HEADER = 16


def grey(image: np.ndarray) -> np.ndarray:
    """[H, W, C] float32 in [0, 1] -> [H, W, 3] uint8, of the first channel."""
    values = np.rint(255 * np.clip(image[..., 0], 0, 1)).astype(np.uint8)
    return np.repeat(values[..., None], 3, axis=-1)


def difference(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Signed difference as colour: grey is equal, red too bright, blue too dark; full colour at
    half the window.

    Args:
      prediction: [H, W, C] float32 in [0, 1]; the first channel is shown.
      target: of the same shape.

    Returns:
      [H, W, 3] uint8.
    """
    signed = np.clip(2 * (prediction[..., 0] - target[..., 0]), -1, 1)
    red, blue = np.maximum(signed, 0), np.maximum(-signed, 0)
    channels = np.stack(
        [0.5 + red / 2 - blue / 2, 0.5 - red / 2 - blue / 2, 0.5 + blue / 2 - red / 2], axis=-1
    )
    return np.rint(255 * channels).astype(np.uint8)


def overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A mask in red over a grey slice: [H, W, C] and [H, W, 1] (0 or 1), float32 -> [H, W, 3]
    uint8."""
    share = 0.55 * mask
    return np.rint((1 - share) * grey(image) + share * np.array([255, 40, 25])).astype(np.uint8)


def strip(pictures: dict[str, np.ndarray], label: str = "") -> Image.Image:
    """One row a slice: input | target | prediction | difference.

    Args:
      pictures: `input`, `target`, `prediction`, each [N, H, W, C] float32 in [0, 1]. A segmentation
        adds `target_mask` and `prediction_mask`, [N, H, W, 1]: they are drawn over target and
        prediction, and the difference is between them.
      label: written at the top left, e.g. "SYNTHETIC".
    """
    gap = 2
    number, height, width, _ = pictures["target"].shape
    scale = max(1, 192 // height)
    cell_height, cell_width = height * scale, width * scale
    sheet = Image.new(
        "RGB", (4 * (cell_width + gap) - gap, _HEADER + number * (cell_height + gap) - gap), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(COLUMNS):
        text = f"{name}  {label}" if column == 0 and label else name
        draw.text((column * (cell_width + gap) + 3, 2), text, fill="black")
    for row in range(number):
        cells = [grey(pictures[name][row]) for name in COLUMNS[:3]]
        compared = [pictures[name][row] for name in ("prediction", "target")]
        if "target_mask" in pictures:
            masks = {name: pictures[f"{name}_mask"][row] for name in ("prediction", "target")}
            cells[1:] = [
                overlay(pictures[name][row], masks[name]) for name in ("target", "prediction")
            ]
            compared = list(masks.values())
        cells.append(difference(*compared))
        for column, cell in enumerate(cells):
            image = Image.fromarray(cell).resize(
                (cell_width, cell_height), Image.Resampling.NEAREST
            )
            sheet.paste(image, (column * (cell_width + gap), _HEADER + row * (cell_height + gap)))
    return sheet


def save_arrays(path: Path, pictures: dict[str, np.ndarray]) -> None:
    """Write pictures as a compressed npz: each [N, H, W] uint8, first channel."""
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file, **{name: grey(images)[..., 0] for name, images in pictures.items()}
        )


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The inverse of `save_arrays`: each [N, H, W, 1] float32 in [0, 1]."""
    with np.load(path) as arrays:
        return {name: arrays[name][..., None].astype(np.float32) / 255 for name in arrays.files}


def save_strip(path: Path, pictures: dict[str, np.ndarray], label: str = "") -> None:
    """Write `strip` as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        strip(pictures, label).save(temporary, "PNG")
