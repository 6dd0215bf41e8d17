"""The models in PyTorch: the same function layer by layer, the authors' layout, gradients, running
statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ctssl_jax.models.classifier import Classifier, ClassifierConfig
from ctssl_jax.models.se_resnext import SEResNeXt, SEResNeXtConfig
from ctssl_jax.models.unet import StandardUNet, StandardUNetConfig, UNet, UNetConfig
from ctssl_jax.models.vqvae import VQVAE, VQVAEConfig
from ctssl_jax.ops.trees import flatten
from ctssl_jax.torch_bridge import names
from tests.helpers.training_runs import randomised

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[torch]'")
from ctssl_jax.release import parity  # noqa: E402
from ctssl_jax.torch_bridge import ctssl_torch  # noqa: E402  (they need it)

SMALL = dict(hidden=(6, 10), depth=2, embedding_dim=5)
MODELS = {
    "autoencoder": (VQVAE, VQVAEConfig(**SMALL, num_codes=16)),
    "autoencoder_3_channels_depth_18": (
        VQVAE,
        VQVAEConfig(
            in_channels=3,
            **{**SMALL, "depth": 18},
            num_codes=16,
            output_activation="tanh",
            vq_update="ema",
        ),
    ),
    "classifier": (Classifier, ClassifierConfig(num_classes=4, compression=(7, 9), **SMALL)),
    "unet": (UNet, UNetConfig(**SMALL)),
    "unet_with_blocks": (UNet, UNetConfig(**SMALL, residual_stack=True, in_channels=2)),
    "standard_unet": (StandardUNet, StandardUNetConfig(widths=(3, 4, 5, 6, 7))),
    "se_resnext": (SEResNeXt, SEResNeXtConfig(layers=(1, 2), width=8, groups=4)),
    "se_resnext_timm": (
        SEResNeXt,
        SEResNeXtConfig(layers=(2, 1), width=8, groups=2, num_classes=3, pooling="timm"),
    ),
}


def built(name, seed=0):
    """The model with random statistics and codes, its twin with the same weights, and PyTorch's
    entries."""
    kind, config = MODELS[name]
    model = randomised(kind(config, rngs=nnx.Rngs(seed)), seed)
    tensors = {
        path: np.asarray(value) for path, value in flatten(nnx.as_pure(nnx.state(model))).items()
    }
    entries = names.state_dict(tensors, kind.__name__, getattr(config, "depth", 0), 7)
    settings = names.architecture_settings(config)
    twin = ctssl_torch.build(
        {"format_version": 1, "architecture": kind.__name__, "model": settings}
    )
    twin.load_state_dict(
        {key: torch.from_numpy(value.copy()) for key, value in entries.items()}, strict=True
    )
    return model, twin.eval(), tensors, entries


def images_of(config, number=2, seed=1):
    return (
        np.random.default_rng(seed)
        .uniform(size=(number, 32, 48, config.in_channels))
        .astype(np.float32)
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_the_same_function(name):
    kind, config = MODELS[name]
    model, twin, tensors, entries = built(name)
    depth = getattr(config, "depth", 0)
    measured, outputs = parity.measure(model, twin, images_of(config), kind.__name__, depth)
    assert measured.holds and measured.worst < 2e-5
    layers = [
        module
        for module in twin.modules()
        if not list(module.children()) and list(module.parameters())
    ]
    codebook = kind is VQVAE
    assert len(measured.stages) == len(layers) - codebook  # not one was left out
    assert measured.codes_equal == (1.0 if codebook else None)
    assert all(
        np.abs(value).max() > 0 for output, value in outputs.items() if not output.endswith("_loss")
    )
    found, misfits = names.from_state_dict(
        entries, {path: value.shape for path, value in tensors.items()}, kind.__name__, depth
    )
    assert not misfits
    assert found.keys() == {path for path in tensors if names.is_exported(path)}
    for path, value in found.items():
        np.testing.assert_array_equal(value, tensors[path], err_msg=path)


def test_one_wrong_tensor_is_seen():
    model, twin, _, _ = built("classifier")
    with torch.no_grad():
        twin.encoder[4].resblock[2].running_var.mul_(1.001)
    measured, _ = parity.measure(model, twin, images_of(MODELS["classifier"][1]), "Classifier", 2)
    assert not measured.holds and measured.stages["encoder.4.resblock.2"] > 1e-4
    assert measured.stages["encoder.4.resblock.0"] < 1e-5  # before it all is well


def test_codes_differ_only_where_two_are_equally_near():
    codebook = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1e-7]])
    latents = np.array([[0.9, 0.0], [0.5, 0.0], [0.1, 0.0]], np.float32).reshape(1, 1, 3, 2)
    expected = {"codes": np.array([[[1, 0, 0]]]), "latents": latents}
    share, margin = parity._compare_codes(expected, np.array([[[2, 1, 0]]]), codebook)
    assert share == pytest.approx(1 / 3) and margin < parity.CODE_ROUNDING
    _, margin = parity._compare_codes(expected, np.array([[[1, 0, 1]]]), codebook)
    assert margin > 0.1


class AuthorsLayout(torch.nn.Module):
    """Written from the architecture facts alone: the class that the authors' weights load into."""

    def __init__(self, channels, first, second, depth, latent, codes):
        super().__init__()
        nn = torch.nn

        def block(dropout):
            layers = [nn.Conv2d(second, second, 3, padding=1, bias=False)] + (
                [nn.Dropout(0.0)] if dropout else []
            )
            layers += [nn.BatchNorm2d(second), nn.ReLU(), nn.Conv2d(second, second, 1, bias=False)]
            module = nn.Module()
            module.resblock = nn.Sequential(*layers)
            return module

        def down(before, after, size, stride, padding):
            convolution = nn.Conv2d(before, after, size, stride, padding)
            return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.LeakyReLU())

        def up(before, after, last):
            convolution = nn.ConvTranspose2d(before, after, 4, 2, 1)
            return nn.Sequential(
                convolution, nn.BatchNorm2d(after), nn.Tanh() if last else nn.LeakyReLU()
            )

        encoder = [
            down(channels, first, 4, 2, 1),
            down(first, second, 4, 2, 1),
            down(second, second, 3, 1, 1),
        ]
        encoder += [block(True) for _ in range(depth)] + [
            nn.LeakyReLU(),
            down(second, latent, 1, 1, 0),
        ]
        decoder = (
            [down(latent, second, 3, 1, 1)]
            + [block(False) for _ in range(depth)]
            + [nn.LeakyReLU()]
        )
        decoder += [up(second, first, False), up(first, channels, True)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)
        self.vq_layer = nn.Module()
        self.vq_layer.embedding = nn.Embedding(codes, latent)

    def forward(self, x):
        def run(layers, x):
            for layer in layers:
                x = x + layer.resblock(x) if hasattr(layer, "resblock") else layer(x)
            return x

        latents = run(self.encoder, x)
        distances = torch.cdist(
            latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]),
            self.vq_layer.embedding.weight,
        )
        quantized = self.vq_layer.embedding(distances.argmin(1)).view(
            *latents.permute(0, 2, 3, 1).shape
        )
        return run(self.decoder, quantized.permute(0, 3, 1, 2))


