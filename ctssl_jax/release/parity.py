"""Whether a model in JAX and its twin in PyTorch are the same function, measured layer by layer.

Both run in float32 on the same inputs. Compared are the outputs of the model and of every
convolution, normalisation and linear layer. Each difference is the largest absolute difference over
the largest absolute value of that output. A code may differ only where the two nearest codes are
equally near to within rounding. The decoder is compared on the same codes.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from flax import nnx

from ctssl_jax.models.layers import BatchNorm, Conv, PointwiseConv, TransposedConv
from ctssl_jax.torch_bridge.ctssl_torch import ExportedModel
from ctssl_jax.torch_bridge.names import torch_name

TOLERANCE = 1e-4
# Difference of a latent's squared distances to two codes, over |latent|^2 + |code|^2.
CODE_ROUNDING = 1e-5
_LAYERS = (Conv, nnx.Linear, PointwiseConv, TransposedConv, BatchNorm)


class Parity(NamedTuple):
    """Differences between a model in JAX and its twin.

    stages: PyTorch's name of a layer -> relative difference of its output, in the order of
      computation.
    outputs: output of the model (`latents`, `reconstruction`, `logits`, `embedding`, and for an
      autoencoder `decoder_on_same_codes`) -> relative difference.
    codes_equal: share of equal codes; None without a codebook.
    code_margin: largest relative margin between the two codes where they differ; 0 if all agree.
    """

    stages: dict[str, float]
    outputs: dict[str, float]
    codes_equal: float | None = None
    code_margin: float = 0.0

    @property
    def worst(self) -> float:
        """The largest difference, without outputs that follow from codes if the codes differ."""
        after_codes = ("decoder.", "reconstruction", "quantized")
        return max(
            value
            for name, value in {**self.stages, **self.outputs}.items()
            if self.codes_equal == 1 or not name.startswith(after_codes)
        )

    @property
    def holds(self) -> bool:
        """True if all differences are within rounding."""
        return bool(self.worst <= TOLERANCE and self.code_margin <= CODE_ROUNDING)


@contextlib.contextmanager
def _recorded(model: nnx.Module) -> Iterator[dict[str, jax.Array]]:
    """A dictionary that receives the outputs of a model's layers, by path, within the context."""
    paths = {
        id(node): "/".join(map(str, path))
        for path, node in nnx.iter_graph(model)
        if isinstance(node, _LAYERS)
    }
    outputs: dict[str, jax.Array] = {}
    originals = {kind: kind.__call__ for kind in _LAYERS}

    def recording(call):
        def wrapped(layer, *args, **kwargs):
            output = call(layer, *args, **kwargs)
            if id(layer) in paths:
                outputs[paths[id(layer)]] = output
            return output

        return wrapped

    try:
        for kind, call in originals.items():
            kind.__call__ = recording(call)
        yield outputs
    finally:
        for kind, call in originals.items():
            kind.__call__ = call


def _program(model: nnx.Module, *, record: bool) -> Callable[[np.ndarray], tuple[dict, dict]]:
    """Images [B, H, W, C] -> outputs of the layers, by path, and of the model, by name, in
    evaluation mode; compiled once for each shape. Without `record` no layer's output is kept."""
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, images):  # the weights are arguments: as constants they would be copied
        copy = nnx.merge(graph, state)
        with _recorded(copy) if record else contextlib.nullcontext({}) as layers:
            output = copy(images, train=False)
        return layers, output._asdict()

    def call(images):
        with jax.default_matmul_precision("highest"):
            return jax.device_get(run(state, images))

    return call


def jax_outputs(model: nnx.Module, images: np.ndarray) -> dict[str, np.ndarray]:
    """Outputs of the model in evaluation mode, without losses.

    Args:
      model: float32 model, without remat and scan.
      images: [B, H, W, C] float32 in [0, 1]; one at a time is computed.
    """
    run = _program(model, record=False)
    return _joined([run(image)[1] for image in _singly(images)])


def _singly(images: np.ndarray) -> list[np.ndarray]:
    return [images[i : i + 1] for i in range(len(images))]


