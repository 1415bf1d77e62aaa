"""Parameters that are read and set, and policies that are saved alone; PPO is the oracle."""

from __future__ import annotations

import copy

import jax
import numpy as np
import pytest
import torch
from sb3.files.models import (
    KINDS,
    OBSERVATIONS,
    ROLLOUT,
    assert_equal_parameters,
    assert_equal_state,
    differ,
    make,
    make_env,
    make_ppo,
    parameters_of,
    raised,
    saved,
)
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_bridge import GRPO, MlpPolicy
from sb3_bridge.files.model_zip import save_zip


def test_parameters_are_copies(trained):
    model = trained["host"]
    before = parameters_of(model)
    for tensor in model.get_parameters()["policy"].values():
        tensor += 1
    jax.tree.map(np.testing.assert_array_equal, parameters_of(model), before)
    assert {type(tensor) for tensor in model.get_parameters()["policy"].values()} == {torch.Tensor}


def test_parameters_are_taken_over(trained, ppo):
    for model, fresh in ((trained["host"], make("host", seed=1)), (ppo, make_ppo(seed=1))):
        assert (
            fresh.get_parameters().keys() == model.get_parameters().keys() == {"policy", "policy.optimizer"}
        )
        before = fresh.predict(OBSERVATIONS, deterministic=True)[0]
        fresh.set_parameters(model.get_parameters())
        after = fresh.predict(OBSERVATIONS, deterministic=True)[0]
        groups = [one.get_parameters()["policy.optimizer"]["param_groups"] for one in (fresh, model)]
        assert groups[0][0]["lr"] == groups[1][0]["lr"]
        np.testing.assert_array_equal(after, model.predict(OBSERVATIONS, deterministic=True)[0])
        assert before.shape == after.shape


def test_parameters_are_taken_from_a_file(trained, tmp_path):
    model = trained["device"]
    model.save(tmp_path / "model")
    for path in (str(tmp_path / "model"), tmp_path / "model.zip", saved(model)):
        fresh = make("device", seed=1)
        fresh.set_parameters(path)
        assert_equal_parameters(fresh, model)
        assert fresh.num_timesteps == 0


def wrong_parameters(good, name):
    policy, optimizer = dict(good["policy"]), good["policy.optimizer"]
    first = next(iter(policy))
    return {
        "nothing": {},
        "policy alone": {"policy": policy},
        "optimizer alone": {"policy.optimizer": optimizer},
        "unknown object": {"policy": policy, "policy.optimizer": optimizer, "actor": {}},
        "missing name": {
            "policy": {k: v for k, v in policy.items() if k != first},
            "policy.optimizer": optimizer,
        },
        "unknown name": {"policy": {**policy, "more": torch.zeros(1)}, "policy.optimizer": optimizer},
        "wrong shape": {"policy": {**policy, first: torch.zeros(3, 3)}, "policy.optimizer": optimizer},
    }[name]


