"""Into the cache, into the pool and back: norm_rope_append_, assemble_, HistoryPool, and generation that uses them."""

from dataclasses import replace

import oracle
import pytest
import torch
from tensors import DTYPES, SCENES, Join, build, dtype_id, home, same_bytes, skip_unless_able, to
from test_model import random_model
from test_norm_rope import joined, plain, truth
from test_sample import requests, worst
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lct.kernels import KVRows, NormRope, assemble_, norm_rope_append_, select
from lct.kernels.numerics import compare
from lct.layout import SceneLayout, Shot
from lct.model.cache import KVCache
from lct.model.config import tiny
from lct.model.pool import HistoryPool
from lct.sample import Sampling, autoregressive

NAN = float("nan")
SPEC = NormRope(4, (4, 6, 6))
UNTURNED = replace(SPEC, axes=(0, 0, 0))
each_impl = pytest.mark.parametrize("impl", select.NORM_ROPE)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
each_scope = pytest.mark.parametrize("scope", ["head", "row"])


def poisoned(slots, rows, dtype=torch.float32):
    """NaN rows of keys and values, of which `slots` are meant."""
    keys, values = (torch.full((rows, 2, 16), NAN, dtype=dtype) for _ in range(2))
    return KVRows(keys, values, slots)


def appended(impl, dtype, scope="head", extra=7):
    """Two scenes into a cache and, in another order, into a pool: (geometry, inputs, q, cache, pool)."""
    spec = replace(SPEC, scope=scope)
    layout = build(SCENES)
    geometry = layout.tail(0, layout.rows)
    join = Join.random(geometry, spec, dtype=dtype)
    cache = poisoned(geometry.slots, 2 * layout.rows, dtype)
    pool = poisoned(torch.arange(layout.rows).flip(0) + extra, layout.rows + 2 * extra, dtype)
    device = home(impl) if impl != "auto" else torch.device("cpu")
    there, streams, positions, *stored = to(device, (join, geometry.streams, geometry.positions, cache, pool))
    skip_unless_able(select.NORM_ROPE, impl, there.video_qkv)
    q = norm_rope_append_(*there, streams, positions, spec, *stored, impl)
    return geometry, join, *to("cpu", (q, *stored))


def assembled(impl, pool, cache, positions):
    """The cache after assembling, on the device an implementation is for; brought back."""
    pool, cache, positions = to(home(impl), (pool, cache, positions))
    assemble_(pool, cache, positions, SPEC, impl)
    return to("cpu", cache)


def untouched(rows):
    return torch.ones(len(rows.keys), dtype=torch.bool).index_fill(0, rows.slots, False)


@each_impl
@each_scope
@each_dtype
def test_the_pool_gets_keys_before_their_rotation(impl, scope, dtype):
    geometry, join, q, cache, pool = appended(impl, dtype, scope)
    spec = replace(SPEC, scope=scope)
    parts = joined(join, geometry, geometry.positions, spec, impl)
    for got, expected in zip((q, cache.keys[cache.slots], cache.values[cache.slots]), parts, strict=True):
        assert same_bytes(got, expected)
    _, keys, values = truth(join, SCENES, oracle.positions(SCENES), replace(spec, axes=(0, 0, 0)))
    compare(pool.keys[pool.slots], keys, plain(join, geometry, replace(spec, axes=(0, 0, 0)))[1])
    assert torch.equal(pool.values[pool.slots].double(), values)
    for rows in (cache, pool):
        assert all(x[untouched(rows)].isnan().all() for x in rows[:2])


@each_impl
@each_dtype
def test_assembling_turns_pooled_keys_to_new_positions(impl, dtype):
    *_, pool = appended(impl, dtype)
    picked = torch.tensor([40, 3, 4, 5, 11])
    source = KVRows(*pool[:2], pool.slots[picked])
    into = poisoned(torch.tensor([9, 0, 1, 2, 6]), 12, dtype)
    positions = torch.tensor([[0, 0, 0], [1, 2, 3], [7.5, 7.5, 7.5], [99_991, 5, 6], [4, 4, 4]], dtype=torch.float32)
    into = assembled(impl, source, into, positions)
    keys = pool.keys[source.slots]
    true = oracle.rope(keys.double().numpy(), positions.double().numpy(), SPEC.axes, SPEC.theta)
    # The yardstick is one rounding of the truth: a rotation is exact but for its result.
    true = torch.from_numpy(true)
    compare(into.keys[into.slots], true, true.to(dtype))
    assert same_bytes(into.values[into.slots], pool.values[source.slots])
    assert all(x[untouched(into)].isnan().all() for x in into[:2])


@each_impl
def test_assembling_at_their_old_positions_gives_back_the_cache(impl):
    geometry, _, _, cache, pool = appended(impl, torch.float32)
    again = assembled(impl, pool, poisoned(cache.slots, len(cache.keys)), geometry.positions)
    assert same_bytes(again.keys, cache.keys) and same_bytes(again.values, cache.values)


def test_assembling_nothing_changes_nothing():
    *_, pool = appended("auto", torch.float32)
    into = poisoned(torch.zeros(0, dtype=torch.int64), 3)
    assemble_(KVRows(*pool[:2], into.slots), into, torch.zeros(0, 3), SPEC)
    assert into.keys.isnan().all() and into.values.isnan().all()


