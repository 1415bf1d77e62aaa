"""A run that is killed goes on from a checkpoint of SB3's own callback, bit for bit as the run that was not killed."""

from __future__ import annotations

import json
import warnings
import zipfile

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from sb3.files.checks import edited
from sb3.files.models import ROLLOUT, assert_equal_state, make, make_env
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor, VecNormalize

from sb3_bridge import GRPO

TOTAL = 5 * ROLLOUT
EVERY = 11  # steps of two environments: in the middle of rollouts


def pendulums(kind=DummyVecEnv):
    return make_vec_env("Pendulum-v1", 2, vec_env_cls=kind)


class Opaque(gym.Env):
    """Holds what nobody can copy."""

    observation_space, action_space = spaces.Box(-1, 1, (4,)), spaces.Discrete(2)

    def __init__(self):
        self.stream = (number for number in range(10**6))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 4).astype(np.float32), {}

    def step(self, action):
        truncated = next(self.stream) % 5 == 4
        return self.np_random.uniform(-1, 1, 4).astype(np.float32), float(action), False, truncated, {}


# The environments, the arguments of the model, and of load.
KINDS = {
    "device": (lambda: make_env("device"), {"horizon": 4}, {}),
    "device with a monitor": (lambda: VecMonitor(make_env("device")), {"horizon": 4}, {}),
    "twin": (lambda: make_env("host"), {"horizon": 4}, {}),
    "clones, normalized": (lambda: VecNormalize(make_env("host")), {"horizon": 4}, {}),
    "clones in workers": (
        lambda: make_vec_env("FrozenLake-v1", 2, vec_env_cls=SubprocVecEnv),
        {"horizon": 4},
        {},
    ),
    "learned": (pendulums, {"dynamics": "learned", "horizon": 4}, {}),
    "episodes": (pendulums, {"candidates": "episodes", "bootstrap": True}, {}),
    "pickled": (lambda: make_vec_env("gymnax/CartPole-v1", 2), {"horizon": 4}, {"allow_pickle": True}),
}


@pytest.mark.filterwarnings("ignore:.*has no meaning here", "ignore:The environment is already wrapped")
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_bit_for_bit(kind, tmp_path):
    make_envs, settings, reading = KINDS[kind]
    whole = make("host", make_envs(), **settings)
    whole.learn(TOTAL, callback=CheckpointCallback(EVERY, tmp_path, save_vecnormalize=True))
    files = sorted(tmp_path.glob("*.zip"), key=lambda path: int(path.name.split("_")[2]))
    assert len(files) == TOTAL // (2 * EVERY)
    for path in files[:: len(files) - 1]:
        env = make_envs()
        if isinstance(env, VecNormalize):  # as SB3's documentation has it; its statistics are later ones
            name = path.name.replace("model_", "model_vecnormalize_").replace("zip", "pkl")
            env = VecNormalize.load(str(tmp_path / name), env.venv)
        model = GRPO.load(path, env=env, force_reset=False, **reading)
        assert model.num_timesteps % ROLLOUT == 0  # where the rollout began
        model.learn(TOTAL - model.num_timesteps, reset_num_timesteps=False)
        assert_equal_state(model, whole)
        if isinstance(env, VecNormalize):
            for name in ("obs_rms", "ret_rms"):
                one, other = (getattr(each.get_env(), name) for each in (model, whole))
                np.testing.assert_equal(vars(one), vars(other))
        env.close()


def test_so_does_one_that_is_saved_between_two_calls(tmp_path):
    whole = make("host", make_env("host"), horizon=4).learn(2 * ROLLOUT)
    whole.save(tmp_path / "half")
    whole.learn(2 * ROLLOUT, reset_num_timesteps=False)
    model = GRPO.load(tmp_path / "half", env=make_env("host"), force_reset=False)
    model.learn(2 * ROLLOUT, reset_num_timesteps=False)
    assert_equal_state(model, whole)


def test_by_default_environments_start_anew(tmp_path):
    model = make("host", make_env("host"), horizon=4).learn(ROLLOUT)
    model.save(tmp_path / "m")
    assert GRPO.load(tmp_path / "m", env=make_env("host"))._last_obs is None


def test_what_cannot_be_copied_is_said_once(tmp_path):
    env = DummyVecEnv([Opaque, Opaque])
    model = make("host", env, candidates="episodes", bootstrap=True).learn(ROLLOUT)
    model.save(tmp_path / "m")
    with pytest.warns(UserWarning, match=r"start anew.*Opaque\.stream cannot be copied") as caught:
        loaded = GRPO.load(tmp_path / "m", env=DummyVecEnv([Opaque, Opaque]), force_reset=False)
    assert len(caught) == 1
    loaded.learn(ROLLOUT, reset_num_timesteps=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GRPO.load(tmp_path / "m", env=env)


def changed(path, change):
    """The file with other states of its environments."""
    data = json.loads(zipfile.ZipFile(path).read("data"))
    change(data["_environments"][":plain:"])
    return edited(path.read_bytes(), data=json.dumps(data))


def first_layer(form):
    return form["host"][0]["state"][0][-1]


def replace_a_method(form):
    first_layer(form)["step"] = 3


def set_a_text(form):
    first_layer(form)["_log_path"] = "/somewhere"


def leave_an_environment_out(form):
    del form["host"][1:]


def use_other_wrappers(form):
    form["wrappers"].append({"name": "VecNormalize"})


def count_backwards(form):
    form["before"]["num_timesteps"] = -4


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (replace_a_method, "would replace CartPoleEnv.step"),
        (set_a_text, "_log_path to a text.*allow_pickle=True"),
        (leave_an_environment_out, ""),
        (use_other_wrappers, "were in the wrappers"),
        (count_backwards, "num_timesteps=-4 is not an integer of at least 0"),
    ],
)
def test_a_hostile_place_changes_nothing(change, why, tmp_path):
    model = make("host", make_env("host"), horizon=4)
    model.learn(2 * ROLLOUT, callback=CheckpointCallback(EVERY, tmp_path))
    (path,) = tmp_path.glob("*_22_*.zip")
    env = make_env("host")
    with pytest.warns(UserWarning, match=f"start anew.*{why}"):
        loaded = GRPO.load(changed(path, change), env=env, force_reset=False)
    assert "step" not in vars(env.envs[0].unwrapped) and loaded.num_timesteps == 22
    loaded.learn(ROLLOUT, reset_num_timesteps=False)


def test_the_states_can_be_left_out(tmp_path):
    model = make("device", reward_function=None).learn(ROLLOUT)
    model.save(tmp_path / "with")
    model.save(tmp_path / "without", exclude=["_environments"])
    assert (tmp_path / "without.zip").stat().st_size < (tmp_path / "with.zip").stat().st_size
    with pytest.warns(UserWarning, match="it says nothing of environments"):
        GRPO.load(tmp_path / "without", env=make_env("device"), force_reset=False)
