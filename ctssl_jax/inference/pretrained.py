"""A trained model as a function of scans.

    model = ctssl_jax.load(RUN)
    z = model.embed("scan.zip")          # or a folder of one scan, a DICOM or NIfTI file
    z = model.embed(hu, affine)          # any 3-D array of HU, with the affine of nibabel
    z.slices, z.mean, z.max              # [S, D], [D], [D]

Slices are oriented, resized and windowed as the data of the run were. The embedding of a slice is
`StepOutput.embedding` of the uncorrupted slice: the mean of the encoder's latents over the slice
(of a joint embedding of what `config.model.pooled` says), for a U-Net of its deepest features, for
SE-ResNeXt (which sees three adjacent slices) of its last.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ctssl_jax.data.slices import neighbour_table, select_channels, selected_windows
from ctssl_jax.inference.hu_arrays import prepare_array
from ctssl_jax.models.classifier import Classifier
from ctssl_jax.models.joint_embedding import JointEmbedding
from ctssl_jax.models.mixed import Mixed
from ctssl_jax.models.spark import Spark
from ctssl_jax.ops.trees import fingerprint, flatten, with_sharding
from ctssl_jax.parallel import batch_sizes
from ctssl_jax.parallel.mesh import make_mesh, replicated, split_along_batch, to_devices
from ctssl_jax.runs.checkpoints import Chosen
from ctssl_jax.runs.run import Run
from ctssl_jax.tasks.interface import Task, item_slices
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training.state import evaluation_keys, restore_model
from data_prep.raw.scans import (
    PreparedVolume,
    Refused,
    local_input,
    nothing_taken,
    plan_scans,
    prepared_volume,
    read_scan,
)
from data_prep.scan.rules import Rules
from data_prep.system.errors import InputError


class Embedding(NamedTuple):
    """Embeddings of a volume, float32: slices [S, D] towards superior; their mean and max [D]."""

    slices: np.ndarray
    mean: np.ndarray
    max: np.ndarray


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
    """A checkpoint on all devices of this process; made by `load`.

    Attributes:
      run: the run.
      windows: (level, width) in HU that the model reads, a channel each.
      checkpoint: its step and score.
      state: the model's `params` and `variables`, on the devices.
    """

    run: Run = dataclasses.field(repr=False)
    windows: tuple[tuple[float, float], ...]
    checkpoint: Chosen
    state: dict[str, Any] = dataclasses.field(repr=False)
    _task: Task = dataclasses.field(repr=False)
    _offsets: tuple[int, ...] = dataclasses.field(repr=False)
    _mesh: Mesh = dataclasses.field(repr=False)
    _asked_batch_size: int = dataclasses.field(repr=False)
    _outputs: jax.stages.Wrapped = dataclasses.field(repr=False)
    _latents: Callable | None = dataclasses.field(repr=False)

    @property
    def step(self) -> int:
        """The step of the checkpoint."""
        return self.checkpoint.step

    @property
    def config(self) -> ml_collections.ConfigDict:
        """The configuration of the run."""
        return self.run.config

    @property
    def preparation(self) -> dict[str, Any]:
        """`preparation.json` of the data that the run learned from."""
        return self.run.preparation

    @property
    def image_size(self) -> int:
        """Height and width of the slices in pixels."""
        return self.config.image_size

    @functools.cached_property
    def batch_size(self) -> int:
        """Slices at a time at most, a multiple of the devices: as asked, or chosen by memory.

        Raises:
          InputError: more slices than fit are asked for.
        """
        return batch_sizes.choose(
            self._asked_batch_size,
            None,
            self.image_size,
            list(self._mesh.devices.flat),
            lambda size: self._outputs.trace(self.state, self._abstract_batch(size)),
            self.state,
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the numbers, the `model_fingerprint` of results."""
        return fingerprint(flatten(self.state))

    @property
    def embedding_dim(self) -> int:
        """D, the numbers of an embedding."""
        return self._abstract_outputs()["embedding"].shape[-1]

    def embed(
        self, volume: Any, affine: np.ndarray | None = None, *, rules: Rules | None = None
    ) -> Embedding:
        """Embed one volume.

        Args:
          volume: path of a scan (a folder, a zip file, one DICOM or NIfTI file); or HU, a 3-D array
            in any orientation, with `affine`; or slices of a prepared dataset, [S, H, W, C] uint8,
            a channel a window.
          affine: [4, 4], array indices -> mm towards right, anterior, superior (nibabel's
            `image.affine`).
          rules: which scans a path may hold; None takes the defaults of `data_prep.prepare`.

        Raises:
          InputError: a path without a scan or with several, an oblique volume, values that are not
            HU, or slices of another size.
        """
        return summarise_slices(
            self.outputs(self.prepare(volume, affine, rules=rules))["embedding"]
        )

    def probabilities(
        self, volume: Any, affine: np.ndarray | None = None, *, rules: Rules | None = None
    ) -> np.ndarray:
        """Class probabilities of each slice, [S, K] float32; arguments as in `embed`.

        Raises:
          InputError: as `embed`, or the model does not predict classes.
        """
        if "probabilities" not in self._abstract_outputs():
            raise InputError(
                f"a model of the task {self.config.task} does not predict classes; load the run of "
                "a classifier"
            )
        return self.outputs(self.prepare(volume, affine, rules=rules))["probabilities"]

    def latents(
        self, volume: Any, affine: np.ndarray | None = None, *, rules: Rules | None = None
    ) -> np.ndarray:
        """The encoder's output of each slice, [S, h, w, D] float32; arguments as in `embed`.

        Raises:
          InputError: as `embed`, or a model without an encoder.
        """
        if self._latents is None:
            raise InputError(
                f"a model of the task {self.config.task} has no encoder with latents; load another "
                "run"
            )
        images = self.prepare(volume, affine, rules=rules).images
        return self.in_batches(self._latents, {"images": images})

    def prepare(
        self, volume: Any, affine: np.ndarray | None = None, *, rules: Rules | None = None
    ) -> PreparedVolume:
        """The input of the model for a volume; arguments and errors as in `embed`."""
        if isinstance(volume, str | Path):
            return self._prepare_path(local_input(volume), affine, rules)
        volume = np.asarray(volume)
        if affine is None:
            if volume.dtype == np.uint8 and volume.ndim == 4:
                return PreparedVolume(volume)
            raise InputError(
                f"an array of {volume.dtype} {list(volume.shape)} without an affine; give HU with "
                "the affine of nibabel, or slices of a prepared dataset as uint8 [S, H, W, C]"
            )
        return prepare_array(volume, affine, self.windows, self.image_size)

    def outputs(self, prepared: PreparedVolume) -> dict[str, np.ndarray]:
        """`embedding` [S, D] float32 and, of a model with classes, `probabilities` [S, K] float32.

        Every volume has batches of its own, so that other volumes do not change its numbers.

        Raises:
          InputError: slices of another size or number of channels, or a missing lung box where the
            model crops to the lungs.
        """
        return self.in_batches(self._outputs, self.rows(prepared))

    def rows(self, prepared: PreparedVolume) -> dict[str, np.ndarray]:
        """The arrays of `in_batches` for `outputs`; errors as there."""
        images = prepared.images
        size, channels = self.image_size, len(self.windows)
        if (
            images.dtype != np.uint8
            or images.shape[1:] != (size, size, channels)
            or not len(images)
        ):
            raise InputError(
                f"slices of {images.dtype} {list(images.shape)}, but the run takes uint8 [S, "
                f"{size}, {size}, {channels}]; prepare them with its --image_size and --window"
            )
        row = {
            "num_slices": len(images),
            "middle_slice": 0,
            "first_record": 0,
            "gap_positions": " ".join(map(str, prepared.gap_positions)),
        }
        batch = {
            "images": images,
            "neighbours": neighbour_table([row], self._offsets, repeat_edges=True),
        }
        if self._task.targets(self.config).lung_box:
            if prepared.lung_box is None:
                raise InputError(
                    "this model crops slices to the lungs; give HU with an affine, or the path of "
                    "a scan"
                )
            box = np.array((prepared.lung_box or f"0 0 {size} {size}").split(), np.float32)
            batch["box"] = np.broadcast_to(box, (len(images), 4))
        return batch

    def _prepare_path(
        self, path: Path, affine: np.ndarray | None, rules: Rules | None
    ) -> PreparedVolume:
        if affine is not None:
            raise InputError(
                "an affine goes with an array, and a scan on disk has its own; leave it out"
            )
        plan = plan_scans(path, rules=rules)
        if len(plan.exams) > 1:
            raise InputError(
                f"--input={path} holds {len(plan.exams)} scans; give one, or all to ctssl embed"
            )
        scan = read_scan(plan.input_dir, plan.exams[0], self.windows, self.image_size, rules)
        if isinstance(scan, Refused):
            raise InputError(nothing_taken(path, [scan]))
        return prepared_volume(scan)

    def _abstract_outputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of `outputs` of a batch."""
        return jax.eval_shape(self._outputs, self.state, self._abstract_batch(self.batch_size))

    def _abstract_batch(self, number: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the input of `_outputs`."""
        size = self.image_size
        shape = (number, len(self._offsets), size, size, len(self.windows))
        batch = {"images": jax.ShapeDtypeStruct(shape, np.uint8)}
        if self._task.targets(self.config).lung_box:
            batch["box"] = jax.ShapeDtypeStruct((number, 4), np.float32)
        return with_sharding(split_along_batch(self._mesh), batch)

    def in_batches(self, function: Callable, arrays: dict[str, np.ndarray]) -> Any:
        """A function of all slices, in batches of few sizes, so that few programs are compiled.

        Args:
          function: (state, batch) -> tree of arrays [B, ...]; jitted.
          arrays: `images` [S, H, W, C] uint8, further arrays [S, ...], and `neighbours` [S, K] int,
            the slices of each input; without `neighbours` each slice is an input.

        Returns:
          The tree with arrays [S, ...], on the host.
        """
        number, start, pending, fetched = len(arrays["images"]), 0, None, []
        with batch_sizes.end_of_memory(self.batch_size):
            for size in batch_sizes.in_few_sizes(number, self.batch_size, self._mesh.size):
                index = np.minimum(np.arange(start, start + size), number - 1)
                batch = _batch(arrays, index)
                running = function(self.state, to_devices(self._mesh, batch))
                # fetch one batch behind, so that the devices never wait for the host
                if pending is not None:
                    fetched.append(jax.device_get(pending))
                pending, start = running, start + size
            fetched.append(jax.device_get(pending))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:number], *fetched)

    def in_shared_batches(
        self, volumes: Iterable[dict[str, np.ndarray]], function: Callable | None = None
    ) -> Iterator[Any]:
        """`in_batches` of many volumes, whose slices fill the batches together.

        All batches have one size, the last one is padded: one program computes every slice, beside
        whichever others.

        Args:
          volumes: the arrays of each, as for `in_batches`; taken as they are needed.
          function: as for `in_batches`; None gives what `outputs` gives.

        Yields:
          The tree of each volume with arrays [S, ...], on the host, in the order of the volumes.
        """
        function, size = function or self._outputs, self.batch_size
        numbers: collections.deque[int] = collections.deque()
        pieces: list[tuple[dict, np.ndarray]] = []  # slices that wait for a batch
        fetched: list[Any] = []
        num_waiting, num_fetched, pending = 0, 0, None
        with batch_sizes.end_of_memory(size):
            for arrays in itertools.chain(volumes, [None]):
                if arrays is not None:
                    number = len(arrays["images"])
                    numbers.append(number)
                    pieces.append((arrays, np.arange(number)))
                    num_waiting += number
                while num_waiting >= size or (arrays is None and num_waiting):
                    batch, pieces = _shared_batch(pieces, size)
                    running = function(self.state, to_devices(self._mesh, batch))
                    if pending is not None:
                        fetched.append(jax.device_get(pending))
                        num_fetched += size
                    pending, num_waiting = running, sum(len(index) for _, index in pieces)
                if arrays is None and pending is not None:
                    fetched.append(jax.device_get(pending))
                    num_fetched += size
                while numbers and num_fetched >= numbers[0]:
                    number = numbers.popleft()
                    whole = jax.tree.map(lambda *parts: np.concatenate(parts), *fetched)
                    yield jax.tree.map(lambda all_, n=number: all_[:n], whole)
                    fetched = [jax.tree.map(lambda all_, n=number: all_[n:].copy(), whole)]
                    num_fetched -= number


