r"""Export a checkpoint to PyTorch, safetensors and ONNX, with proof that it is the same model.

    python -m ctssl_jax.export --workdir=RUN --output_dir=FOLDER --format=torch,safetensors,onnx --license=CC-BY-NC-4.0

FOLDER then holds all that a PyTorch user needs:

    ctssl_torch.py        the models, `load`, `preprocess` and a DICOM reader in one file
    weights.pt            state_dict; an autoencoder's is in the authors' layout
    weights.safetensors   the same
    model.onnx            images [batch, C, H, W] in [0, 1] -> the model's outputs
    manifest.json         architecture, preprocessing, training, data, results, licence, parity,
    checksums README.md             the same as a model card
    test_input.npz        synthetic slices and what the model makes of them;
    `python ctssl_torch.py .` checks it

Nothing of it names a patient. The export fails if any layer of the PyTorch model differs from this
package's by more than 1e-4 of the layer's largest value.
"""

from absl import flags

from data_prep.system import command_line
from data_prep.system.errors import InputError


def define_flags() -> None:
    """Only where this module is the program."""
    flags.DEFINE_string(
        "workdir", None, "Run directory of ctssl_jax.train or ctssl_jax.import_torch."
    )
    flags.DEFINE_string("output_dir", None, "Folder that is made.")
    flags.DEFINE_list(
        "format", ["torch", "safetensors"], "Of torch, safetensors, onnx, separated by commas."
    )
    flags.DEFINE_string(
        "license",
        None,
        "Licence of the weights (required): it follows from the data and from the initial weights.",
    )
    flags.DEFINE_string(
        "checkpoint", "best", "best (by validation loss), last, last_good (undamaged), or a step."
    )
    flags.DEFINE_multi_string(
        "results", [], "Results of ctssl_jax.evaluate for the model card; may be repeated."
    )
    flags.DEFINE_integer("num_test_slices", 2, "Synthetic slices that parity is measured on.")


def start(given: flags.FlagValues) -> bool:
    """Export as the flags ask, in this process."""
    for name in ("workdir", "output_dir"):
        if not given[name].value:
            raise InputError(f"give --{name}=DIR")
    from ctssl_jax.parallel.processes import configure_jax

    configure_jax()
    from ctssl_jax.release import export

    export(
        given.workdir,
        given.output_dir,
        [name for name in given.format if name],
        given.license or "",
        checkpoint=given.checkpoint,
        results=given.results,
        num_test_slices=given.num_test_slices,
    )
    return True


def main(argv: list[str]) -> int:
    """Command line."""
    start(flags.FLAGS)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
