"""``python -m grpo_jax.cli``."""

from grpo_jax.cli import main

raise SystemExit(main())
