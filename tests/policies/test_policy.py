from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import GRPOConfig, make_policy, spaces
from grpo_jax.policies.distributions import Categorical, Gaussian
from grpo_jax.policies.networks import CNN, Combined, Flatten

VECTOR = spaces.Box(-5, 5, (3,))
MAP = spaces.Box(0, 1, (10, 10, 4))
MIXED = spaces.Dict((("map", MAP), ("hand", spaces.Discrete(3)), ("x", VECTOR)))
SMALL = GRPOConfig(net_arch=(8,))


def policy_of(observation_space=VECTOR, action_space=None, config=SMALL, **changes):
    return make_policy(config.replace(**changes), observation_space, action_space or spaces.Discrete(3))


def init(policy, key):
    """A policy's state with made-up parameters, which takes no compiling."""
    shapes = jax.eval_shape(policy.init, key)
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) * np.float32(0.3)
    nothing_seen = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes.statistics)
    return shapes.replace(params=jax.tree.map(draw, shapes.params), statistics=nothing_seen)


@pytest.mark.parametrize("bootstrap", [False, True])
def test_there_is_a_critic_only_with_bootstrap(bootstrap, key):
    policy = policy_of(bootstrap=bootstrap)
    state = init(policy, key)
    assert set(state.params) == ({"actor", "critic"} if bootstrap else {"actor"})
    assert (policy.critic is not None) == bootstrap
    if bootstrap:
        assert policy.value(state, jnp.ones((4, 2, 3))).shape == (4, 2)
    else:
        with pytest.raises(AssertionError, match="no critic: bootstrap=False"):
            policy.value(state, jnp.ones(3))


def test_the_critic_can_have_layers_of_its_own(key):
    policy = policy_of(bootstrap=True, critic_net_arch=(16, 4))
    params = init(policy, key).params
    assert params["actor"]["MLP_0"]["Dense_0"]["kernel"].shape == (3, 8)
    assert params["critic"]["MLP_0"]["Dense_0"]["kernel"].shape == (3, 16)
    assert params["critic"]["output"]["kernel"].shape == (4, 1)


def test_actor_and_critic_start_differently(key):
    params = jax.jit(policy_of(bootstrap=True).init)(key).params
    kernels = [params[name]["MLP_0"]["Dense_0"]["kernel"] for name in ("actor", "critic")]
    assert not np.allclose(*kernels, atol=1e-3)


