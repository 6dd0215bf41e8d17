"""An exported folder as a repository of a model hub: `config.json`, `preprocessor_config.json`, and
the card's head, all made from the fields of manifest.json.

An SE-ResNeXt-50 is timm's network: its folder says so in `config.json`, and its weights have timm's
names, so that `timm.create_model("hf-hub:ORG/NAME", pretrained=True)` takes it as it is.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ctssl_jax.runs.reports import say
from ctssl_jax.torch_bridge.manifests import read_manifest
from ctssl_jax.torch_bridge.names import older_se_resnext_name
from data_prep.system.errors import InputError, RunFailed
from data_prep.system.extras import require
from data_prep.system.files import file_sha256

WEIGHTS = "model.safetensors"
LIBRARY = "ctssl_jax"
# Licences as hubs spell them; any other is "other", with its name beside.
LICENCES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0"),
    *("cc", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nd-4.0"),
    *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
    *("cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "openrail", "unlicense"),
)
_PIPELINES = {  # architecture -> the hub's name of what a model is for
    "VQVAE": "image-feature-extraction",
    "JointEmbedding": "image-feature-extraction",
    "Classifier": "image-classification",
    "SEResNeXt": "image-classification",
    "UNet": "image-segmentation",
    "StandardUNet": "image-segmentation",
}
_TIMM = {"legacy": "legacy_seresnext50_32x4d", "timm": "seresnext50_32x4d"}  # by pooling
_TIMM_SIZE = {"layers": [3, 4, 6, 3], "width": 64, "groups": 32}


def timm_architecture(manifest: Mapping[str, Any]) -> str:
    """timm's name of the network; "" where timm has none of this shape."""
    model = manifest["model"]
    is_timm = manifest["architecture"] == "SEResNeXt" and all(
        model[name] == value for name, value in _TIMM_SIZE.items()
    )
    return _TIMM[model["pooling"]] if is_timm else ""


