r"""List the recipes, or the fields of one recipe.

    ctssl recipes
    ctssl recipes masked_region --size=small
    ctssl recipes --markdown     # the tables of configs/README.md

A recipe is named in `ctssl train --config=masked_region:small`, and
`--config.FIELD=VALUE` sets a field.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

from absl import flags

from ctssl_jax.training.recipe_files import recipe_names
from data_prep.system import command_line


def define_flags() -> None:
    """Called only if this module is the program: other programs define flags of the same names."""
    flags.DEFINE_enum("size", "reference", ["reference", "small"], "Size of the recipe.")
    flags.DEFINE_bool("markdown", False, "All fields of all recipes, as in configs/README.md.")


def main(argv: list[str]) -> int:
    """Command line."""
    from ctssl_jax.training.recipe_pages import describe, list_recipes, markdown

    if flags.FLAGS.markdown:
        print(markdown())
        return 0
    if argv[1:]:
        print(describe(argv[1], flags.FLAGS.size), flush=True)
        config = f"--config={argv[1]}" + (":small" if flags.FLAGS.size == "small" else "")
        command_line.suggest(
            "train", config, "--config.dataset=DATASET", "--workdir=RUN", aside=True
        )
    else:
        print(list_recipes(), flush=True)
        command_line.suggest("recipes", "masked_region", aside=True)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main, verbs=recipe_names())
