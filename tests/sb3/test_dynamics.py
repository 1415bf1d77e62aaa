"""Where alternatives come from on the host: what ``dynamics`` chooses, what follows from it, and what is compared."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import time
import warnings
import zipfile
from collections import Counter
from types import SimpleNamespace
from typing import Any

import chex
import cloudpickle
import gymnasium as gym
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_bridge import GRPO, GymnaxVecEnv, grpo
from sb3_bridge import alternatives as dynamics
from sb3_bridge.alternatives import digits
from sb3_bridge.clones.copying import Unclonable

pytestmark = pytest.mark.usefixtures("quick_compiles")

SMALL = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "policy_kwargs": {"net_arch": [8]}, "device": "cpu"}


# ---- toys


class Sled(gym.Env):
    """A sled on ice that is pushed left, not at all, or right: linear, and random in nothing but where it starts.

    All its numbers are exact in float32. Pays for where it is, ends beyond ``edge``, is cut after ``limit`` steps.
    """

    observation_space = spaces.Box(-8, 8, (2,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self, limit: int = 11, edge: float = 2.0):
        self.limit, self.edge = limit, edge

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        self.where = self.np_random.integers(-64, 65, 2).astype(np.float32) / 64
        return self.where.copy(), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        self.where = glide(self.where, action)
        fell, reward = bool(abs(self.where[0]) > self.edge), 4.0 + float(self.where[0])
        return self.where.copy(), reward, fell, self.time >= self.limit, {}


def glide(state: Any, action: Any) -> np.ndarray:
    where, speed = state
    return np.array([where + 0.25 * speed, speed + 0.125 * (action - 1.0)], np.float32)


def glide_jax(state: Any, action: Any) -> Any:
    return jnp.stack([state[0] + 0.25 * state[1], state[1] + 0.125 * (action - 1.0)])


def glide_torch(state: Any, action: Any) -> Any:
    return torch.stack([state[:, 0] + 0.25 * state[:, 1], state[:, 1] + 0.125 * (action - 1.0)], dim=1)


def fares(state: Any, action: Any, next_state: Any) -> Any:
    """What ``Sled`` pays."""
    return 4.0 + next_state[0]


TIDE = {"height": 0}


class Tidal(Sled):
    """Pays by a tide that all sleds share, copies too."""

    def step(self, action: Any) -> Any:
        TIDE["height"] += 1
        observation, _, *ends = super().step(action)
        return observation, float(TIDE["height"]), *ends


class Uncopyable(Sled):
    """Holds what nobody can copy."""

    def __init__(self):
        super().__init__()
        self.stream = (number for number in range(10))


class Slow(Sled):
    """A step takes two milliseconds."""

    def step(self, action: Any) -> Any:
        time.sleep(2e-3)
        return super().step(action)


class Camera(gym.ObservationWrapper):
    """Pictures instead of numbers."""

    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)

    def observation(self, observation: Any) -> np.ndarray:
        return np.full((36, 36, 1), 128 + 16 * observation[0], np.uint8)


class Remote(gym.Env):
    """A ``Sled`` in a library's memory: what this object holds is a handle, and a copy gets a sled of its own."""

    observation_space, action_space = Sled.observation_space, Sled.action_space
    sleds: dict[int, Sled] = {}  # noqa: RUF012
    numbers = itertools.count()

    def __init__(self):
        self.number = next(self.numbers)
        self.sleds[self.number] = Sled()
        self.handle = (number for number in range(10))  # nobody can copy it

    def __deepcopy__(self, memo: Any) -> Remote:
        return Remote()

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.sleds[self.number].reset(seed=seed)

    def step(self, action: Any) -> Any:
        return self.sleds[self.number].step(action)


def dummy(make: Any, n_envs: int = 1) -> DummyVecEnv:
    return DummyVecEnv([make] * n_envs)


def make(env: Any, policy: str = "MlpPolicy", **settings: Any) -> GRPO:
    return GRPO(policy, env, **{**SMALL, "seed": 0, **settings})


def filmed(make_env: Any) -> GRPO:
    small = {"net_arch": [8], "features_extractor_kwargs": {"features_dim": 8}}
    return make(dummy(lambda: Camera(make_env())), "CnnPolicy", policy_kwargs=small, verbose=1)


def parameters(model: GRPO) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in model.policy.state_dict().values()])


