"""Who may import whom (architecture.md), read from the source; and `import microadam_dist` needs torch alone."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

import microadam_dist

PACKAGE = Path(microadam_dist.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}  # "" is the package itself, "backends" is backends/__init__.py

# Module -> modules of the package it may import. The first pattern that matches a module counts; a new module needs
# a line here. `CORE` computes everything that can be computed without torch.
CORE = "errors config layout scalars"
ALLOWED = {
    "errors": "",
    "config": CORE,
    "layout": CORE,
    "scalars": CORE,
    "planner*": f"{CORE} planner*",
    "window": "",
    "state": f"{CORE} window",
    "quantization": f"{CORE} state",
    "algorithm": f"{CORE} state quantization window",
    "backends.reference": f"{CORE} state algorithm backends.base backends.tensors",
    "backends*": f"{CORE} state backends*",
    "engines.base": "errors layout",
    "engines.deepspeed": "errors layout engines.base engines.deepspeed_sparse",
    "engines.deepspeed_sparse": "errors engines.changes",
    "engines.dtensor": "errors layout engines.base engines.rows",
    "engines.ddp": "errors layout engines.base engines.rows",
    "engines.row_exchange": f"{CORE} backends.base engines.base engines.changes engines.ddp",
    "engines*": "errors layout engines.base",
    "checkpoint*": f"{CORE} state quantization window checkpoint*",
    "diagnostics.metrics": f"{CORE} state algorithm window backends.base",
    "diagnostics*": f"{CORE} state quantization backends* diagnostics*",
    "bench*": f"{CORE} planner* backends.cpu optimizer diagnostics* bench*",
    "nonfinite": "",
    "sharded_optimizer": f"{CORE} state engines.base checkpoint.format checkpoint.match",
    "optimizer": f"{CORE} state backends.base backends.select engines.base diagnostics.metrics nonfinite"
    " sharded_optimizer",
    "cli": "_commands",
    "_commands": f"{CORE} planner* checkpoint* diagnostics* bench.commands",
    "gradient_release": "errors engines.base optimizer",
    "integrations*": "*",
    "sharded_state": f"{CORE} engines.base optimizer checkpoint.dcp",
    "deepspeed": "*",
    "": "*",
}

# What else may be imported, beside torch and the standard library: only inside functions, or anywhere in modules that
# are imported lazily themselves.
PLANNER = "planner planner.activations planner.engines planner.gpus planner.memory planner.shapes"
STANDARD_LIBRARY_ONLY = f"{CORE} {PLANNER} cli"
TORCH_DISTRIBUTED = "engines* checkpoint* diagnostics*"
ANYWHERE = {
    **dict.fromkeys(("typer", "rich"), "_commands planner.cli bench.commands"),
    "transformers": "integrations.hf",
}
LAZILY = {
    "deepspeed": "engines.deepspeed* checkpoint.deepspeed deepspeed",
    "accelerate": "integrations.*",
    "huggingface_hub": "planner.cli",
    "matplotlib": "planner.plot bench.plot diagnostics.report",
    "cuda": "backends.cuda backends.nvrtc",
    "numpy": "backends.cuda backends.cpu",
}


def matches(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())


class Import(NamedTuple):
    name: str  # "microadam_dist.layout", "torch.distributed"
    is_lazy: bool
    line: int


def imports_of(module: str) -> Iterator[Import]:
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

    yield from visit(ast.parse(path.read_text()), is_lazy=False)


def is_allowed(module: str, imported: Import) -> bool:
    top = imported.name.split(".")[0]
    if top == "microadam_dist":
        patterns = next(patterns for pattern, patterns in ALLOWED.items() if fnmatchcase(module, pattern))
        return matches(imported.name.removeprefix("microadam_dist").removeprefix("."), patterns)
    if top in sys.stdlib_module_names:
        return True
    if matches(module, STANDARD_LIBRARY_ONLY):
        return False
    if top == "torch":
        is_distributed = imported.name.startswith("torch.distributed")
        return not is_distributed or matches(module, TORCH_DISTRIBUTED)
    return matches(module, ANYWHERE.get(top, "")) or (imported.is_lazy and matches(module, LAZILY.get(top, "")))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module or "microadam_dist")
def test_module_imports_only_what_it_may(module: str) -> None:
    assert any(fnmatchcase(module, pattern) for pattern in ALLOWED), f"add a rule for {module}"
    wrong = [f"line {i.line}: {i.name}" for i in imports_of(module) if not is_allowed(module, i)]
    assert not wrong


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
