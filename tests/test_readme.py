"""README: its commands and code run as written, its table names code that exists, its links lead somewhere."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from film import fetch_film

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORK = ROOT / "build" / "readme"
BIN = Path(sys.executable).parent
SET_UP = ("git clone", "cd", "pip install", "python -m venv")
RUNS = ("make demo", "make test", "make pretrained")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    """The command lines of a block that are to be run here; a line that ends in a backslash goes on."""
    lines = (line.strip() for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and line[0] != "#" and line not in RUNS and not is_set_up(line)]


def is_set_up(line: str) -> bool:
    return any(line == start or line.startswith(f"{start} ") for start in SET_UP)


def run(command: list[str]) -> subprocess.CompletedProcess:
    """A command at the root of the repository, with this interpreter's programs first in PATH."""
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    env.pop("TRITON_INTERPRET", None)  # as in a user's shell
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture
def clean():
    """A repository without build/readme, before and after; nothing else may appear in it."""
    shutil.rmtree(WORK, ignore_errors=True)
    before = set(os.listdir(ROOT)), set((ROOT / "docs").rglob("*"))
    yield
    shutil.rmtree(WORK, ignore_errors=True)
    caches = {".pytest_cache", ".hypothesis", "build"}
    assert (set(os.listdir(ROOT)) - caches, set((ROOT / "docs").rglob("*"))) == (before[0] - caches, before[1])


BASH = [block for block in blocks("bash") if commands(block)]


@pytest.mark.network
@pytest.mark.parametrize("block", BASH, ids=range(len(BASH)))
def test_the_commands_run_as_written(clean, block):
    if not (BIN / "lct").exists():
        pytest.skip(f"needs lct in {BIN}: pip install -e .")
    if "tests/film.py" in block:
        try:
            fetch_film()
        except OSError as error:
            pytest.skip(f"the film could not be fetched: {error}")
    for line in commands(block):
        done = run(["bash", "-c", line])
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("code", blocks("python"), ids=range(len(blocks("python"))))
def test_the_python_code_runs(clean, code):
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr


def test_there_are_commands_code_and_a_table_to_check():
    assert BASH and blocks("python") and NAMED
    assert {line for block in blocks("bash") for line in block.splitlines()} >= {"make demo", "make test"}


def test_lines_that_set_up_and_the_long_runs_are_left_out_and_no_others():
    block = "make demo\npip install -e .\ncd lct\n# note\n\nmake demonstration\ncdrecord\nlct mask \\\n  3:1x2x2\n"
    assert [line.split() for line in commands(block)] == [
        ["make", "demonstration"],
        ["cdrecord"],
        ["lct", "mask", "3:1x2x2"],
    ]


# -- the table, names and links ----------------------------------------------------------------------------------------

NAMED = sorted(set(re.findall(r"`([\w./]+\.py):([\w.]+)`", README)))
LINKS = sorted({*re.findall(r"\]\(([^)#]+)\)", README), *re.findall(r'src="([^"]+)"', README)})


def defined(file: Path, dotted: str) -> bool:
    """Whether a Python file defines a function, class, method or name."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    for name in dotted.split("."):
        found = [node for node in body if name in names(node)]
        if not found:
            return False
        body = found[0].body if isinstance(found[0], ast.ClassDef) else []
    return True


def names(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_the_code_it_names_exists(file, name):
    assert (ROOT / file).is_file() and defined(ROOT / file, name)


@pytest.mark.parametrize(
    ("name", "there"),
    [("defined", True), ("NAMED", True), ("nothing", False), ("defined.body", False), ("ast", False)],
)
def test_a_name_is_found_where_it_is_defined_alone(name, there):
    assert defined(Path(__file__), name) is there


def test_every_row_of_the_table_from_paper_to_code_names_code():
    rows = re.findall(r"^\| (§.*|Fig.*) \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) > 10 and all(re.fullmatch(r"(`[\w./]+\.py:[\w.]+`(, )?)+", code) for _, code in rows)


@pytest.mark.parametrize("link", [link for link in LINKS if "://" not in link])
def test_a_link_leads_to_a_file(link):
    assert (ROOT / link).exists()


@cache
def report():
    """bench/report.py, whose neighbours stand behind tests/ in the path."""
    sys.path.append(str(ROOT / "bench"))
    spec = importlib.util.spec_from_file_location("bench_report", ROOT / "bench" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_results_are_those_of_the_committed_records():
    assert report().renewed(README) == README, "stale: run python bench/report.py"
    for machine in report().machines():
        page = report().cases_of(machine).read_text(encoding="utf-8")
        assert page == report().cases(machine), "stale: run python bench/report.py"


def test_the_findings_are_those_of_the_committed_record():
    written, record = report(), report().record("findings-cpu")
    page = written.FINDINGS.read_text(encoding="utf-8")
    assert page == written.page.page(record), "stale: run python bench/report.py"
    assert not record["quick"] and record["scenes"] >= 64
    for finding in record["findings"]:
        assert finding["holds"] or finding["tried"], f"{finding['name']} differs: say what else was tried"
        drawn = written.FINDINGS.parent / written.page.FOLDER / f"{written.page.anchor(finding['name'])}.svg"
        assert written.page.digest(finding) in drawn.read_text(encoding="utf-8"), "stale: run python bench/report.py"


def test_plots_are_those_of_the_committed_records():
    for machine in report().machines():
        drawn = report().plot_of(machine).read_text(encoding="utf-8")
        assert report().digest(machine) in drawn, "stale: run python bench/report.py"


def test_every_machine_that_was_asked_everything_has_a_section(tmp_path, monkeypatch):
    written = report()
    for path in written.RESULTS.glob("*-cpu.json"):
        shutil.copy(path, tmp_path)
        shutil.copy(path, tmp_path / path.name.replace("-cpu", "-h200"))
    monkeypatch.setattr(written, "RESULTS", tmp_path)
    assert written.machines() == ["cpu", "h200"]
    assert "docs/bench-h200.md" in written.benchmarks() and "Not yet run on a GPU" not in written.benchmarks()
    (tmp_path / "plan-h200.json").unlink()
    assert written.machines() == ["cpu"] and "Not yet run on a GPU" in written.benchmarks()