def test_authors_layout_loads_strictly_and_agrees():
    name = "autoencoder_3_channels_depth_18"
    model, _, _, entries = built(name)
    layout = AuthorsLayout(3, 6, 10, 18, 5, 16).eval()
    layout.load_state_dict(
        {key: torch.from_numpy(value.copy()) for key, value in entries.items()}, strict=True
    )
    assert len(entries) == 302
    images = images_of(MODELS[name][1])
    with torch.no_grad():
        found = layout(torch.from_numpy(parity.channels_first(images))).numpy()
    expected = parity.jax_outputs(model, images)
    np.testing.assert_allclose(parity.channels_last(found), expected["reconstruction"], atol=2e-5)


def test_reference_size_has_the_authors_parameters():
    with torch.device("meta"):
        layout = AuthorsLayout(3, 256, 512, 18, 64, 512)
        twin = ctssl_torch.VQVAE(
            in_channels=3, hidden=(256, 512), depth=18, embedding_dim=64, num_codes=512
        )
    shapes = {name: tuple(value.shape) for name, value in layout.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in twin.state_dict().items()} == shapes
    assert sum(parameter.numel() for parameter in twin.parameters()) == 101_353_673


def test_a_training_step_has_the_same_gradients_and_running_statistics():
    """PyTorch's running variance is the unbiased estimate of the batch's, ours the biased one; the
    rest is the same."""
    _, config = MODELS["autoencoder"]
    model, twin, tensors, _ = built("autoencoder")
    images = images_of(config, number=4)

    def loss_of(model, images):
        output = model(images, train=True)
        square = jnp.mean(jnp.square(output.reconstruction - images))
        return square + jnp.mean(output.codebook_loss) + 0.25 * jnp.mean(output.commitment_loss)

    with jax.default_matmul_precision("highest"):
        loss, gradients = nnx.jit(nnx.value_and_grad(loss_of))(model, images)
    output = twin.train()(torch.from_numpy(parity.channels_first(images)))
    there = torch.nn.functional.mse_loss(
        output.reconstruction, torch.from_numpy(parity.channels_first(images))
    )
    there = there + output.codebook_loss + 0.25 * output.commitment_loss
    there.backward()
    assert float(there.detach()) == pytest.approx(float(loss), rel=1e-5)

    parameters = dict(twin.named_parameters())
    for path, gradient in flatten(nnx.as_pure(gradients)).items():
        if path.endswith("/conv/bias"):
            continue  # before a normalisation: truly zero, rounding here
        want = names.to_torch_axes(np.asarray(gradient), path)
        found = parameters[names.torch_name(path, "VQVAE", config.depth)].grad.numpy()
        # In float32 the cancellation within a normalisation costs some of the last digits.
        assert np.abs(found - want).max() < 5e-3 * np.abs(want).max(), path

    after = {
        path: np.asarray(value) for path, value in flatten(nnx.as_pure(nnx.state(model))).items()
    }
    statistics = twin.state_dict()
    for path in (path for path in after if path.endswith("/var")):
        module = names.torch_name(path, "VQVAE", config.depth).removesuffix(".running_var")
        mean = path.removesuffix("var") + "mean"
        np.testing.assert_allclose(
            statistics[f"{module}.running_mean"], after[mean], rtol=1e-4, atol=1e-6
        )
        of_batch = (after[path] - 0.9 * tensors[path]) / 0.1
        side = {
            "encoder/downsample/0": (16, 24),
            "decoder/upsample/0": (16, 24),
            "decoder/upsample/1": (32, 48),
        }
        number = 4 * np.prod(side.get(path.removesuffix("/norm/var"), (8, 12)))
        expected = 0.9 * tensors[path] + 0.1 * of_batch * number / (number - 1)
        np.testing.assert_allclose(
            statistics[f"{module}.running_var"], expected, rtol=1e-4, atol=1e-6
        )
        assert int(statistics[f"{module}.num_batches_tracked"]) == 8


