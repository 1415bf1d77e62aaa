"""Where learning stands beside its parameters: environments, their wrappers, counters; kept, written down, and gone on from.

A rollout is begun again, not gone on with: what is kept is where its first step began. The policy is the same all through it.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
)
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

from sb3_bridge.clones.brancher import Brancher, prove
from sb3_bridge.clones.processes import Local, WorkerError, Workers
from sb3_bridge.files.model import check_attributes
from sb3_bridge.files.model_zip import File
from sb3_bridge.gymnax.vec_env import WorldVecEnv
from sb3_bridge.numbers import KEPT, BadNumberError
from sb3_bridge.vec_wrappers import unwrapped

_COUNTERS: tuple[str, ...] = (
    "num_timesteps",
    "_last_obs",
    "_last_original_obs",
    "_last_episode_starts",
    "episode_time",
)
_COUNTERS += ("ep_info_buffer", "ep_success_buffer")
_WRAPPERS: dict[type, tuple[str, ...]] = {
    VecNormalize: ("obs_rms", "ret_rms", "returns", "old_obs", "old_reward"),
    VecMonitor: ("episode_returns", "episode_lengths", "episode_count"),
    VecFrameStack: ("stacked_obs",),
}
_WRAPPERS |= dict.fromkeys((VecCheckNan, VecTransposeImage, VecExtractDictObs, VecVideoRecorder), ())
"""What goes on in a wrapper, which a restart must find again."""
_MOST_BYTES = 2**26  # of the states of environments on a device: larger ones are not written down


class Keeper:
    """Keeps where a model and its environments stand.

    Attributes:
      why_not: why that cannot be; empty where it can.
      is_within: whether what is kept is where the present rollout began.
    """

    def __init__(self, env: VecEnv, functions: Any, brancher: Brancher | None):
        self._env, (self._base, self._wrappers) = env, unwrapped(env)
        self.why_not, self.is_within = "", False
        self._group: Any = None if brancher is None else brancher.group
        self._is_proved = brancher is not None
        self._kept: dict[str, Any] = {}
        for one in self._wrappers:
            if type(one) not in _WRAPPERS:
                self.why_not = f"what goes on in a {type(one).__name__} is not known"
        if isinstance(self._base, DummyVecEnv | SubprocVecEnv):
            kind: Any = Local if isinstance(self._base, DummyVecEnv) else Workers
            self._group = self._group or self._tried(lambda: kind(self._base, functions))
        elif not isinstance(self._base, WorldVecEnv):
            self.why_not = f"a {type(self._base).__name__} gives no access to its environments"

    def begin(self, model: Any) -> None:
        """A rollout begins in the present place."""
        self.keep(model)
        self.is_within = True

    def keep(self, model: Any) -> None:
        """Keeps the present place."""
        self._kept = {"before": {name: copy.copy(getattr(model, name)) for name in _COUNTERS}}
        self._kept["iteration"] = model._n_iterations + 1
        self._kept["wrappers"] = [_state(one) for one in self._wrappers]
        if isinstance(self._base, WorldVecEnv):
            self._kept["device"] = self._base.place()
        elif not self.why_not:
            self._tried(lambda: self._all("keep_place"))

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """Inside it, numbers that cannot be leave VecNormalize as it was when the rollout began."""
        try:
            yield
        except BadNumberError as error:
            kept = KEPT
            for wrapper, state in zip(self._wrappers, self._kept["wrappers"], strict=True):
                if isinstance(wrapper, VecNormalize):
                    _put(
                        wrapper,
                        {name: state[name] for name in ("name", "obs_rms", "ret_rms") if name in state},
                    )
                    kept = f"{KEPT}, and VecNormalize its statistics"
            raise BadNumberError(f"iteration {self._kept['iteration']}: {error}. {kept}") from error

    def written(self, model: Any) -> dict[str, Any]:
        """What is kept, or the present place where no rollout is under way, as plain values; or why it cannot be."""
        if not self.is_within:
            self.keep(model)
        kept = {name: value for name, value in self._kept.items() if self.is_within or name != "before"}
        if "device" in kept:
            kept["device"] = self._tried(kept["device"])
            if not self.why_not and sum(leaf.nbytes for leaf in kept["device"]) > _MOST_BYTES:
                return {"why_not": f"the states of the environments have more than {_MOST_BYTES >> 20} MiB"}
        elif not self.why_not:
            if not self._is_proved:
                self._tried(lambda: prove(self._group, self._env.num_envs))
                self._is_proved = not self.why_not
            kept["host"] = self.why_not or self._tried(lambda: self._all("kept_place"))
        return {"why_not": self.why_not} if self.why_not else kept

    def go_on(self, written: dict[str, Any], allow_pickle: bool) -> dict[str, Any]:
        """Brings the environments to a place that was written; returns the attributes of the model that belong to it.

        Raises:
          ValueError: why that cannot be. The environments must be reset then.
        """
        if why_not := written.get("why_not") or self.why_not:
            raise ValueError(why_not)
        self._env.reset()
        names = [one["name"] for one in written["wrappers"]]
        if names != [type(one).__name__ for one in self._wrappers]:
            raise ValueError(f"the environments were in the wrappers {names}")
        for wrapper, state in zip(self._wrappers, written["wrappers"], strict=True):
            _put(wrapper, state)
        if "device" in written and isinstance(self._base, WorldVecEnv):
            self._base.put(written["device"])
        elif "host" in written and self._group is not None:
            self._group.call("put", [(form, allow_pickle) for form in written["host"]])
        else:
            raise ValueError("the environments were others: some are stepped on the host, some on the device")
        return written.get("before", {})

    def _all(self, method: str) -> Any:
        return self._group.call(method, [()] * self._env.num_envs)

    def _tried(self, do: Callable[[], Any]) -> Any:
        try:
            return do()
        except WorkerError:
            raise
        except Exception as error:  # whatever an environment's own copying raises
            self.why_not = str(error)
            return None


def keeper_of(model: Any) -> Keeper:
    """The model's, which is made where there is none for its present env and alternatives."""
    if model._keeper is None:
        functions = model.dynamics if isinstance(model.dynamics, tuple) else None
        model._keeper = Keeper(model.env, functions, getattr(model._alternatives, "brancher", None))
    keeper: Keeper = model._keeper
    return keeper


