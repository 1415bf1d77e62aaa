"""``python -m grpo_jax``: the command line."""

from grpo_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
