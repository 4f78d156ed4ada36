"""The native library: its index arithmetic, rounding, errors and build; test_norm_rope.py has what it computes."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tensors import SCENES, Join, build, normal, same_bytes

from lct import doctor
from lct.kernels import KVRows, NormRope, native, native_norm_rope, norm_rope_append_, norm_rope_join
from lct.kernels.rope import frequencies

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
CPU = torch.device("cpu")
SPEC = NormRope(4, (4, 6, 6))
SHARED = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024}
DIMS = (8, 16, 24, 40, 64, 96, 128, 200, 256)

against = native.reasons("cpu", CPU)
needs_library = pytest.mark.skipif(bool(against), reason="; ".join(against))
rows = st.integers(0, 70)


def test_the_library_is_that_of_these_sources():
    assert not native.CHANGED, "csrc has changed: python setup.py build_ext --inplace"


def test_sources_that_changed_since_the_build(tmp_path, monkeypatch):
    (tmp_path / "norm_rope.cu").write_text("before")
    record = {"sources": hashlib.sha256(b"before").hexdigest()}
    assert not native._changed(record, tmp_path) and not native._changed(record, tmp_path / "nowhere")
    (tmp_path / "norm_rope.cu").write_text("after")
    assert native._changed(record, tmp_path)
    monkeypatch.setattr(native, "RECORD", native.RECORD or {"built": {"cpu": "g++"}})
    monkeypatch.setattr(native, "CHANGED", True)
    assert native.reasons("cpu", CPU) == [
        "csrc/ has changed since the native library was built; run pip install -e . again"
    ]


# -- who does what -----------------------------------------------------------------------------------------------------


@needs_library
@given(
    counts=st.tuples(rows, rows),
    heads=st.tuples(st.integers(1, 13), st.integers(1, 5)),
    dim=st.sampled_from(DIMS),
    by_row=st.booleans(),
    blocks=st.integers(1, 90),
)
@example(counts=(0, 0), heads=(1, 1), dim=8, by_row=False, blocks=90)
@example(counts=(1, 0), heads=(24, 24), dim=128, by_row=False, blocks=1024)
def test_every_channel_is_visited_once(counts, heads, dim, by_row, blocks):
    """And every partial sum of norm weights' gradients is written once."""
    library, (heads, kv_heads) = native.library(), heads
    streams = [torch.zeros(n, heads + 2 * kv_heads, dim, dtype=torch.int32) for n in counts]
    floats = [x.float() for x in streams]
    sizes = [library.norm_rope_partial_rows(*floats, heads, by_row, blocks, i) for i in (0, 1)]
    parts = [torch.zeros(n, 2, dtype=torch.int32) for n in sizes]
    library.probe_visits(*streams, *parts, heads, by_row, blocks)
    for x in (*streams, *parts):
        assert torch.equal(x, torch.ones_like(x))


