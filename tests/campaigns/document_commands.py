r"""The commands of the documents, executed in order on a small phantom.

    python -m tests.campaigns.document_commands [--folder=FOLDER [--first=NUMBER]]

Each `bash` block runs as it stands in its document, by the `ctssl` of this environment and in one
folder with all others, but for the sizes, steps and folders that `SMALL` replaces. A block that
fails ends the campaign with its output. Blocks that cannot run here are in `NOT_HERE`, with the
reason. A block in neither table ends the campaign at once, so that none is forgotten.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]

NOT_HERE = {  # words of a block -> why
    "pip install -q": "an installation: what CI and a new user run first",
    "tests.campaigns.api_pages": "needs the extra docs: .ci/run has an environment for it",
    "#SBATCH": "needs a Slurm cluster: tests.campaigns.slurm",
    "gcloud": "needs a TPU pod",
    "dask scheduler": "needs the extra dask: tests.campaigns.dask_kills",
    "REFERENCE": "the paper's model needs an accelerator",
    "--topology": "needs libtpu: .ci/run has an environment for it",
    "nlst.txt": "a download of terabytes",
    "CT_RATE": "a gated data set",
    "MY_NIFTI": "needs NIfTI scans: tests/data_prep/scan/test_nifti.py",
    "tcia-lidc": "the annotations of LIDC-IDRI: tests.campaigns.lidc_counts",
    "--upload": "sends to a model hub: tests/ctssl_jax/release/test_hub.py has one",
    "ctssl recipe_choices run": "an hour: tests/experiments/test_recipe_choices.py",
    "ctssl figure3 run": "half an hour and more: tests/experiments",
    "ctssl figure6 run": "half an hour and more: tests/experiments",
    "--folds=4": "needs scans of a dozen patients, and hours: tests/experiments/test_studies.py",
    "--public_series": "a public collection: tests/ctssl_jax/release/test_page.py",
    "ctssl quickstart": "minutes: tests/experiments/test_quickstart.py",
}
SMALL = {
    "--config=masked_region ": "--config=masked_region:small --config.num_steps=2 ",
    "--config=pe ": "--config=pe:small --config.num_steps=2 ",
    "--config=pe:small ": "--config=pe:small --config.num_steps=2 ",
    "--config=nodules ": "--config=nodules:small --config.num_steps=2 ",
    "--config=nodules:small ": "--config=nodules:small --config.num_steps=2 ",
    "--config=mixed:small ": "--config=mixed:small --config.num_steps=2 ",
    "--config.num_steps=200": "--config.num_steps=2",
    "--config.num_steps=500": "--config.num_steps=2",
    "--config.num_steps=20 ": "--config.num_steps=2 ",
    " --config.dtype=bfloat16": "",
    "--settle_s=60 --idle_exit_s=3600": "--settle_s=0 --idle_exit_s=1",
    "--image_size=128": "--image_size=64",
    "--output_dir=DATASET\n": "--output_dir=DATASET --image_size=64\n",
    "--output_dir=SECOND ": "--output_dir=SECOND --image_size=64 ",
    "--output_dir=PE ": "--output_dir=PE --image_size=64 ",
    "--output_dir=NODULES ": "--output_dir=NODULES --image_size=64 --min_area_px=1 ",
    "=experiments/results": f"={PROJECT}/experiments/results",
    "--output=FILE.parquet": "--output=FILE.npz",  # pyarrow is no package of an extra
    "ctssl attributes --workdir=RUN": "ctssl attributes --min_patients=2 --workdir=RUN",
    "table2 run ": "table2 run --num_steps=2 --cells=mask_05,rotation ",
    "ctssl import_torch --checkpoint=last.pth.tar": ": a file of the authors',",
}
PHANTOMS = """
ctssl phantom --output_dir=RSNA --layout=rsna_pe --num_patients=8 --num_slices=20 --image_size=64
ctssl phantom --output_dir=LIDC --layout=lidc_idri --num_patients=8 --num_slices=24 --image_size=128
"""
ONE_SCAN = "ln -s SCANS/P0004 SCAN"
GROWN = """
ctssl phantom --output_dir=MORE_DICOM --num_patients=3 --seed=1 --num_slices=20 --image_size=64
mv DATASET FIRST && mv DATASET-audit FIRST-audit
"""
STEPS = {  # words of a block, in the order of running -> what runs before it
    "ctssl phantom": "",
    "labels.csv <<": "",
    "attributes.csv <<": "",
    "make_masks.py <<": "",
    "--labels_csv=labels.csv": "",
    "--workdir=LABEL_RUN": "",
    "--workdir=MASK_RUN": "",
    "--attributes=sex": "",
    "--archive=rsna_pe": PHANTOMS,
    "--archive=lidc_idri": "",
    "--audit_dir=DATASET-audit": "ln -s SCANS MY_DICOM",
    "--dataset=DATASET --html": "",
    "ctssl without_training": "",
    "ctssl recipes": "",
    "ctssl views": "",
    "--config=masked_region --config.dataset=DATASET": "rm -r RUN",
    "--config=mixed": "",
    "--workdir=NODULES_RUN --config": "",
    "--output=RESULT.json": "",
    "ctssl probe": "",
    "--workdir=NODULES_RUN --input": ONE_SCAN,
    "--watch": "ln -s SCANS/P0004 GROWING",
    "--format=torch": "ctssl evaluate --workdir=RUN --output=RESULT.json",
    "--format=onnx,": "",
    "--format=hub": "",
    "ctssl_torch.py FOLDER": "",
    "ctssl import_torch": "",
    "--coordinator_address": "rm -r RUN",
    "ctssl table2 run": "",
    "ctssl table2 draw --results": "",
    "--input_dir=MY_DICOM --output_dir=DATASET --dry_run": "rm -r RUN DATASET DATASET-audit",
    "--input_dir=MORE_DICOM": GROWN,
}


def blocks() -> list[tuple[str, str]]:
    """(document, text) of every `bash` block of the project's documents."""
    listed = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    return [
        (name, block)
        for name in listed.stdout.split()
        for block in re.findall(r"```bash\n(.*?)```", (PROJECT / name).read_text(), flags=re.DOTALL)
    ]


