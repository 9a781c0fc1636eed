"""The house: which room may import which, and how large a file may grow."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "cmd_jax"
# From the ground up: a room imports only what stands before it, and itself.
ROOMS = (
    "errors", "keys", "stores", "buckets", "files", "cache", "diffusion", "models", "sharding", "state", "performance",
    "running", "interop", "data", "evaluation", "ingest", "declare", "defaults", "builders", "config", "report",
    "pretrained", "stages", "trained", "initial", "sampling", "loading", "prepare", "validation", "train", "planning",
    "bench", "verbs", "main",
)  # fmt: skip
LONGEST = 400  # lines


def modules() -> dict[str, Path]:
    """{"data.video": its file}; the package itself, which is the public surface, is left out."""
    paths = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items() if name != "__init__"}


def imports_of(path: Path, names) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    found = {name.removeprefix("cmd_jax.") for name in found if name.startswith("cmd_jax.")}
    return {name for name in found if name in names}


def room_of(module: str) -> str:
    return module.split(".")[0]


def test_every_room_has_its_place():
    assert {room_of(name) for name in modules()} == set(ROOMS)


def test_imports_point_down_only():
    paths = modules()
    up = [
        f"{name} imports {other}"
        for name, path in paths.items()
        for other in imports_of(path, paths)
        if ROOMS.index(room_of(other)) > ROOMS.index(room_of(name))
    ]
    assert not up, up


def test_there_is_no_circle():
    paths = modules()
    graph = {name: imports_of(path, paths) - {room_of(name)} for name, path in paths.items()}
    assert len([*TopologicalSorter(graph).static_order()]) == len(paths)


def test_what_keeps_a_run_alive_knows_no_stage():
    paths = modules()
    for name, path in paths.items():
        if room_of(name) == "running":
            assert not {room_of(x) for x in imports_of(path, paths)} & {"models", "diffusion", "stages", "builders"}


def test_only_commands_end_the_process():
    """What a notebook may call returns or raises. A signal to verify-resume, a command, unwinds by SystemExit; that of
    Beam's argparse is caught."""
    found = set()
    for name, path in modules().items():
        words = {getattr(x, "attr", getattr(x, "id", None)) for x in ast.walk(ast.parse(path.read_text()))}
        found |= {(name, word) for word in words & {"_exit", "abort", "exit", "SystemExit"}}
    assert found == {
        ("main", "_exit"), ("main", "exit"), ("report.collect", "exit"), ("verbs.verify_resume", "exit"),
        ("ingest.beam", "SystemExit"),
    }  # fmt: skip


def test_no_file_holds_everything():
    paths = [
        path for room in ("cmd_jax", "configs", "launch", "tests") for path in (PACKAGE.parent / room).rglob("*.py")
    ]
    long = {path.name: n for path in paths if (n := len(path.read_text().splitlines())) > LONGEST}
    assert not long