def told(capsys: Any) -> str:
    """The one line that says what is compared."""
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("GRPO:")]
    return line


class Table(KVWriter):
    """What is logged, row by row."""

    def __init__(self):
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: Any, key_excluded: Any, step: int = 0) -> None:
        self.rows.append(dict(key_values))

    def close(self) -> None:
        pass


def log_of(model: GRPO, *arguments: Any, **settings: Any) -> list[dict[str, Any]]:
    """Trains, and returns what each iteration logged."""
    table = Table()
    model.set_logger(Logger(None, [table]))
    model.learn(*arguments, **settings)
    model.logger.dump(0)  # what the last iteration logged
    return table.rows[1:]


@pytest.fixture
def handed(monkeypatch: Any) -> list[np.ndarray]:
    """The group returns ``[T, N, G]`` of clones that every update was given."""
    returns, learn = [], grpo._learn

    def spy(config: Any, *arguments: Any) -> Any:
        _, branches = arguments[-1]
        returns.append(np.asarray(branches.returns).reshape(config.n_steps, config.n_envs, -1))
        return learn(config, *arguments)

    monkeypatch.setattr(grpo, "_learn", spy)
    return returns


def steady(model: GRPO) -> GRPO:
    """With logits so far apart that its draws do not depend on random numbers."""
    state = model.policy.state_dict()
    for name in ("actor.output.kernel", "actor.output.bias"):
        state[name] = 1e5 * (state[name] + 0.01 * torch.arange(3))
    model.policy.load_state_dict(state)
    return model


# ---- what "auto" chooses


def test_a_gymnax_env_is_its_own_simulator(capsys):
    model = make(GymnaxVecEnv("CartPole-v1", 2), verbose=1)
    assert model.chosen_dynamics == "simulator"
    assert "are followed for 128 steps in the simulator" in told(capsys)


def test_an_env_by_its_id_is_cloned(capsys):
    model = make("CartPole-v1", verbose=1)
    assert model.chosen_dynamics == "clone"
    line = told(capsys)
    assert "all 2 actions of one state in 4 are followed for 64 steps in exact clones" in line
    assert "replay check passed" in line and "ms a decision step" in line


@pytest.mark.parametrize(("toy", "reason"), [(Tidal, "do not repeat the reward"), (Uncopyable, "generator")])
def test_without_clones_a_world_is_learned_of_vectors_and_of_pictures_none(toy, reason, capsys):
    model = make(dummy(toy), verbose=1)
    line = told(capsys)
    assert model.chosen_dynamics == "learned" and model._config().candidates == "auto"
    assert reason in line and "in a world that is learned" in line, line

    model = filmed(toy)
    line = told(capsys)
    assert model.chosen_dynamics == "episodes" and model._config().candidates == "episodes"
    assert "the episodes of a rollout are compared" in line
    assert reason in line and "a learned world predicts vectors" in line, line


def test_pictures_are_cloned_where_that_is_possible(capsys):
    assert filmed(Sled).chosen_dynamics == "clone"
    assert "in exact clones" in told(capsys)


def test_slow_environments_are_not_cloned_and_the_cost_is_named(capsys):
    model = make(dummy(Slow), verbose=1)
    assert model.chosen_dynamics == "learned"
    line = told(capsys)
    # Three actions, 64 steps of 2 ms each, of every fourth state.
    cost = float(line.split("branches of clones would take ")[1].split(" ms a decision step")[0])
    assert 3 * 64 * 2 / 4 <= cost < 3 * 3 * 64 * 2 / 4
    assert "dynamics='clone'" in line


@pytest.mark.parametrize(("budget", "kind"), [(1e9, "clone"), (0.0, "learned")])
def test_the_budget_decides(budget, kind, monkeypatch):
    monkeypatch.setattr(dynamics, "BUDGET_MS", budget)
    assert make(dummy(Sled)).chosen_dynamics == kind


def test_episodes_are_compared_on_demand_and_nothing_is_checked(monkeypatch, capsys):
    monkeypatch.setattr(dynamics, "Brancher", None)
    env = dummy(Sled)
    model = make(env, candidates="episodes", verbose=1)
    assert model.chosen_dynamics == "episodes"
    assert told(capsys) == "GRPO: the episodes of a rollout are compared, nothing is branched; with a critic"
    with pytest.raises(TypeError):  # what any check would have met
        make(env)


