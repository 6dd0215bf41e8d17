"""Smaller ONNX files: in half precision, and with convolutions in 8-bit integers.

Both are made from the file in float32 and compared with it on slices of a dataset. Half precision
keeps the quantizer in float32. The convolutions in integers are calibrated on training slices; the
quantizer, the projection to latents, heads, squeeze-excitation and transposed convolutions stay in
float32.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ctssl_jax.data.slices import Targets, open_source
from ctssl_jax.evaluation.measured_run import MeasuredRun
from ctssl_jax.release.parity import channels_first
from ctssl_jax.runs.reports import say
from ctssl_jax.runs.run import Run
from ctssl_jax.tasks.slice_label import inputs
from data_prep.system.errors import InputError, RunFailed

FORMATS = {"onnx_fp16": "model_fp16.onnx", "onnx_int8": "model_int8.onnx"}
_IN_FLOAT32 = ("vq_layer", "head", "se")  # modules


def open_dataset(run: Run, dataset: str | Path | None) -> MeasuredRun:
    """The slices that calibrate and measure.

    Raises:
      InputError: no dataset, one without training or validation slices, or one that was prepared
        otherwise than the data of the run.
    """
    if dataset is None and not run.config.dataset:
        raise InputError(
            f"--format={'/'.join(FORMATS)}: these files are calibrated on training slices and "
            "measured on validation slices, and this run names no dataset; give --dataset=DIR, "
            "prepared as the run's data"
        )
    return MeasuredRun.open(run, dataset, ("train", "validation"))


def read_slices(
    measured: MeasuredRun, split: str, offsets: tuple[int, ...], number: int
) -> np.ndarray:
    """Inputs of the model, spread evenly over a split.

    Args:
      measured: the run and the dataset.
      split: of the dataset.
      offsets: slices of one input, relative to each other.
      number: at most so many.

    Returns:
      [number, C, H, W] float32 in [0, 1].
    """
    config = measured.config
    targets = Targets(lung_box=config.get("crop", "none") == "lung_box", repeat_edges=True)
    source = open_source(measured.dataset, split, measured.channels, offsets, targets)
    places = np.linspace(0, len(source) - 1, min(number, len(source))).astype(int)
    return channels_first(np.asarray(inputs(source.read(places), config)))


def write_half(whole: Path, path: Path) -> None:
    """A file of half precision, but for the quantizer; its images and outputs are float32.

    Args:
      whole: the file in float32.
      path: the new file.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(whole)
    kept = [node.name for node in model.graph.node if "vq_layer" in _modules(node)]
    with _without_advice():
        half = convert_float_to_float16(model, keep_io_types=True, node_block_list=kept)
    onnx.save(half, path)