REFUSED = {
    "pool slots beyond the pool": (lambda p, c, x: (p._replace(slots=p.slots + 1000), c, x), "pool slots"),
    "too few slots": (lambda p, c, x: (p._replace(slots=p.slots[1:]), c, x), "pool slots"),
    "slots of another dtype": (lambda p, c, x: (p, c._replace(slots=c.slots.int()), x), "cache slots"),
    "positions in float64": (lambda p, c, x: (p, c, x.double()), "positions"),
    "other heads": (lambda p, c, x: (p._replace(keys=p.keys[:, :1]), c, x), "pool keys"),
    "one tensor for both": (lambda p, c, x: (p._replace(values=p.keys), c, x), "pool values"),
    "the pool is the cache": (lambda p, c, x: (KVRows(c.keys, p.values[: len(c.keys)], c.slots), c, x), "pool"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_does_not_fit_before_writing(name):
    geometry, _, _, cache, pool = appended("auto", torch.float32, extra=200)
    change, culprit = REFUSED[name]
    pool, cache, positions = change(pool, poisoned(cache.slots, len(cache.keys)), geometry.positions)
    with pytest.raises((ValueError, TypeError), match=culprit):
        assemble_(pool, cache, positions, SPEC)
    assert cache.keys.isnan().all() and cache.values.isnan().all()


# The pool of a model


def test_the_pool_refuses_what_it_has_no_room_for():
    pool = HistoryPool(tiny(), scenes=2, capacity=10)
    assert pool.admit([4, 6]).tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 14, 15]
    with pytest.raises(ValueError, match="scene 1 needs 11 pool rows, got 10"):
        pool.admit([6, 5])
    assert pool.admit([6, 4]).tolist() == [4, 5, 6, 7, 8, 9, 16, 17, 18, 19]
    with pytest.raises(ValueError, match="each of 2 scenes"):
        pool.admit([1])


def test_the_pool_assembles_only_what_the_layout_says():
    pool, cache = HistoryPool(tiny(), 1, 40), KVCache(tiny(), 1, 20)
    for rows in (9, 18):
        pool.admit([rows])
    layout = SceneLayout([[Shot(1, (2, 2, 2))]])
    pool.assemble_(cache, [[0]], layout)
    assert cache.shots == 1
    for chosen in ([[1]], [[0, 0]]):
        with pytest.raises(ValueError, match="chosen"):
            pool.assemble_(cache, chosen, layout)
    with pytest.raises(ValueError, match="at most 20 a scene"):
        pool.assemble_(cache, [[0, 1]], SceneLayout([[Shot(1, (2, 2, 2)), Shot(2, (4, 2, 2))]]))


# Generation over a choice of history


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("given", [(), (0,)], ids=str)
def test_choosing_every_shot_in_order_is_plain_generation(guidance, given):
    model, scenes = random_model(), requests(given=given)
    sampling = Sampling(steps=3, guidance=guidance)
    plainly = autoregressive(model, scenes, sampling)
    chosen = autoregressive(model, scenes, sampling, chosen=[[], [0], [0, 1]])
    assert worst(plainly, chosen) <= 1e-10


def test_a_shot_that_sees_one_other_stands_right_behind_it():
    """Compact positions: what lay between does not exist for it."""
    model, (scene,) = random_model(), requests(count=1, shots=4)
    (long,) = autoregressive(model, [scene], Sampling(steps=3), chosen=[[], [0], [1, 0], [0]])
    short = replace(scene, shots=(scene.shots[0], scene.shots[3]))
    (expected,) = autoregressive(model, [short], Sampling(steps=3))
    assert worst([[long[0], long[3]]], [expected]) <= 1e-10
    (other,) = autoregressive(model, [scene], Sampling(steps=3), chosen=[[], [0], [1, 0], [0, 1]])
    assert worst([[long[3]]], [[other[3]]]) > 1e-3


def test_the_order_of_the_chosen_shots_is_the_order_they_are_seen_in():
    model, scenes = random_model(), requests(count=1)
    a, b = (autoregressive(model, scenes, Sampling(steps=2), chosen=[[], [0], order])[0] for order in ([0, 1], [1, 0]))
    assert [torch.equal(x, y) for x, y in zip(a, b, strict=True)] == [True, True, False]


@pytest.mark.parametrize("chosen", [[[], [0]], [[], [1], []], [[], [0, 0], []], [[0], [], []]], ids=str)
def test_an_impossible_choice_is_refused(chosen):
    with pytest.raises(ValueError, match="chosen"):
        autoregressive(random_model(), requests(count=1), Sampling(steps=1), chosen=chosen)
    with pytest.raises(ValueError, match="chosen"):
        autoregressive(random_model(), requests(1), Sampling(steps=1), cached=False, chosen=[[], [], []])


class Touches(TorchDispatchMode):
    """The ops that were given a tensor of a cache or pool, or a view of one."""

    def __init__(self):
        super().__init__()
        self.storages, self.ops = set(), set()

    def watch(self, stored):
        self.storages |= {x.untyped_storage().data_ptr() for x in (*stored.keys, *stored.values)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(x.untyped_storage().data_ptr() in self.storages for x in tensors):
            self.ops.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("chosen", [None, [[], [0], [1, 0]]], ids=["cache", "pool"])
def test_nothing_but_our_operations_touches_the_cache(monkeypatch, chosen):
    """No concatenation, no clone, no copy of keys and values anywhere in generation."""
    touches = Touches()
    for made in (KVCache, HistoryPool):

        def watched(self, *arguments, build=made.__init__, **options):
            build(self, *arguments, **options)
            touches.watch(self)

        monkeypatch.setattr(made, "__init__", watched)
    with touches:
        autoregressive(random_model(), requests(), Sampling(steps=2, guidance=2.0), chosen=chosen)
    ours = {"lct.norm_rope_append_.default", "lct.attention_forward.default"}
    assert touches.ops == (ours if chosen is None else ours | {"lct.assemble_.default"})


def test_rewinding_goes_back_only():
    cache = KVCache(tiny(), 1, 8)
    cache.commit(3)
    cache.rewind(1)
    assert cache.shots == 1
    with pytest.raises(ValueError, match="0 to 1 committed"):
        cache.rewind(2)