def test_no_world_is_learned_of_observations_whose_scale_changes(capsys):
    model = make(VecNormalize(dummy(Uncopyable)), verbose=1)
    assert model.chosen_dynamics == "episodes"
    line = told(capsys)
    assert "generator" in line and "VecNormalize(norm_obs=False)" in line
    assert make(VecNormalize(dummy(Uncopyable), norm_obs=False)).chosen_dynamics == "learned"
    assert make(VecNormalize(dummy(Sled))).chosen_dynamics == "clone"


def test_another_env_is_another_choice(capsys):
    model = make(dummy(Sled), verbose=1)
    told(capsys)
    model.set_env(dummy(Uncopyable))
    assert model.chosen_dynamics == "learned" and "generator" in told(capsys)
    model.set_env(dummy(Sled))
    assert model.chosen_dynamics == "clone" and "in exact clones" in told(capsys)


# ---- what follows from the choice

SIMULATED = lambda: GymnaxVecEnv("CartPole-v1", 1)
DEFAULTS = {
    "simulator": (SIMULATED, {}, (2048, 128, 1, False)),
    "clone": (lambda: dummy(Sled), {}, (512, 64, 4, True)),
    "learned": (lambda: dummy(Uncopyable), {}, (2048, 64, 4, True)),
    "episodes": (lambda: dummy(Sled), {"candidates": "episodes"}, (2048, 64, 1, True)),
}
REWARDED = {
    "simulator": (SIMULATED, {}, (2048, 128, 1, False)),
    "clone": (lambda: dummy(Sled), {}, (512, 16, 1, False)),
    "learned": (lambda: dummy(Uncopyable), {}, (2048, 16, 1, False)),
    "function": (lambda: dummy(Sled), {"dynamics": glide_jax}, (512, 16, 1, False)),
    "episodes": (lambda: dummy(Sled), {"candidates": "episodes"}, (2048, 16, 1, True)),
}
NAMES = ("n_steps", "horizon", "branch_every", "bootstrap")


@pytest.mark.parametrize(
    ("kind", "has_reward"), [*itertools.product(DEFAULTS, [False]), *itertools.product(REWARDED, [True])]
)
def test_defaults_are_those_of_the_kind(kind, has_reward):
    env, settings, expected = (REWARDED if has_reward else DEFAULTS)[kind]
    if has_reward:
        settings = settings | {"reward_function": fares}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # plain use warns of nothing
        model = GRPO("MlpPolicy", env(), policy_kwargs={"net_arch": [8]}, **settings)
    assert model.chosen_dynamics == kind
    assert tuple(getattr(model, name) for name in NAMES) == expected
    config = model._config()
    used = NAMES if kind != "episodes" else ("n_steps", "bootstrap")  # of episodes the others say nothing
    assert [getattr(config, name) for name in used] == [getattr(model, name) for name in used]
    assert ("critic" in model.policy.state.params) == expected[-1]


@pytest.mark.parametrize("kind", ["simulator", "clone", "learned", "function"])
def test_what_is_given_is_kept(kind):
    env, settings, _ = REWARDED[kind]
    given = {"n_steps": 12, "horizon": 5, "branch_every": 3, "bootstrap": kind in ("simulator", "function")}
    model = make(env(), reward_function=fares, batch_size=12, **settings, **given)
    assert model.chosen_dynamics == kind
    assert {name: getattr(model, name) for name in NAMES} == given
    assert {name: getattr(model._config(), name) for name in NAMES} == given


@pytest.mark.parametrize(
    ("n_steps", "horizon", "branch_every"),
    [
        (7, 64, 1),
        (9, 64, 3),
        (10, 64, 2),
        (12, 64, 4),
        (512, 128, 8),
        (512, 15, 1),
        (510, 100, 6),
        (6, 200, 6),
    ],
)
def test_clones_are_branched_as_often_as_divides_the_rollout(n_steps, horizon, branch_every):
    """The most that costs no more than 16 steps of each candidate for a decision step."""
    model = make(dummy(Sled), n_steps=n_steps, horizon=horizon, batch_size=n_steps)
    assert (model.chosen_dynamics, model.branch_every) == ("clone", branch_every)
    assert n_steps % model.branch_every == 0


