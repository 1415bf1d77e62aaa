"""``GRPO``: the contract of Stable-Baselines3's ``PPO`` over the algorithm of ``grpo_jax``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

import jax
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule

from grpo_jax.config import Backup, Baseline, KLEstimator, Reference, Scale, Surrogate, TrajectoryForm
from grpo_jax.presets import preset
from sb3_bridge import regime
from sb3_bridge.files.model import arrays_of, fit_to_env, read_model, read_parameters
from sb3_bridge.files.model_zip import File, checked, save_zip
from sb3_bridge.gymnax.presets import arguments_of, find_preset
from sb3_bridge.gymnax.registration import world_id
from sb3_bridge.gymnax.vec_env import WorldVecEnv
from sb3_bridge.place import go_on, keeper_of
from sb3_bridge.policies import torch_policy
from sb3_bridge.policies.compiled import check_process
from sb3_bridge.policies.policy import CnnPolicy, MlpPolicy, MultiInputPolicy, no_larger_than, to_policy_class
from sb3_bridge.settings import config_of, jax_device
from sb3_bridge.training import Training

SelfGRPO = TypeVar("SelfGRPO", bound="GRPO")


class GRPO(Training):
    """Group Relative Policy Optimization behind Stable-Baselines3's API: ``PPO`` replaced by ``GRPO`` works.

    In a :class:`WorldVecEnv` (or ``"gymnax/<id>"``) every candidate action of every state is followed in the simulator,
    and whole iterations run on the device. Any other environment is stepped on the host, and candidates are followed in
    exact copies of it, in a world that is learned from it, or in a transition function of yours: see ``dynamics``. Where
    nothing of that can be had, the groups are the episodes of a rollout; with ``bootstrap`` this learns as PPO does.

    Arguments under PPO's names mean what they mean in PPO; those without a meaning in the chosen regime are accepted,
    with a warning where they were set. All arguments behind ``_init_setup_model`` are GRPO's own.

    Args:
      policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"``, or a class derived from ``sb3_bridge``'s.
      env: Gymnasium id, ``"gymnax/<id>"`` or another suite's (``"brax/ant"``), Gymnasium env or SB3 VecEnv.
      learning_rate: a number, or a function of the remaining progress (1 to 0).
      n_steps: steps of each environment in a rollout; None: 512 where candidates are followed in a twin, in clones or in a
        function of yours, else 2048.
      batch_size: decision states in a minibatch.
      n_epochs: passes over a rollout.
      gamma: discount factor.
      gae_lambda: lambda of the critic's targets, where ``bootstrap`` is on.
      clip_range: of the ratio pi/pi_old; a number or a function of the remaining progress.
      clip_range_vf: of the critic's values; None: not clipped.
      normalize_advantage: ``advantage_scale="batch"`` (True) or ``"none"`` (False), unless that is given.
      ent_coef: weight of the entropy bonus; a number or a function of the remaining progress.
      vf_coef: weight of the value loss, where ``bootstrap`` is on.
      max_grad_norm: bound on the gradient's norm, of actor and critic each; of both together where episodes are compared.
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
      dynamics: where alternatives come from. ``"simulator"``: the gymnax world. ``"twin"``: a JAX world with the
        environments' own dynamics (Gymnasium's classic control, or see :func:`sb3_bridge.register_twin`), branched on the
        device. ``"clone"``: exact copies of the environments, stepped on the host; a pair ``(get_state, set_state)``: the
        same by functions of yours, ``get_state(env.unwrapped) -> state`` and ``set_state(env.unwrapped, state)``.
        ``"learned"``: a world that is learned from all real transitions (vector observations; until it predicts well,
        episodes are compared). A function ``f(state, action) -> next_state`` or ``-> (next_state, terminated)``: yours, in
        JAX, NumPy or torch, for one transition or a batch, with a ``reward_function``. ``"auto"``: the simulator where there
        is one, else a twin, else clones where they repeat the original and are worth their time, else a learned world where
        there is a ``reward_function``, else episodes; the choice and its reason are printed at
        ``verbose=1`` and kept in ``chosen_dynamics``.
      candidates: ``"auto"``, ``"enumerate"``, ``"sample"``, ``"trajectory"`` or ``"episodes"``, see
        :class:`grpo_jax.GRPOConfig`, as for all that follow.
      group_size: candidates of a sampled group.
      max_enumerated: largest action space whose actions are all compared.
      trajectory_form: what a group of trajectories compares: ``"outcome"`` or ``"process"``.
      horizon: steps of a branch, the candidate's own included; None: 128 in a simulator or a twin, 64 elsewhere (256 in clones
        whose steps are expensive), 16 there with a ``reward_function``.
      branch_every: one decision state in so many is branched, others in every rollout; the rest is learned from as in PPO, with
        ``bootstrap``. None: all in a simulator or a twin, elsewhere as many as cost 16 steps of each candidate for a decision step.
      n_rollouts: branches of each candidate.
      backup: ``"mean"`` or (optimistic) ``"max"`` over a candidate's branches.
      persistence: probability that the action before is repeated instead of asking the policy, in rollouts and in
        branches, for rewards that only many equal actions reach; number or function of the remaining progress. None: 0, but
        in a twin, without ``reward_function``, 0.8 for the first sampled actions, and for others while they change nothing.
      branch_past_truncation: whether branches go on where a time limit would cut the episode.
      bootstrap: whether a critic values what lies behind a branch or a rollout; None: not in a simulator, not with a
        ``reward_function`` where its consequences are followed, and in a twin only until candidates differ without one.
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
      spread_floor: spread of a group, as a share of its largest return, that counts as none.
      cache: keep compiled programs on disk for later processes, see :func:`grpo_jax.enable_cache`.

    Raises:
      ValueError, TypeError: what is wrong with which argument, and the fix.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }

    def __init__(
        self,
        policy: str | type[BasePolicy],
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
        dynamics: regime.Dynamics = "auto",
        candidates: str = "auto",
        group_size: int = 8,
        max_enumerated: int = 64,
        trajectory_form: TrajectoryForm = "outcome",
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
        spread_floor: float = 1e-6,
        cache: bool = True,
    ):
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        given["policy"] = to_policy_class(policy)
        if isinstance(env, str) and (world := world_id(env)) is not None:
            given["env"] = WorldVecEnv(world, render_mode="rgb_array")
        of_base = inspect.signature(OnPolicyAlgorithm).parameters
        super().__init__(
            **{name: value for name, value in given.items() if name in of_base}
            | {"_init_setup_model": False},
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
        )
        for name, value in given.items():
            if name not in of_base:
                setattr(self, name, value)
        self._jax_device = jax_device(device)
        self._start_counting()
        if _init_setup_model:
            self._setup_model()
            if self.env is not None:
                defaults = {one.name: one.default for one in inspect.signature(GRPO).parameters.values()}
                config = config_of(self).replace(bootstrap=self.bootstrap)
                regime.warn_of_arguments(config, self.policy.structure.distribution, given, defaults)
            self.use_sde = False

    @classmethod
    def from_preset(cls: type[SelfGRPO], env: str | WorldVecEnv, **overrides: Any) -> SelfGRPO:
        """A model with the settings that are known to work for a gymnax id, on the device.

        ``GRPO.from_preset(id, seed=0).learn(grpo_jax.preset_timesteps(id))`` is the run that the preset is meant for, and
        ``grpo_jax.preset_expectation(id)`` what to expect of it.

        Args:
          env: gymnax id (``"CartPole-v1"`` or ``"gymnax/CartPole-v1"``), stepped in as many environments as the preset
            says; or a :class:`WorldVecEnv` made from an id.
          **overrides: arguments of the class that replace the preset's; ``policy_kwargs`` replace its own one by one.

        Raises:
          ValueError: an unknown id, one without a preset, or a preset that the class has no arguments for.
        """
        env_id, vec_env = find_preset(env)
        settings = arguments_of(preset(env_id), vec_env.world.observation_space)
        policy_kwargs = settings["policy_kwargs"] | (overrides.pop("policy_kwargs", None) or {})
        return cls(env=vec_env, **{**settings, "policy_kwargs": policy_kwargs, **overrides})

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
          ValueError: no env; an env that gives NaN or inf; ``total_timesteps`` below 0 (0 only sets up), or no integer.
        """
        check_process()
        if self.env is None:
            raise ValueError("learn() needs an environment: set_env(env), or load(path, env=env)")
        if isinstance(total_timesteps, bool) or not (0 <= total_timesteps == int(total_timesteps)):
            raise ValueError(
                f"total_timesteps={total_timesteps!r} must be a whole number of steps, 0 or more"
            )
        super().learn(
            int(total_timesteps), callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar
        )
        self._judge_spread()
        return self

    # Torch ----------------------------------------------------------------------------------------------------------

    def to_torch(self) -> ActorCriticPolicy:
        """SB3's policy with equal actions, values and log-probabilities, for export and deployment."""
        return torch_policy.to_torch(self.policy, self._is_masked)

    def to_sb3(self) -> PPO:
        """A ``PPO`` with the same policy and, where both have them, settings; it predicts, saves, loads and trains."""
        return torch_policy.to_sb3(self)

    @classmethod
    def from_torch(
        cls: type[SelfGRPO],
        source: PPO | ActorCriticPolicy,
        env: GymEnv | str | None = None,
        **overrides: Any,
    ) -> SelfGRPO:
        """A model that goes on from a policy of SB3's.

        Args:
          source: ``PPO`` (whose settings are taken over too), or its policy.
          env: to train in; None: that of ``source``.
          **overrides: arguments of the class.

        Raises:
          TypeError, ValueError: a policy that ours cannot equal (gSDE, extractors or activations of one's own), by name.
        """
        arguments, its_policy = torch_policy.arguments_from(source)
        policy_kwargs = arguments["policy_kwargs"] | (overrides.pop("policy_kwargs", None) or {})
        env = arguments.pop("env", None) if env is None else env
        if env is None:
            raise ValueError("from_torch() needs an environment: pass env")
        model = cls(**{**arguments, "env": env, "policy_kwargs": policy_kwargs, **overrides})
        torch_policy.load_torch(model.policy, its_policy)
        model.policy.state = jax.device_put(model.policy.state, model._jax_device)
        return model

    # State ----------------------------------------------------------------------------------------------------------

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seeds the environments, the model's own key, and (as SB3 does) Python, NumPy and torch; None: nothing."""
        super().set_random_seed(seed)
        if seed is not None:
            self._reseed(seed)

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """See SB3; an env of another kind (on the device or not) changes what is compared."""
        super().set_env(env, force_reset)
        self._set_alternatives(self._choose())

    def save(
        self, path: File, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None
    ) -> None:
        """Writes SB3's zip; nothing that ``load`` reads by default is pickled, a failed save leaves the old file.

        Args:
          path: file name (``.zip`` is added) or binary file.
          exclude: attributes to leave out; ``"_environments"`` is where the environments stand.
          include: attributes to keep that are left out by default.
        """
        excluded = (set(self._excluded_save_params()) | set(exclude or ())) - set(include or ())
        excluded.add("policy")  # its parameters are stored without pickle
        data = {name: value for name, value in vars(self).items() if name not in excluded}
        if self.env is not None and self._last_obs is not None and "_environments" not in excluded:
            data["_environments"] = keeper_of(self).written(self)
        params: dict[str, Any] = {name: arrays_of(entry) for name, entry in self.get_parameters().items()}
        if (world := self._learned_world()) is not None:
            params["world"] = world
        if self._reference is not None:
            params["reference"] = arrays_of(self.policy.state_dict_of(self._reference))
        save_zip(path, data, params)

    @classmethod
    def load(
        cls: type[SelfGRPO],
        path: File,
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
          custom_objects: replace what the file holds: a reward function, a schedule of your own.
          print_system_info: of the file and of this machine.
          force_reset: reset the env before training. False goes on bit for bit as the run would have that wrote the file,
            in an env made as its was: environments, wrappers and counters are put where they stood (where the rollout
            began, for a file of a callback), or one warning says why not.
          allow_pickle: unpickle what the file holds beyond plain data. Only for files you trust: it can run any code.
          **kwargs: attributes to change; a ``seed`` starts random numbers anew. No file sets ``tensorboard_log``.

        Raises:
          ValueError: not a file of GRPO, a damaged one, or other spaces or policy arguments than the file's.
        """
        reading = {"print_system_info": print_system_info, "allow_pickle": allow_pickle}
        data, params = read_model(path, custom_objects, kwargs, owner=cls, **reading)
        if env is not None:
            env = cls._wrap_env(env, kwargs.get("verbose", data.get("verbose", 0)))
            fit_to_env(data, env, force_reset)
        model = cls(data["policy_class"], env, device=device, _init_setup_model=False)
        written = data.pop("_environments", None)
        for name, value in (data | kwargs).items():
            setattr(model, name, value)
        if "branch_every" not in kwargs and model.n_steps % (model.branch_every or 1):
            model.branch_every = None  # it was for another n_steps
        model._world = params.get("world")
        with no_larger_than(params):
            model._setup_model()
        params = checked(path, params, model.get_parameters())
        if kwargs.get("seed") is None:  # a new seed starts a new stream
            model.key_words = data.get("key_words", model.key_words)
        reference, _ = params.pop("reference", None), params.pop("world", None)
        model.set_parameters(params, exact_match=True, device=device)
        if reference is not None:
            model._reference = jax.device_put(model.policy.state_from(reference), model._jax_device)
        if env is not None and not force_reset and model._last_obs is not None:
            go_on(model, path, written, allow_pickle)
        return model

    def get_parameters(self) -> dict[str, dict]:
        """``{"policy": {name: tensor}, "policy.optimizer": {name: tensor, "param_groups": [...]}}``, copies on the CPU."""
        optimizer = self.policy.optimizer
        groups = [dict(group) for group in optimizer.param_groups]
        return {
            "policy": self.policy.state_dict(),
            "policy.optimizer": optimizer.state_dict() | {"param_groups": groups},
        }

    def set_parameters(
        self,
        load_path_or_dict: str | dict[str, Any],
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """Takes over parameters from a file or from what ``get_parameters`` gave; see SB3."""
        if not isinstance(load_path_or_dict, dict):
            load_path_or_dict = read_parameters(load_path_or_dict, self.get_parameters())
        super().set_parameters(load_path_or_dict, exact_match, device)
        self.policy.state = jax.device_put(self.policy.state, self._jax_device)
        self.policy.optimizer.state = jax.device_put(self.policy.optimizer.state, self._jax_device)
