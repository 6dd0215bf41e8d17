"""The cost of a training step on TPUs that need not be there: compiled for them ahead of time."""

import contextlib
import copy
import importlib.util
import math
import os
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from ctssl_jax.parallel.mesh import make_mesh
from ctssl_jax.runs.reports import say
from ctssl_jax.tasks.interface import step_flops
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training.compiled_text import Work, count_work
from ctssl_jax.training.recipe import check_config
from ctssl_jax.training.state import slices_of_a_device
from ctssl_jax.training.step import Program, make_program, trace_step
from data_prep.system.errors import InputError
from data_prep.system.extras import pip_install


class Chip(NamedTuple):
    """Published figures of a TPU chip, from the pages on v4, v5e, v5p and v6e in Google's Cloud TPU
    documentation (docs.cloud.google.com/tpu/docs, read in 2026).

    memory_gib: HBM.
    memory_speed: of HBM, GB/s.
    peak: bfloat16, TFLOP/s.
    link_speed: GB/s of an all-reduce: that of a pod divided by its chips; for v5p half of the
      bidirectional bandwidth of its links.
    clock: GHz: the peak divided by 2 x 128^2 operations of each matrix unit a cycle (v6e: 256^2).
    """

    memory_gib: int
    memory_speed: float
    peak: float
    link_speed: float
    clock: float


CHIPS = {
    "TPU v4": Chip(32, 1200, 275, 268, 1.05),
    "TPU v5 lite": Chip(16, 819, 197, 200, 1.50),
    "TPU v5": Chip(95, 2765, 459, 600, 1.75),
    "TPU v6 lite": Chip(32, 1600, 918, 400, 1.75),
}
CHIPS["TPU v5p"] = CHIPS["TPU v5"]
# Sides of a topology and chips of a pod, from the same pages: libtpu compiles for any.
PODS = {"v4": (3, 4096), "v5e": (2, 256), "v5p": (3, 8960), "v6e": (2, 256)}
FEWEST_SLICES = 8  # a chip: XLA rewrites convolutions of fewer images, see `rewritten`


def topology_devices(name: str) -> list[Any]:
    """The devices of a TPU topology, which need not be there.

    Args:
      name: `KIND:SHAPE` or `KIND:SHAPE:SLICES`, e.g. `v5e:4x4`, `v5p:2x2x4`, `v6e:16x16:2`.

    Raises:
      InputError: no such topology, or libtpu is missing.
    """
    found = re.fullmatch(r"(v\w+):([1-9]\d*(?:x[1-9]\d*)+)(?::([1-9]\d*))?", name)
    kind, shape, num_slices = (found[1], found[2], int(found[3] or 1)) if found else ("", "", 1)
    sides = [int(side) for side in shape.split("x")] if shape else []
    num_sides, pod = PODS.get(kind, (0, 0))
    if len(sides) != num_sides or not 0 < math.prod(sides) <= pod:
        raise InputError(
            f"--topology={name}: must be KIND:SHAPE or KIND:SHAPE:SLICES: v4 and v5p with three "
            "sides (v4:2x2x4, at most 4,096 chips; v5p:4x4x4, 8,960), v5e and v6e with two "
            "(v5e:4x4, v6e:16x16:2; at most 256 chips a slice)"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology needs libtpu, but no TPU: {pip_install('tpu')}, on Linux, best in an "
            "environment of its own"
        )
    settings: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if kind == "v4":  # JAX takes the two cores of a chip as one device there
        settings["chip_config_name"] = "megacore"
    if math.prod(sides) == 1:
        settings["chips_per_host_bounds"] = [1, 1, 1]
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # asks no server which TPU this machine is
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is opened
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"{kind}-1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(variable, value)
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{shape}", **settings
        )
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"--topology={name}: libtpu knows no such topology ({str(error).splitlines()[0]}); "
            "choose a shape that the documentation of Cloud TPU lists, e.g. 2x2x1, 2x2x4, 4x4x4 "
            "or 2x2, 2x4, 4x4, 8x8"
        ) from None
    return list(topology.devices)


