from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax import count, counter
from grpo_jax.types import Counter

WORD = 2**32
add, merge = jax.jit(counter.add), jax.jit(counter.merge)


def counter_of(number: int) -> Counter:
    return Counter(high=jnp.uint32(number // WORD), low=jnp.uint32(number % WORD))


@given(st.integers(0, 2**62), st.lists(st.integers(0, WORD - 1), max_size=6))
def test_sums_are_those_of_python_integers(start, amounts):
    total = counter_of(start)
    for amount in amounts:
        total = add(total, np.uint32(amount))
    assert count(total) == start + sum(amounts)


@given(st.integers(0, 2**62), st.integers(0, 2**62))
def test_merge_is_addition(left, right):
    assert count(merge(counter_of(left), counter_of(right))) == left + right


@pytest.mark.parametrize(
    ("start", "amount", "high", "low"),
    [
        (0, 0, 0, 0),
        (WORD - 1, 1, 1, 0),
        (WORD - 1, WORD - 1, 1, WORD - 2),
        (5 * WORD, 7, 5, 7),
        (WORD - 2, 1, 0, WORD - 1),
    ],
)
def test_the_carry(start, amount, high, low):
    total = counter.add(counter_of(start), amount)
    assert (int(total.high), int(total.low)) == (high, low)
    assert total.high.dtype == total.low.dtype == jnp.uint32


def test_int32_amounts_of_a_loop():
    steps = jnp.full(5, 2**31 - 1, jnp.int32)
    total, _ = jax.lax.scan(lambda total, n: (counter.add(total, n), None), counter.zero(), steps)
    assert count(total) == 5 * (2**31 - 1)


def test_the_count_of_several_seeds_is_their_sum():
    several = jax.tree.map(lambda *leaves: jnp.stack(leaves), counter_of(3 * WORD + 1), counter_of(WORD - 1))
    assert count(several) == 4 * WORD


def test_to_float():
    assert float(counter.to_float(counter_of(3 * WORD + 2**20))) == 3.0 * 2**32 + 2**20
