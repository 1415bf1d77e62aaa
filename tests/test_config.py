from __future__ import annotations

import dataclasses
import fractions
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import GRPOConfig
from grpo_jax.config import field_names, scheduled


def test_the_json_round_trip_keeps_every_field():
    config = GRPOConfig(
        n_envs=4,
        n_steps=10,
        batch_size=20,
        candidates="sample",
        horizon=7,
        bootstrap=True,
        net_arch=[32, 16],
        critic_net_arch=(),
        learning_rate=1e-3,
        learning_rate_decay="cosine",
        kl_coef=0.1,
        clip_range_high=0.28,
        target_kl=None,
    )
    assert config.net_arch == (32, 16)
    assert GRPOConfig.from_json(config.to_json()) == config
    written = json.loads(config.to_json())
    assert set(written) == {field.name for field in dataclasses.fields(GRPOConfig)}
    assert (written["horizon"], written["kl_coef"], written["target_kl"]) == (7, 0.1, None)


def test_json_fields_that_are_missing_keep_their_defaults():
    assert GRPOConfig.from_json('{"horizon": 3}') == GRPOConfig(horizon=3)


@pytest.mark.parametrize(
    "value", [optax.constant_schedule(1e-3), jnp.float32(1e-3)], ids=["schedule", "array"]
)
def test_json_cannot_hold_schedules_and_arrays(value):
    with pytest.raises(TypeError, match=r"learning_rate=.*learning_rate_decay"):
        GRPOConfig(learning_rate=value).to_json()


def test_json_is_validated():
    with pytest.raises(ValueError, match="horizon=0"):
        GRPOConfig.from_json('{"horizon": 0}')
    with pytest.raises(TypeError, match="n_step"):
        GRPOConfig.from_json('{"n_step": 8}')


