"""Attention in csrc/ on the CPU: every instruction set, sizes at the edges of tiles, threads, strides, refusals."""

import subprocess
import sys
import threading
import time
from itertools import pairwise

import pytest
import torch
from tensors import SCENES, SELECTION, Inputs, assert_attention, build, normal, same_bytes
from test_native import needs_library, with_one

from lct.kernels import attention, native, native_attention, select
from lct.kernels.numerics import compare
from lct.layout import SceneLayout, Shot
from lct.plan import Plan, Run

pytestmark = needs_library
ISAS = () if native.reasons("cpu", torch.device("cpu")) else tuple(native.library().attention_isas().split())
TILE, TASK, BLOCK = 64, 256, 128  # rows: kTile, kForwardTiles · kTile and kBlock of csrc/attention_cpu.h

each_isa = pytest.mark.parametrize("isa", ISAS)


@pytest.fixture
def use(monkeypatch):
    return lambda isa: monkeypatch.setattr(native_attention, "ISA", isa)


@pytest.fixture
def threads():
    """Set their number; afterwards it is what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def one_shot_of_each(*rows):
    return SceneLayout([[Shot(0, (1, 1, n)) for n in rows]])


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_the_portable_set_is_always_there_and_comes_last():
    assert ISAS[-1] == "portable" and len(set(ISAS)) == len(ISAS)


@each_isa
@pytest.mark.parametrize("dim", [1, 7, 16, 24, 65, 256])
def test_every_instruction_set_equals_the_oracle(isa, dim, use):
    use(isa)
    layout = build(SCENES, SELECTION)
    assert_attention(Inputs.random(layout.plan(), dim=dim), layout.plan(), layout.dense_mask().numpy(), "cpu")


@each_isa
@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (5, 1)], ids="{0[0]}q{0[1]}kv".format)
def test_rows_at_the_edges_of_vectors_tiles_and_tasks(isa, heads, use):
    use(isa)
    sizes = (1, 15, 17, TILE - 1, TILE, TILE + 1, 0, BLOCK - 1, BLOCK + 1, TASK, TASK + 70)
    plan = one_shot_of_each(*sizes).plan()
    inputs = Inputs.random(plan, *heads, dim=24)
    plain = inputs.run(plan, impl="reference")
    truth = Inputs(*(x.double() for x in inputs)).run(plan, impl="reference")
    kinds = ("forward",) * 2 + ("gradient",) * 3
    for kind, *three in zip(kinds, inputs.run(plan, impl="cpu"), truth, plain, strict=True):
        compare(*three, kind=kind)


@each_isa
def test_instruction_sets_agree_on_masks(isa, use):
    """Rows that see nothing, rows nobody sees, several intervals that do not begin with the first row."""
    use(isa)
    runs = [Run(3, 70, ((5, 9), (40, 190))), Run(80, 81, ((199, 200),)), Run(90, 95, ())]
    plan = Plan.build(runs, 100, 200)
    assert_attention(Inputs.random(plan, dim=20), plan, plan.dense_mask().numpy(), "cpu")


@each_isa
def test_a_key_far_below_the_highest_score_weighs_nothing_at_all(isa, use):
    use(isa)
    layout = one_shot_of_each(2)
    q, k, v = (torch.ones(2, 1, 8) for _ in range(3))
    k[1], v[1] = -1000, 1e30
    assert torch.equal(attention(q, k, v, layout, impl="cpu"), torch.ones(2, 1, 8))


@each_isa
@pytest.mark.parametrize("size", [1e-20, 1e3, 1e18])
def test_scores_of_any_size(isa, size, use):
    """Weights of the largest are one-hot; nothing overflows on the way."""
    use(isa)
    layout = one_shot_of_each(40, 50)
    q, k, v = (normal(90, 2, 24, seed=i) for i in range(3))
    got = attention(q * size, k, v, layout, impl="cpu")
    true = attention((q * size).double(), k.double(), v.double(), layout, impl="reference")
    compare(got, true, attention(q * size, k, v, layout, impl="reference"))


@each_isa
@pytest.mark.parametrize("size", [30.0, 1e4, 1e12])
def test_backward_finds_the_weights_of_the_forward(isa, size, use):
    """Both passes round a score alike: where one key takes all, its weight is 1 again, and dv is dout itself."""
    use(isa)
    layout = one_shot_of_each(40)
    q, k, dout = (normal(40, 2, 24, seed=i) for i in range(3))
    q[1:], k[:, :], k[7] = 0, -q[:1].sign(), q[0].sign()
    v = normal(40, 2, 24, seed=3).requires_grad_()
    attention(q[:40] * size, k, v, layout, scale=24**-0.5, impl="cpu")[0].mul(dout[0]).sum().backward()
    assert torch.equal(v.grad[7], dout[0]) and not v.grad[:7].any() and not v.grad[8:].any()


def test_neighbours_change_no_bit():
    """Packed with another scene, or alone, in forward and backward, where a scene is long enough to be cut in parts."""
    long, short = [Shot(0, (1, 1, n)) for n in (700, 513, 900)], [Shot(0, (1, 1, n)) for n in (90, 1300)]
    alone, packed = SceneLayout([long]).plan(), SceneLayout([short, long]).plan()
    beside = Inputs.random(packed, dim=16)
    rows = slice(1390, 1390 + 2113)
    inputs = Inputs(*(x[rows] for x in beside[:4]), beside.dlse[:, rows].contiguous())
    for name, a, b in zip("olqkv", inputs.run(alone, impl="cpu"), beside.run(packed, impl="cpu"), strict=True):
        assert same_bytes(a, b[:, rows] if name == "l" else b[rows])


@each_isa
def test_what_is_not_finite_stays_in_its_row(isa, use):
    use(isa)
    layout = one_shot_of_each(30, 70)
    q, k, v = (normal(100, 2, 16, seed=i) for i in range(3))
    expected = attention(q, k, v, layout, impl="cpu")
    payloads = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    for bad in (*payloads, torch.inf):
        spoilt = q.clone()
        spoilt[50, 1] = bad
        got = attention(spoilt, k, v, layout, impl="cpu")
        assert got[50, 1].isnan().all()
        got[50, 1] = expected[50, 1]
        assert same_bytes(got, expected)


@each_isa
def test_no_rows_and_no_keys(isa, use):
    use(isa)
    for rows in (0, 5):
        q, k, v = torch.ones(rows, 2, 8), torch.ones(0, 1, 8), torch.ones(0, 1, 8)
        out, lse = attention(q, k, v, Plan.build([], rows, 0), impl="cpu", return_lse=True)
        assert torch.equal(out, torch.zeros(rows, 2, 8)) and torch.equal(lse, torch.full((2, rows), -torch.inf))


# -- threads -----------------------------------------------------------------------------------------------------------


@each_isa
def test_threads_change_no_bit(isa, use, threads):
    use(isa)
    plan = one_shot_of_each(300, 513, 90).plan()
    inputs = Inputs.random(plan, 4, 2, dim=40)
    found = []
    for count in (1, 2, 3, 8):
        threads(count)
        found += [inputs.run(plan, impl="cpu") for _ in range(3)]
    for a, b in pairwise(found):
        assert all(same_bytes(x, y) for x, y in zip(a, b, strict=True))


def test_several_callers_at_once(threads):
    threads(2)
    plans = [one_shot_of_each(100 + 37 * i, 60).plan() for i in range(4)]
    inputs = [Inputs.random(plan, seed=i) for i, plan in enumerate(plans)]
    expected = [x.run(plan, impl="cpu") for x, plan in zip(inputs, plans, strict=True)]
    wrong = []

    def call(i):
        torch.set_num_threads(2)  # of this thread
        for _ in range(20):
            got = inputs[i].run(plans[i], impl="cpu")
            if not all(same_bytes(a, b) for a, b in zip(got, expected[i], strict=True)):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_python_goes_on_while_it_computes(use):
    use("portable")
    layout = one_shot_of_each(6000)
    q, k, v = (torch.randn(6000, 4, 64) for _ in range(3))
    layout.plan()
    caller = threading.Thread(target=lambda: attention(q, k, v, layout, impl="cpu"))
    caller.start()
    seen = 0
    while caller.is_alive():
        time.sleep(0.001)
        seen += caller.is_alive()
    assert seen >= 5, "the interpreter stood still"


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import numpy as np
import tvm_ffi
lib = tvm_ffi.load_module(sys.argv[1])
given = np.load(sys.argv[2])
q, k, v, table = (tvm_ffi.from_dlpack(given[name]) for name in ("q", "k", "v", "table"))
out, lse = np.zeros_like(given["q"]), np.zeros(given["q"].shape[1::-1], np.float32)
lib.attention_forward(q, k, v, table, tvm_ffi.from_dlpack(out), tvm_ffi.from_dlpack(lse), 0.25, "", 3)
assert not any("libgomp" in line for line in open("/proc/self/maps"))
np.save(sys.argv[3], out)
"""


