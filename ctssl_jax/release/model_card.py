"""The README.md of an exported folder: a model card made from manifest.json alone."""

from typing import Any

from ctssl_jax.release import hub, model_page, public_series, small_onnx

_MOST_ROWS = 8  # of the table of validations
_OUTPUTS = {
    "VQVAE": "`reconstruction`, `latents`, `quantized`, `codes`, two losses",
    "Classifier": "`logits`, `latents`",
    "JointEmbedding": "`latents`, `embedding`",
    "UNet": "`logits` (a pixel's, before the sigmoid), `embedding`",
    "StandardUNet": "`logits` (a pixel's, before the sigmoid), `embedding`",
    "SEResNeXt": "`logits`, `embedding`",
}


def text(manifest: dict[str, Any]) -> str:
    """The model card of a manifest, as Markdown."""
    sections = [
        f"# {manifest['name']}",
        _summary(manifest),
        "## Use\n\n" + _use(manifest),
        "## Input\n\n" + _input(manifest["preprocessing"], _num_slices(manifest)),
        "## Training\n\n" + _training(manifest) + _curve(manifest),
        *_cohort(manifest),
        "## Results\n\n" + _results(manifest["results"]),
        "## Is it the same model?\n\n" + _parity(manifest),
        "## Intended use and limits\n\n" + _limits(manifest),
        f"## Licence\n\n{manifest['license']} for the weights; the code here is under Apache-2.0.",
        "## How to cite\n\n" + _citation(manifest),
    ]
    return "\n\n".join(sections) + "\n"


def _num_slices(manifest: dict[str, Any]) -> int:
    """Adjacent slices of one input: the slice below, the slice, the slice above."""
    return 3 if manifest["architecture"] == "SEResNeXt" else 1


def _summary(manifest: dict[str, Any]) -> str:
    data = "**Synthetic data: of no clinical use.** " if manifest["data"]["synthetic"] else ""
    return (
        f"{data}{manifest['architecture']} with {manifest['num_parameters']:,} trainable "
        f"parameters, {_origin(manifest)} on slices of chest CT (task "
        f"`{manifest['training']['task']}`)."
    )


def _origin(manifest: dict[str, Any]) -> str:
    """How the weights came to be: those of imported files were not trained here."""
    is_ours = bool(manifest["data"]["splits"])
    return "trained by ctssl_jax" if is_ours else "imported into ctssl_jax and trained elsewhere"


def _use(manifest: dict[str, Any]) -> str:
    """How to load and apply the model; of a hub's repository also by its name."""
    outputs = _OUTPUTS[manifest["architecture"]]
    cropped = manifest["preprocessing"]["crop"] != "none"
    box, argument = "", ""
    if cropped:
        box = "box = model.lung_box(hu, affine)                # around the lungs; needs scipy\n"
        argument = ", box=box"
    example = "images[:1]"
    if _num_slices(manifest) > 1 or cropped:
        example = f"model.inputs(images, torch.arange(1){argument})"
    return f"""```python
import torch
import ctssl_torch                              # the file here; needs torch, numpy, pillow, pydicom

model = ctssl_torch.load(".")                   # evaluation mode
hu, affine = ctssl_torch.read_dicom("SCAN")     # or nibabel: image.get_fdata(), image.affine
images = model.preprocess(hu, affine)           # [S, C, H, W] float32
{box}z = model.embed(images{argument}){" " * (25 - len(argument))}# [S, D], a vector a slice
output = model({example})                      # {outputs}
```

`python ctssl_torch.py .` computes the outputs of a stored input again and prints how far your
installation is from the stored outputs.{_by_name(manifest)}"""


def _by_name(manifest: dict[str, Any]) -> str:
    if hub.WEIGHTS not in manifest["files"]:
        return ""
    text = (
        '\n\nFrom a hub: `ctssl_torch.load("hf-hub:ORG/NAME@REVISION")`; in JAX '
        '`ctssl_jax.load("hf-hub:ORG/NAME@REVISION")`, or `ctssl embed --workdir=hf-hub:ORG/NAME`.'
    )
    if hub.timm_architecture(manifest):
        text += (
            '\n\nIn timm: `timm.create_model("hf-hub:ORG/NAME", pretrained=True)` takes what '
            "`model.inputs` gives, and returns the logits."
        )
    return text


