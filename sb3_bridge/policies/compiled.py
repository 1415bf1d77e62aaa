"""The compiled functions of a policy, and where they cannot run."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import torch

from grpo_jax.cache import quick_jit
from grpo_jax.noise import bits_to_keys, bits_to_uniform
from grpo_jax.policies.policy import Policy, PolicyState
from grpo_jax.types import Observation


class Functions(NamedTuple):
    """What equal structures share: from a state and observations ``[N, *shape]`` to actions ``[N, *A]`` and more."""

    init: Callable[..., PolicyState]  # from key words, uint32 [2]
    sample: Callable[..., jax.Array]  # also from words uint32 [N, n_uniforms]; in the environment's units
    mode: Callable[..., jax.Array]  # the most probable action
    parameters: Callable[
        ..., jax.Array
    ]  # of the distribution, [N, P]; these three also from masks bool [N, P]
    value: Callable[..., jax.Array]  # [N]


@functools.lru_cache(maxsize=128)
def functions_of(structure: Policy) -> Functions:
    """The compiled functions of a policy."""
    # They are closures: a static argument would be hashed at every call, which takes longer than the call.
    distribution = structure.distribution

    def sample(
        state: PolicyState, observation: Observation, words: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        parameters = structure.parameters(state, observation, mask)
        return structure.to_world(distribution.sample(parameters, bits_to_uniform(words)))

    functions = Functions(
        init=lambda words: structure.init(bits_to_keys(words)),
        sample=sample,
        mode=lambda *seen: structure.to_world(distribution.mode(structure.parameters(*seen))),
        parameters=lambda *seen: structure.parameters(*seen),
        value=lambda *seen: structure.value(*seen),
    )
    return Functions(*map(quick_jit, functions))


_user: dict[str, int] = {}
"""The process that first used a policy; a child that was forked from it inherits the entry."""


def check_process() -> None:
    """Refuses to compute in a process that was forked from one in which a policy had been used."""
    if _user.setdefault("pid", os.getpid()) != os.getpid():
        raise RuntimeError(
            "this process was forked from one that uses JAX, whose threads do not survive a fork: a policy would hang"
            " here. Start processes by 'spawn' or 'forkserver' (SubprocVecEnv(..., start_method='forkserver'),"
            " multiprocessing.get_context('spawn')) and load the model there"
        )


def check_not_exported() -> None:
    """Refuses to become a constant in a program that torch traces, compiles or exports."""
    dynamo = torch._C._dynamo.eval_frame  # after a graph break, it alone knows that torch.compile is at work
    is_compiled = torch.compiler.is_compiling() or dynamo.get_eval_frame_callback() not in (None, False)
    if is_compiled or torch.jit.is_tracing():
        raise RuntimeError(
            "torch cannot trace, compile or export a GRPO policy, whose networks are JAX's: use model.to_torch(), which"
            " is the same policy in torch"
        )
