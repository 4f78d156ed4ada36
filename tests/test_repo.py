"""The rules that keep the repository small and right: who imports whom, cold start, sizes, what is never written."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import lct
from lct.kernels.select import ATTENTION, NORM_ROPE

ROOT = Path(__file__).parents[1]
OPTIONAL = [
    "triton",
    "tvm_ffi",
    "av",
    "cv2",
    "scenedetect",
    "pynvml",
    "diffusers",
    "transformers",
    "flash_attn",
    "xformers",
    "gradio",
    "tensorboard",
]

# DESIGN § 3, module by module: what each part of lct/ may import, itself and `lct` (for the version) apart.
# Beyond the written rule: a sampler of scene files draws contact sheets, so `sample` imports `draw`; `progress` imports
# nothing, `estimate` counts a model, `doctor` asks kernels, and `report` writes its page through `data.atomic`.
MODEL = ("lct.plan", "lct.layout", "lct.kernels", "lct.model")
MAY_IMPORT = {
    "lct.plan": (),
    "lct.layout": ("lct.plan",),
    "lct.kernels": ("lct.plan", "lct.layout"),
    "lct.model": ("lct.plan", "lct.layout", "lct.kernels"),
    "lct.data": ("lct.plan", "lct.layout"),
    "lct.draw": ("lct.plan", "lct.layout", "lct.data"),
    "lct.pretrained": (*MODEL, "lct.data", "lct.progress"),
    "lct.train": (*MODEL, "lct.data", "lct.pretrained"),
    "lct.sample": (*MODEL, "lct.data", "lct.draw", "lct.pretrained"),
    "lct.evaluate": (*MODEL, "lct.data", "lct.train", "lct.sample"),
    "lct.direct": (*MODEL, "lct.data", "lct.draw", "lct.pretrained", "lct.train", "lct.sample"),
    "lct.progress": (),
    "lct.report": ("lct.data.atomic",),
    "lct.estimate": (*MODEL, "lct.train"),
    "lct.validate": ("lct.layout", "lct.kernels"),
    "lct.doctor": ("lct.kernels", "lct.validate"),
    "lct.tune": (*MODEL, "lct.data", "lct.pretrained", "lct.train", "lct.sample", "lct.progress"),
    "lct.demo": (
        *MODEL,
        "lct.data",
        "lct.draw",
        "lct.train",
        "lct.sample",
        "lct.evaluate",
        "lct.progress",
        "lct.tune",
        "lct.report",
    ),
}
ANYTHING = ("lct", "lct.cli", "lct.__main__")


def modules() -> dict[str, Path]:
    """Every module of lct by name."""
    names = {}
    for file in sorted((ROOT / "lct").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


MODULES = modules()
by_module = pytest.mark.parametrize("name", MODULES)


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imports(code: ast.AST) -> set[str]:
    """Modules that code imports, inside functions too; of `from a import b`, a.b where that is a module."""
    found = set()
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are absolute here"
            dotted = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in dotted}
    return found


def within(module: str, parents: tuple[str, ...]) -> bool:
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


def part(module: str) -> str:
    return ".".join(module.split(".")[:2])


def child(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


# -- cold start --------------------------------------------------------------------------------------------------------

BLOCK = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))\n"


@pytest.mark.parametrize("module", ["lct", "lct.cli"])
def test_imports_neither_torch_nor_an_optional_package(module):
    done = child(f"{BLOCK}import {module}; print('torch' in sys.modules)")
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_every_module_imports_without_the_optional_packages():
    names = [name for name in MODULES if not name.startswith("lct.kernels.triton_")]
    done = child(f"{BLOCK}from importlib import import_module\nfor name in {names}: import_module(name)")
    assert done.returncode == 0, done.stderr


def test_a_blocked_package_cannot_be_imported():
    done = child(f"{BLOCK}import av")
    assert done.returncode == 1 and "ModuleNotFoundError" in done.stderr


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        lct.nothing  # noqa: B018


# -- who imports whom --------------------------------------------------------------------------------------------------


def test_the_table_of_imports_names_every_part_and_no_other():
    assert {*MAY_IMPORT, *ANYTHING} == {part(name) for name in MODULES}


@pytest.mark.parametrize("name", [name for name in MODULES if part(name) not in ANYTHING])
def test_imports_go_one_way(name):
    ours = {module for module in imports(tree(name)) if within(module, ("lct",)) and module != "lct"}
    against = {module for module in ours if not within(module, (part(name), *MAY_IMPORT[part(name)]))}
    assert not against, f"{name} imports {sorted(against)}"


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_the_table_has_no_circle(name):
    reached, edge = set(), {name}
    while edge:
        edge = {part(other) for at in edge for other in MAY_IMPORT[at]} - reached
        reached |= edge
    assert name not in reached


SHARED = ("lct.kernels.gpu_attention", "lct.kernels.triton_common", "lct.kernels.native", "lct.kernels.rope")


@pytest.mark.parametrize("name", sorted({m.__name__ for m in (*ATTENTION.values(), *NORM_ROPE.values())}))
def test_an_implementation_imports_no_other_kernel(name):
    kernels = {module for module in imports(tree(name)) if within(module, ("lct.kernels",))}
    assert not {module for module in kernels if not within(module, SHARED)} - {"lct.kernels"}


@pytest.mark.parametrize(
    "code",
    ["import lct.demo", "from lct import demo", "from lct.demo import run_demo", "def f():\n    import lct.demo"],
)
def test_every_form_of_import_is_seen(code):
    assert imports(ast.parse(code)) == {"lct.demo"}


# -- sizes -------------------------------------------------------------------------------------------------------------

SOURCES = [
    file.relative_to(ROOT)
    for folder in ("lct", "bench", "tests", "csrc")
    for file in sorted((ROOT / folder).rglob("*"))
    if file.suffix in (".py", ".cpp", ".cu", ".cuh", ".h", ".hpp")
]


def lines(file: Path) -> int:
    return len((ROOT / file).read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("file", SOURCES, ids=str)
def test_a_file_has_fewer_than_600_lines(file):
    assert lines(file) < 600


@pytest.mark.parametrize(("folder", "limit"), [("lct", 17_500), ("csrc", 4_000)])
def test_the_package_stays_small(folder, limit):
    assert 0 < sum(lines(file) for file in SOURCES if file.parts[0] == folder) < limit


# -- what is never written ---------------------------------------------------------------------------------------------

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_NAMES = {
    "eval",
    "exec",
    "os.environ",
    "os.getenv",
    "os.environb",
    "os.system",
    "os.popen",
    "torch.load",
    "yaml.load",
}


def unsafe(code: ast.AST) -> list[str]:
    """What code holds that runs strangers' data, reads the environment or hides an error, with line numbers."""
    found = []
    for node in ast.walk(code):
        names = set()
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names} & UNSAFE_MODULES
        elif isinstance(node, ast.ImportFrom):
            names = {str(node.module)} & UNSAFE_MODULES
            names |= {f"{node.module}.{alias.name}" for alias in node.names} & UNSAFE_NAMES
        elif isinstance(node, (ast.Name, ast.Attribute)):
            names = {ast.unparse(node)} & UNSAFE_NAMES
        elif isinstance(node, ast.keyword) and node.arg == "shell":
            names = {"shell="}
        elif isinstance(node, ast.ExceptHandler) and all(isinstance(line, ast.Pass) for line in node.body):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            names = {"except: pass"} if broad else set()
        found += [f"line {node.lineno}: {name}" for name in names]
    return found


