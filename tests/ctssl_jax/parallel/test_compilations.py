"""Every compilation of JAX is a work that `silence` can name."""

import functools

import jax
import jax.numpy as jnp

from ctssl_jax.parallel.processes import name_compilations
from data_prep.system import silence


def train_step(number, x):
    return x * number


def test_each_phase_begins_and_ends_under_the_function_s_name(monkeypatch):
    seen = []
    monkeypatch.setattr(silence, "begin", lambda work: seen.append(("begin", work)))
    monkeypatch.setattr(silence, "end", lambda work: seen.append(("end", work)))
    name_compilations()
    name_compilations()  # once is enough
    jax.jit(functools.partial(train_step, 3)).lower(jnp.ones(2)).compile()
    of_step = [what for what, work in seen if work == "compiling    the training step"]
    assert of_step == ["begin", "end"] * 3  # traced, lowered, compiled
