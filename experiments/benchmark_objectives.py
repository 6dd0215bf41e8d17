"""What a training step of each objective costs: operations, memory and speed, on this machine.

    ctssl benchmark_objectives --dataset=DATASET --output_dir=COSTS
    ctssl benchmark_objectives --dataset=DATASET --size=reference --override=dtype=bfloat16 \\
        --objectives=mask_20,lejepa,dino --output_dir=COSTS

Operations are counted from the shapes of the model (all views, projector, teacher, forward and
backward), memory is what XLA expects of the compiled step on a device, and speed is that of a few
timed steps on the real data, views and reading included. `COSTS/costs.json` keeps the numbers. Run
it on a machine that does nothing else.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

import json
from pathlib import Path
from typing import Any

from absl import flags

from data_prep.system import command_line
from data_prep.system.errors import InputError
from data_prep.system.files import make_folder, write_text
from data_prep.system.stores import local_path

from .study import given, kept
from .study.cells import Recipe, Settings
from .study.objectives_figure import OBJECTIVES, TITLES
from .study.results import markdown


def costs(name: str, size: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The costs of an objective's training step.

    Args:
      name: in `OBJECTIVES`.
      size: of its recipe.
      fields: of its configuration, with the dataset.

    Returns:
      {"objective", "batch_size", "step_flops", "flops_a_slice", "memory_bytes": of a device,
      "slices_per_second", "waiting_for_data": share of the time, "device"}.

    Raises:
      InputError: something in the configuration or the dataset cannot work.
    """
    # not at the top: they import JAX, and --help should be fast
    import jax

    from ctssl_jax.training import estimate, setup

    objective = OBJECTIVES[name]
    config = Recipe(objective.recipe, size, objective.fields | fields).config()
    job = setup.check(config, None)
    program, memory = job.compile()
    times = estimate.timed_steps(program, job.training_batches())
    flops = kept.step_flops(config)
    return {
        "objective": name,
        "batch_size": config.batch_size,
        "step_flops": flops,
        "flops_a_slice": flops / config.batch_size,
        "memory_bytes": memory,
        "slices_per_second": times["slices_per_second"],
        "waiting_for_data": times["waiting_for_data"],
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The costs as Markdown."""
    return markdown(
        [
            {
                "objective": TITLES[row["objective"]],
                "batch": str(row["batch_size"]),
                "GFLOP a slice": f"{row['flops_a_slice'] / 1e9:.3f}",
                "GiB a device": f"{row['memory_bytes'] / 2**30:.2f}",
                "slices/s": f"{row['slices_per_second']:.1f}",
                "TFLOP/s": f"{row['flops_a_slice'] * row['slices_per_second'] / 1e12:.3f}",
            }
            for row in rows
        ]
    )


def define_flags() -> None:
    """Only where this module is the program: others define flags of the same names."""
    flags.DEFINE_string("dataset", None, "Dataset directory made by data_prep.prepare.")
    flags.DEFINE_string("output_dir", None, "Folder of costs.json.")
    flags.DEFINE_enum("size", "small", ["small", "reference"], "Size of the recipes.")
    flags.DEFINE_list("objectives", list(OBJECTIVES), "Objectives, separated by commas.")
    flags.DEFINE_multi_string(
        "override", [], "FIELD=VALUE of every recipe, e.g. dtype=bfloat16; repeatable."
    )


def main(argv: list[str]) -> int:
    """Command line."""
    flag = flags.FLAGS
    for name in ("dataset", "output_dir"):
        if not flag[name].value:
            raise InputError(f"give --{name}=DIR")
    for name in flag.objectives:
        if name not in OBJECTIVES:
            raise InputError(f"--objectives={name}: choose among {', '.join(OBJECTIVES)}")
    for override in flag.override:
        if "=" not in override:
            raise InputError(f"--override={override}: must be FIELD=VALUE")
    recipes = [OBJECTIVES[name].recipe for name in flag.objectives]
    of_all = Settings(Path(), Path(), flag.size, 0, 0, tuple(flag.override), "test")
    given.check_overrides(of_all, recipes)
    folder: Path = local_path(flag.output_dir, "--output_dir", "choose a folder here")
    make_folder(folder, "--output_dir")
    fields = {"dataset": flag.dataset} | dict(one.split("=", 1) for one in flag.override)
    from ctssl_jax.parallel.processes import configure_jax

    configure_jax()
    rows: list[dict[str, Any]] = []
    for name in flag.objectives:
        rows.append(costs(name, flag.size, fields))
        write_text(folder / "costs.json", json.dumps(rows, indent=2) + "\n")  # one by one
    print(f"{rows[0]['device']}, recipes {flag.size}\n\n{table(rows)}", flush=True)
    dataset = f"--dataset={flag.dataset}"
    command_line.suggest("objectives", "plan", dataset, "--workdir=STUDY", aside=True)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
