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

from ctssl_jax.release import parity
from data_prep.system.errors import RunFailed

OPSET = 18
_MAX_OTHER_CODES = 0.01


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


def write(
    path: Path, twin: torch.nn.Module, images: np.ndarray, expected: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Write the file, run it on the same images, in one batch and one by one, and compare.

    Args:
      path: path of the file, which includes the weights.
      twin: model in evaluation mode, on the CPU.
      images: [B, H, W, C] float32 in [0, 1].
      expected: outputs of this package's model for the images, channels last.

    Returns:
      opset, names of input and outputs, and the differences relative to the largest value (for
      codes the share that differs).

    Raises:
      RunFailed: the file is not the same function.
    """
    names = output_names(expected)
    batch = torch.from_numpy(parity.channels_first(np.concatenate([images, images])))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Outputs(twin, names).eval(),
            (batch,),
            path,
            dynamo=True,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            input_names=["images"],
            output_names=names,
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    differences = _compare(path, twin, names, images, expected)
    worst = max(value for name, value in differences.items() if name != "codes")
    if not worst <= parity.TOLERANCE or differences.get("codes", 0.0) > _MAX_OTHER_CODES:
        listed = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        raise RunFailed(
            f"the ONNX model is not the same function (differences: {listed}); nothing was "
            "written. Export without --format=onnx, and please report it"
        )
    return {
        "opset": OPSET,
        "input": "images [batch, C, H, W] float32 in [0, 1]",
        "outputs": names,
        "largest_difference": worst,
        "differences": differences,
    }


def _compare(
    path: Path,
    twin: torch.nn.Module,
    names: list[str],
    images: np.ndarray,
    expected: dict[str, np.ndarray],
) -> dict[str, float]:
    import onnxruntime  # an extra

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    differences = dict.fromkeys(names, 0.0)
    for chosen in (slice(None), *(slice(index, index + 1) for index in range(len(images)))):
        values = session.run(names, {"images": parity.channels_first(images[chosen])})
        outputs = dict(zip(names, values, strict=True))
        for name, value in outputs.items():
            reference = expected[name][chosen]
            if name == "reconstruction" and not np.array_equal(
                outputs["codes"], expected["codes"][chosen]
            ):
                # Rounding may choose another code: compare with the decoder's output for it.
                with torch.inference_mode():
                    codes = torch.from_numpy(outputs["codes"]).long()
                    decoded = twin.decode(twin.vq_layer.lookup(codes)).numpy()
                reference = parity.channels_last(decoded)
            if name == "codes":
                difference = float((value != reference).mean())
            else:
                difference = parity.relative_difference(parity.channels_last(value), reference)
            differences[name] = max(differences[name], difference)
    return differences