# Of each mistake: what the message says of the value, and what it says of the way out.
MISTAKES = [
    ({"horizon": 0}, "horizon=0", "at least 1"),
    ({"horizon": 0}, "horizon=0", "steps until an action shows its consequence"),
    ({"horizon": 2.5}, "horizon=2.5", "integer"),
    ({"horizon": True}, "horizon=True", "integer"),
    ({"group_size": 1}, "group_size=1", "use 4 to 16"),
    ({"n_envs": 0}, "n_envs=0", "at least 1"),
    ({"n_steps": -3}, "n_steps=-3", "at least 1"),
    ({"n_epochs": 0}, "n_epochs=0", "at least 1"),
    ({"n_rollouts": 0}, "n_rollouts=0", "at least 1"),
    ({"max_enumerated": 1}, "max_enumerated=1", "at least 2"),
    ({"max_branches": -1}, "max_branches=-1", "at least 0"),
    ({"reference_interval": 0}, "reference_interval=0", "at least 1"),
    ({"batch_size": 0}, "batch_size=0", "at least 1"),
    ({"candidates": "all"}, "candidates='all'", "auto, enumerate, sample, trajectory, episodes"),
    ({"trajectory_form": "both"}, "trajectory_form='both'", "outcome, process"),
    ({"backup": "min"}, "backup='min'", "mean, max"),
    ({"baseline": "median"}, "baseline='median'", "policy, mean, leave_one_out, executed, shrinkage"),
    ({"advantage_scale": None}, "advantage_scale=None", "none, group, batch"),
    ({"surrogate": "PPO"}, "surrogate='PPO'", "ppo, cispo, sapo, tpo"),
    ({"kl_estimator": "k4"}, "kl_estimator='k4'", "exact, k1, k2, k3"),
    ({"reference": "none"}, "reference='none'", "fixed, periodic, ema"),
    ({"network": "rnn"}, "network='rnn'", "auto, mlp, cnn"),
    ({"activation": ["relu"]}, "activation=['relu']", "tanh, relu"),
    ({"learning_rate_decay": "exponential"}, "learning_rate_decay='exponential'", "none, linear, cosine"),
    ({"persistence": 1.5}, "persistence=1.5", "between 0 and 1"),
    ({"ent_coef_decay": None}, "ent_coef_decay=None", "none, linear, cosine"),
    ({"clip_range_decay": True}, "clip_range_decay=True", "none, linear, cosine"),
    ({"gamma": -0.1}, "gamma=-0.1", "between 0 and 1"),
    ({"gamma": 1.01}, "gamma=1.01", "between 0 and 1"),
    ({"gae_lambda": 2}, "gae_lambda=2", "between 0 and 1"),
    ({"learning_rate": float("nan")}, "learning_rate=nan", "finite"),
    ({"learning_rate": float("inf")}, "learning_rate=inf", "finite"),
    ({"learning_rate": -1e-3}, "learning_rate=-0.001", "between 0"),
    ({"ent_coef": float("inf")}, "ent_coef=inf", "finite"),
    ({"clip_range": -0.2}, "clip_range=-0.2", "between 0"),
    ({"clip_range_high": -0.2}, "clip_range_high=-0.2", "between 0"),
    ({"clip_range_vf": -1.0}, "clip_range_vf=-1.0", "between 0"),
    ({"dual_clip": 0.5}, "dual_clip=0.5", "between 1"),
    ({"kl_coef": -1}, "kl_coef=-1", "between 0"),
    ({"target_kl": 0.0}, "target_kl=0.0", "between 1e-12"),
    ({"max_grad_norm": 0}, "max_grad_norm=0", "between 1e-12"),
    ({"sapo_temperature": 0}, "sapo_temperature=0", "between 1e-06"),
    ({"sapo_temperature_negative": 0}, "sapo_temperature_negative=0", "between 1e-06"),
    ({"tpo_temperature": 0}, "tpo_temperature=0", "between 1e-06"),
    ({"reference_decay": 1.5}, "reference_decay=1.5", "between 0 and 1"),
    ({"spread_floor": -1}, "spread_floor=-1", "between 0"),
    ({"vf_coef": -1}, "vf_coef=-1", "between 0"),
    ({"log_std_init": 3.0}, "log_std_init=3.0", "between -20 and 2"),
    ({"net_arch": (64, 0)}, "net_arch=(64, 0)", "such as (64, 64)"),
    ({"net_arch": 64}, "net_arch=64", "such as (64, 64)"),
    ({"net_arch": "64"}, "net_arch='64'", "such as (64, 64)"),
    ({"critic_net_arch": [64.5]}, "critic_net_arch=[64.5]", "such as (64, 64)"),
    (
        {"candidates": "trajectory", "group_size": 5},
        "n_envs=16 must be a multiple of group_size=5",
        "group_size environments from one reset",
    ),
    (
        {"candidates": "trajectory", "bootstrap": True},
        "bootstrap=True",
        "use bootstrap=False, or candidates='enumerate', 'sample' or 'episodes'",
    ),
    (
        {"candidates": "trajectory", "baseline": "executed"},
        "baseline='executed'",
        "use 'mean' or 'leave_one_out'",
    ),
]


@pytest.mark.parametrize(
    ("changes", "value", "fix"), MISTAKES, ids=[str(changes) for changes, *_ in MISTAKES]
)
def test_a_wrong_value_is_named_with_the_way_out(changes, value, fix):
    for build in (lambda: GRPOConfig(**changes), lambda: GRPOConfig().replace(**changes)):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            build()
        assert value in str(error.value)
        assert fix in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": "3e-4"}, "learning_rate='3e-4' must be a number"),
        ({"learning_rate": None}, "learning_rate=None must be a number"),
        ({"gamma": None}, "gamma=None must be a number"),
        ({"gamma": [0.9, 0.99]}, r"gamma=\[0.9, 0.99\] must be a number"),
        (
            {"gamma": lambda step: 0.9},
            "schedules are for learning_rate, clip_range, clip_range_high, ent_coef, persistence",
        ),
        ({"bootstrap": "False"}, "bootstrap='False' must be True or False"),
        ({"common_random_numbers": 1}, "common_random_numbers=1 must be True or False"),
        ({"normalize_observations": None}, "normalize_observations=None must be True or False"),
    ],
)
def test_a_value_of_a_wrong_type_is_named(changes, message):
    with pytest.raises(TypeError, match=message):
        GRPOConfig(**changes)


def test_replace_names_the_fields_that_there_are():
    with pytest.raises(TypeError, match=r"no field lr, n_step; it has .*learning_rate"):
        GRPOConfig().replace(lr=1e-3, n_step=4)


