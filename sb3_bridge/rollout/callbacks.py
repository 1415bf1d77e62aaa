"""What SB3's callbacks see: PPO's locals of a step, and its buffer as a view that nothing can be written into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NoReturn, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import torch
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    ConvertCallback,
    ProgressBarCallback,
)
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from grpo_jax.config import GRPOConfig
from grpo_jax.groups.returns import lambda_returns
from sb3_bridge.policies.policy import GRPOPolicy


class Model(Protocol):
    """What a rollout reads of the model, and moves on."""

    policy: GRPOPolicy
    env: VecEnv | None
    rollout_buffer: RolloutView
    num_timesteps: int
    key_words: np.ndarray
    episode_time: np.ndarray
    chosen_dynamics: Any
    ep_info_buffer: Any
    _last_obs: Any
    _last_episode_starts: Any
    _jax_device: Any

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None: ...


def _flat(callback: BaseCallback | None) -> Iterator[BaseCallback]:
    """The callbacks of a list of lists; "no callback" is none."""
    if isinstance(callback, CallbackList):
        for child in callback.callbacks:
            yield from _flat(child)
    elif callback is not None and not (type(callback) is ConvertCallback and callback.callback is None):
        yield callback


def asks_for_every_step(callback: BaseCallback) -> bool:
    """Whether a callback must be called at every step: all but the progress bar must."""
    return any(type(one) is not ProgressBarCallback for one in _flat(callback))


def advance_progress_bars(callback: BaseCallback, n_timesteps: int) -> None:
    """Tells progress bars of steps that no callback was called for."""
    for one in _flat(callback):
        if isinstance(one, ProgressBarCallback):
            one.pbar.update(n_timesteps)


Thoughts = Callable[[], tuple[Any, Any, Any]]
"""What the policy thought of a step: the observations ``[N, ...]`` of the decision states, their values (None without a
critic), and the log-probabilities of the actions in the environment's units."""


