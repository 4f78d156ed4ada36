"""Scenes shared out: nothing is lost, all is even, and every process finds the same."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import small

from lct.model.config import lct_3b
from lct.model.families import build
from lct.train.balance import EVEN, plan_step, share_out
from lct.train.lengths import SCENES, imbalances
from lct.train.trainer import Trainer

costs = st.lists(st.floats(0.1, 1000), min_size=1, max_size=30)


@settings(max_examples=150, deadline=None)
@given(costs, st.integers(1, 9), st.integers(0, 60), st.data())
def test_every_scene_is_in_one_pass(costs, parts, most, data):
    rows = data.draw(st.lists(st.integers(1, 40), min_size=len(costs), max_size=len(costs)))
    share = plan_step(costs, rows, parts, most)
    assert share == plan_step(costs, rows, parts, most)
    assert len(share.passes) == parts and len({len(part) for part in share.passes}) == 1
    assert sorted(i for part in share.passes for one in part for i in one) == list(range(len(costs)))
    if most:
        assert all(len(one) == 1 or sum(rows[i] for i in one) <= most for part in share.passes for one in part)
    assert share.imbalance(costs, every_pass=True) >= share.imbalance(costs) - 1e-9 >= 1 - 2e-9


@settings(max_examples=100, deadline=None)
@given(costs, st.integers(1, 6))
def test_no_part_is_larger_than_longest_first_allows(costs, parts):
    """At most the mean and the largest cost together: who got a scene last had the least before."""
    largest = max(sum(costs[i] for i in part) for part in share_out(costs, parts))
    assert largest <= (sum(costs) / parts + max(costs)) * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(costs, st.integers(1, 8))
def test_no_exchange_with_the_largest_part_is_left_that_helps(costs, parts):
    shared = share_out(costs, parts)
    sums = [sum(costs[i] for i in part) for part in shared]
    most = max(range(parts), key=sums.__getitem__)
    if sums[most] <= EVEN * sum(costs) / parts * (1 + 1e-9):
        return
    for other, total in zip(shared, sums, strict=True):
        exchanges = (costs[i] - back for i in shared[most] for back in (0.0, *(costs[j] for j in other)))
        assert not any(1e-6 < moved < sums[most] - total - 1e-6 for moved in exchanges)


@pytest.mark.parametrize(
    ("costs", "parts", "largest"), [([3, 3, 2, 2, 2], 2, 6), ([5, 5, 4, 4, 3, 3, 3], 3, 9), ([7, 1, 1], 2, 7)]
)
def test_exchanges_find_what_longest_first_misses(costs, parts, largest):
    assert max(sum(costs[i] for i in part) for part in share_out(costs, parts)) == largest


def test_a_pass_may_be_full_to_the_last_row():
    assert plan_step([1.0, 1.0], [30, 10], 1, 40).passes == [[[0, 1]]]


@pytest.mark.parametrize("processes", [8, 64, 128])
def test_steps_are_even_over_the_committed_lengths(processes):
    with torch.device("meta"):
        cost = build(lct_3b()).cost()
    found, same = imbalances(cost, processes, 1000 if processes == 8 else 60)
    assert found == same  # one pass each
    held, waited = imbalances(cost, processes, 10, pass_rows=400_000)
    assert np.mean(held) <= 1.05 < np.mean(waited) + 0.05 and all(
        a <= b + 1e-9 for a, b in zip(held, waited, strict=True)
    )
    assert np.mean(found) <= 1.05 and max(found) <= 1.1 and SCENES >= 7


def test_a_budget_of_rows_is_global(tmp_path):
    """A step has scenes until it is reached, and whoever shares them out draws the same."""
    trainer = Trainer(small(batch_rows=600), tmp_path)
    alone, two = trainer.steps, [Trainer(small(batch_rows=600), tmp_path).steps for _ in range(2)]
    counts = set()
    for step in range(6):
        drawn, shots = alone.draw(step)
        rows = [sum(shot.rows for shot in scene) for scene in shots]
        assert sum(rows[:-1]) < 600 <= sum(rows)
        counts.add(len(drawn))
        for data, steps in enumerate(two):
            steps.data, steps.datas = data, 2
        parts = [batch.layout.scenes for steps in two for batch, counts_ in steps[step].passes if counts_]
        assert sorted((s for part in parts for s in part), key=str) == sorted(map(tuple, shots), key=str)
    assert len(counts) > 1
