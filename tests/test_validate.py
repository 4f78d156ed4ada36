"""`lct doctor --validate`: a wrong implementation is caught, a right one remembered, and forgotten after any change."""

import json
from types import SimpleNamespace

import pytest
import torch

from lct.kernels import reference, remembered, select
from lct.validate import failure_of, validate

CPU = torch.device("cpu")


@pytest.fixture
def memory(tmp_path, monkeypatch):
    monkeypatch.setattr(remembered, "path", lambda: tmp_path / "lct" / "validated.json")
    monkeypatch.setattr(remembered, "_passed", frozenset())
    return remembered.path()


def implementation(base=reference, **changed):
    """The functions of `base`, some of them changed, not validated anywhere."""
    return SimpleNamespace(**{**vars(base), "validated": lambda device, dtype: False, **changed})


def spoiled(function, index):
    """A function one of whose results is a little off in one element."""

    def wrong(*arguments):
        results = list(function(*arguments))
        results[index].flatten()[-1] += 0.05 * results[index].abs().max()
        return tuple(results)

    return wrong


def zero_rows(pool, cache, *rest):
    reference.assemble_(pool, cache, *rest)
    cache[0][:1] = 0


WRONG = {
    "out": ("ATTENTION", {"forward": spoiled(reference.forward, 0)}, "out, D"),
    "dv": ("ATTENTION", {"backward": spoiled(reference.backward, 2)}, "gradient of v"),
    "k": ("NORM_ROPE", {"norm_rope_join": spoiled(reference.norm_rope_join, 1)}, "k, D"),
    "norm weights": ("NORM_ROPE", {"norm_rope_join_backward": spoiled(reference.norm_rope_join_backward, 3)}, "norm"),
    "assembled keys": ("NORM_ROPE", {"assemble_": zero_rows}, "assembled keys"),
    "dscale": ("MODULATE", {"modulate_backward": spoiled(reference.modulate_backward, 2)}, "gradient of scale"),
    "lse": ("ATTENTION", {"forward": spoiled(reference.forward, 1)}, "lse, D"),
    "an exception": ("MODULATE", {"gated": lambda *a: 1 / 0}, "ZeroDivisionError"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_implementation_is_caught(monkeypatch, name):
    operation, changed, what = WRONG[name]
    operation = getattr(select, operation)
    monkeypatch.setitem(operation, "triton", implementation(**changed))
    assert what in failure_of(operation.name, "triton", CPU, torch.float32)


def test_what_passes_is_taken_by_auto_and_what_fails_is_not(memory, monkeypatch):
    for name, changed in (("cuda", {}), ("triton", {"modulate": lambda x, *rest: torch.zeros_like(x)})):
        monkeypatch.setitem(select.MODULATE, name, implementation(**changed))
    only = select.Operation("modulate", **{name: select.MODULATE[name] for name in ("triton", "cuda", "reference")})
    monkeypatch.setattr(select, "OPERATIONS", (only,))
    x = torch.zeros(1, 64)
    assert only.auto(x) == "reference"
    assert "lct doctor --validate" in only.against_auto("cuda", x)[0]
    found = {(v.impl, v.dtype): v.failure for v in validate([CPU])}
    assert found["cuda", torch.float32] is None and found["triton", torch.float32]
    assert only.auto(x) == "cuda"
    assert json.loads(memory.read_text())["passed"] == [
        f"modulate cuda cpu {d}" for d in ("bfloat16", "float16", "float32")
    ]
    assert remembered._load() == remembered._passed


def test_what_triton_does_on_a_cpu_is_not_remembered(memory, monkeypatch):
    monkeypatch.setitem(select.MODULATE, "triton", implementation())
    monkeypatch.setattr(select, "OPERATIONS", (select.MODULATE,))
    assert {v.failure for v in validate([CPU]) if v.impl == "triton"} == {None}
    assert not memory.exists() or "triton" not in memory.read_text()


def test_one_gpu_that_fails_speaks_for_all_of_its_kind(memory, monkeypatch):
    """The first device of two alike fails, the second passes."""
    outcomes = iter(["wrong", None])
    monkeypatch.setattr("lct.validate.failure_of", lambda *arguments: next(outcomes))
    only = select.Operation("modulate", cuda=implementation(), reference=reference)
    monkeypatch.setattr(select, "OPERATIONS", (only,))
    monkeypatch.setattr("lct.validate.DTYPES", (torch.float32,))
    assert [v.failure for v in validate([CPU, CPU])] == ["wrong", None]
    assert not remembered.passed("modulate", "cuda", CPU, torch.float32)


def test_a_machine_without_a_home_remembers_nothing(monkeypatch):
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert remembered._load() == frozenset()


@pytest.mark.parametrize("text", ['{"of": "other sources", "passed": ["modulate cuda cpu float32"]}', "", "[1]", "{"])
def test_a_record_of_other_sources_or_none_counts_for_nothing(memory, text):
    memory.parent.mkdir()
    memory.write_text(text)
    assert remembered._load() == frozenset()


def test_a_later_failure_takes_back_what_was_remembered(memory):
    what = ("attention", "cuda", CPU, torch.float32)
    remembered.remember(*what, good=True)
    assert remembered.passed(*what)
    remembered.remember(*what, good=False)
    assert not remembered.passed(*what) and remembered._load() == frozenset()


def test_what_is_slow_on_a_gpu_until_it_is_validated_is_told(monkeypatch):
    gpu, half = torch.device("cuda"), torch.bfloat16
    assert select.unvalidated("auto", torch.device("cpu"), torch.float32) is None
    monkeypatch.setattr(remembered, "passed", lambda *_: False)
    assert select.unvalidated("triton", gpu, half) is None
    said = select.unvalidated("auto", gpu, half)
    assert said.startswith("attention, norm_rope, modulate: computed by plain torch")
    assert "in bfloat16 yet; `lct doctor --validate`" in said
    monkeypatch.setattr(remembered, "passed", lambda operation, impl, *_: (operation, impl) != ("modulate", "triton"))
    assert select.unvalidated("auto", gpu, half).startswith("modulate: computed by plain torch")
    monkeypatch.setattr(remembered, "passed", lambda *_: True)
    assert select.unvalidated("auto", gpu, half) is None
