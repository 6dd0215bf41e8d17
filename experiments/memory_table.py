"""Memory of a training step of the reference model, by batch size and switches.

    ctssl memory_table                                      # on any machine
    ctssl memory_table --measure --batch_sizes=1,2,4,8      # as XLA expects it here

The first table is computed. It adds up, for one device,

* parameters, gradients and the two moments of RAdam, float32, each divided by the number of devices
  that share them;
* if they are shared, the parameters gathered for the computation, once, float32;
* the arrays of the forward pass that the backward pass needs: the residuals that JAX saves for the
  loss of `experiments.bench.sides`, all at once, with copies of kernels in the convolutions' dtype;
* working memory: three float32 arrays as large as the largest activation (a gradient coming in, one
  going out, and the workspace of a convolution library), and with recomputed blocks the residuals
  of one block;
* with --scan the stacked gradients of the blocks (gradients of parameters are among the residuals).

Residuals are traced for one and for two slices, and follow a line. The memory that XLA saves or
adds by merging, moving and padding is unknown, and so is the memory of the device's software:
a tenth of each device is left free. With gradients accumulated over microbatches, read the column
of the smaller batch.

--measure compiles the step of each cell and prints the memory that XLA expects (one device, so
nothing is shared). A CPU says little about a GPU: there XLA undoes recomputation outside a scan.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

import itertools

import jax
from absl import flags

from ctssl_jax.models.vqvae import Encoder, VQVAEConfig
from data_prep.system import command_line
from data_prep.system.errors import InputError

from .bench import memory
from .bench.sides import GIB

DEVICE_GIB = (16, 40, 80, 141)
SHARING_DEVICES = 8


def table(
    batch_sizes: list[int], image_size: int, *, measured: bool, scan: bool, **sizes
) -> list[str]:
    """Lines of the Markdown table.

    Args:
        batch_sizes: slices a device, one column each.
        image_size: side in pixels.
        measured: compile every cell instead of computing it.
        scan: residual blocks as one loop.
        sizes: of the model, for `VQVAEConfig`.
    """
    title = ["dtype", "blocks", "parameters", *(f"batch {size}" for size in batch_sizes)]
    title += [] if measured else [f"fits {size} GiB" for size in DEVICE_GIB]
    rows = [title, ["---"] * len(title)]
    choices = itertools.product(
        ("float32", "bfloat16"), (False, True), (1,) if measured else (1, SHARING_DEVICES)
    )
    for dtype, remat, sharing in choices:
        config = VQVAEConfig(dtype=dtype, remat=remat, scan=scan, **sizes)
        row = [
            dtype,
            "recomputed" if remat else "kept",
            f"shared by {sharing}" if sharing > 1 else "on each device",
        ]
        if measured:
            needed = [memory.measure(config, image_size, size) for size in batch_sizes]
        else:
            fixed, per_slice = memory.estimate_bytes(config, image_size, sharing)
            needed = [fixed + size * per_slice for size in batch_sizes]
        row += [f"{value / GIB:.3g}" for value in needed]
        if not measured:
            row += [str(memory.largest_batch(fixed, per_slice, size)) for size in DEVICE_GIB]
        rows.append(row)
    return ["| " + " | ".join(row) + " |" for row in rows]


def define_flags() -> None:
    """Only where this module is the program: another one may define flags of the same names."""
    flags.DEFINE_list(
        "batch_sizes", ["1", "2", "4", "8", "16", "32", "64"], "Slices a device, comma-separated."
    )
    flags.DEFINE_integer("image_size", 512, "Side in pixels.", lower_bound=4)
    flags.DEFINE_list("hidden", ["256", "512"], "The two widths of the model.")
    flags.DEFINE_integer(
        "depth", 18, "Residual blocks, in the encoder and in the decoder.", lower_bound=0
    )
    flags.DEFINE_bool("scan", False, "Residual blocks as one loop.")
    flags.DEFINE_bool("measure", False, "Compile every cell and print what XLA expects to need.")


def main(argv: list[str]) -> int:
    """Command line."""
    flag = flags.FLAGS
    batch_sizes = command_line.whole_numbers("batch_sizes", flag.batch_sizes)
    hidden = tuple(command_line.whole_numbers("hidden", flag.hidden))
    if len(hidden) != 2:
        raise InputError(f"--hidden={','.join(flag.hidden)}: give two widths, such as 256,512")
    if flag.image_size % Encoder.stride:
        raise InputError(
            f"--image_size={flag.image_size}: must be a multiple of {Encoder.stride}, since the "
            "encoder halves images twice"
        )
    device = jax.devices()[0].device_kind
    how = (
        f"expected by XLA, compiled for one {device}" if flag.measure else "computed, not measured"
    )
    loop = ", blocks in a scan" if flag.scan else ""
    size = flag.image_size
    print(f"GiB a device for a training step at {size} x {size}{loop}; {how}\n")
    sizes = {"hidden": hidden, "depth": flag.depth}
    print("\n".join(table(batch_sizes, size, measured=flag.measure, scan=flag.scan, **sizes)))
    recipe, dataset = "--config=masked_region", "--config.dataset=DATASET"
    slices = f"--config.batch_size={batch_sizes[-1]}"
    command_line.suggest("train", "--estimate", recipe, dataset, slices, aside=True)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