# The errors of SB3's PPO: with and without exact_match. None: it is taken.
ERRORS = {
    "nothing": (ValueError, None),
    "policy alone": (ValueError, None),
    "optimizer alone": (ValueError, None),
    "unknown object": (ValueError, ValueError),
    "missing name": (RuntimeError, None),
    "unknown name": (RuntimeError, None),
    "wrong shape": (RuntimeError, RuntimeError),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("exact_match", [True, False])
def test_wrong_parameters_are_ppos_errors(name, exact_match, trained, ppo):
    expected = ERRORS[name][0 if exact_match else 1]
    for model in (GRPO.load(saved(trained["host"])), PPO.load(saved(ppo))):
        given = wrong_parameters(model.get_parameters(), name)
        if expected is None:
            model.set_parameters(given, exact_match=exact_match)
        else:
            assert raised(lambda m=model, g=given: m.set_parameters(g, exact_match=exact_match)) is expected


@pytest.mark.parametrize("exact_match", [True, False])
def test_a_file_of_another_network_is_ppos_error(exact_match, trained, ppo, tmp_path):
    other = {"policy_kwargs": {"net_arch": [9]}}
    for model, wider in ((trained["host"], make("host", **other)), (ppo, make_ppo(**other))):
        wider.save(tmp_path / "wider")
        before = parameters_of(model) if model is not ppo else None
        with pytest.raises(RuntimeError):
            model.set_parameters(str(tmp_path / "wider"), exact_match=exact_match)
        if before is not None:
            jax.tree.map(np.testing.assert_array_equal, parameters_of(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_parameters_act_and_learn(kind, trained):
    """However they come in, they are those that predict uses and that training starts from."""
    good = trained[kind].get_parameters()

    def through_policy(model):
        model.policy.load_state_dict(good["policy"])
        model.policy.optimizer.load_state_dict(good["policy.optimizer"])

    def through_vector(model):
        model.policy.load_from_vector(trained[kind].policy.parameters_to_vector())
        model.policy.optimizer.load_state_dict(good["policy.optimizer"])

    models = []
    for load in (through_policy, through_vector, lambda model: model.set_parameters(good), lambda _: None):
        models.append(make(kind, seed=1))
        load(models[-1])
    logits = [
        model.policy.get_distribution(torch.as_tensor(OBSERVATIONS)).distribution.logits.numpy()
        for model in models
    ]
    expected = trained[kind].policy.get_distribution(torch.as_tensor(OBSERVATIONS)).distribution.logits
    for values in logits[:3]:
        np.testing.assert_array_equal(values, expected)
    assert np.any(logits[3] != logits[0])
    for model in models:
        model.learn(ROLLOUT)
    assert_equal_state(models[0], models[1])
    assert_equal_state(models[0], models[2])
    assert differ(models[0], models[3])
    assert differ(models[0], trained[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_has_a_file_of_its_own(kind, trained, tmp_path, no_pickle):
    policy = trained[kind].policy
    policy.save(tmp_path / "policy.zip")
    loaded = MlpPolicy.load(tmp_path / "policy.zip")
    jax.tree.map(np.testing.assert_array_equal, loaded.state, policy.state)
    np.testing.assert_array_equal(
        loaded.predict(OBSERVATIONS, deterministic=True)[0],
        trained[kind].predict(OBSERVATIONS, deterministic=True)[0],
    )
    assert loaded.has_critic == (kind == "host")
    with pytest.raises(ValueError, match=r"GRPO\.load"):
        MlpPolicy.load(saved(trained[kind]))
    with pytest.raises(KeyError, match="policy_class"):
        GRPO.load(tmp_path / "policy.zip")


def test_a_copied_policy_stays_while_the_model_learns():
    model = make("host").learn(ROLLOUT)
    twin = copy.deepcopy(model.policy)
    before = {name: leaf.clone() for name, leaf in twin.state_dict().items()}
    np.testing.assert_array_equal(twin.predict(OBSERVATIONS)[0], model.predict(OBSERVATIONS)[0])
    model.learn(ROLLOUT, reset_num_timesteps=False)
    torch.testing.assert_close(twin.state_dict(), type(twin.state_dict())(before), rtol=0, atol=0)
    assert any(torch.any(leaf != before[name]) for name, leaf in model.policy.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_policy_takes_either(kind, trained):
    model = trained[kind]

    def evaluate(actor):
        env = make_env(kind)
        env.seed(3)
        return evaluate_policy(actor, env, n_eval_episodes=3, return_episode_rewards=True)

    assert evaluate(model) == evaluate(model.policy) == evaluate(GRPO.load(saved(model)))
    assert len(evaluate(model)[0]) == 3


def test_a_policys_file_needs_all_that_it_is_made_from(tmp_path):
    def mine(x):
        return x

    model = make("host", policy_kwargs={"net_arch": [8], "activation_fn": mine})
    model.policy.save(tmp_path / "policy")
    with pytest.warns(UserWarning, match="left out activation_fn"):
        MlpPolicy.load(tmp_path / "policy")
    loaded = MlpPolicy.load(tmp_path / "policy", custom_objects={"activation_fn": mine})
    assert loaded.activation_fn is mine
    assert MlpPolicy.load(tmp_path / "policy", allow_pickle=True).activation_fn(3) == 3
    save_zip(tmp_path / "other", {"wrong": 1}, {"policy": {"x": np.zeros(2)}})
    with pytest.raises(ValueError, match="other does not hold what the policy is made from.*custom_objects"):
        MlpPolicy.load(tmp_path / "other")