@pytest.mark.parametrize(
    ("action_space", "distribution", "n_parameters"),
    [
        (spaces.Discrete(3), Categorical((3,), ()), 3),
        (spaces.MultiDiscrete((2, 4)), Categorical((2, 4), (2,)), 6),
        (spaces.MultiBinary(3), Categorical((2, 2, 2), (3,)), 6),
        (spaces.Box(-1, 1, (2,)), Gaussian((2,)), 4),
        (spaces.Box(-1, 1, (2, 2)), Gaussian((2, 2)), 8),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_action_of_every_space(action_space, distribution, n_parameters, key):
    policy = policy_of(action_space=action_space)
    assert policy.distribution == distribution

    @jax.jit
    def act(state, observation, uniforms):
        parameters = policy.parameters(state, observation)
        action = policy.distribution.sample(parameters, uniforms)
        return parameters, action, policy.to_world(action)

    uniforms = jnp.full((5, distribution.n_uniforms), 0.3)
    parameters, *actions = act(init(policy, key), jnp.ones((5, 3)), uniforms)
    assert parameters.shape == (5, n_parameters)
    for action in actions:
        assert action.shape == (5, *action_space.shape)


@pytest.mark.parametrize(
    ("observation_space", "observation"),
    [
        (spaces.Discrete(4), jnp.arange(4)),
        (spaces.MultiDiscrete((2, 3)), jnp.array([[0, 2], [1, 0]])),
        (spaces.MultiBinary(3), jnp.array([[0, 1, 1], [1, 0, 0]])),
        (spaces.Box(0, 1, ()), jnp.array([0.2, 0.4])),
        (spaces.Box(0, 1, (2, 2)), jnp.linspace(0, 1, 12).reshape(3, 2, 2)),
        (spaces.Box(0, 1, (4, 5, 1)), jnp.linspace(0, 1, 40).reshape(2, 4, 5, 1)),
        (
            spaces.Dict((("map", spaces.Box(0, 255, (4, 4, 1), "uint8")), ("hand", spaces.Discrete(3)))),
            {"map": jnp.arange(32, dtype=jnp.uint8).reshape(2, 4, 4, 1), "hand": jnp.array([0, 2])},
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_observations_of_every_space(observation_space, observation, key):
    policy = policy_of(observation_space, bootstrap=True, normalize_observations=True)

    @jax.jit
    def outputs(state, observation):
        state = policy.update_statistics(state, observation)
        return policy.parameters(state, observation), policy.value(state, observation)

    n = len(jax.tree.leaves(observation)[0])
    parameters, values = outputs(init(policy, key), observation)
    assert (parameters.shape, values.shape) == ((n, 3), (n,))
    assert np.all(np.isfinite(parameters))
    # Different observations are told apart.
    assert len(np.unique(values)) == n


@pytest.mark.parametrize(("bootstrap", "normalize"), [(False, False), (True, True)])
def test_a_dict_of_one_vector_is_the_vector_bit_for_bit(bootstrap, normalize, key):
    changes = {"bootstrap": bootstrap, "normalize_observations": normalize}
    flat, named = policy_of(VECTOR, **changes), policy_of(spaces.Dict((("x", VECTOR),)), **changes)
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    outputs = []
    for policy, observation in ((flat, x), (named, {"x": x})):

        def loss(params, state, policy=policy, observation=observation):
            state = state.replace(params=params)
            total = jnp.sum(policy.parameters(state, observation) ** 2)
            return total + jnp.sum(policy.value(state, observation) ** 2) if bootstrap else total

        @jax.jit
        def learn(key, policy=policy, observation=observation, loss=loss):
            state = policy.update_statistics(policy.init(key), observation)
            return state, jax.grad(loss)(state.params, state)

        outputs.append(learn(key))
    (left, left_gradient), (right, right_gradient) = outputs
    jax.tree.map(np.testing.assert_array_equal, left.params, right.params)
    jax.tree.map(np.testing.assert_array_equal, left_gradient, right_gradient)
    if normalize:
        np.testing.assert_array_equal(left.statistics.mean, right.statistics.mean["x"])
        np.testing.assert_array_equal(left.statistics.variance, right.statistics.variance["x"])


def test_the_draws_of_an_mlp_stay_what_they_were(key):
    # Measured numbers hang on them: recorded before features extractors were told apart from heads.
    without, with_critic = (jax.jit(policy_of(bootstrap=b).init)(key).params for b in (False, True))
    expected = [
        [0.2512524, -0.3593455, 0.8242842],
        [-0.7775928, 0.3429922, -0.1767505],
        [0.0981238, -0.7224038, 0.2632031],
    ]
    for params, name in ((without, "actor"), (with_critic, "actor"), (with_critic, "critic")):
        kernel = np.asarray(params[name]["MLP_0"]["Dense_0"]["kernel"])
        np.testing.assert_allclose(kernel[0, :3], expected.pop(0), rtol=1e-5)


@pytest.mark.parametrize(
    ("low", "high", "action", "expected"),
    [
        ([-2.0, 0.0], [2.0, 10.0], [0.0, 0.0], [0.0, 5.0]),
        ([-2.0, 0.0], [2.0, 10.0], [-1.0, 1.0], [-2.0, 10.0]),
        ([-2.0, 0.0], [2.0, 10.0], [0.5, -0.5], [1.0, 2.5]),
        ([-2.0, 0.0], [2.0, 10.0], [-7.0, 7.0], [-2.0, 10.0]),
        ([-np.inf, -np.inf], [np.inf, np.inf], [3.0, -50.0], [3.0, -50.0]),
        ([-np.inf, -1.0], [2.0, np.inf], [3.0, -50.0], [2.0, -1.0]),
    ],
)
def test_a_gaussian_is_stretched_to_the_bounds_and_clipped(low, high, action, expected, compiled):
    policy = policy_of(action_space=spaces.Box(low, high, (2,)))
    np.testing.assert_allclose(compiled(policy.to_world)(jnp.array(action)), expected, rtol=1e-6)


def test_discrete_actions_go_to_the_world_as_they_are():
    action = jnp.array([2, 0, 1])
    np.testing.assert_array_equal(policy_of().to_world(action), action)


def test_masked_actions_have_no_probability(key, compiled):
    policy = policy_of()
    state = init(policy, key)
    observations = jnp.ones((2, 3))
    mask = jnp.array([[True, False, True], [False, True, False]])
    logits = compiled(policy.parameters)(state, observations, mask)
    probabilities = jax.nn.softmax(logits)
    np.testing.assert_array_equal(probabilities[0, 1], 0.0)
    np.testing.assert_array_equal(probabilities[1], [0.0, 1.0, 0.0])
    free = policy.parameters(state, observations)
    np.testing.assert_allclose(logits[mask], free[mask], rtol=1e-5)
    np.testing.assert_array_equal(policy.parameters(state, observations, None), free)


@pytest.mark.parametrize(
    ("observation_space", "network", "extractor"),
    [
        (VECTOR, "auto", Flatten(1)),
        (VECTOR, "mlp", Flatten(1)),
        (MAP, "auto", CNN("tanh")),
        (MAP, "cnn", CNN("tanh")),
        (MAP, "mlp", Flatten(3)),
        (spaces.Box(0, 1, (4, 10, 10), channels_first=True), "auto", CNN("tanh")),
        (spaces.Box(0, 1, (2, 10, 4)), "auto", Flatten(3)),
        (spaces.Box(0, 1, (10, 10)), "auto", Flatten(2)),
        (MIXED, "auto", Combined((("map", 3), ("hand", 1), ("x", 1)), ("map",), "tanh")),
        (MIXED, "mlp", Combined((("map", 3), ("hand", 1), ("x", 1)), (), "tanh")),
    ],
)
def test_the_network_that_fits(observation_space, network, extractor, key):
    policy = policy_of(observation_space, network=network, bootstrap=True)
    assert policy.features_extractor == extractor
    params = jax.eval_shape(policy.init, key).params
    learned = isinstance(extractor, CNN) or bool(getattr(extractor, "images", ()))
    heads = {"actor", "critic"}
    assert set(params) == (heads | {"features_extractor", "critic_features_extractor"} if learned else heads)
    if learned:
        assert jax.tree.structure(params["features_extractor"]) == jax.tree.structure(
            params["critic_features_extractor"]
        )


@pytest.mark.parametrize(
    "observation_space",
    [
        VECTOR,
        spaces.Discrete(3),
        spaces.Box(0, 1, (2, 2, 3)),
        spaces.Dict((("x", spaces.Box(0, 1, (9, 9, 1))),)),
    ],
    ids=["vector", "Discrete", "tiny", "Dict"],
)
def test_convolutions_need_feature_maps(observation_space):
    with pytest.raises(ValueError, match=r"network='cnn' needs .* use network='mlp' or 'auto'"):
        policy_of(observation_space, network="cnn")


@pytest.mark.parametrize(
    ("shape", "net_arch", "widths"),
    [((3,), None, (64, 64)), ((10, 10, 4), None, ()), ((3,), (), ()), ((10, 10, 4), (32,), (32,))],
)
def test_default_layers(shape, net_arch, widths):
    policy = make_policy(GRPOConfig(net_arch=net_arch), spaces.Box(0, 1, shape), spaces.Discrete(2))
    assert policy.actor.widths == widths


def test_statistics_are_kept_only_on_request(key):
    batch = jnp.array([[1.0, 0.0, -4.0], [3.0, 0.0, 0.0]])
    without = policy_of()
    state = init(without, key)
    assert state.statistics is None
    assert without.update_statistics(state, batch) is state

    policy = policy_of(normalize_observations=True)
    state = policy.update_statistics(init(policy, key), batch)
    np.testing.assert_allclose(state.statistics.mean, [2.0, 0.0, -2.0])
    # One standard deviation above the mean in the first and last coordinate.
    normalized = policy.parameters(state, jnp.array([3.0, 0.0, 0.0]))
    plain = without.parameters(state.replace(statistics=None), jnp.array([1.0, 0.0, 1.0]))
    np.testing.assert_allclose(normalized, plain, rtol=1e-4, atol=1e-6)


def test_log_std_init_reaches_the_distribution(key):
    policy = policy_of(action_space=spaces.Box(-1, 1, (2,)), log_std_init=-1.0)
    parameters = policy.parameters(jax.jit(policy.init)(key), jnp.ones(3))
    np.testing.assert_array_equal(parameters[2:], [-1.0, -1.0])


def test_equal_policies_share_a_trace(key):
    traces = []

    def parameters(policy, state, x):
        traces.append(policy)
        return policy.parameters(state, x)

    jitted = jax.jit(parameters, static_argnums=0)
    for _ in range(2):
        policy = policy_of(spaces.Box(-5, 5, (3,)))
        jitted(policy, init(policy, key), jnp.ones(3))
    assert len(traces) == 1
    assert policy_of() != policy_of(activation="relu")
