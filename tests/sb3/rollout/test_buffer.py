"""What callbacks read of a rollout: PPO's locals and buffer, and that nothing can be written into them."""

import collections
import copy
import pickle

import numpy as np
import pytest
import torch
from sb3.tracks import Track
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, EveryNTimesteps
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_bridge import GRPO, WorldVecEnv
from sb3_bridge.rollout import callbacks

SMALL = {"n_steps": 8, "batch_size": 16, "n_epochs": 1, "policy_kwargs": {"net_arch": [8]}, "seed": 0}
FIELDS = (
    "observations",
    "actions",
    "rewards",
    "episode_starts",
    "values",
    "log_probs",
    "returns",
    "advantages",
)
ENVS = {
    "host": lambda: DummyVecEnv([Track] * 2),
    "device": lambda: WorldVecEnv("CartPole-v1", n_envs=2, seed=0),
    "device box": lambda: WorldVecEnv("Pendulum-v1", n_envs=2, seed=0),
}


class Reader(BaseCallback):
    """Keeps the locals of every step, and the buffer's fields at the end of a rollout."""

    def __init__(self):
        super().__init__()
        self.steps, self.fields = [], {}

    def _on_step(self):
        names = ("obs_tensor", "actions", "values", "log_probs", "rewards", "dones", "new_obs")
        self.steps.append({name: copy.deepcopy(self.locals[name]) for name in names})
        self.steps[-1]["pos"] = self.locals["rollout_buffer"].pos
        return True

    def _on_rollout_end(self):
        buffer = self.model.rollout_buffer
        assert buffer is self.locals["rollout_buffer"]
        self.fields = {name: np.array(getattr(buffer, name)) for name in FIELDS}
        self.full, self.size = buffer.full, buffer.size()


def run(env, algorithm=GRPO, **settings):
    reader = Reader()
    model = algorithm("MlpPolicy", ENVS[env](), **SMALL, **settings)
    model.learn(16, callback=reader)
    return model, reader


