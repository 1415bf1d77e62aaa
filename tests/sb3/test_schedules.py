"""Schedules and attributes that change in training; PPO is the oracle."""

import io
import itertools
import warnings

import numpy as np
import pytest
from sb3.contract import LONG_BOX, ROLLOUT, log_of, make, on_both, weights
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import (
    BaseCallback,
)
from stable_baselines3.common.utils import (
    FloatSchedule,
    LinearSchedule,
    constant_fn,
    get_linear_fn,
    get_schedule_fn,
)

from sb3_bridge import GRPO


@on_both
def test_schedules_are_asked_as_ppo_asks(kind):
    settings = {
        "learning_rate": lambda left: 1e-3 * left,
        "clip_range": lambda left: 0.1 + 0.2 * left,
        "clip_range_vf": lambda left: 0.3 * left + 0.1,
    }
    logs = []
    for algorithm in (PPO, GRPO):
        own = {"bootstrap": True} if algorithm is GRPO else {}
        model = make(algorithm, kind, **settings, **own)
        rows = log_of(model, 4 * ROLLOUT)
        rows += log_of(model, ROLLOUT, reset_num_timesteps=False)
        model.logger.dump(0)  # what the last iteration logged
        rows = [*rows, model.logger.output_formats[0].rows[-1]]
        names = ("train/learning_rate", "train/clip_range", "train/clip_range_vf")
        logs.append([[row.get(name) for name in names] for row in rows])
    assert logs[1] == logs[0]
    expected = [[1e-3 * left, 0.1 + 0.2 * left, 0.3 * left + 0.1] for left in (0.75, 0.5, 0.25)]
    assert logs[1][1:4] == [pytest.approx(row) for row in expected]


@on_both
def test_no_schedule_is_asked_for_what_lies_behind_the_end(kind):
    asked = []

    def schedule(left):
        asked.append(left)
        return 1e-3 * left

    model = make(GRPO, kind, learning_rate=schedule)
    rows = log_of(model, ROLLOUT + 1)
    assert min(asked) == 0 and max(asked) == 1 and len(rows) == 2
    assert rows[1]["train/learning_rate"] == pytest.approx(1e-3 / (ROLLOUT + 1))


@on_both
@pytest.mark.parametrize("name", ["learning_rate", "clip_range"])
def test_schedules_are_what_is_trained_with(kind, name):
    """A learning rate that falls to 0 learns nothing more; without room to clip, a second minibatch adds nothing."""
    total = 4 * ROLLOUT

    def weights_at_each_rollout(**settings):
        seen = []

        class Watch(BaseCallback):
            def _on_step(self):
                return True

            def _on_rollout_start(self):
                seen.append(weights(self.model))

        model = make(GRPO, kind, **settings).learn(total, Watch())
        return [*seen, weights(model)]

    if name == "learning_rate":
        seen = weights_at_each_rollout(learning_rate=lambda left: 1e-2 if left > 0.4 else 0.0)
        moved = [not np.array_equal(a, b) for a, b in itertools.pairwise(seen)]
        assert moved == [True, True, False, False]
    else:
        settings = {"learning_rate": 1e-2, "n_epochs": 2, "batch_size": ROLLOUT, "max_grad_norm": 1e9}
        tight = weights_at_each_rollout(**settings, clip_range=lambda left: 0.2 if left > 0.8 else 1e-9)
        wide = weights_at_each_rollout(**settings, clip_range=0.2)
        same = [np.array_equal(a, b) for a, b in zip(tight, wide, strict=True)]
        assert same == [True, False, False, False, False]  # left is 0.75 at the first update


@on_both
def test_attributes_that_change_in_training_take_effect(kind):
    class Change(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            if self.num_timesteps == 2 * ROLLOUT:
                self.model.ent_coef = 10.0

    rows = {}
    for algorithm in (PPO, GRPO):
        model = make(algorithm, kind, learning_rate=0.0)
        log_of(model, 3 * ROLLOUT, Change())
        rows[algorithm] = model.logger.output_formats[0].rows
        loss = [row["train/loss"] for row in rows[algorithm][1:]]
        entropy = -rows[algorithm][2]["train/entropy_loss"]
        # With learning_rate=0 the entropy stays log 2, and so does all of the loss but its bonus, nearly.
        assert entropy == pytest.approx(np.log(2), abs=1e-3)
        policy = [row["train/policy_gradient_loss"] for row in rows[algorithm][1:]]
        if algorithm is GRPO and kind == "device":
            assert loss[0] == pytest.approx(policy[0], abs=1e-6)
            assert loss[1] == pytest.approx(policy[1] - 10 * entropy, rel=1e-5)
        assert loss[1] < loss[0] - 4


@pytest.mark.parametrize("kind", ["host", "device"])
def test_actions_persist_in_rollouts(kind):
    """Persistence is a function of the remaining progress here: all actions are repeated, then none has to be."""
    actions = []

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            actions.append(np.array(self.locals["actions"]))
            return True

    model = make(GRPO, kind, LONG_BOX, n_steps=8, persistence=lambda remaining: float(remaining > 0.75))
    model.learn(2 * 8 * model.n_envs, callback=Watch())
    taken = np.stack(actions)  # [2 * 8, N, 1]
    assert (taken[1:8] == taken[:1]).all()
    assert (taken[9:] != taken[8:-1]).any()


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SB3's old makers are deprecated
    RATES = {
        "number": 0.05,
        "integer": 1,
        "NumPy": np.float64(0.05),
        "NumPy, single": np.float32(0.05),
        "NumPy, integer": np.int64(1),
        "array": np.array(0.05),
        "function": lambda left: 0.1 * left,
        "NumPy function": lambda left: np.float32(0.1 * left),
        "linear": LinearSchedule(0.2, 0.1, 0.5),
        "old linear": get_linear_fn(0.2, 0.1, 0.5),
        "old constant": constant_fn(0.05),
        "old wrapped": get_schedule_fn(0.05),
    }
SCHEDULES = ("clip_range", "clip_range_vf", "clip_range_high", "learning_rate")


@pytest.mark.parametrize("rate", RATES)
def test_schedules_are_sb3s_however_they_come(rate):
    """Through the constructor, the arguments of ``load``, and a file."""
    given = dict.fromkeys(SCHEDULES, RATES[rate])
    file, with_rates = io.BytesIO(), io.BytesIO()
    make(GRPO, "host", candidates="episodes").save(file)
    made = make(GRPO, "host", candidates="episodes", **given)
    made.save(with_rates)
    functions = (
        {} if "function" not in rate else given
    )  # a function of the user's comes through custom_objects
    models = [
        made,
        GRPO.load(io.BytesIO(file.getvalue()), **given),
        GRPO.load(io.BytesIO(file.getvalue()), custom_objects=given),
        GRPO.load(io.BytesIO(with_rates.getvalue()), custom_objects=functions),
    ]
    plain = RATES[rate] if callable(RATES[rate]) else float(RATES[rate])
    expected = FloatSchedule(plain)
    for model in models:
        for name in (*SCHEDULES[:3], "lr_schedule"):
            schedule = getattr(model, name)
            assert type(schedule) is FloatSchedule, name
            values = [schedule(left) for left in (1.0, 0.4, 0.0)]
            assert values == [expected(left) for left in (1.0, 0.4, 0.0)], name
            assert {type(value) for value in values} == {float}
