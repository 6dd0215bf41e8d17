r"""Import weights from PyTorch into a run directory that `train` (`--config.init_from`), `evaluate` and `embed` accept.

    python -m ctssl_jax.import_torch --checkpoint=last.pth.tar --workdir=RUN
    python -m ctssl_jax.import_torch --checkpoint=EXPORTED_FOLDER --workdir=RUN

The first form takes an autoencoder in the authors' layout, bare or as `{'model_state': ...}`, with or without the
prefix `module.`; its sizes are read off the tensors. How its slices were prepared is not in such a file: the flags say
it, and their defaults are those of the authors' release. The second takes a folder of `ctssl_jax.export`, of any model,
which says everything itself. Nothing in a file is run: one with Python objects beside the tensors is refused.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from ctssl_jax.parallel.processes import configure_jax
from data_prep.system import command_line
from data_prep.system.errors import InputError
from data_prep.system.files import file_sha256, write_json

UNKNOWN_KEY = "unknown"  # in place of the fingerprint of a pseudonym key: nobody knows whom these weights learned from


def import_weights(checkpoint: str | Path, workdir: str | Path, config: Any, windows: list[list[float]]) -> int:
    """Write a run directory with the weights of a file.

    Args:
      checkpoint: weights file, or folder of `ctssl_jax.export`.
      workdir: run directory that is made; it must not exist or be empty.
      config: recipe of the autoencoder, whose model's sizes are replaced by those of the tensors; unused for a folder,
        which has its own.
      windows: (level, width) in HU that the weights learned from; unused for a folder.

    Returns:
      Number of tensors.

    Raises:
      InputError: no such file, not tensors alone, not the layout, tensors that are missing, extra or of another shape.
    """
    import jax
    import numpy as np

    from ctssl_jax import checkpoint as checkpoint_files
    from ctssl_jax import configuration, training
    from ctssl_jax.tasks import get_task
    from ctssl_jax.torch_bridge import files, names

    checkpoint, workdir = Path(checkpoint), Path(workdir)
    if workdir.exists() and not (workdir.is_dir() and not any(workdir.iterdir())):
        raise InputError(f"--workdir={workdir} is there already; give a new or empty folder")
    manifest = _manifest(checkpoint)
    path = _weights_of(checkpoint, manifest) if manifest else checkpoint
    entries = files.read_tensors(path, "--checkpoint")
    if manifest:
        config, preparation, step = _of_manifest(manifest)
    else:
        config = _of_tensors(entries, config, checkpoint)
        preparation, step = _unknown_data([list(window) for window in windows], config.image_size), 0
    task = get_task(config.task)
    _, params, variables = training.abstract_model(config, task)
    architecture = manifest["architecture"] if manifest else "VQVAE"
    like = checkpoint_files.flatten({"params": params, "variables": variables})
    wanted = {name.split("/", 1)[1]: (name, tuple(leaf.shape)) for name, leaf in like.items()}
    shapes = {name: shape for name, (_, shape) in wanted.items()}
    found, misfits = names.from_state_dict(entries, shapes, architecture, config.model.get("depth", 0))
    if misfits:
        raise InputError(
            f"--checkpoint={checkpoint} is not this model ({misfits.text()}); give weights in the authors' layout, or "
            "a folder of ctssl_jax.export"
        )
    counters = {name: int(value) for name, value in sorted(entries.items()) if name.endswith(f".{names.COUNTER}")}
    step = step or max(counters.values(), default=0)
    tensors = {flat: found[name] for name, (flat, _) in wanted.items() if name in found}
    for name, (flat, shape) in wanted.items():
        if not names.is_exported(name):  # how a codebook follows the latents: begins anew, from these codes
            tensors[flat] = np.ones(shape, bool) if name.endswith("initialised") else np.zeros(shape, like[flat].dtype)
    state = checkpoint_files.unflatten({"params": params, "variables": variables}, tensors)

    no_patients = {"train": [], "validation": []}
    configuration.open_workdir(workdir, config, preparation, no_patients)
    write_json(workdir / "ancestors.json", [])
    facts = {
        "sha256": file_sha256(path),
        "step": step,
        "num_batches_tracked": counters,
        "license": manifest.get("license", "") if manifest else "",
        "init_from": manifest["training"].get("init_from", []) if manifest else [],
    }
    write_json(workdir / "imported.json", facts)
    checkpoints = checkpoint_files.Checkpoints(workdir)
    metadata = {"config": configuration.to_json(config), "preparation": preparation}
    checkpoints.save(step, jax.tree.map(jax.numpy.asarray, state), metadata, None)
    checkpoints.close()
    return len(found)


def _manifest(checkpoint: Path) -> dict[str, Any] | None:
    """That of an exported folder, or of the folder that the file lies in."""
    from ctssl_jax.torch_bridge import manifests

    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    path = folder / "manifest.json"
    if not path.is_file():
        if checkpoint.is_dir():
            raise InputError(f"--checkpoint={checkpoint} holds no manifest.json; give a weights file in it")
        return None
    manifest = manifests.read(path, "--checkpoint")
    return manifest if checkpoint.is_dir() or checkpoint.name in manifest["files"] else None


def _weights_of(checkpoint: Path, manifest: Mapping[str, Any]) -> Path:
    """The weights file, whose bytes must be those that the manifest knows."""
    candidates = [checkpoint, checkpoint / "weights.safetensors", checkpoint / "weights.pt"]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise InputError(f"--checkpoint={checkpoint} holds neither weights.safetensors nor weights.pt")
    known = manifest["files"].get(path.name)
    if known is None or file_sha256(path) != known["sha256"]:
        raise InputError(
            f"--checkpoint={path} is not the file that the manifest.json beside it describes (damaged, or of another "
            "export); copy the whole folder again"
        )
    return path


def _of_manifest(manifest: Mapping[str, Any]) -> tuple[Any, dict[str, Any], int]:
    """Configuration, preparation and step of the exported run; who its patients were did not travel."""
    from ctssl_jax import configuration

    training, data = manifest["training"], manifest["data"]
    paths = {"dataset": "", "init_from": ""} | ({"init_weights": ""} if training["task"].endswith("se_resnext") else {})
    config = configuration.from_json(training["config"] | paths)
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
      InputError: they are no autoencoder in the authors' layout.
    """
    if config is None:
        raise InputError("give --config=configs/masked_region.py, the recipe of the autoencoder")
    needed = ("encoder.0.0.weight", "encoder.1.0.weight", "vq_layer.embedding.weight")
    missing = [name for name in needed if name not in entries]
    if missing:
        raise InputError(
            f"--checkpoint={checkpoint} is no autoencoder in the authors' layout ({missing[0]} is missing among its "
            f"{len(entries)} tensors); give one, or a folder of ctssl_jax.export"
        )
    if any(entries[name].ndim != number for name, number in zip(needed, (4, 4, 2), strict=True)):
        raise InputError(f"--checkpoint={checkpoint} is no autoencoder in the authors' layout (tensors of other ranks)")
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


