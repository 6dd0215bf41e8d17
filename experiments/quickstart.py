r"""The whole path on one machine in minutes: scans, dataset, pretraining, evaluation on held-out patients, a report.

    python -m experiments.quickstart                          # makes synthetic chest CT first: no data needed
    python -m experiments.quickstart --input_dir=MY_DICOM     # the same on your own scans

Every stage is one command that is printed and that you can run yourself. Run it again after an interruption: finished
stages are kept, unfinished ones go on.
"""

import base64
import csv
import html
import io
import json
from pathlib import Path

from absl import flags

from data_prep.system import command_line
from data_prep.system.errors import InputError
from data_prep.system.files import write_text
from experiments.study import PROJECT, run_stage

RECIPE = "configs/masked_region.py:small"
IMAGE_SIZE = 64
NAMES = {"mse": "MSE", "masked_mse": "masked MSE", "ssim": "SSIM"}
PREDICTORS = {
    "model": "pretrained model",
    "mean_image": "baseline: mean training slice",
    "copy_input": "baseline: the masked input itself",
}


class StageTimes:
    """Seconds of each stage, kept in a file: a stage that a later run finds complete keeps its longest time."""

    def __init__(self, path: Path):
        self._path = path
        self.known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def __setitem__(self, stage: str, duration: float) -> None:
        self.known[stage] = max(duration, self.known.get(stage, 0.0))
        write_text(self._path, json.dumps(self.known))


def loss_curve(reports: list[dict], validation: list[dict]) -> bytes:
    """PNG of training and validation loss, masked MSE and SSIM against the step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    for axis, name in zip(axes, ("loss", "masked_mse", "ssim"), strict=True):
        axis.plot([line["step"] for line in reports], [line[name] for line in reports], label="training", alpha=0.6)
        axis.plot([line["step"] for line in validation], [line[name] for line in validation], "o-", label="validation")
        axis.set(xlabel="step", title=NAMES.get(name, name))
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[0].legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def _image(png: bytes, alternative: str) -> str:
    return f'<img alt="{html.escape(alternative)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _cell(value: dict) -> str:
    sd = "" if value["sd"] is None else f" ± {value['sd']:.4f}"
    interval = "" if value["ci95"] is None else f"<br><small>{value['ci95'][0]:.4f} to {value['ci95'][1]:.4f}</small>"
    return f"<td>{value['mean']:.4f}{sd}{interval}</td>"


def improvement(result: dict) -> dict[str, float]:
    """How many times smaller the model's masked MSE is than each baseline's."""
    model = result["metrics"]["masked_mse"]["mean"]
    return {name: scores["masked_mse"]["mean"] / model for name, scores in result["baselines"].items()}


def report_html(
    result: dict, cohort: list[dict[str, str]], seconds: dict[str, float], curve: bytes, strip: bytes, sheet: bytes
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
    banner = "<p class=banner>SYNTHETIC DATA: computer-made scans, no patients. Nothing here is a medical result.</p>"
    rows = {"model": result["metrics"], **result["baselines"]}
    scores = list(NAMES)
    table = "".join(
        f"<tr><th>{PREDICTORS[predictor]}</th>{''.join(_cell(metrics[name]) for name in scores)}</tr>"
        for predictor, metrics in rows.items()
    )
    factors = improvement(result)
    mask = result["config"]["mask"]
    volumes, patients = (result["metrics"]["mse"][name] for name in ("num_volumes", "num_patients"))
    times = ", ".join(f"{stage} {duration:.0f} s" for stage, duration in seconds.items())
    codebook = result["codebook"]
    facts = "".join(
        "<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in row.values()) + "</tr>" for row in cohort
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Chest CT pretraining: quickstart</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
img {{ max-width: 100% }} table {{ border-collapse: collapse }} td, th {{ padding: .3rem .8rem; text-align: left;
border-bottom: 1px solid #ddd }} pre {{ background: #f5f5f5; padding: .8rem; overflow-x: auto }}
.banner {{ background: #fff3cd; border: 1px solid #e0c060; padding: .5rem .8rem }} small {{ color: #666 }}
</style>
<h1>Masked region prediction on chest CT</h1>
{banner if synthetic else ""}
<p>A vector-quantized autoencoder saw slices with one square of {100 * mask["fraction"]:g} % of the area blacked out
and learned to fill it in. Below: {volumes} scan(s) of {patients} held-out patient(s), {result["num_slices"]} slices,
that it never saw in training. Not for clinical use.</p>
<h2>Held-out reconstructions</h2>
{_image(strip, "input, target, prediction and difference of held-out slices")}
<p><small>Difference: grey is equal, red is too bright, blue too dark.</small></p>
<h2>Scores</h2>
<table><tr><th></th>{"".join(f"<th>{NAMES[name]}</th>" for name in scores)}</tr>{table}</table>
<p>Mean ± standard deviation over volumes; below it the 95 % bootstrap interval by patient (none with one patient).
Inside the masked square the model's error is <b>{factors["mean_image"]:.1f} times</b> smaller than that of the mean
slice and <b>{factors["copy_input"]:.1f} times</b> smaller than that of the masked input.
Codebook: {codebook["used_codes"]} of {codebook["num_codes"]} codes in use, perplexity {codebook["perplexity"]:.0f}.</p>
<h2>Training</h2>
{_image(curve, "loss curves")}
<p><small>{times}; {html.escape(result["device"])}.</small></p>
<h2>Data</h2>
<table>{facts}</table>
{_image(sheet, "random slices of the dataset")}
<h2>What next</h2>
<p>On your own archive, with the paper's model (an accelerator is needed):</p>
<pre>python -m data_prep.prepare --archive=dicom --input_dir=MY_DICOM --output_dir=DATASET
python -m data_prep.describe --dataset=DATASET --verify
python -m ctssl_jax.train --config=configs/masked_region.py --config.dataset=DATASET --workdir=RUN \\
    --config.dtype=bfloat16
python -m ctssl_jax.evaluate --workdir=RUN --dataset=DATASET --split=test --output=RESULT.json</pre>
</html>
"""


