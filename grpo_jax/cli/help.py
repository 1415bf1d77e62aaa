"""What the help says beside the flags themselves: examples, and the stages that the settings belong to."""

from __future__ import annotations

EXAMPLES = {
    "": """
  grpo-jax train CartPole-v1            train by the preset, into runs/CartPole-v1
  grpo-jax evaluate runs/CartPole-v1 --render x.gif      play episodes, draw one
  grpo-jax plot runs/*                  learning curves of several runs
  grpo-jax report runs/*                what they came to, side by side
  grpo-jax train --help                 all settings, by stage
  grpo-jax --version                    versions of grpo-jax and of JAX""",
    "train": """
  grpo-jax train CartPole-v1 --n-seeds 8 --out runs/cartpole
  grpo-jax train Pendulum-v1 --total-timesteps 200000 --horizon 32
  grpo-jax train brax/ant --devices all --n-seeds 8
  grpo-jax train CartPole-v1 --sweep learning_rate=1e-3,3e-3 gamma=0.9,0.99 --n-seeds 4""",
    "resume": """
  grpo-jax resume runs/cartpole
  grpo-jax resume runs/cartpole --total-timesteps 200000""",
    "evaluate": """
  grpo-jax evaluate runs/cartpole --n-episodes 256 --deterministic
  grpo-jax evaluate runs/cartpole --checkpoint runs/cartpole/best.msgpack --render episode.mp4
  grpo-jax evaluate runs/breakout --plan""",
    "plot": """
  grpo-jax plot runs/cartpole runs/other --out curves.png
  grpo-jax plot runs/* --x seconds --log-x
  grpo-jax plot runs/cartpole --key entropy
  grpo-jax plot runs/cartpole --group --dimension 2
  grpo-jax plot runs/cartpole --map 2 3""",
    "report": """
  grpo-jax report runs/*
  grpo-jax report runs/a runs/b --out report.md""",
    "envs": """
  grpo-jax envs
  grpo-jax envs --suite brax""",
}
"""Printed below the help of a command; of none below that of the program."""

STAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "rollout": (
        "The policy acts in its environments.",
        ("n_envs", "n_steps", "n_shards", "persistence", "persistence_decay"),
    ),
    "candidates": (
        "Which actions of a decision state are compared.",
        ("candidates", "group_size", "max_enumerated", "trajectory_form"),
    ),
    "branch": (
        "How far each candidate is followed.",
        (
            *("horizon", "gamma", "n_rollouts", "backup", "branch_every", "branch_past_truncation"),
            *("common_random_numbers", "max_branches"),
        ),
    ),
    "advantage": (
        "How much better a candidate is than its group.",
        ("baseline", "advantage_scale", "spread_floor"),
    ),
    "critic": (
        "What values the states where branches are cut.",
        (
            "bootstrap",
            "gae_lambda",
            "vf_coef",
            "clip_range_vf",
            "critic_net_arch",
            "share_features_extractor",
        ),
    ),
    "loss": (
        "What is maximised.",
        (
            *(
                "surrogate",
                "clip_range",
                "clip_range_high",
                "clip_range_decay",
                "dual_clip",
                "sapo_temperature",
            ),
            *("sapo_temperature_negative", "tpo_temperature", "ent_coef", "ent_coef_decay", "kl_coef"),
            *("kl_estimator", "reference", "reference_interval", "reference_decay"),
        ),
    ),
    "update": (
        "How it is maximised.",
        ("n_epochs", "batch_size", "learning_rate", "learning_rate_decay", "target_kl", "max_grad_norm"),
    ),
    "policy": (
        "The networks.",
        ("network", "net_arch", "activation", "normalize_observations", "log_std_init"),
    ),
}
"""Groups of flags in the help of ``train``: title -> what it does, and the fields of GRPOConfig; others are "more"."""
