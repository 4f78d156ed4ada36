"""What would cost a run is refused before its first step: numbers without sense, other models, folders of no use."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from processes import small
from test_reliability import of_folder, scenes

from lct.cli import main
from lct.data.scenefile import read_scene, write_scene
from lct.model.lora import add_lora, merge_lora
from lct.train.trainer import Trainer
from lct.train.weights import load_model, load_weights, save_weights


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_end": -1.0}, {"lr_end": float("nan")}, {"time_mean": float("nan")}, {"shift_rows": -4}, {"warmup": -5},
        {"seed": -1}, {"seed": 2**64}, {"betas": (0.9, 1.0)}, {"weight_decay": -0.1}, {"text_scale": -1.0},
        {"text_scale_start": -1.0, "text_scale_steps": 5}, {"compute_dtype": "float64"},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_without_sense_are_refused_by_their_names(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}: expected"):
        small(**changes)


@pytest.mark.parametrize("changes", [{"shots": 1}, {"single": float("nan")}, {"cut": -0.1}], ids=str)
def test_mixtures_without_sense_are_refused(changes):
    with pytest.raises(ValueError, match=r"data(\.shots)?: expected"):
        small(data=replace(small().data, **changes))


def test_changes_beside_weights_of_another_model_are_refused(tmp_path):
    """The model was that of the weights, its configuration another, and nothing could read the run."""
    Trainer(small(steps=1), tmp_path / "base").run()
    lora = small(steps=1, init=str(tmp_path / "base"), lora=2)
    Trainer(lora, tmp_path / "lora").run()
    wide = replace(lora.model, mlp_width=128)
    for config in (replace(lora, model=wide), replace(lora, init=str(tmp_path / "lora"), lora=0, model=wide)):
        with pytest.raises(ValueError, match=r"model\.mlp_width: expected 64, what the weights of .* have, got 128"):
            Trainer(config, tmp_path / "other")
    Trainer(replace(lora, init=str(tmp_path / "lora"), lora=0), tmp_path / "whole").run()
    load_model(tmp_path / "whole")


def test_a_folder_that_cannot_be_written_to_is_told_before_the_first_step(tmp_path):
    (tmp_path / "file").touch()
    trainer = Trainer(small(steps=1), tmp_path / "file")
    with pytest.raises(OSError):
        trainer.run()
    assert trainer.step == 0
    trainer = Trainer(small(steps=1), tmp_path / "run")
    trainer.run()
    assert not list((tmp_path / "run").glob(".*"))


def test_shared_weights_that_cannot_be_written_are_told_before_the_first_step(tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "folder.safetensors").mkdir()
    for share in (tmp_path / "file" / "a.safetensors", tmp_path / "folder.safetensors"):
        assert (
            main(["train", "tiny_lct", "--steps=1", "--init=None", f"--out={tmp_path / 'run'}", f"--share={share}"])
            == 2
        )
        assert "share: expected a file that can be written" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_weights_beyond_half_precision_are_not_shared(tmp_path):
    config = small()
    with pytest.raises(ValueError, match=r"weight b has values beyond what torch\.float16 holds"):
        save_weights(tmp_path / "a.safetensors", {"a": torch.ones(2), "b": torch.tensor([1.0, 7e4])}, config)
    assert not list(tmp_path.iterdir())
    save_weights(tmp_path / "a.safetensors", {"b": torch.tensor([7e4])}, config, torch.bfloat16)
    assert load_weights(tmp_path / "a.safetensors")[0]["b"].isfinite()


def test_latents_of_other_channels_are_named_before_the_first_step(tmp_path):
    root = scenes(tmp_path / "scenes")
    path = sorted(root.iterdir())[2]
    scene = read_scene(path)
    media = {f"m{s}.video": np.zeros((2, 8, 8, 5), np.float32) for s in range(3)}
    path.rename(tmp_path / "old")
    write_scene(path, scene, media)
    with pytest.raises(
        ValueError, match=rf"{path.name}: shot 1: expected latents of 3 channels, as the model has, got 5"
    ):
        Trainer(of_folder(root), tmp_path / "run")


def test_a_budget_of_rows_leaves_the_shares_as_they_are(tmp_path):
    """To leave out what does not fit left out long scenes."""
    data = replace(small().data, single=0.2, cut=0.8, no_cut=0.0)
    counts = {}
    for name, config in {"rows": small(batch_rows=300, data=data), "scenes": small(scenes=3, data=data)}.items():
        steps = Trainer(config, tmp_path / name).steps
        drawn = [scene for step in range(300) for scene in steps.draw(step)[0]]
        counts[name] = np.array([len(scene.sample.shots) for scene in drawn])
    for of in (lambda shots: shots == 1, lambda shots: shots):
        a, b = (of(counts[name]).astype(float) for name in ("rows", "scenes"))
        assert abs(a.mean() - b.mean()) < 4 * np.hypot(a.std() / len(a) ** 0.5, b.std() / len(b) ** 0.5)


def test_a_small_change_is_merged_whole_where_fp32_is_asked_for(tmp_path):
    """In bf16 the rounding of the weights was a third of what had been learnt."""
    torch.manual_seed(0)
    Trainer(small(steps=1), tmp_path / "base").run()
    base, _ = load_model(tmp_path / "base", dtype="bfloat16")
    layer = base.get_submodule(add_lora(base, 2)[0])
    with torch.no_grad():
        layer.up.fill_(1e-4)
    whole = layer.weight.float() + layer.up @ layer.down
    rounded = layer.weight.clone()
    merge_lora(base, torch.float32)
    assert torch.equal(layer.weight, whole) and not torch.equal(whole.to(rounded.dtype).float(), whole)