def go_on(model: Any, path: File, written: dict[str, Any] | None, allow_pickle: bool) -> None:
    """Brings a model that was loaded, and its environments, to where they stood; warns once where that cannot be."""
    try:
        if written is None:
            raise ValueError("it says nothing of environments")
        before = keeper_of(model).go_on(written, allow_pickle)
        check_attributes(path, before)
        for name in before.keys() & set(_COUNTERS):
            setattr(model, name, before[name])
    except Exception as error:  # a file may hold anything
        model._last_obs = None
        warnings.warn(
            f"{path}: learning goes on in environments that start anew, and not bit for bit as it would have gone on: {error}",
            UserWarning,
            stacklevel=3,
        )


def _state(wrapper: VecEnvWrapper) -> dict[str, Any]:
    values = {
        name: getattr(wrapper, name) for name in _WRAPPERS.get(type(wrapper), ()) if hasattr(wrapper, name)
    }
    return {"name": type(wrapper).__name__} | {name: _parts(value) for name, value in values.items()}


def _parts(value: Any) -> Any:
    """A statistic or stack of SB3's as its arrays; copies."""
    if isinstance(value, dict):
        return {name: _parts(part) for name, part in value.items()}
    if isinstance(value, RunningMeanStd):
        return {name: _parts(part) for name, part in vars(value).items()}
    if isinstance(value, StackedObservations):
        return _parts({name: part for name, part in vars(value).items() if name in _STACKED})
    return copy.copy(value)


_STACKED = ("stacked_obs", "sub_stacked_observations")


def _put(owner: Any, state: dict[str, Any]) -> None:
    for name, value in state.items():
        if name == "name":
            continue
        own = owner[name] if isinstance(owner, dict) else getattr(owner, name)
        if isinstance(own, dict | RunningMeanStd | StackedObservations) and isinstance(value, dict):
            _put(own, value)
            continue
        one, two = np.asarray(value), np.asarray(own)
        if name != "old_reward" and (one.dtype != two.dtype or one.shape != two.shape):
            raise ValueError(f"{name} of {type(owner).__name__} is another one")
        if not np.isfinite(one).all() or (name in ("var", "count") and (one < 0).any()):
            raise ValueError(f"{name} of {type(owner).__name__} is no statistic: {one}")
        if isinstance(owner, dict):
            owner[name] = value
        else:
            setattr(owner, name, value)