def write_int8(whole: Path, path: Path, images: np.ndarray) -> None:
    """A file whose convolutions are of 8-bit integers: activations unsigned, weights of 7 bits for
    each output channel, so that sums are exact on every processor.

    Args:
      whole: the file in float32.
      path: the new file.
      images: [N, C, H, W] float32 in [0, 1], that set the ranges of the activations.
    """
    import onnx
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.parts: Iterator[dict[str, np.ndarray]] = (
                {"images": images[i : i + 1]} for i in range(len(images))
            )

        def get_next(self):
            return next(self.parts, None)

    nodes = onnx.load(whole, load_external_data=False).graph.node
    convolutions = [node for node in nodes if node.op_type == "Conv"]
    last = max(map(_block, convolutions), default=-1)
    projection = last if last > 2 else None  # the encoder of a U-Net may have three layers alone
    kept = [
        node.name
        for node in convolutions
        if set(_IN_FLOAT32) & set(_modules(node)) or _block(node) == projection
    ]
    with _without_advice():
        quantization.quantize_static(
            whole,
            path,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=kept,
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Without what ONNX Runtime logs of numbers that become 0, and of a file to be prepared, which
    is done."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _modules(node: Any) -> list[str]:
    """The modules around a node, from PyTorch's names: `model.encoder.3` is model, encoder, 3."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            names = [name.strip(" '\"") for name in entry.value.strip("[]").split(",")]
            return max((name for name in names if name.startswith("model")), default="").split(".")
    return []


def _block(node: Any) -> int:
    """Number of the node's layer in the encoder; -1 elsewhere."""
    modules = _modules(node)
    return int(modules[2]) if modules[1:2] == ["encoder"] and modules[2:] else -1


def measure(whole: Path, path: Path, images: np.ndarray) -> dict[str, Any]:
    """How far a smaller file is from the file in float32, slice by slice.

    Args:
      whole: the file in float32.
      path: the smaller file.
      images: [N, C, H, W] float32 in [0, 1], N of 2 or more.

    Returns:
      As `agreement`; `codes_equal` with a codebook; `num_slices`; `bytes_ratio` and `time_ratio`,
      the file's size and its time on this CPU over those in float32.

    Raises:
      RunFailed: a number that is not finite.
    """
    import onnxruntime

    sessions = [
        onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        for file in (whole, path)
    ]
    names = [output.name for output in sessions[0].get_outputs()]
    embeddings: list[list[np.ndarray]] = [[], []]
    times: list[list[float]] = [[], []]
    equal = []
    for i in range(-1, len(images)):  # the first one twice: it warms up
        image, codes = images[max(i, 0)][None], []
        for number, session in enumerate(sessions):
            started = time.perf_counter()
            outputs = dict(zip(names, session.run(names, {"images": image}), strict=True))
            if i >= 0:
                times[number].append(time.perf_counter() - started)
                embeddings[number].append(_embedding(outputs)[0])
            codes.append(outputs.get("codes"))
        if i >= 0 and codes[0] is not None:
            equal.append(np.mean(codes[0] == codes[1]))
    expected, found = map(np.stack, embeddings)
    if not np.isfinite(found).all():
        raise RunFailed(
            f"{path.name} gives numbers that are not finite: the model's values leave the range of "
            "its format; nothing was written. Export without it"
        )
    return {
        "num_slices": len(images),
        **agreement(expected, found),
        **({"codes_equal": float(np.mean(equal))} if equal else {}),
        "bytes_ratio": path.stat().st_size / whole.stat().st_size,
        "time_ratio": float(np.median(times[1]) / np.median(times[0])),
    }


def _embedding(outputs: dict[str, np.ndarray]) -> np.ndarray:
    """[B, D], as `ctssl_torch` and `ctssl_jax.embed` give it."""
    return outputs["embedding"] if "embedding" in outputs else outputs["latents"].mean((2, 3))


def agreement(expected: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """How near embeddings are to those of another precision.

    Args:
      expected: [N, D] float32, N of 2 or more.
      found: [N, D] float32.

    Returns:
      `error`: mean distance of the two embeddings of a slice, over the mean distance of the
      expected embeddings from their centre; `cosine`: the smallest of a slice; `neighbours_equal`:
      share of slices whose nearest other slice (Euclidean) is the same.
    """
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    spread = np.linalg.norm(expected - expected.mean(0), axis=1).mean()
    lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)

    def nearest(vectors: np.ndarray) -> np.ndarray:
        distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
        np.fill_diagonal(distances, np.inf)
        return distances.argmin(1)

    return {
        "error": float(np.linalg.norm(found - expected, axis=1).mean() / max(spread, 1e-12)),
        "cosine": float(((expected * found).sum(1) / np.maximum(lengths, 1e-12)).min()),
        "neighbours_equal": float(np.mean(nearest(expected) == nearest(found))),
    }


def write(
    folder: Path,
    formats: list[str],
    whole: Path,
    measured: MeasuredRun,
    offsets: tuple[int, ...],
    number: int,
) -> dict[str, dict[str, Any]]:
    """Write the smaller files of a folder, and measure them.

    Args:
      folder: where they are written.
      formats: names in `FORMATS`.
      whole: the file in float32.
      measured, offsets, number: as `read_slices`.

    Returns:
      format -> what `measure` returns.
    """
    facts = {}
    validation = read_slices(measured, "validation", offsets, number)
    for name in formats:
        path = folder / FORMATS[name]
        if name == "onnx_fp16":
            write_half(whole, path)
        else:
            write_int8(whole, path, read_slices(measured, "train", offsets, number))
        facts[name] = measure(whole, path, validation)
        say(f"{name:12} {sentence(facts[name])}")
    return facts


def sentence(facts: dict[str, Any]) -> str:
    """What `measure` returned, in words."""
    codes = f", {facts['codes_equal']:.1%} of the codes" if "codes_equal" in facts else ""
    return (
        f"on {facts['num_slices']} validation slices embeddings differ by {facts['error']:.2%} of "
        f"their spread (cosine {facts['cosine']:.5f} or more); equal are "
        f"{facts['neighbours_equal']:.1%} of the nearest slices{codes}; size "
        f"{facts['bytes_ratio']:.2f} and time on a CPU {facts['time_ratio']:.2f} of float32"
    )
