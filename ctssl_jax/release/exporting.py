"""A checkpoint as a folder for PyTorch users, with proof that it is the same model: the core of
`ctssl_jax.export`.

It needs PyTorch; `ctssl_jax.release` says so where it is not installed.
"""

import collections
import dataclasses
import json
import os
import shutil
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from ctssl_jax.data.slices import select_channels, selected_windows
from ctssl_jax.ops.trees import fingerprint, flatten
from ctssl_jax.release import hub, model_card, model_page, onnx_file, parity, small_onnx
from ctssl_jax.release import public_series as public_series_list
from ctssl_jax.runs.checkpoints import Chosen
from ctssl_jax.runs.reports import say
from ctssl_jax.runs.run import Run, portable
from ctssl_jax.tasks.table import get_task
from ctssl_jax.torch_bridge import ctssl_torch, manifests, weight_files
from ctssl_jax.torch_bridge.names import architecture_settings, is_exported, state_dict
from ctssl_jax.training.state import count_parameters, restore_model
from data_prep.dataset.schema import rules_of
from data_prep.privacy.pseudonyms import KEY_FILE, default_audit_dir, read_key
from data_prep.scan import anatomy
from data_prep.scan.window import window_to_uint8
from data_prep.synthetic.exam import Options, render_series, sample_exam
from data_prep.system.errors import InputError, RunFailed
from data_prep.system.extras import require
from data_prep.system.files import (
    check_writable,
    file_sha256,
    folder_written_whole,
    write_json,
    write_text,
)
from data_prep.system.stores import local_path

FORMATS = {
    "torch": "weights.pt",
    "safetensors": "weights.safetensors",
    "onnx": "model.onnx",
    **small_onnx.FORMATS,
    "hub": hub.WEIGHTS,
}
_ONNX = ("onnx", *small_onnx.FORMATS)
# Parity is measured on the middle of larger slices, since the models work the same at each size.
MAX_TEST_SIDE = 128