def test_a_file_may_be_loaded_with_another_n_steps():
    """What was left open is no demand of the user's that the new length could break."""
    file = io.BytesIO()
    make(dummy(Sled)).save(file)
    model = GRPO.load(io.BytesIO(file.getvalue()), env=dummy(Sled), n_steps=6, batch_size=6)
    assert model.n_steps == 6 and 6 % model.branch_every == 0
    model.learn(6)


def test_a_share_that_does_not_divide_the_rollout_is_refused():
    with pytest.raises(ValueError, match="branch_every=3 must divide n_steps=8"):
        make(dummy(Sled), branch_every=3)


@pytest.mark.parametrize(
    "nonsense",
    ["nonsense", "clones", 5, None, (), (glide,), (glide, glide, glide), (glide, 3), ("clone", "learned")],
)
def test_what_dynamics_cannot_be_is_refused_with_what_it_can(nonsense):
    with pytest.raises(ValueError, match="dynamics=") as caught:
        make(dummy(Sled), dynamics=nonsense)
    text = str(caught.value)
    for fix in ("'auto'", "'clone'", "'learned'", "f(state, action) -> next_state", "(get_state, set_state)"):
        assert fix in text


def test_clones_that_cannot_be_had_are_an_error_with_the_reason():
    with pytest.raises(Unclonable, match="generator"):
        make(dummy(Uncopyable), dynamics="clone")
    with pytest.raises(Unclonable, match="do not repeat the reward"):
        make(dummy(Tidal), dynamics="clone")
    with pytest.raises(ValueError, match="dynamics='simulator' needs a GymnaxVecEnv"):
        make(dummy(Sled), dynamics="simulator")


def test_clones_that_cost_much_are_made_all_the_same_with_a_warning():
    with pytest.warns(
        UserWarning, match=r"branches will take about [\d.e+]+ ms for a decision step"
    ) as caught:
        model = make(dummy(Slow), dynamics="clone", group_size=4)
    assert model.chosen_dynamics == "clone"
    (warning,) = caught
    text = str(warning.message)
    for name in ("horizon=64", "group_size=4", "branch_every=4", "SubprocVecEnv", "dynamics='learned'"):
        assert name in text
    assert warning.filename == __file__
    assert (
        make(dummy(Slow), dynamics="clone", horizon=1, branch_every=8).chosen_dynamics == "clone"
    )  # silently


def test_a_world_of_pictures_is_refused():
    small = {"net_arch": [8], "features_extractor_kwargs": {"features_dim": 8}}
    with pytest.raises(NotImplementedError, match=r"a learned world predicts vectors.*dynamics='clone'"):
        make(dummy(lambda: Camera(Sled())), "CnnPolicy", policy_kwargs=small, dynamics="learned")
    with pytest.raises(ValueError, match=r"dynamics='learned' needs .*VecNormalize\(norm_obs=False\)"):
        make(VecNormalize(dummy(Sled)), dynamics="learned")


@pytest.mark.parametrize("candidates", ["enumerate", "sample"])
@pytest.mark.parametrize("env", [SIMULATED, lambda: dummy(Sled)], ids=["simulator", "clone"])
def test_candidates_may_be_named(env, candidates, capsys):
    model = make(env(), candidates=candidates, horizon=2, group_size=5, bootstrap=True, verbose=1)
    assert model._config().candidates == candidates
    groups = "5 sampled actions" if candidates == "sample" else f"all {model.action_space.n} actions"
    assert f"GRPO: {groups} of every state are followed for 2 steps in" in told(capsys)
    if candidates == "sample":
        model.learn(8)
        assert 8 * 5 < model.simulator_steps <= 8 * 5 * 2


def test_trajectories_need_the_simulator():
    model = make(GymnaxVecEnv("CartPole-v1", 4), candidates="trajectory", group_size=2)
    assert model._config().candidates == "trajectory"
    with pytest.raises(ValueError, match="candidates='trajectory' needs a world"):
        make(dummy(Sled), candidates="trajectory")


# ---- clones


class Film(BaseCallback):
    """Deep copies of the environments in every decision state, ``[T][N]``."""

    def __init__(self):
        super().__init__()
        self.states: list[Any] = []

    def _now(self) -> None:
        self.states.append([copy.deepcopy(env) for env in self.training_env.unwrapped.envs])

    def _on_rollout_start(self) -> None:
        self.states = []
        self._now()

    def _on_step(self) -> bool:
        self._now()
        return True


