"""``GRPO``: the algorithm of ``grpo_jax`` with the contract of Stable-Baselines3's ``PPO``."""

from __future__ import annotations

import functools
import inspect
import io
import pathlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule, check_for_correct_spaces, get_system_info
from stable_baselines3.common.vec_env import VecEnv

from grpo_jax import counter
from grpo_jax.config import (
    Backup,
    Baseline,
    GRPOConfig,
    KLEstimator,
    Reference,
    Scale,
    Surrogate,
)
from grpo_jax.groups import candidates as candidate_sets
from grpo_jax.groups.branch import Branches
from grpo_jax.learning.update import Learner, start_learner
from grpo_jax.noise import bits_to_keys
from grpo_jax.policies.distributions import for_space
from grpo_jax.policies.policy import Policy
from grpo_jax.presets import preset
from grpo_jax.training import batches, loop
from grpo_jax.training.diagnose import SPREAD_ITERATIONS, check_finite, warn_without_spread
from grpo_jax.training.rollout import Trajectory
from grpo_jax.types import Group, Metrics
from grpo_jax.worlds.base import World
from sb3_bridge.alternatives import (
    BUDGET_MS,
    Choice,
    Clones,
    Dynamics,
    Function,
    Kind,
    Learned,
    check_dynamics,
    check_learnable,
    check_unnormalized,
    choose,
    digits,
    states_of,
)
from sb3_bridge.clones.brancher import Brancher
from sb3_bridge.files import model_zip as serialization
from sb3_bridge.functions.reward import Reward, original_errors, resolve_reward
from sb3_bridge.gymnax.presets import arguments_of, find_preset
from sb3_bridge.gymnax.registration import NAMESPACE
from sb3_bridge.gymnax.vec_env import GymnaxVecEnv
from sb3_bridge.policies.policy import CnnPolicy, GRPOPolicy, MlpPolicy, MultiInputPolicy
from sb3_bridge.policies.spaces import to_action_space
from sb3_bridge.rollout.host import (
    Simulator,
    collect_on_device,
    collect_on_host,
    find_simulator,
    override,
    train_state,
)

SelfGRPO = TypeVar("SelfGRPO", bound="GRPO")

SIMULATOR_HORIZON = 128
HOST_HORIZON, REWARD_HORIZON = 64, 16
"""Steps of a branch outside of a simulator: with the environment's reward, and with a reward function, which shows
earlier what an action is worth."""
HOST_STEPS = 16
"""Simulator steps of each candidate for a decision step, on the host: states in between are not branched."""
N_STEPS, BRANCHED_N_STEPS = 2048, 512