@needs_library
@given(
    axes=st.tuples(*[st.sampled_from((0, 2, 4, 6, 16, 40))] * 3),
    dim=st.sampled_from(DIMS[4:]),
    theta=st.sampled_from((100.0, 10_000.0)),
    seed=st.integers(0, 99),
)
def test_pairs_follow_their_axis_with_their_frequency(axes, dim, theta, seed):
    while sum(axes) > dim:
        axes = (*axes[:-1], 0) if axes[-1] else (*axes[:1], 0, 0)
    positions = (torch.rand(7, 3, generator=torch.Generator().manual_seed(seed)) * 2e5 - 1e5).round()
    out = torch.empty(7, dim // 2, 2, dtype=torch.float64)
    native.library().probe_turns(positions, *frequencies(axes, theta, CPU), out)
    angles = np.zeros((7, dim // 2))
    pair = 0
    for axis, channels in enumerate(axes):
        for m in range(channels // 2):
            angles[:, pair] = positions[:, axis].double().numpy() * theta ** (-2 * m / channels)
            pair += 1
    np.testing.assert_allclose(out.numpy(), np.stack([np.cos(angles), np.sin(angles)], 2), rtol=0, atol=4e-7)
    assert torch.equal(out[:, pair:], torch.tensor([1.0, 0.0], dtype=torch.float64).expand_as(out[:, pair:]))


@needs_library
@given(row=st.integers(0, 2**31 - 1), head=st.integers(0, 2**20), lane=st.integers(0, 31), strides=st.data())
def test_offsets_beyond_32_bits(row, head, lane, strides):
    row_stride, head_stride = (strides.draw(st.integers(0, limit)) for limit in (2**31, 2**40))
    got = native.library().probe_offset(row_stride, head_stride, row, head, lane)
    assert got == row * row_stride + head * head_stride + 8 * lane


@needs_library
def test_a_cache_beyond_2_to_the_31_elements():
    """Virtual memory alone: rows lie 2^28 elements apart, and nothing between them is touched."""
    geometry = build(SCENES[1:]).geometry()
    join = Join.random(geometry, SPEC, dtype=torch.bfloat16)
    count, stride = len(geometry.positions), 2**28
    try:
        far = [torch.empty(stride * (count - 1) + 32, dtype=torch.bfloat16) for _ in range(2)]
    except RuntimeError as error:
        pytest.skip(f"the machine does not lend {stride * count * 4:,} bytes of address space: {error}")
    caches = [x.as_strided((count, 2, 16), (stride, 16, 1)) for x in far]
    slots = torch.arange(count).flip(0)
    given = (*join, geometry.streams, geometry.positions, SPEC)
    norm_rope_append_(*given, KVRows(*caches, slots), impl="cpu")
    for cache, x in zip(caches, norm_rope_join(*given, "cpu")[1:], strict=True):
        assert same_bytes(cache[slots], x)


def results(join, geometry, spec):
    """q, k, v and all gradients by the CPU implementation."""
    leaves = [x.detach().requires_grad_() for x in (*join[:2], *join.text_norm, *join.video_norm)]
    streams = leaves[0], leaves[1], tuple(leaves[2:4]), tuple(leaves[4:])
    out = norm_rope_join(*streams, geometry.streams, geometry.positions, spec, "cpu")
    dout = [normal(*x.shape, dtype=x.dtype, seed=i) for i, x in enumerate(out)]
    gradients = torch.autograd.grad(out, leaves, dout)
    return [x.detach() for x in out], gradients[:2], gradients[2:]


@needs_library
@pytest.mark.parametrize("scope", ["head", "row"])
@pytest.mark.parametrize("dim", [16, 40, 128])
def test_heads_split_over_blocks_give_the_same(scope, dim, monkeypatch):
    """As on a GPU, where few rows alone would not fill it."""
    geometry, spec = build(SCENES).geometry(), NormRope(8, (4, 6, 6), scope=scope)
    join = Join.random(geometry, spec, kv_heads=4, dim=dim)
    out, d_qkv, d_norm = results(join, geometry, spec)
    monkeypatch.setattr(native_norm_rope, "BLOCKS", 1000)
    split_out, split_qkv, split_norm = results(join, geometry, spec)
    assert all(map(same_bytes, (*out, *d_qkv), (*split_out, *split_qkv)))
    for x, whole in zip(split_norm, d_norm, strict=True):  # the same terms in another order
        assert (x - whole).abs().max() <= 1e-6 * whole.abs().max() * len(geometry.positions) ** 0.5


@needs_library
@pytest.mark.parametrize("scope", ["head", "row"])
def test_threads_change_nothing(scope):
    geometry, spec = build(8 * SCENES).geometry(), NormRope(8, (4, 6, 6), scope=scope)
    join = Join.random(geometry, spec, kv_heads=4, dim=64)  # two threads' worth
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(sum(map(list, results(join, geometry, spec)), []))
    finally:
        torch.set_num_threads(threads)
    assert len(geometry.positions) * 16 * 64 > 2**18
    assert all(same_bytes(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@needs_library
def test_inputs_need_neither_alignment_nor_dense_channels():
    geometry = build(SCENES).geometry()
    join = Join.random(geometry, SPEC)
    expected = results(join, geometry, SPEC)[0]
    padded = [torch.full((len(x), 9, 19), float("nan")) for x in join[:2]]
    shifted = [x[:, 1:, 3:].copy_(given) for x, given in zip(padded, join[:2], strict=True)]
    sparse = [torch.stack([x, x], dim=-1)[..., 0] for x in join[:2]]
    for qkv in (shifted, sparse):
        got = results(Join(*qkv, *join[2:]), geometry, SPEC)[0]
        assert all(map(same_bytes, got, expected))


# -- rounding ----------------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_as_torch_does(dtype):
    """Every value of the narrow dtype, the midpoints between neighbours, their neighbours, and random bits."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()].unique()
    middle = (every[1:] + every[:-1]) / 2
    beside = [torch.nextafter(middle, torch.tensor(limit)) for limit in (-torch.inf, torch.inf)]
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**18,), generator=generator).to(torch.int32).view(torch.float32)
    edges = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65519.99, 65520.0, -65520.0, 3.4e38])
    x = torch.cat([every, middle, *beside, bits, edges])
    narrowed, back = torch.empty_like(x, dtype=dtype), torch.empty_like(x)
    native.library().probe_round_trip(x, narrowed, back)
    number = ~x.isnan()
    assert same_bytes(narrowed[number], x.to(dtype)[number]) and same_bytes(back[number], x.to(dtype).float()[number])
    assert narrowed[~number].isnan().all() and back[~number].isnan().all() and (~number).any()


# -- errors ------------------------------------------------------------------------------------------------------------


def good_join():
    """Every argument of the library's `norm_rope_join` by name, in order."""
    geometry = build(SCENES[1:]).geometry()
    join, count = Join.random(geometry, SPEC), len(geometry.positions)
    turns, axes = frequencies((4, 6, 6), 1e4, CPU)
    return {
        "text_qkv": join.text_qkv,
        "video_qkv": join.video_qkv,
        "text_q_norm": join.text_norm[0],
        "text_k_norm": join.text_norm[1],
        "video_q_norm": join.video_norm[0],
        "video_k_norm": join.video_norm[1],
        "text_rows": geometry.streams.text_rows,
        "video_rows": geometry.streams.video_rows,
        "positions": geometry.positions,
        "frequencies": turns,
        "axes": axes,
        "q": torch.empty(count, 4, 16),
        **{name: torch.empty(count, 2, 16) for name in ("k", "v")},
        "slots": torch.arange(count),
        **{name: torch.empty(count, 2, 16) for name in ("k_pool", "v_pool")},
        "pool_slots": torch.arange(count),
        "eps": 1e-6,
        "by_row": False,
        "blocks": 0,
        "threads": 1,
    }


def with_one(x, value):
    return x.clone().index_fill_(0, torch.tensor([1]), value)


BAD = {
    "text_qkv": lambda x: x.half(),
    "video_qkv": lambda x: x[:, :, :12],
    "text_q_norm": lambda x: x[:8],
    "text_k_norm": lambda x: x.double(),
    "video_q_norm": lambda x: x.repeat(2)[::2],
    "video_k_norm": lambda x: x[None],
    "text_rows": lambda x: with_one(x, len(x) * 100),
    "video_rows": lambda x: x.int(),
    "positions": lambda x: x[:-1],
    "frequencies": lambda x: torch.cat([x, x]),
    "axes": lambda x: with_one(x, 3),
    "q": lambda x: x[:, :3],
    "k": lambda x: x[:, :1],
    "v": lambda x: x[:-1],
    "slots": lambda x: with_one(x, -1),
    "k_pool": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "v_pool": lambda x: x[1:],
    "pool_slots": lambda x: with_one(x, len(x)),
    "blocks": lambda x: -1,
}


@needs_library
def test_good_arguments_are_taken():
    native.library().norm_rope_join(*good_join().values())


@needs_library
@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_a_value_error_that_names_it(name):
    arguments = good_join()
    arguments[name] = BAD[name](arguments[name])
    expected = {"q": "heads", "frequencies": "axes|frequencies"}.get(name, name)
    with pytest.raises(ValueError, match=rf"^({expected})\b.*expected .*, got "):
        native.library().norm_rope_join(*arguments.values())


def test_each_part_says_what_it_is_for():
    x = torch.zeros(1, 3, 16)
    assert native_norm_rope.cuda.reasons(x) == ["needs a GPU, got a tensor on cpu"]
    assert native_norm_rope.cpu.reasons(x.to("meta")) == ["needs tensors on the CPU, got a tensor on meta"]


@needs_library
def test_what_the_cpu_part_refuses():
    assert native_norm_rope.cpu.reasons(torch.zeros(1, 3, 16)) == []
    assert "float64" in "".join(native_norm_rope.cpu.reasons(torch.zeros(1, 3, 16, dtype=torch.float64)))
    for dim in (4, 12, 264):
        assert "multiples of 8 up to 256" in "".join(native_norm_rope.cpu.reasons(torch.zeros(1, 3, dim)))
    sparse = torch.zeros(4, 16, 1).transpose(1, 2).expand(4, 2, 16)[..., ::2]
    assert "contiguous" in "".join(native_norm_rope.cpu.reasons(torch.zeros(1, 3, 8), sparse))


# -- the build record --------------------------------------------------------------------------------------------------

RECORD = {
    "tvm_ffi": native.INSTALLED,
    "built": {"cpu": "g++ 12", "cuda": "nvcc 13.0"},
    "architectures": ["sm_80", "sm_90a"],
    "left_out": {},
}


@pytest.fixture
def install(monkeypatch):
    """Makes the package see another build record."""
    return lambda **changes: monkeypatch.setattr(native, "RECORD", RECORD | changes)


def test_missing_native_library(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "RECORD", native._read(tmp_path))
    assert native.reasons("cpu", CPU) == ["the native library is not built; pip install -e . builds it"]
    assert doctor._native() == ["native: not built; pip install -e . builds it"]


def test_a_part_that_was_left_out(install):
    install(built={"cpu": "g++ 12"}, left_out={"cuda": "LCT_CUDA=0 forbade it"})
    assert native.reasons("cuda", CPU) == ["the native library was built without cuda: LCT_CUDA=0 forbade it"]
    assert doctor._native() == ["native cpu: built with g++ 12", "native cuda: not built, LCT_CUDA=0 forbade it"]


def test_another_apache_tvm_ffi(install, monkeypatch):
    install(tvm_ffi="0.1.2")
    (reason,) = native.reasons("cpu", CPU)
    assert reason == f"built with apache-tvm-ffi 0.1.2, installed is {native.INSTALLED}; run pip install -e . again"
    monkeypatch.setattr(native, "INSTALLED", None)
    assert native.reasons("cpu", CPU) == ["apache-tvm-ffi is not installed; pip install apache-tvm-ffi==0.1.2"]


def test_a_library_that_does_not_load(tmp_path, monkeypatch):
    (tmp_path / "_native.so").write_text("no library")
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    with pytest.raises(OSError, match=r"does not load .*run pip install -e . again"):
        native.library.__wrapped__()


CAPABILITIES = {(8, 0): True, (8, 6): True, (9, 0): True, (7, 5): False, (10, 0): False, (12, 0): False}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_wrong_arch(install, monkeypatch, capability):
    install()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    wrong = f"built for sm_80, sm_90a; this GPU is sm_{capability[0]}{capability[1]}"
    assert native.reasons("cuda", torch.device("cuda")) == ([] if CAPABILITIES[capability] else [wrong])


# -- the build ---------------------------------------------------------------------------------------------------------


def set_up(folder, **environment):
    """The build record of setup.py in an environment, built into a folder."""
    command = [
        sys.executable,
        "setup.py",
        "--quiet",
        "build_ext",
        "--build-lib",
        folder,
        "--build-temp",
        folder / "temp",
    ]
    names = ("PATH", "HOME", "PYTHONPATH")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    done = subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "lct" / "_native.json").read_text())
    assert set(record["built"]) | set(record["left_out"]) == {"cpu", "cuda"}
    assert (folder / "lct" / "_native.so").exists() == ("cpu" in record["built"])
    return record


def program(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{shutil.which('bash')}\n{text}\n")
    (folder / name).chmod(0o755)


def test_builds_without_a_compiler(tmp_path):
    record = set_up(tmp_path, PATH=str(tmp_path))
    assert record["built"] == {} and "no C++ compiler" in record["left_out"]["cpu"]


def test_builds_without_apache_tvm_ffi(tmp_path):
    (tmp_path / "tvm_ffi.py").write_text("raise ImportError('blocked')")
    record = set_up(tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert record["built"] == {} and "apache-tvm-ffi does not import (blocked)" in record["left_out"]["cpu"]


COMPILES = 'if [ "$1" = --version ]; then echo "g++ 99"; else for last; do :; done; echo > "$last"; fi'


@pytest.mark.parametrize(
    ("asked", "nvcc", "expected"),
    [("0", COMPILES, "forbade"), ("", COMPILES, "no GPU was visible"), ("1", "echo 'error: bad' >&2; exit 1", "bad")],
    ids=["forbidden", "no GPU", "nvcc fails"],
)
def test_builds_without_cuda(tmp_path, asked, nvcc, expected):
    program(tmp_path / "bin", "g++", COMPILES)
    program(tmp_path / "bin", "nvcc", nvcc)
    program(tmp_path / "bin", "nvidia-smi", "exit 9")
    here = {"PATH": str(tmp_path / "bin"), "CUDA_HOME": str(tmp_path), "LCT_CUDA": asked}
    record = set_up(tmp_path / "out", **here)
    assert record["built"] == {"cpu": "g++ 99"} and record["architectures"] == []
    assert expected in record["left_out"]["cuda"]


def test_one_version_of_apache_tvm_ffi_everywhere():
    """What builds the library and what loads it must be the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = (project["build-system"]["requires"], project["project"]["dependencies"])
    pins = [next(name for name in names if "tvm-ffi" in name) for names in wanted]
    assert pins[0] == pins[1] and pins[0] in (ROOT / "constraints.txt").read_text().splitlines()


def nvcc():
    places = [str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"), os.environ.get("PATH", "")]
    return next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)


@pytest.mark.skipif(nvcc() is None, reason="needs nvcc, of the CUDA toolkit")
def test_kernels_compile_without_spills(tmp_path):
    each = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in SHARED]
    sources = ["-O3", "-std=c++17", "-Xptxas=-v", *each, "-c", CSRC / "norm_rope.cu"]
    start = time.perf_counter()
    done = subprocess.run([nvcc(), *sources, "-o", tmp_path / "out"], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    pattern = r"'(\w+)' for '(sm_\w+)'.*?(\d+) bytes stack.*?(\d+) bytes spill stores.*?Used (\d+) registers([^\n]*)"
    found = []
    for name, arch, stack, spills, registers, rest in re.findall(pattern, done.stderr, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernel, argument = re.search(r"(join|assemble|backward)_kernelI(\w+?)Ev", name).groups()
        dtype = next(
            (dtype for mangled, dtype in {"Half": "fp16", "BFloat": "bf16"}.items() if mangled in argument), "fp32"
        )
        found.append((arch, kernel, dtype, int(shared[1]) if shared else 0, int(stack), int(spills)))
        print(*found[-1][:3], f"registers={registers} shared={found[-1][3]} stack={stack} spills={spills}")
    print(f"{seconds:.1f} s")
    assert len({case[:3] for case in found}) == len(SHARED) * 3 * 3
    assert all(shared <= SHARED[arch] and stack == spills == 0 for arch, _, _, shared, stack, spills in found)
