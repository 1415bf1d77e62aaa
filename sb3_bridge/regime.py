"""What is compared in an environment, the defaults that follow from it, and the line of the log that says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from grpo_jax.config import GRPOConfig
from grpo_jax.groups import candidates as candidate_sets
from grpo_jax.policies.distributions import Distribution
from grpo_jax.worlds.learned import check_vectors
from sb3_bridge.clones.brancher import Brancher
from sb3_bridge.clones.copying import Unclonable
from sb3_bridge.clones.core_state import ACTION_MASKS, Functions
from sb3_bridge.masks import has_masks
from sb3_bridge.policies.spaces import to_observation_space
from sb3_bridge.twins.twin import NoTwin, Twin
from sb3_bridge.vec_wrappers import unwrapped

Name = Literal["auto", "simulator", "twin", "clone", "learned"]
Dynamics = Name | Callable[[Any, Any], Any] | Functions
Kind = Literal["simulator", "twin", "clone", "learned", "function", "episodes"]
"""What ``dynamics`` comes to: ``"episodes"`` is no alternatives at all."""

BUDGET_MS, WARNED_MS = 2.0, 5.0
"""Milliseconds of branches for a decision step. The first, in classes of a factor of two: up to it one state in four is
branched in clones; beyond it fewer are, for longer; and where these are beyond it too, ``"auto"`` does not clone. Beyond the
second whoever asked for clones is warned. PPO takes about 0.5 for all it does.
"""
WORTH = 12.0
"""Where the rest of an iteration is cheap, as with many environments side by side, branches may take this many times of it:
up to 9 repaid them (LunarLander-v3, one environment), from 24 on more episodes did (the same with 16, Acrobot-v1)."""
ACTING_MS, EPOCH_MS = 0.1, 0.003
"""The rest, beside the environment's step: the policy is called once for all environments, and an epoch learns from a state."""
SIMULATOR_HORIZON = 128
HOST_HORIZON, SPARSE_HORIZON, REWARD_HORIZON = 64, 256, 16
"""Steps of a branch outside of a simulator: with the environment's reward, the same where steps are expensive, and with a
reward function, which shows earlier what an action is worth."""
HOST_STEPS, SPARSE_STEPS = 16, 8
"""Steps of each candidate for a decision step, on the host: states in between are not branched."""
N_STEPS, BRANCHED_N_STEPS = 2048, 512


class Cost(NamedTuple):
    """Milliseconds for a decision step."""

    branches: float
    rest: float  # of an iteration

    @classmethod
    def of(cls, brancher: Brancher, branches: float, n_epochs: int) -> Cost:
        """By what the replay check measured of a step."""
        step = 1e-3 * brancher.report.step_us / brancher.n_processes
        return cls(branches, ACTING_MS / brancher.num_envs + step + EPOCH_MS * n_epochs)


class Choice(NamedTuple):
    """Where alternatives will come from."""

    kind: Kind
    reason: str = ""  # for the log; empty where the user said so
    is_sparse: bool = False  # whether steps of clones are so expensive that fewer states are branched
    brancher: Brancher | None = None  # of "clone"
    twin: Twin | None = None  # of "twin"


def check_dynamics(dynamics: Any) -> None:
    """Raises ValueError for what ``dynamics`` cannot be, and says what it can be."""
    is_pair = isinstance(dynamics, tuple) and len(dynamics) == 2 and all(map(callable, dynamics))
    if not (is_pair or callable(dynamics) or dynamics in get_args(Name)):
        raise ValueError(
            f"dynamics={dynamics!r} must be one of {', '.join(map(repr, get_args(Name)))}, a transition function"
            " f(state, action) -> next_state, or a pair (get_state, set_state) of functions of the unwrapped env"
        )


def choose(
    dynamics: Dynamics,
    env: VecEnv,
    observation_space: spaces.Space,
    compares_episodes: Callable[[], Any] | None,
    cost: Callable[[Brancher, bool], Cost],
    patience: float = 1.0,
    why_no_twin: str = "",
) -> Choice:
    """What ``dynamics`` means in an env that is no simulator; raises Unclonable or NoTwin where what was asked for cannot be.

    ``cost`` tells what branches will take, where few or many states are branched.
    ``compares_episodes`` raises ValueError where the settings have no meaning for episodes, which are compared until a learned
    world predicts well; None where no world is to be learned. Branches of clones may take ``patience`` times of ``BUDGET_MS``,
    or of ``WORTH`` times the rest, whichever is less; see :func:`patience_with`. ``why_no_twin`` says why none is looked for.
    """
    if callable(dynamics):
        check_unmasked(env, "f")
        return Choice("function")
    if dynamics == "learned":
        return Choice("learned")
    if dynamics == "clone" or isinstance(dynamics, tuple):
        brancher = Brancher(env, dynamics if isinstance(dynamics, tuple) else None)
        return Choice("clone", "", _class_of(cost(brancher, False).branches) > BUDGET_MS, brancher)
    if not why_no_twin:
        try:
            return Choice("twin", twin=Twin(env))
        except NoTwin as error:
            if dynamics == "twin":
                raise
            why_no_twin = str(error) if error.is_known else ""
    first = f"{why_no_twin}; " if why_no_twin else ""
    if not patience:
        why = "branches of sampled actions repaid their seconds nowhere; dynamics='clone' takes them all the same"
        return choose_without_clones(f"{first}{why}", env, observation_space, compares_episodes)
    try:
        brancher = Brancher(env)
    except Unclonable as error:
        return choose_without_clones(f"{first}{error}", env, observation_space, compares_episodes)
    is_sparse = _class_of(cost(brancher, False).branches) > BUDGET_MS
    found = cost(brancher, is_sparse)
    most = patience * min(BUDGET_MS, _class_of(WORTH * found.rest))
    if _class_of(found.branches) <= most:
        why = f"{first}branches take {digits(found.branches)} ms a decision step"
        return Choice("clone", why, is_sparse, brancher)
    why = (
        f"{first}branches of clones would take {digits(found.branches)} ms a decision step, the rest {digits(found.rest)}, and"
        f" not repay more than {digits(most)}; dynamics='clone' takes them all the same"
    )
    return choose_without_clones(why, env, observation_space, compares_episodes)


