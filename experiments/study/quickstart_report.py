"""The report of the quickstart: one self-contained page."""

import base64
import html
import io

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


def _image(png: bytes, alternative: str) -> str:
    return (
        f'<img alt="{html.escape(alternative)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    )


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
        name: scores["masked_mse"]["mean"] / model for name, scores in result["baselines"].items()
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
    table = ""
    for predictor, metrics in rows.items():
        cells = "".join(_cell(metrics[name]) for name in NAMES)
        table += f"<tr><th>{PREDICTORS[predictor]}</th>{cells}</tr>"
    factors = improvement(result)
    mask = result["config"]["mask"]
    volumes, patients = (result["metrics"]["mse"][name] for name in ("num_volumes", "num_patients"))
    times = ", ".join(f"{stage} {duration:.0f} s" for stage, duration in seconds.items())
    codebook = result["codebook"]
    facts = "".join(
        "<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in row.values()) + "</tr>"
        for row in cohort
    )
    titles = "".join(f"<th>{title}</th>" for title in NAMES.values())
    described = (
        "held-out slices: masked input, target, prediction and difference; the error inside the "
        f"mask is {compared(factors['mean_image'])} the mean training slice's"
    )
    volumes_shown = "synthetic scans" if synthetic else "scans"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Chest CT pretraining: quickstart</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; --text: #222; --back: #fff; --line: #ddd; --soft: #f5f5f5;
  --faint: #666; --note: #fff3cd; --edge: #e0c060 }}
@media (prefers-color-scheme: dark) {{ :root {{ --text: #e6e6e6; --back: #16181a; --line: #3a3d40;
  --soft: #222528; --faint: #a0a4a8; --note: #40360f; --edge: #8a7420 }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere }}
img {{ max-width: 100%; height: auto; background: #fff }} table {{ border-collapse: collapse }}
.wide {{ overflow-x: auto }}
td, th {{ padding: .3rem .8rem; text-align: left; border-bottom: 1px solid var(--line);
  overflow-wrap: normal }}
pre {{ background: var(--soft); padding: .8rem; overflow-x: auto; overflow-wrap: normal }}
small {{ color: var(--faint) }}
.banner {{ background: var(--note); border: 1px solid var(--edge); padding: .5rem .8rem }}
</style>
<h1>Masked region prediction on chest CT</h1>
{banner}
<p>A vector-quantized autoencoder saw slices with one square of {100 * mask["fraction"]:g} % of
the area blacked out and learned to fill it in. Below: {volumes} scan(s) of {patients} held-out
patient(s), {result["num_slices"]} slices, that it never saw in training. Not for clinical use.</p>
<h2>Held-out reconstructions</h2>
{_image(strip, described)}
<h2>Scores</h2>
<div class=wide><table><tr><th></th>{titles}</tr>{table}</table></div>
<p>Mean ± standard deviation over volumes; below it the 95 % bootstrap interval by patient (none
with one patient). Inside the masked square the error of the model is
<b>{compared(factors["mean_image"])}</b> the error of the mean slice and
<b>{compared(factors["copy_input"])}</b> the error of the masked input. Codebook:
{codebook["used_codes"]} of {codebook["num_codes"]} codes in use, perplexity
{codebook["perplexity"]:.0f}.</p>
<h2>Training</h2>
{_image(curve, "training and validation loss, masked MSE and SSIM, by step")}
<p><small>{times}; {html.escape(result["device"])}.</small></p>
<h2>Data</h2>
<div class=wide><table>{facts}</table></div>
{_image(sheet, f"contact sheet: random slices of the dataset's {volumes_shown}")}
<h2>What next</h2>
<p>On your own archive, with the paper's model (an accelerator is needed):</p>
<pre>ctssl prepare --archive=dicom --input_dir=MY_DICOM --output_dir=DATASET
ctssl describe --dataset=DATASET --verify
ctssl train --config=masked_region --config.dtype=bfloat16 --config.dataset=DATASET --workdir=RUN
ctssl evaluate --workdir=RUN --dataset=DATASET --split=test --output=RESULT.json</pre>
</html>
"""
