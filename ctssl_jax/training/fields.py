"""The fields of recipes: meaning, type and allowed values of each, as plain data.

`config.mask.fraction` is `FIELDS["mask.fraction"]`. A recipe has the fields that its task needs.
"""

import math
from typing import Any, NamedTuple

from ctssl_jax.tasks.interface import HIGHER_IS_BETTER


class Field(NamedTuple):
    """One field of a recipe.

    kind: type of the value.
    meaning: with its unit.
    choices: all allowed values; empty if there are others.
    items: type of each item of a tuple; None for pairs.
    pairs: what the two numbers of each item are, such as "(level, width)"; "" where items are no
      pairs, or pairs that are checked elsewhere.
    at_least, above, at_most, below: bounds of the value, or of each number of a tuple.
    """

    kind: type
    meaning: str
    choices: tuple[str, ...] = ()
    items: type | None = None
    pairs: str = ""
    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def remedy(self, value: Any) -> str:
        """Which values are allowed, if this one is not; "" if it is."""
        if self.choices:
            return "" if value in self.choices else f"choose one of {', '.join(self.choices)}"
        is_tuple = isinstance(value, list | tuple)
        if is_tuple != (self.kind is tuple):
            return f"must be {_WORDS[self.kind]}"
        values = value if is_tuple else (value,)
        kind = self.items if is_tuple else self.kind
        if kind and not all(_is(item, kind) for item in values):
            return f"{'each of its items ' if is_tuple else ''}must be {_WORDS[kind]}"
        if self.pairs:
            if not all(map(_is_pair, values)):
                return f"must hold {self.pairs} pairs of numbers, e.g. '((50, 350),)'"
            values = [number for pair in values for number in pair]
        if any(isinstance(number, float) and not math.isfinite(number) for number in values):
            return "must be a finite number"
        if all(
            self.at_least <= number <= self.at_most and self.above < number < self.below
            for number in values
            if isinstance(number, int | float)
        ):
            return ""
        bounds = {
            "{} or more": self.at_least,
            "above {}": self.above,
            "at most {}": self.at_most,
            "below {}": self.below,
        }
        words = [text.format(bound) for text, bound in bounds.items() if math.isfinite(bound)]
        return f"must be {' and '.join(words)}"


_WORDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: "a tuple, e.g. '(1, 2)'",
}


def _is(value: Any, kind: type) -> bool:
    """Whether a value has this type; whole numbers are numbers, truth values are not."""
    if kind is float:
        kind = int | float
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)


def _is_pair(value: Any) -> bool:
    """Whether a value is two numbers."""
    is_tuple = isinstance(value, list | tuple)
    return is_tuple and len(value) == 2 and all(_is(number, float) for number in value)


