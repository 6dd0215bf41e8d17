r"""Import weights from PyTorch into a run directory for `evaluate`, `embed` and `train`
(`--config.init_from`).

    ctssl import_torch --checkpoint=last.pth.tar --workdir=RUN
    ctssl import_torch --checkpoint=EXPORTED_FOLDER --workdir=RUN

The first form takes an autoencoder in the authors' layout, bare or as `{'model_state': ...}`, with
or without the prefix `module.`. The tensors give its sizes. The flags say how its slices were
prepared, by default as in the authors' release. The second form takes a folder of
`ctssl_jax.export`, of any model, which contains these facts. No code in a file is run: a file with
Python objects beside the tensors is refused.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

from typing import Any

from absl import flags

from ctssl_jax.training.recipe_files import define_flag
from data_prep.system import command_line
from data_prep.system.errors import InputError
from data_prep.system.stores import local_path


def define_flags() -> None:
    """Called only if this module is the program: other programs define flags of the same names."""
    flags.DEFINE_string("checkpoint", None, "Weights file, or folder of ctssl_jax.export.")
    flags.DEFINE_string("workdir", None, "New or empty folder for the run directory.")
    define_flag("masked_region", help="Recipe of the authors' layout; by default masked_region.")
    flags.DEFINE_integer("image_size", 512, "Side of the slices in pixels (authors' layout).")
    flags.DEFINE_multi_string(
        "window", ["50,350"], "level,width in HU (authors' layout); repeatable."
    )
    flags.DEFINE_enum(
        "normalize",
        "slice_minmax",
        ["window", "slice_minmax"],
        "Grey values (authors' layout); by default as in the authors' release.",
    )
    flags.DEFINE_enum(
        "output_activation", "tanh", ["tanh", "unit_tanh"], "Output range (authors' layout)."
    )


def start(values: flags.FlagValues) -> None:
    """Import as the flags ask, in this process."""
    for name, example in (("checkpoint", "FILE"), ("workdir", "DIR")):
        if not values[name].value:
            raise InputError(f"give --{name}={example}")
    from ctssl_jax.parallel.processes import configure_jax
    from data_prep.scan.window import parse_window

    windows = [list(parse_window(text)) for text in values.window]
    configure_jax()
    from ctssl_jax.release.importing import import_weights
    from ctssl_jax.torch_bridge.manifests import find_manifest

    checkpoint = local_path(values.checkpoint, "--checkpoint")
    is_export = find_manifest(checkpoint, "--checkpoint") is not None
    config = None if is_export else _recipe(values, windows)
    number = import_weights(values.checkpoint, values.workdir, config, windows)
    print(f"{number} tensors of {values.checkpoint} are in {values.workdir}")
    output = f"--output={command_line.beside(values.workdir, '-embeddings.npz')}"
    command_line.suggest("embed", f"--workdir={values.workdir}", "--input=SCANS", output)


def _recipe(values: flags.FlagValues, windows: list[list[float]]) -> Any:
    config = values.config
    with config.unlocked():
        config.image_size, config.normalize = values.image_size, values.normalize
        config.model.output_activation = values.output_activation
        config.windows = windows
    return config


def main(argv: list[str]) -> int:
    """Command line."""
    start(flags.FLAGS)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