def test_replace_keeps_the_rest():
    config = GRPOConfig(horizon=3, gamma=0.5)
    changed = config.replace(gamma=0.9)
    assert (changed.horizon, changed.gamma) == (3, 0.9)
    assert config.gamma == 0.5


def test_sizes():
    config = GRPOConfig(n_envs=6, n_steps=10, batch_size=15, n_epochs=3)
    assert (config.n_states, config.n_minibatches, config.n_updates) == (60, 4, 12)


TRACED = {
    "learning_rate",
    "gamma",
    "gae_lambda",
    "clip_range",
    "clip_range_high",
    "dual_clip",
    "sapo_temperature",
    "sapo_temperature_negative",
    "tpo_temperature",
    "ent_coef",
    "vf_coef",
    "clip_range_vf",
    "persistence",
    "kl_coef",
    "reference_decay",
    "target_kl",
    "max_grad_norm",
    "spread_floor",
}


@pytest.mark.parametrize(
    "changes", [{"candidates": "episodes"}, {"candidates": "trajectory"}, {"baseline": "executed"}]
)
def test_persistence_needs_candidates_beside_the_executed_action(changes):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f"persistence=0.5 cannot be used with {name}={value!r}"):
        GRPOConfig(persistence=0.5, **changes)


def test_traced_and_static_fields_are_told_apart():
    assert set(field_names(traced=True)) == TRACED
    names = {field.name for field in dataclasses.fields(GRPOConfig)}
    assert set(field_names()) == names
    assert set(field_names(traced=False)) == names - TRACED


def test_the_leaves_of_a_config_are_its_traced_numbers():
    config = GRPOConfig(learning_rate=0.125, gamma=0.75, kl_coef=None)
    leaves, structure = jax.tree.flatten(config)
    assert all(isinstance(leaf, float) for leaf in leaves)
    assert {0.125, 0.75} < set(leaves)
    unset = {"clip_range_high", "dual_clip", "clip_range_vf", "persistence", "kl_coef", "target_kl"}
    assert len(leaves) == len(TRACED - unset)
    assert jax.tree.unflatten(structure, leaves) == config
    doubled = jax.tree.map(lambda leaf: 2 * leaf, config)
    assert (doubled.learning_rate, doubled.horizon, doubled.kl_coef) == (0.25, config.horizon, None)


def test_schedules_are_static():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    config = GRPOConfig(learning_rate=schedule)
    assert len(jax.tree.leaves(config)) == len(jax.tree.leaves(GRPOConfig())) - 1
    assert jax.tree.map(lambda leaf: leaf + 1, config).learning_rate is schedule


def traced_discount():
    """A compiled function of a config that may be traced once."""
    chex.clear_trace_counter()
    return jax.jit(
        chex.assert_max_traces(lambda config: config.gamma**config.horizon + config.learning_rate, n=1)
    )


def test_equal_configs_share_a_trace():
    assert GRPOConfig() == GRPOConfig()
    assert hash(GRPOConfig()) == hash(GRPOConfig())
    discount = traced_discount()
    assert discount(GRPOConfig(horizon=2)) == discount(GRPOConfig(horizon=2))


def test_changing_a_traced_field_compiles_nothing_anew():
    discount = traced_discount()
    values = [
        float(discount(GRPOConfig(horizon=2, gamma=gamma, learning_rate=rate)))
        for gamma, rate in ((0.5, 0.0), (0.5, 0.125), (0.25, 0.125))
    ]
    assert values == [0.25, 0.375, 0.1875]


@pytest.mark.parametrize(
    "changes", [{"horizon": 3}, {"kl_coef": 0.1}, {"learning_rate": lambda step: 1e-3}], ids=list
)
def test_changing_the_structure_traces_anew(changes):
    traces = []
    gamma = jax.jit(lambda config: (traces.append(1), config.gamma)[1])
    gamma(GRPOConfig())
    gamma(GRPOConfig().replace(**changes))
    gamma(GRPOConfig().replace(**changes))
    assert len(traces) == 2


