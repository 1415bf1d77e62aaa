"""What is logged and printed, in every regime; PPO's keys and first update are the oracle."""

import csv
import json
import re

import numpy as np
import pytest
from sb3.contract import (
    BOX,
    CONSTANT,
    KINDS,
    LINE,
    N_STEPS,
    ROLLOUT,
    copy_parameters,
    log_of,
    make,
    on_both,
    weights,
)
from stable_baselines3 import PPO
from stable_baselines3.common.logger import configure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_bridge import GRPO


@pytest.mark.parametrize(
    ("kind", "world", "candidates"),
    [
        ("host", LINE, "episodes"),
        ("host", BOX, "episodes"),
        ("host", LINE, "auto"),
        ("device", LINE, "auto"),
    ],
)
def test_all_of_ppos_keys_are_logged_with_a_critic(kind, world, candidates):
    settings = {"clip_range_vf": 0.2}
    ppo = log_of(make(PPO, kind, world, **settings), 3 * ROLLOUT)
    settings |= {"bootstrap": True, "candidates": candidates}
    grpo = log_of(make(GRPO, kind, world, **settings), 3 * ROLLOUT)
    for theirs, ours in zip(ppo, grpo, strict=True):
        extra = {name for name in ours if name.startswith("grpo/")}
        assert set(ours) == set(theirs) | extra
        counts = [name for name in theirs if isinstance(theirs[name], int)]
        assert counts and all(isinstance(ours[name], int) for name in counts)
        assert all(np.isfinite(value) for value in ours.values())
    assert {"grpo/group_spread", "grpo/frac_zero_std", "grpo/simulator_steps"} <= set(grpo[1])
    assert ("grpo/world_error" in grpo[1]) == (candidates == "auto")
    assert (grpo[1]["grpo/simulator_steps"] > 0) == (candidates == "auto")
    assert ("train/std" in grpo[1]) == (world is BOX)


@on_both
def test_without_a_critic_its_keys_are_absent(kind):
    theirs = log_of(make(PPO, kind), 2 * ROLLOUT)[1]
    ours = log_of(make(GRPO, kind, bootstrap=False), 2 * ROLLOUT)[1]
    missing = {name for name in theirs if name not in ours}
    assert missing == {"train/value_loss", "train/explained_variance"}


def test_the_first_update_is_ppos():
    """Same parameters, an environment that ignores actions, one step on the whole batch: equal values, not only keys."""
    settings = {"n_epochs": 1, "batch_size": ROLLOUT, "n_steps": N_STEPS, "ent_coef": 0.1, "vf_coef": 0.7}
    ppo = make(PPO, "host", CONSTANT, **settings)
    grpo = make(GRPO, "host", CONSTANT, candidates="episodes", **settings)
    copy_parameters(ppo, grpo)
    theirs, ours = (log_of(model, 2 * ROLLOUT)[1] for model in (ppo, grpo))
    for name in ("entropy_loss", "value_loss", "explained_variance", "loss", "clip_range", "learning_rate"):
        np.testing.assert_allclose(ours[f"train/{name}"], theirs[f"train/{name}"], rtol=1e-4, err_msg=name)
    for name in ("policy_gradient_loss", "approx_kl", "clip_fraction"):
        np.testing.assert_allclose(ours[f"train/{name}"], theirs[f"train/{name}"], atol=1e-5, err_msg=name)
    assert ours["train/n_updates"] == theirs["train/n_updates"] == 1
    assert theirs["train/value_loss"] > 0.1 and theirs["train/entropy_loss"] < -0.1
    for name in ("rollout/ep_rew_mean", "rollout/ep_len_mean"):
        assert ours[name] == theirs[name] == 5


def test_clip_fraction_counts_as_ppo():
    """All ratios beyond the bounds, whatever the advantages: none at the first minibatch, every one at the second."""
    settings = {"batch_size": ROLLOUT, "learning_rate": 0.05, "clip_range": 1e-6, "max_grad_norm": 1e9}
    kinds = [(PPO, {}), (GRPO, {"candidates": "episodes"}), (GRPO, {})]
    rows = [log_of(make(algorithm, "host", **settings, **own), 2 * ROLLOUT)[1] for algorithm, own in kinds]
    assert [row["train/clip_fraction"] for row in rows] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("target_kl", [1e-9, 100.0])
def test_n_updates_counts_epochs_that_were_begun(target_kl):
    counts = []
    for algorithm, own in [(PPO, {}), (GRPO, {"candidates": "episodes"}), (GRPO, {})]:
        rows = log_of(make(algorithm, "host", target_kl=target_kl, learning_rate=0.01, **own), 3 * ROLLOUT)
        counts.append([row["train/n_updates"] for row in rows[1:]])
    # Of two minibatches each: the first changes the policy, the second finds it too far.
    assert counts == [[2, 4] if target_kl == 100 else [1, 2]] * 3


