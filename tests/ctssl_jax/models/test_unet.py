"""The segmentation networks: shapes, the encoder's names, equal random parts in all arms,
gradients, operations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ctssl_jax.models import unet
from ctssl_jax.models.vqvae import VQVAE, VQVAEConfig
from ctssl_jax.ops.trees import flatten

TINY = dict(hidden=(4, 8), depth=1, embedding_dim=4)


def parameters(model):
    return flatten(nnx.as_pure(nnx.state(model, nnx.Param)))


def encoder_unet(**settings):
    return unet.UNet(unet.UNetConfig(**{**TINY, **settings}), rngs=nnx.Rngs(0))


def standard_unet(**settings):
    return unet.StandardUNet(
        unet.StandardUNetConfig(**{"widths": (2, 3, 4, 5, 6), **settings}), rngs=nnx.Rngs(0)
    )


MODELS = {
    "compression": encoder_unet,
    "residual_stack": lambda **settings: encoder_unet(residual_stack=True, **settings),
    "standard": standard_unet,
}


@pytest.mark.parametrize("kind", MODELS)
def test_one_logit_a_pixel(kind):
    model = MODELS[kind](in_channels=2)
    graph, state = nnx.split(model)
    apply = jax.jit(lambda images: nnx.merge(graph, state)(images, train=False))
    images = jax.random.uniform(jax.random.key(0), (3, 16, 32, 2))
    logits, embedding = apply(images)
    assert logits.shape == (3, 16, 32) and logits.dtype == jnp.float32
    assert embedding.shape == (3, model.config.widths[4]) and embedding.dtype == jnp.float32
    # examples do not mix in evaluation
    np.testing.assert_allclose(apply(images[1:2]).logits, logits[1:2], atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_sides_must_be_divisible_by_16(kind):
    with pytest.raises(ValueError, match="divisible by 16, got 32 x 40"):
        MODELS[kind]()(jnp.zeros((1, 32, 40, 1)), train=False)


@pytest.mark.parametrize("residual_stack", [False, True])
def test_encoder_has_the_names_and_shapes_of_the_autoencoders(residual_stack):
    def of_encoder(model):
        state = flatten(nnx.as_pure(nnx.state(model)))
        return {name: value.shape for name, value in state.items() if name.startswith("encoder/")}

    want = of_encoder(VQVAE(VQVAEConfig(num_codes=8, **TINY), rngs=nnx.Rngs(0)))
    if not residual_stack:
        want = {
            name: shape
            for name, shape in want.items()
            if name.split("/")[1] in ("downsample", "stem")
        }
    assert "encoder/downsample/0/conv/kernel" in want and "encoder/stem/norm/mean" in want
    assert of_encoder(encoder_unet(residual_stack=residual_stack)) == want


def test_one_seed_gives_the_random_parts_the_same_values_in_all_arms():
    without, with_stack = (
        parameters(encoder_unet()),
        parameters(encoder_unet(residual_stack=True, depth=3)),
    )
    random_parts = [name for name in without if not name.startswith("encoder/")]
    assert any(name.startswith("up/3/") for name in random_parts) and "head/kernel" in random_parts
    differing = [
        name for name in random_parts if not np.array_equal(without[name], with_stack[name])
    ]
    # reads the projection instead of the compression layers
    assert differing == ["pooled/0/0/conv/kernel"]
    other_seed = parameters(unet.UNet(unet.UNetConfig(**TINY), rngs=nnx.Rngs(1)))
    assert not np.array_equal(
        without["up/0/upsample/conv/kernel"], other_seed["up/0/upsample/conv/kernel"]
    )


def test_the_encoder_is_the_autoencoders():
    # The same weights give the same features, so that a moved encoder computes what it has learned.
    vqvae = VQVAE(VQVAEConfig(num_codes=8, **TINY), rngs=nnx.Rngs(3))
    model = encoder_unet(residual_stack=True)
    nnx.update(model.encoder, nnx.state(vqvae.encoder))
    images = jax.random.uniform(jax.random.key(0), (2, 16, 16, 1))
    latents = model.encoder.refine(model.encoder.compress(images, train=False)[1], train=False)
    np.testing.assert_array_equal(latents, vqvae(images, train=False).latents)


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_reach_every_parameter_and_statistics_move(kind):
    model = MODELS[kind]()
    graph, params, variables = nnx.split(model, nnx.Param, ...)
    images = jax.random.uniform(jax.random.key(0), (4, 32, 32, 1))

    @jax.jit
    def gradient(params, variables):
        def loss(params):
            model = nnx.merge(graph, params, variables, copy=True)
            value = jnp.sum(jnp.square(model(images, train=True).logits))
            return value, nnx.split(model, nnx.Param, ...)[2]

        return jax.grad(loss, has_aux=True)(params)

    gradients, moved = gradient(nnx.as_pure(params), nnx.as_pure(variables))
    for name, value in flatten(gradients).items():
        # batch normalisation removes these biases
        assert name.endswith("conv/bias") or np.any(value != 0), name
    before, after = flatten(nnx.as_pure(variables)), flatten(nnx.as_pure(moved))
    assert before and not [name for name in before if np.array_equal(before[name], after[name])]


def test_a_frozen_encoder_keeps_its_statistics_and_evaluation_changes_nothing():
    model = encoder_unet(residual_stack=True, drop_rate=0.5)
    images = jax.random.uniform(jax.random.key(0), (2, 16, 16, 1))

    def statistics():
        return {
            k: np.array(v) for k, v in flatten(nnx.as_pure(nnx.state(model, nnx.BatchStat))).items()
        }

    start = statistics()
    model(images, train=False)
    assert all(np.array_equal(start[name], value) for name, value in statistics().items())
    model(images, train=True, frozen_encoder=True)  # no dropout either: needs no key
    moved = {name for name, value in statistics().items() if not np.array_equal(start[name], value)}
    assert moved == {name for name in start if not name.startswith("encoder/")}
    with pytest.raises(ValueError, match="needs a key"):
        model(images, train=True)


def test_every_skip_reaches_the_logits():
    model = encoder_unet()
    images = jax.random.uniform(jax.random.key(0), (1, 16, 16, 1))
    # batch statistics: fresh running ones leave hardly a signal
    before = model(images, train=True).logits
    for index, width in ((0, model.config.widths[0]), (1, 4), (2, 8), (3, model.config.widths[3])):
        kernel = model.up[index].convolutions[0].conv.kernel
        saved = kernel[...]
        kernel[...] = saved.at[:, :, :width].set(0)  # the skip comes first in the concatenation
        change = np.abs(model(images, train=True).logits - before).max()
        kernel[...] = saved
        assert change > 1e-3, index
    np.testing.assert_allclose(model(images, train=True).logits, before, atol=1e-6)


def test_discs_are_learned():
    rows, columns = np.mgrid[:32, :32]
    centres = [(10, 12), (20, 18), (14, 22), (22, 9)]
    masks = np.stack([(rows - r) ** 2 + (columns - c) ** 2 < 64 for r, c in centres]).astype(
        np.float32
    )
    images = jnp.asarray(masks[..., None] * 0.5 + 0.2)
    # Two features at full resolution (hidden[0] / 4) are too few: both may start blind to the
    # discs.
    graph, params, variables = nnx.split(
        encoder_unet(hidden=(4, 4), widths=(4, 4, 4, 4, 4)), nnx.Param, ...
    )
    optimizer = optax.sgd(1.0)  # compiles in two thirds of Adam's time

    @jax.jit
    def step(params, variables, moments):
        def loss(params):
            model = nnx.merge(graph, params, variables, copy=True)
            logits = model(images, train=True).logits
            value = jnp.mean(optax.sigmoid_binary_cross_entropy(logits, masks))
            return value, (nnx.as_pure(nnx.split(model, nnx.Param, ...)[2]), logits)

        gradients, (variables, logits) = jax.grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments)
        return optax.apply_updates(params, updates), variables, moments, logits

    params, variables = nnx.as_pure(params), nnx.as_pure(variables)
    moments = optimizer.init(params)
    for _ in range(40):
        params, variables, moments, logits = step(params, variables, moments)
    predicted = np.asarray(logits) > 0
    assert 2 * (predicted * masks).sum() / (predicted.sum() + masks.sum()) > 0.9


@pytest.mark.parametrize("kind", MODELS)
def test_operations_are_those_that_xla_counts(kind):
    large = {"widths": (16, 16, 32, 32, 32)}
    if kind != "standard":
        large |= {"hidden": (16, 32), "embedding_dim": 16}
    model = MODELS[kind](**large)
    count = unet.standard_flops_per_slice if kind == "standard" else unet.flops_per_slice
    graph, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((1, 256, 256, 1), jnp.float32)
    lowered = jax.jit(lambda state, images: nnx.merge(graph, state)(images, train=False)).lower(
        state, images
    )
    # XLA counts multiplications with the zeros of a transposed convolution's padding differently,
    # and activations.
    assert count(model.config, 256) == pytest.approx(lowered.cost_analysis()["flops"], rel=0.04)
    assert count(model.config, (256, 128)) == count(model.config, 256) // 2


def test_reference_sizes():
    def count(make):
        state = nnx.as_pure(nnx.state(nnx.eval_shape(make), nnx.Param))
        return {name: int(np.prod(leaf.shape)) for name, leaf in flatten(state).items()}

    sizes = count(lambda: unet.UNet(unet.UNetConfig(), rngs=nnx.Rngs(0)))
    compression = (16 * 1 + 3) * 256 + (16 * 256 + 3) * 512 + (9 * 512 + 3) * 512
    assert sum(size for name, size in sizes.items() if name.startswith("encoder/")) == compression
    standard = count(lambda: unet.StandardUNet(unet.StandardUNetConfig(), rngs=nnx.Rngs(0)))
    down = sum(
        (9 * i + 3) * o + (9 * o + 3) * o
        for i, o in ((1, 64), (64, 128), (128, 256), (256, 512), (512, 1024))
    )
    up = sum(
        (16 * 2 * o + 3) * o + (9 * 2 * o + 3) * o + (9 * o + 3) * o for o in (64, 128, 256, 512)
    )
    assert sum(standard.values()) == down + up + 64 + 1


def test_bfloat16_returns_float32():
    logits, embedding = encoder_unet(dtype="bfloat16")(jnp.ones((1, 16, 16, 1)), train=False)
    assert logits.dtype == embedding.dtype == jnp.float32


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (unet.UNetConfig, {"hidden": (4,)}, "hidden must be two positive widths"),
        (unet.UNetConfig, {"widths": (4, 4)}, "widths must be 5 positive"),
        (unet.StandardUNetConfig, {"widths": (4, 4, 4, 4, 0)}, "widths must be 5 positive"),
        (unet.StandardUNetConfig, {"in_channels": 0}, "in_channels must be at least 1"),
        (unet.StandardUNetConfig, {"dtype": "float16"}, "dtype must be one of"),
    ],
)
def test_impossible_settings_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)
