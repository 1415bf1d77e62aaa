"""Models leave no program and no function behind, and share both as long as the function lives."""

import gc
import weakref

import gymnasium
import jax.numpy as jnp
import numpy as np
import pytest

from sb3_bridge import GRPO, WorldVecEnv
from sb3_bridge.functions.programs import OwnedJit

SETTINGS = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "horizon": 2, "seed": 0, "device": "cpu"}


def learn(regime, reward, step):
    env = WorldVecEnv("CartPole-v1", 2, seed=0) if regime == "simulator" else gymnasium.make("CartPole-v1")
    dynamics = {"simulator": "auto", "function": step}.get(regime, regime)
    model = GRPO("MlpPolicy", env, reward_function=reward, dynamics=dynamics, **SETTINGS)
    model.learn(16)
    env.close()


def living():
    """The programs that belong to a user's function, by place."""
    jits = (each for each in gc.get_objects() if type(each) is OwnedJit)
    return {(id(jit), owners) for jit in jits for owners in jit._programs}


def functions(weight, absolute):
    return lambda s, a, n: weight * absolute(n[2]), lambda s, a: s + 0.01 * (2.0 * a - weight)


@pytest.mark.parametrize(
    ("regime", "absolute"),
    [
        ("simulator", jnp.abs),
        ("simulator", np.abs),
        ("function", jnp.abs),
        ("clone", jnp.abs),
        ("learned", jnp.abs),
    ],
)
def test_a_new_function_leaves_nothing_behind(regime, absolute):
    gc.collect()
    before = living()
    reward, step = functions(2.0, absolute)
    learn(regime, reward, step)
    own = living() - before
    assert own
    learn(regime, reward, step)  # the same functions: the programs of the first model
    assert living() - before == own
    dead = weakref.ref(reward), weakref.ref(step)
    del reward, step
    gc.collect()
    assert not living() - before
    assert not any(function() for function in dead)
