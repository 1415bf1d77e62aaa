"""Features extractors, actors and critics in flax.

Observations come encoded (``spaces.encode``): an extractor joins them into one vector of features, the heads of actor
and critic stand on it. Batch axes are free.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from grpo_jax.noise import bits_to_uniform, draw_bits
from grpo_jax.types import Params, PyTree

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": nn.tanh,
    "relu": nn.relu,
    "elu": nn.elu,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "leaky_relu": nn.leaky_relu,
}
Activation = str | Callable[[jax.Array], jax.Array]
"""A name in ``ACTIVATIONS``, or any hashable function of arrays."""

PATCH_BYTES = 2**27
"""Most that the patches of one convolution take on a CPU; larger batches are convolved in parts."""


def check_activation(activation: Any) -> None:
    """Refuses what is no activation.

    Raises:
      ValueError: an unknown name.
      TypeError: neither a name nor a hashable function.
    """
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={activation!r} must be one of {', '.join(ACTIVATIONS)}, or a function"
            )
        return
    try:
        hash(activation)
    except TypeError as error:
        raise TypeError(f"activation={activation!r} must be hashable; use a plain function") from error
    if not callable(activation) or isinstance(activation, (type, nn.Module)):
        raise TypeError(
            f"activation={activation!r} must be a name or a function of one array, such as jax.nn.relu"
        )


class MLP(nn.Module):
    """Dense layers with an activation after each; ``[..., n_in] -> [..., widths[-1]]``."""

    widths: tuple[int, ...]
    activation: Activation

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths:
            x = _activate(self.activation, nn.Dense(width)(x))
        return x


class Flatten(nn.Module):
    """Joins the axes of one observation; ``[..., *shape] -> [..., prod(shape)]``."""

    rank: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[: x.ndim - self.rank], -1)


class Conv(nn.Module):
    """A square convolution without padding; ``[..., height, width, n_in] -> [..., height', width', channels]``.

    Parameters are named and shaped as those of flax's ``Conv``.
    """

    channels: int
    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel, self.kernel, x.shape[-1], self.channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,))
        images = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
        convolved = convolve(images, kernel, self.stride) + bias
        return convolved.reshape(*x.shape[:-3], *convolved.shape[1:])


class CNN(nn.Module):
    """Convolutions for feature maps ``[..., height, width, channels]``, by the size of the map.

    From 36 pixels on the three layers of Mnih et al. 2015 (doi:10.1038/nature14236) and 512 features; below, one
    3x3 layer of 16 channels and 128 features, the network of MinAtar (arXiv:1903.03176).

    Attributes:
      activation: behind each layer.
      n_features: size of the last layer; None: 512 or 128.
    """

    activation: Activation
    n_features: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if min(x.shape[-3:-1]) >= 36:
            layers, n_features = [(32, 8, 4), (64, 4, 2), (64, 3, 1)], 512
        else:
            layers, n_features = [(16, 3, 1)], 128
        for channels, kernel, stride in layers:
            x = _activate(self.activation, Conv(channels, kernel, stride)(x))
        x = x.reshape(*x.shape[:-3], -1)
        return _activate(self.activation, nn.Dense(self.n_features or n_features)(x))


class Combined(nn.Module):
    """Joins the entries of a dict, images behind a :class:`CNN` each; ``{name: [..., *shape]} -> [..., F]``.

    Attributes:
      ranks: name and number of axes of each entry, in the order in which their features are joined.
      images: names of the entries that are images.
      activation: of the convolutions.
      n_features: features of each image.
    """

    ranks: tuple[tuple[str, int], ...]
    images: tuple[str, ...] = ()
    activation: Activation = "relu"
    n_features: int = 256

    @nn.compact
    def __call__(self, observation: dict[str, jax.Array]) -> jax.Array:
        features = []
        for name, rank in self.ranks:
            is_image = name in self.images
            part = CNN(self.activation, self.n_features, name=f"CNN_{name}") if is_image else Flatten(rank)
            features.append(part(observation[name]))
        return jnp.concatenate(features, axis=-1)


class Actor(nn.Module):
    """Features ``[..., F]`` to distribution parameters ``[..., P]``.

    Attributes:
      widths: sizes of the dense layers.
      activation: behind each of them.
      n_outputs: logits, or means.
      gaussian: appends log standard deviations, learned and the same in every state.
      log_std_init: where they start.
    """

    widths: tuple[int, ...]
    activation: Activation
    n_outputs: int
    gaussian: bool = False
    log_std_init: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = MLP(self.widths, self.activation)(x)
        x = nn.Dense(self.n_outputs, name="output")(x)
        if not self.gaussian:
            return x
        start = nn.initializers.constant(self.log_std_init)
        log_std = self.param("log_std", start, (self.n_outputs,))
        return jnp.concatenate([x, jnp.broadcast_to(log_std, x.shape)], axis=-1)


class Critic(nn.Module):
    """Features ``[..., F]`` to state values ``[...]``; the attributes of :class:`Actor`."""

    widths: tuple[int, ...]
    activation: Activation

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = MLP(self.widths, self.activation)(x)
        return nn.Dense(1, name="output")(x)[..., 0]


def is_own(module: nn.Module) -> bool:
    """Whether a module is one of this file, which takes any batch axes and can start orthogonally."""
    return type(module) in (Flatten, CNN, Combined, Actor, Critic, MLP)


def initialise(
    module: nn.Module, key: jax.Array, example: PyTree, output_gain: float = 1.0, orthogonal: bool = True
) -> Params:
    """Parameters of a module; ``{}`` where it has none.

    Modules of this file start with orthogonal kernels and zero biases, with gains as in Andrychowicz et al. 2021
    (arXiv:2006.05990): sqrt(2) for relu-like and tanh hidden layers, a small one for the actor's output. All of a module
    comes from one draw, since XLA compiles every draw anew. Any other module starts as its own initialisers say.

    Args:
      module: a features extractor, an actor or a critic.
      key: PRNG key.
      example: one encoded observation, or its shape and dtype; with a batch axis for modules that need one.
      output_gain: gain of the layer named ``output``.
      orthogonal: False: kernels and biases are uniform within 1 / sqrt(inputs of a unit), as those of torch's layers,
        with which RL Zoo's settings for ``ortho_init=False`` were found.

    Raises:
      ValueError: the module keeps more than parameters, such as running statistics.
    """
    variables = jax.eval_shape(module.init, key, example)
    state = sorted(set(variables) - {"params"})
    if state:
        raise ValueError(
            f"{type(module).__name__} keeps {', '.join(state)} beside its parameters, which nothing here updates;"
            " use layers without state, such as LayerNorm in place of BatchNorm"
        )
    shapes = variables.get("params", {})
    if not shapes:
        return {}
    if not is_own(module):
        examples = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), example)
        # One after the other under vmap: flax's own orthogonal initialiser calls LAPACK, see _orthogonal.
        return jax.custom_batching.sequential_vmap(module.init)(key, examples)["params"]
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    by_name = {tuple(str(entry.key) for entry in path): leaf for path, leaf in leaves}
    sizes = [math.prod(leaf.shape) for leaf in by_name.values()]
    uniform = bits_to_uniform(draw_bits(key, (sum(sizes),)))
    normal, filled, start = jax.scipy.special.ndtri(uniform) if orthogonal else uniform, [], 0
    for (*layer, name), leaf in by_name.items():
        size = math.prod(leaf.shape)
        drawn = normal[start : start + size]
        if name == "log_std":
            drawn = jnp.full(leaf.shape, getattr(module, "log_std_init", 0.0))
        elif not orthogonal:
            drawn = (2 * drawn - 1) / math.sqrt(math.prod(by_name[*layer, "kernel"].shape[:-1]))
        elif name == "kernel":
            gain = output_gain if layer[-1] == "output" else math.sqrt(2.0)
            drawn = gain * _orthogonal(drawn.reshape(-1, leaf.shape[-1]))
        else:
            assert name == "bias", name
            drawn = jnp.zeros(leaf.shape)
        filled.append(drawn.reshape(leaf.shape).astype(leaf.dtype))
        start += size
    return jax.tree_util.tree_unflatten(structure, filled)


def _activate(activation: Activation, x: jax.Array) -> jax.Array:
    return ACTIVATIONS[activation](x) if isinstance(activation, str) else activation(x)


def convolve(images: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolution without padding; images ``[N, H, W, C]``, kernel ``[k, k, C, n]`` -> ``[N, H', W', n]``.

    XLA's convolution on a CPU is slow inside of loops, which is where all of ours are. As one matrix product of patches
    it took, in CPU seconds of one core: 0.07 for 0.9 to 2 (gradient of 64 images 84x84x4, Nature CNN; torch 0.06), 0.54
    for 1.50 (four iterations of Breakout-MinAtar, 10x10x4), 2.7 for 10.3 (the same, four seeds vmapped). No shape was
    found where patches lose. Chosen by the platform that is compiled for, not by the process' default.
    """
    return jax.lax.platform_dependent(
        images,
        kernel,
        cpu=functools.partial(_convolve_patches, stride=stride),
        default=functools.partial(_convolve_directly, stride=stride),
    )


