"""diffusers' folders that are not what they should be: each is refused by the name of the file and the weight."""

import json
import shutil

import pytest
import torch
from open_models import TINY, ours
from safetensors.torch import load_file, save_file

from lct.pretrained import files
from lct.pretrained.configs import CLASS, of_diffusers, to_diffusers


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A sharded folder that is whole."""
    return files.save(ours("wan"), tmp_path_factory.mktemp("good") / "wan", 60_000)


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "wan")


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return tensors


def index(folder, change):
    content = json.loads((folder / files.INDEX).read_text())
    change(content["weight_map"])
    (folder / files.INDEX).write_text(json.dumps(content))


def config(folder, **changes):
    content = json.loads((folder / files.CONFIG).read_text()) | changes
    (folder / files.CONFIG).write_text(json.dumps(content))


def test_a_whole_folder_is_loaded_also_as_a_pipelines_part(folder, tmp_path):
    assert len(shards(folder)) > 2 and files.is_diffusers(folder)
    folder.rename(tmp_path / "transformer")
    for where in (tmp_path, tmp_path / "transformer"):
        model = files.load(where, dtype=torch.float32)
        assert model.video_out.weight.dtype == torch.float32 and not model.video_out.weight.requires_grad
        assert files.is_diffusers(where)
    assert not files.is_diffusers(tmp_path / "nothing")


def test_a_missing_weight(folder):
    file = shards(folder)[0]
    name = sorted(load_file(file))[0]
    rewrite(file, lambda x: x.pop(name))
    index(folder, lambda x: x.pop(name))
    with pytest.raises(ValueError, match=f"wan: {name}: missing"):
        files.load(folder)


def test_an_unknown_weight(folder):
    rewrite(shards(folder)[1], lambda x: x.update(surprise=torch.zeros(1)))
    index(folder, lambda x: x.update(surprise=shards(folder)[1].name))
    with pytest.raises(ValueError, match="wan: surprise: unknown"):
        files.load(folder)


def test_shards_that_the_index_does_not_describe(folder):
    rewrite(shards(folder)[1], lambda x: x.update(surprise=torch.zeros(1)))
    with pytest.raises(ValueError, match=rf"{shards(folder)[1].name}: surprise: .*index\.json says otherwise"):
        files.load(folder)


@pytest.mark.parametrize("name", ["blocks.0.attn1.to_k.weight", "patch_embedding.weight", "scale_shift_table"])
def test_a_wrong_shape(name, folder):
    file = next(file for file in shards(folder) if name in load_file(file))
    rewrite(file, lambda x: x.update({name: x[name][..., :-1].contiguous()}))
    with pytest.raises(ValueError, match=rf"{file.name}: .*{name}.*shapes"):
        files.load(folder)


def test_a_truncated_and_a_missing_shard(folder):
    file = shards(folder)[1]
    whole = file.read_bytes()
    for part in (whole[:-1], whole[:100], b""):
        file.write_bytes(part)
        with pytest.raises(ValueError, match=f"{file.name}: damaged or cut off"):
            files.load(folder)
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name}: no such file, though"):
        files.load(folder)


def test_a_pickle_is_not_opened(folder):
    for file in (*shards(folder), folder / files.INDEX):
        file.unlink()
    torch.save({}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin: a pickle"):
        files.load(folder)
    (folder / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="is it the transformer's folder"):
        files.load(folder)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/elsewhere/x.safetensors", "weights.bin"])
def test_an_index_that_points_elsewhere(name, folder):
    index(folder, lambda x: x.update({sorted(x)[0]: name}))
    with pytest.raises(ValueError, match=r"index\.json: expected names of \.safetensors files beside it"):
        files.load(folder)


def test_damaged_json(folder):
    (folder / files.INDEX).write_text("{")
    with pytest.raises(ValueError, match=r"index\.json: damaged"):
        files.load(folder)
    (folder / files.INDEX).write_text("[]")
    with pytest.raises(ValueError, match="expected a weight_map"):
        files.load(folder)
    (folder / files.CONFIG).write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON object"):
        files.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({CLASS: "FluxTransformer2DModel"}, "expected one of HunyuanVideoTransformer3DModel"),
        ({"depth": 3}, "got depth as well"),
        ({"image_dim": 1280}, "image_dim: expected None"),
        ({"qk_norm": None}, "qk_norm: expected 'rms_norm_across_heads'"),
        ({"in_channels": 36}, "in_channels: expected out_channels 4"),
        ({"num_layers": 0}, "every size"),
    ],
)
def test_a_configuration_without_a_model_here(changes, message, folder):
    config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        files.load(folder)


@pytest.mark.parametrize("name", TINY)
def test_configurations_go_through_unchanged(name):
    kind, options = TINY[name]
    given = {CLASS: kind, "_diffusers_version": "0.42.1"} | json.loads(json.dumps(options))
    again = to_diffusers(of_diffusers(given))
    assert {key: again[key] for key in given} == given
    assert of_diffusers(again) == of_diffusers(again | given)


def test_a_model_with_low_rank_changes_or_of_this_project_is_not_saved(tmp_path):
    from lct.model.lora import add_lora

    model = ours("wan")
    add_lora(model, 2)
    with pytest.raises(ValueError, match="merge LoRA first"):
        files.save(model, tmp_path / "out")
    from test_model import random_model

    with pytest.raises(ValueError, match="family: expected hunyuan or wan"):
        files.save(random_model(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