def by_hand(
    model: GRPO, states: Any, iteration: int, reward: Any, horizon: int, every: int
) -> tuple[np.ndarray, int]:
    """Group returns ``[T, N, 3]`` of copies that are stepped one after the other, and the number of steps."""
    returns, n_steps = np.zeros((model.n_steps, model.n_envs, 3)), 0
    for moment, index in itertools.product(range(model.n_steps), range(model.n_envs)):
        if (moment + index + iteration) % every:
            continue
        for candidate in range(3):
            env, action = copy.deepcopy(states[moment][index]), candidate
            for k in range(horizon):
                before = env.unwrapped.where.copy()
                observation, paid, terminated, truncated, _ = env.step(action)
                paid = paid if reward is None else reward(before, action, observation)
                returns[moment, index, candidate] += model.gamma**k * paid
                n_steps += 1
                if terminated or truncated:
                    break
                action = model.predict(observation, deterministic=True)[0]
            if model.bootstrap and not terminated:
                value = model.policy.predict_values(torch.as_tensor(observation[None])).item()
                returns[moment, index, candidate] += model.gamma ** (k + 1) * value
    return returns, n_steps


def squares(state: Any, action: Any, next_state: Any) -> Any:
    return 1.0 + next_state[0] ** 2 + 0.5 * state[1] ** 2 + 0.25 * action


@pytest.mark.parametrize("reward", [None, squares])
def test_group_returns_are_those_of_copies_stepped_by_hand(reward, handed):
    """Of all wanted states, in three iterations, and nothing of the others; and all steps are counted."""
    settings = {"horizon": 5, "branch_every": 2, "n_steps": 8, "gamma": 0.9, "learning_rate": 0.0}
    env = DummyVecEnv([lambda: Sled(6), lambda: Monitor(Sled(9))])
    model = steady(make(env, reward_function=reward, **settings))
    assert model.chosen_dynamics == "clone" and model.bootstrap == (reward is None)
    film, expected_steps, patterns = Film(), 0, []
    for iteration in range(3):
        model.learn(16, film, reset_num_timesteps=False)
        expected, n_steps = by_hand(model, film.states, iteration, reward, 5, 2)
        np.testing.assert_allclose(handed[iteration], expected, rtol=1e-4, atol=1e-4)
        expected_steps += n_steps
        assert model.simulator_steps == expected_steps
        patterns.append((handed[iteration] != 0).any(axis=2))
        assert patterns[-1].sum() == 8
        spread = handed[iteration].std(axis=2)[patterns[-1]]
        assert (spread > 1e-3).sum() >= 6  # an end at the next step leaves none
    assert (patterns[0] != patterns[1]).all() and (patterns[0] == patterns[2]).all()
    # Branches ended early, and some did not.
    assert 3 * 8 * 3 < expected_steps < 3 * 8 * 3 * 5


def frozen_lake(folder: Any) -> Any:
    return DummyVecEnv(
        [lambda i=i: Monitor(gym.make("FrozenLake-v1"), str(folder / str(i))) for i in range(2)]
    )


def test_a_run_with_clones_meets_what_a_run_without_meets(tmp_path):
    """With a policy that stays as it is: not even the environments' random numbers notice the branches."""
    seen = []
    for candidates in ("auto", "episodes"):
        folder = tmp_path / candidates
        folder.mkdir()
        own = {"horizon": 6} if candidates == "auto" else {}
        model = make(
            frozen_lake(folder), candidates=candidates, learning_rate=0.0, n_steps=32, bootstrap=True, **own
        )
        model.learn(3 * 64)
        model.get_env().close()
        assert (model.simulator_steps > 1000) == (candidates == "auto")
        files = [(folder / f"{i}.monitor.csv").read_text().splitlines()[2:] for i in range(2)]
        lines = [[line.rsplit(",", 1)[0] for line in lines] for lines in files]  # without the time
        episodes = [(info["r"], info["l"]) for info in model.ep_info_buffer]
        seen.append(
            (lines, episodes, model._last_obs.tolist(), model.num_timesteps, model.key_words.tolist())
        )
        assert len(load_results(str(folder))) == len(episodes) > 10
    assert seen[0] == seen[1]