def export(
    workdir: str | Path,
    output_dir: str | Path,
    formats: Sequence[str],
    licence: str,
    *,
    checkpoint: str = "best",
    results: Sequence[str | Path] = (),
    num_test_slices: int = 2,
    dataset: str | Path | None = None,
    public_series: str | Path | None = None,
    pseudonym_key_file: str | Path | None = None,
    num_dataset_slices: int = 32,
) -> dict[str, Any]:
    """Export a run's checkpoint.

    Args:
      workdir: run directory, of any task.
      output_dir: new or empty folder.
      formats: names in `FORMATS`.
      licence: licence of the weights, for the manifest.
      checkpoint: `best`, `last`, `last_good` or a step.
      results: results files of `ctssl_jax.evaluate` and `ctssl_jax.probe` for this model, for the
        model card.
      num_test_slices: synthetic slices that parity is measured on.
      dataset: where the dataset of the training is now; None takes its place of the training. The
        cohort of the page is left out where it is gone; the formats `onnx_fp16` and `onnx_int8` and
        `public_series` need it.
      num_dataset_slices: of its training slices integers are calibrated on so many, and both
        formats are measured on so many validation slices.
      public_series: table of a public collection's series, of which those that the run has read
        are listed in `public_series.FILE`; None lists none.
      pseudonym_key_file: key of the dataset's pseudonyms, for `public_series`; None takes the one
        in the dataset's audit directory.

    Returns:
      The contents of manifest.json.

    Raises:
      InputError: no such run or checkpoint, results of another model, an unknown format, a folder
        in use, a missing package.
      RunFailed: the exported model is not the same function.
    """
    output_dir = local_path(output_dir, "--output_dir", "choose a folder here").resolve()
    _check_request(output_dir, formats, licence, num_test_slices)
    small = [name for name in small_onnx.FORMATS if name in formats]
    if num_dataset_slices < 2:
        raise InputError(f"--num_dataset_slices={num_dataset_slices}: must be 2 or more")
    started = time.monotonic()
    run = Run.open(workdir)
    measured = small_onnx.open_dataset(run, dataset) if small else None
    exported = open_model(run, checkpoint)
    imported = exported.run.imported
    if (imported_under := imported.get("license")) and imported_under != licence:
        raise InputError(
            f"--license={licence}, but these weights were imported under {imported_under}; give "
            f"--license={imported_under}"
        )
    summaries = [_result(local_path(path, "--results"), exported) for path in results]
    manifest = _manifest(exported, summaries, licence)
    manifest["page"], listed = _page(exported.run, dataset, public_series, pseudonym_key_file)
    # A checkpoint that was not trained further keeps the counters with which it was imported.
    counters = imported["num_batches_tracked"] if imported.get("step") == exported.step else None
    entries = state_dict(
        exported.tensors, exported.architecture, exported.depth, counters or exported.step
    )
    say(
        f"model        {exported.architecture}, {exported.num_parameters:,} parameters, step "
        f"{exported.step:,} of {workdir}"
    )

    # ---- Is it the same model? ----
    twin = _twin(manifest, entries)
    whole = synthetic_images(manifest["preprocessing"], len(twin.offsets), num_test_slices)
    images = _middle(whole)
    manifest["parity"], outputs = _measure_parity(exported, twin, images)
    cases = []
    if "onnx" in formats or small:
        cases = onnx_file.make_cases(exported.model, whole, images, outputs, twin.stride)
    del exported  # from here on the weights are those of the twin alone

    # ---- Files, in a folder that takes its name when it is complete ----
    unfinished = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.tmp")
    try:
        with folder_written_whole(output_dir, unfinished) as folder:
            _write_weights(folder, formats, entries, manifest)
            _write_test_input(folder / "test_input.npz", images, outputs)
            if cases:
                path = folder / FORMATS["onnx"]
                facts = onnx_file.write(path, twin, cases, whole)
                for line in onnx_file.lines(facts):
                    say(line)
                if measured is not None:
                    manifest["small_onnx"] = small_onnx.write(
                        folder, small, path, measured, twin.offsets, num_dataset_slices
                    )
                if "onnx" in formats:
                    manifest["onnx"] = facts
                else:
                    path.unlink()
            shutil.copyfile(ctssl_torch.__file__, folder / "ctssl_torch.py")
            if manifest["preprocessing"]["crop"] != "none":
                shutil.copyfile(anatomy.__file__, folder / "ctssl_anatomy.py")
            for name, text in hub.files(manifest).items() if "hub" in formats else ():
                write_text(folder / name, text)
            if curves := manifest["page"]["curve"]:
                path = folder / model_page.PICTURE
                step = manifest["training"]["checkpoint_step"]
                model_page.draw_curve(path, curves, step, manifest["training"]["recipe"])
            if listed is not None:
                write_text(folder / public_series_list.FILE, public_series_list.table(listed))
            manifest["files"] = {
                path.name: {"sha256": file_sha256(path), "bytes": path.stat().st_size}
                for path in sorted(folder.iterdir())
            }
            head = hub.card_head(manifest) if "hub" in formats else ""
            write_text(folder / "README.md", head + model_card.text(manifest))
            write_json(folder / "manifest.json", manifest)
    except OSError as error:
        raise InputError(
            f"--output_dir={output_dir} cannot be written ({error.strerror}); choose another folder"
        ) from None
    size = sum(facts["bytes"] for facts in manifest["files"].values())
    say(
        f"written      {output_dir}: {', '.join(manifest['files'])} ({size / 1e6:.1f} MB) in "
        f"{time.monotonic() - started:.0f} s"
    )
    return manifest


def _check_request(
    output_dir: Path, formats: Sequence[str], licence: str, num_test_slices: int
) -> None:
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise InputError(f"--format={','.join(formats)}: give one or more of {', '.join(FORMATS)}")
    if {"hub", "safetensors"} <= set(formats):
        raise InputError(
            f"--format={','.join(formats)}: hub writes the same weights as safetensors, under the "
            f"name {hub.WEIGHTS}; leave one of them out"
        )
    if not licence:
        raise InputError(
            "give --license, e.g. --license=CC-BY-NC-4.0: the licence of the weights follows "
            "from the terms of the training data and of the weights that the run started from"
        )
    if num_test_slices < 1:
        raise InputError(f"--num_test_slices={num_test_slices}: must be 1 or more")
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise InputError(f"--output_dir={output_dir} is there already; give a new or empty folder")
    check_writable(output_dir, "--output_dir")
    for name, extra, packages in (
        ("safetensors", "torch", ("safetensors",)),
        ("hub", "torch", ("safetensors",)),
        ("hub", "hub", ("huggingface_hub",)),
        *((name, "torch", ("onnx", "onnxscript", "onnxruntime")) for name in _ONNX),
    ):
        for package in packages if name in formats else ():
            require(package, f"--format={name}", extra)


