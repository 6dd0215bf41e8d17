"""Building blocks of the autoencoder: convolutions with batch normalisation, residual blocks,
upsampling.

Images and features are channels last. Parameters and batch-normalisation statistics are float32.
Convolutions run in the `dtype` of each block (float32 or bfloat16).

Batch normalisation: decay 0.9 (PyTorch's momentum 0.1), epsilon 1e-5, one-pass variance. Statistics
are computed over the global batch: under `jax.jit` over a batch sharded on several devices XLA
reduces over all of them, once a layer in the forward pass and once in the backward pass.
`normalize_in_groups` makes it reduce within equal parts of the batch alone. The running variance is
the biased estimate, in PyTorch the unbiased one: with n values a channel they differ by the factor
n / (n - 1), below 1e-4 at any useful size. Both libraries use the running values as they are in
evaluation, so weights move between them unchanged.

Initialisation: convolution kernels are uniform with variance 1 / (3 fan_in), the default of PyTorch
and so of the authors' release; biases are zero. Batch normalisation follows every convolution
except the last of each residual block, so the scale matters only there: at the start each block
adds 1/6 to the variance of the residual stream, with Flax's default (variance 1 / fan_in) 1/2.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

KERNEL_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
LEAKY_SLOPE = 0.01
NORM_DECAY = 0.9
NORM_EPSILON = 1e-5
# What recomputation keeps: to compute statistics again would be to wait for all devices again.
_KEEP_STATISTICS = jax.checkpoint_policies.save_only_these_names("norm_statistics")
_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def leaky_relu(x: jax.Array) -> jax.Array:
    """Leaky ReLU with slope 0.01, any shape."""
    return jax.nn.leaky_relu(x, LEAKY_SLOPE)


@jax.custom_vjp
def transposed_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Transposed convolution with stride 2 that doubles height and width.

    Equals `torch.nn.functional.conv_transpose2d(stride=2, padding=(k - 2) // 2)` with the kernel
    flipped in space, and `jax.lax.conv_transpose(strides=(2, 2), padding="SAME")`. Only its
    gradient is written differently, since the weight gradient that XLA derives is slow in every
    convolution library (ten times on CPU). The adjoint of a transposed convolution is a strided
    convolution, which gives both gradients.

    Args:
        x: [B, H, W, I].
        kernel: [k, k, I, O] of x's dtype, k even.

    Returns:
        [B, 2H, 2W, O].
    """
    pads = [(size // 2, size // 2) for size in kernel.shape[:2]]
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), pads, lhs_dilation=(2, 2), dimension_numbers=_DIMENSIONS
    )


def _flip_and_swap(kernel: jax.Array) -> jax.Array:
    """[k, k, I, O] -> [k, k, O, I], mirrored in space: the kernel of the adjoint convolution. The
    function is its own inverse.
    """
    return kernel[::-1, ::-1].transpose(0, 1, 3, 2)