def test_processes_train_as_one_does_to_the_last_bit():
    learned = []
    for kind in (DummyVecEnv, SubprocVecEnv):
        env = kind([lambda: Monitor(gym.make("CartPole-v1"))] * 2)
        model = make(env, horizon=4, n_steps=8)
        assert model.chosen_dynamics == "clone"
        before = parameters(model)
        model.learn(32)
        env.close()
        learned.append((parameters(model), model.simulator_steps))
        assert (learned[-1][0] != before).any()
    np.testing.assert_array_equal(learned[0][0], learned[1][0])
    assert learned[0][1] == learned[1][1] > 100


def get_remote(env: Any) -> Any:
    CALLS["get"] += 1
    sled = env.sleds[env.number]
    return sled.where.copy(), sled.time, sled.np_random.bit_generator.state


def set_remote(env: Any, state: Any) -> None:
    CALLS["set"] += 1
    sled = env.sleds[env.number]
    sled.where, sled.time, sled.np_random.bit_generator.state = state


CALLS: Counter[str] = Counter()


def test_a_pair_of_functions_saves_and_restores_what_no_copy_does(handed):
    settings = {"horizon": 3, "branch_every": 2, "n_steps": 8, "n_rollouts": 2}
    with pytest.raises(Unclonable):
        make(dummy(Remote), dynamics="clone", **settings)
    model = steady(make(dummy(Remote), dynamics=(get_remote, set_remote), **settings))
    assert model.chosen_dynamics == "clone"
    CALLS.clear()
    model.learn(8)
    # One state in two, three candidates, two rollouts of each.
    assert CALLS == {"get": 4, "set": 4 * 3 * 2}
    alike = steady(make(dummy(Sled), dynamics="clone", **settings))
    alike.learn(8)
    np.testing.assert_array_equal(handed[0], handed[1])
    np.testing.assert_array_equal(parameters(model), parameters(alike))
    assert model.simulator_steps == alike.simulator_steps


def test_a_callback_that_stops_in_the_middle_leaves_nothing_behind():
    """The states that were kept are forgotten, and the next rollout is branched as it should be."""
    model = make(dummy(Sled), horizon=2)
    model.learn(8, callback=lambda variables, names: variables["n_steps"] < 3)
    assert model.num_timesteps == 4 and model.simulator_steps == 0
    model.learn(8, reset_num_timesteps=False)
    assert model.num_timesteps == 12 and 8 * 3 < model.simulator_steps <= 8 * 3 * 2


def test_a_reward_that_is_nan_in_branches_only_shows_what_it_was_given():
    """The policy never goes right, the candidates do."""
    switch = SimpleNamespace(on=False)

    def reward(state: Any, action: Any, next_state: Any) -> Any:
        paid = next_state[:, 0] + 0.0 * action
        return np.where((action == 2) & switch.on, np.nan, paid)

    model = make(dummy(Sled), horizon=2, reward_function=reward)
    state = model.policy.state_dict()
    state["actor.output.bias"] = torch.tensor([1e5, 0.0, 0.0])
    model.policy.load_state_dict(state)
    model.learn(8)
    before, switch.on = parameters(model), True
    with pytest.raises(
        ValueError, match=r"reward_function returned nan for state=\[.*\], action=2, next_state=\["
    ):
        model.learn(8, reset_num_timesteps=False)
    np.testing.assert_array_equal(parameters(model), before)


# ---- a learned world

LEARNED = {"dynamics": "learned", "n_steps": 64, "batch_size": 64, "horizon": 4, "branch_every": 4}


def sleds() -> DummyVecEnv:
    return dummy(lambda: Monitor(Sled(16, edge=100)), 2)


@pytest.fixture(scope="module")
def learned_run(quick_compiles):
    """A trained model, what was logged, and its file and a copy of its environments at half time."""
    model = make(sleds(), **LEARNED)
    rows = log_of(model, 2 * 128)
    file = io.BytesIO()
    model.save(file)
    half = SimpleNamespace(
        file=file.getvalue(), env=copy.deepcopy(model.get_env()), parameters=parameters(model)
    )
    rows += log_of(model, 2 * 128, reset_num_timesteps=False)
    return SimpleNamespace(model=model, rows=rows, half=half)


def test_a_learned_world_is_used_as_soon_as_it_predicts_well(learned_run):
    used = [row["grpo/world_used"] for row in learned_run.rows]
    assert used == [0, 1, 1, 1]
    steps = np.diff([0, *(row["grpo/simulator_steps"] for row in learned_run.rows)])
    assert [bool(count) for count in steps] == [bool(value) for value in used]
    assert steps[-1] <= 2 * 64 // 4 * 3 * 4


