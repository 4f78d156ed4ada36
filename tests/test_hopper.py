"""The Hopper kernels without a GPU: their own source run thread by thread on an emulated one, what the compiler makes
of it, and the index arithmetic. The emulation is tested too: what is planted in the source must be found."""

import math
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import emulated
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import problems, scene_lists
from tensors import GLOBAL, SCENES, SELECTION, SHOT, Inputs, assert_attention, build, dtype_id, normal, same_bytes
from test_attention import identity
from test_layout import rows_of, tail_of_scenes, tails
from test_native import nvcc

from lct.kernels import cuda_attention, native, reference, select
from lct.kernels.numerics import compare
from lct.layout import SceneLayout, Shot
from lct.plan import Plan, Run

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
each_cluster = pytest.mark.parametrize("cluster", [1, 2], ids=["blocks", "pairs"])
each_dim = pytest.mark.parametrize("dim", [64, 128])


@pytest.fixture(autouse=True)
def emulation(monkeypatch):
    """The emulated kernel as one more implementation of attention."""
    monkeypatch.setitem(select.ATTENTION, "emulated", emulated)
    return lambda **options: [monkeypatch.setattr(emulated, name.upper(), value) for name, value in options.items()]


# Several tiles of queries and of keys, which end inside: two scenes, an empty shot, a run that sees two intervals.
LARGE = [
    [
        (11, (1, 1, 1), GLOBAL),
        (37, (3, 9, 7), SHOT),
        (0, (0, 4, 4), SHOT),
        (20, (2, 12, 11), SHOT),
        (1, (1, 10, 13), SHOT),
    ],
    [(64, (1, 8, 8), SHOT)],
]
CHOSEN = [[(), (), (), (1,), (0, 1, 3)], [()]]


# -- what it computes --------------------------------------------------------------------------------------------------


@needs_compiler
@each_cluster
@each_dtype
@each_dim
@pytest.mark.parametrize(
    "visibility", ["context_causal", "isolated", "bidirectional", CHOSEN], ids=lambda v: str(v)[:9]
)
def test_equals_the_oracle(emulation, dim, dtype, cluster, visibility):
    emulation(cluster=cluster)
    plan = build(LARGE, visibility).plan()
    heads = (2, 1) if dim == 64 else (2, 2)
    inputs = Inputs.random(plan, *heads, dim, dtype)
    assert_attention(inputs, plan, oracle.mask(LARGE, visibility), "emulated")


@needs_compiler
@each_cluster
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (3, 1)], ids="{0[0]}q{0[1]}kv".format)
def test_heads(emulation, heads, cluster):
    emulation(cluster=cluster)
    plan = build(SCENES, SELECTION).plan()
    assert_attention(Inputs.random(plan, *heads, 64, torch.float16), plan, oracle.mask(SCENES, SELECTION), "emulated")


@needs_compiler
@given(
    problem=problems(scene_lists(max_scenes=2, max_shots=3)), seed=st.integers(0, 99), cluster=st.sampled_from([1, 2])
)
@settings(max_examples=40)
def test_mask_probing(problem, seed, cluster):
    """With q = 0 every visible key weighs the same, and V = identity shows which keys those are."""
    scenes, visibility, _ = problem
    layout = build(scenes, visibility)
    plan = layout.plan()
    q, k = torch.zeros(2, layout.rows, 1, 64, dtype=torch.float16)
    seen = [
        emulated.forward(q, k, probe.half(), plan.table, plan.host_table, 1.0, seed, 2, cluster)[0][:, 0] != 0
        for probe in identity(layout.rows)
    ]
    assert torch.equal(torch.cat(seen, dim=1)[:, : layout.rows], layout.dense_mask())


