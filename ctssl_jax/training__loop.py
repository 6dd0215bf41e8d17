"""Training, from the first step or from where a run stopped, to the last."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from ctssl_jax import health, metrics, pictures
from ctssl_jax import training__warm_start as warm_start
from ctssl_jax.distributed import stop_requests
from ctssl_jax.reports import Reports, duration, say
from ctssl_jax.runs.checkpoints import Checkpoints, restore
from ctssl_jax.training__scoring import evaluate_split, render_pictures
from ctssl_jax.training__setup import Job, check
from ctssl_jax.training__state import TrainState, check_finite, check_state
from ctssl_jax.training__step import Feed, Program, Report, compiled_program, run_step, take_report