def test_what_does_not_fit_is_named():
    _, _, tensors, entries = built("autoencoder")
    wanted = {path: value.shape for path, value in tensors.items()}
    cut = {name: value for name, value in entries.items() if name != "encoder.3.resblock.0.weight"}
    cut["decoder.9.weight"] = np.zeros(3)
    cut["encoder.0.0.bias"] = np.zeros(99)
    _, misfits = names.from_state_dict(cut, wanted, "VQVAE", 2)
    assert misfits.text() == (
        "1 tensors missing, 1 extra, 1 of another shape; encoder.0.0.bias has shape (99,) there, "
        "(6,) here; encoder.3.resblock.0.weight is missing; decoder.9.weight has no place here"
    )


def test_features_in_timms_manner():
    _, twin, _, _ = built("classifier")
    features = ctssl_torch.Features(twin)
    images = torch.rand(2, 1, 32, 48)
    with torch.no_grad():
        maps = features(images)
        assert [tuple(m.shape) for m in maps] == [(2, 6, 16, 24), (2, 5, 8, 12)]
        assert features.feature_info.channels() == [6, 5] and features.feature_info.reduction() == [
            2,
            4,
        ]
        assert features.num_features == 5
        torch.testing.assert_close(features.forward_features(images), twin.encoder(images))
        torch.testing.assert_close(
            features.forward_head(maps[-1], pre_logits=True),
            twin.embed(images, batch_size=1),
            rtol=1e-4,
            atol=1e-6,
        )
    _, unet, _, _ = built("unet")
    assert ctssl_torch.Features(unet).num_features == 10
    with pytest.raises(ValueError, match="SEResNeXt has no encoder"):
        ctssl_torch.Features(built("se_resnext")[1])


