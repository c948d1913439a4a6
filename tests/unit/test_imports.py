"""Who may import whom: the table in CONTRIBUTING.md against the source; `import microadam_dist` needs torch alone."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import microadam_dist

PACKAGE = Path(microadam_dist.__file__).parent
CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}  # "" is the package itself, "backends" is backends/__init__.py

# Room, or one file of it -> rooms, or files of them, it may import beside its own; the root imports them all.
TABLE = re.findall(r"^\| `([a-z.]+)` \|[^|]*\|([^|]*)\|$", CONTRIBUTING.read_text(), flags=re.MULTILINE)
ALLOWED = {room: {name.strip() for name in names.split(",")} for room, names in TABLE}
MAX_ROOM_ARROWS = 60

# What else may be imported, beside torch and the standard library: only inside functions, or anywhere in modules that
# are imported lazily themselves.
STANDARD_LIBRARY_ONLY = (
    "errors config layout layout.* arithmetic arithmetic.scalars engines engines.cuts cli planner planner.activations "
    "planner.engines planner.gpus planner.memory planner.shapes run"
)
TORCH_DISTRIBUTED = "engines* checkpoint* diagnostics*"
ANYWHERE = {
    "rich": "cli.app cli.plan cli.bench cli.output",
    "typer": "cli.app cli.plan cli.bench cli.output cli.settings",
    "transformers": "integrations.hf",
}
LAZILY = {
    "deepspeed": "engines.deepspeed* checkpoint.deepspeed deepspeed",
    "accelerate": "integrations.*",
    "huggingface_hub": "cli.plan",
    "safetensors": "checkpoint.trainer",
    "matplotlib": "planner.plot bench.plot diagnostics.report",
    "cuda": "backends.cuda backends.cuda_installation backends.nvrtc",
}


def matches(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())


class Import(NamedTuple):
    name: str  # "microadam_dist.layout", "torch.distributed"
    is_lazy: bool
    line: int


@functools.cache
def imports_of(module: str) -> list[Import]:
    path = MODULES[module]
    package = ["microadam_dist", *path.relative_to(PACKAGE).parent.parts]

    def visit(node: ast.AST, is_lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, is_lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            parent = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                is_module = f"{parent}.{alias.name}".removeprefix("microadam_dist.") in MODULES
                is_module |= (parent, alias.name) == ("torch", "distributed")
                yield Import(f"{parent}.{alias.name}" if is_module else parent, is_lazy, node.lineno)
        elif ast.unparse(node) == "torch.distributed":  # used through the torch module
            yield Import("torch.distributed", is_lazy, node.lineno)  # type: ignore[attr-defined]
        for child in ast.iter_child_nodes(node):
            yield from visit(child, is_lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    return list(visit(ast.parse(path.read_text()), is_lazy=False))


def room_of(module: str) -> str:
    return module.partition(".")[0]


def is_allowed(module: str, imported: Import) -> bool:
    top = imported.name.split(".")[0]
    if top == "microadam_dist":
        target = imported.name.removeprefix("microadam_dist").removeprefix(".")
        allowed = ALLOWED.get(module, ALLOWED[room_of(module)])
        return room_of(target) == room_of(module) or bool({target, room_of(target)} & allowed)
    if top in sys.stdlib_module_names:
        return True
    if matches(module, STANDARD_LIBRARY_ONLY):
        return False
    if top == "torch":
        is_distributed = imported.name.startswith("torch.distributed")
        return not is_distributed or matches(module, TORCH_DISTRIBUTED)
    return matches(module, ANYWHERE.get(top, "")) or (imported.is_lazy and matches(module, LAZILY.get(top, "")))


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_module_imports_only_what_it_may(module: str) -> None:
    assert room_of(module) in ALLOWED, f"add a line for the room {room_of(module)} to the table in CONTRIBUTING.md"
    wrong = [f"line {i.line}: {i.name}" for i in imports_of(module) if not is_allowed(module, i)]
    assert not wrong


def arrows(name_of: Callable[[str], str]) -> dict[str, set[str]]:
    """Who imports whom among what ``name_of`` makes of the modules."""
    graph: dict[str, set[str]] = {name_of(module): set() for module in MODULES}
    for module in MODULES:
        for imported in imports_of(module):
            package, _, target = imported.name.partition(".")
            if package == "microadam_dist" and name_of(target) != name_of(module):
                graph[name_of(module)].add(name_of(target))
    return graph


def test_imports_have_no_cycle() -> None:
    for name_of in (room_of, str):
        TopologicalSorter(arrows(name_of)).prepare()  # raises and names the cycle


def test_adapters_do_not_know_each_other() -> None:
    adapters = {f"engines.{name}" for name in ("deepspeed", "fsdp1", "fsdp2", "local", "replicated")}
    files = arrows(str)
    assert adapters < files["engines.find"]
    assert not any(files[adapter] & adapters for adapter in adapters)


def test_arrows_between_rooms_are_few() -> None:
    num_arrows = sum(map(len, arrows(room_of).values()))
    print(f"{num_arrows} arrows between rooms")
    assert num_arrows <= MAX_ROOM_ARROWS


def test_table_names_what_is_there() -> None:
    """A rule for a room that is gone, or for an import that nobody needs, is in the way."""
    rooms = {room_of(module) for module in MODULES} - {""}
    assert rooms <= ALLOWED.keys() <= {*MODULES}
    files = arrows(str)
    for room, names in ALLOWED.items():
        modules = [module for module in MODULES if room in (module, room_of(module))]
        imported = {target for module in modules for target in files[module]}
        assert names - {""} <= imported | {room_of(target) for target in imported}, room


def test_the_reader_sees_every_kind_of_import() -> None:
    """Else the rules above would hold for nothing."""
    seen = {module: {imported.name for imported in imports_of(module)} for module in MODULES}
    assert "microadam_dist.errors" in seen["config"]  # from .errors import ConfigError
    assert "microadam_dist.config" in seen["backends.base"]  # from ..config import MicroAdamConfig
    assert "microadam_dist.deepspeed" in seen[""]  # from . import deepspeed
    assert "torch.distributed" in seen["engines.deepspeed"]  # import torch.distributed as dist
    lazy = {imported.name for imported in imports_of("engines.deepspeed") if imported.is_lazy}
    assert any(name.startswith("deepspeed.") for name in lazy)


WITHOUT_OPTIONAL_PACKAGES = """
import sys

class NotInstalled:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {"accelerate", "cuda", "datasets", "deepspeed", "transformers"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotInstalled)
sys.modules["numpy"] = None  # the same; torch asks for its spec when it is installed
import microadam_dist, torch
param = torch.nn.Parameter(torch.ones(64, 64))
param.grad = torch.ones_like(param)
optimizer = microadam_dist.MicroAdam([param])
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
print("done")
"""


def test_package_needs_torch_alone() -> None:
    """Import, one step and a state dict, where nothing optional is installed."""
    run = subprocess.run([sys.executable, "-c", WITHOUT_OPTIONAL_PACKAGES], capture_output=True, text=True)
    assert run.stdout == "done\n", run.stderr


def test_import_alone_loads_no_optional_package() -> None:
    """All of them are installed where the tests run; loading DeepSpeed takes seconds and prints."""
    script = "import sys, torch; before = {*sys.modules}; import microadam_dist; print(*{*sys.modules} - before)"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert not {*ANYWHERE, *LAZILY} & {name.partition(".")[0] for name in loaded}
