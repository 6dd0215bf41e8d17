r"""Table II of the paper: the eight pretrained models, each on its own task, on the same held-out volumes.

    python -m experiments.table2 plan --dataset=DATASET --workdir=STUDY      # one command a cell
    python -m experiments.table2 run  --dataset=DATASET --workdir=STUDY      # trains and evaluates what is missing
    python -m experiments.table2 draw --dataset=DATASET --workdir=STUDY      # Markdown, CSV and PNG from results JSON

The four mask sizes are the paper's progressive chain; the other four start from random weights. Beyond the paper, every
frozen encoder is probed on the other tasks' labels and on reconstruction (`--nocross` leaves that out), beside an
untrained encoder and the pixels themselves, so that encoders are compared on equal terms.

`--size=small` (64 x 64 pixels) with `--num_steps=750` took 46 minutes on two busy CPU cores; `--size=reference
--override=dtype=bfloat16` is the paper's model.
"""

from collections.abc import Sequence

from absl import flags

from data_prep.system import command_line
from data_prep.system.errors import InputError
from data_prep.system.files import write_text
from experiments import study, table2_figure
from experiments.chain import FRACTIONS, cell_name, chain_cells
from experiments.paper import TABLE2
from experiments.study import Cell, Settings, markdown, with_spread

RECONSTRUCTION = ("next_slice", *(cell_name(fraction) for fraction in FRACTIONS), "denoising")
CLASSIFICATION = ("rotation", "flip")
OTHER_RECIPES = ("next_slice", "denoising", *CLASSIFICATION)
TITLES = {
    "next_slice": "Next slice prediction",
    **{cell_name(fraction): f"Masked region prediction, {fraction:.0%} masking" for fraction in FRACTIONS},
    "denoising": "Denoising",
    "rotation": "Rotation prediction",
    "flip": "Flip prediction",
    "untrained": "(untrained encoder)",
    "pixels": "(pixels, no encoder)",
}
METRICS = {
    "mse": "MSE",
    "masked_mse": "masked MSE, per pixel",
    "masked_mse_batch_sum": "masked MSE, sum over a batch of 16",
    "ssim": "SSIM",
    "cross_entropy": "cross-entropy on logits",
    "double_softmax_cross_entropy": "cross-entropy, softmax twice",
    "auroc": "AUROC, one against the rest",
}
CROSS = {  # columns of the cross table: metric of the probe -> title
    f"{target}/{probe}/{metric}": f"{title}, {'linear' if probe == 'linear' else 'kNN'}"
    for target, metric, title in (
        ("rotation", "auroc", "rotation AUROC"),
        ("flip", "auroc", "flip AUROC"),
        ("clean", "mse", "slice MSE"),
        ("masked_region", "masked_mse", "masked MSE"),
        ("denoising", "mse", "denoising MSE"),
        ("next_slice", "mse", "next-slice MSE"),
    )
    for probe in ("linear", "knn")
}


def model_cells(settings: Settings) -> list[Cell]:
    """The eight trainings."""
    others = [study.train_cell(settings, name, name) for name in OTHER_RECIPES]
    return [*chain_cells(settings), *others]


def cross_cells(settings: Settings) -> list[Cell]:
    """A probe of each frozen encoder, and of two controls, which need a run for its configuration only."""
    cells = []
    names = [cell.name for cell in model_cells(settings)]
    for name in (*names, "untrained", "pixels"):
        run, encoder = (name, "run") if name in names else (names[0], name)
        result = settings.workdir / "results" / f"cross_{name}.json"
        stage = (
            *(f"cross_{name}: probe", "ctssl_jax.probe", f"--workdir={settings.workdir / 'runs' / run}"),
            *(f"--dataset={settings.dataset}", f"--split={settings.split}", f"--encoder={encoder}"),
            f"--output={result}",
        )
        cells.append(Cell(f"cross_{name}", (run,), (stage,), result))
    return cells


def figure_rows(results: dict[str, dict | None]) -> list[dict[str, str | float | None]]:
    """One row a model and metric: ours with standard deviation and interval, the paper's, the unit; None if missing."""
    rows = []
    for name in (*RECONSTRUCTION, *CLASSIFICATION):
        result = results[name]
        metrics = [metric for metric in METRICS if (result and metric in result["metrics"]) or metric in TABLE2[name]]
        for metric in metrics:
            value = result["metrics"][metric] if result else {}
            low, high = value.get("ci95") or (None, None)
            paper_mean, paper_sd = TABLE2[name].get(metric, (None, None))
            rows.append(
                {
                    "model": name,
                    "metric": metric,
                    "mean": value.get("mean"),
                    "sd": value.get("sd"),
                    "ci95_low": low,
                    "ci95_high": high,
                    "num_volumes": value.get("num_volumes"),
                    "num_patients": value.get("num_patients"),
                    "paper_mean": paper_mean,
                    "paper_sd": paper_sd,
                    "unit": value.get("unit"),
                }
            )
    return rows


