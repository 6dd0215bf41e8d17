"""Numbers that the paper prints, to stand beside ours: the only results here that are typed in."""

# Table I, column LIDC-IDRI.
TABLE1 = {
    "Volumes": 1012,
    "Slices": 10005,
    "Cancer: volumes": 388,
    "Ambiguous: volumes": 547,
    "No cancer: volumes": 394,
    "Malignancy score 1: slices": 923,
    "Malignancy score 2: slices": 1114,
    "Malignancy score 3: slices": 3473,
    "Malignancy score 4: slices": 2126,
    "Malignancy score 5: slices": 2369,
    "Patients": 840,
}

# Table II: mean and standard deviation over 128 hold-out volumes. `masked_mse_batch_sum` because
# the paper's masked MSE is probably the sum over a batch of 16, `double_softmax_cross_entropy`
# because its cross-entropies equal the floor of a softmax applied twice.
TABLE2 = {
    "next_slice": {"mse": (0.0233, 0.0033), "ssim": (0.6950, 0.0290)},
    "mask_05": {
        "mse": (0.0073, 0.0009),
        "masked_mse_batch_sum": (0.1333, 0.0722),
        "ssim": (0.744, 0.0143),
    },
    "mask_10": {
        "mse": (0.0044, 0.0002),
        "masked_mse_batch_sum": (0.1226, 0.0557),
        "ssim": (0.7903, 0.0107),
    },
    "mask_20": {
        "mse": (0.0029, 0.0002),
        "masked_mse_batch_sum": (0.0988, 0.0494),
        "ssim": (0.8527, 0.0115),
    },
    "mask_33": {
        "mse": (0.0045, 0.0003),
        "masked_mse_batch_sum": (0.1000, 0.1142),
        "ssim": (0.8307, 0.0117),
    },
    "denoising": {"mse": (0.0029, 0.0011), "ssim": (0.8756, 0.0269)},
    "rotation": {"double_softmax_cross_entropy": (0.7436, 0.0001), "auroc": (1.0, None)},
    "flip": {"double_softmax_cross_entropy": (0.7533, 0.0599), "auroc": (0.85, None)},
}