@on_both
def test_log_files(kind, tmp_path):
    """The four formats hold the same, as for PPO; TensorBoard leaves out what PPO leaves out."""
    keys = []
    for algorithm in (PPO, GRPO):
        folder = tmp_path / algorithm.__name__
        model = make(algorithm, kind)
        logger = configure(str(folder), ["csv", "json", "tensorboard", "log"])
        model.set_logger(logger)
        assert model.logger is logger
        model.learn(3 * ROLLOUT)
        assert model.logger is logger
        logger.close()
        with open(folder / "progress.csv", newline="") as file:
            table = list(csv.DictReader(file))
        lines = [json.loads(line) for line in (folder / "progress.json").read_text().splitlines()]
        assert len(table) == len(lines) == 3
        for row, line in zip(table, lines, strict=True):
            assert {name: float(value) for name, value in row.items() if value} == pytest.approx(line)
        events = EventAccumulator(str(folder)).Reload()
        scalars = set(events.Tags()["scalars"])
        assert [event.step for event in events.Scalars("rollout/ep_rew_mean")] == [32, 64, 96]
        assert [event.step for event in events.Scalars("train/loss")] == [64, 96]
        text = (folder / "log.txt").read_text()
        assert text.count("total_timesteps") == 3 and "approx_kl" in text
        ours = {name for name in lines[-1] if name.startswith("grpo/")}
        keys.append((set(lines[-1]) - ours, scalars - ours))
        absent = {"time/iterations", "time/time_elapsed", "time/total_timesteps", "train/n_updates"}
        assert set(lines[-1]) - scalars == absent
    missing = {"train/value_loss", "train/explained_variance"} if kind == "device" else set()
    assert keys[1] == tuple(names - missing for names in keys[0])


@pytest.mark.parametrize("kind", [*KINDS, "episodes"])
@pytest.mark.parametrize("verbose", [0, 1])
def test_what_is_printed(kind, verbose, capsys):
    printed = []
    for algorithm, own in ((PPO, {}), (GRPO, {"candidates": "episodes"} if kind == "episodes" else {})):
        capsys.readouterr()
        make(algorithm, kind, verbose=verbose, **own).learn(2 * ROLLOUT, log_interval=2)
        captured = capsys.readouterr()
        assert captured.err == ""
        printed.append(captured.out.splitlines())
    if verbose == 0:
        assert printed == [[], []]
        return
    theirs, ours = (
        {line.split("|")[1].strip() for line in lines if line.startswith("|")} for lines in printed
    )
    critic = {"value_loss", "explained_variance"} if kind == "device" else set()
    assert theirs - ours == critic
    assert {"grpo/", "group_spread", "frac_zero_std", "simulator_steps"} <= ours - theirs
    before = [[line for line in lines if not line.startswith(("|", "-"))] for lines in printed]
    assert set(before[0]) <= set(before[1])
    (told,) = set(before[1]) - set(before[0])
    expected = {
        "episodes": "GRPO: the episodes of a rollout are compared, nothing is branched; with a critic",
        "device": "GRPO: all 2 actions of every state are followed for 4 steps in the simulator; without a critic",
        "host": "GRPO: all 2 actions of every state are followed for 4 steps in exact clones by attributes (replay check"
        " passed; # us a snapshot, # a restore, # a step); with a critic (dynamics='auto': branches take # ms a decision"
        " step)",
    }
    numbers = re.escape(expected[kind]).replace("\\#", r"\d+(\.\d+)?(e[+-]\d+)?")
    assert re.fullmatch(numbers, told), told


REGIMES = {
    "kl": {"kl_coef": 0.1, "reference": "ema", "surrogate": "cispo", "n_rollouts": 2},
    "critic": {"bootstrap": True, "surrogate": "sapo", "clip_range_vf": 0.2},
    "target": {"kl_coef": 0.05, "kl_estimator": "k3", "surrogate": "tpo", "backup": "max", "n_rollouts": 3},
    "clip": {"clip_range_high": 0.4, "target_kl": 1e-9, "n_epochs": 5, "learning_rate": 0.1},
    "episodes": {"candidates": "episodes", "bootstrap": False, "kl_coef": 0.1},
    "episodes with a critic": {"candidates": "episodes", "surrogate": "cispo", "target_kl": 0.5},
    "trajectory": {"candidates": "trajectory", "group_size": 2, "surrogate": "sapo"},
}


@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_runs_and_logs(regime):
    arguments = REGIMES[regime]
    model = make(GRPO, "device", **arguments)
    before, total = weights(model), 4 * ROLLOUT
    rows = log_of(model, total)[1:]
    row = rows[-1]
    assert all(np.isfinite(value) for name, value in row.items() if name != "train/explained_variance")
    names = ("loss", "approx_kl", "clip_fraction", "entropy_loss", "n_updates", "policy_gradient_loss")
    expected = {f"train/{name}" for name in (*names, "clip_range", "learning_rate")}
    names = ("group_spread", "frac_zero_std", "grad_norm", "simulator_steps")
    assert expected | {f"grpo/{name}" for name in names} <= set(row)
    critic = {"train/value_loss", "train/explained_variance"}
    assert critic <= set(row) if model.bootstrap else not critic & set(row)
    is_branched = "candidates" not in arguments
    assert ("grpo/kl" in row) == ("kl_coef" in arguments)
    assert ("grpo/world_error" in row) == is_branched
    assert ("train/clip_range_vf" in row) == ("clip_range_vf" in arguments)
    assert model.num_timesteps == total
    assert not np.array_equal(before, weights(model))
    most = total * 2 * 4 * arguments.get("n_rollouts", 1) if is_branched else 0
    assert most / 2 <= model.simulator_steps <= most  # branches end where episodes do
    if "kl_coef" in arguments:
        assert rows[0]["grpo/kl"] < row["grpo/kl"]
    # target_kl=1e-9 stops every iteration in its first epoch
    assert [row["train/n_updates"] for row in rows] == ([1, 2, 3] if regime == "clip" else [2, 4, 6])
