r"""Pulmonary embolism on a slice by SE-ResNeXt-50 32x4d: the RSNA challenge winner's slice stage (paper, "SOTA").

    python -m ctssl_jax.train --config=configs/pe_se_resnext.py --config.dataset=DATASET --workdir=RUN \
        --config.init_weights=seresnext50_32x4d.safetensors --config.dtype=bfloat16

Three adjacent slices as channels, level 100 / width 700 (`--window=100,700` of `data_prep.prepare`, one of the defaults
of `--archive=rsna_pe`), each image stretched from its minimum to its maximum and cropped to the lungs; binary
cross-entropy, Adam, one epoch, learning rate falling to zero. Weights of ImageNet are a file of yours in timm's or the
older layout; without them training starts from random ones, which cost the winner about 0.09 of AUROC.
"""

import ml_collections

from configs import pe


def get_config(size: str = "reference") -> ml_collections.ConfigDict:
    """The winner's recipe; the number of steps is one epoch of its training split, 1,542,133 slices."""
    config = pe.get_config(size)
    config.recipe = config.recipe.replace("pe", "pe_se_resnext")
    config.task = "slice_label_se_resnext"
    config.windows = ((100, 700),)
    config.image_size = 576
    config.normalize = "slice_minmax"
    config.crop = "lung_box"
    config.init_scope = "model"
    config.init_weights = ""  # file of ImageNet weights (.safetensors, .pth); "" starts from random ones
    config.model = ml_collections.ConfigDict()
    config.model.in_channels = 3
    config.model.layers = (3, 4, 6, 3)  # blocks of each stage
    config.model.width = 64  # features of the stem; all other widths follow
    config.model.groups = 32  # of the 3 x 3 convolutions
    config.augmentation.contrast = 0.2
    config.augmentation.shift = 0.2
    config.augmentation.scale = 0.2
    config.augmentation.rotation_degrees = 20.0
    config.augmentation.cutout_holes = 2
    config.augmentation.cutout_side = 0.4
    config.learning_rate = 4e-4
    config.schedule = "linear"
    config.batch_size = 128
    config.num_steps = 12_048
    if size == "small":
        config.image_size = 64
        config.model.layers = (1, 1, 1, 1)
        config.model.width = 16
        config.model.groups = 8
        config.learning_rate = 2e-3
        config.batch_size = 16
        config.num_steps = 200
    return config