@pytest.mark.parametrize("env", ENVS)
def test_locals_and_buffer_have_ppos_fields_and_agree_with_the_policy(env):
    _, reader = run(env, candidates="episodes")
    _, of_ppo = run(env, PPO)
    for name in FIELDS:
        assert reader.fields[name].shape == of_ppo.fields[name].shape, name
    for name, value in of_ppo.steps[0].items():
        mine = reader.steps[0][name]
        assert type(mine) is type(value), name
        assert np.shape(mine) == np.shape(value), name
    assert reader.full and reader.size == 8
    assert [step["pos"] for step in reader.steps] == list(range(8)), "as PPO: the step is not in it yet"
    for index, step in enumerate(reader.steps):
        fields = {name: field[index] for name, field in reader.fields.items()}
        np.testing.assert_array_equal(fields["actions"].reshape(step["actions"].shape), step["actions"])
        np.testing.assert_array_equal(fields["rewards"], step["rewards"])
        np.testing.assert_allclose(fields["values"], step["values"].numpy().ravel(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(fields["log_probs"], step["log_probs"].numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(fields["observations"], step["obs_tensor"].numpy())
    np.testing.assert_allclose(
        reader.fields["returns"], reader.fields["advantages"] + reader.fields["values"], rtol=1e-5, atol=1e-5
    )


def test_what_the_policy_thought_is_what_it_says_of_the_same_states():
    model = GRPO("MlpPolicy", ENVS["device box"](), candidates="episodes", **SMALL)
    before = copy.deepcopy(model.policy)
    reader = Reader()
    model.learn(16, callback=reader)
    step = reader.steps[3]
    values, log_prob, _ = before.evaluate_actions(step["obs_tensor"], torch.as_tensor(step["actions"]))
    np.testing.assert_allclose(step["values"], values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(step["log_probs"], log_prob, rtol=1e-5, atol=1e-5)


def test_returns_are_those_of_ppos_buffer():
    """Without an end, SB3's own buffer computes the same from the same numbers."""
    _, reader = run("device box", candidates="episodes")
    buffer = PPO("MlpPolicy", ENVS["device box"](), **SMALL).rollout_buffer
    for name in ("rewards", "values", "episode_starts"):
        setattr(buffer, name, reader.fields[name])
    fresh = GRPO("MlpPolicy", ENVS["device box"](), candidates="episodes", **SMALL)
    last = fresh.policy.predict_values(torch.as_tensor(reader.steps[-1]["new_obs"]))
    buffer.compute_returns_and_advantage(last, np.zeros(2))
    np.testing.assert_allclose(buffer.returns, reader.fields["returns"], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*no spread")
@pytest.mark.parametrize("env", ["host", "device"])
def test_without_a_critic_there_are_no_values(env):
    _, reader = run(env, candidates="episodes", bootstrap=False)
    assert reader.steps[0]["values"] is None
    assert np.isnan(reader.fields["values"]).all() and np.isnan(reader.fields["returns"]).all()
    assert np.isfinite(reader.fields["log_probs"]).all()


def writing(name):
    def write(buffer):
        getattr(buffer, name)[0] = 1.0

    return write


def add_in_place(buffer):
    buffer.rewards += 1.0


WRITES = {
    "item": writing("rewards"),
    "slice": lambda buffer: buffer.advantages.__setitem__(slice(None), 0),
    "in place": add_in_place,
    "attribute": lambda buffer: setattr(buffer, "rewards", np.zeros(3)),
    "add": lambda buffer: buffer.add(1, 2, 3, 4, 5, 6),
    "returns": lambda buffer: buffer.compute_returns_and_advantage(last_values=0, dones=0),
    "reset": lambda buffer: buffer.reset(),
}


@pytest.mark.parametrize("way", WRITES)
@pytest.mark.parametrize("env", ["host", "device"])
def test_what_is_written_into_the_buffer_is_refused_by_name(env, way):
    class Writer(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            WRITES[way](self.model.rollout_buffer)

    model = GRPO("MlpPolicy", ENVS[env](), candidates="episodes", **SMALL)
    with pytest.raises(ValueError, match="rollout_buffer is read-only.*reward_function"):
        model.learn(16, callback=Writer())


def test_minibatches_hold_every_row_once():
    model, _ = run("host", candidates="episodes")
    parts = list(model.rollout_buffer.get(5))
    assert [len(part.actions) for part in parts] == [5, 5, 5, 1]
    seen = torch.cat([part.observations for part in parts]).numpy()
    every = np.array(model.rollout_buffer.observations).swapaxes(0, 1).reshape(16, 2)
    assert sorted(map(tuple, seen)) == sorted(map(tuple, every))


def test_unknown_fields_and_early_reads_are_told():
    model = GRPO("MlpPolicy", ENVS["host"](), candidates="episodes", **SMALL)
    with pytest.raises(AttributeError, match="no step has been made"):
        _ = model.rollout_buffer.rewards
    with pytest.raises(AttributeError, match="rollout_buffer has no reward; it has observations"):
        _ = model.rollout_buffer.reward
    assert not model.rollout_buffer.full
    assert pickle.loads(pickle.dumps(model.rollout_buffer)).buffer_size == 8


class Outer(BaseCallback):
    """Calls others of its own accord, as SB3's EventCallback does not."""

    def __init__(self, *inner):
        super().__init__()
        self.inner = [Nothing(), *inner]

    def _init_callback(self):
        for one in self.inner:
            one.init_callback(self.model)

    def _on_step(self):
        return all(one.on_step() for one in self.inner)


class Nothing(BaseCallback):
    def _on_step(self):
        return True


@pytest.mark.parametrize("env", ["host", "device"])
def test_the_policy_is_asked_for_values_only_when_they_are_read(env, monkeypatch):
    count = collections.Counter()
    thinks = callbacks.StepLocals.think

    def counted(locals_, thoughts):
        thinks(locals_, lambda: count.update(["thought"]) or thoughts())

    monkeypatch.setattr(callbacks.StepLocals, "think", counted)
    GRPO("MlpPolicy", ENVS[env](), candidates="episodes", **SMALL).learn(16, callback=Outer())
    assert count["thought"] == 0
    GRPO("MlpPolicy", ENVS[env](), candidates="episodes", **SMALL).learn(16, callback=Reader())
    assert count["thought"] == 8, "once for a step, whatever is read"


@pytest.mark.parametrize("env", ["host", "device"])
def test_callbacks_read_values_wherever_they_are(env):
    alone, within, listed, function = Reader(), Reader(), Reader(), []
    for callback in (
        alone,
        EveryNTimesteps(2, within),
        [Nothing(), Outer(listed)],
        lambda locals_, _: function.append(dict(locals_)) or True,
    ):
        model = GRPO("MlpPolicy", ENVS[env](), candidates="episodes", **SMALL)
        model.learn(16, callback=callback)
    for step, other, last, mine in zip(alone.steps, within.steps, listed.steps, function, strict=True):
        for name in ("values", "log_probs", "obs_tensor"):
            torch.testing.assert_close(step[name], other[name], rtol=0, atol=0)
            torch.testing.assert_close(step[name], last[name], rtol=0, atol=0)
            torch.testing.assert_close(step[name], mine[name], rtol=0, atol=0)
    assert "values" in mine and mine.keys() >= {"self", "infos", "log_probs", "obs_tensor"}