def _strided_convolution(y: jax.Array, adjoint_kernel: jax.Array) -> jax.Array:
    pads = [(size // 2 - 1, size // 2 - 1) for size in adjoint_kernel.shape[:2]]
    return jax.lax.conv_general_dilated(
        y, adjoint_kernel, (2, 2), pads, dimension_numbers=_DIMENSIONS
    )


def _transposed_convolution_forward(x, kernel):
    return transposed_convolution(x, kernel), (x, kernel)


def _transposed_convolution_backward(residuals, output_gradient):
    x, kernel = residuals
    adjoint_kernel = _flip_and_swap(kernel)
    input_gradient = _strided_convolution(output_gradient, adjoint_kernel)
    _, weight_pullback = jax.vjp(lambda k: _strided_convolution(output_gradient, k), adjoint_kernel)
    (adjoint_kernel_gradient,) = weight_pullback(x)
    return input_gradient, _flip_and_swap(adjoint_kernel_gradient)


transposed_convolution.defvjp(_transposed_convolution_forward, _transposed_convolution_backward)


def sum_pixels(x: jax.Array) -> jax.Array:
    """Sum over all axes but the last: [..., F] float32 -> [F].

    On CPU as a matrix product, which takes all cores and a tenth of the time that XLA's reduction
    takes; accelerators reduce within the operation that makes x.
    """
    return jax.lax.platform_dependent(
        x,
        cpu=lambda x: jnp.ones((1, x.size // x.shape[-1]), x.dtype).dot(x.reshape(-1, x.shape[-1]))[
            0
        ],
        default=lambda x: jnp.sum(x, tuple(range(x.ndim - 1))),
    )


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x + bias in the dtype of x, [..., F] and [F] float32; its gradient is summed in float32."""
    return x + bias.astype(x.dtype)


add_bias.defvjp(
    lambda x, bias: (add_bias(x, bias), None),
    lambda _, gradient: (gradient, sum_pixels(gradient.astype(jnp.float32))),
)


class TransposedConv(nnx.Module):
    """4 x 4 transposed convolution with stride 2 and a bias: [B, H, W, I] -> [B, 2H, 2W, O]."""

    def __init__(self, in_features: int, out_features: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(
            KERNEL_INIT(rngs.params(), (4, 4, in_features, out_features), jnp.float32)
        )
        self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(self.dtype)
        return add_bias(transposed_convolution(x.astype(self.dtype), kernel), self.bias[...])


class PointwiseConv(nnx.Module):
    """1 x 1 convolution as a matrix product over pixels: [B, H, W, I] -> [B, H, W, O].

    Its weight gradient is several times faster on CPU. The kernel has the shape [1, 1, I, O].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(
            KERNEL_INIT(rngs.params(), (1, 1, in_features, out_features), jnp.float32)
        )
        self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32)) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.dot(x.astype(self.dtype), self.kernel[0, 0].astype(self.dtype))
        return y if self.bias is None else add_bias(y, self.bias[...])


class Conv(nnx.Module):
    """Convolution with a square kernel of odd size or, with stride 2, of even size.

    [B, H, W, I] -> [B, H / stride, W / stride, O].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        stride: int,
        groups: int,
        use_bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        shape = (kernel_size, kernel_size, in_features // groups, out_features)
        self.kernel = nnx.Param(KERNEL_INIT(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32)) if use_bias else None
        if use_bias:
            rngs.params()  # as `flax.nnx.Conv` draws for the bias: each seed keeps its weights
        self.stride, self.groups, self.dtype = stride, groups, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, pad = self.kernel[...].astype(self.dtype), (self.kernel.shape[0] - 1) // 2
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel,
            (self.stride, self.stride),
            [(pad, pad), (pad, pad)],
            dimension_numbers=_DIMENSIONS,
            feature_group_count=self.groups,
        )
        return y if self.bias is None else add_bias(y, self.bias[...])


def _conv(
    in_features: int,
    out_features: int,
    kernel_size: int,
    stride: int,
    use_bias: bool,
    dtype,
    rngs,
    groups: int = 1,
):
    """Convolution padded so that the output is the input size divided by the stride."""
    if kernel_size == 1:
        return PointwiseConv(in_features, out_features, use_bias=use_bias, dtype=dtype, rngs=rngs)
    return Conv(
        in_features,
        out_features,
        kernel_size,
        stride=stride,
        groups=groups,
        use_bias=use_bias,
        dtype=dtype,
        rngs=rngs,
    )


@jax.custom_vjp
def normalize_by_batch(
    x: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch normalisation by the batch's own statistics, computed in float32.

    Only its gradient is written differently from the one that JAX derives, with the same numbers:
    for the backward pass it keeps x in its own dtype and two values a channel, where JAX keeps
    float32 copies of x. The returned statistics pass no gradient.

    Args:
        x: [..., F] float32 or bfloat16.
        scale, bias: [F] float32.

    Returns:
        normalised x [..., F] of x's dtype; mean [F] and biased variance [F] float32.
    """
    return _normalize_by_batch_forward(x, scale, bias)[0]


def _normalize_by_batch_forward(x, scale, bias):
    values, count = x.astype(jnp.float32), x.size // x.shape[-1]
    mean = sum_pixels(values) / count
    var = jnp.maximum(sum_pixels(jnp.square(values)) / count - jnp.square(mean), 0)
    mean, var = (checkpoint_name(value, "norm_statistics") for value in (mean, var))
    inverse = jax.lax.rsqrt(var + NORM_EPSILON)
    y = (values - mean) * (scale * inverse) + bias
    return (y.astype(x.dtype), mean, var), (x, mean, inverse, scale)


def _normalize_by_batch_backward(residuals, gradients):
    x, mean, inverse, scale = residuals
    gradient, count = gradients[0].astype(jnp.float32), x.size // x.shape[-1]
    normalized = (x.astype(jnp.float32) - mean) * inverse
    bias_gradient = sum_pixels(gradient)
    scale_gradient = sum_pixels(gradient * normalized)
    input_gradient = gradient - bias_gradient / count - normalized * (scale_gradient / count)
    return (input_gradient * (scale * inverse)).astype(x.dtype), scale_gradient, bias_gradient


normalize_by_batch.defvjp(_normalize_by_batch_forward, _normalize_by_batch_backward)


def normalize_visible(
    x: jax.Array, scale: jax.Array, bias: jax.Array, visible: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`normalize_by_batch` over the visible positions alone (SparK, arXiv 2301.03580).

    Args:
        x, scale, bias: as there.
        visible: [..., 1] float32, 1 where a position counts, else 0.

    Returns:
        As there; the normalised x is 0 where a position does not count.
    """
    values = x.astype(jnp.float32)
    count = jnp.maximum(jnp.sum(visible), 1)
    mean = sum_pixels(values * visible) / count
    var = jnp.maximum(sum_pixels(jnp.square(values) * visible) / count - jnp.square(mean), 0)
    mean, var = (checkpoint_name(value, "norm_statistics") for value in (mean, var))
    y = ((values - mean) * (scale * jax.lax.rsqrt(var + NORM_EPSILON)) + bias) * visible
    return y.astype(x.dtype), *(jax.lax.stop_gradient(value) for value in (mean, var))


class BatchNorm(nnx.Module):
    """Batch normalisation over all axes except the last, in float32 for every dtype of the input.

    (`flax.nnx.BatchNorm` rounds the running statistics to its compute dtype, which costs accuracy
    in bfloat16.)

    num_groups: equal parts of the batch, in order, each with statistics of its own; the running
      statistics follow the means of those of the parts.
    """

    def __init__(self, features: int):
        self.num_groups = 1
        self.scale = nnx.Param(jnp.ones(features, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(features, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(features, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(features, jnp.float32))

    def __call__(self, x: jax.Array, *, train: bool, visible: jax.Array | None = None) -> jax.Array:
        """[..., F] -> [..., F] of the same dtype; `train` uses the batch's statistics and updates
        the running ones. Positions that are 0 in `visible` [..., 1] count in none, and become 0.
        """
        if train:
            y, mean, var = self._normalize(x, visible)
            self.mean[...] = jax.lax.stop_gradient(
                NORM_DECAY * self.mean[...] + (1 - NORM_DECAY) * mean
            )
            self.var[...] = jax.lax.stop_gradient(
                NORM_DECAY * self.var[...] + (1 - NORM_DECAY) * var
            )
            return y
        scale = self.scale[...] * jax.lax.rsqrt(self.var[...] + NORM_EPSILON)
        y = (x.astype(jnp.float32) - self.mean[...]) * scale + self.bias[...]
        return (y if visible is None else y * visible).astype(x.dtype)

    def _normalize(
        self, x: jax.Array, visible: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        scale, bias = self.scale[...], self.bias[...]
        arrays = (x,) if visible is None else (x, visible)

        def normalize(x: jax.Array, *visible: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            return (normalize_visible if visible else normalize_by_batch)(x, scale, bias, *visible)

        if self.num_groups == 1:
            return normalize(*arrays)
        parts = (array.reshape(self.num_groups, -1, *array.shape[1:]) for array in arrays)
        y, mean, var = jax.vmap(normalize)(*parts)
        return y.reshape(x.shape), jnp.mean(mean, axis=0), jnp.mean(var, axis=0)


def normalize_in_groups(model: nnx.Module, num_groups: int) -> None:
    """Give each of `num_groups` equal parts of a batch its own statistics in all `BatchNorm`s.

    Where the parts are those of groups of devices, no device waits for another group.
    """
    for _, module in nnx.iter_graph(model):
        if isinstance(module, BatchNorm):
            module.num_groups = num_groups


class ConvNorm(nnx.Module):
    """Convolution and batch normalisation, without activation.

    [B, H, W, I] -> [B, H / stride, W / stride, O].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        use_bias: bool = True,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.conv = _conv(
            in_features, out_features, kernel_size, stride, use_bias, dtype, rngs, groups
        )
        self.norm = BatchNorm(out_features)

    def __call__(self, x: jax.Array, *, train: bool, visible: jax.Array | None = None) -> jax.Array:
        """`visible` [B, H / stride, W / stride, 1]: as `BatchNorm`."""
        return self.norm(self.conv(x), train=train, visible=visible)


class TransposedConvNorm(nnx.Module):
    """Transposed convolution and batch normalisation, without activation.

    [B, H, W, I] -> [B, 2H, 2W, O].
    """

    def __init__(self, in_features: int, out_features: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = TransposedConv(in_features, out_features, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(out_features)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return self.norm(self.conv(x), train=train)


class ResidualBlock(nnx.Module):
    """x + conv1(ReLU(norm(dropout(conv3(x))))), all of one width, convolutions without bias."""

    def __init__(self, features: int, *, drop_rate: float = 0.0, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv3 = _conv(features, features, 3, 1, False, dtype, rngs)
        self.norm = BatchNorm(features)
        self.conv1 = _conv(features, features, 1, 1, False, dtype, rngs)
        self.drop_rate = drop_rate

    def __call__(
        self,
        x: jax.Array,
        key: jax.Array | None,
        *,
        train: bool,
        visible: jax.Array | None = None,
    ) -> jax.Array:
        """Where x and `visible` [B, H, W, 1] are 0, the result is 0."""
        y = self.conv3(x)
        if train and self.drop_rate > 0:
            keep = jax.random.bernoulli(key, 1 - self.drop_rate, y.shape)
            y = jnp.where(keep, y / (1 - self.drop_rate), 0)
        y = jax.nn.relu(self.norm(y, train=train, visible=visible))
        return x + self.conv1(y)


def apply_blocks(
    blocks: Sequence[nnx.Module],
    x: jax.Array,
    key: jax.Array | None,
    *,
    train: bool,
    remat: bool,
    scan: bool,
    visible: jax.Array | None = None,
) -> jax.Array:
    """Run residual blocks one after the other: [B, H, W, F] -> [B, H, W, F].

    Unrolled is the default: on two busy CPU cores a step was 5 to 15 times slower with a scan
    (convolutions inside a loop get slow weight gradients), and it took longer to compile (reference
    model, traced and compiled: 29 s unrolled, 58 s with a scan). A scan is for accelerators, with
    remat: the loop keeps XLA from undoing the recomputation, as it does on CPU in unrolled blocks.

    Args:
        blocks: list of `ResidualBlock`, all of the same width.
        key: seeds the dropout of each block; needed only in training with dropout.
        train: use and update batch statistics, apply dropout.
        remat: keep only each block's input and batch statistics for the backward pass and compute
            the rest again; same numbers.
        scan: one compiled block in a loop instead of a copy for each block; same numbers and names.
        visible: as `ResidualBlock`.
    """

    def run(block, x, key):
        return block(x, key, train=train, visible=visible)

    if scan and len(blocks) > 0:
        return _scan_blocks(blocks, x, key, train=train, remat=remat, visible=visible)
    if remat and train:
        run = nnx.remat(run, policy=_KEEP_STATISTICS)
    for index, block in enumerate(blocks):
        x = run(block, x, None if key is None else jax.random.fold_in(key, index))
    return x


def _scan_blocks(
    blocks: Sequence[nnx.Module],
    x: jax.Array,
    key: jax.Array | None,
    *,
    train: bool,
    remat: bool,
    visible: jax.Array | None,
) -> jax.Array:
    """The loop of `apply_blocks` as `jax.lax.scan` over the blocks' stacked parameters and batch
    statistics."""
    graph = nnx.graphdef(blocks[0])
    states = [nnx.as_pure(nnx.state(block)) for block in blocks]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def body(x, index_and_state):
        index, state = index_and_state
        block = nnx.merge(graph, state)
        drop_key = None if key is None else jax.random.fold_in(key, index)
        x = block(x, drop_key, train=train, visible=visible)
        return x, nnx.as_pure(nnx.state(block, nnx.BatchStat))

    if remat and train:
        # within a scan XLA cannot merge the recomputation with the first pass
        body = jax.checkpoint(body, prevent_cse=False, policy=_KEEP_STATISTICS)
    x, statistics = jax.lax.scan(body, x, (jnp.arange(len(blocks)), stacked))
    if train:
        for index, block in enumerate(blocks):
            nnx.update(block, jax.tree.map(lambda leaf: leaf[index], statistics))
    return x