@needs_compiler
@given(drawn=tails(), seed=st.integers(0, 1000), cluster=st.sampled_from([1, 2]))
@settings(max_examples=25)
def test_cached_tails(drawn, seed, cluster):
    """New rows, also in two versions, over a cache with rows to spare; those hold NaN."""
    scenes, visibility, first, alternatives, spare = drawn
    kept = [[*scene, alternatives[b]] if alternatives else scene for b, scene in enumerate(scenes)]
    capacity = max(rows_of(*shots) for shots in kept) + spare
    tail = build(scenes, visibility).tail(first, capacity, alternatives and [Shot(*shot) for shot in alternatives])
    visible, _, _ = tail_of_scenes(scenes, visibility, first, alternatives, capacity)
    q, k, v, *_ = Inputs.random(tail.plan, 2, 1, 64, torch.float16, seed)
    if not q.numel():
        return
    truth, lse = (torch.from_numpy(x) for x in oracle.attention(*(x.double().numpy() for x in (q, k, v)), visible, 0.2))
    unseen = torch.from_numpy(~np.asarray(visible).any(0))
    k[unseen], v[unseen] = float("nan"), float("nan")
    out, found = emulated.forward(q, k, v, tail.plan.table, tail.plan.host_table, 0.2, seed, 2, cluster)
    assert torch.isfinite(out).all() and (out - truth).abs().max() <= 2e-3 * max(1, truth.abs().max())
    torch.testing.assert_close(found.double(), lse, rtol=1e-5, atol=1e-5)


@needs_compiler
@each_cluster
@each_dtype
@each_dim
def test_rows_that_a_query_cannot_see_may_hold_nan(dim, dtype, cluster):
    layout = build(LARGE)
    plan = layout.plan()
    q, k, v = Inputs.random(plan, 1, 1, dim, dtype)[:3]
    hidden = slice(layout.shot_starts[3], layout.shot_ends[4])  # the last two shots of the first scene
    before = emulated.forward(q, k, v, plan.table, plan.host_table, 0.1, 3, 2, cluster)
    for x in (q, k, v):
        x[hidden] = float("nan")
    after = emulated.forward(q, k, v, plan.table, plan.host_table, 0.1, 4, 2, cluster)
    for rows in (slice(0, hidden.start), slice(hidden.stop, None)):
        assert same_bytes(before[0][rows], after[0][rows]) and same_bytes(before[1][:, rows], after[1][:, rows])
    assert after[0][hidden].isnan().all()


@needs_compiler
@each_cluster
def test_rows_that_see_nothing(cluster):
    plan = Plan.build([Run(0, 200, ()), Run(200, 300, ((40, 41),))], 300, 50)
    q, k, v = (normal(n, 2, 64, dtype=torch.float16, seed=n) for n in (300, 50, 51))
    out, lse = emulated.forward(q, k, v[:50], plan.table, plan.host_table, 0.1, 0, 2, cluster)
    assert (out[:200] == 0).all() and (lse[:, :200] == -torch.inf).all()
    assert same_bytes(out[200:], v[40:41].expand(100, 2, 64))


@needs_compiler
def test_scores_of_every_size():
    """Weights that vanish, a first tile far above and far below the others, infinite scores."""
    plan = Plan.build([Run(0, 128, ((0, 500),))], 128, 500)
    q, k, v = (normal(n, 1, 128, dtype=torch.bfloat16, seed=n) for n in (128, 500, 501))
    for low, high in ((0, 176), (200, 300), (480, 500)):
        steep = k.clone()
        steep[low:high] *= 30
        for scale in (0.01, 1.0, 3e4):
            given = (q, steep, v[:500])
            truth, lse = reference.forward(*(x.double() for x in given), plan.table, plan.host_table, scale)
            out, found = emulated.forward(*given, plan.table, plan.host_table, scale)
            plain = reference.forward(*given, plan.table, plan.host_table, scale)[0]
            if scale < 2:
                compare(out, truth, plain)
            assert torch.isfinite(out).all()
            torch.testing.assert_close(found.double(), lse, rtol=1e-5, atol=1e-4)


@needs_compiler
def test_a_maximum_that_stays_shrinks_nothing():
    """The largest score stands in the first of thirty tiles: sums must not be rescaled by almost 1 in each."""
    plan = Plan.build([Run(0, 128, ((0, 30 * 176),))], 128, 30 * 176)
    q, k = (normal(n, 1, 128, dtype=torch.float16, seed=n) for n in (128, 30 * 176))
    k[1:] *= 0.1
    k[0], q[:, 0] = 0, torch.linspace(2, 4, 128)[:, None]
    k[0, 0, 0] = 16.0
    given = q, k, k.flip(2)
    lse = reference.forward(*(x.double() for x in given), plan.table, plan.host_table, 1.0)[1]
    found = emulated.forward(*given, plan.table, plan.host_table, 1.0)[1]
    assert (found.double() - lse).abs().max() < 2e-5