@dataclasses.dataclass(frozen=True)
class RunModel:
    """A checkpoint as a model in float32 on one device.

    run: the run.
    checkpoint: its step and score.
    architecture: `VQVAE`, `Classifier`, `JointEmbedding`, `UNet`, `StandardUNet` or `SEResNeXt`.
    settings: settings of the architecture, as its PyTorch twin takes them.
    depth: number of residual blocks of the encoder.
    model: the model in JAX, without remat and scan.
    tensors: float32 arrays by name, without `params/` or `variables/`.
    num_parameters: number of trainable parameters that are exported.
    fingerprint: `model_fingerprint` in results.
    """

    run: Run
    checkpoint: Chosen
    architecture: str
    settings: dict[str, Any]
    depth: int
    model: nnx.Module
    tensors: dict[str, np.ndarray]
    num_parameters: int
    fingerprint: str

    @property
    def step(self) -> int:
        """The step of the checkpoint."""
        return self.checkpoint.step


def open_model(run: Run, checkpoint: str) -> RunModel:
    """Read a checkpoint of a run.

    Raises:
      InputError: no such checkpoint.
    """
    chosen = run.choose_checkpoint(checkpoint)
    plain = run.config.copy_and_resolve_references()
    plain.dtype, plain.remat, plain.scan = "float32", False, False
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    graph, state = restore_model(run.workdir, chosen.step, plain, get_task(plain.task), device)
    model = nnx.merge(graph, state["params"], state["variables"])
    flat = flatten(state)
    return RunModel(
        run=run,
        checkpoint=chosen,
        architecture=getattr(model, "architecture", type(model).__name__),
        settings=architecture_settings(model.config),
        depth=getattr(model.config, "depth", 0),
        model=model,
        tensors={name.split("/", 1)[1]: jax.device_get(value) for name, value in flat.items()},
        num_parameters=count_parameters(
            [leaf for name, leaf in flatten(state["params"]).items() if is_exported(name)]
        ),
        fingerprint=fingerprint(flat),
    )


def preprocessing_of(exported: RunModel) -> dict[str, Any]:
    """How slices become the model's input, as `ctssl_torch.preprocess` takes it."""
    config, preparation = exported.run.config, exported.run.preparation
    windows = selected_windows(preparation, select_channels(preparation, config.windows))
    num_slices = 3 if exported.architecture == "SEResNeXt" else 1
    return {
        "windows": [list(map(float, window)) for window in windows],
        "image_size": config.image_size,
        "normalize": config.normalize,
        "in_channels": config.model.in_channels // num_slices,
        "crop": config.get("crop", "none"),
        "orientation": "slices to superior, rows to posterior, columns to the patient's left",
        "value_range": [0.0, 1.0],
    }


def _manifest(exported: RunModel, summaries: list[dict[str, Any]], licence: str) -> dict[str, Any]:
    """The fields of manifest.json, except those that are measured while the folder is written."""
    run = exported.run
    return {
        "format_version": ctssl_torch.FORMAT_VERSION,
        "name": f"{run.config.recipe}, step {exported.step:,}",
        "architecture": exported.architecture,
        "model": exported.settings,
        "num_parameters": exported.num_parameters,
        "preprocessing": preprocessing_of(exported),
        "training": {
            "task": run.config.task,
            "recipe": run.config.recipe,
            **exported.checkpoint.facts,
            **run.training_data,
            "init_from": [*run.imported.get("init_from", []), *run.lineage],
            "config": portable(run.config),
        },
        "data": _data(run),
        "results": summaries,
        "license": licence,
        "model_fingerprint": exported.fingerprint,
        "versions": {name: version(name) for name in ("jax", "flax", "torch")},
    }


def _data(run: Run) -> dict[str, Any]:
    """The training data as counts, without patients and without links to them."""
    preparation, label = run.preparation, run.config.get("label")
    label_facts = (preparation.get("labels") or {}).get(label)
    counts = ("num_patients", "num_volumes", "num_slices")
    return {
        "archive": preparation["archive"],
        "synthetic": preparation["synthetic"],
        "dataset_fingerprint": preparation["fingerprint"],
        "labels": {label: label_facts} if label_facts else {},
        "rules": {"volumes": rules_of(preparation, 0)},
        "splits": {
            split: {name: facts[name] for name in counts if name in facts}
            for split, facts in preparation.get("splits", {}).items()
            if split in ("train", "validation")
        },
    }


