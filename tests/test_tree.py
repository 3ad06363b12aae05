"""The rules of the tree: the order of the river, where torch may be, the budgets of the style."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import adaptis

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "adaptis"

# Data flows down: a module imports only from those above it (packages count as one).
RIVER = (
    "errors",
    "files",
    "model",
    "cluster",
    "profile",
    "workload",
    "corpus",
    "measure",
    "program",
    "notation",
    "schedules",
    "plan",
    "lower",
    "check",
    "exchange",
    "rows",
    "kernels",
    "costs",
    "timeline",
    "simulate",
    "packing",
    "bounds",
    "search",
    "execute",
    "report",
    "console",
    "config",
    "comparison",
    "refine",
    "jobs",
    "demo",
    "options",
    "cli_plan",
    "cli_exchange",
    "cli",
)
TORCH_MAY_BE_IN = ("measure", "execute")
HEAVY = ("torch", "transformers", "safetensors", "tokenizers")
OUTSIDE = {"__init__", "__main__"}  # the root's names and the entry point may reach everywhere

MODULES = sorted(SOURCE.rglob("*.py"))
NAMES = [str(path.relative_to(SOURCE).with_suffix("")) for path in MODULES]
every_module = pytest.mark.parametrize("path", MODULES, ids=NAMES)


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def dotted(path):
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(("adaptis", *(p for p in parts if p != "__init__")))


def imports(path):
    """Every module that `path` imports, anywhere in it, with its line."""
    names = {dotted(p) for p in MODULES}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in names else node.module), node.lineno


def functions(path):
    nodes = ast.walk(tree(path))
    return [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def listed():
    """The files of the project: tracked, or new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if found.returncode:
        pytest.skip("no git repository here")
    paths = (ROOT / name for name in found.stdout.decode().split("\0") if name)
    return [path for path in paths if path.is_file()]


def test_the_river_names_every_module():
    there = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in MODULES} - OUTSIDE
    assert there == set(RIVER)
    assert len(set(RIVER)) == len(RIVER)


@every_module
def test_a_module_imports_only_from_above(path):
    own = dotted(path).split(".")
    if len(own) == 1 or own[1] in OUTSIDE:
        return
    above = set(RIVER[: RIVER.index(own[1]) + 1])
    for name, line in imports(path):
        parts = name.split(".")
        if parts[0] == "adaptis" and len(parts) > 1:
            assert parts[1] in above, f"{path}:{line}: {own[1]} imports {name} from below it"
        elif name == "adaptis":
            assert own[1] == "cli", f"{path}:{line}: only the command line asks for the version"


@pytest.mark.parametrize("package", sorted({p.parent for p in MODULES} - {SOURCE}), ids=str)
def test_modules_of_a_package_import_each_other_in_no_circle(package):
    edges = {}
    for path in package.glob("*.py"):
        own = dotted(path)
        inside = (name for name, _ in imports(path) if name.startswith(dotted(package)))
        edges[own] = {name for name in inside if name != own}
    while True:
        free = [name for name, needs in edges.items() if not needs & edges.keys()]
        if not free:
            break
        for name in free:
            del edges[name]
    assert not edges, f"a circle of imports among {sorted(edges)}"


@every_module
def test_torch_is_imported_in_two_packages_alone(path):
    package = path.relative_to(SOURCE).parts[0]
    for name, line in imports(path):
        top = name.split(".")[0]
        if top in HEAVY and package not in TORCH_MAY_BE_IN:
            assert (package, top) == ("corpus.py", "tokenizers"), f"{path}:{line}: imports {name}"
            lazy = [n for f in functions(path) for n in ast.walk(f) if isinstance(n, ast.Import)]
            assert line in [n.lineno for n in lazy], (
                f"{path}:{line}: import {name} where it is used"
            )


def test_the_core_runs_without_torch():
    core = [dotted(p) for p in MODULES if p.relative_to(SOURCE).parts[0] not in TORCH_MAY_BE_IN]
    core.remove("adaptis.__main__")
    code = f"""
import sys
for name in {core}:
    __import__(name)
found = set({HEAVY}) & sys.modules.keys()
sys.exit(f"imported {{found}}" if found else 0)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def lines_of(function):
    """How many lines a function has, its docstring not counted."""
    count = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        count -= first.end_lineno - first.lineno + 1
    return count


@every_module
def test_no_function_is_longer_than_sixty_lines(path):
    long = {f.name: lines_of(f) for f in functions(path) if lines_of(f) > 60}
    assert not long


@every_module
def test_no_file_is_longer_than_five_hundred_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


@every_module
def test_packages_are_not_nested(path):
    assert len(path.relative_to(SOURCE).parts) <= 2


@every_module
def test_every_parameter_and_result_has_a_type(path):
    for function in functions(path):
        place = f"{path}:{function.lineno}: {function.name}"
        given = function.args
        named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        bare = [a.arg for a in named if a and not a.annotation and a.arg not in ("self", "cls")]
        assert not bare, f"{place}: {bare}"
        assert function.returns is not None, place


@every_module
def test_nothing_is_left_to_do_and_nothing_is_printed(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)
    calls = (n for n in ast.walk(tree(path)) if isinstance(n, ast.Call))
    printed = [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
    assert not printed


@every_module
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(tree(path))


def test_no_module_imports_itself_in_a_circle():
    edges = {dotted(p): {name for name, _ in imports(p)} for p in MODULES}
    edges = {name: needs - {name, "adaptis"} for name, needs in edges.items() if name != "adaptis"}
    while free := [name for name, needs in edges.items() if not needs & edges.keys()]:
        for name in free:
            del edges[name]
    assert not edges


def test_the_root_gives_what_it_names_and_no_more_than_thirty():
    assert len(adaptis.__all__) <= 30
    assert len(set(adaptis.__all__)) == len(adaptis.__all__)
    assert set(dir(adaptis)) == {*adaptis.__all__, "__version__"}
    for name in adaptis.__all__:
        assert getattr(adaptis, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        adaptis.nothing  # noqa: B018


def test_the_root_names_what_it_imports_for_type_checkers():
    block = next(n for n in tree(SOURCE / "__init__.py").body if isinstance(n, ast.If))
    named = {alias.asname or alias.name for n in block.body for alias in n.names}
    assert named == set(adaptis.__all__)


def test_no_file_speaks_of_the_place_where_it_was_written():
    banned = ["farm" + "-studio", "farm" + "-bench", "/" + "work/", "shared/" + "reference"]
    found = []
    for path in listed():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {word}" for word in banned if word in text]
    assert not found
