"""The report of the quickstart: one self-contained page."""

import html
import io

from data_prep.system.pages import page, picture, table

NAMES = {"mse": "MSE", "masked_mse": "masked MSE", "ssim": "SSIM"}
PREDICTORS = {
    "model": "pretrained model",
    "mean_image": "baseline: mean training slice",
    "copy_input": "baseline: the masked input itself",
}


def loss_curve(reports: list[dict], validation: list[dict]) -> bytes:
    """PNG of training and validation loss, masked MSE and SSIM against the step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, name in zip(axes, ("loss", "masked_mse", "ssim"), strict=True):
        for lines, label, style in (
            (reports, "training", "-" if len(reports) > 1 else "x"),
            (validation, "validation", "o-"),
        ):
            if lines:  # else the legend would name a line that is not there
                axis.plot(
                    [line["step"] for line in lines],
                    [line[name] for line in lines],
                    style,
                    label=label,
                    alpha=0.6 if label == "training" else 1,
                )
        axis.set(xlabel="step", title=NAMES.get(name, name))
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[0].legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def _cell(value: dict) -> str:
    sd = "" if value["sd"] is None else f" ± {value['sd']:.4f}"
    interval = (
        ""
        if value["ci95"] is None
        else f"<br><small>{value['ci95'][0]:.4f} to {value['ci95'][1]:.4f}</small>"
    )
    return f"<td>{value['mean']:.4f}{sd}{interval}</td>"


def improvement(result: dict) -> dict[str, float]:
    """The masked MSE of each baseline as a multiple of the masked MSE of the model."""
    model = result["metrics"]["masked_mse"]["mean"]
    return {
        name: metrics["masked_mse"]["mean"] / model for name, metrics in result["baselines"].items()
    }


def compared(factor: float) -> str:
    """The error of the model beside that of a baseline, which is `factor` times the model's."""
    return (
        f"{factor:.1f} times smaller than" if factor >= 1 else f"{1 / factor:.1f} times LARGER than"
    )


def report_html(
    result: dict,
    cohort: list[dict[str, str]],
    seconds: dict[str, float],
    curve: bytes,
    strip: bytes,
    sheet: bytes,
) -> str:
    """The report as one self-contained page.

    Args:
      result: contents of the results JSON, with baselines.
      cohort: rows of the cohort table (group, item, value).
      seconds: stage -> time.
      curve: PNG of the loss curve.
      strip: PNG of reconstructions.
      sheet: PNG of random slices of the dataset.
    """
    synthetic = result["synthetic"]
    text = "computer-made scans, no patients. Nothing here is a medical result."
    banner = f"<p class=banner>SYNTHETIC DATA: {text}</p>" if synthetic else ""
    rows = {"model": result["metrics"], **result["baselines"]}
    scores = ""
    for predictor, metrics in rows.items():
        cells = "".join(_cell(metrics[name]) for name in NAMES)
        scores += f"<tr><th>{PREDICTORS[predictor]}</th>{cells}</tr>"
    factors = improvement(result)
    mask = result["config"]["mask"]
    volumes, patients = (result["metrics"]["mse"][name] for name in ("num_volumes", "num_patients"))
    times = ", ".join(f"{stage} {duration:.0f} s" for stage, duration in seconds.items())
    codebook = result["codebook"]
    titles = "".join(f"<th>{title}</th>" for title in NAMES.values())
    volumes_shown = "synthetic scans" if synthetic else "scans"
    whose = "held-out" if result["split"] == "test" else "validation"
    chosen = "" if result["split"] == "test" else " They chose its checkpoint: this is no test."
    described = (
        f"{whose} slices: masked input, target, prediction and difference; the error inside the "
        f"mask is {compared(factors['mean_image'])} the mean training slice's"
    )
    body = f"""<h1>Masked region prediction on chest CT</h1>
{banner}
<p>A vector-quantized autoencoder saw slices with one square of {100 * mask["fraction"]:g} % of
the area blacked out and learned to fill it in. Below: {volumes} scan(s) of {patients} {whose}
patient(s), {result["num_slices"]} slices, that it never saw in training.{chosen}
Not for clinical use.</p>
<h2>{whose.capitalize()} reconstructions</h2>
{picture(strip, described, on_white=True)}
<h2>Scores</h2>
<div class=wide><table><tr><th></th>{titles}</tr>{scores}</table></div>
<p>Mean ± standard deviation over volumes; below it the 95 % bootstrap interval by patient (none
with one patient). Inside the masked square the error of the model is
<b>{compared(factors["mean_image"])}</b> the error of the mean slice and
<b>{compared(factors["copy_input"])}</b> the error of the masked input. Codebook:
{codebook["used_codes"]} of {codebook["num_codes"]} codes in use, perplexity
{codebook["perplexity"]:.0f}.</p>
<h2>Training</h2>
{picture(curve, "training and validation loss, masked MSE and SSIM, by step", on_white=True)}
<p><small>{times}; {html.escape(result["device"])}.</small></p>
<h2>Data</h2>
{table(row.values() for row in cohort)}
{picture(sheet, f"contact sheet: random slices of the dataset's {volumes_shown}")}
<h2>What next</h2>
<p>On your own archive, with the paper's model (an accelerator is needed):</p>
<pre>ctssl prepare --archive=dicom --input_dir=MY_DICOM --output_dir=DATASET
ctssl describe --dataset=DATASET --verify
ctssl train --config=masked_region --config.dtype=bfloat16 --config.dataset=DATASET --workdir=RUN
ctssl evaluate --workdir=RUN --dataset=DATASET --split=test --output=RESULT.json</pre>"""
    return page("Chest CT pretraining: quickstart", body)