def _convolve_directly(images: jax.Array, kernel: jax.Array, *, stride: int) -> jax.Array:
    return jax.lax.conv_general_dilated(
        images, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _convolve_patches(images: jax.Array, kernel: jax.Array, *, stride: int) -> jax.Array:
    n_images, height, width, n_in = images.shape
    size, channels = kernel.shape[0], kernel.shape[-1]
    rows, columns = (height - size) // stride + 1, (width - size) // stride + 1
    most = max(1, PATCH_BYTES // (rows * columns * kernel[..., 0].size * images.dtype.itemsize))
    if n_images > most:
        # Checkpointed: a gradient makes the patches of each part anew instead of keeping all of them.
        part = jax.checkpoint(lambda image: _convolve_patches(image[None], kernel, stride=stride)[0])
        return jax.lax.map(part, images, batch_size=most)
    if size % stride == 0:
        # Blocks of stride x stride pixels are the channels of a smaller image: longer copies, fewer of them.
        reach = size // stride
        height, width = rows + reach - 1, columns + reach - 1
        images = images[:, : height * stride, : width * stride]
        images = images.reshape(n_images, height, stride, width, stride, n_in).transpose(2, 4, 5, 0, 1, 3)
        kernel = kernel.reshape(reach, stride, reach, stride, n_in, channels).transpose(0, 2, 1, 3, 4, 5)
        step = 1
    else:
        reach, step = size, stride
        images = images.transpose(3, 0, 1, 2)
    # Channels first: XLA's product for the kernel's gradient is three times slower with the patches in rows.
    images = images.reshape(kernel.size // (reach * reach * channels), *images.shape[-3:])
    patches = [
        images[:, :, i : i + step * (rows - 1) + 1 : step, j : j + step * (columns - 1) + 1 : step]
        for i in range(reach)
        for j in range(reach)
    ]
    stacked = jnp.concatenate(patches).reshape(kernel.size // channels, n_images * rows * columns)
    product = kernel.reshape(-1, channels).T @ stacked
    return product.reshape(channels, n_images, rows, columns).transpose(1, 2, 3, 0)


def _orthogonal(normal: jax.Array) -> jax.Array:
    """A matrix with orthonormal rows or columns, whichever are fewer, uniformly distributed; from a normal matrix.

    Classical Gram-Schmidt, twice ("twice is enough": doi:10.1007/s00211-005-0615-4). It gives the Q of a QR
    decomposition whose R has a positive diagonal, and no LAPACK: batches of that, which ``vmap`` over seeds makes, wait
    for each other in XLA's thread pool on a CPU, and may never return (jax 0.10.2 on two cores).
    """
    tall = normal if normal.shape[0] >= normal.shape[1] else normal.T
    columns = jnp.arange(tall.shape[1])
    # In full: the short floats of accelerators would leave the columns oblique.
    dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)

    def orthonormalise(k: jax.Array, q: jax.Array) -> jax.Array:
        column = q[:, k]
        for _ in range(2):
            column = column - dot(q, jnp.where(columns < k, dot(column, q), 0.0))
        return q.at[:, k].set(column / jnp.linalg.norm(column))

    q = jax.lax.fori_loop(0, tall.shape[1], orthonormalise, tall)
    return q if normal.shape[0] >= normal.shape[1] else q.T