def plan() -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """What runs, (document, block, what before it) in order; and (document, reason) of the others.

    Raises:
        ValueError: a block is in no table, or a step has no block of its own.
    """
    left, chosen = blocks(), []
    aside = [(name, why) for name, text in left for words, why in NOT_HERE.items() if words in text]
    left = [(name, text) for name, text in left if not any(words in text for words in NOT_HERE)]
    for words, before in STEPS.items():
        found = [one for one in left if words in one[1]]
        if not found:
            raise ValueError(f"no block has the words {words!r}")
        chosen.append((*found[0], before))
        left.remove(found[0])
    if left:
        raise ValueError(f"a block is in no table: {left[0]}")
    return chosen, aside


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="", help="by default a temporary one")
    parser.add_argument("--first", type=int, default=0, help="go on with this block, in --folder")
    arguments = parser.parse_args()
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="documents"))
    folder.mkdir(parents=True, exist_ok=True)
    steps, aside = plan()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for number, (name, text, before) in enumerate(steps[arguments.first :], arguments.first):
        for old, new in SMALL.items():
            text = text.replace(old, new)
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{before}\n{text}"],
            cwd=folder,
            env={**os.environ, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        first = text.strip().splitlines()[0][:80]
        print(
            f"{number:2} {done.returncode} {time.monotonic() - began:6.1f} s  {name}: {first}",
            flush=True,
        )
        if done.returncode:
            print(done.stdout[-4000:])
            sys.exit(1)
    for name, why in aside:
        print(f"parsed only   {name}: {why}")
    print(f"{len(steps)} blocks executed, {len(aside)} parsed only")


if __name__ == "__main__":
    main()
