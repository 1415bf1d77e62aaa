"""One run of ours: ``grpo_jax.run`` with the preset of the environment. Started by ``benchmarks/bench.py``."""

import record

if __name__ == "__main__":
    JOB, PATH = record.read_job()  # before JAX makes its threads

import dataclasses
import math
from typing import Any

import jax
import numpy as np

import grpo_jax
from grpo_jax.training.loop import iterations_for
from grpo_jax.training.run import MAX_CHUNK

PACKAGES = ("grpo-jax", "jax", "jaxlib", "flax", "optax", "gymnax")


def times_the_start(job: record.Job) -> bool:
    """Whether the run is about the wait until something is learned: it then compiles quickly."""
    return job.get("cache", "off") != "off"


def config_of(job: record.Job) -> tuple[grpo_jax.GRPOConfig, int, str]:
    """Settings, decision steps and where they are from; ``n_envs`` of a job keeps the number of minibatches."""
    config, settings = grpo_jax.preset(job["env"]), "preset"
    if times_the_start(job):
        settings = "preset, quick_compile"
    if job.get("n_envs"):
        ratio = job["n_envs"] / config.n_envs
        config = config.replace(
            n_envs=job["n_envs"], batch_size=max(1, math.floor(config.batch_size * ratio))
        )
        settings = f"preset, n_envs {job['n_envs']}"
    return config, job.get("total_timesteps") or grpo_jax.preset_timesteps(job["env"]), settings


def run(job: record.Job, clock: record.Clock) -> record.Row:
    """Trains in chunks, and evaluates the sampled policy between them."""
    config, total, settings = config_of(job)
    n_iterations = iterations_for(config, total)
    every = record.every(n_iterations)
    n_chunks = math.ceil(every / MAX_CHUNK)  # from one evaluation to the next
    train_key, evaluate_key = jax.random.split(jax.random.key(job["seed"]))
    env = grpo_jax.make(job["env"])
    curve: list[record.Row] = []
    last: list[grpo_jax.TrainState] = []
    chunks_done = 0

    def look(chunk: grpo_jax.Chunk) -> None:
        nonlocal chunks_done
        clock.lap("train")
        if chunks_done == 0:
            # Until here all was booked as training. run() tells wall seconds only; on one core the share is the same.
            clock.move("train", "compile", 1.0 - chunk.seconds / clock.wall["train"])
        chunks_done += 1
        if chunks_done % n_chunks == 0 or chunk.iteration == chunk.n_iterations:
            returns = returns_of(chunk.state, env, jax.random.fold_in(evaluate_key, chunks_done))
            clock.lap("evaluate")
            curve.append(record.point(clock, chunk.decision_steps, chunk.simulator_steps, returns.tolist()))
        last[:] = [chunk.state]

    nonfinite, final = False, np.full(record.FINAL_EPISODES, np.nan)
    try:
        chunk_length = math.ceil(every / n_chunks)
        grpo_jax.run(
            config,
            env,
            train_key,
            total,
            callback=look,
            callback_every=chunk_length,
            quick_compile=times_the_start(job),
        )
        clock.lap("train")
        final = returns_of(last[0], env, jax.random.fold_in(evaluate_key, 0), record.FINAL_EPISODES)
    except FloatingPointError:
        nonfinite = True
    clock.lap("evaluate")
    device = jax.devices()[0]
    return record.row(
        job,
        clock,
        settings=settings,
        config=plain(config),
        total_timesteps=total,
        curve=curve,
        final_returns=final.tolist(),
        packages=PACKAGES,
        nonfinite=nonfinite,
        device=(device.platform, device.device_kind),
    )


def returns_of(
    state: grpo_jax.TrainState, env: Any, key: jax.Array, n_episodes: int = record.CURVE_EPISODES
) -> np.ndarray:
    """Undiscounted returns of the sampled policy, ``[n_episodes]``."""
    return np.asarray(grpo_jax.evaluate(state, env, key, n_episodes))


def plain(config: grpo_jax.GRPOConfig) -> dict[str, Any]:
    """The fields of the settings, numbers and strings as they are."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


if __name__ == "__main__":
    record.measure(JOB, PATH, run)
