"""The command line: quick to start, right in what it prints, and one line, exit code 2 and no files for bad input."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from lct import MMDiT, SceneLayout, Shot
from lct.cli import COMMANDS, main
from lct.data.scenefile import read_scene
from lct.data.video import read_video, write_video
from lct.kernels.select import ATTENTION
from lct.layout import parse_layout
from lct.model.config import preset
from lct.model.families import build
from lct.train.runs import RUNS, run
from lct.train.weights import load_model, save_weights

ROOT = Path(__file__).parents[1]
NAMES = tuple(COMMANDS)
SMALL = [
    "--steps=2", "--scenes=2", "--init=None", "--model.blocks=1", "--model.width=32", "--model.heads=1",
    "--model.kv-heads=1", "--model.mlp-width=64",
]  # fmt: skip


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def code_of(arguments) -> int:
    """Exit code of a command line, run in this process."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


@pytest.fixture
def lct(capsys, monkeypatch):
    """Run a command that has to work; gives what it printed."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments) -> str:
        capsys.readouterr()
        assert code_of(arguments) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Run a command that has to be refused before any work, writing nothing; gives its one line on stderr."""
    monkeypatch.chdir(tmp_path)  # where default names of outputs lie
    monkeypatch.setattr("lct.sample.files.autoregressive", lambda *_: pytest.fail("shots were generated first"))

    def call(*arguments) -> str:
        before = files(tmp_path)
        capsys.readouterr()
        assert code_of(arguments) == 2
        written = capsys.readouterr()
        assert written.err.startswith("lct: error: ") and written.err.count("\n") == 1 and written.err.endswith("\n")
        assert "Traceback" not in written.err + written.out
        assert files(tmp_path) == before
        return written.err

    return call


def child(*arguments: str) -> subprocess.CompletedProcess:
    code = "import sys; from lct.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)


# -- help --------------------------------------------------------------------------------------------------------------


def test_help_takes_at_most_half_a_second_of_processor_time():
    def seconds() -> float:
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        return spent.ru_utime + spent.ru_stime

    times = []
    for _ in range(5):
        before = seconds()
        done = child("--help")
        times.append(seconds() - before)
        assert done.returncode == 0 and all(f"• {name} " in done.stdout for name in NAMES)
    assert min(times) <= 0.5


@pytest.mark.parametrize("words", [[name] for name in NAMES] + [["train", name] for name in RUNS], ids=" ".join)
def test_every_command_and_run_has_help(lct, words):
    assert lct(*words, "--help").startswith(f"usage: lct {' '.join(words)} ")


def test_train_alone_lists_the_runs(lct):
    assert [line.split()[0] for line in lct("train").splitlines() if line.startswith("  ")] == list(RUNS)


# -- mask, estimate, doctor --------------------------------------------------------------------------------------------


def test_words_become_the_layout_they_say():
    scenes = [[Shot(12, (1, 1, 1), "global"), Shot(9, (3, 8, 6))], [Shot(4, (1, 2, 2))]]
    assert parse_layout(("global:12", "9:3x8x6", "/", "4:1x2x2"), "isolated") == SceneLayout(scenes, "isolated")


@pytest.mark.parametrize("visibility", ["context_causal", "bidirectional", "isolated"])
def test_mask_writes_two_pictures_that_open(lct, tmp_path, visibility):
    out = tmp_path / "new" / "mask.png"
    printed = lct("mask", "global:5", "4:2x4x4", "3:1x4x4", "--visibility", visibility, "--out", out)
    pictures = [out, out.with_name("mask-positions.png")]
    assert printed.split() == [str(picture) for picture in pictures]
    assert files(out.parent) == {picture.name for picture in pictures}
    for picture in pictures:
        with Image.open(picture) as opened:
            assert len(opened.convert("RGB").getcolors(1 << 20)) > 3


def test_masks_of_two_visibilities_differ(lct, tmp_path):
    for visibility in ("context_causal", "bidirectional"):
        lct("mask", "4:2x4x4", "3:1x4x4", "--visibility", visibility, "--out", tmp_path / f"{visibility}.png")
    assert (tmp_path / "context_causal.png").read_bytes() != (tmp_path / "bidirectional.png").read_bytes()