@needs_compiler
@each_dim
def test_neither_chance_nor_blocks_change_a_bit(dim):
    """Whatever order warps, copies and products take, however many blocks, in pairs or not."""
    plan = build(LARGE, CHOSEN).plan()
    given = (*Inputs.random(plan, 2, 1, dim, torch.bfloat16)[:3], plan.table, plan.host_table, 0.1)
    first = emulated.forward(*given, 0, 1, 1)
    for seed in range(1, 9):
        blocks, cluster = [(1, 1), (2, 2), (3, 1), (4, 2)][seed % 4]
        again = emulated.forward(*given, seed, blocks, cluster)
        assert all(same_bytes(a, b) for a, b in zip(first, again, strict=True)), (seed, blocks, cluster)


@needs_compiler
@pytest.mark.parametrize("kind", ["dense", "fused", "far apart", "misaligned", "turned", "one row for all", "one head"])
def test_what_python_hands_over(monkeypatch, kind):
    """Strides and addresses that bulk copies take as they are, and those that are copied first."""
    monkeypatch.setattr(native, "library", lambda: emulated.Library)
    plan = build(SCENES).plan()
    heads = (1, 1) if kind == "one head" else (4, 2)
    inputs = Inputs.random(plan, *heads, 64, torch.float16)
    truth = emulated.forward(*(x.contiguous() for x in inputs[:3]), plan.table, plan.host_table, 0.1)

    def laid(x):
        if kind == "fused":
            wide = torch.full((len(x), 3 * x.shape[1], 64), float("nan"), dtype=x.dtype)
            wide[:, x.shape[1] : 2 * x.shape[1]] = x
            return wide[:, x.shape[1] : 2 * x.shape[1]]
        if kind == "far apart":
            return x.new_empty(len(x), 40, 5, 64)[:, : 2 * x.shape[1] : 2, 3].copy_(x)
        if kind == "misaligned":
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        return x.mT.contiguous().mT if kind == "turned" else x

    q, k, v = (laid(x) for x in inputs[:3])
    if kind == "one row for all":
        q, truth = q[:1].expand_as(q), None
    out, lse = cuda_attention.forward(q, k, v, plan.table, plan.host_table, 0.1)
    truth = truth or emulated.forward(q.contiguous(), k, v, plan.table, plan.host_table, 0.1)
    assert same_bytes(out, truth[0]) and same_bytes(lse, truth[1])