class StepLocals(MutableMapping[str, Any]):
    """PPO's local variables of a step; the policy is asked for ``values`` and ``log_probs`` when one is first read.

    It takes the place of the dict that SB3 gives to a callback and to those inside of it, and writes into that dict.
    """

    _OF_THOUGHTS = ("obs_tensor", "values", "log_probs")
    _think: Thoughts | None

    def __init__(self, callback: BaseCallback, device: torch.device):
        before: Any = callback.locals
        self._known: dict[str, Any] = before._known if isinstance(before, StepLocals) else before
        self._device, self._think = device, None
        for one in _tree(callback):
            one.locals = self  # type: ignore[assignment]

    def think(self, thoughts: Thoughts) -> None:
        """The next step's thoughts; those of the last one are forgotten."""
        self._think = thoughts
        for name in self._OF_THOUGHTS:
            self._known.pop(name, None)

    def __getitem__(self, name: str) -> Any:
        if name in self._OF_THOUGHTS and name not in self._known and self._think is not None:
            seen, value, log_prob = self._think()
            self._known["obs_tensor"] = obs_as_tensor(jax.tree.map(np.array, seen), self._device)
            self._known["values"] = (
                None if value is None else torch.from_numpy(np.array(value)).reshape(-1, 1)
            )
            self._known["log_probs"] = torch.from_numpy(np.array(log_prob))
        return self._known[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._known[name] = value

    def __delitem__(self, name: str) -> None:
        del self._known[name]

    def update(self, *others: Any, **known: Any) -> None:  # as dict's, which SB3 calls at every step
        self._known.update(*others, **known)

    def __iter__(self) -> Iterator[str]:
        return iter(
            self._known if self._think is None else {**self._known, **dict.fromkeys(self._OF_THOUGHTS)}
        )

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _tree(callback: BaseCallback) -> Iterator[BaseCallback]:
    """A callback and all that it calls, whatever attributes it keeps them in."""
    seen, found = {id(callback)}, [callback]
    for one in found:
        for value in vars(one).values():
            for child in value if isinstance(value, list | tuple) else (value,):
                if isinstance(child, BaseCallback) and id(child) not in seen:
                    seen.add(id(child))
                    found.append(child)
    return iter(found)


def show_step(
    model: Model,
    callback: BaseCallback,
    actions: tuple[np.ndarray, np.ndarray],
    returned: Sequence[Any],
    thoughts: Thoughts,
) -> bool:
    """Calls a callback, whose locals are a :class:`StepLocals`, after a step; returns whether training goes on.

    ``actions`` are those before and after they were brought within a box's bounds, ``returned`` new observations,
    rewards, ends and infos.
    """
    buffer = model.rollout_buffer
    callback.locals.think(thoughts)  # type: ignore[attr-defined]
    shown: dict[str, Any] = {"self": model, "env": model.env, "callback": callback, "rollout_buffer": buffer}
    shown["n_rollout_steps"], shown["n_steps"] = buffer.buffer_size, buffer.pos
    shown["actions"], shown["clipped_actions"] = actions
    shown["new_obs"], shown["rewards"], shown["dones"], shown["infos"] = returned
    callback.update_locals(shown)
    return callback.on_step()


class RolloutView:
    """A rollout with the fields of SB3's ``RolloutBuffer``, read-only; each is computed when it is first read.

    ``observations``, ``actions``, ``rewards`` (the environment's), ``episode_starts``, ``values``, ``log_probs``, ``returns``
    (the critic's lambda-returns) and ``advantages`` (returns minus values; what branches compare is another thing) are
    ``[n_steps, n_envs, ...]``: zero in rows that are not there yet, the last three and ``values`` NaN without a critic.

    Attributes:
      buffer_size: steps in a rollout.
      n_envs: environments.
      pos: steps that are there.
    """

    def __init__(self, buffer_size: int, n_envs: int):
        self._set(buffer_size=buffer_size, n_envs=n_envs, pos=0, _arrays={}, _policy=None, _config=None)

    def _set(self, **values: Any) -> None:
        self.__dict__.update(values, _known={})

    def start(self, arrays: Mapping[str, Any], policy: GRPOPolicy, config: GRPOConfig) -> None:
        """A rollout begins; ``arrays`` are filled step by step, under the names of a :class:`Trajectory`."""
        self._set(pos=0, _arrays=arrays, _policy=policy, _config=config)

    def advance(self, pos: int) -> None:
        """``pos`` steps are there."""
        self._set(pos=pos)

    @property
    def full(self) -> bool:
        """Whether the rollout is complete."""
        return self.pos == self.buffer_size

    def size(self) -> int:
        """Steps that are there."""
        return self.pos

    def __getattr__(self, name: str) -> Any:
        if name in ("gamma", "gae_lambda") and self.__dict__.get("_config") is not None:
            return getattr(self._config, name)
        if name not in _FIELDS:
            raise AttributeError(f"rollout_buffer has no {name}; it has {', '.join(_FIELDS)}")
        if "observation" not in self._arrays:
            raise AttributeError(f"rollout_buffer.{name}: no step has been made")
        if name not in self._known:
            self._known[name] = _read_only(_FIELDS[name](self))
        return self._known[name]

    def get(self, batch_size: int | None = None) -> Iterator[RolloutBufferSamples]:
        """Minibatches of the whole rollout in a random order, as SB3's buffer gives them: CPU tensors."""
        assert self.full, "the rollout is not complete"
        n_rows = self.buffer_size * self.n_envs
        names = ("observations", "actions", "values", "log_probs", "advantages", "returns")
        fields = [getattr(self, name) for name in names]
        order, size = np.random.permutation(n_rows), batch_size or n_rows  # noqa: NPY002  # as SB3 draws it
        for start in range(0, n_rows, size):
            envs, steps = np.divmod(order[start : start + size], self.buffer_size)

            def rows(leaf: np.ndarray, steps: Any = steps, envs: Any = envs) -> torch.Tensor:
                return torch.from_numpy(np.array(leaf[steps, envs]))

            yield RolloutBufferSamples(*jax.tree.map(rows, fields))

    def __getstate__(self) -> dict[str, Any]:
        return {"buffer_size": self.buffer_size, "n_envs": self.n_envs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        RolloutView.__init__(self, **state)

    def _observations(self) -> Any:
        return jax.tree.map(
            lambda leaf: leaf[..., None] if leaf.ndim == 2 else leaf, self._arrays["observation"]
        )

    def _values(self, name: str = "observation") -> np.ndarray:
        shape = (self.buffer_size, self.n_envs)
        if not self._policy.has_critic:
            return np.full(shape, np.nan, np.float32)
        return self._policy.predict_values(merged(self._arrays[name])).cpu().numpy().reshape(shape)

    def _log_probs(self) -> np.ndarray:
        actions = torch.from_numpy(np.array(merged(self._arrays["actions"])))
        masks = None
        if "action_mask" in self._arrays and (masks := self._arrays["action_mask"]) is not None:
            masks = merged(masks | ~masks.any(axis=-1, keepdims=True))  # of rows that are not there yet
        log_prob = self._policy.evaluate_actions(merged(self._arrays["observation"]), actions, masks)[1]
        return log_prob.cpu().numpy().reshape(self.buffer_size, self.n_envs)

    def _returns(self) -> np.ndarray:
        if not self._policy.has_critic:
            return self._values()
        arrays, config = self._arrays, self._config
        rewards = arrays["learned_reward" if "learned_reward" in arrays else "reward"]
        terminated, ended = arrays["terminated"], arrays["terminated"] | arrays["truncated"]
        values = self.values, jnp.asarray(self._values("next_observation"))
        return np.asarray(
            lambda_returns(rewards, *values, terminated, ended, config.gamma, config.gae_lambda)
        )

    def _no_writing(self, *_: Any, **__: Any) -> NoReturn:
        refuse()

    add = reset = compute_returns_and_advantage = __setattr__ = _no_writing


_FIELDS: dict[str, Callable[[RolloutView], Any]] = {
    "observations": RolloutView._observations,
    "actions": lambda view: view._arrays["actions"].reshape(view.buffer_size, view.n_envs, -1),
    "rewards": lambda view: view._arrays["reward"],
    "episode_starts": lambda view: np.asarray(view._arrays["episode_starts"], np.float32),
    "values": RolloutView._values,
    "log_probs": RolloutView._log_probs,
    "returns": RolloutView._returns,
    "advantages": lambda view: view.returns - view.values,
}


def refuse(*_: Any) -> NoReturn:
    """What every attempt to write into the buffer ends in."""
    raise ValueError(
        "rollout_buffer is read-only: GRPO compares the candidates of a state with each other, and what a callback writes"
        " into the buffer would have no effect. Change rewards in a gymnasium.Wrapper or a VecEnvWrapper, or by"
        " reward_function(state, action, next_state)"
    )


class ReadOnly(np.ndarray):
    """An array that says why it cannot be changed."""

    __setitem__ = __iadd__ = __isub__ = __imul__ = __itruediv__ = refuse


def _read_only(tree: Any) -> Any:
    def locked(leaf: Any) -> ReadOnly:
        array = np.array(leaf).view(ReadOnly)
        array.setflags(write=False)
        return array

    return jax.tree.map(locked, tree)


def merged(tree: Any) -> Any:
    """Leaves ``[T, N, ...]`` as ``[T * N, ...]``."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), tree)
