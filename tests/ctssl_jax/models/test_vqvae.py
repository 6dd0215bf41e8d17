"""The vector-quantized autoencoder: size, gradients, codebook, normalisation, precision,
sharding."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ctssl_jax.models import layers, quantizer
from ctssl_jax.models.vqvae import VQVAE, VQVAEConfig, flops_per_slice

TINY = {"hidden": (8, 16), "depth": 1, "embedding_dim": 8, "num_codes": 32}
EMA = {**TINY, "vq_update": "ema", "vq_init": "data", "vq_revive_every": 2}


def images_of(batch: int = 8, size: int = 32, channels: int = 1, seed: int = 0) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), (batch, size, size, channels))


def build(config: VQVAEConfig, seed: int = 0) -> VQVAE:
    return nnx.jit(lambda: VQVAE(config, rngs=nnx.Rngs(seed)))()


@functools.partial(jax.jit, static_argnums=(0, 3))
def forward(graph, state, images, train):
    model = nnx.merge(graph, state, copy=True)
    return model(images, train=train, key=jax.random.key(0)), nnx.state(model)


def evaluate(model: VQVAE, images: jax.Array):
    return forward(*nnx.split(model), images, False)[0]


@nnx.jit
def quantize(vq: quantizer.VectorQuantizer, latents: jax.Array, key: jax.Array):
    return vq(latents, train=True, key=key)


def num_parameters(module: nnx.Module) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


@functools.partial(jax.jit, static_argnums=0)
def gradient_step(graph, params, state, images, key):
    """Loss, output, new state and gradients of one training forward and backward pass."""

    def loss_of(params):
        model = nnx.merge(graph, params, state, copy=True)
        output = model(images, train=True, key=key)
        loss = jnp.mean(jnp.square(output.reconstruction - images))
        loss += jnp.mean(output.codebook_loss + 0.25 * output.commitment_loss)
        return loss, (output, nnx.state(model, nnx.Not(nnx.Param)))

    (loss, (output, state)), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
    return loss, output, state, gradients


def run_step(model: VQVAE, images: jax.Array, key: jax.Array | None = None):
    return gradient_step(
        *nnx.split(model, nnx.Param, ...), images, jax.random.key(1) if key is None else key
    )


def assert_trees_close(first, second, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), **tolerance),
        first,
        second,
    )


@pytest.mark.parametrize(("channels", "total"), [(3, 101_353_673), (1, 101_337_283)])
def test_reference_size_has_the_published_number_of_parameters(channels, total):
    model = nnx.eval_shape(lambda: VQVAE(VQVAEConfig(in_channels=channels), rngs=nnx.Rngs(0)))
    assert num_parameters(model) == total
    if channels == 3:
        assert num_parameters(model.encoder) == 51_709_888


def test_flops_of_the_reference_size():
    assert flops_per_slice(VQVAEConfig(in_channels=3), 512) == pytest.approx(3.32e12, rel=0.005)
    assert flops_per_slice(VQVAEConfig(), (256, 512)) * 2 == flops_per_slice(VQVAEConfig(), 512)


def test_output_shapes_and_ranges():
    config = VQVAEConfig(in_channels=3, **TINY)
    output = evaluate(build(config), images_of(2, channels=3))
    assert output.reconstruction.shape == (2, 32, 32, 3)
    assert output.latents.shape == output.quantized.shape == (2, 8, 8, 8)
    assert output.codes.shape == (2, 8, 8) and output.codes.dtype == jnp.int32
    assert output.codebook_loss.shape == output.commitment_loss.shape == (2,)
    assert 0 <= output.reconstruction.min() and output.reconstruction.max() <= 1
    signed = evaluate(
        build(VQVAEConfig(in_channels=3, output_activation="tanh", **TINY)),
        images_of(2, channels=3),
    )
    np.testing.assert_allclose((signed.reconstruction + 1) / 2, output.reconstruction, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden", (8,)),
        ("depth", -1),
        ("num_codes", 0),
        ("drop_rate", 1.0),
        ("output_activation", "sigmoid"),
        ("vq_update", "momentum"),
        ("dtype", "float16"),
        ("vq_init", "data"),
        ("vq_revive_every", 10),
    ],
)
def test_config_names_the_field_that_is_wrong(field, value):
    with pytest.raises(ValueError, match=field):
        VQVAEConfig(**{**TINY, field: value})


def test_image_size_must_fit_the_stride():
    model = build(VQVAEConfig(**TINY))
    assert model.encoder.stride == 4
    with pytest.raises(ValueError, match="divisible by 4, got 30 x 30"):
        model(images_of(1, size=30), train=False)


@pytest.mark.parametrize("height", [6, 8])
def test_transposed_convolution_and_its_gradients_equal_plain_xla(height):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, height, 5, 3))
    kernel = jax.random.normal(keys[1], (4, 4, 3, 7))
    weights = jax.random.normal(keys[2], (2, 2 * height, 10, 7))

    def plain(x, kernel):
        return jax.lax.conv_transpose(x, kernel, (2, 2), "SAME")

    np.testing.assert_allclose(
        layers.transposed_convolution(x, kernel), plain(x, kernel), atol=1e-5
    )
    ours, expected = (
        jax.jit(jax.grad(lambda x, kernel, f=f: jnp.sum(weights * jnp.sin(f(x, kernel))), (0, 1)))(
            x, kernel
        )
        for f in (layers.transposed_convolution, plain)
    )
    assert_trees_close(ours, expected, rtol=1e-5, atol=2e-5)


def test_batch_norm_follows_its_definition():
    norm = layers.BatchNorm(3)
    x = 2 + 3 * jax.random.normal(jax.random.key(0), (4, 5, 6, 3))
    y = norm(x, train=True)
    np.testing.assert_allclose(jnp.mean(y, (0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(jnp.std(y, (0, 1, 2)), 1, atol=1e-4)
    np.testing.assert_allclose(norm.mean[...], 0.1 * jnp.mean(x, (0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * jnp.var(x, (0, 1, 2)), rtol=1e-4)
    expected = (x - norm.mean[...]) / jnp.sqrt(norm.var[...] + 1e-5)
    np.testing.assert_allclose(norm(x, train=False), expected, atol=1e-5)
    norm(x.astype(jnp.bfloat16), train=True)
    assert norm.mean[...].dtype == norm.var[...].dtype == jnp.float32


def test_gradients_reach_encoder_decoder_and_codebook():
    _, _, _, gradients = run_step(build(VQVAEConfig(**TINY)), images_of())
    for path, leaf in nnx.to_flat_state(gradients):
        assert np.all(np.isfinite(leaf[...])), path
        # batch normalisation takes a bias out again: its true gradient is 0
        if path[-2:] != ("conv", "bias"):
            assert np.any(np.asarray(leaf[...]) != 0), path
    assert {path[0] for path, _ in nnx.to_flat_state(gradients)} == {
        "encoder",
        "quantizer",
        "decoder",
    }


def test_quantizer_selects_the_nearest_code_and_passes_gradients_straight_through():
    vq = quantizer.VectorQuantizer(32, 8, rngs=nnx.Rngs(0))
    vq.codebook[...] = jax.random.normal(jax.random.key(0), (32, 8))
    latents = jax.random.normal(jax.random.key(1), (2, 4, 4, 8))
    weights = jax.random.normal(jax.random.key(2), latents.shape)
    quantized, codes, codebook_loss, commitment_loss = vq(latents, train=True)
    distances = jnp.sum((latents[..., None, :] - vq.codebook[...]) ** 2, -1)
    np.testing.assert_array_equal(codes, jnp.argmin(distances, -1))
    np.testing.assert_array_equal(quantized, vq.codebook[...][codes])
    np.testing.assert_allclose(
        codebook_loss, jnp.mean((latents - quantized) ** 2, (1, 2, 3)), rtol=1e-6
    )
    np.testing.assert_allclose(commitment_loss, codebook_loss, rtol=1e-6)
    gradient = jax.grad(lambda latents: jnp.sum(weights * vq(latents, train=False)[0]))(latents)
    np.testing.assert_array_equal(gradient, weights)


def test_equally_near_codes_take_the_first():
    codebook = jnp.array([[5.0], [1.0], [1.0], [-1.0]])
    np.testing.assert_array_equal(
        quantizer.nearest_codes(jnp.array([[1.0], [0.0], [-2.0]]), codebook), [1, 1, 3]
    )


def test_sums_by_code_are_those_of_additions_one_by_one():
    vectors = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    codes = np.random.default_rng(1).integers(0, 5, 50).astype(np.int32)
    # none of 5 and 6
    expected = np.stack([vectors[codes == code].sum(0, dtype=np.float64) for code in range(7)])
    # as on CPU; as on accelerators
    for sums in (quantizer.sum_by_code, quantizer.sum_by_matrix_product):
        np.testing.assert_allclose(sums(vectors, codes, 7), expected, atol=1e-5)


def test_codes_fetched_by_a_matrix_product_are_the_same_to_the_bit():
    """As TPUs fetch them. Their program has no gather."""
    codebook = jax.random.normal(jax.random.key(0), (7, 3))
    codes = jnp.array([3, 0, 6, 3, 5])
    selected = quantizer.select_by_matrix_product(codebook, codes)
    np.testing.assert_array_equal(selected, quantizer.select_codes(codebook, codes))
    assert "stablehlo.gather" not in program_of("tpu", **TINY)
    assert "stablehlo.gather" in program_of("cpu", **TINY)


@functools.cache
def program_of(platform: str, **settings) -> str:
    """StableHLO of a training step as it is lowered for a platform, which need not be there."""
    graph, params, state = nnx.split(build(VQVAEConfig(**settings)), nnx.Param, ...)
    step = jax.jit(functools.partial(gradient_step, graph))
    return jax.export.export(step, platforms=[platform])(
        params, state, images_of(), jax.random.key(0)
    ).mlir_module()


@pytest.mark.parametrize("platform, expected", [("cpu", True), ("cuda", False), ("tpu", False)])
def test_a_training_step_has_no_atomic_additions_on_accelerators(platform, expected):
    """They took 85 % of the step of the reference model on an H200."""
    for settings in (TINY, EMA):
        assert ("stablehlo.scatter" in program_of(platform, **settings)) == expected, settings


@pytest.mark.parametrize("dtype, expected", [("float32", "f32"), ("bfloat16", "bf16")])
def test_every_convolution_runs_in_the_chosen_dtype(dtype, expected):
    program = program_of("cuda", dtype=dtype, **TINY)
    results = re.findall(r"stablehlo\.convolution.* -> tensor<(?:\d+x)*(\w+)>", program)
    # forward, and the gradients of inputs and of kernels
    assert len(results) > 20 and set(results) == {expected}
    assert not re.search("infeed|outfeed|send|recv|custom_call @xla_python", program)


def test_codebook_loss_pulls_codes_and_commitment_loss_pulls_latents():
    graph, params = nnx.split(quantizer.VectorQuantizer(4, 2, rngs=nnx.Rngs(0)))
    latents = jnp.ones((1, 2, 2, 2))

    def loss(params, latents, index):
        return nnx.merge(graph, params)(latents, train=True)[index].sum()

    codebook_gradients = jax.grad(loss, (0, 1))(params, latents, 2)
    assert np.any(jax.tree.leaves(codebook_gradients[0])[0] != 0) and not np.any(
        codebook_gradients[1] != 0
    )
    commitment_gradients = jax.grad(loss, (0, 1))(params, latents, 3)
    assert not np.any(jax.tree.leaves(commitment_gradients[0])[0] != 0) and np.all(
        commitment_gradients[1] != 0
    )


def test_ema_codebook_is_no_parameter_and_follows_the_mean_of_its_latents():
    vq = quantizer.VectorQuantizer(2, 1, update="ema", ema_decay=0.5, rngs=nnx.Rngs(0))
    assert num_parameters(vq) == 0
    vq.codebook[...] = jnp.array([[0.0], [10.0]])
    first = jnp.array([1.0, 2.0, 3.0, 2.0]).reshape(1, 2, 2, 1)
    quantized, codes, codebook_loss, _ = vq(first, train=True)
    assert np.all(codes == 0) and np.all(quantized == 0) and np.all(codebook_loss == 0)
    # a code without latents stays where it is
    np.testing.assert_allclose(vq.codebook[...], [[2.0], [10.0]])
    vq(first + 2, train=True)
    # Running sums 0.5 * (0.5 * 8) + 0.5 * 16 = 10 over counts 0.5 * (0.5 * 4) + 0.5 * 4 = 3.
    np.testing.assert_allclose(vq.codebook[...], [[10 / 3], [10.0]], rtol=1e-6)


def test_data_start_places_codes_on_the_first_batch():
    vq = quantizer.VectorQuantizer(16, 2, update="ema", init="data", rngs=nnx.Rngs(0))
    centres = jnp.array([[0.0, 5.0], [5.0, 0.0], [-5.0, -5.0]])
    noise = 0.01 * jax.random.normal(jax.random.key(0), (4, 6, 6, 2))
    latents = centres[jax.random.randint(jax.random.key(1), (4, 6, 6), 0, 3)] + noise
    _, _, _, commitment_loss = quantize(vq, latents, jax.random.key(5))
    assert np.max(commitment_loss) < 1e-3 < np.mean(latents**2)
    first = np.asarray(vq.codebook[...])
    quantize(vq, latents, jax.random.key(6))
    # started once, then it only follows the latents
    np.testing.assert_allclose(vq.codebook[...], first, atol=0.02)
    with pytest.raises(ValueError, match="key"):
        vq(latents, train=True)


def test_unused_codes_are_revived_every_so_many_steps():
    vq = quantizer.VectorQuantizer(16, 2, update="ema", revive_every=3, rngs=nnx.Rngs(0))
    latents = 5 + jax.random.normal(jax.random.key(0), (4, 8, 8, 2))
    used = []
    for step in range(4):
        codes = quantize(vq, latents, jax.random.fold_in(jax.random.key(1), step))[1]
        used.append(len(np.unique(codes)))
    assert used[0] <= 4 and used[2] <= 4  # all codes start near 0, far from the latents
    assert used[3] >= 12
    distance_to_data = jnp.min(
        jnp.sum((vq.codebook[...][:, None] - latents.reshape(-1, 2)) ** 2, -1), axis=1
    )
    assert np.all(distance_to_data < 0.5)


def test_training_changes_state_and_evaluation_does_not():
    model = build(VQVAEConfig(**EMA))
    graph, before = nnx.split(model)
    _, evaluated = forward(graph, before, images_of(), False)
    assert_trees_close(evaluated, before, rtol=0, atol=0)
    _, trained = forward(graph, before, images_of(), True)
    changed = {
        path: np.any(np.asarray(leaf[...]) != np.asarray(old[...]))
        for (path, leaf), (_, old) in zip(
            nnx.to_flat_state(trained), nnx.to_flat_state(before), strict=True
        )
    }
    names = {path for path, leaf in nnx.to_flat_state(before) if not isinstance(leaf, nnx.Param)}
    # nine normalisations; codebook, counts, sums, steps, initialised
    assert len(names) == 2 * 9 + 5
    assert {path for path, differs in changed.items() if differs} == names


@pytest.mark.parametrize("settings", [TINY, EMA], ids=["gradient", "ema"])
def test_same_key_same_result_and_arguments_can_be_donated(settings):
    model = build(VQVAEConfig(drop_rate=0.1, **settings))
    graph, params, state = nnx.split(model, nnx.Param, ...)
    first = run_step(model, images_of())
    assert_trees_close(run_step(model, images_of()), first, rtol=0, atol=0)
    assert run_step(model, images_of(), jax.random.key(2))[0] != first[0]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, images):
        _, _, state, gradients = gradient_step(graph, params, state, images, jax.random.key(1))
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, gradients), state

    carry = jax.tree.map(jnp.copy, (params, state))
    for _ in range(2):
        carry = step(*carry, images_of())
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(carry))


@pytest.mark.parametrize("settings", [TINY, EMA], ids=["gradient", "ema"])
def test_eight_devices_give_the_result_of_one(settings):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    model = build(VQVAEConfig(**settings))
    graph, params, state = nnx.split(model, nnx.Param, ...)
    single = gradient_step(graph, params, state, images_of(16), jax.random.key(1))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    replicated = jax.device_put((params, state), NamedSharding(mesh, PartitionSpec()))
    sharded_images = jax.device_put(images_of(16), NamedSharding(mesh, PartitionSpec("data")))
    sharded = gradient_step(graph, *replicated, sharded_images, jax.random.key(1))
    assert len(sharded[1].reconstruction.sharding.device_set) == 8
    # Sums run in another order: on some processors one pixel of 8,192 ends 1.05e-5 away.
    assert_trees_close(single[:3], sharded[:3], rtol=1e-4, atol=2e-5)
    # Gradients lose digits in batch normalisation: compared to the largest one of each tensor.
    for (path, a), (_, b) in zip(
        nnx.to_flat_state(single[3]), nnx.to_flat_state(sharded[3]), strict=True
    ):
        if path[-2:] != ("conv", "bias"):
            difference = np.max(np.abs(np.asarray(a[...]) - np.asarray(b[...])))
            assert difference <= 1e-3 * np.max(np.abs(a[...])), path


def test_remat_gives_the_same_numbers():
    settings = {**TINY, "depth": 2, "drop_rate": 0.2}
    plain = run_step(build(VQVAEConfig(**settings)), images_of())
    recomputed = run_step(build(VQVAEConfig(remat=True, **settings)), images_of())
    assert_trees_close(jax.tree.leaves(recomputed), jax.tree.leaves(plain), rtol=1e-5, atol=1e-6)


def test_bfloat16_computes_close_to_float32_with_float32_state():
    exact = run_step(build(VQVAEConfig(**EMA)), images_of())
    rounded = run_step(build(VQVAEConfig(dtype="bfloat16", **EMA)), images_of())
    floating = [
        leaf for leaf in jax.tree.leaves(rounded) if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert all(leaf.dtype == jnp.float32 for leaf in floating)
    assert np.any(rounded[1].latents != exact[1].latents)
    np.testing.assert_allclose(rounded[1].latents, exact[1].latents, atol=0.1)
    np.testing.assert_allclose(rounded[0], exact[0], rtol=0.05)


def test_dropout_acts_in_training_only_and_needs_a_key():
    model = build(VQVAEConfig(drop_rate=0.5, **TINY))
    with pytest.raises(ValueError, match="key"):
        model(images_of(), train=True)
    without = build(VQVAEConfig(**TINY))
    np.testing.assert_array_equal(
        evaluate(model, images_of()).latents, evaluate(without, images_of()).latents
    )
    assert np.any(
        run_step(model, images_of())[1].latents != run_step(without, images_of())[1].latents
    )


def test_a_few_steps_lower_the_loss():
    model = build(VQVAEConfig(**EMA))
    graph, params, state = nnx.split(model, nnx.Param, ...)
    x = (
        jnp.broadcast_to(jnp.linspace(0, 1, 32)[:, None, None], (8, 32, 32, 1))
        * jnp.linspace(0.5, 1, 8)[:, None, None, None]
    )
    losses = []
    for step in range(30):
        loss, _, state, gradients = gradient_step(graph, params, state, x, jax.random.key(step))
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradients)
        losses.append(float(loss))
    assert np.mean(losses[-3:]) < 0.5 * losses[0]


def test_code_statistics():
    codes = jnp.array([[[0, 1], [1, 3]], [[2, 2], [2, 2]]])
    np.testing.assert_array_equal(quantizer.code_counts(codes, 5), [1, 2, 4, 1, 0])
    counts = quantizer.code_counts(codes, 5, weight=jnp.array([1.0, 0.0]))
    np.testing.assert_array_equal(counts, [1, 2, 0, 1, 0])
    assert quantizer.used_codes(counts) == 3
    assert quantizer.perplexity(counts) == pytest.approx(2**1.5)
    assert quantizer.perplexity(np.ones(64)) == pytest.approx(64)
    assert quantizer.perplexity(np.eye(8)[0]) == pytest.approx(1)
    assert quantizer.perplexity(np.zeros(8)) == 0


def test_codebook_use():
    assert quantizer.codebook_use(np.array([2.0, 2.0, 0.0])) == {
        "perplexity": pytest.approx(2),
        "used_codes": 2,
        "dead_codes": 1,
    }
    assert quantizer.codebook_use(None) == {}
