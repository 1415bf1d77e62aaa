"""What observations and actions look like: small, immutable, hashable descriptions.

They are static under ``jit`` (two equal spaces share one trace), which Gymnasium's spaces cannot be
because they do not hash.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Discrete:
    """Integers ``0 .. n-1``; arrays of shape ``[]``, int32."""

    n: int

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    @property
    def nvec(self) -> tuple[int, ...]:
        return (self.n,)


@dataclass(frozen=True)
class MultiDiscrete:
    """A vector of integers, entry ``i`` in ``0 .. nvec[i]-1``; arrays of shape ``[len(nvec)]``, int32."""

    nvec: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.nvec),)


@dataclass(frozen=True)
class MultiBinary:
    """A vector of ``n`` bits; arrays of shape ``[n]``, int32."""

    n: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n,)

    @property
    def nvec(self) -> tuple[int, ...]:
        return (2,) * self.n


@dataclass(frozen=True, eq=False)
class Box:
    """Real (or image) arrays of shape ``shape`` between ``low`` and ``high``.

    Attributes:
      low: lower bounds, broadcast to ``shape``, float32.
      high: upper bounds, broadcast to ``shape``, float32.
      shape: shape of one sample.
      dtype: name of the dtype; ``"uint8"`` marks an image, whose values are divided by 255.
      channels_first: whether the samples are images ``[channels, height, width]``, as SB3 has them; networks always
        see the channels last.
    """

    low: np.ndarray
    high: np.ndarray
    shape: tuple[int, ...]
    dtype: str = "float32"
    channels_first: bool = False
    _digest: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        shape = tuple(int(size) for size in self.shape)
        # float64 bounds such as 1e308 become inf: that is what they mean in float32.
        with np.errstate(over="ignore"):
            low = np.broadcast_to(np.asarray(self.low, np.float32), shape)
            high = np.broadcast_to(np.asarray(self.high, np.float32), shape)
        if np.any(np.isnan(low)) or np.any(np.isnan(high)) or np.any(low > high):
            raise ValueError(f"Box needs low <= high without NaN, got low={low}, high={high}")
        if self.channels_first and len(shape) != 3:
            raise ValueError(
                f"channels_first=True is for images [channels, height, width], got shape={shape}; leave it out"
            )
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)
        digest = hash((low.tobytes(), high.tobytes(), shape, self.dtype, self.channels_first))
        object.__setattr__(self, "_digest", digest)

    def __repr__(self) -> str:
        # Bounds of images would fill the screen of an error message.
        low, high = (
            b.flat[0] if b.size and np.all(b == b.flat[0]) else b.tolist() for b in (self.low, self.high)
        )
        order = ", channels_first=True" if self.channels_first else ""
        return f"Box(low={low}, high={high}, shape={self.shape}, dtype={self.dtype!r}{order})"

    def __hash__(self) -> int:
        return self._digest

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Box)
            and self.shape == other.shape
            and self.dtype == other.dtype
            and self.channels_first == other.channels_first
            and np.array_equal(self.low, other.low)
            and np.array_equal(self.high, other.high)
        )

    @property
    def is_bounded(self) -> bool:
        """Whether every bound is finite (float32's largest value counts as no bound)."""
        largest = np.finfo(np.float32).max
        return bool(np.all(np.abs(self.low) < largest) and np.all(np.abs(self.high) < largest))


@dataclass(frozen=True)
class Dict:
    """Named observations; arrays come as a ``dict`` with these names, in this order."""

    spaces: tuple[tuple[str, Space], ...]

    def __post_init__(self) -> None:
        for name, space in self.spaces:
            if isinstance(space, Dict):
                raise NotImplementedError(
                    f"nested Dict observation spaces are not supported (entry {name!r}); flatten it"
                )


Space = Discrete | MultiDiscrete | MultiBinary | Box | Dict
ActionSpace = Discrete | MultiDiscrete | MultiBinary | Box
Encoded = Any  # an array, or a dict of arrays


_KINDS = ("Discrete", "MultiDiscrete", "MultiBinary", "Box", "Dict")


def is_image(space: Space) -> bool:
    """Whether a space is a stack of 2-d feature maps ``[height, width, channels]``, 3x3 pixels or more."""
    if not isinstance(space, Box) or len(space.shape) != 3:
        return False
    pixels = space.shape[1:] if space.channels_first else space.shape[:2]
    return min(pixels) >= 3


def encode(space: Space, observation: Any) -> Encoded:
    """Turns observations into network input, one-hot where they are categories.

    Args:
      space: the observation space.
      observation: ``[..., *space.shape]`` (a dict of such arrays for ``Dict``), any dtype.

    Returns:
      Floating; ``[..., *space.shape]`` for a ``Box`` (channels last), a dict of encoded entries for a ``Dict``, else
      ``[..., n_features]``.
    """
    if isinstance(space, Dict):
        return {name: encode(part, observation[name]) for name, part in space.spaces}
    observation = jnp.asarray(observation)
    if isinstance(space, Box):
        values = observation.astype(_float_dtype(observation))
        values = values / 255.0 if space.dtype == "uint8" else values
        return jnp.moveaxis(values, -3, -1) if space.channels_first else values
    if isinstance(space, Discrete):
        return jax.nn.one_hot(observation, space.n)
    if isinstance(space, MultiBinary):
        return observation.astype(_float_dtype(observation))
    hots = [jax.nn.one_hot(observation[..., i], n) for i, n in enumerate(space.nvec)]
    return jnp.concatenate(hots, axis=-1)


def encoded_rank(space: Space) -> int:
    """Axes of one encoded observation; the entries of a ``Dict`` have ranks of their own."""
    assert not isinstance(space, Dict)
    return len(space.shape) if isinstance(space, Box) else 1


def encoded_size(space: Space) -> int:
    """Numbers in one encoded observation, all entries of a ``Dict`` together."""
    if isinstance(space, Dict):
        return sum(encoded_size(part) for _, part in space.spaces)
    return math.prod(space.shape) if isinstance(space, Box | MultiBinary) else sum(space.nvec)


def from_gymnasium(space: Any, name: str = "space") -> Space:
    """Converts a Gymnasium or gymnax space or a subclass of one, recognised by the names of its classes.

    Raises:
      NotImplementedError: for a space that no policy here can handle; names it and the fix.
    """
    names = [parent.__name__ for parent in type(space).__mro__]
    kind = next((name for name in names if name in _KINDS), names[0])
    if kind in ("Box", "MultiBinary", "MultiDiscrete") and 0 in tuple(space.shape):
        raise NotImplementedError(
            f"{name}: {space} holds no numbers: shape={tuple(space.shape)}; leave it out"
        )
    if kind == "Dict" and not space.spaces:
        raise NotImplementedError(f"{name}: {space} has no entries; give it one")
    if kind == "Discrete":
        if int(getattr(space, "start", 0)) != 0:
            raise NotImplementedError(f"{name}: Discrete(start={space.start}) must start at 0")
        return Discrete(int(space.n))
    if kind == "MultiDiscrete":
        nvec = np.asarray(space.nvec)
        if nvec.ndim != 1 or np.any(np.asarray(getattr(space, "start", 0)) != 0):
            raise NotImplementedError(f"{name}: {space} must be one-dimensional and start at 0")
        return MultiDiscrete(tuple(int(n) for n in nvec))
    if kind == "MultiBinary":
        if len(space.shape) != 1:
            raise NotImplementedError(f"{name}: {space} must be one-dimensional; flatten it")
        return MultiBinary(int(space.shape[0]))
    if kind == "Box":
        dtype = np.dtype(space.dtype).name
        return Box(np.asarray(space.low), np.asarray(space.high), tuple(space.shape), dtype)
    if kind == "Dict":
        entries = tuple((key, from_gymnasium(part, f"{name}[{key!r}]")) for key, part in space.spaces.items())
        return Dict(entries)
    raise NotImplementedError(
        f"{name}: {kind} spaces are not supported; use Box, Discrete, MultiDiscrete, MultiBinary"
        " (or a flat Dict of them for observations)"
    )


def _float_dtype(values: jax.Array) -> Any:
    return values.dtype if jnp.issubdtype(values.dtype, jnp.floating) else jnp.result_type(float)
