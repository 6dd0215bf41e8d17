"""SE-ResNeXt: sizes, both poolings, gradients, weights of both published layouts against
PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ctssl_jax.models.se_resnext import SEResNeXt, SEResNeXtConfig, flops_per_slice
from ctssl_jax.ops.trees import flatten, unflatten
from ctssl_jax.torch_bridge import imagenet_weights
from data_prep.system.errors import InputError

TINY = dict(layers=(1, 2), width=8, groups=4, num_classes=3)


def build(**settings):
    return SEResNeXt(SEResNeXtConfig(**{**TINY, **settings}), rngs=nnx.Rngs(0))


def tree_of(model):
    _, params, variables = nnx.split(model, nnx.Param, ...)
    return {"params": nnx.as_pure(params), "variables": nnx.as_pure(variables)}


def shapes_of(config):
    return flatten(tree_of(nnx.eval_shape(lambda: SEResNeXt(config, rngs=nnx.Rngs(0)))))


def torch_names(flat, layout):
    """Our flat names and arrays -> PyTorch's, written out independently of the code under test."""
    out = {}
    for name, value in flat.items():
        parts = name.split("/")[1:]
        last = {
            "kernel": "weight",
            "scale": "weight",
            "mean": "running_mean",
            "var": "running_var",
        }.get(parts[-1], "bias")
        if parts[0] == "stem":
            prefix = ("layer0." if layout == "legacy" else "") + {"conv": "conv1", "norm": "bn1"}[
                parts[1]
            ]
        elif parts[0] == "classification":
            prefix = "last_linear" if layout == "legacy" else "fc"
        else:
            stage, block, part = int(parts[1]) + 1, parts[2], parts[3]
            se = "se_module" if layout == "legacy" else "se"
            inner = {"squeeze": f"{se}.fc1", "excite": f"{se}.fc2"}.get(part)
            if part == "downsample":
                inner = f"downsample.{0 if parts[4] == 'conv' else 1}"
            elif inner is None:
                inner = f"{'conv' if parts[4] == 'conv' else 'bn'}{part[-1]}"
            prefix = f"layer{stage}.{block}.{inner}"
        value = np.asarray(value)
        out[f"{prefix}.{last}"] = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    return out


def random_tree(model, seed=0):
    """The model's flat state with every tensor random, the statistics away from 0 and 1."""
    rng = np.random.default_rng(seed)
    flat = flatten(tree_of(model))
    out = {}
    for name, leaf in flat.items():
        value = rng.normal(size=leaf.shape).astype(np.float32)
        if name.endswith("/kernel"):
            value /= np.sqrt(np.prod(leaf.shape[:-1]))
        elif name.endswith(("/scale", "/var")):
            value = 1 + 0.3 * np.tanh(value)
        else:
            value *= 0.2
        out[name] = value
    return out


def with_weights(model, flat):
    tree = unflatten(tree_of(model), flat)
    nnx.update(model, tree["params"], tree["variables"])
    return model


@pytest.mark.parametrize(("num_classes", "parameters"), [(1, 25_512_945), (1000, 27_559_896)])
def test_reference_size(num_classes, parameters):
    shapes = shapes_of(SEResNeXtConfig(num_classes=num_classes))
    assert (
        sum(int(np.prod(leaf.shape)) for name, leaf in shapes.items() if name.startswith("params/"))
        == parameters
    )
    assert shapes["params/stages/0/0/conv2/conv/kernel"].shape == (3, 3, 4, 128)
    assert shapes["params/classification/kernel"].shape == (2048, num_classes)


@pytest.mark.parametrize("pooling", ["legacy", "timm"])
@pytest.mark.parametrize("size", [(32, 48), (33, 35)])
def test_shapes(pooling, size):
    model = build(pooling=pooling)
    images = jax.random.uniform(jax.random.key(0), (2, *size, 3))
    logits, embedding = model(images, train=False)
    assert (
        logits.shape == (2, 3)
        and embedding.shape == (2, 64)
        and logits.dtype == embedding.dtype == jnp.float32
    )
    np.testing.assert_allclose(model(images[1:], train=False).logits, logits[1:], atol=1e-5)
    with pytest.raises(ValueError, match="at least 5, got 4 x 48"):
        model(images[:, :4], train=False) if size[1] == 48 else model(
            jnp.zeros((1, 4, 48, 3)), train=False
        )


def test_gradients_reach_every_parameter_and_statistics_move():
    graph, params, variables = nnx.split(build(), nnx.Param, ...)
    images = jax.random.uniform(jax.random.key(0), (4, 32, 32, 3))

    @jax.jit
    def gradient(params, variables):
        def loss(params):
            model = nnx.merge(graph, params, variables, copy=True)
            return jnp.sum(jnp.square(model(images, train=True).logits)), nnx.split(
                model, nnx.Param, ...
            )[2]

        return jax.grad(loss, has_aux=True)(params)

    gradients, moved = gradient(nnx.as_pure(params), nnx.as_pure(variables))
    assert not [name for name, value in flatten(gradients).items() if not np.any(value != 0)]
    before, after = flatten(nnx.as_pure(variables)), flatten(nnx.as_pure(moved))
    assert before and not [name for name in before if np.array_equal(before[name], after[name])]


