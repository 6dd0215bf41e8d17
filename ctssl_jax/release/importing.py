"""Weights of PyTorch as a run directory: the core of `ctssl_jax.import_torch`. A manifest is read
without trust."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from ctssl_jax.ops.trees import flatten, unflatten
from ctssl_jax.runs.checkpoints import Checkpoints
from ctssl_jax.runs.run import from_json, open_workdir, to_json
from ctssl_jax.tasks.table import get_task
from ctssl_jax.torch_bridge import names
from ctssl_jax.torch_bridge.weight_files import read_tensors
from ctssl_jax.training.state import abstract_model
from data_prep.system.errors import InputError
from data_prep.system.files import file_sha256, write_json

FORMAT_VERSION = 1  # as in ctssl_torch.py
# in place of the fingerprint of a pseudonym key: nobody knows whom these weights learned from
UNKNOWN_KEY = "unknown"
_FIELDS = ("architecture", "model", "preprocessing", "training", "data", "files")


def import_weights(
    checkpoint: str | Path,
    workdir: str | Path,
    config: ml_collections.ConfigDict | None,
    windows: list[list[float]],
) -> int:
    """Write a run directory with the weights of a file.

    Args:
      checkpoint: weights file, or folder of `ctssl_jax.export`.
      workdir: run directory that is made; it must not exist or be empty.
      config: recipe of the autoencoder, whose model's sizes are replaced by those of the tensors;
        unused for a folder, which has its own.
      windows: (level, width) in HU that the weights learned from; unused for a folder.

    Returns:
      Number of tensors.

    Raises:
      InputError: no such file, not tensors alone, not the layout, tensors that are missing, extra
        or of another shape.
    """
    checkpoint, workdir = Path(checkpoint), Path(workdir)
    if workdir.exists() and not (workdir.is_dir() and not any(workdir.iterdir())):
        raise InputError(f"--workdir={workdir} is there already; give a new or empty folder")
    manifest = find_manifest(checkpoint)
    path = _weights_of(checkpoint, manifest) if manifest else checkpoint
    entries = read_tensors(path, "--checkpoint")
    if manifest:
        config, preparation, step = _of_manifest(manifest)
    else:
        config = _of_tensors(entries, config, checkpoint)
        preparation, step = (
            _unknown_data([list(window) for window in windows], config.image_size),
            0,
        )
    task = get_task(config.task)
    _, params, variables = abstract_model(config, task)
    architecture = manifest["architecture"] if manifest else "VQVAE"
    template = flatten({"params": params, "variables": variables})
    wanted = {name.split("/", 1)[1]: (name, tuple(leaf.shape)) for name, leaf in template.items()}
    shapes = {name: shape for name, (_, shape) in wanted.items()}
    tensors_by_name, misfits = names.from_state_dict(
        entries, shapes, architecture, config.model.get("depth", 0)
    )
    if misfits:
        raise InputError(
            f"--checkpoint={checkpoint} is not this model ({misfits.text()}); give weights in the "
            f"authors' layout, or "
            "a folder of ctssl_jax.export"
        )
    counters = {
        name: int(value)
        for name, value in sorted(entries.items())
        if name.endswith(f".{names.COUNTER}")
    }
    step = step or max(counters.values(), default=0)
    tensors = {
        flat: tensors_by_name[name] for name, (flat, _) in wanted.items() if name in tensors_by_name
    }
    for name, (flat, shape) in wanted.items():
        # how a codebook follows the latents: starts again, from these codes
        if not names.is_exported(name):
            initialised = name.endswith("initialised")
            tensors[flat] = (
                np.ones(shape, bool) if initialised else np.zeros(shape, template[flat].dtype)
            )
    state = unflatten({"params": params, "variables": variables}, tensors)

    no_patients = {"train": [], "validation": []}
    open_workdir(workdir, config, preparation, no_patients)
    write_json(workdir / "ancestors.json", [])
    facts = {
        "sha256": file_sha256(path),
        "step": step,
        "num_batches_tracked": counters,
        "license": manifest.get("license", "") if manifest else "",
        "init_from": manifest["training"].get("init_from", []) if manifest else [],
    }
    write_json(workdir / "imported.json", facts)
    checkpoints = Checkpoints(workdir)
    metadata = {"config": to_json(config), "preparation": preparation}
    checkpoints.save(step, jax.tree.map(jax.numpy.asarray, state), metadata, None)
    checkpoints.close()
    return len(tensors_by_name)


def find_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest of an exported folder, or of the folder that the file lies in; None for other
    weights.

    Raises:
      InputError: a folder without a manifest, or a damaged one.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    path = folder / "manifest.json"
    if not path.is_file():
        if checkpoint.is_dir():
            raise InputError(
                f"--checkpoint={checkpoint} holds no manifest.json; give a weights file in it"
            )
        return None
    manifest = read_manifest(path, "--checkpoint")
    return manifest if checkpoint.is_dir() or checkpoint.name in manifest["files"] else None


def _weights_of(checkpoint: Path, manifest: Mapping[str, Any]) -> Path:
    """The weights file, whose bytes must be those that the manifest knows."""
    candidates = [checkpoint, checkpoint / "weights.safetensors", checkpoint / "weights.pt"]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise InputError(
            f"--checkpoint={checkpoint} holds neither weights.safetensors nor weights.pt"
        )
    known = manifest["files"].get(path.name)
    if known is None or file_sha256(path) != known["sha256"]:
        raise InputError(
            f"--checkpoint={path} is not the file that the manifest.json beside it describes "
            f"(damaged, or of another "
            "export); copy the whole folder again"
        )
    return path


def _of_manifest(manifest: Mapping[str, Any]) -> tuple[Any, dict[str, Any], int]:
    """Configuration, preparation and step of the exported run; who its patients were did not
    travel."""
    training, data = manifest["training"], manifest["data"]
    paths = {"dataset": "", "init_from": ""} | (
        {"init_weights": ""} if training["task"].endswith("se_resnext") else {}
    )
    config = from_json(training["config"] | paths)
    preparation = _unknown_data(manifest["preprocessing"]["windows"], config.image_size) | {
        "archive": data["archive"],
        "synthetic": data["synthetic"],
        "fingerprint": data["dataset_fingerprint"],
        "splits": data["splits"],
        "labels": data.get("labels", {}),
    }
    config.windows = [list(window) for window in manifest["preprocessing"]["windows"]]
    return config, preparation, training["checkpoint_step"]


def _of_tensors(entries: Mapping[str, Any], config: Any, checkpoint: Path) -> Any:
    """The recipe with the sizes that an autoencoder's tensors have.

    Raises:
      InputError: they are not an autoencoder in the authors' layout.
    """
    if config is None:
        raise InputError("give --config=configs/masked_region.py, the recipe of the autoencoder")
    needed = ("encoder.0.0.weight", "encoder.1.0.weight", "vq_layer.embedding.weight")
    missing = [name for name in needed if name not in entries]
    if missing:
        raise InputError(
            f"--checkpoint={checkpoint} is not an autoencoder in the authors' layout "
            f"({missing[0]} is missing among its {len(entries)} tensors); give one, or a folder "
            f"of ctssl_jax.export"
        )
    if any(entries[name].ndim != number for name, number in zip(needed, (4, 4, 2), strict=True)):
        raise InputError(
            f"--checkpoint={checkpoint} is not an autoencoder in the authors' layout (tensors of "
            f"other ranks)"
        )
    blocks = [re.fullmatch(r"encoder\.(\d+)\.resblock\.0\.weight", name) for name in entries]
    first, second, codebook = (entries[name] for name in needed)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.recipe = "imported"
        config.model.in_channels = int(first.shape[1])
        config.model.hidden = (int(first.shape[0]), int(second.shape[0]))
        config.model.depth = sum(match is not None for match in blocks)
        config.model.num_codes, config.model.embedding_dim = (int(size) for size in codebook.shape)
    return config


def _unknown_data(windows: list[list[float]], image_size: int) -> dict[str, Any]:
    """A `preparation.json` of data that are known by their windows and size alone."""
    return {
        "archive": "unknown",
        "synthetic": False,
        "windows": [{"level": float(level), "width": float(width)} for level, width in windows],
        "channels": len(windows),
        "image_size": image_size,
        "fingerprint": "unknown",
        "key_fingerprint": UNKNOWN_KEY,
        "splits": {},
        "options": {},
        "labels": {},
        "masks": None,
    }


# ---- manifest.json ----


def read_manifest(path: Path, flag: str) -> dict[str, Any]:
    """The manifest of an exported folder.

    Raises:
      InputError: not JSON, of another version, or without what an import needs.
    """
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{flag}: {path} is not a manifest of ctssl_jax.export, or damaged"
        ) from None
    missing = [name for name in _FIELDS if name not in manifest]
    if version != FORMAT_VERSION or missing:
        problem = (
            f"has format_version {version}" if version != FORMAT_VERSION else f"lacks {missing[0]}"
        )
        raise InputError(
            f"{flag}: {path} {problem}; this version reads {FORMAT_VERSION}: export it again"
        )
    if not _is_sound(manifest):
        raise InputError(f"{flag}: {path} is damaged; copy the whole folder again")
    return manifest


def _is_sound(manifest: dict[str, Any]) -> bool:
    """Whether the fields that an import reads have the types that an export writes."""
    training, preprocessing = manifest["training"], manifest["preprocessing"]
    dictionaries = [manifest[name] for name in _FIELDS[1:]]
    try:
        dictionaries += [training["config"], manifest["data"]["splits"]]
        windows = [(float(level), float(width)) for level, width in preprocessing["windows"]]
        step, task = training["checkpoint_step"], training["task"]
    except (KeyError, TypeError, ValueError):
        return False
    are_dictionaries = all(isinstance(value, dict) for value in dictionaries)
    return (
        are_dictionaries
        and bool(windows)
        and isinstance(step, int)
        and step >= 0
        and isinstance(task, str)
    )