def define_flags() -> None:
    """Only where this module is the program."""
    flags.DEFINE_string("checkpoint", None, "Weights file, or folder of ctssl_jax.export.")
    flags.DEFINE_string("workdir", None, "Run directory that is made.")
    config_flags.DEFINE_config_file("config", "configs/masked_region.py", "Recipe of the authors' layout.")
    flags.DEFINE_integer("image_size", 512, "Side of the slices in pixels (authors' layout).")
    flags.DEFINE_multi_string("window", ["50,350"], "level,width in HU (authors' layout); repeatable.")
    flags.DEFINE_enum(
        "normalize", "slice_minmax", ["window", "slice_minmax"], "Grey values (authors' layout): theirs by default."
    )
    flags.DEFINE_enum("output_activation", "tanh", ["tanh", "unit_tanh"], "Output range (authors' layout).")


def main(argv: list[str]) -> int:
    """Command line."""
    given = flags.FLAGS
    for name, example in (("checkpoint", "FILE"), ("workdir", "DIR")):
        if not given[name].value:
            raise InputError(f"give --{name}={example}")
    from data_prep.window import parse_window

    windows = [list(parse_window(text)) for text in given.window]
    configure_jax()
    config = None
    if _manifest(Path(given.checkpoint)) is None:
        config = _recipe(given, windows)
    number = import_weights(given.checkpoint, given.workdir, config, windows)
    print(f"{number} tensors of {given.checkpoint} are in {given.workdir}")
    return 0


def _recipe(given: flags.FlagValues, windows: list[list[float]]) -> Any:
    config = given.config
    try:
        with config.unlocked():
            config.image_size, config.normalize = given.image_size, given.normalize
            config.model.output_activation = given.output_activation
            config.windows = windows
    except OSError:  # what stands for a recipe that could not be loaded raises this at any use
        name = config_flags.get_config_filename(given["config"])
        raise InputError(f"--config={name}: no such file; recipes are in configs/") from None
    return config


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