@needs_compiler
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-50])
def test_scales_that_the_kernel_does_not_take(monkeypatch, scale):
    monkeypatch.setattr(native, "library", lambda: emulated.Library)
    plan = build(SCENES).plan()
    q, k, v, *_ = inputs = Inputs.random(plan, 2, 1, 64, torch.float16)
    out, lse = cuda_attention.forward(q, k, v, plan.table, plan.host_table, scale)
    truth = reference.forward(*(x.double() for x in inputs[:3]), plan.table, plan.host_table, scale)
    compare(out, truth[0], reference.forward(q, k, v, plan.table, plan.host_table, scale)[0])
    torch.testing.assert_close(lse.double(), truth[1], rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("logit", [-1e4, -1e9, -1e30, -1e38], ids=str)
def test_logits_below_any_sentinel(logit):
    plan = Plan.build([Run(0, 3, ((0, 7),))], 3, 200)
    q, k, v = torch.zeros(3, 1, 64), torch.zeros(200, 1, 64), normal(200, 1, 64)
    q[..., 0], k[:7, :, 0] = 3, logit
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    out, lse = emulated.forward(q, k, v, plan.table, plan.host_table, 1 / 3)
    assert (out.double() - v[:7].double().mean(0)).abs().max() <= 4 * torch.finfo(q.dtype).eps * v.abs().max()
    exact = k[0, 0, 0].double() + math.log(7)
    assert (lse.double() - exact).abs().max() <= 2 * torch.finfo(lse.dtype).eps * abs(exact)


def test_without_keys_or_queries():
    plan = Plan.build([], 3, 0)
    q, k = torch.ones(3, 2, 64).half(), torch.ones(0, 2, 64).half()
    out, lse = cuda_attention.forward(q, k, k, plan.table, plan.host_table, 1.0)
    assert not out.any() and (lse == -torch.inf).all()
    none = Plan.build([], 0, 0)
    assert cuda_attention.forward(k, k, k, none.table, none.host_table, 1.0)[0].shape == (0, 2, 64)


# -- the emulation finds what is planted -------------------------------------------------------------------------------

DIFFERENT, NAN = "different", "NaN"
PLANTED = {  # what stands in the kernel, what to write instead, what is found (DIFFERENT: anything)
    "values given back too early": (
        """products_wait<0>();
          settle(out);
          release(&m_.v_empty[stage_of(step)]);""",
        "release(&m_.v_empty[stage_of(step)]);\n products_wait<0>();",
        DIFFERENT,
    ),
    "queries given back too early": (
        "barrier_wait(&m_.q_full, parity);",
        "barrier_wait(&m_.q_full, parity);\n if (thread_index() % 32 == 0) barrier_arrive(&m_.q_empty);",
        DIFFERENT,
    ),
    "given back to its own block alone": (
        "if (lane < kCluster) barrier_arrive(empty, lane);",
        "if (lane < kCluster) barrier_arrive(empty);",
        DIFFERENT,
    ),
    "no wait for queries": ("barrier_wait(&m_.q_full, parity);", "", DIFFERENT),
    "no wait for values": ("barrier_wait(&m_.v_full[stage], parity_of(step));", "", DIFFERENT),
    "no wait for a free stage": ("barrier_wait(empty, parity_of(step) ^ 1);", "", "more threads arrive"),
    "one phase for all": ("return step / kStages % 2;", "return 0;", "more threads arrive"),
    "too few bytes": ("barrier_expect(full, kKeys * D * 2);", "barrier_expect(full, kKeys * D);", "every thread waits"),
    "scores read too early": ("products_wait<1>();", "products_wait<2>();", DIFFERENT),
    "weights overwritten too early": (
        "finish_before(sum[0] + sum[1]);",
        "pack(weights, scores);",
        DIFFERENT,
    ),
    "a block that leaves": ("if (kCluster > 1) cluster_sync();\n  }", "}", "has ended"),
    "a copy that nobody awaits": (
        "consume(group - 1);",
        "consume(group - 1);\n if (thread_index() == 128) copy_box(m_.k[0], &k_, &m_.k_full[0], 0, 0, 0);",
        "before its copies have arrived",
    ),
    "values past the end": ("if (count < kKeys) zero_values(stage, count, group);", "", NAN),
    "zeros without a fence": ("fence_async();", "", "did not fence"),
    "zeros without a meeting": ("named_sync(kZeroed + group, 128);", "", NAN),
    "one key too many": (">= count) scores", "> count) scores", DIFFERENT),
    "no rescaling": ("out[i] *= shrink[i / 2 % 2];", ";", DIFFERENT),
    "the wrong channels": ("at_channel(k, kKeys, channel)", "at_channel(k, kKeys, channel ^ 16)", DIFFERENT),
    "the wrong span": ("(span * kKeys + row) * kRowBytes;", "((span * kKeys + row) * kRowBytes ^ 1024);", DIFFERENT),
}


@needs_compiler
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault):
    right, wrong, expected = PLANTED[fault]
    kernel = (emulated.CSRC / "attention_sm90_fwd.h").read_text()
    assert kernel.count(right) == 1
    library = emulated.build(attention_sm90_fwd=kernel.replace(right, wrong))
    layout = build(LARGE)
    plan = layout.plan()
    q, k, v = Inputs.random(plan, 2, 2, 128, torch.bfloat16)[:3]
    truth = reference.forward(*(x.double() for x in (q, k, v)), plan.table, plan.host_table, 0.1)[0]
    hidden = slice(layout.shot_starts[3], layout.shot_ends[4])
    k[hidden], v[hidden] = float("nan"), float("nan")
    free = torch.ones(layout.rows, dtype=torch.bool)
    free[hidden] = False
    found = set()
    for seed in range(12):
        try:
            out = emulated.forward(q, k, v, plan.table, plan.host_table, 0.1, seed, 2, 2, library)[0][free]
        except RuntimeError as error:
            found.add(str(error))
        else:
            error = (out - truth[free]).norm() / truth[free].norm()
            found.add(NAN if out.isnan().any() else DIFFERENT if error > 5e-3 else "nothing")
    found.discard("nothing")
    assert any(expected in (what, DIFFERENT) or expected in what for what in found), found