def test_operations_are_those_that_xla_counts():
    # XLA miscounts grouped convolutions
    config = SEResNeXtConfig(layers=(1, 2, 1), width=16, groups=1)
    graph, state = nnx.split(SEResNeXt(config, rngs=nnx.Rngs(0)))
    images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    lowered = jax.jit(lambda state, images: nnx.merge(graph, state)(images, train=False)).lower(
        state, images
    )
    assert flops_per_slice(config, 256) == pytest.approx(lowered.cost_analysis()["flops"], rel=0.05)
    # The grouped convolutions' share shrinks by the number of groups: 9 inner^2 pixels each.
    side, saved = 64, 0
    for stage, (depth, (inner, _)) in enumerate(
        zip(config.layers, config.stage_widths, strict=True)
    ):
        saved += depth * 2 * 9 * inner * inner * (side >> stage) ** 2 * 3 // 4
    grouped = SEResNeXtConfig(layers=(1, 2, 1), width=16, groups=4)
    assert flops_per_slice(config, 256) - flops_per_slice(grouped, 256) == saved


@pytest.mark.parametrize("layout", ["timm", "legacy"])
def test_weights_come_back_under_both_layouts(layout):
    model = build()
    flat = random_tree(model)
    tensors = torch_names(flat, layout)
    tensors["layer1.0.bn1.num_batches_tracked"] = np.array(7)
    loaded = imagenet_weights.load_state_dict(tensors, flatten(tree_of(model)), head=True)
    assert loaded.keys() == flat.keys()
    for name, value in flat.items():
        np.testing.assert_array_equal(loaded[name], value, err_msg=name)


def test_head_may_be_left_out():
    like = flatten(tree_of(build()))
    other = torch_names(random_tree(build(num_classes=1000)), "timm")
    headless = {name: value for name, value in other.items() if not name.startswith("fc.")}
    for tensors in (other, headless):
        loaded = imagenet_weights.load_state_dict(tensors, like, head=False)
        assert loaded.keys() == {name for name in like if "classification" not in name}
    with pytest.raises(
        InputError,
        match=r"2 of another shape; fc\.bias has shape \(1000,\) there, \(3,\) here",
    ):
        imagenet_weights.load_state_dict(other, like, head=True)
    with pytest.raises(InputError, match=r"2 tensors missing.*fc\."):
        imagenet_weights.load_state_dict(headless, like, head=True)


def test_weights_that_do_not_fit_are_refused():
    like, tensors = flatten(tree_of(build())), torch_names(random_tree(build()), "timm")
    fewer = {name: value for name, value in tensors.items() if name != "layer2.1.se.fc2.bias"}
    with pytest.raises(
        InputError,
        match=r"1 tensors missing, 0 extra.*layer2\.1\.se\.fc2\.bias is missing",
    ):
        imagenet_weights.load_state_dict(fewer, like, head=True)
    more = tensors | {
        "layer2.2.conv1.weight": np.zeros((1, 1, 1, 1)),
        "layer1.0.conv1.bias": np.zeros(1),
    }
    with pytest.raises(
        InputError,
        match=r"0 tensors missing, 2 extra.*layer2\.2\.conv1\.weight has no place",
    ):
        imagenet_weights.load_state_dict(more, like, head=True)
    wrong = tensors | {"conv1.weight": np.zeros((8, 1, 7, 7))}
    with pytest.raises(
        InputError,
        match=r"conv1\.weight has shape \(8, 1, 7, 7\) there, \(8, 3, 7, 7\) here",
    ):
        imagenet_weights.load_state_dict(wrong, like, head=True)


