r"""Speed and memory of a training step: this project and the same model in PyTorch, in one run.

    ctssl benchmark_training --preset=64,128
    ctssl benchmark_training --preset=reference --dtype=bfloat16 \
        --batch_size=4,8,16,32 --sides=jax

A step is the forward pass in training mode, the loss of `masked_region` (0.2 MSE + 0.2
masked MSE + 0.8 vector quantization - 0.1 SSIM), the backward pass and a RAdam update. Both sides
start from the same weights and see the same images, so their first losses must agree. Repeats
alternate between the sides, so that a busy machine slows both. The columns are

    ms a step   the median, and the spread of the middle half
    of peak     the arithmetic of the model (3 x the forward pass, `flops_per_slice`) over the
                fastest square matrix product in the same dtype that either library does in the same
                run (float32 may be TF32 there, as in the convolutions)
    compiled    the memory that XLA expects the step to need
    peak        the highest memory of the device: for JAX since the program began (batch sizes are
                tried in rising order), for PyTorch within the row; "-" where it is unknown
    compile     the time of tracing and compilation together; programs of earlier runs are not used

On a GPU both sides share the memory: to measure the largest batch of each, run --sides=jax and
--sides=torch one after the other. Without PyTorch (`pip install '.[torch]'`) only this project is
timed.

--profile=FOLDER traces a few more steps of this project, writes the trace and the compiled program
there, and prints the operations that take most of a step.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

import dataclasses
import functools
import importlib.util
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from absl import flags
from flax import nnx

from ctssl_jax.models.vqvae import VQVAE, VQVAEConfig, flops_per_slice
from ctssl_jax.parallel.processes import configure_jax
from data_prep.system import command_line
from data_prep.system.errors import InputError
from data_prep.system.files import write_json

from .bench.sides import (
    GIB,
    example_batch,
    make_jax_side,
    make_torch_side,
)
from .bench.timing import matmul_peak, time_sides

# image side, hidden, depth, batch
PRESETS = {
    "64": (64, (16, 32), 2, 8),
    "64wide": (64, (32, 64), 4, 16),
    "128": (128, (32, 64), 4, 8),
    "256": (256, (64, 128), 6, 4),
    "reference": (512, (256, 512), 18, 1),
}


def _row(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _gib(value: int | None) -> str:
    return "-" if value is None else f"{value / GIB:.2f}"


def _row_of(row: dict) -> str:
    """A result as a row of the table."""
    cells = [row[name] for name in ("image_size", "hidden", "depth", "batch_size", "dtype", "side")]
    if "failed" in row:
        return _row(*cells, row["failed"], *["-"] * 7)
    low, _, high = statistics.quantiles(row["times_ms"], n=4)
    compiling = row["compile_seconds"]
    return _row(
        *cells,
        f"{row['median_ms']:.1f} ({low:.1f} to {high:.1f})",
        f"{row['slices_per_s']:.1f}",
        f"{100 * row['of_peak']:.1f} %",
        _gib(row["compiled_bytes"]),
        _gib(row["peak_bytes"]),
        "-" if compiling is None else f"{compiling:.1f}",
        f"{row['first_loss']:.6f}",
    )


def run_preset(preset: str, flag: flags.FlagValues, sides: list[str], peak: float) -> list[dict]:
    """Time one preset at every batch size; prints a line a side and returns the lines as dicts."""
    image_size, hidden, depth, batch_size = PRESETS[preset]
    use_gpu = jax.devices()[0].platform == "gpu"
    switches = {"dtype": flag.dtype, "remat": flag.remat, "scan": flag.scan}
    config = VQVAEConfig(hidden=hidden, depth=depth, **switches)
    model = VQVAE(config, rngs=nnx.Rngs(0))
    sizes = sorted(map(int, flag.batch_size)) or [batch_size]
    rows = []
    for size in sizes:
        batch = example_batch(size, image_size)
        makers = {
            "jax": functools.partial(make_jax_side, model, batch),
            "torch": functools.partial(
                make_torch_side,
                model,
                config,
                batch,
                use_gpu=use_gpu,
                compiled=flag.torch_compile,
            ),
        }
        results, profile = time_sides(
            {side: makers[side] for side in sides},
            repeats=flag.repeats,
            steps=flag.steps,
            profile=Path(flag.profile, f"{preset}_batch{size}") if flag.profile else None,
        )
        for side, result in results.items():
            model_settings = {"image_size": image_size, **dataclasses.asdict(config)}
            row = {"preset": preset, **model_settings, "batch_size": size, "side": side, **result}
            if "failed" not in result:
                speed = row["slices_per_s"] = 1000 * size / result["median_ms"]
                row["of_peak"] = 3 * flops_per_slice(config, image_size) * speed / peak
            print(_row_of(row), flush=True)
            rows.append(row)
        if profile:
            print(f"\n{profile}\n", flush=True)
        # a larger batch fits no better
        sides = [side for side in sides if "failed" not in results[side]]
    return rows


def best_batches(rows: list[dict]) -> list[str]:
    """A line for the fastest batch size of each side, and one that compares the sides there."""
    fastest = {}
    for row in rows:
        if row.get("slices_per_s", 0) > fastest.get(row["side"], {}).get("slices_per_s", 0):
            fastest[row["side"]] = row
    lines = [
        f"{side}: {row['slices_per_s']:.1f} slices/s at batch {row['batch_size']}"
        for side, row in fastest.items()
    ]
    if {"jax", "torch"} <= set(fastest):
        ratio = fastest["jax"]["slices_per_s"] / fastest["torch"]["slices_per_s"]
        lines.append(f"jax / torch, each at its best batch: {ratio:.2f}")
    return lines


def define_flags() -> None:
    """Only where this module is the program: another one may define flags of the same names."""
    flags.DEFINE_list("preset", ["64"], f"One or more of {','.join(PRESETS)}, comma-separated.")
    flags.DEFINE_list(
        "batch_size", [], "Batch sizes to try, comma-separated; default: the preset's."
    )
    flags.DEFINE_list("sides", ["jax", "torch"], "jax, torch or both, comma-separated.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of the convolutions.")
    flags.DEFINE_bool("remat", False, "Recompute residual blocks in the backward pass (JAX).")
    flags.DEFINE_bool("scan", False, "Residual blocks as one loop (JAX).")
    flags.DEFINE_bool("torch_compile", False, "PyTorch through torch.compile.")
    flags.DEFINE_integer("repeats", 7, "Repeats, over which the spread is.", lower_bound=2)
    flags.DEFINE_integer("steps", 5, "Steps timed in each repeat.", lower_bound=1)
    flags.DEFINE_string("profile", "", "Folder for a trace of this project.")
    flags.DEFINE_string("json", "", "Write the results to this file, too.")


def _chosen(name: str, words: list[str], known: Iterable[str]) -> list[str]:
    if not words or (unknown := [word for word in words if word not in known]):
        given = unknown[0] if words else ""
        raise InputError(f"--{name}={given}: choose of {', '.join(known)}")
    return words


def main(argv: list[str]) -> int:
    """Command line."""
    flag = flags.FLAGS
    presets = _chosen("preset", flag.preset, PRESETS)
    sides = _chosen("sides", flag.sides, ("jax", "torch"))
    if flag.batch_size:
        command_line.whole_numbers("batch_size", flag.batch_size)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory to PyTorch
    configure_jax()
    jax.config.update("jax_enable_compilation_cache", False)
    if "torch" in sides and importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed (pip install '.[torch]'): timing this project only")
        sides = [side for side in sides if side != "torch"] or ["jax"]

    device = jax.devices()[0]
    peaks = {
        side: matmul_peak(side, flag.dtype, use_gpu=device.platform == "gpu") for side in sides
    }
    measured = ", ".join(f"{side} {peak / 1e12:.3f} TFLOP/s" for side, peak in peaks.items())
    print(
        f"{device.device_kind}, {os.cpu_count()} CPU cores; fastest {flag.dtype} matrix "
        f"product: {measured}\n"
    )
    titles = "pixels,hidden,depth,batch,dtype,side,ms a step,slices/s,of peak".split(",")
    print(_row(*titles, "compiled GiB", "peak GiB", "compile s", "first loss"))
    print(_row(*["---"] * 13))
    rows = [
        row for preset in presets for row in run_preset(preset, flag, sides, max(peaks.values()))
    ]
    for preset in presets:
        best = best_batches([row for row in rows if row["preset"] == preset])
        print("\n".join([f"\n{preset}", *best]))
    if flag.json:
        content = {
            "device": device.device_kind,
            "cpu_count": os.cpu_count(),
            "matmul_flops": peaks,
            "rows": rows,
        }
        write_json(Path(flag.json), content)
    recipe, dataset = "--config=masked_region", "--config.dataset=DATASET"
    command_line.suggest("train", "--estimate", recipe, dataset, aside=True)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