def patience_with(candidates: str, is_sampled: bool, has_reward: bool, before: Kind | None) -> float:
    """How much more than usual branches of clones may take under ``"auto"``.

    All there is for ``candidates`` that can only be branched; none for groups that are sampled and valued by the
    environment's reward; twice as many for a reward function, which shows early what an action is worth. A model that was
    trained keeps its kind, ``before``, unless the cost is far from the limit.
    """
    if candidates in ("enumerate", "sample"):
        return float("inf")
    if is_sampled and not has_reward and before != "clone":
        return 0.0
    return (1 + has_reward) * {"clone": 4.0, "episodes": 0.25}.get(before or "", 1.0)


def _class_of(milliseconds: float) -> float:
    """The nearest power of two: what the clock says of a busy machine decides less often."""
    return float(2.0 ** np.round(np.log2(milliseconds)))


def choose_without_clones(
    why: str, env: VecEnv, observation_space: spaces.Space, compares_episodes: Callable[[], Any] | None
) -> Choice:
    """What ``"auto"`` means where there are no clones, and ``why`` there are none; see :func:`choose`."""
    if compares_episodes is None:
        return Choice(
            "episodes", f"{why}; a world is learned for a reward_function, or with dynamics='learned'"
        )
    try:
        check_learnable(env, observation_space)
        compares_episodes()
    except (NotImplementedError, ValueError) as error:
        return Choice("episodes", f"{why}; no learned world: {error}")
    return Choice("learned", why)


def check_learnable(env: VecEnv, observation_space: spaces.Space) -> None:
    """Raises NotImplementedError or ValueError where no world can be learned of what the policy sees."""
    check_unmasked(env, "'learned'")
    check_unnormalized(env, "'learned'")
    check_vectors(to_observation_space(observation_space))


def check_unmasked(env: VecEnv, dynamics: str) -> None:
    """Raises ValueError where the environments forbid actions, of which a world that is not theirs knows nothing."""
    if has_masks(env):
        raise ValueError(
            f"dynamics={dynamics} knows no {ACTION_MASKS}(), by which the environment forbids actions: use dynamics='clone', or"
            " candidates='episodes'"
        )


def check_unnormalized(env: VecEnv, dynamics: str) -> None:
    """Raises ValueError for observations that VecNormalize changes, where a world predicts them."""
    if any(isinstance(one, VecNormalize) and one.norm_obs for one in unwrapped(env)[1]):
        raise ValueError(
            f"dynamics={dynamics} needs observations whose scale does not change: use VecNormalize(norm_obs=False), or"
            " dynamics='clone'"
        )


