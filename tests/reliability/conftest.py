from collections.abc import Iterator

import pytest

import grpo_jax


@pytest.fixture(scope="module")
def looks_often() -> Iterator[None]:
    """The host looks at each iteration of a run, however fast they are."""
    with pytest.MonkeyPatch.context() as patch:
        run = grpo_jax.run
        patch.setattr(grpo_jax, "run", lambda *args, **kwargs: run(*args, **kwargs, callback_every=1))
        yield
