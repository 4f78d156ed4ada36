"""The command line, `lct demo`, `train`, `sample`, `direct` and the others; it starts without torch.

What a user can mend is a ValueError, OSError or ImportError; `main` prints it in one line and exits with 2.
"""

from __future__ import annotations

import os
import runpy
import shlex
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lct.model.config import ComputeDtype, Memory
from lct.train.runs import RUNS, run
from lct.tune import TrainCommand, advise


def demo(out: Path = Path("demo"), scenes: int = 64, resume: bool = False, check: bool = False) -> int:
    """Tune a tiny model in the paper's stages, let it direct multi-shot scenes, and show them on one page.

    Args:
        out: Folder of the page, pictures, film, metrics and checkpoints.
        scenes: Held-out scenes to measure on.
        resume: Go on with the stages found in the folder instead of training them anew.
        check: Exit with 1 where a target is missed.
    """
    from lct.demo import run_demo

    return run_demo(out, scenes, resume, check)


AS_IT_IS = Memory()


def train(run: tyro.conf.Positional[str]) -> None:
    """Train a run, or resume it. `lct train` lists the runs, `lct train RUN --help` every option."""


def _train(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: lct train RUN [options]\n")
        for name, function in RUNS.items():
            print(f"  {name:22s}{(function.__doc__ or '').splitlines()[0]}")
        print("\n`lct train RUN --help` lists every option of a run.")
        return
    name, *rest = arguments
    default, about = TrainCommand(run(name)), (RUNS[name].__doc__ or "").splitlines()[0]
    tyro.cli(TrainCommand, default=default, args=rest, prog=f"lct train {name}", description=about).run()


def sample(
    scene: tyro.conf.Positional[Path],
    weights: Path,
    out: Path | None = None,
    mode: Literal["auto-regressive", "joint"] | None = None,
    steps: int = 20,
    guidance: float = 1.5,
    history_guidance: float = 1.0,
    history_time: tuple[float, ...] = (0.1,),
    keep: Literal["pass", "step"] = "pass",
    fps: float | None = None,
    dtype: ComputeDtype | None = None,
    device: str = "cpu",
    impl: str = "auto",
    pipeline: Path | None = None,
    memory: Memory = AS_IT_IS,
) -> None:
    """Generate the shots of a scene file that have no media yet; those that have are given.

    Args:
        scene: A scene.toml, or its folder.
        weights: A .safetensors file, a checkpoint folder, a transformer of diffusers, or asset:tiny_pretrained.
        out: New folder for latents, one mp4 a shot and a contact sheet; SCENE-sample by default.
        mode: Shot by shot over the history, or all shots together; by default as the weights were trained.
        steps: Denoising steps.
        guidance: Weight of the prompts; 1 is without guidance.
        history_guidance: Weight of the other shots; 1 is without guidance.
        history_time: t_c, the noise level of generated shots as history (§ 4.2). Several are a schedule by age, newest
            first, which is computed without a cache.
        keep: Keys and values of a finished shot: of a pass of their own, or of the denoising step nearest t_c.
        fps: Frames a second of the mp4 files; the scene file's by default.
        dtype: Of streams and weights of products, such as bfloat16. By default, on a GPU the one they were trained in,
            else the weights' own.
        device: Such as cuda.
        impl: Attention implementation.
        pipeline: Folder of a diffusers pipeline, for weights tuned from its transformer, low-rank ones included: its
            text encoders and VAE.
        memory: Where and how finished shots are kept, for long scenes and large models.
    """
    from lct.data.atomic import check_vacant
    from lct.pretrained.pipeline import pipeline_of
    from lct.sample.files import asked, sample_scene
    from lct.sample.request import Sampling, usual_dtype
    from lct.train.weights import available, config_of, load_model

    available(device)
    if memory.device is not None:
        available(memory.device, "memory.device")
    config = config_of(weights)
    dtype = dtype or usual_dtype(config, device)
    folder = (scene if scene.is_dir() else scene.parent).resolve()
    pipeline = weights if pipeline is None and (weights / "model_index.json").is_file() else pipeline
    parts = pipeline_of(pipeline, device, dtype)
    target = out or folder.with_name(f"{folder.name}-sample")
    check_vacant(target)
    request = asked(config.model, scene, config.data.shots, fps, parts).request
    if parts is not None:  # text encoders come and go before the model, so that they need not fit beside it
        parts.prepare(request.prompts)
    model, config = load_model(weights, device, pipeline, dtype)
    options = {"guidance": guidance, "history_guidance": history_guidance, "history_time": history_time, "keep": keep}
    sampling = Sampling.of(config, steps=steps, dtype=dtype, **options)
    advise(impl, model.video_out.weight.device, sampling.compute_dtype(model))
    rest = config.data.shots, parts, None if memory == AS_IT_IS else memory
    print(sample_scene(model, scene, target, sampling, config.visibility, mode, fps, impl, *rest))


def decode(
    scene: tyro.conf.Positional[Path],
    out: Path,
    fps: float | None = None,
    pipeline: Path | None = None,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Turn a scene's latents into one mp4 a shot and a contact sheet.

    Args:
        scene: A scene.toml whose shots all have latents, or its folder.
        out: Folder of the films.
        fps: Frames a second; the scene file's by default.
        pipeline: Folder of a diffusers pipeline, whose VAE decodes, in tiles where frames are large.
        device: Such as cuda.
        dtype: Of the VAE.
    """
    from lct.pretrained.pipeline import pipeline_of
    from lct.sample.files import decode_scene

    print(decode_scene(scene, out, fps, pipeline_of(pipeline, device, dtype)))


@dataclass(frozen=True)
class DirectCommand:
    """Direct a scene shot by shot."""

    scene: tyro.conf.Positional[Path]
    """A scene.toml or its folder; or the project itself."""
    weights: str | None = None
    """What generates: a .safetensors file, a checkpoint folder, or asset:NAME. Needed to begin."""
    project: Path | None = None
    """Folder of boards and takes; SCENE-direct by default."""
    steps: int | None = None
    """Denoising steps."""
    guidance: float | None = None
    """Weight of the prompts; 1 is without guidance."""
    history_guidance: float | None = None
    """Weight of the shots that a new one sees; 1 is without guidance."""
    history_time: float | None = None
    """t_c, the noise level of takes as history (§ 4.2)."""
    fps: float | None = None
    """Frames a second of the films; the scene file's by default."""
    dtype: ComputeDtype | None = None
    """Of streams, weights of products and text encoders, such as bfloat16. By default, of a project begun on a GPU the
    one that the weights were trained in, else the weights' own."""
    fp8: Annotated[bool | None, tyro.conf.arg(name="memory.fp8")] = None
    """Keep keys and values of what a shot sees in 8 bits; stays with the project until it is turned off."""
    history_device: Annotated[str | None, tyro.conf.arg(name="memory.device")] = None
    """Keep them there, such as on cpu beside a model on a GPU; the model's own device by default."""
    pipeline: str | None = None
    """Folder of a diffusers pipeline, for weights tuned from its transformer: its text encoders and VAE."""
    device: str = "cpu"
    impl: str = "auto"
    """Attention implementation."""


def direct(scene: tyro.conf.Positional[Path]) -> None:
    """Direct a scene shot by shot: `lct direct SCENE [ACTION]`. Without an action it asks for them."""


def _direct(arguments: list[str]) -> None:
    """Options, then perhaps an action with its own arguments."""
    from lct.direct.open import open_studio
    from lct.direct.terminal import act, actions, converse

    names = actions(None)  # type: ignore[arg-type]
    at = next((i for i, word in enumerate(arguments) if i and word in names), len(arguments))
    about = (
        "Direct a scene shot by shot. ACTION is one of "
        + ", ".join(names)
        + "; without one, actions are asked for. `lct direct SCENE ACTION --help` says what it takes."
    )
    command = tyro.cli(DirectCommand, args=arguments[:at], prog="lct direct", description=about)
    studio = open_studio(**vars(command))
    if arguments[at:]:
        act(studio, arguments[at:])
    else:
        converse(studio)


def ingest(
    film: tyro.conf.Positional[Path],
    out: Path = Path("scenes"),
    side: int = 480,
    stride: int = 8,
    patch: int = 4,
    fps: float = 8.0,
    max_frames: int = 64,
    divide: bool = False,
) -> None:
    """Cut a film into shots and scenes, and write scene files with latents.

    Args:
        film: An mp4, mkv, webm, avi or ts file.
        out: New folder, one folder a scene.
        side: The target area is side×side pixels; the aspect ratio is kept (480 in the paper).
        stride: Pixels per latent pixel.
        patch: Sizes are multiples of so many latent pixels; 4 suits both models.
        fps: Latent frames a second.
        max_frames: Most latent frames of a shot.
        divide: Also divide long shots with much change at their events, into scenes without cuts.
    """
    from lct.data.ingest import ingest as run_ingest

    options = {"side": side, "stride": stride, "patch": patch, "fps": fps, "max_frames": max_frames}
    print(run_ingest(film, out, divide=divide, **options))


def encode(
    scenes: tyro.conf.Positional[Path],
    pipeline: Path,
    films: Path,
    out: Path,
    side: int = 480,
    fps: float = 24.0,
    max_frames: int = 121,
    batch: int = 8,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Turn ingested scenes into what a large model is tuned on: VAE latents, text features. Goes on where it stopped.

    Args:
        scenes: Folder of scenes that `lct ingest` cut and whose prompts are written.
        pipeline: Folder of a diffusers pipeline: HunyuanVideo, HunyuanVideo-1.5 or Wan, from text.
        films: Folder of the films that the scenes were cut from.
        out: Folder of encoded scenes.
        side: Frames get the area side · side in pixels, with the film's aspect ratio.
        fps: Frames per second that latents show.
        max_frames: Most frames of a shot.
        batch: Prompts that go through the text encoders together.
        device: Such as cuda.
        dtype: Of VAE and text encoders.
    """
    import torch

    from lct.pretrained.encode import encode as run_encode
    from lct.pretrained.pipeline import Pipeline

    parts = Pipeline(pipeline, device, getattr(torch, dtype), batch)
    for folder in run_encode(scenes, parts, films, out, side, fps, max_frames):
        print(folder)


def pack(scenes: tyro.conf.Positional[Path], out: Path, gigabytes: float = 1.0) -> None:
    """Pack scene folders into few large files to train from: safetensors shards and a manifest, with checksums.

    Args:
        scenes: Folder of scenes with latents, as lct ingest and lct encode write them.
        out: New folder of shards and manifest.jsonl.
        gigabytes: Size of a shard, about.
    """
    from lct.data.folder import scene_folders
    from lct.data.shards import write_shards
    from lct.progress import counting

    if not 0 < gigabytes < 1e6:
        raise ValueError(f"gigabytes: expected a number above 0, got {gigabytes}")
    with counting("pack", len(scene_folders(scenes))) as advance:
        print(write_shards(scenes, out, int(gigabytes * 1e9), advance))


def export(
    weights: tyro.conf.Positional[Path],
    out: Path,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    pipeline: Path | None = None,
) -> None:
    """Write tuned weights as the transformer of a diffusers pipeline, low-rank changes merged.

    Args:
        weights: A checkpoint folder of a run that began from such a transformer, or its .safetensors file.
        out: New folder, with config.json and safetensors.
        dtype: Of the weights.
        pipeline: Where that transformer or its pipeline lies now, for low-rank changes; where it lay then by default.
    """
    import torch

    from lct.pretrained.files import save
    from lct.train.weights import load_model

    model, _ = load_model(weights, base=pipeline, dtype=dtype)
    print(save(model.to(getattr(torch, dtype)), out))


def caption(folder: tyro.conf.Positional[Path], command: str, films: Path | None = None) -> None:
    """Let a command of your own describe the shots of scenes, and write its prompts into the scene files.

    Args:
        folder: A scene folder with latents, as `lct ingest` writes it; or a folder of many: those without prompts.
        command: Such as "python captioner.py --model NAME". It reads JSON, {"instructions": "…", "files": ["….png",
            …]}, on its standard input and writes the prompts as TOML to its standard output.
        films: Folder of the films that scenes were cut from, for sharp frames; else they are as small as the latents.
    """
    from lct.data.prompts import caption_all

    for scene, described in caption_all(folder, shlex.split(command), films):
        print(scene if described else f"{scene}: has prompts")


def plan(
    idea: tyro.conf.Positional[str],
    command: str,
    out: Path = Path("scene"),
    shots: int = 5,
    size: tuple[int, int, int] = (16, 60, 60),
) -> None:
    """Let a command of your own turn an idea into a scene file.

    Args:
        idea: What the scene is about, in your words.
        command: As in `lct caption`; it is given no files.
        out: New folder of the scene file.
        shots: Their number.
        size: Frames, height and width of a shot in latent pixels; the command may choose fewer frames.
    """
    from lct.data.atomic import check_vacant
    from lct.data.prompts import plan as run_plan
    from lct.data.scenefile import write_scene

    check_vacant(out)
    write_scene(out, run_plan(idea, shlex.split(command), shots, size))
    print(out)


def check(scene: tyro.conf.Positional[Path]) -> int:
    """Say what is wrong with the prompts of a scene file; exit with 1 where anything is.

    Args:
        scene: A scene.toml, or its folder.
    """
    from lct.data.prompts import problems
    from lct.data.scenefile import read_scene

    found = problems(read_scene(scene))
    for problem in found:
        print(f"{scene}: {problem}")
    return 1 if found else 0


def mask(
    shots: tyro.conf.Positional[tuple[str, ...]],
    visibility: Literal["context_causal", "bidirectional", "isolated"] = "context_causal",
    text_scale: float = 1.0,
    out: Path = Path("mask.png"),
) -> None:
    """Draw who sees whom in a layout, and its positions.

    Args:
        shots: TEXT:TxHxW for a shot (tokens, then frames × height × width in patches), global:TEXT for a global
            prompt, / between scenes; for example: global:12 9:3x8x8 9:1x8x8.
        visibility: Who sees whom.
        text_scale: λ of the positions.
        out: The mask's file; the positions go beside it, as NAME-positions.png.
    """
    from lct.data.atomic import new_file
    from lct.draw import mask_picture, positions_picture
    from lct.layout import parse_layout

    if out.suffix.lower() not in (".png", ".jpg", ".webp"):
        raise ValueError(f"out: expected a picture such as mask.png, got {out}")
    layout = parse_layout(shots, visibility)
    positions = out.with_name(f"{out.stem}-positions{out.suffix}")
    for file, picture in ((out, mask_picture(layout)), (positions, positions_picture(layout, text_scale))):
        with new_file(file) as temporary:
            picture.save(temporary)
        print(file)


def estimate(
    shots: tyro.conf.Positional[tuple[str, ...]],
    preset: str = "lct_3b",
    visibility: Literal["context_causal", "bidirectional", "isolated"] = "context_causal",
    tflops: float = 400.0,
    lora: int = 0,
    processes: int = 1,
    replicate: int = 1,
    context: int = 1,
    recompute: Literal["none", "attention", "all"] = "all",
    gather_again: bool = True,
    balance: int = 0,
    pass_rows: int = 0,
) -> None:
    """Rows, FLOPs, keys and values, and memory of a layout and a model, and what training takes of each process.

    Args:
        shots: As in `lct mask`.
        preset: Model, such as lct_3b, hunyuan15 or wan_5b.
        visibility: Who sees whom.
        tflops: Rate to turn FLOPs into seconds.
        lora: Rank of low-rank changes that alone are trained; 0 trains all weights.
        processes: GPUs to train on, 128 in the paper.
        replicate: As in lct train.
        context: As in lct train.
        recompute: As in lct train.
        gather_again: As in lct train.
        balance: Steps to simulate of how scenes are shared out over 8, 64 and 128 processes, such as 1000.
        pass_rows: Most rows of a pass in these, as in lct train.
    """
    from lct.estimate import Mesh, print_estimate
    from lct.layout import parse_layout

    mesh = Mesh(processes, replicate, context, recompute, gather_again)
    print_estimate(preset, parse_layout(shots, visibility), tflops, lora, mesh, balance, pass_rows)


def doctor(validate: bool = False) -> int:
    """What this machine has, which implementation computes what, and why the others do not.

    Args:
        validate: Check each implementation on the devices at hand first, and remember which ones `auto` may take.
    """
    from lct.doctor import print_report, print_validation

    failed = print_validation() if validate else 0
    print_report()
    return failed


def bench() -> None:
    """Measure this machine against every peer: `lct bench [QUESTION...] [--quick] [--check] [--out FOLDER]`."""


def _bench(arguments: list[str]) -> int:
    """Run bench/run.py, which belongs to the repository and not to the package."""
    script = Path(__file__).parents[1] / "bench" / "run.py"
    if not script.exists():
        raise ValueError(f"bench: {script} does not exist; the benchmarks come with the repository, clone it")
    sys.path.append(str(script.parent))
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
    return 0


COMMANDS = {
    f.__name__: f
    for f in (
        *(demo, train, sample, decode, direct, ingest, encode, pack, export),
        *(caption, plan, check, mask, estimate, doctor, bench),
    )
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Exit code 0, or 2 with one line for what the user can mend."""
    code, ours = 1, not _among_others()
    try:
        code = _main(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        code = 130
        print("lct: interrupted", file=sys.stderr)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    finally:
        if ours and _among_others():  # it did not leave them, and Python's own end might wait for them
            if not isinstance(sys.exc_info()[1], SystemExit | None):
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return code


def _among_others() -> bool:
    """Whether this is one process of a group."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _main(arguments: list[str]) -> int:
    try:
        if arguments[:1] == ["train"]:
            _train(arguments[1:])
            return 0
        if arguments[:1] == ["direct"]:
            _direct(arguments[1:])
            return 0
        if arguments[:1] == ["bench"]:
            return _bench(arguments[1:])
        result = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, args=arguments, prog="lct", description="Long Context Tuning: multi-shot video generation."
        )
        return result or 0
    except BrokenPipeError:  # whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        words = " ".join(str(error).split())
        print("; ".join([f"lct: error: {words}", *getattr(error, "__notes__", ())]), file=sys.stderr)
        return 2