def test_a_learned_worlds_errors_are_logged(learned_run):
    for name in ("world_error", "world_one_step_error", "world_disagreement"):
        values = [row[f"grpo/{name}"] for row in learned_run.rows]
        assert np.isfinite(values).all() and values[-1] < values[0], name
    assert learned_run.rows[-1]["grpo/world_one_step_error"] < 0.7 <= learned_run.rows[0]["grpo/world_error"]


def test_a_learned_world_is_in_the_file_without_a_pickle(learned_run, monkeypatch):
    """Training goes on as if it had not been interrupted, bit for bit."""
    half = learned_run.half
    assert any("world" in name for name in zipfile.ZipFile(io.BytesIO(half.file)).namelist())

    def refuse(*_arguments: Any, **_settings: Any) -> Any:
        raise AssertionError("something was unpickled")

    with monkeypatch.context() as patch:
        for module, name in itertools.product((pickle, cloudpickle), ("load", "loads")):
            patch.setattr(module, name, refuse)
        patch.setattr(pickle, "Unpickler", refuse)
        loaded = GRPO.load(io.BytesIO(half.file), env=half.env, force_reset=False)
    assert loaded.chosen_dynamics == "learned"
    before = loaded.simulator_steps
    loaded.learn(2 * 128, reset_num_timesteps=False)
    np.testing.assert_array_equal(parameters(loaded), parameters(learned_run.model))
    assert loaded.simulator_steps == learned_run.model.simulator_steps
    assert loaded.simulator_steps > before
    assert (parameters(loaded) != half.parameters).any()


def test_a_learned_world_takes_the_users_reward():
    """In NumPy, too; then it is not learned, and no critic is needed."""
    reward = lambda state, action, next_state: np.square(next_state[0])
    model = make(sleds(), reward_function=reward, **LEARNED)
    assert (model.bootstrap, model._reward.framework) == (False, "numpy")
    before = parameters(model)
    rows = log_of(model, 2 * 128)
    assert rows[-1]["grpo/world_used"] == 1 and rows[-1]["grpo/simulator_steps"] > 0
    assert (parameters(model) != before).any()


# ---- a function of the user's

FOLLOWED = {"horizon": 4, "branch_every": 2, "n_steps": 16, "batch_size": 16, "learning_rate": 0.01}


def long_sled() -> DummyVecEnv:
    """No clock: a function knows of none."""
    return dummy(lambda: Sled(10_000))


def ending(function: Any) -> Any:
    return lambda state, action: (reached := function(state, action), abs(reached[0]) > 2)


@pytest.fixture(scope="module")
def followed(quick_compiles):
    """Parameters and simulator steps after two iterations of a policy that needs no random numbers, by dynamics."""
    kinds = {
        "jax": glide_jax,
        "numpy": glide,
        "torch": glide_torch,
        "ending": ending(glide_jax),
        "clone": "clone",
    }
    results = {}
    for name, kind in kinds.items():
        model = steady(make(long_sled(), dynamics=kind, reward_function=fares, **FOLLOWED))
        assert model.chosen_dynamics == ("clone" if kind == "clone" else "function")
        steps = []
        before = parameters(model)
        for _ in range(3):
            model.learn(16, reset_num_timesteps=False)
            steps.append(model.simulator_steps)
        results[name] = SimpleNamespace(parameters=parameters(model), steps=steps, before=before)
    return results


def test_functions_of_all_frameworks_train_alike(followed):
    first = followed["jax"]
    assert (first.parameters != first.before).any()
    for name in ("numpy", "torch"):
        np.testing.assert_allclose(followed[name].parameters, first.parameters, rtol=1e-5, atol=1e-6)
        assert followed[name].steps == first.steps
    # One state in two, three candidates, four steps each: no branch ends.
    assert first.steps == [8 * 3 * 4, 2 * 8 * 3 * 4, 3 * 8 * 3 * 4]


def test_a_function_that_tells_ends_trains_as_clones_do(followed):
    """The same returns of the same states, though the one is traced and the other stepped."""
    ending, clone = followed["ending"], followed["clone"]
    assert ending.steps == clone.steps
    np.testing.assert_allclose(ending.parameters, clone.parameters, rtol=1e-4, atol=1e-5)
    assert ending.steps[-1] < followed["jax"].steps[-1]  # branches were stopped
    assert not np.allclose(ending.parameters, followed["jax"].parameters, rtol=1e-4, atol=1e-5)


