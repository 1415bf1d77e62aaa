from __future__ import annotations

import math

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces as gym_spaces
from gymnax.environments import spaces as gymnax_spaces

from grpo_jax import spaces
from grpo_jax.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete

IMAGE = Box(0, 255, (2, 1, 2), "uint8")
MIXED = Dict((("image", IMAGE), ("hand", Discrete(3)), ("speed", Box(-1, 1, (2,))), ("keys", MultiBinary(2))))


def make_spaces():
    """Every kind of space, freshly built."""
    return [
        Discrete(3),
        Discrete(4),
        MultiDiscrete((3,)),
        MultiDiscrete((2, 4)),
        MultiBinary(3),
        Box(-1, 1, (2,)),
        Box(-1, 2, (2,)),
        Box(-2, 1, (2,)),
        Box(-1, 1, (3,)),
        Box(-1, 1, (2, 1)),
        Box(-1, 1, (2,), "uint8"),
        Box(-1, 1, (3, 3, 3)),
        Box(-1, 1, (3, 3, 3), channels_first=True),
        Dict((("a", Discrete(3)), ("b", Box(-1, 1, (2,))))),
        Dict((("b", Box(-1, 1, (2,))), ("a", Discrete(3)))),
        Dict((("a", Discrete(3)), ("b", Box(-1, 3, (2,))))),
    ]


def test_spaces_are_equal_and_hash_alike_exactly_when_they_describe_the_same():
    left, right = make_spaces(), make_spaces()
    for i, one in enumerate(left):
        for j, other in enumerate(right):
            assert (one == other) == (i == j), (one, other)
        assert hash(one) == hash(right[i])
        assert one != "a space"
    assert len({*left, *right}) == len(left)


def test_equal_spaces_share_a_trace():
    traces = []

    def double(x, space):
        traces.append(space)
        return 2 * x

    jitted = jax.jit(double, static_argnums=1)
    for space in (*make_spaces(), *make_spaces()):
        jitted(1.0, space)
    assert traces == make_spaces()


@pytest.mark.parametrize(
    ("space", "shape"),
    [
        (Discrete(3), ()),
        (MultiDiscrete((2, 4)), (2,)),
        (MultiBinary(3), (3,)),
        (Box(0, 1, (2, 3)), (2, 3)),
    ],
)
def test_shapes(space, shape):
    assert space.shape == shape


def test_nvec():
    assert Discrete(5).nvec == (5,)
    assert MultiDiscrete((2, 4)).nvec == (2, 4)
    assert MultiBinary(3).nvec == (2, 2, 2)


def test_box_broadcasts_its_bounds_and_rounds_huge_ones_to_infinity():
    box = Box(np.float64(-1e308), np.array([1.0, 2.0]), (2,))
    np.testing.assert_array_equal(box.low, [-np.inf, -np.inf])
    np.testing.assert_array_equal(box.high, [1.0, 2.0])
    assert box.low.dtype == np.float32


@pytest.mark.parametrize(
    ("low", "high", "bounded"),
    [
        (-1, 1, True),
        (-np.inf, 1, False),
        ([-1, -1], [1, np.inf], False),
        (-np.finfo(np.float32).max, np.finfo(np.float32).max, False),
    ],
)
def test_box_is_bounded_where_every_bound_is(low, high, bounded):
    assert Box(low, high, (2,)).is_bounded is bounded


@pytest.mark.parametrize(("low", "high"), [(1, 0), (np.nan, 1), (0, np.nan), ([0, 2], [1, 1])])
def test_box_refuses_bounds_that_are_none(low, high):
    with pytest.raises(ValueError, match="low <= high"):
        Box(low, high, (2,))