def program_for(config: ml_collections.ConfigDict, name: str) -> Program:
    """The functions of a run on a TPU topology, not yet compiled.

    No dataset is read: the images have the size and the windows of the recipe.

    Raises:
      InputError: no such topology, or something in the configuration cannot work on it.
    """
    devices = topology_devices(name)
    config = copy.deepcopy(config).unlock()
    config.dataset = config.dataset or "-"  # which `check_config` asks for
    if config.get("num_classes") == 0:
        raise InputError("config.num_classes=0 asks the dataset; give --config.num_classes=N")
    check_config(config, len(devices))
    task, channels = get_task(config.task), len(config.windows) or config.model.in_channels
    if task.stacked and not config.windows:
        channels //= len(task.offsets(config))
    return make_program(config, task, channels, make_mesh(devices, config.fsdp_devices))


def estimate_topology(config: ml_collections.ConfigDict, name: str) -> None:
    """Compile the training step for a TPU topology and print what it needs. No file is written.

    Args:
      config: a recipe.
      name: of the topology, as `topology_devices` takes it.

    Raises:
      InputError: as `program_for`, or the step does not fit into the chips' memory.
    """
    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine stays free
    with _without_compilation_cache():
        _estimate(config, name)


@contextlib.contextmanager
def _without_compilation_cache() -> Iterator[None]:
    """What is compiled for devices that are not there can be written to JAX's cache, not read."""
    enabled = jax.config.jax_enable_compilation_cache
    _use_compilation_cache(False)
    try:
        yield
    finally:
        _use_compilation_cache(enabled)


