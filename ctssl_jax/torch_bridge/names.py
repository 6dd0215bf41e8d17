"""Names and axes of tensors, between this package's checkpoints and PyTorch's state_dict, both
ways; without importing PyTorch.

    here                                  PyTorch
    encoder/downsample/{0,1}/conv|norm    encoder.{0,1}.{0|1}             the authors' layout
    encoder/stem/conv|norm                encoder.2.{0|1}
    encoder/blocks/i/conv3|norm|conv1     encoder.{3+i}.resblock.{0|2|4}
    encoder/project/conv|norm             encoder.{4+d}.{0|1}             d = depth
    quantizer/codebook                    vq_layer.embedding.weight
    decoder/stem/conv|norm                decoder.0.{0|1}
    decoder/blocks/i/conv3|norm|conv1     decoder.{1+i}.resblock.{0|1|3}
    decoder/upsample/{0,1}/conv|norm      decoder.{2+d,3+d}.{0|1}
    A/conv, A/norm                        A.0, A.1                        classifier and U-Nets,
    head, classification                  the same                        beside the encoder
    stem/conv, stem/norm                  conv1, bn1                      SE-ResNeXt: timm's layout
    stages/s/i/conv{k}/conv|norm          layer{s+1}.i.conv{k}|bn{k}
    stages/s/i/squeeze, excite            layer{s+1}.i.se.fc1, fc2
    stages/s/i/downsample/conv|norm       layer{s+1}.i.downsample.0|1
    classification                        fc
    kernel, bias; scale, bias             weight, bias
    mean, var                             running_mean, running_var

Kernels of convolutions are HWIO here and OIHW in PyTorch, kernels of linear layers are transposed,
and kernels of transposed convolutions are IOHW in PyTorch and mirrored in H and W. PyTorch counts
the batches that a norm has seen (`num_batches_tracked`); here the checkpoint's step is that number.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

_NOT_ARCHITECTURE = ("remat", "scan", "dtype", "projector", "num_prototypes", "decoder_depth")
COUNTER = "num_batches_tracked"
_FIELDS = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_CONV_NORM = {"conv": "0", "norm": "1"}
_RESBLOCK = {
    "encoder": {"conv3": "0", "norm": "2", "conv1": "4"},
    "decoder": {"conv3": "0", "norm": "1", "conv1": "3"},
}
# Names of the older SE-ResNeXt (timm's `legacy_seresnext50_32x4d`) -> timm's newer ones.
_OLDER_SE_RESNEXT = ((r"^layer0\.", ""), (r"\.se_module\.", ".se."), (r"^last_linear\.", "fc."))
# Without a name in PyTorch's layout, since training alone uses it: how a codebook follows the
# latents, and what a joint embedding, SparK or a mix of objectives has beside its encoder.
_TRAINING_ONLY = re.compile(
    r"quantizer/(counts|sums|steps|initialised)|(projector|teacher|heads|light_decoder)/.*"
    r"|prototypes|centre|steps|mask_token"
)


def architecture_settings(settings: Any) -> dict[str, Any]:
    """The settings that decide a model's tensors and function, as its PyTorch twin takes them."""
    return {
        field.name: list(value)
        if isinstance(value := getattr(settings, field.name), tuple)
        else value
        for field in dataclasses.fields(settings)
        if field.name not in _NOT_ARCHITECTURE and not field.name.startswith("vq_")
    }


def newer_se_resnext_name(name: str) -> str:
    """timm's name of an SE-ResNeXt's tensor, from the older layout's; others as they are."""
    for pattern, replacement in _OLDER_SE_RESNEXT:
        name = re.sub(pattern, replacement, name)
    return name


def older_se_resnext_name(name: str) -> str:
    """The older layout's name of a tensor, from timm's (`seresnext50_32x4d`)."""
    if name.startswith(("conv1.", "bn1.")):
        return f"layer0.{name}"
    return re.sub(r"^fc\.", "last_linear.", name).replace(".se.", ".se_module.")


def is_exported(name: str) -> bool:
    """Whether a tensor belongs to the model as it is applied."""
    return not _TRAINING_ONLY.fullmatch(name)


def torch_name(name: str, architecture: str, depth: int = 0) -> str:
    """PyTorch's name of a tensor.

    Args:
      name: our name without `params/` or `variables/`, e.g. `encoder/stem/conv/kernel`.
      architecture: `VQVAE`, `Classifier`, `JointEmbedding`, `UNet`, `StandardUNet` or `SEResNeXt`.
      depth: residual blocks of the encoder; unused for `StandardUNet` and `SEResNeXt`.

    Raises:
      KeyError: a name that does not exist in the architecture.
    """
    if name == "quantizer/codebook":
        return "vq_layer.embedding.weight"
    *module, field = name.split("/")
    if architecture == "SEResNeXt":
        return f"{_se_resnext_module(module)}.{_FIELDS[field]}"
    if module[0] in ("encoder", "decoder") and architecture != "StandardUNet":
        return f"{_autoencoder_module(module, depth)}.{_FIELDS[field]}"
    return ".".join([*(_CONV_NORM.get(part, part) for part in module), _FIELDS[field]])