ENCODINGS = [
    pytest.param(Discrete(3), 2, [0, 0, 1], id="Discrete"),
    pytest.param(MultiDiscrete((2, 3)), [1, 0], [0, 1, 1, 0, 0], id="MultiDiscrete"),
    pytest.param(MultiBinary(3), [1, 0, 1], [1, 0, 1], id="MultiBinary"),
    pytest.param(Box(-9, 9, (2,)), [1.5, -2.0], [1.5, -2.0], id="Box"),
    pytest.param(Box(-9, 9, (2,), "int32"), [1, -2], [1.0, -2.0], id="Box-int"),
    pytest.param(Box(-9, 9, (2, 2)), [[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 4.0]], id="Box-matrix"),
    pytest.param(
        IMAGE, np.array([[[0, 255]], [[51, 102]]], np.uint8), [[[0, 1.0]], [[0.2, 0.4]]], id="Box-uint8"
    ),
    pytest.param(
        MIXED,
        {
            "image": np.array([[[0, 255]], [[51, 102]]], np.uint8),
            "hand": 1,
            "speed": np.array([-0.5, 0.5], np.float32),
            "keys": np.array([0, 1]),
        },
        {"image": [[[0, 1.0]], [[0.2, 0.4]]], "hand": [0, 1, 0], "speed": [-0.5, 0.5], "keys": [0, 1]},
        id="Dict",
    ),
]


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
@pytest.mark.parametrize(("space", "observation", "expected"), ENCODINGS)
def test_encode(space, observation, expected, batch):
    batched, expected = (
        jax.tree.map(
            lambda leaf: np.broadcast_to(leaf, batch + np.shape(leaf)),
            tree,
            is_leaf=lambda leaf: isinstance(leaf, list),
        )
        for tree in (observation, expected)
    )
    encoded = spaces.encode(space, batched)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(encoded))
    assert spaces.encoded_size(space) * math.prod(batch) == numbers
    assert jax.tree.structure(encoded) == jax.tree.structure(expected)
    for actual, wanted in zip(jax.tree.leaves(encoded), jax.tree.leaves(expected), strict=True):
        assert actual.dtype == jnp.float32
        assert actual.shape == wanted.shape
        np.testing.assert_allclose(actual, wanted, rtol=1e-6)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_networks_see_the_channels_last(batch):
    image = np.random.default_rng(0).integers(0, 256, (*batch, 5, 6, 3), np.uint8)
    last = spaces.encode(Box(0, 255, (5, 6, 3), "uint8"), image)
    first = spaces.encode(Box(0, 255, (3, 5, 6), "uint8", channels_first=True), np.moveaxis(image, -1, -3))
    np.testing.assert_array_equal(first, last)


def test_only_images_have_channels():
    with pytest.raises(ValueError, match=r"channels_first=True is for images .* got shape=\(4, 4\)"):
        Box(0, 1, (4, 4), channels_first=True)


def test_encode_tells_the_rows_of_a_batch_apart(compiled):
    encoded = compiled(lambda x: spaces.encode(Discrete(3), x))(jnp.array([[0, 1], [2, 0]]))
    np.testing.assert_array_equal(encoded, [[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [1, 0, 0]]])


def test_dict_entries_are_found_by_name_whatever_their_order():
    space = Dict((("b", Discrete(2)), ("a", Box(0, 9, (1,)))))
    observation = {"a": jnp.array([7.0]), "b": jnp.int32(1), "unused": jnp.zeros(5)}
    encoded = spaces.encode(space, observation)
    assert set(encoded) == {"a", "b"}
    np.testing.assert_array_equal(encoded["a"], [7])
    np.testing.assert_array_equal(encoded["b"], [0, 1])


