"""Builds csrc/ into lct/_native.so, and writes down in lct/_native.json what was built, with what, and what was not.

A missing compiler, CUDA or apache-tvm-ffi never stops an installation: it warns, and `lct doctor` says what is missing.
CUDA is compiled where a GPU is visible; LCT_CUDA=1 asks for it, LCT_CUDA=0 forbids it. LCT_SANITIZE=1 builds for
tests/sanitize.sh.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "csrc").iterdir())
CUDA = {"csrc/norm_rope.cu": ("sm_80", "sm_90a"), "csrc/attention_sm90_fwd.cu": ("sm_90a",)}
ARCHITECTURES = CUDA["csrc/norm_rope.cu"]
OPTIMISED = ["-O3", "-std=c++17"]
CONTRACTED = "-ffp-contract=fast"  # a product and a sum are one operation where the processor has it
# Sources that are compiled once for each instruction set, with its options; the fastest is chosen when they run.
X86_SETS = {"portable": [], "avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mavx2", "-mfma"]}
BY_SET = ("csrc/attention_tile.cpp",)
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O2"]


class LeftOut(Exception):
    """Why a part of the library is not built."""


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).splitlines()
        errors = [line for line in said if "error" in line.lower()] or said or [f"exit status {done.returncode}"]
        raise LeftOut(f"{Path(command[0]).name} fails: {errors[0].strip()}")
    return done.stdout


def compiler() -> str:
    if platform.system() == "Windows":
        raise LeftOut("it is not built on Windows")
    found = shutil.which("g++") or shutil.which("c++")
    if not found:
        raise LeftOut("no C++ compiler (g++) is found; install one, then run pip install -e . again")
    return found


def tvm_ffi_paths() -> tuple[str, list[str], str]:
    """The version of apache-tvm-ffi, compiler options for its headers, and its library."""
    try:
        import tvm_ffi
        from tvm_ffi import libinfo
    except ImportError as error:
        raise LeftOut(f"apache-tvm-ffi does not import ({error}); pip install apache-tvm-ffi, then again") from error
    includes = [option for path in libinfo.include_paths() for option in ("-isystem", path)]
    return tvm_ffi.__version__, includes, libinfo.find_libtvm_ffi()


def nvcc() -> Path:
    asked = os.environ.get("LCT_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"LCT_CUDA: expected 1 (build CUDA), 0 (do not) or nothing (where a GPU is), got {asked!r}")
    if asked == "0":
        raise LeftOut("LCT_CUDA=0 forbade it")
    if not asked and (not shutil.which("nvidia-smi") or subprocess.run("nvidia-smi", capture_output=True).returncode):
        raise LeftOut("no GPU was visible; LCT_CUDA=1 pip install -e . builds it all the same")
    home = Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda")
    found = shutil.which("nvcc", path=str(home / "bin")) or shutil.which("nvcc")
    if not found:
        raise LeftOut("no nvcc is found; install the CUDA toolkit or set CUDA_HOME, then run pip install -e . again")
    return Path(found).resolve()


def compile_cuda(folder: Path) -> tuple[str, list[str]]:
    """The compiler's version, and what to link."""
    found = nvcc()

    def compile_source(source: str) -> str:
        target = str(folder / f"{Path(source).stem}.o")
        each = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in CUDA[source]]
        run(str(found), *OPTIMISED, "-Xcompiler=-fPIC", "-lineinfo", *each, "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_source, CUDA))
    runtime = next(found.parents[1].glob("**/libcudart_static.a"), None)
    if runtime is None:
        raise LeftOut(f"libcudart_static.a is not found beside {found}")
    version = run(str(found), "--version").split("release ")[-1].split(",")[0]
    return f"nvcc {version}", [*objects, str(runtime), "-ldl", "-lrt"]


def build(folder: Path, scratch: Path) -> dict:
    """Build what can be built into a folder; what to write down about it."""
    library = folder / "_native.so"
    library.unlink(missing_ok=True)  # an older one would pass for this
    record = {"tvm_ffi": None, "built": {}, "architectures": [], "left_out": {}, "sources": digest()}
    try:
        cxx = compiler()
        record["tvm_ffi"], includes, tvm_ffi_library = tvm_ffi_paths()
    except LeftOut as why:
        record["left_out"] = dict.fromkeys(("cpu", "cuda"), str(why))
        return record
    options, objects = [], []
    try:
        version, objects = compile_cuda(scratch)
        options = ["-DLCT_CUDA"]
    except LeftOut as why:
        record["left_out"]["cuda"] = str(why)
    on_x86 = platform.machine() in ("x86_64", "AMD64")
    sets = X86_SETS if on_x86 else {"portable": []}
    options += [*OPTIMISED, "-Wall", "-fPIC", "-fvisibility=hidden", "-pthread"]
    options += ["-DLCT_X86"] if on_x86 else []
    sanitizers = SANITIZED if os.environ.get("LCT_SANITIZE") == "1" else []
    options += sanitizers
    sources = [(name, "", []) for name in SOURCES if name.endswith(".cpp") and name not in BY_SET]
    sources += [(name, f".{isa}", [*machine, CONTRACTED]) for name in BY_SET for isa, machine in sets.items()]

    def compile_source(source: tuple[str, str, list[str]]) -> str:
        name, isa, machine = source
        target = str(scratch / f"{Path(name).stem}{isa}.cpp.o")
        run(cxx, *options, *machine, *includes, "-c", name, "-o", target)
        return target

    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(compile_source, sources))
        run(cxx, "-shared", "-pthread", *sanitizers, *compiled, *objects, tvm_ffi_library, "-ldl", "-o", str(library))
    except LeftOut as why:
        record["left_out"] = {"cpu": str(why), "cuda": str(why), **record["left_out"]}
        return record
    record["built"]["cpu"] = run(cxx, "--version").splitlines()[0]
    if objects:
        record["built"]["cuda"], record["architectures"] = version, list(ARCHITECTURES)
    return record


def digest() -> str:
    """Of the sources: tests that would run an older library say so."""
    return hashlib.sha256(b"\0".join((ROOT / name).read_bytes() for name in SOURCES)).hexdigest()


class BuildNative(build_ext):
    """Everything is one library of plain C symbols, no Python extension: setuptools only says where it goes."""

    def run(self):
        folder = self.folder()
        scratch = Path(self.build_temp)
        for place in (folder, scratch):
            place.mkdir(parents=True, exist_ok=True)
        record = build(folder, scratch.resolve())
        (folder / "_native.json").write_text(json.dumps(record, indent=2) + "\n")
        for part, why in record["left_out"].items():
            self.warn(f"the native library is built without {part}: {why}")
        for part, version in record["built"].items():
            print(f"lct: built for {part} with {version}", flush=True)

    def folder(self) -> Path:
        return (ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()) / "lct"

    def get_outputs(self):
        return [str(file) for name in ("_native.so", "_native.json") if (file := self.folder() / name).exists()]

    def get_output_mapping(self):
        return {}


setup(
    ext_modules=[Extension("lct._native", [name for name in SOURCES if name.endswith(".cpp")], depends=SOURCES)],
    cmdclass={"build_ext": BuildNative},
)
