"""Names that moved, until the last caller imports them from where they are."""

from ctssl_jax.runs.run import Run, from_json, open_workdir, to_json  # noqa: F401
from ctssl_jax.training__recipe import check_dataset as _check_dataset
from data_prep.dataset import Dataset


def read_run(workdir):
    """`Run.open`."""
    run = Run.open(workdir)
    return run.config, run.preparation


def check_dataset(config, splits):
    """`training__recipe.check_dataset`."""
    dataset = Dataset.open(config.dataset)
    return dataset.preparation, _check_dataset(config, dataset, splits)