def table_markdown(rows: Sequence[dict]) -> str:
    """Table II: a line for each model and metric, ours beside the paper's."""
    return markdown(
        [
            {
                "strategy": TITLES[row["model"]],
                "measure": METRICS[row["metric"]],
                "ours, mean ± sd over volumes": with_spread(row["mean"], row["sd"]),
                "95 % interval by patient": "-"
                if row["ci95_low"] is None
                else f"{row['ci95_low']:.4f} to {row['ci95_high']:.4f}",
                "the paper's": with_spread(row["paper_mean"], row["paper_sd"]) or "-",
            }
            for row in rows
        ]
    )


def health_markdown(results: dict[str, dict | None]) -> str:
    """How much of embedding and codebook each model uses, and what has collapsed."""
    rows = []
    for name, result in results.items():
        columns = ("strategy", "checkpoint", "effective rank", "codes used", "perplexity", "collapsed")
        row = dict.fromkeys(columns, "")
        row["strategy"] = TITLES[name]
        if result:
            embedding, codebook = result["embedding"], result.get("codebook")
            row["checkpoint"] = f"step {result['checkpoint_step']:,}"
            row["effective rank"] = f"{embedding['effective_rank']:.1f} of {embedding['embedding_dim']}"
            row["codes used"] = f"{codebook['used_codes']} of {codebook['num_codes']}" if codebook else "-"
            row["perplexity"] = f"{codebook['perplexity']:.0f}" if codebook else "-"
            row["collapsed"] = "; ".join(result["warnings"]) or "no"
        rows.append(row)
    return markdown(rows)


def cross_rows(results: dict[str, dict | None]) -> list[dict[str, str]]:
    """One row an encoder, one column a probe; empty where missing."""
    rows = []
    for name, result in results.items():
        values = {
            title: with_spread(result["metrics"][metric]["mean"], result["metrics"][metric]["sd"]) if result else ""
            for metric, title in CROSS.items()
        }
        rows.append({"encoder": TITLES[name.removeprefix("cross_")], **values})
    return rows


def draw(settings: Settings) -> str:
    """Write `table2.md`, `.csv`, `.png` and `cross.csv` into the study's folder; returns the Markdown.

    Raises:
      InputError: no result at all.
    """
    cells = {cell.name: cell for cell in model_cells(settings)}
    results = {name: study.read_result(cell) for name, cell in cells.items()}
    cross = {cell.name: study.read_result(cell) for cell in cross_cells(settings)}
    found = [result for result in results.values() if result]
    if not found:
        raise InputError(f"--workdir={settings.workdir} holds no results yet; run the study first")
    rows = figure_rows(results)
    caption = study.caption(found)
    seconds = sum(study.seconds(settings.workdir).values())
    took = f" The cells took {seconds / 60:.0f} minutes by the clock." if seconds else ""
    parts = [f"# Table II: self-supervised models on held-out volumes\n\n{caption}{took}\n\n{table_markdown(rows)}"]
    parts.append(f"## Representation health\n\n{health_markdown(results)}")
    if any(cross.values()):
        parts.append(
            "## Cross table: frozen encoders on equal terms\n\nLinear probe and k nearest neighbours on the frozen "
            f"encoder's features, mean ± sd over volumes.\n\n{markdown(cross_rows(cross))}"
        )
    text = "\n".join(parts)
    write_text(settings.workdir / "table2.md", text)
    study.write_csv(settings.workdir / "table2.csv", rows)
    study.write_csv(settings.workdir / "cross.csv", cross_rows(cross))
    table2_figure.save(
        settings.workdir / "table2.png",
        [
            (TITLES[name], [row for row in rows if row["model"] == name], cells[name].result.with_suffix(".npz"))
            for name in (*RECONSTRUCTION, *CLASSIFICATION)
        ],
        METRICS,
        caption,
    )
    return text


def define_flags() -> None:
    """Only where this module is the program."""
    study.define_flags()
    flags.DEFINE_bool("cross", True, "Also probe every frozen encoder on the other tasks.")


def main(argv: list[str]) -> int:
    """Command line."""
    if len(argv) < 2:
        raise InputError(f"give one of {', '.join(study.VERBS)}: python -m experiments.table2 plan ...")
    settings = study.settings_of_flags(argv[1])
    study.check_overrides(settings, ["masked_region", *OTHER_RECIPES])
    cells = [*model_cells(settings), *(cross_cells(settings) if flags.FLAGS.cross else [])]
    if argv[1] == "plan":
        study.plan(cells, "experiments.table2", study.options_of(settings))
    elif argv[1] == "run":
        study.record_settings(settings.workdir, study.settings_content(settings))
        study.run(cells, flags.FLAGS.cells, settings.workdir)
    else:
        print(draw(settings))
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main, study.VERBS)
