"""What is one suite's own: opponents inside of a game, a step behind an end, rulesets, masks."""

from __future__ import annotations

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax
from grpo_jax import spaces
from grpo_jax.noise import as_key, split
from grpo_jax.worlds.base import example_action
from grpo_jax.worlds.jumanji import _actions
from grpo_jax.worlds.pgx import random_opponent
from grpo_jax.worlds.pictures import Renderer

pytestmark = pytest.mark.filterwarnings("ignore")


def needs(module):
    """Skips a test, visibly, where a suite is not installed."""
    reason = f"{module} is not installed: pip install '.[{module.removeprefix('mujoco_')}]'"
    return pytest.importorskip(module, reason=reason, exc_type=ImportError)


def in_column(params, key, observation, action_mask):
    """Drops its disc into the column that ``params`` names, or into the first that has room."""
    return jnp.where(action_mask[params], params, jnp.argmax(action_mask))


@functools.cache
def programs(env_id):
    def play(world, key):
        """One episode of the first allowed actions: reward of each step, and whether it was the last."""

        def body(carry, key):
            state, over = carry
            step = world.step(key, state, jnp.argmax(world.action_mask(state)))
            return (step.state, over | step.terminated), (jnp.where(over, 0, step.reward), step.observation)

        _, state = world.reset(key)
        return state, jax.lax.scan(body, (state, jnp.bool_(False)), split(key, 24))[1]

    traces = []

    def counted(world, keys):
        traces.append(1)
        return jax.vmap(lambda key: play(world, key))(keys)

    return jax.jit(counted), traces


def test_a_newer_opponent_compiles_nothing_anew():
    needs("pgx")
    play, traces = programs("pgx/connect_four")
    keys = split(as_key(jax.random.key(0)), 16)
    world = grpo_jax.make("pgx/connect_four", opponent=in_column, opponent_params=jnp.int32(6))
    first, (rewards, boards) = play(world, keys)
    _, (other_rewards, other_boards) = play(world.replace(opponent_params=jnp.int32(0)), keys)
    assert len(traces) == 1
    assert not np.array_equal(boards, other_boards)
    # Beside an opponent that fills column 6 the learner fills column 0: whoever began has four discs first.
    began = np.asarray(first._step_count) == 0
    assert 0 < began.sum() < 16, "who begins is drawn"
    np.testing.assert_array_equal(np.asarray(rewards).sum(axis=1), np.where(began, 1, -1))
    # In one column discs of both lie by turns, and nobody has four of them: the game goes on.
    assert np.all(np.asarray(other_rewards)[:, :3] == 0)


def test_a_random_opponent_takes_all_actions_that_are_allowed_and_no_other():
    mask = jnp.array([True, False, True, True, False])
    keys = jax.random.split(jax.random.key(0), 300)
    actions = jax.vmap(lambda key: random_opponent(None, key, jnp.zeros(3), mask))(keys)
    counts = np.bincount(actions, minlength=5)
    assert counts[[1, 4]].sum() == 0 and counts[[0, 2, 3]].min() > 70


def test_a_policy_can_be_the_opponent():
    needs("pgx")
    config = grpo_jax.GRPOConfig(
        n_envs=4, n_steps=8, batch_size=16, n_epochs=1, horizon=2, bootstrap=True, network="mlp"
    )
    learner = grpo_jax.make("pgx/connect_four")
    policy = grpo_jax.make_policy(config, learner.observation_space, learner.action_space)

    def play(params, key, observation, action_mask):
        return jax.random.categorical(key, policy.parameters(params, observation, action_mask))

    first = policy.init(as_key(jax.random.key(1)))
    world = grpo_jax.make("pgx/connect_four", opponent=play, opponent_params=first)
    result = grpo_jax.train(config, world, jax.random.key(0), total_timesteps=64)
    trained = result.state.learner.policy
    again = grpo_jax.train(
        config, world.replace(opponent_params=trained), jax.random.key(0), total_timesteps=64
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(again.state.learner.policy))


@pytest.mark.parametrize("page", ["docs/suites.md", "docs/suites.ja.md"])
def test_self_play_of_the_docs_runs(page):
    needs("pgx")
    text = (pathlib.Path(__file__).parents[2] / page).read_text()
    (code,) = re.findall(r"^```py\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(compile(code.replace("2048", "1024"), page, "exec"), names)
    assert type(names["state"].policy).__name__ == "Policy" and len(names["metrics"]["episode_return"]) == 1


@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        (
            "connect_four",
            {"opponent": "minimax"},
            TypeError,
            "opponent='minimax' must be 'random' or a function",
        ),
        ("2048", {"opponent": in_column}, ValueError, "pgx/2048 has one player"),
        ("conect_four", {}, ValueError, "did you mean pgx/connect_four"),
    ],
)
def test_what_pgx_refuses(name, options, kind, message):
    needs("pgx")
    with pytest.raises(kind, match=message):
        grpo_jax.make(f"pgx/{name}", **options)


