"""What `lct estimate` says training takes, against what it takes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from processes import small
from torch.profiler import ProfilerActivity, profile

from lct import SceneLayout, Shot
from lct.estimate import HELD, SENT, STATE, Mesh, _uneven, estimate, kept_bytes, per_process, print_estimate
from lct.model.config import lct_3b
from lct.train.execution import Execution
from lct.train.trainer import Trainer, shot_errors

NINE = SceneLayout([[Shot(200, (1, 1, 1), "global"), *(Shot(150, (22, 30, 30)) for _ in range(9))]])


def held_after_forward(trainer, batch) -> int:
    """Bytes that a forward pass allocates and does not free, as torch's profiler counts them."""
    times = trainer.times(batch)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        losses = shot_errors(trainer.model, batch, times, 1.0, torch.float32, "auto")
    found = sum(event.self_cpu_memory_usage for event in watch.key_averages())
    assert losses.total.requires_grad  # what it holds was still held
    return found


@pytest.mark.parametrize("recompute", ["none", "attention", "all"])
def test_kept_for_the_backward_pass(recompute, tmp_path):
    model = replace(small().model, blocks=6, width=64, heads=4, kv_heads=4, mlp_width=256)
    config = small(scenes=8, model=model)
    trainer = Trainer(config, tmp_path, execution=Execution(recompute=recompute))
    ((batch, _),) = trainer.steps[0].passes
    trainer.train_step()  # what is made once is made
    found = held_after_forward(trainer, batch)
    assert found == pytest.approx(kept_bytes(config.model, batch.layout, recompute, torch.float32), rel=0.1)


def test_training_state(tmp_path):
    trainer = Trainer(small(), tmp_path)
    data = trainer.steps[0]
    trainer.train_step()
    trainer._backward(data.passes, 1.0)
    states = [x for values in trainer.optimizer.state.values() for x in values.values() if x.ndim]
    gradients = [w.grad for w in trainer.trained.values() if w.grad is not None]
    found = sum(x.nbytes for x in [*trainer.trained.values(), *trainer.averages.values(), *states, *gradients])
    assert found == pytest.approx(STATE * trainer.model.parameter_count(), rel=0.1)


def test_a_mesh_shares_out_what_it_should():
    def held(**options):
        return per_process("lct_3b", NINE, Mesh(**options))

    alone, eight, paper = held(), held(processes=8), held(processes=128, replicate=8, context=2)
    parameters = 2.988e9
    assert alone["state"] == pytest.approx(20 * parameters, rel=1e-3) and not any(alone[key] for key in SENT)
    assert eight["state"] == pytest.approx(alone["state"] / 8)
    assert eight["reducing"] == pytest.approx(4 * parameters * 7 / 8, rel=1e-3)
    assert eight["gathering"] == pytest.approx(2 * 2 * parameters * 7 / 8, rel=1e-3)
    assert paper["state"] == pytest.approx(alone["state"] / 16) and paper["kept"] == pytest.approx(alone["kept"] / 2)
    c = lct_3b()
    once = c.blocks * NINE.rows / 2 * 4 * c.heads * c.head_dim * 2 / 2  # half of q, k, v and the result go over
    assert paper["exchanging"] == pytest.approx(3 * once, rel=1e-3)
    kept = held(processes=8, gather_again=False)
    assert kept["gathered"] == pytest.approx(2 * parameters, rel=1e-3)
    assert kept["gathering"] == pytest.approx(eight["gathering"] / 2)
    by_mode = [sum(held(processes=8, recompute=mode)[key] for key in HELD) for mode in ("none", "attention", "all")]
    assert by_mode == sorted(by_mode, reverse=True)
    assert not alone["gradients"] and eight["gradients"] == pytest.approx(4 * parameters / c.blocks, rel=1e-3)
    assert kept["gradients"] == pytest.approx(4 * parameters, rel=1e-3)
    every, again = (held(processes=8, recompute=mode) for mode in ("none", "all"))
    assert again["block"] == pytest.approx(every["kept"] / c.blocks) and not every["block"]
    low = per_process("lct_3b", NINE, Mesh(8), lora=64)
    trained = estimate("lct_3b", NINE, 64)["trained"]
    assert low["state"] == pytest.approx((STATE * trained + 2 * parameters) / 8, rel=1e-3)
    assert low["reducing"] == pytest.approx(4 * trained * 7 / 8)


def test_the_worst_hundredth_of_steps():
    steps = [1.0] * 196 + [1.5, 1.1, 1.2, 1.3]
    assert _uneven(steps) == f"{np.mean(steps):.4f} on average, 1.3000 to 1.5000 in the worst 1 % of steps"
    assert _uneven([1.25]).startswith("1.2500 on average, 1.2500 to 1.2500")


def test_what_no_mesh_can_be_is_refused():
    with pytest.raises(ValueError, match="processes: expected a multiple of 6, got 8"):
        Mesh(8, replicate=2, context=3)
    with pytest.raises(ValueError, match="recompute: expected one of"):
        Mesh(8, recompute="some")


@pytest.mark.parametrize(("name", "part"), [("wan_5b", 0.507), ("hunyuan15", 0.667), ("hunyuan", 0.638)])
def test_what_weights_take_where_products_are_kept_in_half_precision(name, part):
    """Wan has one modulation for all blocks, HunyuanVideo one in each."""
    e = estimate(name, NINE)
    assert e["half weights"] / e["weights"] == pytest.approx(part, abs=1e-3)


def test_who_holds_whole_weights_at_the_start_is_told(capsys):
    for mesh, lora, said in ((Mesh(), 0, None), (Mesh(8), 0, "GiB in fp32 in CPU"), (Mesh(8), 8, "GiB in bf16 in CPU")):
        print_estimate("hunyuan15", NINE, 400, lora, mesh)
        found = capsys.readouterr().out
        assert ("at the start" in found) == (said is not None) and (said or "") in found