def _input(preprocessing: dict[str, Any], num_slices: int) -> str:
    windows = ", ".join(
        f"level {level:g} / width {width:g} HU" for level, width in preprocessing["windows"]
    )
    lines = [
        f"- grey values: {windows}, mapped to [0, 1] in 256 steps",
        f"- size: {preprocessing['image_size']} x {preprocessing['image_size']} pixels of the "
        f"whole field",
        f"- orientation: {preprocessing['orientation']}",
    ]
    if preprocessing["normalize"] == "slice_minmax":
        image = (
            "the slice and its neighbours are stretched together from their"
            if num_slices > 1
            else "each slice is stretched from its own"
        )
        lines.append(f"- {image} minimum to {'their' if num_slices > 1 else 'its own'} maximum")
    if preprocessing["crop"] != "none":
        lines.append(
            "- crop: slices are cropped to the bounding box of the scan's lungs and enlarged to "
            "the same size. `lung_box` finds the box; `inputs` and `embed` take it, in pixels of "
            "the preprocessed slices"
        )
        return "\n".join(lines) + "\n\n`preprocess` and `inputs` do all these steps."
    return "\n".join(lines) + "\n\n`preprocess` does all these steps."


def _training(manifest: dict[str, Any]) -> str:
    training, data = manifest["training"], manifest["data"]
    config = training["config"]
    if not data["splits"]:
        return "- how and on which data these weights were trained is not known here (imported)"
    lines = [
        f"- recipe `{training['recipe']}`, {training['checkpoint_step']:,} steps of "
        f"{config['batch_size']} slices, "
        f"{config['optimizer']}, learning rate {config['learning_rate']:g}, seed "
        f"{config['seed']}, {config['dtype']}"
    ]
    for split, facts in data["splits"].items():
        counts = ", ".join(
            f"{number:,} {name.removeprefix('num_')}" for name, number in facts.items()
        )
        lines.append(f"- {split} data: {counts} ({data['archive']} archive)")
    for label, facts in data.get("labels", {}).items():
        lines.append(
            f"- predicts `{label}` of a {facts['level']}; classes in order: "
            f"{', '.join(facts['classes'])}"
        )
    for ancestor in training["init_from"]:
        lines.append(f"- started from `{ancestor['recipe']}`, step {ancestor['checkpoint_step']:,}")
    return "\n".join(lines)