def test_vmap_over_a_traced_field():
    rates = jnp.array([1e-3, 2e-3])
    doubled = jax.vmap(lambda rate: GRPOConfig().replace(learning_rate=rate).learning_rate * 2)(rates)
    np.testing.assert_allclose(doubled, [2e-3, 4e-3])
    stacked = GRPOConfig().replace(gamma=jnp.array([0.5, 0.25]))
    axes = jax.tree.map(lambda leaf: 0 if np.ndim(leaf) else None, stacked)
    squares = jax.vmap(lambda config: config.gamma**2, in_axes=(axes,))(stacked)
    np.testing.assert_allclose(squares, [0.25, 0.0625])


@pytest.mark.parametrize(
    ("decay", "expected"),
    [("none", [2.0, 2.0, 2.0]), ("linear", [2.0, 1.5, 0.0]), ("cosine", [2.0, 1.7071068, 0.0])],
)
def test_decay(decay, expected):
    values = [scheduled(2.0, decay, 0, jnp.float32(progress)) for progress in (0.0, 0.25, 1.0)]
    np.testing.assert_allclose(values, expected, atol=1e-6)


def test_a_schedule_is_asked_for_the_optimizer_steps():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    np.testing.assert_allclose(scheduled(schedule, "none", 4, 0.9), 0.6, rtol=1e-6)
    np.testing.assert_allclose(scheduled(schedule, "linear", 4, 0.5), 0.3, rtol=1e-6)


SIZES, RATES = ("n_steps", "horizon", "branch_every", "max_branches"), ("gamma", "clip_range", "kl_coef")
SWITCHES = ("bootstrap", "common_random_numbers", "share_features_extractor")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("kind", [int, np.int8, np.uint64, np.array, jnp.int32], ids=str)
def test_any_integer_is_an_int(name, kind):
    value = getattr(GRPOConfig(**{name: kind(4)}), name)
    assert (type(value), value) == (int, 4)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    "value",
    [True, np.True_, 1.5, 4.0, np.float32(4), np.array([4]), "4", None, float("nan"), 4j, -1],
    ids=repr,
)
def test_what_is_no_integer_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name}=.* must be an integer of at least"):
        GRPOConfig(**{name: value})


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("kind", [float, np.float16, np.float64, np.array, fractions.Fraction], ids=str)
def test_any_real_number_is_a_float(name, kind):
    value = getattr(GRPOConfig(**{name: kind(0.5)}), name)
    assert (type(value), value) == (float, 0.5)


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize(
    "value",
    [True, np.False_, "0.5", [0.5], {}, object(), 0.5j, np.array("a"), np.array([True]), jnp.array(True)],
)
def test_what_is_no_number_is_refused(name, value):
    with pytest.raises(TypeError, match=rf"{name}=.* must be a number"):
        GRPOConfig(**{name: value})


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("number", [np.nan, np.inf, -1.0, -np.inf], ids=repr)
@pytest.mark.parametrize(
    "kind", [lambda x: x, np.array, lambda x: np.array([0.5, x]), jnp.array, lambda x: jnp.array([x, 0.5])]
)
def test_numbers_out_of_bounds_are_refused_in_arrays_too(name, number, kind):
    with pytest.raises(ValueError, match=rf"{name}=.* must be finite and between 0 and"):
        GRPOConfig(**{name: kind(number)})


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_are_booleans(name):
    for value in (True, np.True_):
        assert getattr(GRPOConfig(**{name: value}), name) is True
    for value in (1, 0, "no", "True", None, 1.0, np.array([True])):
        with pytest.raises(TypeError, match=rf"{name}=.* must be True or False"):
            GRPOConfig(**{name: value})


@pytest.mark.parametrize("widths", [(True, 64), (64, 0), (64, np.nan), ("64",), (8.0,)])
def test_layers_have_whole_sizes(widths):
    with pytest.raises(ValueError, match="net_arch=.* must hold positive layer sizes"):
        GRPOConfig(net_arch=widths)
    assert GRPOConfig(net_arch=[np.int64(8), np.array(4)]).net_arch == (8, 4)


def test_an_integer_beyond_floats_is_not_finite():
    with pytest.raises(ValueError, match="ent_coef=inf must be finite"):
        GRPOConfig(ent_coef=10**400)
