"""Names that moved, until the last caller imports them from where they are."""

import copy

from ctssl_jax.runs.run import Run


def read_ancestors(workdir):
    """`Run.ancestors`."""
    return copy.deepcopy(Run.open(workdir).ancestors)


def read_patients(workdir):
    """`Run.patients`."""
    return Run.open(workdir).patients