def _curve(manifest: dict[str, Any]) -> str:
    """The picture of the training curve, and its validations as a table of a few rows."""
    curves = manifest["page"]["curve"]
    if not curves:
        return ""
    text = f"\n\n![Training loss and validation by step]({model_page.PICTURE})"
    points, own = curves["validation"], manifest["training"]["checkpoint_step"]
    if not points:
        return text
    shown = points[:: max(1, -(-len(points) // _MOST_ROWS))]
    rows = sorted(
        {tuple(point) for point in [*shown, points[-1]]}
        | {tuple(point) for point in points if point[0] == own}
    )
    lines = [f"| step | {curves['score']} on validation slices |", "|---|---|"]
    lines += [
        f"| {step:,}{' (this model)' if step == own else ''} | {value:.4g} |"
        for step, value in rows
    ]
    return text + "\n\n" + "\n".join(lines)


def _cohort(manifest: dict[str, Any]) -> list[str]:
    """The section on the people and scans that the model was trained on."""
    page = manifest["page"]
    parts = []
    if page["cohort"]:
        lines, before = ["| | | training data |", "|---|---|---|"], ""
        for group, item, value in page["cohort"]:
            lines.append(f"| {'' if group == before else group} | {item} | {value} |")
            before = group
        parts.append("\n".join(lines))
        parts.append(
            f"Fewer than {model_page.LEAST_CELL} patients or volumes of a kind are told as that."
        )
    if published := page.get("public_series"):
        train, validation = published["train"], published["validation"]
        parts.append(
            f"`{public_series.FILE}` lists the published series among them: {train['listed']:,} of "
            f"{train['volumes']:,} training volumes, and {validation['listed']:,} of "
            f"{validation['volumes']:,} validation volumes, which chose the checkpoint. "
            + "Series that earlier trainings of these weights have read are not listed. "
            * bool(manifest["training"]["init_from"])
            + "`ctssl overlap --model=. --series=MY_SERIES.csv` says which of yours are in it."
        )
    return ["## What it saw\n\n" + "\n\n".join(parts)] if parts else []


def _results(results: list[dict[str, Any]]) -> str:
    if not results:
        return "The export was made without results (`--results`)."
    tables = []
    for kind, words in (
        ("evaluation", ""),
        ("probe", "Of the frozen encoder, by simple probes (`ctssl probe`):\n\n"),
    ):
        rows = [
            _result_row(result, name, value)
            for result in results
            if result.get("kind", "evaluation") == kind
            for name, value in result["metrics"].items()
            if value["mean"] is not None
        ]
        if rows:
            head = ["| split | metric | mean | 95 % interval | patients |", "|---|---|---|---|---|"]
            tables.append(words + "\n".join([*head, *rows]))
    return "\n\n".join(tables)


def _result_row(result: dict[str, Any], name: str, value: dict[str, Any]) -> str:
    split = result["split"] + (" (synthetic)" if result["synthetic"] else "")
    interval = "" if value["ci95"] is None else f"{value['ci95'][0]:.4f} to {value['ci95'][1]:.4f}"
    return f"| {split} | {name} | {value['mean']:.4f} | {interval} | {value['num_patients']} |"


def _parity(manifest: dict[str, Any]) -> str:
    parity = manifest["parity"]
    lines = [
        f"Measured on {parity['input']}: over {len(parity['stages'])} layers and the outputs the "
        f"largest difference to the JAX model is {parity['largest_difference']:.1e} of the "
        f"layer's largest value (allowed: {parity['tolerance']:g})."
    ]
    if parity["codes_equal"] is not None:
        lines.append(f"{parity['codes_equal']:.4%} of the codes are equal.")
    if "onnx" in manifest:
        onnx = manifest["onnx"]
        lines.append(
            f"The ONNX file (opset {onnx['opset']}) takes {onnx['input']}. In onnxruntime, on "
            f"{onnx['compared']}, the largest difference is {onnx['largest_difference']:.1e}."
        )
        if "codes" in onnx:
            lines.append(
                "{different} of {compared:,} codes differ there, all of them among the {near_ties} "
                "whose two nearest codes are equally near to {tie:g}.".format(**onnx["codes"])
            )
    for name, facts in manifest.get("small_onnx", {}).items():
        lines.append(
            f"Against the ONNX file in float32, that of {small_onnx.FORMATS[name]}: "
            f"{small_onnx.sentence(facts)}."
        )
    return " ".join(lines)


def _limits(manifest: dict[str, Any]) -> str:
    data = manifest["data"]
    lines = [
        "For research on chest CT. Not a medical device: not for diagnosis or treatment.",
        "Trained on axial slices of the preparation above; other windows, orientations or body "
        "regions give numbers without meaning. Differences between scanners, kernels and "
        "populations were not corrected for.",
    ]
    if patients := data["splits"].get("train", {}).get("num_patients"):
        lines.append(
            f"It has seen {patients:,} patients, prepared in one way. On other people, scanners "
            "and kernels it was not tested, unless the results name other data."
        )
    if not manifest["results"]:
        lines.append("Its quality was not measured for this page.")
    if data["synthetic"]:
        lines.append(
            "All training data are synthetic: the weights only show that the software works."
        )
    return "\n".join(f"- {line}" for line in lines)


def _citation(manifest: dict[str, Any]) -> str:
    """The paper that the training follows, and the name by which these weights are known."""
    return (
        "Amara Tariq, Gokul Ramasamy, Bhavik N. Patel, Imon Banerjee: Self-supervised learning for "
        "chest computed tomography: training strategies and effect on downstream applications. "
        "Journal of Medical Imaging 11(6):064003, 2024. "
        "[doi:10.1117/1.JMI.11.6.064003](https://doi.org/10.1117/1.JMI.11.6.064003)\n\n"
        f"Name these weights by their fingerprint: `{manifest['model_fingerprint']}`."
    )