def renamed(
    entries: Mapping[str, np.ndarray], manifest: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """A model's tensors under the names that the hub's libraries expect: those of the export, but
    for timm's older SE-ResNeXt.

    Args:
      entries: arrays by the names of `ctssl_torch`.
      manifest: fields of manifest.json.
    """
    if timm_architecture(manifest) != _TIMM["legacy"]:
        return dict(entries)
    return {older_se_resnext_name(name): value for name, value in entries.items()}


def files(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Texts of `config.json` and `preprocessor_config.json`, by name."""
    return {
        "config.json": json.dumps(_config(manifest), indent=2) + "\n",
        "preprocessor_config.json": json.dumps(_preprocessor(manifest), indent=2) + "\n",
    }


def _config(manifest: Mapping[str, Any]) -> dict[str, Any]:
    config = {
        "model_type": "ctssl",
        "architectures": [manifest["architecture"]],
        "format_version": manifest["format_version"],
        "task": manifest["training"]["task"],
        **manifest["model"],
    }
    name = timm_architecture(manifest)
    if not name:
        return config
    side, channels = manifest["preprocessing"]["image_size"], manifest["model"]["in_channels"]
    classes = manifest["model"]["num_classes"]
    return {
        "architecture": name,
        "num_classes": classes,
        "num_features": 2048,
        "global_pool": "avg",
        **({} if channels == 3 else {"model_args": {"in_chans": channels}}),
        **_label_names(manifest),
        "pretrained_cfg": {
            "tag": "ctssl_jax",
            "custom_load": False,
            "input_size": [channels, side, side],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": [0.0] * channels,  # the images are in [0, 1] already
            "std": [1.0] * channels,
            "num_classes": classes,
            "pool_size": None,
            "first_conv": "layer0.conv1" if name.startswith("legacy") else "conv1",
            "classifier": "last_linear" if name.startswith("legacy") else "fc",
            "license": _licence(manifest["license"])["license"],
        },
        "ctssl": config,
    }


def _label_names(manifest: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of the logits, where each class has one of its own."""
    for facts in manifest["data"].get("labels", {}).values():
        if len(facts["classes"]) == manifest["model"]["num_classes"]:
            return {"label_names": [str(name) for name in facts["classes"]]}
    return {}


def _preprocessor(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """How a scan becomes the model's input, for readers of other libraries."""
    preprocessing = dict(manifest["preprocessing"])
    side = preprocessing.pop("image_size")
    return {
        "image_processor_type": "CTSliceProcessor",
        "processor_code": "ctssl_torch.py: preprocess(hu, affine), inputs(images, numbers)",
        "window_level": [level for level, _ in preprocessing["windows"]],
        "window_width": [width for _, width in preprocessing.pop("windows")],
        "grey_levels": 256,
        "size": {"height": side, "width": side},
        "num_adjacent_slices": manifest["model"]["in_channels"] // preprocessing["in_channels"],
        **preprocessing,
    }


def card_head(manifest: Mapping[str, Any]) -> str:
    """The YAML between `---` lines that begins a hub's README.md, made by `huggingface_hub`.

    Intervals have no field of their own in a model index: they stand in `metric_args`.
    """
    import huggingface_hub

    results = [
        huggingface_hub.EvalResult(
            task_type=_PIPELINES[manifest["architecture"]],
            task_name=manifest["training"]["task"],
            dataset_type="chest-ct",
            dataset_name=_data_name(manifest["data"], result["synthetic"]),
            dataset_split=result["split"],
            metric_type=name,
            metric_name=name,
            metric_value=value["mean"],
            metric_args={
                field: value[field]
                for field in ("ci95", "sd", "unit", "num_patients", "num_volumes")
                if value[field] is not None
            },
        )
        for result in manifest["results"]
        for name, value in result["metrics"].items()
        if value["mean"] is not None
    ]
    is_timm = bool(timm_architecture(manifest))
    data = huggingface_hub.ModelCardData(
        **_licence(manifest["license"]),
        library_name="timm" if is_timm else LIBRARY,
        pipeline_tag=_PIPELINES[manifest["architecture"]],
        tags=["chest-ct", "computed-tomography", "medical", "self-supervised-learning", LIBRARY]
        + ["synthetic-data"] * manifest["data"]["synthetic"],
        model_name=manifest["name"],
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def push(folder: Path, repository: str, *, upload: bool) -> list[str]:
    """List the files of an export that a repository would get, and send them if asked.

    Args:
      folder: what `export` with the format `hub` wrote.
      repository: `ORG/NAME`; made, private, if it does not exist.
      upload: send the files; otherwise nothing leaves this machine.

    Returns:
      Names of the files: those of the manifest, the manifest and the card, and no others.

    Raises:
      InputError: not such a folder, a file that was changed, a name that is none, a package that is
        missing.
      RunFailed: the hub refused, or was not reached.
    """
    require("huggingface_hub", "--push", "hub")
    import huggingface_hub

    flag = f"--output_dir={folder}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise InputError(f"--push={repository}: give ORG/NAME, as in --push=my-lab/chest-ct")
    if not (folder / "manifest.json").is_file():
        raise InputError(f"{flag} has no manifest.json; export it with --format=hub first")
    described = read_manifest(folder / "manifest.json", flag)["files"]
    if WEIGHTS not in described:
        raise InputError(f"{flag} has no {WEIGHTS}; export it with --format=hub first")
    names = [*described, "README.md", "manifest.json"]
    for name in names:
        path = folder / name
        if not path.is_file() or (
            name in described and file_sha256(path) != described[name]["sha256"]
        ):
            raise InputError(f"{path} is missing or not what was exported; export again")
        say(f"{'sending' if upload else 'would send'}   {name} ({path.stat().st_size:,} bytes)")
    if not upload:
        say(f"nothing was sent; the same command with --upload sends these files to {repository}")
        return names
    try:
        hub = huggingface_hub.HfApi(library_name=LIBRARY)
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=names,
            commit_message="Weights exported by ctssl_jax",
        )
    except Exception as error:  # of many kinds: no token, no rights, no network
        reason = (str(error).strip().splitlines() or [""])[0]
        raise RunFailed(
            f"--push={repository} failed ({type(error).__name__}: {reason}); check the network, "
            "your token (hf auth login) and your rights there"
        ) from None
    say(f"sent         {len(names)} files to {repository}")
    return names


def _data_name(data: Mapping[str, Any], synthetic: bool) -> str:
    return f"{data['archive']} archive" + (", synthetic scans" if synthetic else "")


def _licence(name: str) -> dict[str, str]:
    if name.lower() in LICENCES:
        return {"license": name.lower()}
    slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
    return {"license": "other", "license_name": slug or "see-the-card"}