def _page(
    run: Run,
    dataset: str | Path | None,
    public_series: str | Path | None,
    pseudonym_key_file: str | Path | None,
) -> tuple[dict[str, Any], list[tuple[str, str]] | None]:
    """The field `page` of manifest.json, and the published series that were read, if asked for.

    Raises:
      InputError: a dataset, table or key that was asked for cannot be used.
    """
    page: dict[str, Any] = {"curve": model_page.curve(run), "cohort": []}
    if not run.training_data:  # not trained here
        if public_series is not None:
            raise InputError(
                f"--public_series={public_series}: these weights were not trained here, so nobody "
                "knows their series; leave it out"
            )
        return page, None
    opened = None
    try:
        opened = model_page.training_dataset(run, dataset)
    except (InputError, OSError) as error:
        if public_series is not None:
            raise InputError(
                f"--public_series={public_series} needs the dataset of the training ({error}); "
                "give --dataset"
            ) from None
        say("cohort       left out: no dataset of the training there; --dataset names its place")
    if opened is not None:
        page["cohort"] = model_page.cohort(run, opened)
    if public_series is None or opened is None:
        return page, None
    key_file = local_path(
        pseudonym_key_file or default_audit_dir(Path(opened.name)) / KEY_FILE,
        "--pseudonym_key_file",
    )
    if not key_file.is_file():
        raise InputError(
            f"--public_series={public_series} needs the key of the dataset's pseudonyms, and "
            f"{key_file} is not there; give --pseudonym_key_file"
        )
    published = public_series_list.read_published(public_series)
    listed = public_series_list.trained_on(run, opened, published, read_key(key_file))
    counts = {
        split: len(model_page.trained_volumes(run, opened, split))
        for split in ("train", "validation")
    }
    page["public_series"] = {
        split: {"listed": sum(where == split for _, where in listed), "volumes": counts[split]}
        for split in counts
    }
    say(f"published    {len(listed)} series of the table were trained on or chose the checkpoint")
    return page, listed


def _result(path: Path, exported: RunModel) -> dict[str, Any]:
    """An evaluation or a probe in short, for the model card.

    Raises:
      InputError: not a results file, or results of another model.
    """
    try:
        result = json.loads(path.read_text())
        is_probe = result.get("kind") == "probe"
        run = exported.run
        if is_probe:
            of = ("recipe", "checkpoint_step", "trained_on_fingerprint", "seed", "encoder")
            own = (run.config.recipe, exported.step, run.preparation["fingerprint"])
            same = tuple(result[name] for name in of) == (*own, run.config.seed, "run")
        else:
            same = result["model_fingerprint"] == exported.fingerprint
        if not same:
            raise InputError(
                f"--results={path} is of another model or checkpoint; "
                f"{'probe' if is_probe else 'evaluate'} this checkpoint"
            )
        fields = ("mean", "sd", "ci95", "num_volumes", "num_patients", "unit")
        return {
            "kind": "probe" if is_probe else "evaluation",
            "split": result["split"],
            "synthetic": result["synthetic"],
            "dataset_fingerprint": result["dataset_fingerprint"],
            "num_patients_seen_in_training": result["num_patients_seen_in_training"],
            "metrics": {
                metric: {name: value.get(name) for name in fields}
                for metric, value in result["metrics"].items()
            },
        }
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise InputError(
            f"--results={path} is not a results file of ctssl_jax.evaluate or probe ({reason}); "
            "give the --output of an evaluation of this checkpoint"
        ) from None


def _twin(manifest: dict[str, Any], entries: dict[str, np.ndarray]) -> ctssl_torch.ExportedModel:
    """The model in PyTorch, which shares its weights with the entries."""
    with torch.device("meta"):
        twin = ctssl_torch.build(manifest)
    twin.load_state_dict(_tensors(entries), strict=True, assign=True)
    return twin.eval().requires_grad_(False)


def _tensors(entries: dict[str, np.ndarray]) -> collections.OrderedDict[str, torch.Tensor]:
    """The entries as tensors that share their memory; nothing writes to them."""
    with warnings.catch_warnings(action="ignore"):  # arrays of JAX are read-only
        return collections.OrderedDict(
            (name, torch.from_numpy(value)) for name, value in entries.items()
        )