def amount(text: str) -> float:
    """The first number of a printed amount, with its unit."""
    number, unit = re.match(r"([\d.,e+-]+) ?(\w*)", text).groups()
    units = {"B": 1e9, "TFLOP": 1e12, "PFLOP": 1e15, "MiB": 2**20, "GiB": 2**30}
    return float(number.replace(",", "")) * units.get(unit, 1)


@pytest.mark.parametrize("name", ["tiny", "lct_3b", "hunyuan15", "wan_5b"])
def test_estimate_prints_what_the_model_counts(lct, name):
    words = ("global:7", "9:3x8x8", "4:1x8x8", "/", "5:2x4x4")
    lines = [line.strip("│ \n").split("│") for line in lct("estimate", *words, "--preset", name).splitlines()]
    printed = {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}
    config, layout = preset(name), parse_layout(words, "context_causal")
    with torch.device("meta"):
        model = build(config)
    parameters = sum(weight.numel() for weight in model.parameters())
    kept = rows = (7 + 1) + (9 + 192) + (4 + 64) + (5 + 32)
    pairs = 8 * 8 + 201 * (8 + 201) + 68 * (8 + 201 + 68) + 37 * 37
    if name == "wan_5b":  # the global prompt stands before each shot's text, and rows that attend are video alone
        layout = parse_layout(("16:3x8x8", "11:1x8x8", "/", "5:2x4x4"), "context_causal")
        rows, kept, pairs = 16 + 192 + 11 + 64 + 5 + 32, 192 + 64 + 32, 192 * 192 + 64 * (192 + 64) + 32 * 32
    keys_and_values = 2 * 2 * config.blocks * kept * config.kv_heads * config.head_dim
    assert amount(printed["parameters"]) == pytest.approx(parameters, abs=0.5e6)
    assert amount(printed["rows"]) == rows
    assert amount(printed["visible pairs"]) == pairs
    assert amount(printed["forward"]) == pytest.approx(model.flops(layout), rel=0.01)
    assert amount(printed["training step"]) == pytest.approx(model.training_flops(layout), rel=0.01)
    assert amount(printed["keys and values"]) == pytest.approx(keys_and_values, rel=0.01)
    assert amount(printed["weights"]) == pytest.approx(4 * parameters, rel=0.01)
    assert amount(printed["training state"]) == pytest.approx(20 * parameters, rel=0.01)


def test_estimate_says_what_tuning_takes(lct):
    words = ("256:21x30x30", "256:21x30x30", "--preset", "hunyuan15")
    whole, low = (lct("estimate", *words, *more) for more in ((), ("--lora", "64")))
    assert "1 × H200, 141 GB: no, 8 × H800, 80 GB: yes" in whole and "1 × H200, 141 GB: yes" in low
    trained = re.search(r"rank 64, ([0-9.]+) M parameters", low)
    # qkv and out of both streams of 54 blocks, and of the refiner's none
    assert float(trained[1]) == pytest.approx(54 * 2 * 64 * (2048 + 3 * 2048 + 2 * 2048) / 1e6, rel=1e-3)


def test_doctor_names_every_implementation_and_the_one_that_is_taken(lct):
    lines = lct("doctor").splitlines()
    for name in ATTENTION:
        assert any(re.search(rf"│ {name} +│", line) for line in lines)
    assert sum("auto takes it" in line for line in lines) >= 1


# -- train -------------------------------------------------------------------------------------------------------------