@by_module
def test_nothing_unsafe_and_no_environment_is_read(name):
    assert not unsafe(tree(name))


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')",
        "exec('1')",
        "import pickle",
        "from pickle import loads",
        "import os\nos.environ['A']",
        "from os import environ",
        "import os\nos.getenv('A')",
        "torch.load(file)",
        "from torch import load",
        "yaml.load(file)",
        "subprocess.run('a', shell=True)",
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept:\n    pass",
    ],
)
def test_what_is_unsafe_is_seen(code):
    assert len(unsafe(ast.parse(code))) == 1


def test_a_narrow_handler_and_a_models_eval_are_not_unsafe():
    assert not unsafe(ast.parse("model.eval()\ntry:\n    f()\nexcept KeyError:\n    pass"))


@pytest.mark.parametrize("name", lct.__all__)
def test_a_public_name_has_a_docstring(name):
    function = getattr(lct, name)
    written = [node for node in tree(function.__module__).body if getattr(node, "name", None) == name]
    assert written and ast.get_docstring(written[0])  # a dataclass without one would make one up


def test_public_names_are_listed():
    assert lct.__all__ and set(lct.__all__) <= set(dir(lct))


# -- the text of the repository ----------------------------------------------------------------------------------------

MACHINE_PATH = re.compile(r"(?<![\w.~/}*-])/(?:home|root|work|workspace|Users|mnt|tmp|scratch|data)/[\w.]")
HOST = re.compile(r"https?://([\w.-]+)")
PUBLIC_HOSTS = {
    "127.0.0.1",
    "arxiv.org",
    "github.com",
    "www.apache.org",
    "www.w3.org",
    "doi.org",
    "download.pytorch.org",
}


def repository_texts() -> dict[str, str]:
    """Every text file that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip(f"needs a git checkout: {listed.stderr.strip()}")
    texts = {}
    for name in filter(None, listed.stdout.split("\0")):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b"\0"
        if b"\0" not in content:
            texts[name] = content.decode("utf-8")
    assert "pyproject.toml" in texts
    return texts


def test_no_text_names_a_folder_of_some_machine():
    found = {name: match[0] for name, text in repository_texts().items() if (match := MACHINE_PATH.search(text))}
    assert not found


def test_texts_name_only_public_hosts():
    assert {host for text in repository_texts().values() for host in HOST.findall(text)} <= PUBLIC_HOSTS


@pytest.mark.parametrize("folder", ["home", "root", "work", "tmp"])
def test_a_machines_folder_is_seen(folder):
    path = f"/{folder}/name"
    assert MACHINE_PATH.search(f'out = "{path}"') and not MACHINE_PATH.search(f"https://arxiv.org{path} lct{path}")


def test_the_command_and_the_version_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == lct.__version__
    assert project["scripts"] == {"lct": "lct.cli:main"}
