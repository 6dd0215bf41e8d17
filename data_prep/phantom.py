"""Makes a synthetic archive of chest CT: genuine DICOM files of made-up patients, a folder each.

    ctssl phantom --output_dir=DIR --num_patients=24 --seed=0

Patient i of a seed is always the same, whatever the number of patients or workers, and on x86
processors with AVX2 alone or AVX-512 (numpy's functions are kept to the former), so an archive can
be continued after an interruption or grown with a larger `--num_patients` in the same folder.
The whole chest, apex to base, takes about 90 to 160 slices at the spacings of 2 to 3 mm that the
scanners use; `--slice_spacing_mm=3` keeps it near 100, and `--num_slices` takes a random contiguous
part of it.

`--layout` decides the folders and which findings are written down. Patients of different layouts or
seeds are different people:

    dicom       P0000/... as scanners name files. Some patients have lung nodules or pulmonary
                emboli, without labels.
    rsna_pe     train.csv and train/<study>/<series>/<instance>.dcm, as the RSNA STR Pulmonary
                Embolism data. About half of the exams have emboli. Age, sex and group are in
                attributes.csv, not in the headers.
    lidc_idri   PHANTOM-0001/<study>/<series>/ with the files and the XML of four readers who
                outline lung nodules.

With `--num_slices` the part of the chest holds the central pulmonary arteries in rsna_pe, nearly
always a nodule in lidc_idri. Ethnic Group (0010,2160) holds a made-up group (group_a, group_b,
group_c) that leaves a faint trace in muscle and fat, independent of age and sex. `phantom.json` in
the folder holds the options.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

import os

from absl import flags

from data_prep.system import command_line, stores

FLAGS = flags.FLAGS


def main(argv: list[str]) -> int:
    from data_prep.synthetic.archive import make_archive
    from data_prep.synthetic.exam import Options

    options = Options(
        seed=FLAGS.seed,
        image_size=FLAGS.image_size,
        num_slices=FLAGS.num_slices,
        slice_spacing_mm=FLAGS.slice_spacing_mm,
        layout=FLAGS.layout,
        field=FLAGS.field,
        min_embolus_mm2=FLAGS.min_embolus_mm2,
    )
    output_dir = stores.local_path(FLAGS.output_dir, "--output_dir", "choose a folder here")
    count = make_archive(output_dir, FLAGS.num_patients, options, FLAGS.num_workers)
    print(
        f"{count} files written; {FLAGS.output_dir} holds {FLAGS.num_patients} synthetic patients"
    )
    scans, dataset = f"--input_dir={FLAGS.output_dir}", f"--output_dir={FLAGS.output_dir}-dataset"
    command_line.suggest("prepare", f"--archive={FLAGS.layout}", scans, dataset, "--image_size=64")
    return 0


def define_flags() -> None:
    """Only where this module is the program: another one may define flags of the same names."""
    flags.DEFINE_string(
        "output_dir", None, "Folder of the archive; made, continued or grown.", required=True
    )
    flags.DEFINE_enum(
        "layout",
        "dicom",
        ["dicom", "rsna_pe", "lidc_idri"],
        "Folders and labels: see the top of this module.",
    )
    flags.DEFINE_integer("num_patients", 24, "Number of patients.")
    flags.DEFINE_integer("seed", 0, "Seed of everything.")
    flags.DEFINE_integer("image_size", 512, "Rows and columns of a slice.")
    flags.DEFINE_integer(
        "num_slices", 0, "Slices of a random contiguous part of the chest; 0: apex to base."
    )
    flags.DEFINE_float(
        "slice_spacing_mm", 0.0, "Slice spacing and thickness; 0: the scanner's choice, at most 3."
    )
    flags.DEFINE_enum(
        "field",
        "body",
        ["body", "lungs", "lung", "mediastinum"],
        "What the reconstructed field of view holds.",
    )
    flags.DEFINE_float(
        "min_embolus_mm2",
        20.0,
        "--layout=rsna_pe: a slice is positive if emboli cover so many mm^2 of it. Coarse pixels "
        "want more, so that an embolus that counts can be seen.",
    )
    flags.DEFINE_integer("num_workers", os.cpu_count() or 1, "Processes.")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