def test_train_trains_then_resumes_and_shares_weights_that_load(lct, tmp_path):
    out, share = tmp_path / "run", tmp_path / "shared.safetensors"
    checkpoint = out / "step-0000002"
    lct("train", "tiny_lct", *SMALL, "--out", out)
    assert checkpoint.is_dir() and len((out / "log.jsonl").read_text().splitlines()) == 2

    def state():
        return {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in checkpoint.rglob("*") if f.is_file()}

    before = state()
    printed = lct("train", "tiny_lct", *SMALL, "--out", out, "--share", share)
    assert printed.splitlines() == [f"resuming {out} at step 2", str(checkpoint), str(share)]
    assert state() == before and (out / "latest").resolve() == checkpoint.resolve()
    assert len((out / "log.jsonl").read_text().splitlines()) == 2
    assert {path.name for path in out.iterdir()} == {"log.jsonl", "latest", checkpoint.name}
    assert {path.name for path in checkpoint.iterdir()} == {"manifest.json", "config.json", "model", "ema", "optimizer"}

    shared, config = load_model(share)
    assert config.name == "tiny_lct" and config.model.blocks == 1 and config.steps == 2
    for (key, weight), own in zip(shared.state_dict().items(), load_model(out)[0].state_dict().values(), strict=True):
        torch.testing.assert_close(weight, own, rtol=1e-3, atol=1e-4, msg=key)