def define_flags() -> None:
    """Only where this module is the program: another one may define flags of the same names."""
    flags.DEFINE_string("output_dir", "runs/quickstart", "Folder for everything that is made.")
    flags.DEFINE_string("input_dir", "", "Your DICOM archive; by default a synthetic one is made.")
    flags.DEFINE_integer("num_patients", 48, "Patients of the synthetic archive.")
    flags.DEFINE_integer("num_slices", 24, "Slices of each synthetic scan.")
    flags.DEFINE_integer("num_steps", 0, "Training steps; 0 takes the recipe's.")
    flags.DEFINE_integer("seed", 0, "Of the synthetic archive, the weights and the order of slices.")
    flags.DEFINE_string(
        "pseudonym_key_file", "", "Key of the pseudonyms, which also decides the splits; by default a new one is made."
    )


def main(argv: list[str]) -> int:
    """Command line."""
    output = Path(flags.FLAGS.output_dir)
    source = Path(flags.FLAGS.input_dir) if flags.FLAGS.input_dir else None
    if source and not source.is_dir():
        raise InputError(f"--input_dir={source}: no such folder")
    if flags.FLAGS.num_patients < 3:
        raise InputError(f"--num_patients={flags.FLAGS.num_patients}: three patients or more make three splits")
    archive, dataset, run = output / "dicom", output / "dataset", output / "run"
    result_file = output / "result.json"
    seconds = StageTimes(output / "seconds.json")
    if source is None:
        seconds["making scans"] = run_stage(
            "1 of 5: make a synthetic chest CT archive",
            "data_prep.phantom",
            f"--output_dir={archive}",
            f"--num_patients={flags.FLAGS.num_patients}",
            f"--num_slices={flags.FLAGS.num_slices}",
            f"--image_size={2 * IMAGE_SIZE}",
            f"--seed={flags.FLAGS.seed}",
        )
    seconds["preparation"] = run_stage(
        "2 of 5: DICOM to windowed slices",
        "data_prep.prepare",
        "--archive=dicom",
        f"--input_dir={source or archive}",
        f"--output_dir={dataset}",
        f"--image_size={IMAGE_SIZE}",
        *([] if source else ["--splits=0.7,0.15,0.15"]),
        *([f"--pseudonym_key_file={key}"] if (key := flags.FLAGS.pseudonym_key_file) else []),
    )
    run_stage(
        "3 of 5: describe and verify the dataset",
        "data_prep.describe",
        f"--dataset={dataset}",
        f"--output_dir={output / 'cohort'}",
        "--verify",
    )
    seconds["training"] = run_stage(
        "4 of 5: pretrain by masked region prediction",
        "ctssl_jax.train",
        f"--config={PROJECT / RECIPE}",
        f"--config.dataset={dataset}",
        f"--config.seed={flags.FLAGS.seed}",
        *([f"--config.num_steps={flags.FLAGS.num_steps}"] if flags.FLAGS.num_steps else []),
        f"--workdir={run}",
    )
    seconds["evaluation"] = run_stage(
        "5 of 5: evaluate on held-out patients",
        "ctssl_jax.evaluate",
        f"--workdir={run}",
        f"--dataset={dataset}",
        "--split=test",
        f"--output={result_file}",
        "--baselines",
    )

    from ctssl_jax.reports import read_reports

    result = json.loads(result_file.read_text())
    with open(output / "cohort" / "cohort.csv", newline="") as file:
        cohort = list(csv.DictReader(file))
    page = report_html(
        result,
        cohort,
        seconds.known,
        loss_curve(read_reports(run, "train"), read_reports(run, "validation")),
        result_file.with_suffix(".png").read_bytes(),
        (output / "cohort" / "contact_sheet.png").read_bytes(),
    )
    write_text(output / "report.html", page)
    factors = improvement(result)
    print(
        f"\nInside the masked square the model's error is {factors['mean_image']:.1f} times smaller than the mean "
        f"slice's and {factors['copy_input']:.1f} times smaller than the masked input's"
        + (" (SYNTHETIC data)" if result["synthetic"] else "")
        + f".\nReport: {output / 'report.html'}   ({sum(seconds.known.values()):.0f} s)"
    )
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