@needs_compiler
def test_more_registers_than_a_block_has_are_found():
    header = (emulated.CSRC / "attention_sm90.h").read_text()
    greedy = header.replace(
        "kCopierRegisters = 40, kConsumerRegisters = 232", "kCopierRegisters = 32, kConsumerRegisters = 240"
    )
    assert greedy != header
    library = emulated.build(attention_sm90=greedy.replace("static_assert(kCopier", "static_assert(true || kCopier"))
    plan = build(SCENES).plan()
    given = Inputs.random(plan, 1, 1, 64, torch.float16)[:3]
    with pytest.raises(RuntimeError, match="every thread waits"):
        emulated.forward(*given, plan.table, plan.host_table, 0.1, using=library)


# -- index arithmetic --------------------------------------------------------------------------------------------------


@needs_compiler
@given(problem=problems(), heads=st.integers(1, 5), size=st.sampled_from([1, 3, 64, 128, 256]))
def test_every_row_has_one_tile_and_the_longest_come_first(problem, heads, size):
    scenes, visibility, _ = problem
    plan = build(scenes, visibility).plan()
    table, count = plan.host_table, torch.zeros(plan.q_rows, heads, dtype=torch.int32)
    found, sees = np.zeros(3, np.int64), []
    most = emulated.library().most_tiles_of(*emulated.integers(plan.q_rows, len(table), heads, size))
    for index in range(most + 1):
        arguments = emulated.integers(*table.shape, heads, size, index)
        emulated.library().tile_of(emulated.pointer(table), *arguments, found.ctypes.data_as(emulated.ctypes.c_void_p))
        run, first, head = map(int, found)
        if run < 0:
            break
        start, end, *intervals = table[run].tolist()
        assert start <= first < end
        count[first : min(first + size, end), head] += 1
        sees.append(sum(b - a for a, b in zip(intervals[::2], intervals[1::2], strict=True)))
    assert run < 0 and (count == 1).all()
    assert sees == sorted(sees, reverse=True)


@needs_compiler
@given(problem=problems(), size=st.sampled_from([1, 3, 128, 176]))
def test_key_tiles_are_the_rows_that_a_run_sees(problem, size):
    scenes, visibility, _ = problem
    plan = build(scenes, visibility).plan()
    table, found = plan.host_table, torch.zeros(2 * plan.k_rows + 2, dtype=torch.int32)
    for run, (_, _, *edges) in enumerate(table.tolist()):
        arguments = emulated.integers(*table.shape, run, size)
        count = emulated.library().key_tiles(emulated.pointer(table), *arguments, emulated.pointer(found))
        tiles = found[: 2 * count].view(-1, 2).tolist()
        assert all(1 <= n <= size for _, n in tiles)
        rows = [row for first, n in tiles for row in range(first, first + n)]
        assert rows == [row for a, b in zip(edges[::2], edges[1::2], strict=True) for row in range(a, b)]