def _joined(outputs: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Outputs of several batches as those of one, without losses."""
    return {
        name: np.concatenate([part[name] for part in outputs])
        for name in outputs[0]
        if not name.endswith("_loss")
    }


def _torch_differences(
    model: ExportedModel, images: np.ndarray, expected: dict[str, np.ndarray]
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Relative differences of the layers to the expected outputs, in the order of computation, and
    the outputs of the model, channels last. No layer's output is kept."""
    differences: dict[str, float] = {}

    def compare(name, output):
        value = channels_last(output.numpy())
        differences[name] = relative_difference(_reshaped(value, expected[name]), expected[name])

    hooks = [
        module.register_forward_hook(lambda _, inputs, output, name=name: compare(name, output))
        for name, module in model.named_modules()
        if name in expected
    ]
    try:
        with torch.inference_mode():
            output = model(torch.from_numpy(channels_first(images)))
    finally:
        for hook in hooks:
            hook.remove()
    if missing := set(expected) - set(differences):
        raise KeyError(f"layers without a twin: {', '.join(sorted(missing))}")
    return differences, {
        name: channels_last(value.numpy()) for name, value in output._asdict().items()
    }


def channels_first(images: np.ndarray) -> np.ndarray:
    """[B, H, W, C] -> [B, C, H, W], contiguous; other ranks are returned unchanged."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)) if images.ndim == 4 else images


def channels_last(images: np.ndarray) -> np.ndarray:
    """The inverse of `channels_first`."""
    return images.transpose(0, 2, 3, 1) if images.ndim == 4 else images


def relative_difference(value: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute expected value.

    Infinite for other shapes and for values that are not finite, which cannot be compared.
    """
    if value.shape != expected.shape or not (
        np.isfinite(value).all() and np.isfinite(expected).all()
    ):
        return float("inf")
    return float(np.abs(value - expected).max() / max(np.abs(expected).max(), 1e-12))


def measure(
    model: nnx.Module, twin: ExportedModel, images: np.ndarray, architecture: str, depth: int
) -> tuple[Parity, dict[str, np.ndarray]]:
    """Compare a model with its twin.

    Args:
      model: float32 model, without remat and scan.
      twin: model in evaluation mode, on the CPU.
      images: [B, H, W, C] float32 in [0, 1].
      architecture, depth: see `names.torch_name`.

    Returns:
      The largest differences of the images, which run one at a time, and the outputs in JAX,
      channels last, without losses.
    """
    run = _program(model, record=True)
    stages: dict[str, float] = {}
    outputs: dict[str, float] = {}
    ours, theirs = [], []
    for image in _singly(images):
        layers, expected = run(image)
        named = {_layer_name(path, architecture, depth): value for path, value in layers.items()}
        differences, found = _torch_differences(twin, image, named)
        _keep_largest(stages, differences)
        compared = [name for name in expected if name != "codes" and not name.endswith("_loss")]
        values = {name: relative_difference(found[name], expected[name]) for name in compared}
        if "codes" in expected:
            equal = np.array_equal(expected["codes"], found["codes"])
            values["decoder_on_same_codes"] = (
                values["reconstruction"] if equal else _decoder_difference(twin, expected)
            )
        _keep_largest(outputs, values)
        ours.append(expected)
        theirs.append(found)
    expected = _joined(ours)
    if "codes" not in expected:
        return Parity(stages, outputs), expected
    codebook = np.asarray(model.quantizer.codebook[...])
    equal, margin = _compare_codes(expected, _joined(theirs)["codes"], codebook)
    return Parity(stages, outputs, equal, margin), expected


def _keep_largest(largest: dict[str, float], values: dict[str, float]) -> None:
    for name, value in values.items():
        largest[name] = max(largest.get(name, 0.0), value)


def _decoder_difference(twin: ExportedModel, expected: dict[str, np.ndarray]) -> float:
    """Of the twin's reconstruction from the codes in JAX, where its own codes are others."""
    with torch.inference_mode():
        quantized = twin.vq_layer.lookup(torch.from_numpy(np.asarray(expected["codes"], np.int64)))
        decoded = channels_last(twin.decode(quantized).numpy())
    return relative_difference(decoded, expected["reconstruction"])


def _layer_name(path: str, architecture: str, depth: int) -> str:
    field = "scale" if path.endswith("norm") else "kernel"
    return torch_name(f"{path}/{field}", architecture, depth).removesuffix(".weight")


def _reshaped(value: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The value in the shape of the expected value, if their sizes agree."""
    return value.reshape(expected.shape) if value.size == expected.size else value


def _compare_codes(
    expected: dict[str, Any], codes: np.ndarray, codebook: np.ndarray
) -> tuple[float, float]:
    """Share of equal codes, and where two codes differ, the largest relative margin between their
    distances to the latent.
    """
    jax_codes, torch_codes = np.asarray(expected["codes"]).ravel(), codes.ravel()
    different = np.flatnonzero(jax_codes != torch_codes)
    if not len(different):
        return 1.0, 0.0
    vectors = np.asarray(expected["latents"], np.float64).reshape(len(jax_codes), -1)[different]
    ours, theirs = (codebook[index[different]] for index in (jax_codes, torch_codes))
    margin = np.square(vectors - ours).sum(1) - np.square(vectors - theirs).sum(1)
    scale = np.square(vectors).sum(1) + np.square(ours).sum(1)
    relative = np.abs(margin) / np.maximum(scale, 1e-12)
    return 1 - len(different) / len(jax_codes), float(relative.max())


def relative_margins(latents: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """How much nearer the nearest code is than the second: the difference of the squared distances
    over |latent|^2 + |nearest code|^2.

    Args:
      latents: [..., D] float32.
      codebook: [K, D] float32.

    Returns:
      [...] float64; infinite with a codebook of one code.
    """
    codebook = np.asarray(codebook, np.float64)
    vectors = np.asarray(latents, np.float64).reshape(-1, codebook.shape[1])
    margins = np.full(len(vectors), np.inf)
    if len(codebook) > 1:
        lengths = np.square(codebook).sum(1)
        for start in range(0, len(vectors), 4096):  # all distances at once may take gigabytes
            part = vectors[start : start + 4096]
            distances = lengths - 2 * part @ codebook.T  # without |latent|^2, which all share
            two = np.argpartition(distances, 1)[:, :2]
            values = np.sort(np.take_along_axis(distances, two, 1), axis=1)
            scale = np.square(part).sum(1) + lengths[distances.argmin(1)]
            margins[start : start + 4096] = (values[:, 1] - values[:, 0]) / np.maximum(scale, 1e-12)
    return margins.reshape(np.shape(latents)[:-1])