def synthetic_images(preprocessing: dict[str, Any], num_slices: int, number: int) -> np.ndarray:
    """Adjacent slices in the middle of a synthetic chest, preprocessed, but not cropped to the
    lungs: [number, H, W, C] float32 in [0, 1]."""
    size = preprocessing["image_size"]
    options = Options(seed=0, image_size=size, num_slices=20, slice_spacing_mm=0.0)
    exam, rng = sample_exam(0, options)
    hu = render_series(exam, "soft", 1, rng)[1].hu
    unit = (
        window_to_uint8(np.rint(hu).astype(np.int16), preprocessing["windows"]).astype(np.float32)
        / 255
    )
    if unit.shape[-1] == 1:
        unit = np.repeat(unit, preprocessing["in_channels"], axis=-1)
    middle = len(unit) // 2 - number // 2 + np.arange(number)
    offsets = np.arange(num_slices) - num_slices // 2
    images = np.concatenate(
        [unit[np.clip(middle + offset, 0, len(unit) - 1)] for offset in offsets], axis=-1
    )
    if preprocessing["normalize"] == "slice_minmax":
        low, high = images.min((1, 2, 3), keepdims=True), images.max((1, 2, 3), keepdims=True)
        images = (images - low) / np.maximum(high - low, 1e-8)
    return images


def _middle(images: np.ndarray) -> np.ndarray:
    """The images, cut to their middle where they are larger than `MAX_TEST_SIDE`."""
    size = images.shape[1]
    border = max(0, size - MAX_TEST_SIDE) // 2
    return images[:, border : size - border, border : size - border]


def _measure_parity(
    exported: RunModel, twin: ctssl_torch.ExportedModel, images: np.ndarray
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The field `parity` of manifest.json, and the outputs in JAX, channels last.

    Raises:
      RunFailed: the two models are not the same function.
    """
    measured, outputs = parity.measure(
        exported.model, twin, images, exported.architecture, exported.depth
    )
    codes = measured.codes_equal
    say(
        f"parity       largest difference of {len(measured.stages)} layers and of the outputs: "
        f"{measured.worst:.1e} of the largest value"
        + ("" if codes is None else f"; {codes:.4%} of the codes are equal")
    )
    if not measured.holds:
        values = {**measured.stages, **measured.outputs}
        name = max(values, key=values.__getitem__)
        raise RunFailed(
            f"the PyTorch model is not the same function: {name} differs by {values[name]:.1e} of "
            f"its largest value, and codes by a margin of {measured.code_margin:.1e}; nothing was "
            "written. Please report it with the run's config.json"
        )
    facts = {
        "tolerance": parity.TOLERANCE,
        "input": f"{len(images)} synthetic slices of {images.shape[1]} x {images.shape[2]} "
        "pixels, float32",
        "largest_difference": measured.worst,
        "outputs": measured.outputs,
        "stages": measured.stages,
        "codes_equal": codes,
        "code_margin": measured.code_margin,
    }
    return facts, outputs


def _write_weights(
    folder: Path,
    formats: Sequence[str],
    entries: dict[str, np.ndarray],
    manifest: dict[str, Any],
) -> None:
    note = manifests.note(manifest)
    for name in {"safetensors", "hub"} & set(formats):
        import safetensors.numpy

        named = hub.renamed(entries, manifest) if name == "hub" else entries
        metadata = {weight_files.NOTE: note, "format": "pt"}
        content = safetensors.numpy.save(named, metadata=metadata)
        with open(folder / FORMATS[name], "wb") as file:
            file.writelines(_in_fixed_order(content))
    if "torch" in formats:
        tensors = _tensors(entries)
        setattr(tensors, weight_files.NOTE, note)  # PyTorch keeps attributes of this type alone
        torch.save(tensors, folder / FORMATS["torch"])


def _in_fixed_order(content: bytes) -> tuple[bytes, memoryview]:
    """Header and tensors of a safetensors file, with its notes in the order of their names: the
    library writes them in another order each time."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, memoryview(content)[end:]


def _write_test_input(path: Path, images: np.ndarray, outputs: dict[str, np.ndarray]) -> None:
    """The images and the outputs without losses, with the axes of PyTorch."""
    kept: dict[str, Any] = {
        name: parity.channels_first(outputs[name]) for name in onnx_file.output_names(outputs)
    }
    np.savez(path, images=parity.channels_first(images), **kept)