def _batch(arrays: dict[str, np.ndarray], index: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs of a batch: some slices of the arrays of `in_batches`, with their neighbours."""
    batch = {name: all_[index] for name, all_ in arrays.items() if name != "neighbours"}
    neighbours = arrays["neighbours"][index] if "neighbours" in arrays else index[:, None]
    return batch | {"images": arrays["images"][neighbours]}


def _shared_batch(
    pieces: list[tuple[dict, np.ndarray]], size: int
) -> tuple[dict[str, np.ndarray], list[tuple[dict, np.ndarray]]]:
    """A batch of the first slices of some volumes, and the pieces that are left over.

    pieces: arrays of `in_batches`, and the slices of them that are wanted.
    """
    taken, left, free = [], [], size
    for arrays, index in pieces:
        if free:
            taken.append(_batch(arrays, index[:free]))
        if len(index) > free:
            left.append((arrays, index[free:]))
        free = max(0, free - len(index))
    batch = {name: np.concatenate([one[name] for one in taken]) for name in taken[0]}
    padded = np.minimum(np.arange(size), size - free - 1)
    return {name: all_[padded] for name, all_ in batch.items()}, left


def load(
    workdir: str | Path | Run, checkpoint: str = "best", *, batch_size: int = 0
) -> PretrainedModel:
    """Load the model of a run.

    Args:
      workdir: run directory, of any task, or the opened run.
      checkpoint: `best`, `last`, `last_good` or a step.
      batch_size: slices at a time at most, a multiple of the devices; 0 chooses by memory.

    Raises:
      InputError: an unknown run or checkpoint, or a negative batch size.
    """
    if batch_size < 0:
        raise InputError(f"--batch_size={batch_size}: must be 0 or more")
    run = workdir if isinstance(workdir, Run) else Run.open(workdir)
    config = run.config
    windows = selected_windows(run.preparation, select_channels(run.preparation, config.windows))
    chosen, task = run.choose_checkpoint(checkpoint), get_task(config.task)
    mesh = make_mesh(jax.local_devices())
    graph, state = restore_model(run.workdir, chosen.step, config, task, replicated(mesh))
    targets = task.targets(config)
    # an evaluation of these tasks feeds uncorrupted slices; pretraining corrupts them
    downstream = bool(targets.label or targets.mask)

    def outputs(state: dict, batch: dict) -> dict[str, jax.Array]:
        model = nnx.merge(graph, state["params"], state["variables"], copy=True)
        return (
            _downstream_outputs(model, batch, task, config)
            if downstream
            else _encoder_outputs(model, batch, config)
        )

    def latents(state: dict, batch: dict) -> jax.Array:
        model = nnx.merge(graph, state["params"], state["variables"], copy=True)
        return model.encoder(item_slices(batch["images"], 0, config), train=False)

    shardings = (replicated(mesh), split_along_batch(mesh))
    jitted = functools.partial(jax.jit, in_shardings=shardings, out_shardings=shardings[1])
    return PretrainedModel(
        run=run,
        windows=tuple(windows),
        checkpoint=chosen,
        _task=task,
        _offsets=task.offsets(config) if downstream else (0,),
        _mesh=mesh,
        _asked_batch_size=batch_size,
        state=state,
        _outputs=jitted(outputs),
        _latents=jitted(latents) if "project" in state["params"].get("encoder", {}) else None,
    )


def _downstream_outputs(model: nnx.Module, batch: dict, task: Task, config) -> dict[str, jax.Array]:
    """The outputs of an evaluation. Its scores have false targets, but they are not used, so the
    compiler leaves them out."""
    number, _, height, width, _ = batch["images"].shape
    targets = {
        "label": jnp.zeros(number, jnp.int32),
        "mask": jnp.zeros((number, height, width), jnp.uint8),
    }
    keys = evaluation_keys(jnp.zeros(number, jnp.int32))
    output = task.apply(model, batch | targets, keys, None, config, train=False)
    embedding = {"embedding": output.embedding}
    return embedding | (
        {"probabilities": output.classes["probabilities"]} if output.classes else {}
    )


def _encoder_outputs(model: Any, batch: dict, config) -> dict[str, jax.Array]:
    images = item_slices(batch["images"], 0, config)
    if isinstance(model, Classifier):
        logits, latents = model(images, train=False)
        return {
            "embedding": jnp.mean(latents, axis=(1, 2)),
            "probabilities": jax.nn.softmax(logits),
        }
    if isinstance(model, JointEmbedding | Mixed | Spark):
        return {"embedding": model(images, train=False).embedding}
    return {"embedding": jnp.mean(model.encoder(images, train=False), axis=(1, 2))}


def summarise_slices(slices: np.ndarray) -> Embedding:
    """Embeddings of slices [S, D] with their mean and their maximum."""
    return Embedding(
        slices, slices.mean(axis=0, dtype=np.float64).astype(np.float32), slices.max(axis=0)
    )