def torch_twin(config, layout):
    """The network in PyTorch, from its published description, with that layout's names and
    pooling."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from torch import nn

    class Squeeze(nn.Module):
        def __init__(self, features):
            super().__init__()
            self.fc1 = nn.Conv2d(features, features // 16, 1)
            self.fc2 = nn.Conv2d(features // 16, features, 1)

        def forward(self, x):
            mean = x.mean((2, 3), keepdim=True)
            return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(mean))))

    class Block(nn.Module):
        def __init__(self, before, inner, after, stride, first):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(before, inner, 1, bias=False), nn.BatchNorm2d(inner)
            self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=config.groups, bias=False)
            self.bn2 = nn.BatchNorm2d(inner)
            self.conv3, self.bn3 = nn.Conv2d(inner, after, 1, bias=False), nn.BatchNorm2d(after)
            setattr(self, "se" if layout == "timm" else "se_module", Squeeze(after))
            self.downsample = None
            if first:
                self.downsample = nn.Sequential(
                    nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
                )

        def forward(self, x):
            y = torch.relu(self.bn1(self.conv1(x)))
            y = torch.relu(self.bn2(self.conv2(y)))
            y = (self.se if layout == "timm" else self.se_module)(self.bn3(self.conv3(y)))
            return torch.relu(y + (x if self.downsample is None else self.downsample(x)))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            stem = (
                nn.Conv2d(config.in_channels, config.width, 7, 2, 3, bias=False),
                nn.BatchNorm2d(config.width),
            )
            if layout == "timm":
                self.conv1, self.bn1 = stem
            else:
                self.layer0 = nn.Module()
                self.layer0.conv1, self.layer0.bn1 = stem
            padding = dict(padding=1) if layout == "timm" else dict(ceil_mode=True)
            self.pool = nn.MaxPool2d(3, 2, **padding)
            before = config.width
            for stage, depth in enumerate(config.layers):
                inner, after = 2 * config.width * 2**stage, 4 * config.width * 2**stage
                blocks = []
                for i in range(depth):
                    blocks.append(Block(before, inner, after, 2 if stage and i == 0 else 1, i == 0))
                    before = after
                setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            setattr(
                self,
                "fc" if layout == "timm" else "last_linear",
                nn.Linear(before, config.num_classes),
            )

        def forward(self, x):
            stem = self if layout == "timm" else self.layer0
            x = self.pool(torch.relu(stem.bn1(stem.conv1(x))))
            for stage in range(len(config.layers)):
                x = getattr(self, f"layer{stage + 1}")(x)
            return (self.fc if layout == "timm" else self.last_linear)(x.mean((2, 3)))

    return Network()


@pytest.mark.parametrize("size", [(32, 48), (33, 39)])
@pytest.mark.parametrize("layout", ["timm", "legacy"])
def test_same_logits_as_pytorch(layout, size):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    model = build(pooling=layout)
    flat = random_tree(model)
    with_weights(model, flat)
    twin = torch_twin(model.config, layout).eval()
    tensors = {
        name: torch.tensor(np.array(value)) for name, value in torch_names(flat, layout).items()
    }
    missing = twin.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys and all(
        key.endswith("num_batches_tracked") for key in missing.missing_keys
    )
    images = np.random.default_rng(1).random((2, *size, 3), np.float32)
    with torch.no_grad():
        want = twin(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(model(jnp.asarray(images), train=False).logits, want, atol=2e-5)
    other = SEResNeXt(
        SEResNeXtConfig(**TINY, pooling="legacy" if layout == "timm" else "timm"), rngs=nnx.Rngs(0)
    )
    differs = np.abs(
        with_weights(other, flat)(jnp.asarray(images), train=False).logits - want
    ).max()
    assert differs > 1e-3  # the pooling matters, so that the agreement above says something


def test_same_logits_as_timm_from_a_file(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    network = timm.create_model("seresnext50_32x4d", pretrained=False, num_classes=2).eval()
    generator = torch.Generator().manual_seed(0)
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(
                torch.rand(buffer.shape, generator=generator) * 0.2
                + (1 if name.endswith("var") else 0)
            )
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    model = SEResNeXt(SEResNeXtConfig(num_classes=2, pooling="timm"), rngs=nnx.Rngs(0))
    state = imagenet_weights.load_into(tree_of(model), tmp_path / "weights.pth", head=True)
    nnx.update(model, state["params"], state["variables"])
    images = np.random.default_rng(1).random((1, 64, 64, 3), np.float32)
    with torch.no_grad():
        want = network(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    graph, weights = nnx.split(model)
    logits = jax.jit(lambda images: nnx.merge(graph, weights)(images, train=False).logits)(images)
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-5)


def test_files_of_both_kinds(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    values = {"conv1.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    torch.save(
        {"state_dict": {name: torch.tensor(value) for name, value in values.items()}},
        tmp_path / "a.pth",
    )
    np.testing.assert_array_equal(
        imagenet_weights.read_file(tmp_path / "a.pth")["conv1.weight"], values["conv1.weight"]
    )
    torch.save({"epoch": 3}, tmp_path / "b.pth")
    with pytest.raises(InputError, match="does not hold tensors by name"):
        imagenet_weights.read_file(tmp_path / "b.pth")
    numpy_files = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    numpy_files.save_file(values, tmp_path / "a.safetensors")
    read = imagenet_weights.read_file(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(read["conv1.weight"], values["conv1.weight"])


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        imagenet_weights.read_file(tmp_path / "missing.pth")
    (tmp_path / "a.h5").write_bytes(b"x")
    with pytest.raises(InputError, match=r"give a file that ends in \.safetensors"):
        imagenet_weights.read_file(tmp_path / "a.h5")
    pytest.importorskip("torch", reason="PyTorch is not installed")
    (tmp_path / "a.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=r"is truncated or not a file of torch\.save"):
        imagenet_weights.read_file(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 3}, "groups must divide 2 width = 128, got 3"),
        ({"layers": ()}, "layers must be one or more"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"width": 2, "groups": 1}, "width must be at least 4"),
        ({"pooling": "same"}, "pooling must be one of legacy, timm"),
        ({"dtype": "float16"}, "dtype must be one of"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SEResNeXtConfig(**settings)