def defaults(kind: Kind, given: Mapping[str, Any], is_sparse: bool = False) -> dict[str, Any]:
    """Values of ``n_steps``, ``horizon``, ``branch_every`` and ``bootstrap``, by ``kind`` where they are given as None."""
    is_sparse = is_sparse and given["reward_function"] is None
    on_host, has_reward = kind not in ("simulator", "twin", "episodes"), given["reward_function"] is not None
    names = ("n_steps", "horizon", "branch_every", "bootstrap")
    n_steps, horizon, every, bootstrap = map(given.__getitem__, names)
    if n_steps is None:
        n_steps = BRANCHED_N_STEPS if kind in ("twin", "clone", "function") else N_STEPS
    if horizon is None:
        of_host = REWARD_HORIZON if has_reward else SPARSE_HORIZON if is_sparse else HOST_HORIZON
        horizon = SIMULATOR_HORIZON if kind in ("simulator", "twin") else of_host
    GRPOConfig(n_steps=n_steps, horizon=horizon)  # refuses them before anything is computed from them
    if every is None:
        most = max(1, horizon // (SPARSE_STEPS if is_sparse else HOST_STEPS)) if on_host else 1
        every = max(k for k in range(1, most + 1) if n_steps % k == 0)
    if bootstrap is None:
        compares_episodes = kind == "episodes" or given["candidates"] == "episodes"
        bootstrap = compares_episodes or ((on_host or kind == "twin") and not has_reward)
    return dict(zip(names, (n_steps, horizon, every, bootstrap), strict=True))


def candidates_in(kind: Kind, candidates: str, has_env: bool) -> str:
    """What ``candidates`` means where alternatives are of a ``kind``; raises ValueError where there are no such groups."""
    if candidates == "auto":
        return "episodes" if kind == "episodes" else "auto"
    if not has_env or candidates == "episodes" or kind == "simulator":
        return candidates
    needs = "environments that can be reset alike, whole groups of them: a WorldVecEnv or env='gymnax/<id>'"
    if candidates != "trajectory":
        if kind != "episodes":
            return candidates
        needs = "a world that can be stepped from any state (a WorldVecEnv, env='gymnax/<id>', or dynamics='clone')"
    raise ValueError(f"candidates={candidates!r} needs {needs}; use candidates='auto' or 'episodes'")


OF_EPISODES: dict[str, Any] = {"candidates": "episodes", "branch_every": 1}
"""What changes in the settings where episodes are compared until alternatives can be."""


def as_episodes(values: dict[str, Any]) -> dict[str, Any]:
    """Settings without what has a meaning in branches alone: for ``"auto"``, which chose episodes by itself."""
    baseline = values["baseline"] if values["baseline"] in ("mean", "leave_one_out") else "policy"
    return values | OF_EPISODES | {"persistence": None, "baseline": baseline}


def of_cost(ms: float, given: Mapping[str, Any]) -> str:
    """The warning of branches in clones that take ``ms`` milliseconds for a decision step."""
    return (
        f"dynamics={given['dynamics']!r}: branches will take about {digits(ms)} ms for a decision step, most of the run. Lower"
        f" horizon={given['horizon']} or group_size={given['group_size']}, raise branch_every={given['branch_every']}, or use"
        " SubprocVecEnv, or dynamics='learned'"
    )


def without_meaning(config: GRPOConfig, distribution: Distribution) -> list[str]:
    """Arguments of ``GRPO`` that change nothing in a regime."""
    names = ["use_sde", "sde_sample_freq", "rollout_buffer_class", "rollout_buffer_kwargs"]
    if not config.bootstrap:
        names += ["gae_lambda", "vf_coef", "clip_range_vf"]
    if config.candidates != "trajectory":
        names += ["trajectory_form"]
    if config.candidates in ("episodes", "trajectory"):
        names += ["horizon", "branch_every", "n_rollouts", "backup", "persistence", "max_enumerated"]
        names += ["branch_past_truncation", "common_random_numbers"]
    if config.candidates == "episodes" or candidate_sets.resolve(config, distribution) == "enumerate":
        names += ["group_size"]
    return names


def warn_of_arguments(
    config: GRPOConfig, distribution: Distribution, given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """Warns once of arguments that were ``given``, are not the default, and change nothing, and of a ``batch_size`` that fits badly."""
    meaningless = without_meaning(config, distribution)
    names = [name for name in meaningless if (given[name] or None) != (defaults[name] or None)]
    if names:
        branches = config.candidates not in ("episodes", "trajectory")
        what = "branches" if branches else "episodes, nothing is branched"
        critic = "with a critic" if config.bootstrap else "without a critic (bootstrap=False)"
        warnings.warn(
            f"GRPO compares {what}, {critic}: {', '.join(names)} {'have' if len(names) > 1 else 'has'} no meaning here and"
            " will be ignored",
            UserWarning,
            stacklevel=3,
        )
    if config.batch_size > config.n_states or config.n_states % config.batch_size:
        warnings.warn(
            f"batch_size={config.batch_size} does not divide n_envs * n_steps = {config.n_envs} * {config.n_steps} ="
            f" {config.n_states}: the last minibatch of every epoch holds {config.n_states % config.batch_size} states only",
            UserWarning,
            stacklevel=3,
        )


def describe(
    config: GRPOConfig, distribution: Distribution, where: str, reason: str, has_critic: bool
) -> str:
    """What is compared, in one line: in ``where``, and the reason of ``dynamics="auto"`` if there is one."""
    if config.candidates in ("episodes", "trajectory"):
        groups = "the episodes of a rollout are compared, nothing is branched"
    else:
        kind = candidate_sets.resolve(config, distribution)
        count = candidate_sets.n_candidates(config, distribution)
        actions = f"all {count} actions" if kind == "enumerate" else f"{count} sampled actions"
        states = "every state" if config.branch_every == 1 else f"one state in {config.branch_every}"
        groups = f"{actions} of {states} are followed for {config.horizon} steps in {where}"
        if config.persistence:
            groups += f", actions persist with probability {config.persistence:.2g}"
    critic = "with a critic" if has_critic else "without a critic"
    if has_critic > config.bootstrap:  # see ``twins/pace.py``
        critic += " where they do not differ"
    return f"GRPO: {groups}; {critic}" + (f" (dynamics='auto': {reason})" if reason else "")


def digits(number: float) -> str:
    """Two digits that say something, and no exponent."""
    return np.format_float_positional(number, precision=2, fractional=False, trim="-")