def test_adjacent_slices_are_channels_and_ends_are_repeated():
    images = torch.arange(4.0).view(4, 1, 1, 1)
    taken = ctssl_torch.neighbours(images, torch.tensor([0, 3]), (-1, 0, 1))
    assert taken[:, :, 0, 0].tolist() == [[0, 0, 1], [2, 3, 3]]
    _, twin, _, _ = built("se_resnext")
    slices = torch.rand(5, 1, 32, 32)
    with torch.no_grad():
        expected = twin.embedding(torch.cat([slices[1], slices[2], slices[3]])[None])
    torch.testing.assert_close(
        twin.embed(slices, batch_size=2)[2:3], expected, rtol=1e-4, atol=1e-5
    )


def test_embeddings_in_training_mode_are_refused():
    _, twin, _, _ = built("classifier")
    with pytest.raises(ValueError, match="training mode"):
        twin.train().embed(torch.zeros(1, 1, 32, 32))


def test_what_is_not_finite_is_not_the_same():
    nan = np.array([1.0, np.nan], np.float32)
    assert parity.relative_difference(nan, nan) == float("inf")
    assert not parity.Parity(
        {"a": 1e-7, "b": parity.relative_difference(nan, nan)}, {"latents": 1e-7}, 1.0
    ).holds


def test_embeddings_feed_a_probe_and_come_in_half_precision():
    _, twin, _, _ = built("autoencoder")
    images = torch.rand(3, 1, 32, 32)
    whole = twin.embed(images)
    torch.nn.Linear(5, 2)(whole).sum().backward()  # no inference tensors
    half = twin.bfloat16()
    torch.testing.assert_close(half.embed(images), whole, rtol=0.1, atol=0.05)
    with torch.no_grad():
        assert half(images.bfloat16()).reconstruction.dtype == torch.float32


@pytest.mark.parametrize(
    "images", [torch.full((1, 1, 32, 32), 40.0), torch.zeros(1, 32, 32), torch.zeros(0, 1, 32, 32)]
)
def test_images_that_are_no_input_are_refused(images):
    _, twin, _, _ = built("classifier")
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        twin.embed(images)
    with pytest.raises(ValueError, match="divisible by 4, got 30 x 32"):
        twin.embed(torch.zeros(1, 1, 30, 32))


@pytest.mark.parametrize(
    ("kind", "sides", "stride"),
    [
        ("autoencoder", (63, 64), 4),
        ("classifier", (64, 63), 4),
        ("unet", (24, 32), 16),
        ("standard_unet", (32, 24), 16),
    ],
)
def test_sides_that_the_network_would_round_are_refused_by_every_way_in(kind, sides, stride):
    _, twin, _, _ = built(kind)
    images = torch.zeros(1, 1, *sides)
    ways = [twin, twin.embed]
    if stride == 4:
        features = ctssl_torch.Features(twin)
        ways += [features, features.forward_features, twin.encoder, twin.encoder.compress]
    for way in ways:
        with pytest.raises(ValueError, match=f"divisible by {stride}, got {sides[0]} x {sides[1]}"):
            way(images)


def test_a_part_in_training_mode_is_seen():
    _, twin, _, _ = built("classifier")
    ctssl_torch.Features(twin).train()
    with pytest.raises(ValueError, match="training mode"):
        twin.embed(torch.zeros(1, 1, 32, 32))