def test_navix_does_not_start_over_behind_an_end():
    needs("navix")
    world = grpo_jax.make("navix/Navix-Empty-5x5-v0", max_steps=2)
    step, state = jax.jit(world.step), world.reset(as_key(jax.random.key(0)))[1]
    for time in (1, 2, 3):
        reached = step(as_key(jax.random.key(time)), state, jnp.int32(0))
        state = reached.state
        assert int(state.t) == time and bool(reached.truncated) == (time >= 2)
    assert state.state.cache is None
    with pytest.raises(ValueError, match="observation='rgb' must be 'symbolic'"):
        grpo_jax.make("navix/Navix-Empty-5x5-v0", observation="rgb")
    assert grpo_jax.make(
        "navix/Navix-Empty-5x5-v0", observation="symbolic_first_person"
    ).observation_space.shape == (7, 7, 23)


def test_every_symbol_of_navix_is_seen():
    """The state of a locked door is 254 in KeyCorridor."""
    needs("navix")
    world = grpo_jax.make("navix/Navix-KeyCorridorS3R1-v0")
    observation, _ = jax.jit(world.reset)(as_key(jax.random.key(0)))
    door = np.asarray(observation)[..., -1] == 1
    assert door.any() and np.all(np.asarray(observation)[door][:, 4] == 1)  # the tag of doors
    assert np.all(np.asarray(observation).sum(axis=-1) == 3)


def test_playground_refuses_what_its_config_does_not_have():
    needs("mujoco_playground")
    with pytest.raises(
        ValueError, match="colour: the config of playground/CartpoleBalance has action_repeat"
    ):
        grpo_jax.make("playground/CartpoleBalance", colour="red")
    with pytest.raises(ValueError, match="action_repeat=2 must be 1"):
        grpo_jax.make("playground/CartpoleBalance", action_repeat=2)


def test_an_xland_environment_needs_a_ruleset():
    suite = needs("xminigrid")
    with pytest.raises(ValueError, match="has no goal without a ruleset: give one"):
        grpo_jax.make("xminigrid/XLand-MiniGrid-R1-9x9")
    params = suite.make("XLand-MiniGrid-R1-9x9")[1]
    assert grpo_jax.make("xminigrid/XLand-MiniGrid-R1-9x9", params, max_steps=7).params.max_steps == 7


@pytest.mark.parametrize(
    ("parts", "mask_shape", "expected"),
    [
        ((4,), (4,), spaces.Discrete(4)),
        ((4, 10), (4, 10), spaces.Discrete(40)),  # Tetris: of whole actions
        ((10, 10), (10, 10), spaces.Discrete(100)),
        ((5, 5, 5), (3, 5), spaces.MultiDiscrete((5, 5, 5))),  # Connector: of each agent
        ((6, 1, 3), None, spaces.MultiDiscrete((6, 1, 3))),
    ],
)
def test_masks_say_what_jumanjis_actions_are(parts, mask_shape, expected):
    assert _actions("X-v0", parts, mask_shape) == expected


@pytest.mark.parametrize(("parts", "mask_shape"), [((2, 2), (2, 2)), ((4, 5), (4,)), ((3, 3), (3, 4))])
def test_masks_that_could_mean_two_things_are_refused(parts, mask_shape):
    with pytest.raises(NotImplementedError, match="a mask of shape"):
        _actions("X-v0", parts, mask_shape)


@pytest.mark.parametrize(
    "env_id",
    [
        "brax/reacher",
        "craftax/Craftax-Classic-Symbolic-v1",
        "jumanji/Game2048-v1",
        "jumanji/Snake-v1",
        "navix/Navix-DoorKey-5x5-v0",
        "pgx/connect_four",
        "playground/CartpoleBalance",
        "xminigrid/MiniGrid-DoorKey-5x5",
    ],
)
def test_a_suite_draws_its_states(env_id):
    """The picture is of the state that is given, of one size, and of another one where the state is."""
    suite = env_id.partition("/")[0]
    needs({"playground": "mujoco_playground"}.get(suite, suite))
    if suite == "pgx":
        needs("pygame")
    world = grpo_jax.make(env_id)
    reset, step = jax.jit(world.reset), jax.jit(world.step)
    first = reset(as_key(jax.random.key(0)))[1]
    then, action = first, example_action(world.action_space)
    for i in range(3):
        mask = world.action_mask(then)
        action = action if mask is None else jnp.argmax(mask)
        then = step(as_key(jax.random.key(i)), then, action).state
    try:
        pictures = [Renderer().frame(world, jax.device_get(state)) for state in (first, then, first)]
    except NotImplementedError as error:
        if "MUJOCO_GL" not in str(error):
            raise
        pytest.skip(str(error))
    for picture in pictures:
        assert picture.dtype == np.uint8 and picture.shape == pictures[0].shape and picture.shape[2] == 3
        assert picture.shape[1] >= 240 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 2
    np.testing.assert_array_equal(pictures[0], pictures[2])
    assert not np.array_equal(pictures[0], pictures[1])


def test_what_a_suite_cannot_draw_here_is_refused():
    needs("pgx")
    world = grpo_jax.make("pgx/2048")
    with pytest.raises(NotImplementedError, match=r"pgx draws 2048 with letters.*save_svg"):
        world.picture(world.reset(as_key(jax.random.key(0)))[1])
    needs("jumanji")
    world = grpo_jax.make("jumanji/RubiksCube-v0")
    with pytest.raises(NotImplementedError, match="Jumanji draws RubiksCube in a window alone"):
        world.picture(world.reset(as_key(jax.random.key(0)))[1])