def test_threads_of_its_own_where_there_is_no_openmp(tmp_path):
    import numpy as np

    layout = one_shot_of_each(100, 200)
    q, k, v = (normal(300, 4, 16, seed=i) for i in range(3))
    np.savez(tmp_path / "given.npz", q=q, k=k, v=v, table=layout.plan().host_table)
    command = [sys.executable, "-c", WITHOUT_TORCH, native.FOLDER / "_native.so", "given.npz", "out.npy"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = torch.from_numpy(np.load(tmp_path / "out.npy"))
    assert same_bytes(out, attention(q, k, v, layout, scale=0.25, impl="cpu"))


# -- what it is given --------------------------------------------------------------------------------------------------


@each_isa
@pytest.mark.parametrize("heads", [3, 32], ids=["dense", "a page apart"])
def test_rows_of_any_stride_give_the_same(isa, heads, use):
    """Slices of one projection, channels apart, and rows whole pages apart, whose copies lie together."""
    use(isa)
    plan = one_shot_of_each(70, 150).plan()
    dense = Inputs.random(plan, 2, 2, dim=32)
    apart = [torch.zeros(x.shape[0], heads, 32) for x in dense[:4]]
    sliced = [wide[:, 1:3].copy_(x) for wide, x in zip(apart, dense[:4], strict=True)]
    channels = [torch.stack([x, x], -1)[..., 0] for x in dense[:4]]
    expected = dense.run(plan, impl="cpu")
    for given in (sliced, channels, [x.transpose(0, 1).contiguous().transpose(0, 1) for x in dense[:4]]):
        got = Inputs(*given, dense.dlse).run(plan, impl="cpu")
        assert all(same_bytes(a, b) for a, b in zip(got, expected, strict=True))


def test_what_it_takes():
    x = torch.zeros(4, 2, 8)
    assert native_attention.reasons(x, x, x) == []
    assert "float32" in native_attention.reasons(*[x.double()] * 3)[0]
    assert "up to 256" in native_attention.reasons(*[torch.zeros(4, 2, 257)] * 3)[0]
    assert "on the CPU only" in native_attention.reasons(*[x.to("meta")] * 3)[0]


def test_auto_takes_it_in_fp32_and_torch_elsewhere():
    x = torch.zeros(4, 2, 8)
    assert select.choose(select.ATTENTION, "auto", x, x, x) == "cpu"
    assert select.choose(select.ATTENTION, "auto", *[x.bfloat16()] * 3) == "sdpa"
    assert select.choose(select.ATTENTION, "auto", *[torch.zeros(4, 2, 257)] * 3) == "sdpa"


def test_without_wide_vectors_auto_stays_with_torch(monkeypatch):
    monkeypatch.setattr(native_attention, "WIDE", False)
    x = torch.zeros(4, 2, 8)
    assert select.choose(select.ATTENTION, "auto", x, x, x) == "sdpa"


def test_elsewhere_than_on_x86_the_native_kernels_ask_to_be_validated(monkeypatch):
    x = torch.zeros(4, 3, 8)
    assert [
        select.choose(op, "auto", *given) for op, given in ((select.ATTENTION, (x, x, x)), (select.NORM_ROPE, (x,)))
    ] == ["cpu", "cpu"]
    monkeypatch.setattr(native, "X86", False)
    assert [
        select.choose(op, "auto", *given) for op, given in ((select.ATTENTION, (x, x, x)), (select.NORM_ROPE, (x,)))
    ] == ["sdpa", "reference"]


def good():
    """Arguments that both functions of the library take."""
    plan = one_shot_of_each(3, 5).plan()
    q, k, v = torch.ones(8, 4, 8), torch.ones(8, 2, 8), torch.ones(8, 2, 8)
    lse = torch.zeros(4, 8)
    forward = {"q": q, "k": k, "v": v, "table": plan.host_table, "out": q.clone(), "lse": lse, "scale": 1.0}
    backward = {"dout": q, "dlse": lse, **forward, "key_table": plan.host_key_table}
    order = ("dout", "dlse", "q", "k", "v", "out", "lse", "table", "key_table")
    backward = {name: backward[name] for name in order} | {"dq": q.clone(), "dk": k.clone(), "dv": v.clone()}
    ending = {"isa": "", "threads": 2}
    return {"attention_forward": forward | ending, "attention_backward": backward | {"scale": 1.0} | ending}


BAD = {
    "q": lambda x: x.double(),
    "k": lambda x: x[:, :, :4],
    "v": lambda x: x[1:],
    "table": lambda x: with_one(x, 9),
    "key_table": lambda x: with_one(x, -1),
    "out": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "lse": lambda x: x.T,
    "dlse": lambda x: x.double(),
    "dout": lambda x: x[:, 1:],
    "dq": lambda x: x[:, :, :4],
    "dk": lambda x: x.half(),
    "dv": lambda x: x.repeat(1, 2, 1),
    "isa": lambda x: "avx1024",
}


@pytest.mark.parametrize("function", good())
def test_good_arguments_are_taken(function):
    getattr(native.library(), function)(*good()[function].values())


@pytest.mark.parametrize(
    ("function", "name"),
    [(function, name) for function, arguments in good().items() for name in BAD if name in arguments],
)
def test_a_bad_argument_is_a_value_error_that_names_it(function, name):
    arguments = good()[function]
    arguments[name] = BAD[name](arguments[name])
    with pytest.raises(ValueError, match=rf"^{name}\b.*expected .*, got "):
        getattr(native.library(), function)(*arguments.values())
