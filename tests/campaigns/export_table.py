r"""The parity of every recipe's export in every format, at the size of a test.

    python -m tests.campaigns.export_table [--only=pe_se_resnext,rotation] [--scans=FOLDER]

For each recipe a model with random weights and batch statistics is exported, read again, and a line
is printed: PyTorch and ONNX against JAX (largest difference, relative to a layer's or an output's
largest value), half precision and 8-bit integers against ONNX (1 - the smallest cosine of a
slice's two embeddings). With `--scans` the exported `lung_box` is compared with the preparation's,
for each scan in the folder and at three sizes. Any difference ends the campaign with an error.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

import nibabel

from ctssl_jax.release import export
from ctssl_jax.torch_bridge import ctssl_torch
from ctssl_jax.training.recipe_files import recipe_names
from data_prep.raw import scans
from data_prep.scan.rules import Rules
from data_prep.scan.window import lung_box
from data_prep.system.errors import InputError
from tests.helpers.example_dataset import write_example_dataset
from tests.helpers.training_runs import save_untrained, tiny_recipe

FORMATS = ("safetensors", "onnx", "onnx_fp16", "onnx_int8")
SIZES = (512, 256, 96)


def write_table(folder: Path, names: list[str]) -> None:
    """Prints a line for each recipe."""
    dataset = write_example_dataset(
        folder / "data", image_size=32, masks=True, slice_labels=True, volume_labels=True
    )
    print("| recipe | network | layers | PyTorch | ONNX | half precision | integers |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in names:
        settings = {"image_size": 32, "windows": ((50.0, 350.0),)}
        if name == "pe_se_resnext":
            settings |= {"model__layers": (1, 1), "model__width": 8, "model__groups": 4}
        save_untrained(tiny_recipe(dataset, name, **settings), folder / name)
        with contextlib.redirect_stdout(io.StringIO()):
            manifest = export(
                folder / name, folder / f"{name}-export", FORMATS, "CC0-1.0", num_dataset_slices=12
            )
        again = max(ctssl_torch.verify(folder / f"{name}-export").values())
        if not again < 1e-4:
            sys.exit(f"{name}: the folder gives other outputs than were stored ({again:.1e})")
        parity, small = manifest["parity"], manifest["small_onnx"]
        print(
            f"| `{name}` | {manifest['architecture']} | {len(parity['stages'])} | "
            f"{parity['largest_difference']:.1e} | {manifest['onnx']['largest_difference']:.1e} | "
            f"{1 - small['onnx_fp16']['cosine']:.1e} | {1 - small['onnx_int8']['cosine']:.1e} |",
            flush=True,
        )


def compare_boxes(folder: Path) -> int:
    """The number of scans whose boxes are equal at all sizes; an unequal box ends the program."""
    equal = 0
    for path in sorted(folder.iterdir()):
        for scan in sorted(path.glob("*.nii.gz")) or [path]:
            try:
                plan = scans.plan_scans(scan, rules=Rules())
                (exam,) = plan.exams
            except (InputError, ValueError):
                continue  # no scan that the preparation takes, or several
            read = scans.read_scan(plan.input_dir, exam, ((50.0, 350.0),), 64, Rules(), b"key")
            if isinstance(read, scans.Refused):
                continue
            if scan.name.endswith(".nii.gz"):
                image = nibabel.load(scan)
                hu, affine = image.get_fdata(dtype="float32"), image.affine
            else:
                hu, affine = ctssl_torch.read_dicom(scan)
            for size in SIZES:
                volume = read.volume
                spacing, shape = volume.pixel_spacing_mm, volume.hu.shape[1:]
                expected = lung_box(volume.chest, shape, spacing, size)
                found = " ".join(map(str, ctssl_torch.lung_box(hu, affine, size)))
                if found != expected:
                    sys.exit(f"{scan.name}, {size} pixels: {found} instead of {expected}")
            equal += 1
            print(f"{scan.name}: {found} of {size} pixels", flush=True)
    return equal


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names of recipes, separated by commas")
    parser.add_argument("--scans", default="", help="folder of scans; no table of recipes")
    arguments = parser.parse_args()
    if arguments.scans:
        print(f"equal boxes of {compare_boxes(Path(arguments.scans))} scans")
        return
    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder), arguments.only.split(",") if arguments.only else recipe_names())


if __name__ == "__main__":
    main()
