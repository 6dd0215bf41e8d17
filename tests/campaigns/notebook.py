r"""Executes `experiments/first_steps.ipynb` as a reader would, in an empty folder.

    python -m tests.campaigns.notebook            # and checks what its cells show
    python -m tests.campaigns.notebook --write    # and keeps that in the file

Needs the extra `docs`. Progress bars and warnings (stderr) are not kept, pictures with 64 colours.
"""

import argparse
import base64
import io
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
NOTEBOOK = PROJECT / "experiments" / "first_steps.ipynb"
MOST_BYTES = 500_000  # of the file, with its pictures
_PICTURES = ("Image(", "plt.subplots(")  # a cell with one of these shows a picture
_QUIET = ("os.chdir(",)  # a cell with one of these shows nothing
# A path of this machine, but not a program's `/bin/sh` and no `HU/mm`.
_ABSOLUTE = re.compile(r"(?<![\w.:])/(?:home|root|Users|mnt|opt|tmp|work|var|usr|data)/\w+")


def read() -> dict[str, Any]:
    """The notebook as it is in the checkout."""
    return json.loads(NOTEBOOK.read_text())


def problems(notebook: dict[str, Any]) -> list[str]:
    """What is wrong with the outputs of a notebook of format 4, a line each."""
    found = []
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        source, outputs = "".join(cell["source"]), cell["outputs"]
        kinds = {one["output_type"] for one in outputs}
        shown = {kind for one in outputs for kind in one.get("data", {})}
        if "error" in kinds:
            found.append(f"cell {number} failed")
        if not outputs and not any(word in source for word in _QUIET):
            found.append(f"cell {number} shows nothing")
        if any(word in source for word in _PICTURES) and "image/png" not in shown:
            found.append(f"cell {number} shows no picture")
        texts = [one.get("text", "") for one in outputs]
        texts += [one.get("data", {}).get("text/plain", "") for one in outputs]
        for text in ["".join(text) for text in [source, *texts]]:
            found += [f"cell {number} names {path}" for path in _ABSOLUTE.findall(text)]
    return found


def execute(notebook: Any, folder: Path) -> None:
    """Run all cells, with the commands of this environment; the outputs replace those of before."""
    from nbclient import NotebookClient

    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute()


def tidy(cell: Any) -> None:
    """Drop what is of this execution alone, and make the pictures of a cell smaller."""
    cell.metadata.pop("execution", None)  # the hour at which it ran
    if cell.cell_type != "code":
        return
    cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    for output in cell.outputs:
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = _smaller(output.data["image/png"])


def _smaller(png: str) -> str:
    """A PNG picture in base64 with a palette of 64 colours."""
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    packed = io.BytesIO()
    picture.quantize(64, dither=Image.Dither.NONE).save(packed, "PNG", optimize=True)
    return base64.b64encode(packed.getvalue()).decode()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the outputs in the file")
    arguments = parser.parse_args()

    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="first_steps") as folder:
        execute(notebook, Path(folder))
    for cell in notebook.cells:
        tidy(cell)
    nbformat.validate(notebook)
    text = nbformat.writes(notebook) + "\n"
    wrong = problems(json.loads(text))
    if len(text) > MOST_BYTES:
        wrong.append(f"{len(text):,} bytes, more than {MOST_BYTES:,}")
    print("\n".join(wrong) or f"all cells ran in {time.monotonic() - began:.0f} s")
    if arguments.write:
        NOTEBOOK.write_text(text)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