def test_a_run_goes_to_its_folder_under_runs(lct, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lct("train", "tiny_lct", *SMALL)
    assert (tmp_path / "runs" / "tiny_lct" / "step-0000002").is_dir()


def test_another_configuration_does_not_resume(lct, refused, tmp_path):
    lct("train", "tiny_lct", *SMALL, "--out", tmp_path / "run")
    line = refused("train", "tiny_lct", *SMALL, "--lr=0.5", "--out", tmp_path / "run")
    assert "lr=0.002, now lr=0.5" in line and "another folder" in line


# -- sample ------------------------------------------------------------------------------------------------------------

GIVEN = '[[shot]]\nprompt = "close-up of Character 1"\ncut = true\nmedia = "photo"\n'
NEW = '[[shot]]\nprompt = "Character 1 walks away"\ncut = true\nsize = [3, 12, 8]\nseed = 7\n'
GLOBAL = '[global]\nstory = "a farewell"\n[global.characters]\n1 = "a sailor"\n'


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A tiny model with random weights, none of them zero."""
    torch.manual_seed(0)
    config = run("tiny_causal")
    model = MMDiT(config.model)
    noise = {name: 0.05 * torch.randn_like(weight) for name, weight in model.state_dict().items()}
    file = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(file, noise, config)
    return file


@pytest.fixture
def scene(tmp_path):
    """Write scene.toml by hand, and the given latents beside it."""

    def write(text: str) -> Path:
        folder = tmp_path / "written"
        folder.mkdir()
        (folder / "scene.toml").write_text(text)
        photo = np.random.default_rng(1).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
        save_file({"photo.video": photo}, folder / "latents.safetensors")
        return folder

    return write


@pytest.mark.parametrize("mode", ["auto-regressive", "joint"])
def test_sample_makes_the_missing_shots_and_keeps_the_given_one(lct, scene, weights, tmp_path, mode):
    folder, out = scene(f'fps = 6.0\ncodec = "pixel/2"\n{GLOBAL}{GIVEN}{NEW}'), tmp_path / "out"
    assert lct("sample", folder, "--weights", weights, "--out", out, "--steps=2", "--mode", mode).strip() == str(out)
    assert {path.name for path in out.iterdir()} == {"scene", "shot-0.mp4", "shot-1.mp4", "contact-sheet.png"}
    done, latents = read_scene(out / "scene"), load_file(out / "scene" / "latents.safetensors")
    assert [(shot.media, shot.size, shot.seed) for shot in done.shots] == [
        ("shot-0", (2, 8, 8), 0),
        ("shot-1", (3, 12, 8), 7),
    ]
    assert latents["shot-0.video"].tobytes() == load_file(folder / "latents.safetensors")["photo.video"].tobytes()
    assert latents["shot-1.video"].shape == (3, 12, 8, 3) and np.isfinite(latents["shot-1.video"]).all()
    assert [read_video(out / f"shot-{i}.mp4").frames.shape for i in (0, 1)] == [(2, 16, 16, 3), (3, 24, 16, 3)]
    with Image.open(out / "contact-sheet.png") as sheet:
        sheet.load()


def test_sample_reads_the_file_or_its_folder_and_writes_beside_it(lct, scene, weights, tmp_path):
    folder = scene(GIVEN + NEW)
    for path in (folder, folder / "scene.toml"):
        out = tmp_path / "written-sample"
        assert lct("sample", path, "--weights", weights, "--steps=1").strip() == str(out)
        out.rename(tmp_path / f"moved-{path.name}")
    first, second = (
        load_file(tmp_path / f"moved-{name}/scene/latents.safetensors") for name in ("written", "scene.toml")
    )
    assert all(first[key].tobytes() == second[key].tobytes() for key in first)


def test_what_sample_made_can_be_given_for_a_further_shot(lct, scene, weights, tmp_path):
    lct("sample", scene(GIVEN + NEW), "--weights", weights, "--steps=1", "--out", tmp_path / "first")
    made = tmp_path / "first" / "scene"
    with (made / "scene.toml").open("a") as file:
        file.write(NEW)
    lct("sample", made, "--weights", weights, "--steps=1", "--out", tmp_path / "second")
    before, after = (load_file(tmp_path / name / "scene" / "latents.safetensors") for name in ("first", "second"))
    assert set(after) - set(before) == {"shot-2.video"}
    assert all(after[key].tobytes() == before[key].tobytes() for key in before)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "tiny_nothing"], ["run: expected one of", "tiny_lct", "'tiny_nothing'"]),
        (["train", "tiny_lct", "--init=gone.safetensors"], ["gone.safetensors", "no such file", "name a"]),
        (["train", "tiny_lct"], ["runs/tiny_text_rope", "no checkpoint", "`lct train`"]),
        (["train", "tiny_lct", "--steps=0"], ["steps", "at least 1", "got 0"]),
        (["train", "film", "--data.source=nowhere"], ["nowhere", "scene.toml", "lct ingest"]),
        (
            ["estimate", "4:1x1x1", "--preset=huge"],
            ["preset: expected one of ('tiny', 'micro', 'lct_3b', ", "got 'huge'"],
        ),
        (["estimate", "4:1x1x1", "--tflops=0"], ["tflops", "above 0", "got 0"]),
        (["estimate", "four"], ["TEXT:TxHxW, for example 9:3x8x8", "'four'"]),
        (["mask", "3:-1x2x2"], ["TEXT:TxHxW, for example 9:3x8x8", "'3:-1x2x2'", "at least 0", "got -1"]),
        (["mask", "3:1.5x2x2"], ["TEXT:TxHxW, for example 9:3x8x8", "'3:1.5x2x2'"]),
        (["mask", "3:2x2"], ["TEXT:TxHxW, for example 9:3x8x8", "'3:2x2'"]),
        (["mask", "3:1x2x2", "global:4"], ["scene 0", "the global prompt must be shot 0", "got it as shot 1"]),
        (["mask", "/"], ["scene 0 is empty", "give it at least one Shot"]),
        (["mask", "3:1x2x2", "/"], ["scene 1 is empty", "give it at least one Shot"]),
        (["mask", "3:1x2x2", "--out=m"], ["out: expected a picture such as mask.png", "got m"]),
        (["estimate", "3:1x2x2", "--tflops=nan"], ["tflops: expected a rate above 0", "got nan"]),
        (["train", "tiny_lct", "--share=w.bin"], ["share: expected a name that ends in .safetensors", "w.bin"]),
        (["train", "tiny_lct", "--compute-dtype=float8"], ["compute_dtype: expected float32 or bfloat16", "float8"]),
        (["train", "tiny_lct", "--lr=nan"], ["lr: expected a positive number", "got nan"]),
        (["train", "tiny_lct", "--init=None", "--device=warp"], ["device: expected one of", "warp"]),
        (["train", "tiny_lct", "--init=None", "--impl=nope"], ["impl: expected 'auto' or one of", "nope"]),
        (["mask", "3:1x2x2", "--text-scale=nan"], ["text_scale", "finite", "got nan"]),
        (["ingest", "gone.mp4"], ["gone.mp4", "expected a video file, found nothing"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0] in NAMES else "",
)
def test_bad_arguments_are_refused(refused, arguments, said):
    line = refused(*arguments)
    assert all(part in line for part in said), line


def film(path: Path) -> Path:
    frames = np.random.default_rng(0).integers(0, 255, (30, 32, 48, 3), dtype=np.uint8)
    write_video(path, frames, 10.0)
    return path


def test_a_truncated_video_is_refused(refused, tmp_path):
    whole = film(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    line = refused("ingest", tmp_path / "cut.mp4", "--side=32")
    assert "cut.mp4" in line and "truncated" in line and "fetch" in line


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [("text.mp4", "not a film", "convert it"), ("empty.mp4", "", "fetch it again"), ("film.txt", "a", "convert it to")],
)
def test_what_is_no_video_is_refused(refused, tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    line = refused("ingest", tmp_path / name)
    assert name in line and said in line


def test_ingest_wants_a_new_folder_and_a_rate_the_film_has(refused, tmp_path):
    path = film(tmp_path / "film.mp4")
    assert "expected at most the film's 10 frames" in refused("ingest", path, "--fps=11", "--side=32")
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "mine").touch()
    assert "scenes: expected a folder that does not exist or is empty; remove it" in refused("ingest", path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GIVEN + NEW.replace("12, 8", "10, 8"), ["shot 2", "the patch (1, 4, 4) divides", "(3, 10, 8)"]),
        (GIVEN + NEW.replace("size = [3, 12, 8]\n", ""), ["shot 2", "neither size nor media", "give it size ="]),
        (GIVEN, ["every shot has media", "add a [[shot]] without media"]),
        (GIVEN.replace("photo", "film") + NEW, ["film.video", "add it or remove media"]),
        ("fps = 6.0\n", ["expected 1 to 1000 shots, got 0", "add a [[shot]]"]),
        ("[[shot]\n", ["expected TOML", "mend the file"]),
        (GIVEN + NEW + "sise = 3\n", ["sise", "seed"]),
        ('codec = "vae/1"\n' + GIVEN + NEW, ["codec: expected pixel/STRIDE", "vae/1"]),
    ],
    ids=["uneven", "no-size", "all-given", "no-media", "no-shots", "no-toml", "unknown-key", "codec"],
)
def test_a_scene_that_cannot_be_made_is_refused(refused, scene, weights, text, said, monkeypatch):
    """Before weights are read, and before a run that would sample it begins."""
    monkeypatch.setattr("lct.train.weights.load_model", lambda *_: pytest.fail("weights were read first"))
    folder = scene(text)
    run = ["train", "tiny_lct", *SMALL, "--sample-every=1", "--scene"]
    for line in (refused("sample", folder, "--weights", weights, "--steps=1"), refused(*run, folder)):
        assert all(part in line for part in said), line


def test_sample_wants_a_scene_a_new_folder_and_weights(refused, scene, weights, tmp_path):
    folder = scene(GIVEN + NEW)
    line = refused("sample", tmp_path / "gone", "--weights", weights)
    assert "gone: expected a scene file, found nothing; give the folder that holds scene.toml" in line
    assert "expected a folder that does not exist or is empty" in refused(
        "sample", folder, "--weights", weights, "--out", folder
    )
    line = refused("sample", folder, "--weights", tmp_path / "gone")
    assert "gone: no checkpoint there; train one" in line
    line = refused("sample", folder, "--weights", folder / "latents.safetensors")
    assert "latents.safetensors: not a weights file" in line
    for option, said in (
        ("--steps=0", "steps: expected at least 1, got 0"),
        ("--fps=0", "fps: expected a positive number"),
        ("--guidance=nan", "guidance: expected a finite number"),
        ("--device=tpu", "error: device: expected one of ['cpu'"),
        ("--memory.device=tpu", "error: memory.device: expected one of ['cpu'"),
    ):
        assert said in refused("sample", folder, "--weights", weights, option)


@pytest.mark.parametrize("asked", [None, "bfloat16"])
def test_products_are_sampled_from_weights_in_the_asked_dtype(scene, weights, tmp_path, monkeypatch, lct, asked):
    """Nothing in the result tells: it is the same bit for bit."""
    seen = []

    def spy(model, *_):
        seen.append({weight.dtype for weight in model.parameters()})
        raise ValueError("far enough")

    monkeypatch.setattr("lct.sample.files.autoregressive", spy)
    options = [] if asked is None else ["--dtype", asked]
    assert code_of(["sample", scene(GIVEN + NEW), "--weights", weights, "--out", tmp_path / "new", *options]) == 2
    assert seen == [{torch.float32} if asked is None else {torch.float32, torch.bfloat16}]


@pytest.mark.parametrize("command", ["sample", "direct"])
def test_a_dtype_that_is_none_is_said_before_anything_is_read(command, capsys, tmp_path):
    for wrong in ("bf16", "nn"):
        assert code_of([command, tmp_path / "gone", "--weights", tmp_path / "gone", f"--dtype={wrong}"]) == 2
        said = capsys.readouterr().err
        assert (
            f"invalid choice '{wrong}' for argument '--dtype'" in said and "'bfloat16'" in said and "gone" not in said
        )


def test_a_disk_that_fails_while_sampling_leaves_nothing(scene, weights, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("lct.sample.files.write_scene", full)
    folder = scene(GIVEN + NEW)
    before = files(tmp_path)
    assert code_of(["sample", folder, "--weights", weights, "--steps=1"]) == 2
    assert capsys.readouterr().err == "lct: error: No space left on device\n" and files(tmp_path) == before


def test_a_failure_while_decoding_leaves_the_latents(lct, scene, weights, tmp_path, monkeypatch, capsys):
    folder, out, whole = scene(GIVEN + NEW), tmp_path / "made", tmp_path / "whole"
    command = ["sample", folder, "--weights", weights, "--steps=1", "--out"]
    lct(*command, whole)
    with monkeypatch.context() as patched:

        def full(*_, **__):
            raise OSError("No space left on device")

        patched.setattr("lct.sample.files.write_video", full)
        assert code_of([*command, out]) == 2
    line = capsys.readouterr().err
    assert line.startswith("lct: error: No space left on device; the latents are in ")
    assert f"lct decode {out / 'scene'} --out {out}" in line
    lct("decode", out / "scene", "--out", out)
    assert files(out) == files(whole)
    films = [path for path in files(out) if path.endswith((".mp4", ".safetensors"))]
    assert len(films) == 3 and all((out / path).read_bytes() == (whole / path).read_bytes() for path in films)


@pytest.mark.parametrize("name", ["ema", "config.json", "optimizer"])
def test_a_damaged_checkpoint_is_refused(lct, refused, scene, tmp_path, name):
    lct("train", "tiny_lct", *SMALL, "--out", tmp_path / "run")
    folder = tmp_path / "run" / "step-0000002"
    file = next((folder / name).iterdir()) if (folder / name).is_dir() else folder / name
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    if name == "optimizer":  # of which sampling reads nothing
        line = refused("train", "tiny_lct", *SMALL, "--out", tmp_path / "run")
    else:
        line = refused("sample", scene(GIVEN + NEW), "--weights", tmp_path / "run")
    assert f"{file.name}: damaged" in line and "use another checkpoint" in line


@pytest.mark.parametrize(
    "arguments",
    [["--nonsense"], ["mask", "3:1x2x2", "--nonsense=1"], ["train", "tiny_lct", "--nonsense=1"], ["nonsense"], []],
    ids=lambda words: " ".join(words) or "nothing",
)
def test_what_the_parser_does_not_know_exits_with_2(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert code_of(arguments) == 2
    written = capsys.readouterr()
    assert "Traceback" not in written.err and not files(tmp_path)
    assert not arguments or "nonsense" in written.err


def test_the_exit_code_and_the_line_leave_the_process():
    done = child("mask", "3:2x2")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("lct: error: shots: expected") and done.stderr.count("\n") == 1
