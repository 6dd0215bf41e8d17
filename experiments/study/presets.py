"""The downstream studies' arms and presets: plain data."""

from typing import Any, NamedTuple

TITLES = {
    "random": "random weights",
    "masked_05": "masked region, 5 %",
    "masked_10": "masked region, 10 %",
    "masked_20": "masked region, 20 %",
    "masked_33": "masked region, 33 %",
    "alone_10": "10 %, not chained",
    "alone_20": "20 %, not chained",
    "alone_33": "33 %, not chained",
    "area_20": "20 % of the area, one stage",
    "side_20": "20 % of the side",
    "gradient_20": "codebook by gradient",
    "minmax_20": "grey map by slice",
    "norms_20": "20 %, batch normalisation alone",
    "kernels_20": "20 %, convolutions alone",
    "next_slice": "next slice",
    "denoising": "denoising",
    "rotation": "rotation",
    "flip": "flip",
    "lejepa": "LeJEPA",
    "visreg": "VISReg",
    "vicreg": "VICReg",
    "simclr": "SimCLR",
    "dino": "DINO",
    "simmim": "SimMIM",
    "spark": "SparK",
    "se_resnext": "SE-ResNeXt-50 (SOTA)",
    "standard_unet": "standard U-Net",
    "shuffled": "control: shuffled labels",
}
# Synthetic patients need no secret; a fixed key gives the same splits everywhere.
SYNTHETIC_KEY = "the pseudonym key of the synthetic patients of the downstream studies"
MASKED = {"masked_05": 0.05, "masked_10": 0.10, "masked_20": 0.20, "masked_33": 0.33}
# From random weights, for as many steps as the chain took to get there: arm -> (mask, times).
ALONE = {"alone_10": ("masked_10", 2), "alone_20": ("masked_20", 3), "alone_33": ("masked_33", 4)}
# Masked region prediction, 20 %, one stage from random weights, with one field changed.
VARIANTS: dict[str, dict[str, Any]] = {
    "area_20": {},
    "side_20": {"mask.unit": "side"},
    "gradient_20": {
        "model.vq_update": "gradient",
        "model.vq_init": "uniform",
        "model.vq_revive_every": 0,
    },
    "minmax_20": {"normalize": "slice_minmax"},
}
# A part of the encoder of an arm; the rest starts from random weights: arm -> (arm, init_scope).
PARTS = {
    "norms_20": ("area_20", "encoder_norms"),
    "kernels_20": ("area_20", "encoder_kernels"),
}
# Not the paper's: pretrained with the compute of one stage of masked region prediction.
TODAYS = ("lejepa", "visreg", "vicreg", "simclr", "dino", "simmim", "spark")
OTHER_PRETEXTS = ("next_slice", "denoising", "rotation", "flip")
PRETEXTS = (*MASKED, *ALONE, *VARIANTS, *OTHER_PRETEXTS, *TODAYS)
# Arms whose network is not the pretrained encoder's, and the recipe of each.
OTHER_NETWORKS = {"se_resnext": "pe_se_resnext", "standard_unet": "nodules_standard_unet"}
# Arms from random weights that learn nothing which they are then asked.
CONTROLS = {"shuffled": {"shuffled_targets": True}}
# The window of emboli, which is the paper's, and the window of the lungs: a channel each.
WINDOWS = ((50.0, 350.0), (-600.0, 1500.0))

# Of today's objectives no rate is known before one was measured.
# Measured before on two busy cores at 64 x 64 pixels, evaluation included: 777 s for 1,500 steps of
# masked region prediction, 35 to 75 s for cells of 150 steps of `pe` and `nodules`, 79 to 108 s for
# 300 steps of flip prediction. The measured cells of a study come first.
SECONDS_A_STEP = dict.fromkeys(("masked_region", "next_slice", "denoising"), 0.52) | {
    **dict.fromkeys(("pe", "nodules"), 0.5),
    **dict.fromkeys(("rotation", "flip"), 0.36),
}
# Figure -> kind of its cells and its arms.
FIGURES = {
    "figure3": ("pe", ("random", "masked_05", "masked_20", *OTHER_PRETEXTS, "se_resnext")),
    "figure4": ("pe", ("random", *MASKED, *ALONE)),
    "figure5": ("nodules", ("random", "masked_20", *OTHER_PRETEXTS, "standard_unet")),
    "figure_s1": ("nodules", ("random", *MASKED, *ALONE)),
    "confounds": ("pe", (*VARIANTS, *PARTS, "alone_20", "masked_20", "random")),
}


