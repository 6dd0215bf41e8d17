r"""Pictures of what a model sees in training: crops, masks, noise, turns, views of a slab, targets.

    ctssl views --config=lejepa:small --dataset=DATASET --output_dir=VIEWS
    ctssl views --config=simmim:small --dataset=DATASET --output_dir=VIEWS --config.mask.block=16

VIEWS/views.png has a row for each of the first steps of each slice: the stored slice, then what the
training makes of it with the same seed. No training and no weights are needed, and any field of the
recipe can be tried by --config.FIELD=VALUE. The pictures show patients: keep them with the dataset.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

import sys

from absl import flags

from ctssl_jax.training.recipe_files import define_flag, recipe_names
from data_prep.system import command_line
from data_prep.system.errors import InputError


def define_flags() -> None:
    """Only where this module is the program: others define flags of the same names."""
    define_flag(help="Recipe, e.g. lejepa:small, or a file; --config.FIELD=VALUE.")
    flags.DEFINE_string("dataset", None, "Dataset directory; by default --config.dataset.")
    flags.DEFINE_string("output_dir", None, "Folder of views.png.")
    flags.DEFINE_integer("slices", 3, "Training slices.", lower_bound=1, upper_bound=64)
    flags.DEFINE_integer("draws", 3, "Steps that are shown of each.", lower_bound=1, upper_bound=64)


def start(flag_values: flags.FlagValues) -> None:
    """Draw as the flags ask, in this process."""
    config = flag_values.config
    if config is None:
        raise InputError(f"give --config=RECIPE; recipes: {', '.join(recipe_names())}")
    if flag_values.dataset:
        config.dataset = flag_values.dataset
    for name, value in (("dataset", config.dataset), ("output_dir", flag_values.output_dir)):
        if not value:
            raise InputError(f"give --{name}=DIR")
    config.lock()
    from ctssl_jax.parallel.processes import configure_jax

    configure_jax()
    from ctssl_jax.training.seen import page
    from data_prep.system.stores import local_path

    folder = local_path(flag_values.output_dir, "--output_dir", "choose a folder here")
    sizes = {"num_slices": flag_values.slices, "num_draws": flag_values.draws}
    print(f"written: {page(config, folder, **sizes)}", flush=True)


def main(argv: list[str]) -> int:
    """Command line."""
    start(flags.FLAGS)
    given = [word for word in sys.argv[1:] if word.startswith("--config")]
    if not any(word.startswith("--config.dataset") for word in given):
        given.append(f"--config.dataset={flags.FLAGS.config.dataset}")
    command_line.suggest("train", *given, "--workdir=RUN")
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
