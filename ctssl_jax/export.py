r"""Export a checkpoint to PyTorch, safetensors and ONNX, with proof that it is the same model.

    ctssl export --workdir=RUN --output_dir=FOLDER --license=CC-BY-NC-4.0 \
        --format=torch,safetensors,onnx

FOLDER then contains the files that a PyTorch user needs:

    ctssl_torch.py        the models, `load`, `preprocess` and a DICOM reader in one file
    weights.pt            state_dict; for an autoencoder in the authors' layout
    weights.safetensors   the same
    model.onnx            images [batch, C, H, W] in [0, 1] -> the model's outputs
    model_fp16.onnx       the same in half precision (--format=onnx_fp16)
    model_int8.onnx       with convolutions of 8-bit integers (--format=onnx_int8)
    manifest.json         architecture, preprocessing, training, data, results, licence, parity,
                          checksums
    README.md             the same as a model card
    test_input.npz        synthetic slices and the model's outputs for them;
                          `python ctssl_torch.py .` computes them again

`--format=hub` writes a model hub's repository instead: the weights as model.safetensors, with
config.json, preprocessor_config.json and a card with the hub's own fields.
`--push=ORG/NAME` lists what would leave this machine, `--upload` beside it sends it.

The folder does not name patients. The export fails if any layer of the PyTorch model differs from
the same layer in JAX by more than 1e-4 of the layer's largest value.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

from absl import flags

from data_prep.system import command_line
from data_prep.system.errors import InputError
from data_prep.system.stores import local_path


def define_flags() -> None:
    """Called only if this module is the program: other programs define flags of the same names."""
    flags.DEFINE_string(
        "workdir", None, "Run directory of ctssl_jax.train or ctssl_jax.import_torch."
    )
    flags.DEFINE_string("output_dir", None, "New or empty folder.")
    flags.DEFINE_list(
        "format",
        ["torch", "safetensors"],
        "torch, safetensors, onnx, onnx_fp16, onnx_int8, separated by commas; hub for a model "
        "hub's repository.",
    )
    flags.DEFINE_string(
        "license",
        None,
        "Licence of the weights (required): it follows from the data and from the initial weights.",
    )
    flags.DEFINE_string(
        "checkpoint", "best", "best (by config.best_by), last, last_good (undamaged), or a step."
    )
    flags.DEFINE_multi_string(
        "results", [], "Results file of ctssl_jax.evaluate or probe for the model card; repeatable."
    )
    flags.DEFINE_string(
        "public_series",
        None,
        "Table (CSV) of a public collection's patients, studies and series: those of its series "
        "that the model was trained on are listed in public_series.csv. No others are told.",
    )
    flags.DEFINE_string(
        "pseudonym_key_file",
        None,
        "Key of the dataset's pseudonyms, for --public_series (default: in DATASET-audit).",
    )
    flags.DEFINE_string(
        "push",
        "",
        "ORG/NAME of a model hub: list the files that a repository would get from --output_dir "
        "(with --workdir, after the export).",
    )
    flags.DEFINE_bool("upload", False, "Send them.")
    flags.DEFINE_integer("num_test_slices", 2, "Synthetic slices that parity is measured on.")
    flags.DEFINE_string(
        "dataset",
        None,
        "Where the dataset of the training is now: for the card's cohort table, --public_series, "
        "and slices that calibrate onnx_int8 and measure it and onnx_fp16.",
    )
    flags.DEFINE_integer(
        "num_dataset_slices", 32, "Training slices that calibrate, validation slices that measure."
    )


def start(values: flags.FlagValues) -> None:
    """Export as the flags ask, in this process."""
    if values.upload and not values.push:
        raise InputError("--upload needs the repository: give --push=ORG/NAME")
    for name in ("output_dir",) if values.push else ("workdir", "output_dir"):
        if not values[name].value:
            raise InputError(f"give --{name}=DIR")
    if values.workdir:
        _export(values)
    if values.push:
        from ctssl_jax.release.hub import push

        folder = local_path(values.output_dir, "--output_dir")
        push(folder, values.push, upload=values.upload)


def _export(values: flags.FlagValues) -> None:
    from ctssl_jax.parallel.processes import configure_jax

    configure_jax()
    from ctssl_jax.release import export

    export(
        values.workdir,
        values.output_dir,
        [name for name in values.format if name],
        values.license or "",
        checkpoint=values.checkpoint,
        results=values.results,
        num_test_slices=values.num_test_slices,
        dataset=values.dataset,
        public_series=values.public_series,
        pseudonym_key_file=values.pseudonym_key_file,
        num_dataset_slices=values.num_dataset_slices,
    )
    print(f"next:        python {values.output_dir}/ctssl_torch.py {values.output_dir}", flush=True)


def main(argv: list[str]) -> int:
    """Command line."""
    start(flags.FLAGS)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
