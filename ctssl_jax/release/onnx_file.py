"""A PyTorch twin as an ONNX file that onnxruntime runs, compared with this package's outputs."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flax import nnx

from ctssl_jax.release import parity
from ctssl_jax.torch_bridge.ctssl_torch import ExportedModel
from data_prep.system.errors import RunFailed

OPSET = 18
# Two codes are equally near to a latent if its squared distances to them differ by less than this
# share of |latent|^2 + |code|^2. Rounding may then choose either.
NEAR_TIE = 1e-4
SMALLEST_SIDE = 16


def output_names(outputs: Iterable[str]) -> list[str]:
    """The outputs for users of the model: without losses, and without `quantized`, which the codes
    determine.
    """
    return [name for name in outputs if not name.endswith("_loss") and name != "quantized"]


class _Outputs(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(images)
        return tuple(getattr(output, name) for name in self.names)


Case = tuple[np.ndarray, dict[str, np.ndarray]]  # images and the outputs in JAX, channels last


def make_cases(
    model: nnx.Module,
    whole: np.ndarray,
    middle: np.ndarray,
    outputs: dict[str, np.ndarray],
    stride: int,
) -> list[Case]:
    """What the file is compared with: the middle of the slices in one batch and each alone (an only
    one twice in one batch, too), one whole slice where it is larger, and another size.

    Args:
      model: the model in JAX, float32, without remat and scan.
      whole: [B, H, W, C] float32 in [0, 1], of the size that the model was trained on.
      middle: [B, h, w, C], the middle of `whole`.
      outputs: of the model for `middle`, channels last.
      stride: of which the sides of another size are multiples.
    """

    def chosen(numbers: list[int]) -> Case:
        return middle[numbers], {name: value[numbers] for name, value in outputs.items()}

    number = len(middle)
    cases = [chosen([0, 0] if number == 1 else list(range(number)))]
    cases += [chosen([i]) for i in range(number)]
    if whole.shape != middle.shape:
        cases.append((whole[:1], parity.jax_outputs(model, whole[:1])))
    others = _of_another_size(middle[:1], stride)
    return [*cases, (others, parity.jax_outputs(model, others))]


def write(path: Path, twin: ExportedModel, cases: list[Case], whole: np.ndarray) -> dict[str, Any]:
    """Write the file, run it, and compare it with the model in JAX.

    The number of images is free. So are height and width, where PyTorch can trace the network for
    all of them, else they are those of `whole`, and images of other sizes are not compared.

    Args:
      path: path of the file, which includes the weights.
      twin: the model in PyTorch, in evaluation mode, on the CPU.
      cases, whole: from and as `make_cases`.

    Returns:
      `opset`; `input` and `outputs`; `compared`, the shapes, in words; `differences` relative to
      the largest value of each output, and the `largest_difference`. With a codebook `codes`: how
      many were `compared`, how many of these are `near_ties` within `tie`, and how many are
      `different`.

    Raises:
      RunFailed: the file is not the same function.
    """
    names = output_names(cases[0][1])
    sides_are_free = _export(path, twin, names, whole)
    if not sides_are_free:
        cases = [case for case in cases if case[0].shape[1:] == whole.shape[1:]]
        images, expected = cases[-1]  # one slice; a batch of it, too
        twice = {name: np.repeat(value, 2, axis=0) for name, value in expected.items()}
        cases.append((np.repeat(images, 2, axis=0), twice))
    differences, codes = _compare(path, twin, names, cases)
    facts = {
        "opset": OPSET,
        "input": _input(whole, twin.stride, sides_are_free),
        "outputs": names,
        "compared": ", ".join(
            dict.fromkeys(
                " x ".join(map(str, parity.channels_first(batch).shape)) for batch, _ in cases
            )
        ),
        "largest_difference": max(differences.values()),
        "differences": differences,
    } | ({"codes": codes} if codes else {})
    if not facts["largest_difference"] <= parity.TOLERANCE or codes.get("wrong", 0):
        listed = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        if codes:
            listed += f", {codes['wrong']} codes that are clearly nearest"
        raise RunFailed(
            f"the ONNX model is not the same function (differences: {listed}); nothing was "
            "written. Export without --format=onnx, and please report it"
        )
    codes.pop("wrong", None)
    return facts


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts of `write` as lines for the screen."""
    codes = facts.get("codes")
    return [
        f"ONNX         opset {facts['opset']}, {facts['input']}",
        f"{'':13}largest difference {facts['largest_difference']:.1e} on {facts['compared']}"
        + (
            f"; {codes['different']} of {codes['compared']:,} codes differ, "
            f"{codes['near_ties']} are near ties"
            if codes
            else ""
        ),
    ]