def _use_compilation_cache(enabled: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()  # JAX asks only once whether there is one


def _estimate(config: ml_collections.ConfigDict, name: str) -> None:
    program = program_for(config, name)
    config, mesh = program.definition.config, program.definition.mesh
    devices = mesh.devices.flat
    say(
        f"topology     {name}: {mesh.size} x {devices[0].device_kind} on "
        f"{len({device.process_index for device in devices})} host(s), mesh of "
        f"{mesh.shape['data']} (data) x {mesh.shape['fsdp']} (fsdp)"
    )
    say(
        f"batch        {config.batch_size} slices = {mesh.size} chip(s) x {config.microbatches} "
        f"microbatch(es) x {slices_of_a_device(config, mesh)}, {config.dtype}, "
        f"remat={config.remat}, scan={config.scan}"
    )
    began = time.monotonic()
    compiled = compile_ahead(program)
    say(f"compiled     in {time.monotonic() - began:.0f} s")
    for line in lines(program, compiled.memory_analysis(), count_work(compiled.as_text())):
        say(line)


def advice(config: ml_collections.ConfigDict, mesh: Mesh) -> list[str]:
    """Lines for the screen: better settings that are known for the TPUs of a mesh; else none.

    Found with `estimate_topology`; `parallel/README.md` has the table.
    """
    chip = CHIPS.get(mesh.devices.flat[0].device_kind)
    if chip is None:
        return []
    better = {}
    if config.dtype != "bfloat16":
        better["dtype"] = "bfloat16"
    if slices_of_a_device(config, mesh) < FEWEST_SLICES:
        better["batch_size"] = FEWEST_SLICES * mesh.size * config.microbatches
    if not better:
        return []
    flags = " ".join(f"--config.{name}={value}" for name, value in better.items())
    return [
        f"WARNING      {mesh.devices.flat[0].device_kind}: {flags} takes less time a slice; see "
        "--estimate --topology"
    ]


def compile_ahead(program: Program) -> Any:
    """The compiled step of a program whose devices are not there.

    Raises:
      InputError: it does not fit into their memory.
    """
    config, mesh = program.definition.config, program.definition.mesh
    try:
        return trace_step(program).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = re.findall(r"\b([\d.]+[KMGT])\b", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not re.search("hbm", str(error), re.I):
            raise
        raise InputError(
            f"the step needs {sizes[0]}iB of the {sizes[1]}iB that a chip "
            f"({mesh.devices.flat[0].device_kind}) has for it; {_with_less_memory(config, mesh)}"
        ) from None


def _with_less_memory(config: ml_collections.ConfigDict, mesh: Mesh) -> str:
    if config.dtype != "bfloat16":
        return "set --config.dtype=bfloat16"
    if not config.remat:
        return "set --config.remat=True"
    slices = slices_of_a_device(config, mesh)
    if slices > 1:
        return (
            f"lower --config.batch_size to {config.batch_size * (slices // 2) // slices}, or take "
            "more chips"
        )
    return "set --config.fsdp_devices, or take a smaller model"


def images_of_a_pass(config: ml_collections.ConfigDict, slices: int) -> int:
    """Images that one pass of the encoder takes of so many slices: views of one size together."""
    views = config.get("views")
    return slices * (max(views.num_global, views.num_local) if views else 1)


def rewritten(work: Work, images: int) -> bool:
    """Whether XLA took the convolutions of a step apart, whose passes take so many images.

    Of few images a chip it makes many small ones (space-to-batch), by copies of every map: the
    reference model at 4 slices a chip moves 47 GB a slice then, at 8 a quarter of that.
    """
    return work.largest_map > images


def lines(program: Program, memory: Any, work: Work) -> list[str]:
    """The estimate as lines for the screen.

    Args:
      program: for devices of a kind in `CHIPS`.
      memory: from `jax.stages.Compiled.memory_analysis`.
      work: of one device in a step or microbatch.
    """
    config, mesh = program.definition.config, program.definition.mesh
    slices, kind = slices_of_a_device(config, mesh), mesh.devices.flat[0].device_kind
    chip, gib = CHIPS[kind], 2**30
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    operations, traffic = work.operations / slices, work.traffic / slices
    unit, name_of_unit = (1e12, "TFLOP") if operations > 1e11 else (1e9, "GFLOP")
    of_model = step_flops(program.definition.task, config)
    by_compute, by_memory = (
        1000 * operations / (1e12 * chip.peak),
        1000 * traffic / (1e9 * chip.memory_speed),
    )
    bound = max(by_compute, by_memory)
    sent = sum(
        (2 if name == "all-reduce" else 1) * size for name, size in work.collective_bytes.items()
    )
    found = [
        f"memory       {(kept + memory.temp_size_in_bytes) / gib:.2f} of {chip.memory_gib} GiB a "
        f"chip: {kept / gib:.2f} state and batch, {memory.temp_size_in_bytes / gib:.2f} while the "
        "step runs",
        f"arithmetic   {operations / unit:.3g} {name_of_unit} a slice in convolutions and matrix "
        f"products (the model: {of_model / unit:.3g}), loops and recomputation included",
        f"traffic      {traffic / 1e9:.3g} GB a slice between a chip and its memory",
        "collectives  "
        + (
            ", ".join(
                f"{number} {name} ({work.collective_bytes[name] / 2**20:,.1f} MiB)"
                for name, number in sorted(work.collectives.items())
            )
            or "none"
        )
        + f" a step{' and microbatch' if config.microbatches > 1 else ''}; the links of a slice "
        f"take {1000 * sent / (1e9 * chip.link_speed):.2g} ms for it at {chip.link_speed:g} GB/s",
        f"bound        {bound:.3g} ms a slice and chip by "
        f"{'arithmetic' if by_compute >= by_memory else 'traffic'}, "
        f"{mesh.size * 1000 / bound:,.0f} slices/s on all ({by_compute:.3g} ms at {chip.peak:g} "
        f"TFLOP/s, {by_memory:.3g} ms at {chip.memory_speed:g} GB/s)",
        f"compiler     XLA expects {work.cycles / slices / (1e6 * chip.clock):.3g} ms a slice and "
        f"chip, its instructions one after the other at {chip.clock:g} GHz",
    ]
    if rewritten(work, images_of_a_pass(config, slices)):
        found.append(
            f"WARNING      {slices} slices a chip are few: XLA makes {work.largest_map} smaller "
            f"maps of them by copies; give each chip {FEWEST_SLICES} or more: --config.batch_size="
            f"{FEWEST_SLICES * mesh.size * config.microbatches}, with --config.remat=True where "
            "memory asks for it"
        )
    if work.untold_loops:
        found.append(
            f"WARNING      {work.untold_loops} loop(s) do not tell how often they run and are "
            "counted once: arithmetic, traffic, collectives and bound may be too low"
        )
    return found
