"""What runs behind the contract of ``GRPO``: where candidates are followed, the rollout, the update."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from grpo_jax import counter
from grpo_jax.cache import enable_cache
from grpo_jax.config import GRPOConfig
from grpo_jax.groups import candidates as candidate_sets
from grpo_jax.learning.update import Learner, start_learner
from grpo_jax.policies.distributions import for_space
from grpo_jax.training.diagnose import SPREAD_ITERATIONS, warn_without_spread
from grpo_jax.types import Trajectory
from sb3_bridge import regime
from sb3_bridge.acting import Acting
from sb3_bridge.alternatives import Alternatives, Clones, Followed, Function, Learned, Twins
from sb3_bridge.clones.brancher import Brancher
from sb3_bridge.compiling import telling
from sb3_bridge.functions.reward import Reward, original_errors, resolve_reward
from sb3_bridge.masks import has_masks
from sb3_bridge.numbers import check_rewards, check_update, of_iteration
from sb3_bridge.place import Keeper, keeper_of
from sb3_bridge.policies.policy import GRPOPolicy
from sb3_bridge.policies.spaces import to_action_space
from sb3_bridge.rollout.callbacks import RolloutView
from sb3_bridge.rollout.device import Simulator, collect_on_device, find_simulator, override
from sb3_bridge.rollout.host import collect_on_host
from sb3_bridge.settings import as_schedule, config_of, jax_device, on_its_device
from sb3_bridge.twins import pace
from sb3_bridge.update import follow, improve, next_key, record

_NOT_SAVED: tuple[str, ...] = ("lr_schedule", "_jax_device", "_reward", "_alternatives", "_trajectory")
_NOT_SAVED += ("_reference", "_world", "_keeper", "_told_of_masks")


class Training(Acting):
    """The two halves of an iteration, and what they need to know of the environment; :class:`GRPO` is its contract.

    Attributes:
      policy: actor and critic.
      rollout_buffer: the last rollout, read-only.
      simulator_steps: world steps that were spent in branches.
      key_words: words of the PRNG key that the next iteration takes, uint32 ``[2]``.
      episode_time: steps since the last reset of each environment that is stepped on the host, int32 ``[N]``.
      chosen_dynamics: what ``dynamics`` came to; ``"episodes"`` where there are no alternatives.
    """

    policy: GRPOPolicy
    rollout_buffer: RolloutView  # type: ignore[assignment]
    env: Any
    batch_size: int
    n_epochs: int
    target_kl: float | None
    kl_coef: float | None
    reward_function: Any
    dynamics: Any
    candidates: Any
    group_size: int
    max_enumerated: int
    horizon: Any
    branch_every: Any
    n_rollouts: int
    persistence: Any
    bootstrap: Any
    baseline: Any
    cache: bool
    _jax_device: Any

    def _start_counting(self) -> None:
        """What a model that was never trained knows of its training."""
        self.simulator_steps = 0
        self.key_words: np.ndarray = np.zeros(2, np.uint32)
        self.episode_time: np.ndarray = np.zeros(self.n_envs if self.env is not None else 0, np.int32)
        self.chosen_dynamics: regime.Kind = "episodes"
        self._n_iterations = 0
        self._n_optimizer_steps = 0
        self._pace = pace.start()
        self._frac_zero_std: list[float] = []
        self._frac_below_floor: list[float] = []
        self._spread_was_judged = False
        self._reward: Reward | None = None
        self._alternatives: Alternatives | None = None
        self._world: Any = None  # a learned world from a file, until there is an env to branch for
        self._trajectory: Trajectory | None = None
        self._reference: Any = None
        self._keeper: Keeper | None = None

    # Being made -----------------------------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, as_schedule(name, value))
        if name == "learning_rate" and "policy" in vars(self):
            self._setup_lr_schedule()

    def _setup_model(self) -> None:
        if self.cache:
            enable_cache()
        self._setup_lr_schedule()
        self._reseed(self.seed)
        self.set_random_seed(self.seed)
        regime.check_dynamics(self.dynamics)
        choice = self._choose()
        self.chosen_dynamics = choice.kind
        is_open = choice.kind == "twin" and self.bootstrap is None
        for name, value in regime.defaults(choice.kind, vars(self), choice.is_sparse).items():
            setattr(self, name, value)
        self._pace["critic_if_silent"] |= is_open and self.bootstrap
        self.rollout_buffer = RolloutView(self.n_steps, self.n_envs)
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
        config = config_of(self)
        candidate_sets.resolve(config, self.policy.structure.distribution)
        # Placed explicitly, as an update's result is: otherwise the second update compiles again.
        learner = jax.device_put(start_learner(config, self.policy.state), self._jax_device)
        self.policy.optimizer.state = learner.optimizer
        if self.env is not None:
            self._set_alternatives(choice)

    def _reseed(self, seed: int | None) -> None:
        sequence = np.random.SeedSequence(seed)  # None: the operating system's entropy
        self.key_words = sequence.generate_state(2, np.uint32)
        if getattr(self, "policy", None) is not None:
            self.policy.seed(int(self.key_words[0]))

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *_NOT_SAVED]

    def __getstate__(self) -> dict[str, Any]:
        # What is open or compiled is made anew: files of the logger, programs, clones.
        kept = {name: value for name, value in vars(self).items() if name not in (*_NOT_SAVED, "_logger")}
        return kept | {"_world": self._learned_world(), "_reference": jax.device_get(self._reference)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(dict.fromkeys(_NOT_SAVED) | state)
        self._jax_device = jax_device(self.device)
        self._setup_lr_schedule()
        if self.reward_function is not None:
            self._reward = resolve_reward(self.reward_function, self.observation_space, self.action_space)
        if self.env is not None:
            verbose, self.verbose = self.verbose, 0
            self._set_alternatives(self._choose())
            self.verbose = verbose

    def _learned_world(self) -> Any:
        return self._alternatives.state_dict() if isinstance(self._alternatives, Learned) else self._world

    # What kind of run it is -----------------------------------------------------------------------------------------

    def _find_simulator(self) -> Simulator | None:
        """The world that can be branched in, if there is one."""
        simulator = find_simulator(self.env)
        if self.dynamics == "simulator" and simulator is None and self.env is not None:
            raise ValueError(
                "dynamics='simulator' needs a WorldVecEnv (bare, or within VecMonitor) or env='gymnax/<id>'; use"
                f" dynamics='auto' for {self.env}"
            )
        return simulator

    def _choose(self) -> regime.Choice:
        """Where alternatives come from, by ``dynamics``, ``candidates`` and the env."""
        if self.env is None:
            return regime.Choice(self.chosen_dynamics)  # what a file says, until there is an env
        if self._find_simulator() is not None:
            if self.dynamics not in ("auto", "simulator"):
                raise ValueError(
                    f"dynamics={self.dynamics!r} has no meaning in a WorldVecEnv, which is a simulator itself: use"
                    " dynamics='auto'"
                )
            return regime.Choice("simulator")
        if self.candidates in ("episodes", "trajectory"):
            return regime.Choice("episodes")
        return regime.choose(self.dynamics, *self._asked(), self._cost, self._patience())

    def _asked(self) -> tuple[VecEnv, spaces.Space, Any]:
        """What decides whether a world is learned: under ``"auto"`` for a reward function, or where branches are a must."""
        is_learned = self.reward_function is not None or not self.dynamics == self.candidates == "auto"
        return self.env, self.observation_space, self._compares_episodes if is_learned else None

    def _compares_episodes(self) -> GRPOConfig:
        persistence = 0.5 if callable(self.persistence) else self.persistence
        return GRPOConfig(candidates="episodes", baseline=self.baseline, persistence=persistence)

    def _groups(self) -> tuple[str, int]:
        """The kind and the number of the candidates that are branched."""
        sets = GRPOConfig(
            **{name: getattr(self, name) for name in ("candidates", "group_size", "max_enumerated")}
        )
        distribution = for_space(to_action_space(self.action_space))
        kind = candidate_sets.resolve(sets, distribution)
        return kind, candidate_sets.n_candidates(sets, distribution)

    def _patience(self) -> float:
        is_sampled, has_reward = self._groups()[0] == "sample", self.reward_function is not None
        before = self.chosen_dynamics if self._n_iterations else None
        return regime.patience_with(self.candidates, is_sampled, has_reward, before)

    def _cost(self, brancher: Brancher, is_sparse: bool) -> regime.Cost:
        """What the branches of clones will take, and the rest."""
        settings = regime.defaults("clone", vars(self), is_sparse)
        seconds = brancher.seconds(1, self._groups()[1], settings["horizon"], self.n_rollouts)
        return regime.Cost.of(brancher, float(1e3 * seconds / settings["branch_every"]), self.n_epochs)

    def _set_alternatives(self, choice: regime.Choice) -> None:
        """Makes what was chosen; says so, and warns of what it will cost."""
        assert self.env is not None
        self.chosen_dynamics, self._is_masked = choice.kind, has_masks(self.env)
        before, self._alternatives, self._keeper = self._alternatives, None, None
        if choice.brancher is not None:
            clones = Clones(choice.brancher, self._reward, is_demanded=self.dynamics != "auto")
            normalizer = self.get_vec_normalize_env()
            clones.sees_last = normalizer is None or not normalizer.norm_obs
            self._alternatives = clones
        elif choice.twin is not None:
            self._alternatives = Twins(choice.twin, self._reward, is_demanded=self.dynamics != "auto")
        elif choice.kind == "learned":
            regime.check_learnable(self.env, self.observation_space)
            self._compares_episodes()  # refuses now what it would refuse then
            self._alternatives = before if isinstance(before, Learned) else self._new_world()
        elif choice.kind == "function":
            regime.check_unnormalized(self.env, "f")
            self._alternatives = Function(self.dynamics, self.policy, self._reward)
        where = "the simulator" if self._alternatives is None else self._alternatives.description
        distribution = self.policy.structure.distribution
        self._say(regime.describe(config_of(self), distribution, where, choice.reason, self.bootstrap))
        ms = 0.0 if choice.brancher is None else self._cost(choice.brancher, choice.is_sparse).branches
        if ms > regime.WARNED_MS:
            warnings.warn(regime.of_cost(ms, vars(self)), UserWarning, stacklevel=4)

    def _new_world(self) -> Learned:
        words = np.random.SeedSequence([int(word) for word in self.key_words])
        learned = Learned(self.policy, self._reward, words.generate_state(2, np.uint32))
        if self._world is not None:
            learned.load_state_dict(self._world)
            self._world = None
        return learned

    def _say(self, text: str) -> None:
        if self.verbose >= 1:
            print(text)

    # The two halves of an iteration ---

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # The last rollout may go beyond total_timesteps: no schedule is asked for progress below 0.
        super()._update_current_progress_remaining(min(num_timesteps, total_timesteps), total_timesteps)

    @on_its_device
    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int
    ) -> bool:
        """One rollout, on the device where the environment is there, else on the host.

        Returns:
          Whether training goes on: False where a callback said stop.
        """
        del rollout_buffer, n_rollout_steps  # the trajectory is kept as arrays, of n_steps
        self.policy.set_training_mode(False)
        if (self.rollout_buffer.buffer_size, self.rollout_buffer.n_envs) != (self.n_steps, self.n_envs):
            self.rollout_buffer = RolloutView(self.n_steps, self.n_envs)
        callback.on_rollout_start()
        keeper = keeper_of(self)
        keeper.begin(self)
        config, simulator = config_of(self), self._find_simulator()
        with original_errors(), telling(self._say, "the rollout"), keeper.restoring():
            if simulator is not None:
                self._trajectory = collect_on_device(self, config, simulator, self._reward, callback)
            else:
                watcher = None
                if isinstance(self._alternatives, Clones | Twins) and config.candidates != "episodes":
                    (watcher := self._alternatives).start(config, self._n_iterations)
                self._trajectory = collect_on_host(self, config, env, self._reward, callback, watcher)
        if self._trajectory is None:
            self.key_words = np.asarray(next_key(self.key_words))  # what was drawn is used up
            keeper.is_within = False
            return False
        callback.on_rollout_end()
        return True

    @on_its_device
    def train(self) -> None:
        """Groups and update of the last rollout, in one program."""
        assert self._trajectory is not None, "train() comes after collect_rollouts()"
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)  # type: ignore[arg-type]
        config, simulator, trajectory = config_of(self), self._find_simulator(), self._trajectory
        learner = Learner(
            policy=self.policy.state,
            optimizer=self.policy.optimizer.state,
            reference=self._reference_policy(),
            n_updates=np.int32(self._n_optimizer_steps),  # type: ignore[arg-type]
        )
        followed = Followed()
        self._trajectory = None
        with original_errors(), of_iteration(self._n_iterations + 1), telling(self._say, "the update"):
            check_rewards(trajectory)
            if simulator is not None:
                world = override(simulator.env.world, self._reward)
                followed = Followed(world, owners=(simulator.env.program_owner, self._reward))
            elif self._alternatives is not None and config.candidates != "episodes":
                followed = self._alternatives.follow(config, self.policy, trajectory, self.key_words)
                if followed.world is None and followed.branches is None:
                    config = config.replace(**regime.as_episodes({"baseline": config.baseline}))
            if simulator is None:  # what the reward function saw is of no more use
                environments = trajectory.environments.replace(state=followed.states)
                trajectory = trajectory.replace(environments=environments)
            rest = self.policy.structure, learner, trajectory, self.key_words, self._n_iterations
            branches = followed.branches
            if followed.world is not None and config.candidates not in ("episodes", "trajectory"):
                branches = follow.of(*followed.owners)(config, followed.world, *rest)
            state, metrics = improve(config, *rest, branches)
            metrics, n_simulator_steps, words, n_updates = jax.device_get(
                (metrics, state.simulator_steps, state.key, state.learner.n_updates)
            )
            check_update(metrics, trajectory, branches and branches[1].returns)
        keeper_of(self).is_within = False
        before, self._pace = self._pace, pace.noted(config, self._pace, metrics)
        if self.persistence is None and pace.stays_silent(self._pace) and not pace.stays_silent(before):
            self._say(
                f"GRPO: actions make no difference: from now on they persist (persistence={pace.PERSISTENCE})"
            )
        self.policy.state = state.learner.policy
        self.policy.optimizer.state = state.learner.optimizer
        self._reference = state.learner.reference
        self.key_words = np.asarray(words)
        self.simulator_steps += counter.to_int(n_simulator_steps) + followed.n_steps
        self._n_optimizer_steps = int(n_updates)
        self._n_iterations += 1
        # Epochs that were begun, as PPO counts: target_kl may have stopped them.
        taken = int(metrics["n_updates"])
        self._n_updates += min(self.n_epochs, taken // config.n_minibatches + 1)
        self._log(config, metrics)
        if self.target_kl is not None and taken < config.n_updates:
            limit = f"1.5 * target_kl = {1.5 * self.target_kl:.3g}"
            self._say(
                f"Early stopping after {taken} of {config.n_updates} steps: KL(pi_old || pi) exceeded {limit}"
            )
        if self._n_iterations <= SPREAD_ITERATIONS and not self._pace["is_silent"]:
            self._frac_zero_std.append(float(metrics["frac_zero_std"]))
            self._frac_below_floor.append(float(metrics["frac_below_floor"]))
            if self._n_iterations == SPREAD_ITERATIONS:
                self._judge_spread()
        if isinstance(self._alternatives, Clones | Twins) and self._alternatives.failure:
            self._leave(self._alternatives.failure)

    def _leave(self, why: str) -> None:
        """Goes on without the clones, or the twin, that proved not to do what the environments do."""
        assert self.env is not None
        is_twin, asked = isinstance(self._alternatives, Twins), self._asked()
        self.logger.warn(f"GRPO follows candidates in {'a twin' if is_twin else 'clones'} no longer: {why}")
        if is_twin:
            choice = regime.choose("auto", *asked, self._cost, self._patience(), why)
        else:
            choice = regime.choose_without_clones(why, *asked)
        self._set_alternatives(choice)

    def _judge_spread(self) -> None:
        """Says once that the first groups had nothing to tell, if that is so."""
        if self._frac_zero_std and not self._spread_was_judged:
            self._spread_was_judged = True
            warn_without_spread(config_of(self), self._frac_zero_std, self._frac_below_floor)

    def _reference_policy(self) -> Any:
        """The reference kept so far; at first the policy as it is now, parameters that were loaded included."""
        if self.kl_coef is None:
            return None
        return self.policy.state if self._reference is None else self._reference

    def _log(self, config: GRPOConfig, metrics: Any) -> None:
        """PPO's keys under ``train/``, ours under ``grpo/``."""
        world = self._alternatives.metrics if isinstance(self._alternatives, Learned) else None
        record(self.logger, config, metrics, self.policy, world)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("grpo/simulator_steps", self.simulator_steps)
        is_environment = self.chosen_dynamics in ("simulator", "twin", "clone")
        if is_environment and config.candidates not in ("episodes", "trajectory"):
            self.logger.record("grpo/world_error", 0.0)