def _input(images: np.ndarray, stride: int, sides_are_free: bool) -> str:
    channels, sides = images.shape[-1], f"{images.shape[1]}, {images.shape[2]}"
    if sides_are_free:
        sides = "H, W"
    free = f", H and W multiples of {stride}" if sides_are_free and stride > 1 else ""
    return f"images [batch, {channels}, {sides}] float32 in [0, 1]{free}"


def _export(path: Path, twin: ExportedModel, names: list[str], images: np.ndarray) -> bool:
    """Write the file; returns whether height and width are free in it."""
    batch = torch.from_numpy(parity.channels_first(np.concatenate([images[:1], images[:1]])))
    fewest = -(-SMALLEST_SIDE // twin.stride)
    height, width = (
        twin.stride * torch.export.Dim(name, min=fewest) for name in ("rows", "columns")
    )
    number = {0: torch.export.Dim("batch")}
    for name in ("torch.onnx", "torch.fx.experimental.symbolic_shapes", "torch._guards"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # an attempt that fails is no news

    def trace(free: dict[int, Any]) -> None:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Outputs(twin, names).eval(),
                (batch,),
                path,
                dynamo=True,
                dynamic_shapes={"images": free},
                input_names=["images"],
                output_names=names,
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )

    try:
        trace(number | {2: height, 3: width})
        return True
    except torch.onnx.OnnxExporterError:
        trace(number)
        return False


def _of_another_size(images: np.ndarray, stride: int) -> np.ndarray:
    """About half of each side, not square, from the middle; where that is too small, about twice
    each side, by repetition."""
    height, width = (side // 2 // stride * stride for side in images.shape[1:3])
    if min(height, width - stride) < SMALLEST_SIDE:
        return np.tile(images, (1, 2, 2, 1))[:, :, stride:]
    top, left = (images.shape[1] - height) // 2, (images.shape[2] - width) // 2
    return images[:, top : top + height, left : left + width - stride]


def _compare(
    path: Path, twin: ExportedModel, names: list[str], cases: list[Case]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Largest differences of each output but the codes, and facts about the codes."""
    import onnxruntime  # an extra

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    differences = {name: 0.0 for name in names if name != "codes"}
    codes: dict[str, Any] = {}
    if "codes" in names:
        codes = {"tie": NEAR_TIE} | dict.fromkeys(
            ("compared", "near_ties", "different", "wrong"), 0
        )
    for images, expected in cases:
        values = session.run(names, {"images": parity.channels_first(images)})
        outputs = dict(zip(names, values, strict=True))
        if codes:
            codebook = twin.vq_layer.embedding.weight.detach().numpy()
            tied = parity.relative_margins(expected["latents"], codebook) <= NEAR_TIE
            other = outputs["codes"] != expected["codes"]
            codes["compared"] += other.size
            codes["near_ties"] += int(tied.sum())
            codes["different"] += int(other.sum())
            codes["wrong"] += int((other & ~tied).sum())
            if other.any():  # compare with the decoder's output for the same codes
                with torch.inference_mode():
                    chosen = torch.from_numpy(outputs["codes"]).long()
                    decoded = twin.decode(twin.vq_layer.lookup(chosen)).numpy()
                expected = {**expected, "reconstruction": parity.channels_last(decoded)}
        for name in differences:
            value = parity.relative_difference(parity.channels_last(outputs[name]), expected[name])
            differences[name] = max(differences[name], value)
    return differences, codes
