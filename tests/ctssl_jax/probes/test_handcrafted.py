"""Statistics of a slice whose values are known; and features of a whole slice."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("skimage", reason="needs scikit-image, the extra `handcrafted`")

from ctssl_jax.probes import encoders, handcrafted


def body(size=64):
    """A bright rectangle with a hole of air in its left half."""
    image = np.zeros((size, size))
    image[16:48, 8:56] = 0.5
    image[24:40, 12:28] = 0.0
    return image


def test_shapes_are_those_of_the_body_and_of_the_air_inside_it():
    whole, air, bone = (handcrafted._shape(mask) for mask in handcrafted._masks(body()))
    assert whole[0] == 32 * 48 / 64**2 and air[0] == 16 * 16 / 64**2
    np.testing.assert_allclose(whole[5:8], [31.5 / 64, 31.5 / 64, 0.5])  # centre, share at the left
    np.testing.assert_allclose(air[5:8], [31.5 / 64, 19.5 / 64, 1.0])
    assert whole[3] == 1.0  # fills its box
    assert not bone.any()


def test_features_tell_a_slice_from_its_mirror_image_and_are_finite_for_any():
    image = body()
    both = handcrafted.features(np.stack([image, image[:, ::-1]])[..., None])
    assert both.shape == (2, 140) and both.dtype == np.float32
    histogram = both[:, : handcrafted.GREY_LEVELS]
    np.testing.assert_array_equal(histogram[0], histogram[1])
    assert histogram[0, 8] == (32 * 48 - 16 * 16) / 64**2 and histogram[0].sum() == 1
    assert np.abs(both[0] - both[1]).max() > 0.5
    for flat in (0.0, 0.5, 1.0):
        assert np.isfinite(handcrafted.slice_features(np.full((16, 16), flat))).all()


def test_the_encoder_gives_the_statistics_and_those_of_each_block():
    frozen = encoders.handcrafted_encoder(channels=2)
    images = np.stack([body(), body().T], axis=-1)[None].astype(np.float32)
    latents, fetched = frozen.encode(frozen.state, images)
    assert latents.shape == (1, 16, 16, 8)
    np.testing.assert_allclose(latents[0, 4, 2], [0.5, 0, 0, 0, 0.5, 0, 0.5, 0], atol=1e-6)
    pooled = frozen.finish(np.asarray(fetched))
    np.testing.assert_array_equal(pooled, handcrafted.features(images))
    assert encoders.num_features(frozen, 64) == {"latent": 8, "pooled": pooled.shape[-1]}


def test_one_core_is_enough():
    """As in a Slurm job of one CPU: a callback out of a compiled program would wait for ever."""
    program = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numpy as np
from ctssl_jax.probes import encoders, label_probe
frozen = encoders.handcrafted_encoder(channels=1)
target = label_probe.LABELS["flip"]
images = np.random.default_rng(0).integers(0, 255, (64, 1, 64, 64, 1), np.uint8)
batch = {"images": images, "record_index": np.arange(64, dtype=np.int32), "weight": np.ones(64)}
print(label_probe.label_features(frozen, target, [batch]).pooled.shape)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0 and ran.stdout.strip() == "(64, 140)", ran.stderr


def test_the_feature_of_a_whole_slice_is_the_mean_over_its_regions():
    random = np.random.default_rng(0)
    parts = [random.normal(size=(3, 8, 8, width)).astype(np.float32) for width in (7, 5)]
    pooled = np.concatenate([encoders.pool(part, 4) for part in parts], axis=1)
    whole = np.concatenate([part.mean(axis=(1, 2)) for part in parts], axis=1)
    np.testing.assert_allclose(encoders._mean_over_regions((7, 5), pooled), whole, atol=1e-6)
    images = random.random((2, 64, 64, 1)).astype(np.float32)
    regions, one = (encoders.pixel_encoder(1, 64, number) for number in (4, 1))
    coarse = regions.whole(np.asarray(regions.encode((), images)[1]))
    np.testing.assert_allclose(coarse, one.encode((), images)[1], atol=1e-6)
