"""The door to other suites, without any of them: what is refused, and a suite made here."""

from __future__ import annotations

import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import grpo_jax
from grpo_jax import spaces
from grpo_jax.cli import main
from grpo_jax.noise import as_key
from grpo_jax.types import Step
from grpo_jax.worlds import gymnax
from grpo_jax.worlds.base import World, check_world
from grpo_jax.worlds.brax import wrap
from grpo_jax.worlds.make import SUITES
from grpo_jax.worlds.suites import fresh_key, making, once, one_hot

PACKAGES = {"playground": "mujoco_playground", "brax": "brax.envs", "craftax": "craftax.craftax_env"}


@struct.dataclass
class Walk(World):
    """Steps left and right; a state also holds an empty array, as MJX' do, and a key of its own."""

    size: int = struct.field(pytree_node=False, default=5)
    observation_space = spaces.Box(np.float32(-9), np.float32(9), (1,))
    action_space = spaces.Discrete(2)

    def reset(self, key):
        state = {"x": jnp.float32(0), "nothing": jnp.zeros((0, 3)), "key": key}
        return state["x"][None], state

    def step(self, key, state, action):
        x = state["x"] + 2.0 * action - 1
        state = {**state, "x": x, "key": fresh_key(state["key"], key)}
        return Step(x[None], state, x, jnp.abs(x) >= self.size, jnp.bool_(False))


@pytest.fixture
def walks(monkeypatch):
    """A suite of one environment, called brax."""
    suite = types.SimpleNamespace(ids=lambda: ("walk",), from_id=lambda name, *, size=5: Walk(size))
    monkeypatch.setitem(sys.modules, "grpo_jax.worlds.brax", suite)


def test_each_suite_has_a_module_and_an_extra():
    import tomllib
    from pathlib import Path

    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for suite in SUITES:
        assert importlib.util.find_spec(f"grpo_jax.worlds.{suite}") is not None
        assert len(extras["optional-dependencies"][suite]) == 1
    assert "all" not in extras["optional-dependencies"]  # not all can be installed together for ever


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_that_is_absent_says_what_to_install(suite, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES.get(suite, suite), None)  # import raises ModuleNotFoundError
    with pytest.raises(ImportError, match=rf"env='{suite}/\.\.\.' needs .*'grpo-jax\[{suite}\]'"):
        grpo_jax.make(f"{suite}/something")
    with pytest.raises(ImportError, match=rf"grpo-jax\[{suite}\]"):
        grpo_jax.env_ids(suite)


def test_a_suite_that_cannot_be_imported_says_why(monkeypatch, tmp_path):
    (tmp_path / "pgx.py").write_text("import a_module_that_there_is_not")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pgx", raising=False)
    with pytest.raises(ImportError, match="cannot be imported .No module named 'a_module_that_there_is_not'"):
        grpo_jax.make("pgx/go_9x9")


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        (
            ("atari/Pong",),
            {},
            ValueError,
            "env='atari/Pong': there is no suite 'atari'; there are gymnax, brax",
        ),
        (("brax/walk2d",), {}, ValueError, "env='brax/walk2d' is not an id of brax; did you mean brax/walk?"),
        (("brax/zzz",), {}, ValueError, "known ids: walk"),
        (("brax/walk",), {"sise": 3}, TypeError, "env='brax/walk': .*'sise'; besides an id it takes: size"),
        (("brax/walk", {"size": 3}), {}, TypeError, "'params'; besides an id it takes: size"),
        (("CartPole-v1",), {"backend": "spring"}, TypeError, "backend: only environments of other suites"),
        ((Walk(),), {"size": 3}, TypeError, "size: only environments of other suites"),
    ],
)
def test_what_is_refused(walks, arguments, options, kind, message):
    with pytest.raises(kind, match=message):
        grpo_jax.make(*arguments, **options)


def test_options_reach_the_suite(walks):
    assert grpo_jax.make("brax/walk") == Walk(5)
    assert grpo_jax.make("brax/walk", size=2) == Walk(2)
    assert grpo_jax.env_ids("brax") == ["brax/walk"]
    paid = grpo_jax.make("brax/walk", reward_function=lambda state, action, next_state: next_state[0] * 10)
    _, state = paid.reset(as_key(jax.random.key(0)))
    assert float(paid.step(as_key(jax.random.key(1)), state, jnp.int32(1)).reward) == 10


class Robot(struct.PyTreeNode):
    """A state of Brax' kind."""

    obs: dict
    info: dict
    reward: jax.Array
    done: jax.Array


class RobotEnv:
    """Brax' interface: it writes into the dict that it is given, draws from it, and ends never."""

    action_size = 2

    def reset(self, key):
        return Robot(
            self.see(jnp.zeros(3)), {"rng": jax.random.key_data(key)}, jnp.float32(0), jnp.float32(0)
        )

    def see(self, x):
        return {"state": x, "privileged_state": jnp.concatenate([x, x])}

    def step(self, state, action):
        noise_key, state.info["rng"] = jax.random.split(jax.random.wrap_key_data(state.info["rng"]))
        state.info["rng"] = jax.random.key_data(state.info["rng"])
        return state.replace(obs=self.see(state.obs["state"] + jax.random.normal(noise_key, (3,))))


