"""All settings of a run, validated, with what shapes a program told apart from what only flows through it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import optax

from grpo_jax.scalars import as_integer, as_number, as_switch, check_number

Schedule = Callable[[Any], Any]
"""An optax schedule: from the number of optimizer steps so far to a value."""
Optimizer = Callable[[Any], optax.GradientTransformation]
"""From a learning rate (a number or a tracer) to an optimizer; equal ones (``==``, ``hash``) share their programs."""

Candidates = Literal["auto", "enumerate", "sample", "trajectory", "episodes"]
TrajectoryForm = Literal["outcome", "process"]
Backup = Literal["mean", "max"]
Baseline = Literal["policy", "mean", "leave_one_out", "executed", "shrinkage"]
Scale = Literal["none", "group", "batch"]
Surrogate = Literal["ppo", "cispo", "sapo", "tpo"]
KLEstimator = Literal["exact", "k1", "k2", "k3"]
Reference = Literal["fixed", "periodic", "ema"]
Decay = Literal["none", "linear", "cosine"]
Network = Literal["auto", "mlp", "cnn"]
Activation = Literal["tanh", "relu", "elu", "gelu", "silu", "leaky_relu"]


def _traced(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"traced": True})


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Settings of GRPO; every field is also a flag of the command line.

    A config is a pytree. Its *traced* fields (real numbers, told apart below) are leaves: changing one compiles
    nothing anew, and ``jax.vmap(lambda lr: train(config.replace(learning_rate=lr), ...))(rates)`` runs them side
    by side. All other fields are static: they shape the program.
    """

    n_envs: int = 16
    """Environments that are stepped side by side."""
    n_steps: int = 32
    """Steps of each environment in an iteration; n_envs * n_steps decision states are compared and learned from."""
    n_epochs: int = 4
    """Passes over the decision states of an iteration."""
    batch_size: int = 128
    """Decision states in a minibatch; where it does not divide n_envs * n_steps, the last one of an epoch is smaller."""

    candidates: Candidates = "auto"
    """Where a group comes from: all actions (enumerate), group_size draws from the policy (sample), group_size
    episodes from one reset (trajectory, needs no world to branch in), or whatever episodes the rollout holds (episodes,
    needs no common reset either). auto: enumerate small discrete spaces, else sample."""
    group_size: int = 8
    """Candidates in a sampled group, or episodes in a trajectory group."""
    max_enumerated: int = 64
    """Largest number of actions that auto enumerates."""
    trajectory_form: TrajectoryForm = "outcome"
    """What a trajectory group compares: the returns of whole episodes (outcome), or the returns to go at equal
    time (process)."""

    horizon: int = 64
    """Steps of a branch, the candidate's own included."""
    branch_every: int = 1
    """One decision state in so many is branched, others in every iteration. With bootstrap the others are learned from
    by their lambda-returns, as in PPO (but for persistence). Divides n_steps."""
    n_rollouts: int = 1
    """Branches of each candidate."""
    backup: Backup = "mean"
    """How the branches of a candidate become one return; max is optimistic."""
    bootstrap: bool = False
    """Whether a critic values the states where a branch was cut by the horizon or a time limit."""
    branch_past_truncation: bool = False
    """Whether branches go on where a time limit would cut the episode: late states then have a future to compare. Only
    for worlds whose truncation is nothing but a time limit."""
    common_random_numbers: bool = True
    """Whether the candidates of a state share their randomness, so that a difference is due to the action."""
    n_shards: int = 1
    """Parts that the environments are divided into, each of which shuffles its decision states on its own: what several devices
    need. Advantages' scales, statistics and gradients are over all. Divides n_envs and batch_size; a multiple of the devices."""
    max_branches: int = 0
    """Branches that run side by side; more are run in chunks. 0: on a CPU 4096, or as many as keep their states and
    observations within 2 MiB; else 1048576, or 4 GiB, at most a sixteenth of the device's memory."""

    baseline: Baseline = "policy"
    """What a return is compared with: the policy-weighted mean of the group, its plain mean, the mean of the other
    candidates, the same for the executed action alone, or a mean shrunk towards the batch's."""
    advantage_scale: Scale = "batch"
    """What advantages are divided by: nothing, the group's or the batch's standard deviation."""

    surrogate: Surrogate = "ppo"
    """Objective: ppo (clipped ratio), cispo (weight clipped from above), sapo (soft gate), tpo (target distribution)."""
    kl_estimator: KLEstimator = "exact"
    """How KL(pi || pi_ref) is measured, where kl_coef asks for it."""
    reference: Reference = "fixed"
    """Which policy pi_ref is: the first one, a copy made every reference_interval iterations, or a moving average."""
    reference_interval: int = 10
    """Iterations between two copies of a periodic reference."""

    network: Network = "auto"
    """Features extractor; auto: convolutions for feature maps, dense layers for everything else."""
    share_features_extractor: bool = False
    """Whether actor and critic learn one features extractor (the convolutions) together, where bootstrap is on."""
    net_arch: tuple[int, ...] | None = None
    """Dense layers of the actor. None: 64, 64 behind vectors, none behind convolutions."""
    critic_net_arch: tuple[int, ...] | None = None
    """Dense layers of the critic; None: as the actor's."""
    activation: Activation = "tanh"
    """Activation function."""
    normalize_observations: bool = False
    """Whether observations are normalised by their running mean and variance."""
    learning_rate_decay: Decay = "none"
    """How the learning rate falls to 0 over the run."""
    clip_range_decay: Decay = "none"
    """How the clip range falls to 0 over the run."""
    ent_coef_decay: Decay = "none"
    """How the weight of the entropy bonus falls to 0 over the run."""
    persistence_decay: Decay = "none"
    """How persistence falls to 0 over the run."""

    learning_rate: float | Schedule = _traced(3e-4)
    """Step size of Adam; a number, or in Python an optax schedule of the optimizer steps. [traced]"""
    gamma: float = _traced(0.99)
    """Discount factor. [traced]"""
    gae_lambda: float = _traced(0.95)
    """Lambda of the returns that the critic learns, where bootstrap is on. [traced]"""
    clip_range: float | Schedule = _traced(0.2)
    """How far the ratio pi/pi_old may fall below 1; a number, or in Python an optax schedule. [traced]"""
    clip_range_high: float | Schedule | None = _traced(None)
    """How far the ratio may rise above 1; None: clip_range. [traced]"""
    dual_clip: float | None = _traced(None)
    """Bound on the ratio where the advantage is negative (arXiv:1912.09729), above 1; None: no bound. [traced]"""
    sapo_temperature: float = _traced(1.0)
    """Temperature of sapo for positive advantages. [traced]"""
    sapo_temperature_negative: float = _traced(1.05)
    """Temperature of sapo for negative advantages. [traced]"""
    tpo_temperature: float = _traced(1.0)
    """Temperature of tpo's target distribution. [traced]"""
    ent_coef: float | Schedule = _traced(0.0)
    """Weight of the entropy bonus; a number, or in Python an optax schedule. [traced]"""
    vf_coef: float = _traced(0.5)
    """Weight of the value loss, where bootstrap is on. [traced]"""
    clip_range_vf: float | None = _traced(None)
    """How far a value may move in an update; None: no bound. [traced]"""
    persistence: float | Schedule | None = _traced(None)
    """Probability that the action before is repeated instead of asking the policy, in rollouts and in branches:
    exploration in depth, for rewards that only many equal actions reach; a number, or in Python an optax schedule;
    None: 0. [traced]"""
    kl_coef: float | None = _traced(None)
    """Weight of KL(pi || pi_ref); None: no reference policy is kept. [traced]"""
    reference_decay: float = _traced(0.99)
    """Decay per iteration of a moving-average reference. [traced]"""
    target_kl: float | None = _traced(None)
    """Stops the epochs of an iteration once KL(pi_old || pi) is 1.5 times this; None: never. [traced]"""
    max_grad_norm: float = _traced(0.5)
    """Bound on the norm of the actor's gradient, and on that of the critic's; on both together, as in PPO, where episodes
    are compared. [traced]"""
    spread_floor: float = _traced(1e-6)
    """Standard deviation of a group's returns, as a share of the largest of them, that counts as no spread. [traced]"""
    optimizer: Optimizer | None = None
    """Makes an optax optimizer from a learning rate, in Python only; None: Adam with eps=1e-5."""
    log_std_init: float = 0.0
    """Where the log standard deviation of a Gaussian policy starts, on actions scaled to [-1, 1]."""

    def __post_init__(self) -> None:
        for name in ("net_arch", "critic_net_arch"):
            if isinstance(widths := getattr(self, name), (list, tuple)):
                integers = tuple(as_integer(width) for width in widths)
                if all(type(width) is int for width in integers):
                    object.__setattr__(self, name, integers)
        # gamma=1 and gamma=1.0 are one program, and a NumPy number is a number.
        for names, convert in ((_WITHIN, as_number), (_AT_LEAST, as_integer), (_SWITCHES, as_switch)):
            for name in names:
                object.__setattr__(self, name, convert(getattr(self, name)))
        _validate(self)

    @property
    def n_states(self) -> int:
        """Decision states in an iteration."""
        return self.n_envs * self.n_steps

    @property
    def n_minibatches(self) -> int:
        """Minibatches in an epoch."""
        return -(-self.n_states // self.batch_size)

    @property
    def n_updates(self) -> int:
        """Optimizer steps in an iteration."""
        return self.n_epochs * self.n_minibatches

    def replace(self, **changes: Any) -> GRPOConfig:
        """A copy with some fields changed, validated."""
        unknown = sorted(set(changes) - {field.name for field in dataclasses.fields(self)})
        if unknown:
            raise TypeError(
                f"GRPOConfig has no field {', '.join(unknown)}; it has {', '.join(field_names())}"
            )
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """The config as JSON.

        Raises:
          TypeError: a field is a schedule or an array, which JSON cannot hold.
        """
        for name, value in vars(self).items():
            if callable(value) or isinstance(value, jax.Array):
                raise TypeError(f"{name}={value!r} cannot be written as JSON; use a number and {name}_decay")
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> GRPOConfig:
        """The config that ``to_json`` wrote; fields that it does not name keep their defaults."""
        return cls().replace(**json.loads(text))


def field_names(traced: bool | None = None) -> list[str]:
    """Names of the config's fields: all, the traced ones, or the static ones."""
    return [
        field.name
        for field in dataclasses.fields(GRPOConfig)
        if traced is None or field.metadata.get("traced", False) == traced
    ]


def scheduled(value: float | Schedule, decay: Decay, n_updates: Any, progress: Any) -> jax.Array:
    """The value of a schedule or of a decaying number now.

    Args:
      value: a number, or an optax schedule of the optimizer steps so far.
      decay: how a number falls to 0 over the run.
      n_updates: optimizer steps so far.
      progress: share of the run that is done, in [0, 1].
    """
    now = value(n_updates) if callable(value) else value
    if decay == "linear":
        return now * (1.0 - progress)
    if decay == "cosine":
        return now * optax.cosine_decay_schedule(1.0, 1)(progress)
    return jax.numpy.asarray(now)


def _flatten(config: GRPOConfig) -> tuple[list[Any], tuple[Any, ...]]:
    # Schedules are functions, which no leaf can be: they are part of the structure, and static.
    names = [name for name in field_names(traced=True) if not callable(getattr(config, name))]
    static = {name: value for name, value in vars(config).items() if name not in names}
    return [getattr(config, name) for name in names], (tuple(names), tuple(sorted(static.items())))


def _unflatten(structure: tuple[Any, ...], leaves: Any) -> GRPOConfig:
    names, static = structure
    config = object.__new__(GRPOConfig)  # leaves may be anything here (tracers, shapes): no validation
    for name, value in (*static, *zip(names, leaves, strict=True)):
        object.__setattr__(config, name, value)
    return config


jax.tree_util.register_pytree_node(GRPOConfig, _flatten, _unflatten)

_CHOICES = {
    "candidates": Candidates,
    "trajectory_form": TrajectoryForm,
    "backup": Backup,
    "baseline": Baseline,
    "advantage_scale": Scale,
    "surrogate": Surrogate,
    "kl_estimator": KLEstimator,
    "reference": Reference,
    "network": Network,
    "activation": Activation,
    "learning_rate_decay": Decay,
    "clip_range_decay": Decay,
    "ent_coef_decay": Decay,
    "persistence_decay": Decay,
}
_AT_LEAST = {
    "n_envs": 1,
    "n_steps": 1,
    "n_epochs": 1,
    "batch_size": 1,
    "horizon": 1,
    "branch_every": 1,
    "n_rollouts": 1,
    "group_size": 2,
    "max_enumerated": 2,
    "max_branches": 0,
    "n_shards": 1,
    "reference_interval": 1,
}
_WHY = {
    "horizon": "1 is the one-step reward; start with the number of steps until an action shows its consequence",
    "group_size": "a group of one has nothing to be compared with; use 4 to 16",
}
_WITHIN: dict[str, tuple[float, float]] = {
    "learning_rate": (0.0, math.inf),
    "gamma": (0.0, 1.0),
    "gae_lambda": (0.0, 1.0),
    "clip_range": (0.0, math.inf),
    "clip_range_high": (0.0, math.inf),
    "dual_clip": (1.0, math.inf),
    "sapo_temperature": (1e-6, math.inf),
    "sapo_temperature_negative": (1e-6, math.inf),
    "tpo_temperature": (1e-6, math.inf),
    "ent_coef": (-math.inf, math.inf),
    "vf_coef": (0.0, math.inf),
    "clip_range_vf": (0.0, math.inf),
    "persistence": (0.0, 1.0),
    "kl_coef": (0.0, math.inf),
    "reference_decay": (0.0, 1.0),
    "target_kl": (1e-12, math.inf),
    "max_grad_norm": (1e-12, math.inf),
    "spread_floor": (0.0, math.inf),
    "log_std_init": (-20.0, 2.0),
}

_OPTIONAL = ("clip_range_high", "dual_clip", "clip_range_vf", "persistence", "kl_coef", "target_kl")
_SCHEDULED = ("learning_rate", "clip_range", "clip_range_high", "ent_coef", "persistence")
_SWITCHES = (
    "bootstrap",
    "branch_past_truncation",
    "common_random_numbers",
    "normalize_observations",
    "share_features_extractor",
)


def _validate(config: GRPOConfig) -> None:
    for name, choices in _CHOICES.items():
        value = getattr(config, name)
        if not isinstance(value, str) or value not in get_args(choices):
            raise ValueError(f"{name}={value!r} must be one of {', '.join(get_args(choices))}")
    for name, least in _AT_LEAST.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            why = f" ({_WHY[name]})" if name in _WHY else ""
            raise ValueError(f"{name}={value!r} must be an integer of at least {least}{why}")
    for name, (low, high) in _WITHIN.items():
        value = getattr(config, name)
        if callable(value) and name not in _SCHEDULED:
            raise TypeError(f"{name}={value!r} must be a number; schedules are for {', '.join(_SCHEDULED)}")
        if not (callable(value) or (value is None and name in _OPTIONAL)):
            check_number(name, value, low, high)
    for name in _SWITCHES:
        if not isinstance(value := getattr(config, name), bool):
            raise TypeError(f"{name}={value!r} must be True or False")
    for name in ("net_arch", "critic_net_arch"):
        widths = getattr(config, name)
        if widths is not None and (
            not isinstance(widths, tuple) or any(type(width) is not int or width < 1 for width in widths)
        ):
            raise ValueError(f"{name}={widths!r} must hold positive layer sizes, such as (64, 64)")
    if config.n_steps % config.branch_every:
        raise ValueError(f"branch_every={config.branch_every} must divide n_steps={config.n_steps}")
    for name in ("n_envs", "batch_size"):
        if (size := getattr(config, name)) % config.n_shards:
            raise ValueError(
                f"{name}={size} must be a multiple of n_shards={config.n_shards}, the parts that devices share"
            )
    if config.candidates == "trajectory":
        if config.n_envs // config.n_shards % config.group_size:
            parts = "" if config.n_shards == 1 else f" n_shards={config.n_shards} times"
            raise ValueError(
                f"n_envs={config.n_envs} must be a multiple of{parts} group_size={config.group_size}: a trajectory group"
                " is group_size environments from one reset"
            )
        if config.bootstrap:
            raise ValueError(
                "bootstrap=True has no meaning with candidates='trajectory', whose returns are whole episodes;"
                " use bootstrap=False, or candidates='enumerate', 'sample' or 'episodes'"
            )
    if config.optimizer is not None and not callable(config.optimizer):
        raise TypeError(
            f"optimizer={config.optimizer!r} must be a function from a learning rate to an optax optimizer, such as"
            " optax.adamw"
        )
    if config.persistence is not None and (
        config.candidates in ("trajectory", "episodes") or config.baseline == "executed"
    ):
        where = "candidates" if config.candidates in ("trajectory", "episodes") else "baseline"
        raise ValueError(
            f"persistence={config.persistence!r} cannot be used with {where}={getattr(config, where)!r}, which learns"
            " from the executed actions: they would not be the policy's own; use persistence=None"
        )
    if config.candidates in ("trajectory", "episodes") and config.baseline == "executed":
        raise ValueError(
            f"baseline='executed' has no meaning with candidates={config.candidates!r}: every candidate is executed;"
            " use 'mean' or 'leave_one_out'"
        )
    if config.candidates == "episodes" and config.baseline == "shrinkage":
        raise ValueError(
            "baseline='shrinkage' has no meaning with candidates='episodes', whose groups differ in size; use 'mean'"
            " or 'leave_one_out'"
        )