FIELDS = {
    "recipe": Field(str, "name in results and tables"),
    "task": Field(
        str,
        "what the model learns; the recipe has the fields of this task",
        (
            "masked_region",
            "next_slice",
            "denoising",
            "spark",
            "rotation",
            "flip",
            "lejepa",
            "visreg",
            "vicreg",
            "simclr",
            "dino",
            "mixed",
            "slice_label",
            "slice_label_se_resnext",
            "segmentation",
            "segmentation_standard_unet",
        ),
    ),
    # ---- data
    "dataset": Field(str, "dataset directory made by data_prep.prepare, or its URL; required"),
    "windows": Field(
        tuple,
        "(level, width) in HU of each channel that is read; () reads all channels of the dataset",
        pairs="(level, width)",
    ),
    "image_size": Field(int, "side of the images in pixels; must be the dataset's", at_least=1),
    "normalize": Field(
        str,
        "window: the same HU is the same grey; slice_minmax: each slice is stretched (the authors' "
        "release)",
        ("window", "slice_minmax"),
    ),
    "train_fraction": Field(
        float, "share of the training split, by whole studies drawn by the seed", above=0, at_most=1
    ),
    "seed": Field(int, "of weights, order of slices, masks and noise", at_least=0, below=2**32),
    "reading_threads": Field(int, "threads that read slices", at_least=1),
    "shuffle": Field(
        str,
        "order of the training slices. global: uniformly random, the same on any number of "
        "processes; windowed: random shards, and random slices in windows of them, for datasets "
        "that are larger than a disk",
        ("global", "windowed"),
    ),
    "shuffle_window": Field(int, "slices of a window (only windowed), in each stream", at_least=1),
    "shuffle_streams": Field(
        int,
        "streams that give an equal part of each batch (only windowed), shared by the processes, "
        "whose number must divide it; 0: one a process, which a new run records",
        at_least=0,
    ),
    "shards_gb": Field(
        float,
        "bound of the training shards of a dataset on a store that lie on the disk of a process "
        "at a time (only windowed)",
        above=0,
    ),
    # ---- weights of another run
    "init_from": Field(
        str,
        "run directory (or export: folder, zip, hf-hub:ORG/NAME) that the weights come from; "
        '"" starts from random weights',
    ),
    "init_scope": Field(
        str,
        "model: all tensors, which must fit; encoder: the encoder alone; compression: the "
        "encoder's first layers alone; encoder_norms, encoder_kernels: its batch normalisation "
        "alone, or all but that (which of the two pretraining taught)",
        ("model", "encoder", "compression", "encoder_norms", "encoder_kernels"),
    ),
    "init_checkpoint": Field(str, "best, last or the number of a step"),
    "init_weights": Field(
        str,
        'file of weights (.safetensors, .pt, .pth) in the layout of timm or the older one; "" '
        "starts from random weights. But for ImageNet weights that are known by their SHA-256, and "
        "exports of runs on this dataset, it falls under `leakage`",
    ),
    "leakage": Field(
        str,
        "weights that were learned from validation or test patients of the dataset. refuse: "
        "refused; allow_unchecked: allowed if the patients cannot be compared (other pseudonym "
        "key, or a file of weights from elsewhere); allow: allowed. Results say it",
        ("refuse", "allow_unchecked", "allow"),
    ),
    # ---- pretext tasks
    "objectives": Field(
        tuple,
        "(task, weight) pairs: pretext tasks and joint embeddings that one encoder learns at once, "
        "and the factor of the loss of each; the fields of all others have no effect",
    ),
    "mask.fraction": Field(
        float, "size of the masked square; 0.05, 0.10, 0.20 and 0.33 in the paper", above=0, below=1
    ),
    "mask.unit": Field(
        str,
        "of the fraction. area: share of the image area (the paper's text); side: share of the "
        "image's side (the release)",
        ("area", "side"),
    ),
    "mask.margin": Field(
        int,
        "rows and columns at the bottom and right where no mask may lie; 100 in the release",
        at_least=0,
    ),
    "mask.fill": Field(float, "grey value of the masked square"),
    "mask.block": Field(
        int,
        "0: one square anywhere; else the side in pixels of squares of a grid, as many as make up "
        "the fraction of the area",
        at_least=0,
    ),
    "slice_gap": Field(
        int, "the target lies this many slices further towards superior", at_least=1
    ),
    "noise.fraction": Field(
        float,
        "probability that a pixel is noisy: white or black with equal probability",
        above=0,
        at_most=1,
    ),
    # ---- joint embeddings
    "views.num_global": Field(int, "large views of an item", at_least=1),
    "views.num_local": Field(int, "small views of an item", at_least=0),
    "views.global_size": Field(int, "side of a large view in pixels", at_least=4),
    "views.local_size": Field(int, "side of a small view in pixels", at_least=4),
    "views.global_area": Field(
        tuple,
        "smallest and largest share of the slice's area in a large view",
        items=float,
        above=0,
        at_most=1,
    ),
    "views.local_area": Field(tuple, "the same for a small view", items=float, above=0, at_most=1),
    "views.slices": Field(
        int,
        "slices of an item, from which views in a row come in turn, never across a gap",
        at_least=1,
    ),
    "views.slab_mm": Field(float, "largest distance of two slices of an item", above=0),
    "views.flip": Field(
        bool, "exchange left and right in half of the views; it hides on which side organs lie"
    ),
    "views.window_shift": Field(
        float, "the window's level moves by up to this share of its width", at_least=0, at_most=0.5
    ),
    "views.window_width": Field(
        float,
        "w: the window's width is multiplied by 1 - w to 1 + w",
        at_least=0,
        at_most=0.9,
    ),
    "views.gamma": Field(
        float, "g: grey values are raised to a power of 1 - g to 1 + g", at_least=0, at_most=0.9
    ),
    "views.noise": Field(
        float, "largest standard deviation of noise, as share of the window", at_least=0, at_most=1
    ),
    "views.blur": Field(
        float, "largest standard deviation of a blur in pixels of the view", at_least=0, at_most=1.5
    ),
    "regulariser.weight": Field(
        float,
        "of the term that keeps features apart; the views' agreement has the rest of 1",
        at_least=0,
        at_most=1,
    ),
    "regulariser.directions": Field(
        int, "random directions that projections are compared along, new in each step", at_least=1
    ),
    "temperature": Field(float, "of the cosines between projections", above=0),
    "teacher.momentum": Field(
        float,
        "of the teacher's weights at the start; it rises to 1 by a cosine over num_steps",
        at_least=0,
        at_most=1,
    ),
    "teacher.temperature": Field(
        tuple, "of the teacher's scores, at the start and after the warm-up", items=float, above=0
    ),
    "teacher.warmup_steps": Field(
        int,
        "steps in which the teacher's temperature moves from the first to the second",
        at_least=0,
    ),
    "teacher.student_temperature": Field(float, "of the student's scores", above=0),
    "teacher.centre_momentum": Field(
        float, "of the centre that is subtracted from the teacher's scores", at_least=0, at_most=1
    ),
    "teacher.frozen_steps": Field(
        int, "steps in which the prototypes keep their values", at_least=0
    ),
    # ---- labels and masks
    "label": Field(
        str, "a label of the dataset, of slices, volumes or patients; or sex, ethnic_group or age"
    ),
    "num_classes": Field(int, "classes of the label; 0 takes as many as the label has", at_least=0),
    "slices": Field(
        str,
        "all, or middle: one slice a volume (its largest body cross-section)",
        ("all", "middle"),
    ),
    "positive_share": Field(
        float,
        "share of positive slices in training batches; 0 takes them as they come",
        at_least=0,
        below=1,
    ),
    "shuffled_targets": Field(
        bool,
        "control: each training slice gets the label or mask of another one, drawn by `seed`; what "
        "is learned then is no better than chance",
    ),
    "crop": Field(
        str,
        "none, or lung_box: the volume's lungs, enlarged to the whole image",
        ("none", "lung_box"),
    ),
    "augmentation.contrast": Field(
        float,
        "c: the distance from the mean grey value is multiplied by 1 - c to 1 + c",
        at_least=0,
        at_most=1,
    ),
    "augmentation.shift": Field(
        float, "share of the side, in both directions of each axis", at_least=0, at_most=1
    ),
    "augmentation.scale": Field(
        float, "s: enlarged by a factor of 1 - s to 1 + s", at_least=0, at_most=0.99
    ),
    "augmentation.rotation_degrees": Field(float, "in both directions", at_least=0, at_most=180),
    "augmentation.cutout_holes": Field(int, "number of black rectangles", at_least=0, at_most=100),
    "augmentation.cutout_side": Field(
        float, "largest side of a rectangle, as share of the image", at_least=0, at_most=1
    ),
    "augmentation.flip": Field(bool, "exchange left and right in half of the slices"),
    # ---- model
    "model.in_channels": Field(
        int, "channels of the input; 3 for weights of the authors' shape", at_least=1
    ),
    "model.hidden": Field(
        tuple, "features at 1/2 and at 1/4 of the resolution", items=int, at_least=1
    ),
    "model.depth": Field(
        int, "residual blocks in the encoder, and as many in a decoder", at_least=0
    ),
    "model.embedding_dim": Field(int, "features of a latent and of a code", at_least=1),
    "model.drop_rate": Field(
        float, "dropout in the encoder's residual blocks", at_least=0, below=1
    ),
    "model.num_codes": Field(int, "entries of the codebook", at_least=1),
    "model.output_activation": Field(
        str,
        "unit_tanh: (tanh + 1) / 2; tanh: for weights of the authors' shape",
        ("unit_tanh", "tanh"),
    ),
    "model.vq_update": Field(
        str,
        "how the codebook learns. gradient: the paper's; ema: moving averages of its latents",
        ("gradient", "ema"),
    ),
    "model.vq_ema_decay": Field(float, "decay of the moving averages", at_least=0, below=1),
    "model.vq_init": Field(
        str,
        "uniform (the release), or data: from the latents of the first batch (only ema)",
        ("uniform", "data"),
    ),
    "model.vq_revive_every": Field(
        int,
        "steps (microbatches) between revivals of unused codes (only ema); 0 never revives",
        at_least=0,
    ),
    "model.vq_revive_below": Field(
        float, "a code is unused below this fraction of an equal share of the latents", at_least=0
    ),
    "model.compression": Field(
        tuple,
        "features after each 3 x 3 convolution with stride 2 on the latents",
        items=int,
        at_least=1,
    ),
    "model.residual_stack": Field(
        bool, "the encoder's residual blocks are the bottleneck of the U-Net"
    ),
    "model.widths": Field(
        tuple, "features at 1, 1/2, 1/4, 1/8 and 1/16 of the resolution", items=int, at_least=1
    ),
    "model.layers": Field(tuple, "blocks of each stage", items=int, at_least=1),
    "model.width": Field(int, "features of the stem; all other widths follow from it", at_least=4),
    "model.pooling": Field(
        str,
        "of the stem. legacy: no padding, rounded up (the winner's network); timm: one pixel of "
        "padding; auto: the one of the weights that the run begins with, else legacy. The run "
        "keeps which",
        ("auto", "legacy", "timm"),
    ),
    "model.groups": Field(
        int, "groups of the 3 x 3 convolutions; must divide twice the width", at_least=1
    ),
    "model.pooled": Field(
        str,
        "what the feature of a slice is the mean of. latents: the encoder's output; map: its "
        "features before the projection to latents; both: the map's, then the latents'",
        ("latents", "map", "both"),
    ),
    "model.neck": Field(
        str,
        "in place of the mean over pixels. none; attention: a mean with weights, for each feature "
        "a softmax over pixels; stages: two convolutions with stride 2, then the mean",
        ("none", "attention", "stages"),
    ),
    "model.decoder_depth": Field(
        int, "residual blocks of the decoder that predicts masked blocks", at_least=0
    ),
    "model.projector": Field(
        tuple,
        "features after each layer of the projector, which training alone uses",
        items=int,
        at_least=1,
    ),
    "model.num_prototypes": Field(
        int, "vectors that projections are compared with; 0 without a teacher", at_least=0
    ),
    # ---- loss
    "loss.mse": Field(float, "weight of the mean squared error"),
    "loss.masked_mse": Field(float, "weight of the mean squared error inside the mask"),
    "loss.masked_l1": Field(float, "weight of the mean absolute error inside the mask"),
    "loss.vq": Field(float, "weight of the vector quantization loss"),
    "loss.ssim": Field(float, "weight of the structural similarity, which is subtracted"),
    "loss.bce": Field(float, "weight of the binary cross-entropy"),
    "loss.dice": Field(float, "weight of the soft Dice loss"),
    "loss.invariance": Field(float, "weight of the squared difference of two views"),
    "loss.variance": Field(float, "weight of the hinge on standard deviations below 1"),
    "loss.covariance": Field(float, "weight of the squared covariances of dimensions"),
    "commitment": Field(
        float, "beta: weight of the commitment loss in the vector quantization loss", at_least=0
    ),
    "ssim_rescale": Field(
        bool, "stretch each prediction to [0, 1] for the SSIM of the loss (the release)"
    ),
    # ---- optimizer
    "optimizer": Field(str, "of all weights", ("radam", "adamw")),
    "learning_rate": Field(float, "after the warm-up", at_least=0),
    "encoder_learning_rate_factor": Field(
        float,
        "factor of the encoder's steps (of all but the last layer of SE-ResNeXt). 0 freezes it: no "
        "gradient, no optimizer state, batch statistics as in evaluation",
        at_least=0,
    ),
    "schedule": Field(
        str, "cosine and linear fall until num_steps", ("constant", "cosine", "linear")
    ),
    "learning_rate_floor": Field(
        float, "share of the learning rate that cosine and linear fall to", at_least=0, at_most=1
    ),
    "prolonged": Field(
        tuple,
        "(step, number) pairs: up to the step, num_steps was the number. A run whose num_steps "
        "grows records them itself; () in a new run",
    ),
    "warmup_steps": Field(int, "steps in which the learning rate rises from zero", at_least=0),
    "weight_decay": Field(float, "decoupled from the gradients", at_least=0),
    "gradient_clip": Field(
        float,
        "largest global norm of the gradients of all trained parameters; 0 does not clip",
        at_least=0,
    ),
    # ---- execution
    "num_steps": Field(int, "training steps", at_least=1),
    "batch_size": Field(int, "slices a step, over all devices", at_least=1),
    "microbatches": Field(
        int,
        "parts of a batch, computed in turn; BatchNorm and a codebook of averages see each part",
        at_least=1,
    ),
    "dtype": Field(
        str, "of convolutions; weights, statistics and losses are float32", ("float32", "bfloat16")
    ),
    "remat": Field(bool, "recompute residual blocks in the backward pass: less memory, more time"),
    "scan": Field(
        bool, "residual blocks as one loop: smaller programs on accelerators, slow on CPU"
    ),
    "fsdp_devices": Field(
        int,
        "devices that share one copy of parameters and optimizer state; 1: each has a whole copy",
        at_least=1,
    ),
    "batch_norm_group": Field(
        int,
        "neighbouring devices that share BatchNorm statistics; 0: all, which is one model's batch",
        at_least=0,
    ),
    # ---- reports
    "log_every": Field(int, "steps between reports of the training", at_least=1),
    "eval_every": Field(
        int, "steps between checkpoints, each with a validation and pictures", at_least=1
    ),
    "best_by": Field(
        str,
        "validation score that chooses the best checkpoint, of those that the task reports; of "
        "equal ones the later is taken, step 0 never",
        tuple(HIGHER_IS_BETTER),
    ),
    "validation_slices": Field(
        int,
        "slices of a validation, spread over patients, and with as many positive ones as the split "
        "has, but 64 at least; 0, or more than the split has: the whole split, as in evaluate",
        at_least=0,
    ),
    "num_pictures": Field(int, "validation slices in each picture", at_least=1),
}