class GRPO(OnPolicyAlgorithm):
    """Group Relative Policy Optimization behind Stable-Baselines3's API: ``PPO`` replaced by ``GRPO`` works.

    In a :class:`GymnaxVecEnv` (or ``"gymnax/<id>"``) every candidate action of every state is followed in the simulator,
    and whole iterations run on the device. Any other environment is stepped on the host, and candidates are followed in
    exact copies of it, in a world that is learned from it, or in a transition function of yours: see ``dynamics``. Where
    nothing of that can be had, the groups are the episodes of a rollout; with ``bootstrap`` this learns as PPO does.

    Arguments under PPO's names mean what they mean in PPO; those without a meaning in the chosen regime are accepted,
    with a warning where they were set. All arguments behind ``_init_setup_model`` are GRPO's own.

    Args:
      policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"``, or a class derived from ``sb3_bridge``'s.
      env: Gymnasium id, ``"gymnax/<id>"``, Gymnasium env or SB3 VecEnv.
      learning_rate: a number, or a function of the remaining progress (1 to 0).
      n_steps: steps of each environment in a rollout; None: 512 where candidates are followed in clones or in a function
        of yours, else 2048.
      batch_size: decision states in a minibatch.
      n_epochs: passes over a rollout.
      gamma: discount factor.
      gae_lambda: lambda of the critic's targets, where ``bootstrap`` is on.
      clip_range: of the ratio pi/pi_old; a number or a function of the remaining progress.
      clip_range_vf: of the critic's values; None: not clipped.
      normalize_advantage: ``advantage_scale="batch"`` (True) or ``"none"`` (False), unless that is given.
      ent_coef: weight of the entropy bonus; a number or a function of the remaining progress.
      vf_coef: weight of the value loss, where ``bootstrap`` is on.
      max_grad_norm: bound on the norm of the actor's gradient, and on that of the critic's; on both together, as in PPO,
        where episodes are compared.
      use_sde, sde_sample_freq, rollout_buffer_class, rollout_buffer_kwargs: accepted, without a meaning here.
      target_kl: stops the epochs of an iteration at 1.5 times this KL(pi_old || pi).
      stats_window_size: episodes that the rollout statistics average over.
      tensorboard_log: folder for TensorBoard.
      policy_kwargs: of the policy: ``net_arch``, ``activation_fn``, ``ortho_init``, ``log_std_init``,
        ``features_extractor_class`` (flax), ``optimizer_class`` (optax), ...
      verbose: 0 nothing, 1 log tables, 2 more.
      seed: one seed, one run, bit for bit.
      device: ``"auto"`` (JAX's default), ``"cpu"``, ``"cuda"``.
      reward_function: ``(state, action, next_state) -> reward``, what the groups compare instead of the environment's
        reward; JAX, NumPy or torch, for one transition or a batch, of observations as they are before VecNormalize.
        Episode statistics go on counting the environment's own.
      dynamics: where alternatives come from. ``"simulator"``: the gymnax world. ``"clone"``: exact copies of the
        environments, stepped on the host; a pair ``(get_state, set_state)``: the same by functions of yours,
        ``get_state(env.unwrapped) -> state`` and ``set_state(env.unwrapped, state)``. ``"learned"``: a world that is
        learned from all real transitions (vector observations; until it predicts well, episodes are compared). A
        function ``f(state, action) -> next_state`` or ``-> (next_state, terminated)``: yours, in JAX, NumPy or torch, for
        one transition or a batch, with a ``reward_function``. ``"auto"``: the simulator where there is one, else clones
        where they repeat the original and branches take at most 5 ms a decision step, else a learned world, else
        episodes; the choice and its reason are printed at ``verbose=1`` and kept in ``chosen_dynamics``.
      candidates: ``"auto"``, ``"enumerate"``, ``"sample"``, ``"trajectory"`` or ``"episodes"``, see
        :class:`grpo_jax.GRPOConfig`, as for all that follow.
      group_size: candidates of a sampled group.
      max_enumerated: largest action space whose actions are all compared.
      horizon: steps of a branch, the candidate's own included; None: 128 in a simulator, 64 elsewhere, 16 there with a
        ``reward_function``.
      branch_every: one decision state in so many is branched, others in every rollout, and a critic learns from all of
        them; None: all in a simulator, elsewhere as many as cost 16 steps of each candidate for a decision step.
      n_rollouts: branches of each candidate.
      backup: ``"mean"`` or (optimistic) ``"max"`` over a candidate's branches.
      persistence: probability that the action before is repeated instead of asking the policy, in rollouts and in
        branches, for rewards that only many equal actions reach; number or function of the remaining progress; None: 0.
      branch_past_truncation: whether branches go on where a time limit would cut the episode.
      bootstrap: whether a critic values what lies behind a branch or a rollout; None: not in a simulator, and not with
        a ``reward_function`` where its consequences are followed.
      common_random_numbers: whether the candidates of a state share their randomness.
      baseline: what a return is compared with.
      advantage_scale: ``"none"``, ``"group"`` or ``"batch"``; None: by ``normalize_advantage``.
      surrogate: ``"ppo"``, ``"cispo"``, ``"sapo"`` or ``"tpo"``.
      clip_range_high: how far the ratio may rise, where that differs from ``clip_range``; number or function.
      dual_clip: bound on the ratio where the advantage is negative.
      kl_coef: weight of KL(pi || pi_ref); None: no reference policy.
      kl_estimator: ``"exact"``, ``"k1"``, ``"k2"`` or ``"k3"``.
      reference: ``"fixed"``, ``"periodic"`` or ``"ema"``.
      reference_interval: iterations between copies of a periodic reference.
      reference_decay: of a moving-average reference.
      spread_floor: spread of a group that counts as none.

    Raises:
      ValueError, TypeError: what is wrong with which argument, and the fix.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: GRPOPolicy  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[GRPOPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int | None = None,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float | Schedule = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        reward_function: Callable[[Any, Any, Any], Any] | None = None,
        dynamics: Dynamics = "auto",
        candidates: str = "auto",
        group_size: int = 8,
        max_enumerated: int = 64,
        horizon: int | None = None,
        branch_every: int | None = None,
        n_rollouts: int = 1,
        backup: Backup = "mean",
        persistence: float | Schedule | None = None,
        branch_past_truncation: bool = False,
        bootstrap: bool | None = None,
        common_random_numbers: bool = True,
        baseline: Baseline = "policy",
        advantage_scale: Scale | None = None,
        surrogate: Surrogate = "ppo",
        clip_range_high: float | Schedule | None = None,
        dual_clip: float | None = None,
        kl_coef: float | None = None,
        kl_estimator: KLEstimator = "exact",
        reference: Reference = "fixed",
        reference_interval: int = 10,
        reference_decay: float = 0.99,
        spread_floor: float = 1e-5,
    ):
        _check_policy(policy)
        if isinstance(env, str) and env.startswith(f"{NAMESPACE}/"):
            env = GymnaxVecEnv(env.removeprefix(f"{NAMESPACE}/"), render_mode="rgb_array")
        super().__init__(
            policy,  # type: ignore[arg-type]
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            n_steps=n_steps,  # type: ignore[arg-type]  # None until it is known what is branched in
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,  # type: ignore[arg-type]
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            device=device,
            seed=seed,
            _init_setup_model=False,
            supported_action_spaces=(
                spaces.Box,
                spaces.Discrete,
                spaces.MultiDiscrete,
                spaces.MultiBinary,
            ),
        )
        self._jax_device = _jax_device(device)
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.clip_range = clip_range
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        self.reward_function = reward_function
        self.dynamics = dynamics
        self.candidates = candidates
        self.group_size = group_size
        self.max_enumerated = max_enumerated
        self.horizon = horizon
        self.branch_every = branch_every
        self.n_rollouts = n_rollouts
        self.backup = backup
        self.persistence = persistence
        self.branch_past_truncation = branch_past_truncation
        self.bootstrap = bootstrap
        self.common_random_numbers = common_random_numbers
        self.baseline = baseline
        self.advantage_scale = advantage_scale
        self.surrogate = surrogate
        self.clip_range_high = clip_range_high
        self.dual_clip = dual_clip
        self.kl_coef = kl_coef
        self.kl_estimator = kl_estimator
        self.reference = reference
        self.reference_interval = reference_interval
        self.reference_decay = reference_decay
        self.spread_floor = spread_floor

        self.simulator_steps = 0
        """World steps that were spent in branches."""
        self.key_words: np.ndarray = np.zeros(2, np.uint32)
        """Words of the PRNG key that the next iteration takes."""
        self.episode_time: np.ndarray = np.zeros(self.n_envs if self.env is not None else 0, np.int32)
        """Steps since the last reset of each environment, on the host's path."""
        self._n_iterations = 0
        self._n_optimizer_steps = 0
        self._frac_zero_std: list[float] = []
        self._spread_was_judged = False
        self._reward: Reward | None = None
        self._alternatives: Clones | Learned | Function | None = None
        self.chosen_dynamics: Kind = "episodes"
        """What ``dynamics`` came to: simulator, clone, learned, function, or episodes (no alternatives)."""
        self._world: Any = None  # a learned world from a file, until there is an env to branch for
        self._trajectory: Trajectory | None = None
        self._reference: Any = None
        if _init_setup_model:
            given = dict(vars(self))
            self._setup_model()
            if self.env is not None:
                self._warn_of_arguments(given)
            self.use_sde = False

    @classmethod
    def from_preset(cls: type[SelfGRPO], env: str | GymnaxVecEnv, **overrides: Any) -> SelfGRPO:
        """A model with the settings that are known to work for a gymnax id, on the device.

        ``GRPO.from_preset(id, seed=0).learn(grpo_jax.preset_timesteps(id))`` is the run that the preset is meant for, and
        ``grpo_jax.preset_expectation(id)`` what to expect of it.

        Args:
          env: gymnax id (``"CartPole-v1"`` or ``"gymnax/CartPole-v1"``), stepped in as many environments as the preset
            says; or a :class:`GymnaxVecEnv` made from an id.
          **overrides: arguments of the class that replace the preset's; ``policy_kwargs`` replace its own one by one.

        Raises:
          ValueError: an unknown id, one without a preset, or a preset that the class has no arguments for.
        """
        env_id, vec_env = find_preset(env)
        settings = arguments_of(preset(env_id), vec_env.world.observation_space)
        policy_kwargs = settings["policy_kwargs"] | (overrides.pop("policy_kwargs", None) or {})
        return cls(env=vec_env, **{**settings, "policy_kwargs": policy_kwargs, **overrides})

    def _setup_model(self) -> None:
        self._setup_lr_schedule()
        self._reseed(self.seed)
        self.set_random_seed(self.seed)
        self.clip_range = FloatSchedule(self.clip_range)
        if self.clip_range_vf is not None:
            if isinstance(self.clip_range_vf, (float, int)) and self.clip_range_vf <= 0:
                raise ValueError(
                    f"clip_range_vf={self.clip_range_vf} must be above 0; None switches value clipping off"
                )
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)
        if self.clip_range_high is not None:
            self.clip_range_high = FloatSchedule(self.clip_range_high)
        for name in ("ent_coef", "persistence"):
            if callable(value := getattr(self, name)):
                setattr(self, name, FloatSchedule(value))
        self.rollout_buffer = None  # type: ignore[assignment]
        check_dynamics(self.dynamics)
        choice = self._choose()
        self.chosen_dynamics = choice.kind
        for name, value in self._settings_for(choice.kind).items():
            setattr(self, name, value)
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            has_critic=self.bootstrap,
            seed=int(self.key_words[0]),
            **self.policy_kwargs,
        )
        self.policy = self.policy.to(self.device)
        self.policy.state = jax.device_put(self.policy.state, self._jax_device)
        if self.reward_function is not None:
            self._reward = resolve_reward(self.reward_function, self.observation_space, self.action_space)
            self._say(self._reward.description)
        config = self._config()
        candidate_sets.resolve(config, self.policy.structure.distribution)
        # All of it committed to the device, as what an update returns is: else the second update compiles again.
        learner = jax.device_put(start_learner(config, self.policy.state), self._jax_device)
        self.policy.optimizer.state = learner.optimizer
        if self.env is not None:
            self._set_alternatives(choice)

    # What kind of run it is -----------------------------------------------------------------------------------------

    def _find_simulator(self) -> Simulator | None:
        """The world that can be branched in, if there is one."""
        simulator = find_simulator(self.env)
        if self.dynamics == "simulator" and simulator is None and self.env is not None:
            raise ValueError(
                "dynamics='simulator' needs a GymnaxVecEnv (bare, or within VecMonitor) or env='gymnax/<id>'; use"
                f" dynamics='auto' for {self.env}"
            )
        return simulator

    def _choose(self) -> Choice:
        """Where alternatives come from, by ``dynamics``, ``candidates`` and the env."""
        if self.env is None:
            return Choice(self.chosen_dynamics)  # what a file says, until there is an env
        if self._find_simulator() is not None:
            if self.dynamics not in ("auto", "simulator"):
                raise ValueError(
                    f"dynamics={self.dynamics!r} has no meaning in a GymnaxVecEnv, which is a simulator itself: use"
                    " dynamics='auto'"
                )
            return Choice("simulator")
        if self.candidates in ("episodes", "trajectory"):
            return Choice("episodes")
        return choose(self.dynamics, self.env, self.observation_space, self._milliseconds)

    def _settings_for(self, kind: Kind) -> dict[str, Any]:
        """What the user left open, where alternatives are of a kind."""
        on_host, has_reward = kind not in ("simulator", "episodes"), self.reward_function is not None
        n_steps, horizon, branch_every, bootstrap = (
            self.n_steps,
            self.horizon,
            self.branch_every,
            self.bootstrap,
        )
        if n_steps is None:
            n_steps = BRANCHED_N_STEPS if kind in ("clone", "function") else N_STEPS
        if horizon is None:
            of_host = REWARD_HORIZON if has_reward else HOST_HORIZON
            horizon = SIMULATOR_HORIZON if kind == "simulator" else of_host
        if branch_every is None:
            most = max(1, horizon // HOST_STEPS) if on_host else 1
            branch_every = max(k for k in range(1, most + 1) if n_steps % k == 0)
        if bootstrap is None:
            compares_episodes = kind == "episodes" or self.candidates == "episodes"
            bootstrap = compares_episodes or (on_host and not has_reward)
        return {"n_steps": n_steps, "horizon": horizon, "branch_every": branch_every, "bootstrap": bootstrap}

    def _milliseconds(self, brancher: Brancher) -> float:
        """What the branches of clones will take for a decision step."""
        sets = GRPOConfig(
            candidates=self.candidates,  # type: ignore[arg-type]
            group_size=self.group_size,
            max_enumerated=self.max_enumerated,
        )
        distribution = for_space(to_action_space(self.action_space))
        n_candidates = candidate_sets.n_candidates(sets, distribution)
        settings = self._settings_for("clone")
        seconds = brancher.seconds(1, n_candidates, settings["horizon"], self.n_rollouts)
        return float(1e3 * seconds / settings["branch_every"])

    def _set_alternatives(self, choice: Choice) -> None:
        """Makes what was chosen; says so, and warns of what it will cost."""
        assert self.env is not None
        self.chosen_dynamics = choice.kind
        before, self._alternatives = self._alternatives, None
        if choice.brancher is not None:
            self._alternatives = Clones(choice.brancher, self._reward)
        elif choice.kind == "learned":
            check_learnable(self.env, self.observation_space)
            self._config().replace(
                candidates="episodes", branch_every=1
            )  # refuses now what it would refuse then
            if isinstance(before, Learned):
                self._alternatives = before  # what was learned so far is not thrown away
            else:
                words = np.random.SeedSequence([int(word) for word in self.key_words])
                learned = Learned(self.policy, self._reward, words.generate_state(2, np.uint32))
                if self._world is not None:
                    learned.load_state_dict(self._world)
                self._alternatives, self._world = learned, None
        elif choice.kind == "function":
            check_unnormalized(self.env, "f")
            self._alternatives = Function(self.dynamics, self.policy, self._reward)  # type: ignore[arg-type]
        self._say(self._describe(self._config(), choice.reason))
        if choice.brancher is not None:
            milliseconds = self._milliseconds(choice.brancher)
            if milliseconds > BUDGET_MS:
                warnings.warn(
                    f"dynamics={self.dynamics!r}: branches will take about {digits(milliseconds)} ms for a decision step, most"
                    f" of the run. Lower horizon={self.horizon} or group_size={self.group_size}, raise branch_every="
                    f"{self.branch_every}, or use SubprocVecEnv, or dynamics='learned'",
                    UserWarning,
                    stacklevel=4,
                )

    def _candidates(self) -> str:
        """Which groups are compared: what ``candidates="auto"`` means here."""
        kind = self.chosen_dynamics
        if self.candidates == "auto":
            return "episodes" if kind == "episodes" else "auto"
        possible = kind == "simulator" or (kind != "episodes" and self.candidates != "trajectory")
        if self.candidates != "episodes" and not possible and self.env is not None:
            raise ValueError(
                f"candidates={self.candidates!r} needs a world that can be stepped from any state (a GymnaxVecEnv,"
                " env='gymnax/<id>', or dynamics='clone'); use candidates='auto' or 'episodes'"
            )
        return self.candidates

    def _config(self) -> GRPOConfig:
        """The settings of ``grpo_jax`` that the present attributes mean; rates come at every iteration anew."""
        if self.advantage_scale is None:
            scale: Scale = "batch" if self.normalize_advantage else "none"
        else:
            scale = self.advantage_scale
        return GRPOConfig(
            n_envs=self.n_envs,
            n_steps=self.n_steps,
            n_epochs=self.n_epochs,
            batch_size=self.batch_size,
            candidates=self._candidates(),  # type: ignore[arg-type]
            group_size=self.group_size,
            max_enumerated=self.max_enumerated,
            horizon=self.horizon or SIMULATOR_HORIZON,
            branch_every=self.branch_every or 1,
            n_rollouts=self.n_rollouts,
            backup=self.backup,
            persistence=self._now(self.persistence),
            # What truncates a learned world is that it knows no further.
            branch_past_truncation=self.branch_past_truncation and self.chosen_dynamics != "learned",
            bootstrap=bool(self.bootstrap),
            common_random_numbers=self.common_random_numbers,
            baseline=self.baseline,
            advantage_scale=scale,
            surrogate=self.surrogate,
            kl_estimator=self.kl_estimator,
            reference=self.reference,
            reference_interval=self.reference_interval,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            learning_rate=self._now(self.lr_schedule),
            clip_range=self._now(self.clip_range),
            clip_range_high=self._now(self.clip_range_high),
            clip_range_vf=self._now(self.clip_range_vf),
            dual_clip=self.dual_clip,
            ent_coef=self._now(self.ent_coef),
            vf_coef=self.vf_coef,
            kl_coef=self.kl_coef,
            reference_decay=self.reference_decay,
            target_kl=self.target_kl,
            max_grad_norm=self.max_grad_norm,
            spread_floor=self.spread_floor,
            optimizer=self.policy.optimizer.factory,
        )

    def _now(self, schedule: Any) -> Any:
        return schedule(self._current_progress_remaining) if callable(schedule) else schedule

    def _warn_of_arguments(self, given: dict[str, Any]) -> None:
        """Warns once of what was ``given`` and has no meaning here."""
        defaults = {name: parameter.default for name, parameter in inspect.signature(GRPO).parameters.items()}
        meaningless = ["use_sde", "sde_sample_freq", "rollout_buffer_class", "rollout_buffer_kwargs"]
        branches = self._candidates() not in ("episodes", "trajectory")
        if not self.bootstrap:
            meaningless += ["gae_lambda", "vf_coef", "clip_range_vf"]
        if not branches:
            meaningless += [
                "horizon",
                "branch_every",
                "n_rollouts",
                "backup",
                "persistence",
                "branch_past_truncation",
                "common_random_numbers",
                "max_enumerated",
            ]
        if self._candidates() == "episodes":
            meaningless += ["group_size"]
        ignored = [name for name in meaningless if (given[name] or None) != (defaults[name] or None)]
        if ignored:
            regime = "branches" if branches else "episodes, nothing is branched"
            critic = "with a critic" if self.bootstrap else "without a critic (bootstrap=False)"
            warnings.warn(
                f"GRPO compares {regime}, {critic}: {', '.join(ignored)} {'have' if len(ignored) > 1 else 'has'} no"
                " meaning here and will be ignored",
                UserWarning,
                stacklevel=3,
            )
        n_states = self.n_envs * self.n_steps
        if self.batch_size > n_states or n_states % self.batch_size:
            warnings.warn(
                f"batch_size={self.batch_size} does not divide n_envs * n_steps = {self.n_envs} * {self.n_steps} ="
                f" {n_states}: the last minibatch of every epoch holds {n_states % self.batch_size} states only",
                UserWarning,
                stacklevel=3,
            )

    def _describe(self, config: GRPOConfig, reason: str) -> str:
        """What is compared, in one line, with the reason."""
        if config.candidates in ("episodes", "trajectory"):
            groups = "the episodes of a rollout are compared, nothing is branched"
        else:
            kind = candidate_sets.resolve(config, self.policy.structure.distribution)
            count = candidate_sets.n_candidates(config, self.policy.structure.distribution)
            actions = f"all {count} actions" if kind == "enumerate" else f"{count} sampled actions"
            where = "the simulator" if self._alternatives is None else self._alternatives.description
            states = "every state" if config.branch_every == 1 else f"one state in {config.branch_every}"
            groups = f"{actions} of {states} are followed for {config.horizon} steps in {where}"
        critic = "with a critic" if config.bootstrap else "without a critic"
        return f"GRPO: {groups}; {critic}" + (f" (dynamics='auto': {reason})" if reason else "")

    def _say(self, text: str) -> None:
        if self.verbose >= 1:
            print(text)

    # Training -------------------------------------------------------------------------------------------------------

    def learn(
        self: SelfGRPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "GRPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfGRPO:
        """Trains for at least ``total_timesteps`` decision steps, in whole rollouts; see SB3's ``PPO.learn``.

        Raises:
          FloatingPointError: losses, gradients or group returns were NaN or inf.
          ValueError: no env.
        """
        if self.env is None:
            raise ValueError("learn() needs an environment: set_env(env), or load(path, env=env)")
        super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        if 0 < self._n_iterations < SPREAD_ITERATIONS:
            self._warn_without_spread(self._config())
        return self

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # The last rollout may go beyond total_timesteps: no schedule is asked for what lies behind its end.
        super()._update_current_progress_remaining(min(num_timesteps, total_timesteps), total_timesteps)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int
    ) -> bool:
        """One rollout, on the device where the environment is there, else on the host.

        Returns:
          Whether training goes on: False where a callback said stop.
        """
        del rollout_buffer, n_rollout_steps  # the trajectory is kept as arrays, of n_steps
        self.policy.set_training_mode(False)
        callback.on_rollout_start()
        config, simulator = self._config(), self._find_simulator()
        with original_errors():  # of the user's reward function
            if simulator is not None:
                self._trajectory = collect_on_device(self, config, simulator, self._reward, callback)
            else:
                before_step, clones = None, self._alternatives
                if isinstance(clones, Clones) and config.candidates != "episodes":
                    wanted = np.asarray(batches.branched(config, self._n_iterations))
                    clones.start(wanted.reshape(config.n_steps, config.n_envs))
                    before_step = clones.before_step
                self._trajectory = collect_on_host(self, config, env, self._reward, callback, before_step)
        if self._trajectory is None:
            self.key_words = np.asarray(_next_key(self.key_words))  # what was drawn is used up
            return False
        callback.on_rollout_end()
        return True

    def train(self) -> None:
        """Groups and update of the last rollout, in one program."""
        assert self._trajectory is not None, "train() comes behind collect_rollouts()"
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)  # type: ignore[arg-type]
        config, simulator = self._config(), self._find_simulator()
        learner = Learner(
            policy=self.policy.state,
            optimizer=self.policy.optimizer.state,
            reference=self._reference_policy(),
            n_updates=np.int32(self._n_optimizer_steps),  # type: ignore[arg-type]
        )
        world: World | None = None if simulator is None else override(simulator.env.world, self._reward)
        trajectory, evaluated, n_host_steps = self._trajectory, None, 0
        with original_errors():
            alternatives = None if config.candidates == "episodes" else self._alternatives
            if isinstance(alternatives, Clones):
                evaluated, n_host_steps = alternatives.evaluate(
                    config, self.policy, trajectory, self.key_words
                )
            elif alternatives is not None:
                world = alternatives.world(config, self.policy.structure, trajectory, self.key_words)
                if world is None:
                    config = config.replace(candidates="episodes", branch_every=1)
            if simulator is None:  # what the reward function saw is of no more use
                environments = trajectory.environments.replace(state=None)
                trajectory = trajectory.replace(environments=environments)
            state, metrics = _learn(
                config,
                world,
                self.policy.structure,
                learner,
                trajectory,
                self.key_words,
                self._n_iterations,
                evaluated,
            )
            metrics, n_simulator_steps, words, n_updates = jax.device_get(
                (metrics, state.simulator_steps, state.key, state.learner.n_updates)
            )
        self._trajectory = None
        check_finite(metrics)
        self.policy.state = state.learner.policy
        self.policy.optimizer.state = state.learner.optimizer
        self._reference = state.learner.reference
        self.key_words = np.asarray(words)
        self.simulator_steps += counter.to_int(n_simulator_steps) + n_host_steps
        self._n_optimizer_steps = int(n_updates)
        self._n_iterations += 1
        # Epochs that were begun, as PPO counts: target_kl may have stopped them.
        self._n_updates += min(self.n_epochs, int(metrics["n_updates"]) // config.n_minibatches + 1)
        self._log(config, metrics)
        taken = int(metrics["n_updates"])
        if self.verbose >= 1 and self.target_kl is not None and taken < config.n_updates:
            print(
                f"Early stopping after {taken} of {config.n_updates} optimizer steps: KL(pi_old || pi) exceeded"
                f" 1.5 * target_kl = {1.5 * self.target_kl:.3g}"
            )
        if self._n_iterations <= SPREAD_ITERATIONS:
            self._frac_zero_std.append(float(metrics["frac_zero_std"]))
            if self._n_iterations == SPREAD_ITERATIONS:
                self._warn_without_spread(config)

    def _warn_without_spread(self, config: GRPOConfig) -> None:
        """Says once that the first groups had nothing to tell, if that is so."""
        if not self._spread_was_judged:
            self._spread_was_judged = True
            warn_without_spread(config, self._frac_zero_std)

    def _reference_policy(self) -> Any:
        """The reference kept so far; at first the policy as it is now, parameters that were loaded included."""
        if self.kl_coef is None:
            return None
        return self.policy.state if self._reference is None else self._reference

    def _log(self, config: GRPOConfig, metrics: Metrics) -> None:
        """PPO's keys under ``train/``, ours under ``grpo/``."""

        def record(name: str, value: Any, **where: Any) -> None:
            self.logger.record(name, float(value), **where)

        record("train/entropy_loss", -metrics["entropy"])
        record("train/policy_gradient_loss", metrics["policy_loss"])
        if config.bootstrap:
            record("train/value_loss", metrics["value_loss"])
        record("train/approx_kl", metrics["approx_kl"])
        record("train/clip_fraction", metrics["clip_fraction"])
        record("train/loss", metrics["loss"])
        if config.bootstrap:
            record("train/explained_variance", metrics["explained_variance"])
        log_std = self.policy.state.params["actor"].get("log_std")
        if log_std is not None:
            record("train/std", np.exp(np.asarray(log_std)).mean())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        record("train/clip_range", config.clip_range)
        if config.clip_range_vf is not None:
            record("train/clip_range_vf", config.clip_range_vf)
        record("grpo/group_spread", metrics["group_spread"])
        record("grpo/frac_zero_std", metrics["frac_zero_std"])
        record("grpo/grad_norm", metrics["grad_norm"])
        if "kl" in metrics:
            record("grpo/kl", metrics["kl"])
        self.logger.record("grpo/simulator_steps", self.simulator_steps)
        if isinstance(self._alternatives, Learned):
            for name in ("error", "one_step_error", "h_step_error", "end_error", "disagreement"):
                if name in self._alternatives.metrics:
                    record(f"grpo/world_{name}", self._alternatives.metrics[name])
            record("grpo/world_used", float(config.candidates != "episodes"))
        elif config.candidates not in ("episodes", "trajectory"):
            record("grpo/world_error", 0.0)  # a simulator or a clone is the environment

    # State ----------------------------------------------------------------------------------------------------------

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seeds the environments, the model's own key, and (as SB3 does) Python, NumPy and torch; None: nothing."""
        super().set_random_seed(seed)
        if seed is not None:
            self._reseed(seed)

    def _reseed(self, seed: int | None) -> None:
        sequence = np.random.SeedSequence(seed)  # None: the operating system's entropy
        self.key_words = sequence.generate_state(2, np.uint32)
        if getattr(self, "policy", None) is not None:
            self.policy.seed(int(self.key_words[0]))

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """See SB3; an env of another kind (on the device or not) changes what is compared."""
        super().set_env(env, force_reset)
        self._set_alternatives(self._choose())

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "lr_schedule",  # made of learning_rate
            "_jax_device",
            "_reward",
            "_alternatives",
            "_trajectory",
            "_reference",
            "_world",
        ]

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """Writes SB3's zip; nothing that ``load`` reads by default is pickled, a failed save leaves the old file.

        Args:
          path: file name (``.zip`` is added) or binary file.
          exclude: attributes to leave out.
          include: attributes to keep that are left out by default.
        """
        excluded = (set(self._excluded_save_params()) | set(exclude or ())) - set(include or ())
        excluded.add("policy")  # its parameters are stored without pickle
        data = {name: value for name, value in vars(self).items() if name not in excluded}
        params: dict[str, Any] = {name: _arrays(entry) for name, entry in self.get_parameters().items()}
        if isinstance(self._alternatives, Learned):
            params["world"] = self._alternatives.state_dict()
        elif self._world is not None:
            params["world"] = self._world
        if self._reference is not None:
            params["reference"] = _arrays(self.policy.state_dict_of(self._reference))
        serialization.save_zip(path, data, params)

    @classmethod
    def load(
        cls: type[SelfGRPO],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        *,
        allow_pickle: bool = False,
        **kwargs: Any,
    ) -> SelfGRPO:
        """A new model from a file; training goes on from it.

        Args:
          path: file name or binary file.
          env: to train in; its number of environments may differ.
          device: see the class.
          custom_objects: replace what the file holds, by attribute: a reward function, a schedule of your own.
          print_system_info: of the file and of this machine.
          force_reset: reset the env before training.
          allow_pickle: unpickle what the file holds beyond plain data. Only for files you trust: it can run any code.
          **kwargs: attributes to change; with a ``seed``, random numbers start anew from it.

        Raises:
          ValueError: not a file of GRPO, or other spaces or policy arguments than the file's.
        """
        if custom_objects is not None and not isinstance(custom_objects, dict):
            raise ValueError(f"custom_objects={custom_objects!r} must be a dict or None")
        if print_system_info:
            print("== CURRENT SYSTEM INFO ==")
            get_system_info()
        replaced = {name: value for name, value in kwargs.items() if name != "policy_kwargs"}
        data, params = serialization.load_zip(
            path,
            custom_objects={**(custom_objects or {}), **replaced},
            allow_pickle=allow_pickle,
            print_system_info=print_system_info,
        )
        stored = data.setdefault("policy_kwargs", kwargs.get("policy_kwargs", {}))
        if kwargs.get("policy_kwargs", stored) != stored:
            raise ValueError(
                f"The specified policy kwargs do not equal the stored policy kwargs. Stored kwargs: {stored},"
                f" specified kwargs: {kwargs['policy_kwargs']}"
            )
        for name in ("observation_space", "action_space", "policy_class"):
            if name not in data:
                raise KeyError(f"{path} holds no {name}; pass it in custom_objects={{{name!r}: ...}}")
        if env is not None:
            env = cls._wrap_env(env, data["verbose"])
            check_for_correct_spaces(env, data["observation_space"], data["action_space"])
            if force_reset:
                data["_last_obs"] = None
            if env.num_envs != data.get("n_envs"):
                data["_last_obs"] = None
                data["episode_time"] = np.zeros(env.num_envs, np.int32)
            data["n_envs"] = env.num_envs
        reference, world = params.pop("reference", None), params.pop("world", None)
        model = cls(data["policy_class"], env, device=device, _init_setup_model=False)
        model._world = world
        model.__dict__.update(data)
        model.__dict__.update(kwargs)
        if "branch_every" not in kwargs and model.n_steps % (model.branch_every or 1):
            model.branch_every = None  # it was for another n_steps
        model._setup_model()
        if kwargs.get("seed") is None:  # a new seed starts a new stream
            model.key_words = data.get("key_words", model.key_words)
        model.set_parameters(params, exact_match=True, device=device)
        if reference is not None:
            model._reference = jax.device_put(model.policy.state_from(reference), model._jax_device)
        return model

    def get_parameters(self) -> dict[str, dict]:
        """``{"policy": {name: tensor}, "policy.optimizer": {name: tensor}}``, copies on the CPU."""
        return {"policy": self.policy.state_dict(), "policy.optimizer": self.policy.optimizer.state_dict()}

    def set_parameters(
        self,
        load_path_or_dict: str | dict[str, Any],
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """Takes over parameters from a file or from what ``get_parameters`` gave; see SB3."""
        if not isinstance(load_path_or_dict, dict):
            _, load_path_or_dict = serialization.load_zip(load_path_or_dict, load_data=False)
            for name in ("reference", "world"):
                load_path_or_dict.pop(name, None)
        super().set_parameters(load_path_or_dict, exact_match, device)
        self.policy.state = jax.device_put(self.policy.state, self._jax_device)
        self.policy.optimizer.state = jax.device_put(self.policy.optimizer.state, self._jax_device)


@functools.partial(jax.jit, static_argnames="policy")
def _learn(
    config: GRPOConfig,
    world: World | None,
    policy: Policy,
    learner: Learner,
    trajectory: Trajectory,
    words: jax.Array,
    iteration: int,
    evaluated: tuple[Group, Branches] | None,
) -> tuple[loop.TrainState, Metrics]:
    state = train_state(policy, learner, None, words, iteration)
    if world is not None and trajectory.state is None:
        environments = trajectory.environments.replace(state=states_of(world, trajectory.observation))
        trajectory = trajectory.replace(environments=environments)
    state, metrics = loop.learn(config, world, state, trajectory, 0.0, evaluated)
    return state.replace(key=jax.random.key_data(state.key)), metrics


@jax.jit
def _next_key(words: jax.Array) -> jax.Array:
    return jax.random.key_data(loop.iteration_keys(bits_to_keys(words)).next)


def _arrays(state_dict: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in state_dict.items()}


def _check_policy(policy: Any) -> None:
    if isinstance(policy, str) or (isinstance(policy, type) and issubclass(policy, GRPOPolicy)):
        return
    raise TypeError(
        f"policy={policy!r} must be 'MlpPolicy', 'CnnPolicy', 'MultiInputPolicy' or a class derived from"
        " sb3_bridge.MlpPolicy and its like: a policy of torch cannot run in JAX"
    )


def _jax_device(device: th.device | str) -> Any:
    """JAX's device for SB3's ``device``; where there is no GPU, "cuda" means the CPU, as in SB3."""
    kind = th.device(device).type if str(device) != "auto" else "auto"
    if kind == "auto":
        return jax.devices()[0]
    try:
        return jax.devices("gpu" if kind == "cuda" else kind)[0]
    except RuntimeError:
        return jax.devices("cpu")[0]