def _autoencoder_module(module: list[str], depth: int) -> str:
    side, kind, *rest = module
    if kind == "blocks":
        first = 3 if side == "encoder" else 1
        return f"{side}.{first + int(rest[0])}.resblock.{_RESBLOCK[side][rest[1]]}"
    index = {
        "encoder": {"downsample": 0, "stem": 2, "project": 4 + depth},
        "decoder": {"stem": 0, "upsample": 2 + depth},
    }[side][kind]
    return f"{side}.{index + int(rest[0]) if len(rest) == 2 else index}.{_CONV_NORM[rest[-1]]}"


def _se_resnext_module(module: list[str]) -> str:
    if module == ["classification"]:
        return "fc"
    if module[0] == "stem":
        return {"conv": "conv1", "norm": "bn1"}[module[1]]
    _, stage, block, part, *rest = module
    prefix = f"layer{int(stage) + 1}.{block}"
    if part == "downsample":
        return f"{prefix}.downsample.{_CONV_NORM[rest[0]]}"
    if part in ("squeeze", "excite"):
        return f"{prefix}.se.{'fc1' if part == 'squeeze' else 'fc2'}"
    return f"{prefix}.{part if rest[0] == 'conv' else part.replace('conv', 'bn')}"


def _is_transposed(name: str) -> bool:
    return "/upsample/" in f"/{name}" and name.endswith("/kernel")


def to_torch_axes(value: np.ndarray, name: str) -> np.ndarray:
    """A tensor with the axes of PyTorch; `name` is our name."""
    if not name.endswith("/kernel"):
        return value
    if value.ndim == 2:
        return value.T
    return (
        value[::-1, ::-1].transpose(2, 3, 0, 1)
        if _is_transposed(name)
        else value.transpose(3, 2, 0, 1)
    )


def from_torch_axes(value: np.ndarray, name: str) -> np.ndarray:
    """The inverse of `to_torch_axes`."""
    if not name.endswith("/kernel"):
        return value
    if value.ndim == 2:
        return value.T
    return (
        value.transpose(2, 3, 0, 1)[::-1, ::-1]
        if _is_transposed(name)
        else value.transpose(2, 3, 1, 0)
    )


def state_dict(
    tensors: Mapping[str, np.ndarray],
    architecture: str,
    depth: int,
    num_batches: int | Mapping[str, int],
) -> dict[str, np.ndarray]:
    """PyTorch's entries of a model, in the order of `torch.nn.Module.state_dict`.

    Args:
      tensors: float32 arrays by our names, without `params/` or `variables/`.
      architecture, depth: see `torch_name`.
      num_batches: `num_batches_tracked` of all norms, or of each norm by its entry's name.

    Returns:
      contiguous arrays by PyTorch's names; the counters int64.
    """
    entries = {}
    for name, value in tensors.items():
        if not is_exported(name):
            continue
        entry = torch_name(name, architecture, depth)
        entries[entry] = np.ascontiguousarray(to_torch_axes(np.asarray(value), name))
        if entry.endswith(".running_var"):
            counter = entry.replace("running_var", COUNTER)
            number = num_batches if isinstance(num_batches, int) else num_batches[counter]
            entries[counter] = np.array(number, np.int64)
    return entries


class Misfits(NamedTuple):
    """The entries of a state_dict that do not fit a model, as sentences with PyTorch's names."""

    shapes: list[str]
    missing: list[str]
    extra: list[str]

    def __bool__(self) -> bool:
        return any(self[:])

    def text(self) -> str:
        """The number of misfits of each kind, and the first of each."""
        first = "; ".join(kind[0] for kind in self if kind)
        return (
            f"{len(self.missing)} tensors missing, {len(self.extra)} extra, {len(self.shapes)} of "
            f"another shape; {first}"
        )


def from_state_dict(
    entries: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    architecture: str,
    depth: int = 0,
) -> tuple[dict[str, np.ndarray], Misfits]:
    """Our tensors from PyTorch's entries.

    Args:
      entries: arrays by PyTorch's names; counters are skipped.
      shapes: name -> shape of the tensors of our model, without `params/` or `variables/`.
      architecture, depth: see `torch_name`.

    Returns:
      float32 arrays by our names, and the entries that do not fit.
    """
    tensors, misfits = {}, Misfits([], [], [])
    names = {torch_name(name, architecture, depth): name for name in shapes if is_exported(name)}
    for entry, name in names.items():
        if entry not in entries:
            misfits.missing.append(f"{entry} is missing")
            continue
        value = entries[entry]
        shape = to_torch_axes(np.broadcast_to(np.float32(0), shapes[name]), name).shape
        if value.shape != shape:
            misfits.shapes.append(f"{entry} has shape {tuple(value.shape)} there, {shape} here")
            continue
        tensors[name] = np.ascontiguousarray(from_torch_axes(value, name), dtype=np.float32)
    misfits.extra.extend(
        f"{entry} has no place here"
        for entry in entries
        if entry not in names and not entry.endswith(f".{COUNTER}")
    )
    return tensors, misfits