@pytest.mark.parametrize(
    ("space", "image"),
    [
        (Box(0, 1, (10, 10, 4)), True),
        (Box(0, 255, (3, 3, 1), "uint8"), True),
        (Box(0, 1, (2, 9, 9), channels_first=True), True),
        (Box(0, 1, (9, 2, 9), channels_first=True), False),
        (Box(0, 1, (2, 10, 4)), False),  # a 3x3 convolution would see nothing
        (Box(0, 1, (10, 10)), False),
        (Box(0, 1, (4,)), False),
        (Discrete(3), False),
        (MIXED, False),
    ],
)
def test_is_image(space, image):
    assert spaces.is_image(space) is image


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (gym_spaces.Discrete(5), Discrete(5)),
        (gym_spaces.MultiDiscrete([2, 3]), MultiDiscrete((2, 3))),
        (gym_spaces.MultiBinary(4), MultiBinary(4)),
        (gym_spaces.Box(-1, 2, (3,), np.float32), Box(-1, 2, (3,))),
        (gym_spaces.Box(np.array([-1.0, -np.inf]), np.array([1.0, 2.0]), dtype=np.float64), "float64"),
        (gym_spaces.Box(0, 255, (4, 5, 3), np.uint8), Box(0, 255, (4, 5, 3), "uint8")),
        (
            gym_spaces.Dict({"x": gym_spaces.Discrete(2), "y": gym_spaces.Box(0, 1, (1,), np.float32)}),
            Dict((("x", Discrete(2)), ("y", Box(0, 1, (1,))))),
        ),
        (gymnax_spaces.Discrete(5), Discrete(5)),
        (gymnax_spaces.Box(-1.0, 1.0, (3,), jnp.float32), Box(-1, 1, (3,))),
        (gymnax_spaces.Box(jnp.zeros(2), jnp.array([1.0, 4.0]), (2,)), Box(0, [1, 4], (2,))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_from_gymnasium(theirs, ours):
    if ours == "float64":
        ours = Box([-1, -np.inf], [1, 2], (2,), "float64")
    assert spaces.from_gymnasium(theirs) == ours


def test_samples_of_a_gymnasium_space_can_be_encoded():
    theirs = gym_spaces.Dict(
        {"x": gym_spaces.MultiDiscrete([2, 3]), "y": gym_spaces.Box(0, 255, (2, 2, 1), np.uint8)}, seed=0
    )
    encoded = spaces.encode(spaces.from_gymnasium(theirs), theirs.sample())
    assert {name: leaf.shape for name, leaf in encoded.items()} == {"x": (5,), "y": (2, 2, 1)}
    assert float(encoded["y"].max()) <= 1.0


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (gym_spaces.Discrete(3, start=1), r"Discrete\(start=1\) must start at 0"),
        (gym_spaces.MultiDiscrete([[2, 3], [4, 5]]), "one-dimensional"),
        (gym_spaces.MultiDiscrete([2, 3], start=[0, 1]), "start at 0"),
        (gym_spaces.MultiBinary([2, 2]), "one-dimensional"),
        (gym_spaces.Tuple([gym_spaces.Discrete(2)]), "Tuple spaces are not supported"),
        (gym_spaces.Text(3), "Text spaces are not supported"),
        (gym_spaces.Sequence(gym_spaces.Discrete(2)), "Sequence spaces are not supported"),
        (gym_spaces.Graph(gym_spaces.Discrete(2), None), "Graph spaces are not supported"),
        (gym_spaces.OneOf([gym_spaces.Discrete(2)]), "OneOf spaces are not supported"),
        (gym_spaces.Dict(a=gym_spaces.Dict(b=gym_spaces.Discrete(2))), "nested Dict.*'a'.*flatten"),
        (gym_spaces.Dict(a=gym_spaces.Text(3)), r"space\['a'\]: Text"),
        (gymnax_spaces.Tuple([gymnax_spaces.Discrete(2)]), "Tuple spaces are not supported"),
        ("CartPole-v1", "str spaces are not supported"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_from_gymnasium_refuses_what_no_policy_can_handle(theirs, message):
    with pytest.raises(NotImplementedError, match=message) as error:
        spaces.from_gymnasium(theirs, "observation space" if "space\\[" not in message else "space")
    assert "space" in str(error.value)


def test_nested_dicts_are_refused_at_once():
    with pytest.raises(NotImplementedError, match="nested Dict"):
        Dict((("outer", Dict((("inner", Discrete(2)),))),))


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1", "Acrobot-v1"])
def test_spaces_of_gymnasium_environments(env_id):
    env = gymnasium.make(env_id)
    observation, _ = env.reset(seed=0)
    space = spaces.from_gymnasium(env.observation_space)
    encoded = spaces.encode(space, observation)
    assert encoded.shape == ((space.n,) if isinstance(space, Discrete) else space.shape)
    assert spaces.from_gymnasium(env.action_space).shape == env.action_space.shape
    env.close()


def test_the_bounds_of_an_image_do_not_fill_the_screen():
    assert repr(IMAGE) == "Box(low=0.0, high=255.0, shape=(2, 1, 2), dtype='uint8')"
    assert repr(Box([-1, -2], 3, (2,))) == "Box(low=[-1.0, -2.0], high=3.0, shape=(2,), dtype='float32')"
    assert repr(Box(0, 1, (1, 3, 3), channels_first=True)).endswith("dtype='float32', channels_first=True)")
    assert len(repr(Box(0, 255, (84, 84, 4), "uint8"))) < 100


class OddBox(gymnasium.spaces.Box):
    pass


class OddDiscrete(gymnasium.spaces.Discrete):
    pass


class OddMultiDiscrete(gymnasium.spaces.MultiDiscrete):
    pass


class OddMultiBinary(gymnasium.spaces.MultiBinary):
    pass


class OddDict(gymnasium.spaces.Dict):
    pass


class OddTuple(gymnasium.spaces.Tuple):
    pass


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (OddBox(-1, 1, (2,)), Box(-1, 1, (2,))),
        (OddDiscrete(3), Discrete(3)),
        (OddMultiDiscrete([2, 3]), MultiDiscrete((2, 3))),
        (OddMultiBinary(4), MultiBinary(4)),
        (OddDict(a=OddDiscrete(2)), Dict((("a", Discrete(2)),))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_subclasses_are_the_spaces_that_they_derive_from(space, expected):
    assert spaces.from_gymnasium(space) == expected


def test_a_subclass_of_what_is_not_supported_is_refused():
    with pytest.raises(NotImplementedError, match="observations: OddTuple spaces are not supported"):
        spaces.from_gymnasium(OddTuple((OddDiscrete(2),)), "observations")


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4, 4)])
def test_a_space_without_numbers_is_refused_by_name(shape):
    empty = gymnasium.spaces.Box(-1, 1, shape)
    with pytest.raises(NotImplementedError, match=r"action_space: .*holds no numbers: shape="):
        spaces.from_gymnasium(empty, "action_space")
    with pytest.raises(NotImplementedError, match=r"observations\['x'\]: .*holds no numbers"):
        spaces.from_gymnasium(gymnasium.spaces.Dict(x=empty), "observations")
    with pytest.raises(NotImplementedError, match="observations: .*has no entries"):
        spaces.from_gymnasium(gymnasium.spaces.Dict(), "observations")
