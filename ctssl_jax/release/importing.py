"""Weights of PyTorch as a run directory: the core of `ctssl_jax.import_torch`. Every field of a
manifest is checked before it is used.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from ctssl_jax.ops.trees import flatten, unflatten
from ctssl_jax.runs.checkpoints import Checkpoints
from ctssl_jax.runs.directory import run_directory
from ctssl_jax.runs.run import from_json, open_workdir, to_json
from ctssl_jax.tasks.table import get_task
from ctssl_jax.torch_bridge import names
from ctssl_jax.torch_bridge.manifests import find_manifest
from ctssl_jax.torch_bridge.weight_files import read_tensors
from ctssl_jax.training.state import abstract_model
from data_prep.system.errors import InputError
from data_prep.system.files import file_sha256, write_json
from data_prep.system.stores import local_path

WEIGHTS = ("weights.safetensors", "model.safetensors", "weights.pt")  # the first is taken
# In place of the fingerprint of a pseudonym key, since the training patients are unknown.
UNKNOWN_KEY = "unknown"


def import_weights(
    checkpoint: str | Path,
    workdir: str | Path,
    config: ml_collections.ConfigDict | None,
    windows: list[list[float]],
) -> int:
    """Write a run directory with the weights of a file.

    Args:
      checkpoint: weights file, or folder of `ctssl_jax.export`.
      workdir: new or empty folder, which becomes the run directory.
      config: recipe of the autoencoder; the sizes of its model are replaced by the sizes of the
        tensors. Unused for a folder, which contains its own configuration.
      windows: (level, width) in HU that the weights were trained with; unused for a folder.

    Returns:
      Number of tensors.

    Raises:
      InputError: no such file, a file with more than tensors, another layout, or tensors that are
        missing, left over or of another shape.
    """
    checkpoint, workdir = local_path(checkpoint, "--checkpoint"), run_directory(workdir)
    if workdir.exists() and not (workdir.is_dir() and not any(workdir.iterdir())):
        raise InputError(f"--workdir={workdir} is there already; give a new or empty folder")
    manifest = find_manifest(checkpoint, "--checkpoint")
    path = _weights_of(checkpoint, manifest) if manifest else checkpoint
    entries = read_tensors(path, "--checkpoint")
    if manifest and manifest["architecture"] == "SEResNeXt":  # timm's older names, from a hub
        entries = {names.newer_se_resnext_name(name): entries[name] for name in entries}
    architecture, licence, init_from, step = "VQVAE", "", [], 0
    if manifest:
        try:
            config, preparation, step = _of_manifest(manifest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"--checkpoint={checkpoint}: manifest.json is damaged or was changed "
                f"({type(error).__name__}: {error}); copy the whole folder again"
            ) from None
        architecture, licence = manifest["architecture"], manifest.get("license", "")
        init_from = manifest["training"].get("init_from", [])
    else:
        config = _of_tensors(entries, config, checkpoint)
        preparation = _unknown_data(windows, config.image_size)
    state, num_tensors = _model_state(entries, config, architecture, checkpoint)
    counters = {
        name: int(value)
        for name, value in sorted(entries.items())
        if name.endswith(f".{names.COUNTER}")
    }
    step = step or max(counters.values(), default=0)

    no_patients = {"train": [], "validation": []}
    open_workdir(workdir, config, preparation, no_patients)
    write_json(workdir / "ancestors.json", [])
    facts = {
        "sha256": file_sha256(path),
        "step": step,
        "num_batches_tracked": counters,
        "license": licence,
        "init_from": init_from,
    }
    write_json(workdir / "imported.json", facts)
    checkpoints = Checkpoints(workdir)
    metadata = {"config": to_json(config), "preparation": preparation}
    checkpoints.save(step, jax.tree.map(jax.numpy.asarray, state), metadata)
    checkpoints.close()
    return num_tensors


def _model_state(
    entries: Mapping[str, np.ndarray],
    config: ml_collections.ConfigDict,
    architecture: str,
    checkpoint: Path,
) -> tuple[dict[str, Any], int]:
    """`params` and `variables` of the model with the tensors of a file, and their number.

    Raises:
      InputError: tensors that are missing, left over or of another shape.
    """
    _, params, variables = abstract_model(config, get_task(config.task))
    template = {"params": params, "variables": variables}
    leaves = {name.split("/", 1)[1]: leaf for name, leaf in flatten(template).items()}
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    tensors, misfits = names.from_state_dict(
        entries, shapes, architecture, config.model.get("depth", 0)
    )
    if misfits:
        raise InputError(
            f"--checkpoint={checkpoint} is not this model ({misfits.text()}); give weights in the "
            "authors' layout, or a folder of ctssl_jax.export"
        )
    num_tensors = len(tensors)
    for name, leaf in leaves.items():
        # How a codebook follows the latents is not in the file: it starts again from these codes.
        if not names.is_exported(name):
            tensors[name] = np.full(leaf.shape, name.endswith("initialised"), leaf.dtype)
    flat = {name: tensors[name.split("/", 1)[1]] for name in flatten(template)}
    return unflatten(template, flat), num_tensors


def _weights_of(checkpoint: Path, manifest: Mapping[str, Any]) -> Path:
    """The path of the weights file.

    Raises:
      InputError: no weights file, or a file whose SHA-256 differs from the manifest.
    """
    candidates = [checkpoint, *(checkpoint / name for name in WEIGHTS)]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise InputError(
            f"--checkpoint={checkpoint} contains none of {', '.join(WEIGHTS)}; "
            "export again with --format=hub, torch or safetensors"
        )
    facts = manifest["files"].get(path.name)
    expected = facts.get("sha256") if isinstance(facts, dict) else None
    if file_sha256(path) != expected:
        raise InputError(
            f"--checkpoint={path} is not the file that the manifest.json beside it describes "
            "(damaged, or of another export); copy the whole folder again"
        )
    return path


def _of_manifest(manifest: Mapping[str, Any]) -> tuple[Any, dict[str, Any], int]:
    """Configuration, preparation and step of the exported run; exports do not name its patients."""
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
        "rules": data.get("rules", {"volumes": {}}),
    }
    config.windows = [list(window) for window in manifest["preprocessing"]["windows"]]
    return config, preparation, training["checkpoint_step"]


def _of_tensors(entries: Mapping[str, Any], config: Any, checkpoint: Path) -> Any:
    """The recipe with the sizes of an autoencoder's tensors.

    Raises:
      InputError: the tensors are not an autoencoder in the authors' layout.
    """
    if config is None:
        raise InputError("give --config=masked_region, the recipe of the autoencoder")
    needed = ("encoder.0.0.weight", "encoder.1.0.weight", "vq_layer.embedding.weight")
    missing = [name for name in needed if name not in entries]
    if missing:
        raise InputError(
            f"--checkpoint={checkpoint} is not an autoencoder in the authors' layout "
            f"({missing[0]} is missing among its {len(entries)} tensors); give such a file, or a "
            "folder of ctssl_jax.export"
        )
    if any(entries[name].ndim != number for name, number in zip(needed, (4, 4, 2), strict=True)):
        raise InputError(
            f"--checkpoint={checkpoint} is not an autoencoder in the authors' layout (tensors of "
            "other ranks); give such a file, or a folder of ctssl_jax.export"
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
    """A `preparation.json` for data of which only windows and size are known."""
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
        "rules": {"volumes": {}},
    }
