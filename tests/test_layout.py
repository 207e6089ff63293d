"""The rules of the house, read from the source: which way imports run, which door a library has."""

import ast
import functools
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("protos", "kernels", "worker", "orchestrator")
MAY_IMPORT = {
    "protos": set(),
    "kernels": set(),
    "worker": {"protos", "kernels"},
    "orchestrator": {"protos", "worker"},
}
WORKER_FACE = {"actor", "address", "config", "draws", "errors", "knobs", "precision"}
"""What the orchestrator may know of a worker."""
DOORS = {
    "triton": ["kernels/"],
    "ray": ["worker/actor.py", "orchestrator/fleet/cluster.py"],
    "grpc": ["worker/serving/", "orchestrator/"],
    "transformers": [],
    "torch": ["kernels/", "worker/"],
}
NO_GRPC = [
    "orchestrator/config.py",
    "orchestrator/ensemble/",
    "orchestrator/fleet/cluster.py",
    "orchestrator/fleet/plan.py",
    "orchestrator/routing/",
]
"""Decisions and the Ray door of the orchestrator; they never speak."""
PURE = ["worker/scheduling/", "worker/requests/", "worker/text/", "worker/model/config.py"]
"""Bookkeeping that must not need a tensor; `Choice` of the sampler is a plain value."""


def sources(part: str = "") -> Iterator[Path]:
    parts = [part] if part else PARTS
    for each in parts:
        yield from (p for p in (ROOT / each).rglob("*.py") if "_pb2" not in p.name)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def imports(path: Path) -> list[tuple[int, str]]:
    """(dots, dotted name) of every import in a file, late and type-checking ones too."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.level, node.module))
        elif isinstance(node, ast.ImportFrom):
            found += ((node.level, alias.name) for alias in node.names)
    return found


def inner_imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Imports of our own modules, as paths from the repository's root."""
    folder = path.relative_to(ROOT).parent.parts
    for dots, name in imports(path):
        if dots:
            yield (*folder[: len(folder) - dots + 1], *name.split("."))


@pytest.mark.parametrize("part", PARTS)
def test_imports_run_down_the_house(part: str) -> None:
    for path in sources(part):
        for target in inner_imports(path):
            assert target[0] == part or target[0] in MAY_IMPORT[part], f"{name_of(path)}: {target}"
            if part == "orchestrator" and target[0] == "worker":
                assert target[1] in WORKER_FACE, f"{name_of(path)}: {target}"


def test_product_imports_itself_with_dots() -> None:
    for path in sources():
        for dots, name in imports(path):
            assert dots or name.split(".")[0] not in {"conclave", *PARTS}, (
                f"{name_of(path)}: {name}"
            )


@pytest.mark.parametrize("library", DOORS)
def test_library_comes_in_through_its_doors(library: str) -> None:
    for path in sources():
        if any(not dots and name.split(".")[0] == library for dots, name in imports(path)):
            assert name_of(path).startswith(tuple(DOORS[library]) or "-"), name_of(path)


def test_decisions_know_no_grpc() -> None:
    for path in sources("orchestrator"):
        if name_of(path).startswith(tuple(NO_GRPC)):
            names = {name.split(".")[0] for dots, name in imports(path) if not dots}
            assert "grpc" not in names, name_of(path)


def test_bookkeeping_knows_no_tensors() -> None:
    for path in sources("worker"):
        if name_of(path).startswith(tuple(PURE)):
            names = {name.split(".")[0] for dots, name in imports(path) if not dots}
            assert not names & {"torch", "numpy", "ray", "grpc"}, name_of(path)


def test_there_is_no_import_cycle() -> None:
    modules = {path.relative_to(ROOT).with_suffix("").parts: path for path in sources()}
    graph = {
        module: {
            t[:n] for t in inner_imports(path) for n in (len(t), len(t) - 1) if t[:n] in modules
        }
        for module, path in modules.items()
    }
    done: set[tuple[str, ...]] = set()

    def visit(module: tuple[str, ...], trail: tuple[tuple[str, ...], ...]) -> None:
        assert module not in trail, " -> ".join("/".join(m) for m in (*trail, module))
        if module not in done:
            for target in graph[module] - {module}:
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_import_root_links_every_part() -> None:
    root = ROOT / ".root" / "conclave"
    for name in (*PARTS, "__init__.py"):
        link = root / name
        assert link.is_symlink() and link.resolve() == ROOT / name
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would hide Hugging Face's `kernels`"


def test_folders_stay_small_and_files_have_a_noun() -> None:
    for part in PARTS:
        for folder in [ROOT / part, *(p for p in (ROOT / part).rglob("*") if p.is_dir())]:
            files = [p for p in folder.glob("*.py") if "_pb2" not in p.name]
            assert len(files) <= 16, f"{name_of(folder)} has {len(files)} files"
    assert not [name_of(p) for p in sources() if p.stem in {"utils", "util", "helpers", "misc"}]


def test_files_stay_readable() -> None:
    for path in sources():
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{name_of(path)} has {lines} lines"
        assert ast.get_docstring(ast.parse(path.read_text())), (
            f"{name_of(path)} says not what it is"
        )


def test_dependencies_are_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    for requirement in wanted:
        name = requirement.split(">")[0].split("<")[0].split("[")[0].strip()
        assert name.lower().replace("_", "-") in pinned, f"{name} is not in constraints.txt"
