"""Features of a slice that no network learned: statistics of intensity, shape and texture.

They are the control beside trained encoders: what an encoder cannot tell better than these numbers,
nobody has to train it for. Shapes and textures are those of scikit-image, as in radiomics.
"""

import numpy as np
from scipy import ndimage, stats

GREY_LEVELS = 16  # of the histogram and of co-occurrence
DISTANCES = (1, 4)  # pixels between the two of a co-occurrence
ANGLES = (0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)
PROPERTIES = ("contrast", "homogeneity", "energy", "correlation")
RADII = (1, 3)  # pixels, of local binary patterns
PATTERNS = 10  # uniform patterns of eight neighbours
AIR, BONE = 0.05, 0.95  # of the window: below is air or lung, above bone or contrast medium
REGIONS = 4  # intensities are also those of 4 x 4 regions
_OF_SHAPE = ("area", "axis_major_length", "axis_minor_length", "extent", "euler_number")


def slice_features(image: np.ndarray) -> np.ndarray:
    """Statistics of one channel of a slice.

    Args:
      image: [H, W] float in [0, 1], the windowed slice.

    Returns:
      [F] float32, finite: the histogram, four moments and five percentiles; mean and standard
      deviation of each of 4 x 4 regions; shapes of the body, of the air inside it and of bone;
      co-occurrence of grey values in four directions; local binary patterns.
    """
    parts = [_intensity(image), _regions(image), *map(_shape, _masks(image)), _texture(image)]
    return np.nan_to_num(np.concatenate(parts)).astype(np.float32)


def features(images: np.ndarray) -> np.ndarray:
    """[B, H, W, C] float in [0, 1] -> [B, C * F] float32, see `slice_features`."""
    images = np.asarray(images)
    channels = np.moveaxis(images, -1, 1)
    return np.stack([np.concatenate([slice_features(one) for one in item]) for item in channels])


def _intensity(image: np.ndarray) -> np.ndarray:
    histogram = np.histogram(image, GREY_LEVELS, (0, 1))[0] / image.size
    varied = np.ptp(image) > 0
    moments = [image.mean(), image.std(), np.square(image).mean()]
    moments += (
        [stats.skew(image, axis=None), stats.kurtosis(image, axis=None)] if varied else [0, 0]
    )
    return np.concatenate([histogram, moments, np.percentile(image, (10, 25, 50, 75, 90))])


def _regions(image: np.ndarray) -> np.ndarray:
    strips = np.array_split(image, REGIONS)
    parts = [part for strip in strips for part in np.array_split(strip, REGIONS, axis=1)]
    return np.array([(part.mean(), part.std()) for part in parts]).ravel()


def _masks(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The body, the air inside it, and bone."""
    body = ndimage.binary_fill_holes(image > AIR)
    return body, body & (image <= AIR), image >= BONE


def _shape(mask: np.ndarray) -> np.ndarray:
    """Of all parts of a mask together, as shares of the image; 0 of an empty mask."""
    from skimage.measure import regionprops

    number = len(_OF_SHAPE) + 5
    if not mask.any():
        return np.zeros(number)
    side = mask.shape[0]
    (whole,) = regionprops(mask.astype(np.uint8))
    values = {name: float(whole[name]) for name in _OF_SHAPE}
    values["area"] /= mask.size
    values["axis_major_length"] /= side
    values["axis_minor_length"] /= side
    row, column = (place / side for place in whole.centroid)
    turned = 2 * whole.orientation  # an axis has no direction
    left = mask[:, : mask.shape[1] // 2].sum() / mask.sum()
    return np.array([*values.values(), row, column, left, np.cos(turned), np.sin(turned)])


def _texture(image: np.ndarray) -> np.ndarray:
    from skimage.feature import graycomatrix, graycoprops, local_binary_pattern

    levels = np.minimum(image * GREY_LEVELS, GREY_LEVELS - 1).astype(np.uint8)
    pairs = graycomatrix(levels, DISTANCES, ANGLES, GREY_LEVELS, symmetric=True, normed=True)
    parts = [graycoprops(pairs, name).ravel() for name in PROPERTIES]
    greys = np.rint(255 * image).astype(np.uint8)
    for radius in RADII:
        patterns = local_binary_pattern(greys, 8, radius, method="uniform")
        parts.append(np.bincount(patterns.astype(int).ravel(), minlength=PATTERNS) / patterns.size)
    return np.concatenate(parts)
