"""Self-supervised pretraining for chest CT in JAX and Flax.

    model = ctssl_jax.load(RUN)
    z = model.embed("scan.zip")      # z.slices [S, D], z.mean [D], z.max [D]

`ctssl_jax.inference.pretrained` lists the methods of a model.

A file at the top is a command (`ctssl train --help`). A folder is a part of the
program; it imports only the folders that stand before it here, and of `data_prep` (which knows
nothing of this package) system, scan, masks, privacy, dataset and raw:

    models         Flax modules: autoencoder, classifiers, U-Nets, SE-ResNeXt
    ops            pure functions: losses, corruptions, augmentations, image scores
    data           a `data_prep.Dataset` -> batches of neighbouring slices and labels
    tasks          each strategy and application as a row: model, corruption, loss, scores
    runs           a run directory: `Run`, checkpoints, their damage, reports, pictures
    stats          AUROC, bootstrap, subgroups: numbers of results
    torch_bridge   the models in PyTorch, and names of tensors on both sides
    parallel       mesh of devices, processes of a run, lost hosts
    training       `train`: checks, start, loop, step, cost (a run directory comes out)
    evaluation     `evaluate`: a run on a split -> results JSON, comparisons
    release        `export` to PyTorch, safetensors and ONNX, and `import_weights` back
    inference      `load`, `embed`, `predict`: a run on scans or datasets
    probes         `probe`, `attributes`: what a frozen encoder knows
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctssl_jax.inference.pretrained import PretrainedModel

__all__ = ["load"]


def load(workdir: Any, checkpoint: str = "best", *, batch_size: int = 0) -> "PretrainedModel":
    """Load the model of a run: `ctssl_jax.inference.load`, imported when it is called.

    `workdir` may also name an export: its folder, a zip file of it, or `hf-hub:ORG/NAME@REVISION`.
    """
    from ctssl_jax.inference import pretrained
    from ctssl_jax.release.opening import as_run

    if isinstance(workdir, str | os.PathLike):
        workdir = as_run(workdir, "workdir")
    return pretrained.load(workdir, checkpoint, batch_size=batch_size)