def test_a_function_needs_a_reward_and_true_observations():
    with pytest.raises(ValueError, match="reward_function"):
        make(long_sled(), dynamics=glide_jax)
    with pytest.raises(ValueError, match=r"VecNormalize\(norm_obs=False\)"):
        make(VecNormalize(long_sled()), dynamics=glide_jax, reward_function=fares)
    with pytest.raises(ValueError, match="returned"):
        make(long_sled(), dynamics=lambda state, action: state[:1], reward_function=fares)


def test_a_function_that_gives_nan_shows_what_it_was_given():
    switch = SimpleNamespace(on=False)

    def broken(state: Any, action: Any) -> Any:
        return glide(state, action) * np.float32(np.nan if switch.on else 1.0)

    model = make(long_sled(), dynamics=broken, reward_function=fares, **FOLLOWED)
    switch.on = True
    before = parameters(model)
    with pytest.raises(
        ValueError, match=r"dynamics returned next_state=\[nan, nan\] for state=\[.*\], action=[012]"
    ):
        model.learn(16)
    np.testing.assert_array_equal(parameters(model), before)


def test_a_jax_function_that_gives_nan_teaches_nothing():
    with pytest.raises(
        ValueError, match=r"dynamics returned next_state=\[.*nan.*\] for state=\[.*\], action=[012]"
    ):
        make(
            long_sled(), dynamics=lambda state, action: jnp.sqrt(state), reward_function=fares
        )  # seen at once

    def broken(state: Any, action: Any) -> Any:
        """On the grid of the starts, which no drawn state is on."""
        return jnp.where(state[0] * 64 % 1 == 0, jnp.nan, glide_jax(state, action))

    model = make(long_sled(), dynamics=broken, reward_function=fares, **FOLLOWED)
    before = parameters(model)
    with pytest.raises(FloatingPointError, match=r"[1-8] groups had a return that is NaN"):
        model.learn(16)
    np.testing.assert_array_equal(parameters(model), before)


# ---- what else must not happen


def test_a_simulator_takes_no_other_dynamics():
    with pytest.raises(ValueError, match="dynamics='learned' has no meaning in a GymnaxVecEnv"):
        make(GymnaxVecEnv("CartPole-v1", 2), dynamics="learned")


def test_candidates_may_become_episodes_and_nothing_is_branched_from_then_on():
    model = make(dummy(Sled))
    model.learn(8)
    before = model.simulator_steps
    model.candidates = "episodes"
    model.learn(8, reset_num_timesteps=False)
    assert model.simulator_steps == before > 0


def test_a_rollout_larger_than_the_replay_is_learned_from_all_the_same(monkeypatch):
    monkeypatch.setattr("sb3_bridge.alternatives.CAPACITY", 12)
    model = make(dummy(Uncopyable, 2), dynamics="learned", n_steps=16, batch_size=32)
    model.learn(32)
    assert int(model._alternatives._model.replay.count) == 12


def test_a_baseline_that_episodes_cannot_have_is_refused_at_once():
    with pytest.raises(ValueError, match="baseline='executed'"):
        make(dummy(Uncopyable), dynamics="learned", baseline="executed")


def test_a_learned_world_waits_in_a_model_that_has_no_env_yet():
    file = io.BytesIO()
    model = make(dummy(Uncopyable), dynamics="learned")
    model.learn(8)
    model.save(file)
    again = GRPO.load(io.BytesIO(file.getvalue()))
    copy_of_it = io.BytesIO()
    again.save(copy_of_it)  # without an env, and nothing is lost
    again = GRPO.load(io.BytesIO(copy_of_it.getvalue()))
    again.set_env(dummy(Uncopyable))
    chex.assert_trees_all_equal(again._alternatives.state_dict(), model._alternatives.state_dict())
    kept = again._alternatives
    again.set_env(dummy(Uncopyable))
    assert again._alternatives is kept


@pytest.mark.parametrize(("number", "text"), [(0.2668, "0.27"), (4.96, "5"), (7.62, "7.6"), (123.4, "120")])
def test_costs_are_told_in_two_digits(number, text):
    assert digits(number) == text
