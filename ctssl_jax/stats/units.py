"""The `unit` of each measure in results files."""

CALIBRATION_BINS = 15
UNITS = {
    # Means over the slices of a volume.
    "mse": "mean squared difference of grey values in [0, 1]",
    "masked_mse": "the same over masked pixels, per-pixel mean",
    "block_mse": "the same over masked pixels, each block with its mean and deviation taken out",
    "loss": "of one objective of several, without its weight",
    "masked_mse_batch_sum": "16 x masked_mse: the sum over a batch of 16 that the authors' "
    "release reports",
    "ssim": "structural similarity, Gaussian 11 x 11, sigma 1.5",
    "cross_entropy": "natural units, on logits",
    "double_softmax_cross_entropy": "natural units, softmax applied twice, as the paper's Table "
    "II appears to be",
    "accuracy": "share of slices",
    "binary_cross_entropy": "natural units, on logits, mean over pixels",
    "auroc_within_volumes": "one class against the rest over the slices of a volume, mean over "
    "classes",
    # Of views of slices. Those of a batch depend on its size.
    "invariance": "mean squared difference of the views' projections",
    "alignment": "squared distance of two views' features of length 1",
    "sigreg": "statistic of Epps and Pulley of a batch's projections, 1.05 of a Gaussian",
    "center": "squared mean of a batch's projections",
    "scale": "squared distance of their standard deviations from 1",
    "shape": "squared distance of sorted projections of a batch from a Gaussian's quantiles",
    "variance": "hinge on standard deviations of a batch below 1, sum of two views",
    "covariance": "squared covariances of a batch's dimensions, sum of two views",
    "nt_xent": "natural units, against the other patients of a batch",
    "distillation": "cross-entropy in natural units against the teacher's prototypes",
    # Of the place of a slice, see `stats.label_free`.
    "r2": "share of explained variance of the relative position within a volume",
    "recall": "share of the slices within 10 mm that are among as many nearest ones",
    # Of a label with two classes.
    "auroc": "area under the ROC curve, ties counting half",
    "average_precision": "area under the precision-recall curve as sum of steps (AUPRC)",
    "brier": "mean squared difference of probability and label",
    "ece": f"expected calibration error of the positive class, {CALIBRATION_BINS} equal-width bins",
    "sensitivity": "share of positives called positive, at the threshold fixed on validation",
    "specificity": "share of negatives called negative, at the threshold fixed on validation",
    # Of a mask.
    "dice": "2 |both| / (|predicted| + |true|) at 0.5, of slices whose true mask is not empty",
    "iou": "|both| / |either| at 0.5, of slices whose true mask is not empty",
    "dice_all_slices": "Dice of all slices; both masks empty 1, one empty 0",
    "iou_all_slices": "IoU of all slices; both masks empty 1, one empty 0",
    "volume_dice": "Dice over the voxels of each volume; both masks empty 1, one empty 0",
    "volume_iou": "IoU over the voxels of each volume; both masks empty 1, one empty 0",
    "patient_dice": "Dice over the voxels of each patient; both masks empty 1, one empty 0",
    "patient_iou": "IoU over the voxels of each patient; both masks empty 1, one empty 0",
}