class Archive(NamedTuple):
    """A synthetic archive of the phantom preset.

    layout: of `data_prep.phantom`, and `--archive` of `data_prep.prepare`.
    num_patients, seed: of the phantom.
    splits: of `data_prep.prepare`.
    made_with, prepared_with: further flags of the two, e.g. `{"num_slices": 32}`.
    """

    layout: str
    num_patients: int
    seed: int
    splits: str
    made_with: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    prepared_with: dict[str, Any] = {}  # noqa: RUF012 (never changed)


class Preset(NamedTuple):
    """Size of all studies.

    size: of the recipes.
    archives: dataset -> synthetic archive; empty where the user gives the datasets.
    fractions: shares of the training studies.
    seeds: of weights, data order and subset.
    pretraining_steps: of each pretext; 0 takes the number of the recipe.
    steps: kind of study (`pe`, `nodules`, `attributes`) -> training steps of its cells, one curve
      each; 0 takes the number of the recipe.
    windows: (level, width) in HU of each channel of the datasets and the networks; () leaves the
      window of preparation and recipes.
    overrides: fields of the recipes, e.g. `{"dtype": "bfloat16"}`.
    left_out: arms that run only if `--arms` names them, so that a figure takes less than an hour on
      two cores.
    two_shares: arms that run only at the smallest and the largest share.
    """

    size: str
    archives: dict[str, Archive]
    fractions: tuple[float, ...]
    seeds: tuple[int, ...]
    pretraining_steps: int
    steps: dict[str, tuple[int, ...]]
    windows: tuple[tuple[float, float], ...] = ()
    overrides: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    left_out: tuple[str, ...] = ()
    two_shares: tuple[str, ...] = ()


PRESETS = {
    "phantom": Preset(
        size="small",
        archives={
            "pretraining": Archive("dicom", 72, 0, "0.8,0.1,0.1"),
            "pe": Archive("rsna_pe", 120, 1, "0.4,0.15,0.45"),
            "nodules": Archive("lidc_idri", 100, 2, "0.4,0.15,0.45"),
            "attributes": Archive("dicom", 160, 3, "0.5,0.2,0.3"),
        },
        fractions=(0.125, 0.25, 1.0),
        seeds=(0, 1, 2),
        pretraining_steps=500,
        steps={"pe": (150,), "nodules": (50, 150), "attributes": (100,)},
        left_out=("next_slice", "denoising", "flip", *ALONE),
    ),
    # All arms, five shares, longer training: to be run in parts, see `plan` for the hours. If it
    # takes more than 24 hours of two cores, drop, in this order: the arms of `ALONE` (--arms),
    # seeds 1 and 2 (--seeds), the middle shares of the arms of `two_shares`.
    "study": Preset(
        size="small",
        archives={
            "pretraining": Archive(
                "dicom", 120, 0, "0.8,0.1,0.1", {"field": "mediastinum", "image_size": 64}
            ),
            # Fields of view of 2.3 to 2.8 mm a pixel. An embolus that counts covers 12 pixels, a
            # nodule 5 pixels of a slice: smaller ones were not learned.
            "pe": Archive(
                "rsna_pe",
                480,
                1,
                "0.6,0.1,0.3",
                {"field": "mediastinum", "image_size": 64, "min_embolus_mm2": 85},
            ),
            "nodules": Archive(
                "lidc_idri",
                240,
                2,
                "0.7,0.05,0.25",
                {"field": "lung", "image_size": 64},
                {"min_area_px": 5},
            ),
            "attributes": Archive("dicom", 160, 3, "0.5,0.2,0.3"),
        },
        fractions=(0.03125, 0.0625, 0.125, 0.25, 1.0),
        seeds=(0, 1, 2),
        pretraining_steps=750,
        steps={"pe": (1_600,), "nodules": (800,), "attributes": (100,)},
        windows=WINDOWS,
        two_shares=("se_resnext", "standard_unet", *VARIANTS, *PARTS),
    ),
    "paper": Preset(
        size="reference",
        archives={},
        # of 1.54 million slices: the paper's 60, 115, 380 and 770 thousand
        fractions=(0.04, 0.075, 0.25, 0.5, 1.0),
        seeds=(0, 1, 2),
        pretraining_steps=0,
        steps={"pe": (0,), "nodules": (2_000, 5_000, 20_000), "attributes": (0,)},
        overrides={"dtype": "bfloat16"},
        left_out=tuple(ALONE),
    ),
}
