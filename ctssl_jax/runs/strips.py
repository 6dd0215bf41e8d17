"""Pictures of predictions, a row a slice: of images input, target, prediction and difference; of
masks their outlines; of classes the truth and the probability of each; or views of an item."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_prep.system.files import written_whole

IMAGES = ("input", "target", "prediction")
_TRUTH, _PREDICTED, _OTHER = (70, 150, 255), (255, 60, 40), (150, 150, 150)
_GAP = 2
_MOST_CLASSES = 8
_CLASSES_WIDTH = 1.5  # of the column of classes, in images


class Legend(NamedTuple):
    """What the arrays of a strip do not say.

    label: written at the top left, e.g. "SYNTHETIC".
    window: level and width of the images in HU; None where each slice is stretched by itself.
    note: a sentence below the strip.
    classified: what the classes are of, such as the name of a label.
    rows: written on the first picture of each row; empty for nothing.
    """

    label: str = ""
    window: tuple[float, float] | None = None
    note: str = ""
    classified: str = "each class"
    rows: tuple[str, ...] = ()


PLAIN = Legend()


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


def outlined(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """The line around a mask, just outside it: [H, W, 3] uint8 and [H, W] bool -> [H, W, 3] uint8.
    What the mask holds stays visible."""
    padded = np.pad(mask, 1)
    around = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return np.where((around & ~mask)[..., None], np.uint8(colour), image)


def strip(pictures: dict[str, np.ndarray], legend: Legend = PLAIN) -> Image.Image:
    """One row a slice.

    Args:
      pictures: `input`, `target`, `prediction`, each [N, H, W, C] float32 in [0, 1]. A segmentation
        adds `target_mask` and `prediction_mask`, [N, H, W, 1]: their outlines are drawn, and the
        difference is between them. A classification has `input` at least, `label` [N] int32,
        `probabilities` [N, K] and `class_names` [K], and no difference. Without `prediction` there
        are any square pictures, by their titles.
      legend: what else is written.
    """
    number, height, width, _ = pictures["input"].shape
    scale = max(1, 192 // height)
    size = width * scale, height * scale
    font = ImageFont.load_default(max(13, size[0] // 18))
    line = int(1.6 * font.size)
    columns, text = _columns(pictures, size, font, legend.classified)
    cells = {title: [cell_of(row) for row in range(number)] for title, cell_of in columns.items()}
    lefts = np.cumsum([0, *(column[0].width + _GAP for column in cells.values())])
    scaled = "difference" in cells and "target_mask" not in pictures
    free = lefts[-2] if scaled else lefts[-1]
    text = " ".join(part for part in (text, legend.note) if part)
    words = textwrap.wrap(text, int(free / (0.56 * font.size)))
    footer = line * max(len(words), 2 * scaled) + 6
    top = 2 * line if legend.label else line
    bottom = top + number * (size[1] + _GAP)
    sheet = Image.new("RGB", (int(lefts[-1]) - _GAP, bottom + footer), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((3, 2), legend.label, fill="black", font=font)
    for left, (title, column) in zip(lefts, cells.items(), strict=False):
        draw.text((left + 3, top - line + 2), title, fill="black", font=font)
        for row, cell in enumerate(column):
            sheet.paste(cell, (int(left), top + row * (size[1] + _GAP)))
    for row, written in enumerate(legend.rows):
        place = 3, top + row * (size[1] + _GAP) + 2
        draw.text(place, written, fill="white", font=font, stroke_width=2, stroke_fill="black")
    draw.text((3, bottom + 2), "\n".join(words), fill="black", font=font, spacing=line // 6)
    if scaled:
        _draw_scale(sheet, (int(lefts[-2]), bottom + 2), size[0], font, legend)
    return sheet


def _columns(
    pictures: dict[str, np.ndarray],
    size: tuple[int, int],
    font: ImageFont.FreeTypeFont,
    classified: str,
) -> tuple[dict[str, Callable[[int], Image.Image]], str]:
    """Title of a column -> row -> its cell; and what the colours mean."""

    def scaled(cell: np.ndarray) -> Image.Image:
        return Image.fromarray(cell).resize(size, Image.Resampling.NEAREST)

    def image(name: str) -> Callable[[int], Image.Image]:
        return lambda row: scaled(grey(pictures[name][row]))

    def outline(name: str, colour: tuple[int, int, int]) -> Callable[[int], Image.Image]:
        return lambda row: Image.fromarray(
            outlined(
                np.asarray(image("input")(row)),
                np.asarray(scaled(grey(pictures[name][row])))[..., 0] > 0,
                colour,
            )
        )

    def compared(prediction: str, target: str) -> Callable[[int], Image.Image]:
        return lambda row: scaled(difference(pictures[prediction][row], pictures[target][row]))

    if "probabilities" in pictures:
        titles = dict(zip(IMAGES, ("input", "original", "undone as predicted"), strict=True))
        images = {titles[name]: image(name) for name in IMAGES if name in pictures}
        text = "Blue: the truth. Red: the most probable class, where it is another."
        return images | {
            f"P of {classified}": lambda row: _classes(pictures, row, size, font)
        }, text
    if "target_mask" in pictures:
        return {
            "input": image("input"),
            "truth": outline("target_mask", _TRUTH),
            "prediction": outline("prediction_mask", _PREDICTED),
            "difference": compared("prediction_mask", "target_mask"),
        }, "Difference: red is in the prediction only, blue in the truth only."
    if "prediction" not in pictures:
        first = ("stored slice", "input")  # the slice itself
        names = sorted(pictures, key=lambda name: first.index(name) if name in first else 2)
        return {name: image(name) for name in names}, ""
    images = {name: image(name) for name in IMAGES}
    text = "Difference: grey is equal, red is too bright, blue too dark."
    return images | {"difference": compared("prediction", "target")}, text


def _classes(
    pictures: dict[str, np.ndarray], row: int, size: tuple[int, int], font: ImageFont.FreeTypeFont
) -> Image.Image:
    """The probability of each class as a bar; of many classes the truth and the most probable."""
    label, values = int(pictures["label"][row]), pictures["probabilities"][row]
    chosen = int(values.argmax())
    ranked = [label, *(k for k in np.argsort(-values, kind="stable").tolist() if k != label)]
    shown = sorted(ranked[:_MOST_CLASSES])
    width, height = int(_CLASSES_WIDTH * size[0]), size[1]
    cell = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(cell)
    pitch = min(height // len(shown), int(2.4 * font.size))
    bar = max(3, min(font.size // 2, pitch - font.size - 4))
    for place, k in enumerate(shown):
        y = place * pitch
        colour = _TRUTH if k == label else _PREDICTED if k == chosen else _OTHER
        words = f"{pictures['class_names'][k]}{', the truth' if k == label else ''}"
        draw.text((6, y + 1), words, fill="black", font=font)
        draw.text((width - 4, y + 1), f"{values[k]:.3f}", fill="black", font=font, anchor="ra")
        y += pitch - bar - 1
        draw.rectangle((6, y, width - 5, y + bar - 1), fill=(235, 235, 235))
        if right := round((width - 11) * float(values[k])):
            draw.rectangle((6, y, 5 + right, y + bar - 1), fill=colour)
    return cell


def _draw_scale(
    sheet: Image.Image,
    corner: tuple[int, int],
    width: int,
    font: ImageFont.FreeTypeFont,
    legend: Legend,
) -> None:
    """The scale of `difference`: in HU if the window is known, else in shares of it."""
    signed = np.broadcast_to(
        np.linspace(-0.5, 0.5, width)[None, :, None], (font.size // 2, width, 1)
    )
    sheet.paste(Image.fromarray(difference(signed, np.zeros_like(signed))), corner)
    left, top = corner[0], corner[1] + font.size // 2 + 1
    ends = ("-0.5", "+0.5")
    if legend.window:
        half = legend.window[1] / 2
        ends = f"-{half:g}", f"+{half:g} HU"
    draw = ImageDraw.Draw(sheet)
    for words, x, anchor in (
        (ends[0], 2, "la"),
        ("0", width // 2, "ma"),
        (ends[1], width - 2, "ra"),
    ):
        draw.text((left + x, top), words, fill="black", font=font, anchor=anchor)


def save_arrays(path: Path, pictures: dict[str, np.ndarray]) -> None:
    """Write pictures as a compressed npz: each [N, H, W] uint8, first channel. `label`,
    `probabilities` and `class_names` stay as they are."""
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            **{
                name: grey(values)[..., 0] if values.ndim == 4 else values
                for name, values in pictures.items()
            },
        )


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The inverse of `save_arrays`: pictures are [N, H, W, 1] float32 in [0, 1]."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    return {
        name: values[..., None].astype(np.float32) / 255 if values.dtype == np.uint8 else values
        for name, values in arrays.items()
    }


def save_strip(path: Path, pictures: dict[str, np.ndarray], legend: Legend = PLAIN) -> None:
    """Write `strip` as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        strip(pictures, legend).save(temporary, "PNG")
