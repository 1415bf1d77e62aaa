"""The compiled functions of a policy, and where they cannot run."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import torch

from grpo_jax.noise import bits_to_keys, bits_to_uniform
from grpo_jax.policies.policy import Policy, PolicyState
from grpo_jax.types import Observation


class Functions(NamedTuple):
    """What equal structures share. Batches ``[N, ...]``, A the action's shape.

    Attributes:
      init: key words uint32 ``[2]`` -> state.
      sample: (state, observation, words uint32 ``[N, n_uniforms]``) -> action in the environment's units ``[N, *A]``.
      mode: (state, observation) -> the most probable action ``[N, *A]``.
      parameters: (state, observation) -> distribution parameters ``[N, P]``.
      value: (state, observation) -> ``[N]``.
      log_prob: (parameters, action in the policy's own units) -> log density and entropy, ``[N]`` both.
    """

    init: Callable[..., PolicyState]
    sample: Callable[..., jax.Array]
    mode: Callable[..., jax.Array]
    parameters: Callable[..., jax.Array]
    value: Callable[..., jax.Array]
    log_prob: Callable[..., tuple[jax.Array, jax.Array]]


@functools.lru_cache(maxsize=128)
def functions_of(structure: Policy) -> Functions:
    """The compiled functions of a policy.

    They are closures: a static argument would be hashed at every call, which takes longer than the call.
    """
    distribution = structure.distribution

    def sample(state: PolicyState, observation: Observation, words: jax.Array) -> jax.Array:
        parameters = structure.parameters(state, observation)
        return structure.to_world(distribution.sample(parameters, bits_to_uniform(words)))

    def mode(state: PolicyState, observation: Observation) -> jax.Array:
        return structure.to_world(distribution.mode(structure.parameters(state, observation)))

    def log_prob(parameters: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        return distribution.log_prob(parameters, action), distribution.entropy(parameters)

    def init(words: jax.Array) -> PolicyState:
        return structure.init(bits_to_keys(words))

    def parameters(state: PolicyState, observation: Observation) -> jax.Array:
        return structure.parameters(state, observation)

    def value(state: PolicyState, observation: Observation) -> jax.Array:
        return structure.value(state, observation)

    jitted = [jax.jit(function) for function in (init, sample, mode, parameters, value, log_prob)]
    return Functions(*jitted)


class _Process:
    """Whether this process uses JAX, and whether it is the child of one that did: JAX's threads do not survive a fork."""

    uses_jax = False
    is_broken = False

    @classmethod
    def after_fork(cls) -> None:
        cls.is_broken = cls.is_broken or cls.uses_jax


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Process.after_fork)


def check_process() -> None:
    """Refuses to compute where that would never return.

    Raises:
      RuntimeError: this process was forked from one in which a policy had been used.
    """
    _Process.uses_jax = True
    if _Process.is_broken:
        raise RuntimeError(
            "this process was forked from one that uses JAX, whose threads do not survive a fork: a policy would hang"
            " here. Start processes by 'spawn' or 'forkserver' (SubprocVecEnv(..., start_method='forkserver'),"
            " multiprocessing.get_context('spawn')) and load the model there"
        )


def check_not_exported() -> None:
    """Refuses to become a constant in an exported program.

    Raises:
      RuntimeError: torch is tracing, compiling or exporting.
    """
    dynamo = torch._C._dynamo.eval_frame  # after a graph break, it alone knows that torch.compile is at work
    is_compiled = torch.compiler.is_compiling() or dynamo.get_eval_frame_callback() not in (None, False)
    if is_compiled or torch.jit.is_tracing():
        raise RuntimeError(
            "torch cannot trace, compile or export a GRPO policy, whose networks are JAX's: use model.to_torch(), which"
            " is the same policy in torch"
        )