@pytest.mark.parametrize(("observation", "size"), [("state", 3), ("privileged_state", 6)])
def test_a_robots_step_draws_from_its_key_and_leaves_the_state_before_it_alone(observation, size):
    world = wrap(RobotEnv(), 2, observation)
    check_world(world)
    assert world.observation_space.shape == (size,)
    first = world.reset(as_key(jax.random.key(0)))[1]
    words = np.array(first.inner.info["rng"])
    one, again, other = (world.step(as_key(jax.random.key(n)), first, jnp.zeros(2)) for n in (1, 1, 2))
    np.testing.assert_array_equal(first.inner.info["rng"], words)
    np.testing.assert_array_equal(one.observation, again.observation)
    assert one.observation.shape == (size,) and not np.allclose(one.observation, other.observation)
    assert not one.truncated and not one.terminated
    late = world.step(as_key(jax.random.key(3)), one.state, jnp.zeros(2))
    assert late.truncated and not late.terminated


@pytest.mark.parametrize("length", [0, -1, 2.5, True, None])
def test_a_length_that_no_episode_has_is_refused(length):
    with pytest.raises(ValueError, match=rf"episode_length={length} must be an integer"):
        wrap(RobotEnv(), length, "state")


def test_gymnax_can_be_named():
    assert grpo_jax.make("gymnax/CartPole-v1") is not None
    assert grpo_jax.env_ids("gymnax") == gymnax.env_ids() == grpo_jax.env_ids()
    with pytest.raises(ValueError, match="did you mean CartPole-v1"):
        grpo_jax.make("gymnax/CartPole-v0")


def test_a_state_with_empty_arrays_and_a_key_trains_and_is_restored(walks, tmp_path):
    """Flattening the axes of time and environments by -1 does not know how long an empty array was."""
    world = grpo_jax.make("brax/walk")
    config = grpo_jax.GRPOConfig(n_envs=4, n_steps=8, batch_size=16, n_epochs=1, horizon=2, bootstrap=True)
    result = grpo_jax.train(config, world, jax.random.key(0), total_timesteps=64)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.state.learner.policy))
    grpo_jax.save(tmp_path / "state", result.state)
    back = grpo_jax.restore(tmp_path / "state", config, world)
    assert back.environments.state["nothing"].shape == (4, 0, 3)
    words = [jax.random.key_data(state.environments.state["key"]) for state in (result.state, back)]
    np.testing.assert_array_equal(*words)


def test_the_command_line_takes_the_same_ids(walks, capsys, tmp_path):
    assert main(["envs", "--suite", "brax"]) == 0
    assert capsys.readouterr().out == "brax/walk\n"
    assert main(["envs", "--suite", "atari"]) == 2
    assert "there is no suite 'atari'" in capsys.readouterr().err
    out = str(tmp_path / "run")
    small = ["--n-envs", "4", "--n-steps", "8", "--batch-size", "16", "--n-epochs", "1", "--horizon", "2"]
    command = ["train", "brax/walk", "--total-timesteps", "64", "--out", out, "--no-cache", *small]
    assert main(command) == 0
    assert "brax/walk" in capsys.readouterr().out
    assert main(["evaluate", out, "--n-episodes", "4", "--no-cache"]) == 0  # the run's file has the id


def test_sb3s_object_takes_the_same_ids(walks):
    from sb3_bridge import GRPO, WorldVecEnv

    assert WorldVecEnv("brax/walk", n_envs=2).world == Walk()
    model = GRPO("MlpPolicy", "brax/walk", n_steps=8, batch_size=8)
    assert isinstance(model.get_env(), WorldVecEnv) and model.get_env().world == Walk()


@pytest.mark.parametrize("missing", ["is_truncated", "registered_envs"])
def test_a_gymnax_that_was_overwritten_is_named(missing, monkeypatch):
    import gymnax as package
    from gymnax.environments.environment import Environment

    monkeypatch.delattr(Environment if missing == "is_truncated" else package, missing)
    with pytest.raises(ImportError, match="popgym-arcade does.*--force-reinstall"):
        grpo_jax.make("CartPole-v1")


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey], ids=["typed", "words"])
def test_a_key_takes_the_form_of_the_one_it_replaces(make_key):
    old, key = make_key(0), as_key(jax.random.key(7))
    new = fresh_key(old, key)
    assert (new.shape, new.dtype) == (old.shape, old.dtype)
    np.testing.assert_array_equal(jax.random.bits(new, (3,)), jax.random.bits(make_key(7), (3,)))


def test_categories_become_maps():
    grid = jnp.array([[[0, 2], [1, 0]]])
    expected = [[[1, 0, 0, 0, 1], [0, 1, 1, 0, 0]]]
    np.testing.assert_array_equal(one_hot(grid, (2, 3)), expected)


def test_what_was_made_is_remembered_by_its_arguments():
    make = once(lambda name, **options: object())
    assert make("a", n=1) is make("a", n=1)
    assert make("a", n=1) is not make("a", n=2)
    assert make("a", n=1) is not make("a", n=1.0)
    assert make("a", n=[1]) is not make("a", n=[1])  # cannot be hashed


@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), RuntimeError("git clone failed"), KeyError("mesh")]
)
def test_an_environment_that_cannot_be_made_says_why_that_may_be(error):
    with pytest.raises(RuntimeError, match=r"env='a/b' could not be made .*network") as raised, making("a/b"):
        raise error
    assert type(error).__name__ in str(raised.value) and raised.value.__cause__ is error
    with pytest.raises(ValueError, match="as it is"), making("a/b"):
        raise ValueError("as it is")