@needs_compiler
@pytest.mark.parametrize("columns", [64, 128, 176])
def test_threads_hold_every_element_of_a_product_once(columns):
    of = emulated.library()
    held = [
        (of.row_of_element(*emulated.integers(t, i)), of.column_of_element(*emulated.integers(t, i)))
        for t in range(128)
        for i in range(columns // 2)
    ]
    assert sorted(held) == [(row, column) for row in range(64) for column in range(columns)]


@needs_compiler
@pytest.mark.parametrize("rows", [88, 128, 176])
def test_the_swizzle_has_a_place_for_everything_and_no_bank_conflicts(rows):
    place = np.array(
        [[emulated.library().swizzled_offset(*emulated.integers(rows, r, c)) for c in range(128)] for r in range(rows)]
    )
    assert sorted(place.flatten()) == list(range(0, rows * 256, 2))
    assert (place[:, ::8] % 16 == 0).all() and (place[:, 1::8] - place[:, ::8] == 2).all()
    for first in range(0, rows, 8):  # eight rows of one column of pieces: all 32 banks once
        assert len({int(b) // 16 % 8 for b in place[first : first + 8, 24]}) == 8


# -- what the compiler makes of it -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Of every kernel: spills, registers at entry, opcodes in order; and what ptxas complained of."""
    triton = pytest.importorskip("triton", reason="its wheel has the disassembler")
    cubin = tmp_path_factory.mktemp("sm90") / "forward.cubin"
    target = ["-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-O3", "-std=c++17", "-Xptxas=-v"]
    done = subprocess.run(
        [nvcc(), *target, emulated.CSRC / "attention_sm90_fwd.cu", "-o", cubin], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    sass = subprocess.run([tools / "nvdisasm", cubin], capture_output=True, text=True, check=True).stdout
    usage = r"properties for \w*forward_kernel(\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill"
    found = {
        name: {"stack": int(stack), "spills": int(spills)} for name, stack, spills in re.findall(usage, done.stderr)
    }
    for name, body in re.findall(r"\.text\.\w*forward_kernel(\w+):\n(.*?)(?=\.text\.|\Z)", sass, re.DOTALL):
        found[name]["opcodes"] = re.findall(
            r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)", body, re.MULTILINE
        )
        waits = r"HGMMA\.\w+|WARPGROUP\.DEPBAR\.LE gsb0, 0x[01]|MUFU\.EX2"
        found[name]["order"] = [
            {"WAR": f"DEPBAR{what[-1]}", "MUF": "EX2"}.get(what[:3], what) for what in re.findall(waits, body)
        ]
    return found, done.stderr


@pytest.mark.skipif(nvcc() is None, reason="needs nvcc, of the CUDA toolkit")
def test_nothing_spills_and_no_product_waits_for_the_last(compiled):
    """Half and BFloat, 64 and 128 channels, blocks and pairs."""
    kernels, said = compiled
    assert len(kernels) == 8
    for name, kernel in kernels.items():
        counts = {op: sum(o.startswith(op) for o in kernel["opcodes"]) for op in ("HGMMA", "UTMALDG", "MUFU.EX2")}
        print(name, kernel["stack"], kernel["spills"], counts)
        assert kernel["stack"] == kernel["spills"] == 0, name
        assert all(counts.values()), name
        assert not {"STL", "LDL"} & {op.split(".")[0] for op in kernel["opcodes"]}
    assert "serialized" not in said and "setmaxnreg" not in said, said


@pytest.mark.skipif(nvcc() is None, reason="needs nvcc, of the CUDA toolkit")
def test_exponentials_stand_before_the_wait_that_they_hide(compiled):
    """In a step, between the wait for scores and that for values; ptxas may move them behind it (`finish_before`), and
    then products and exponentials would take turns."""
    kernels, _ = compiled
    for name, kernel in kernels.items():
        order = " ".join(kernel["order"])
        (step,) = re.findall(r"DEPBAR1 ((?:EX2 )*)DEPBAR0", order)
        keys = max(int(n) for n in re.findall(r"64x(\d+)x16", order))
        assert step.count("EX2") == keys // 2 + 2, (name, order)  # a thread's scores, and two rescalings


# -- who may ask for it ------------------------------------------------------------------------------------------------


def test_auto_never_takes_what_has_not_run(monkeypatch):
    monkeypatch.setattr(cuda_attention, "reasons", lambda *tensors: [])
    x = torch.zeros(4, 2, 64)
    assert select.ATTENTION.auto(x, x, x) != "cuda"
    assert select.ATTENTION.against_auto("cuda", x, x, x) == ["has not run on a GPU yet: ask for it by name"]


def test_what_it_refuses(monkeypatch):
    assert cuda_attention.reasons(*[torch.zeros(1, 2, 64)] * 3) == ["needs a GPU, got a tensor on cpu"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(native, "reasons", lambda part, device: [])
    x = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(1, 2, 96), requires_grad=True)
    against = " ".join(cuda_attention.reasons(x, x, x))
    for what in ("sm_80", "float32", "head dims 64 and 128, got 96"):
        assert what in against
    assert ("no_grad" in against) == select.ATTENTION.forward_only("cuda")


def test_a_model_is_not_given_what_computes_no_gradients(monkeypatch):
    monkeypatch.setattr(cuda_attention, "FORWARD_ONLY", True, raising=False)
    assert select.Choice.of("cuda") == ("auto", "cuda", "auto")


def test_pairs_where_runs_are_long():
    layout = SceneLayout([[Shot(0, (1, 64, 64)), Shot(0, (1, 32, 32))]])
    assert cuda_attention._paired(layout.plan().host_table)
    assert not cuda_attention._paired(build(LARGE).plan().host_table)
