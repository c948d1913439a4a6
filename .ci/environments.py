"""Installs the package as strangers do, each way in a new environment of its own, and tries it there.

    .venv/bin/python .ci/environments.py --markdown launch/bench/results/INSTALL.md

For each Python that is found: from a wheel, an sdist, a checkout (editable) and a git URL, with and without a C++
compiler, beside torch alone: the oldest, or that of constraints.txt; then each extra on the Python that runs this.
Needs a network and 5 GB for each Python whose torch is a CUDA build.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TORCH = {"3.10": "2.6.0", "3.12": "2.11.0"}  # the oldest; the one that has run on a GPU; else that of the constraints
KINDS = ("wheel", "sdist", "sdist, no compiler", "editable", "git URL")
IMPORTS = {  # extra -> what it is for
    "deepspeed": "import microadam_dist.deepspeed, deepspeed",
    "cuda": "from cuda.core import Program",
    "cli": "import microadam_dist.cli.main",
    "bench": "import microadam_dist.planner.plot, matplotlib",
    "hf": "import microadam_dist.integrations.hf, datasets, tensorboard",
    "liger": "import importlib.metadata as m; m.version('liger-kernel')",
    "docs": "import mkdocs, material, mkdocstrings_handlers.python",
    "dev": "import pytest, hypothesis, mypy",
}
# One step of the CPU kernel, or of the reference where none could be built, and of the optimizer's state.
TRY = """
import json, torch
from microadam_dist import MicroAdam
from microadam_dist.backends.select import select_backend
def weights(backend):
    torch.manual_seed(0)
    model = torch.nn.Linear(512, 512)
    optimizer = MicroAdam(model.named_parameters(), backend=backend)
    for _ in range(3):
        model(torch.randn(4, 512)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
    return model.weight.detach()
auto, reference = weights("auto"), weights("reference")
try:
    select_backend("cpu")
    kernel = True
except Exception:
    kernel = False
same = torch.equal(auto, reference)
found = {"torch": torch.__version__, "torch_file": torch.__file__, "kernel": kernel, "same": same}
print(json.dumps(found))
"""


class Row(NamedTuple):
    """One environment."""

    python: str
    torch: str
    what: str
    kernel: str
    seconds: int
    fault: str  # empty: none


def main() -> None:
    """Print a line an environment; exit 1 if one is faulty."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="*", default=["3.10", "3.11", "3.12", "3.13"], help="versions")
    parser.add_argument("--extras", nargs="*", default=list(IMPORTS), help="without a value: none")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    args = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        for row in environments(Path(name), args.python, args.extras):
            rows.append(row)
            print(" | ".join(str(field) for field in row), flush=True)
    if args.markdown:
        args.markdown.write_text(markdown(rows), encoding="utf-8")
    sys.exit(any(row.fault for row in rows))


def environments(folder: Path, pythons: list[str], extras: list[str]) -> Iterator[Row]:
    """Install and try everything."""
    source = folder / "checkout"
    run("git", "clone", "--quiet", str(ROOT), str(source))
    run(sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(source))
    (wheel,), (sdist,) = folder.glob("dist/*.whl"), folder.glob("dist/*.tar.gz")
    paths = {
        "wheel": [wheel],
        "sdist": [sdist],
        "sdist, no compiler": [sdist],
        "editable": ["-e", source],
        "git URL": [f"git+file://{source}"],
    }
    hidden = without_compilers(folder / "bin")
    for version in pythons:
        python = find_python(version)
        if python is None:
            yield Row(version, "", "", "", 0, "not on this machine")
            continue
        base = make_base(folder / f"base-{version}", python, TORCH.get(version) or constrained("torch"))
        for kind in KINDS:
            no_compiler = kind == "wheel" or "no compiler" in kind
            path = hidden if no_compiler else os.environ["PATH"]
            yield attempt(folder / "layer", base, version, kind, [*map(str, paths[kind])], "", path, kind != KINDS[2])
        for extra in extras if python == find_python(current()) else ():
            requirement = ["-c", str(ROOT / ".ci" / "constraints.txt"), f"{wheel}[{extra}]"]
            yield attempt(
                folder / "layer",
                base,
                version,
                f"wheel[{extra}]",
                requirement,
                IMPORTS[extra],
                os.environ["PATH"],
                True,
            )
        shutil.rmtree(base)


def attempt(
    layer: Path, base: Path, version: str, what: str, install: list[str], imports: str, path: str, kernel: bool
) -> Row:
    """One way to install, over an environment that has torch and nothing else."""
    start = time.monotonic()
    shutil.rmtree(layer, ignore_errors=True)
    run(str(base / "bin" / "python"), "-m", "venv", str(layer))
    python = str(layer / "bin" / "python")
    (site,), (below,) = layer.glob("lib/python*/site-packages"), base.glob("lib/python*/site-packages")
    (site / "base.pth").write_text(f"{below}\n")
    environment = {**os.environ, "PATH": f"{layer / 'bin'}:{path}", "DS_BUILD_OPS": "0", "PYTHONPATH": ""}
    found, fault = {"torch": "", "kernel": None}, ""
    try:
        pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *install)
        run(*pip, env=environment, cwd=layer)
        found = json.loads(run(python, "-W", "ignore", "-c", TRY, env=environment, cwd=layer).splitlines()[-1])
        if imports:
            run(python, "-W", "ignore", "-c", imports, env=environment, cwd=layer)
        if not Path(found["torch_file"]).is_relative_to(base):
            fault = "torch was installed again"
        elif found["kernel"] is not kernel:
            fault = "no CPU kernel" if kernel else "a CPU kernel without a compiler"
        elif not found["same"]:
            fault = "the kernel's bits are not the reference's"
    except subprocess.CalledProcessError as error:
        fault = " ".join(f"{error.stdout}{error.stderr}".split())[-300:]
    seconds = round(time.monotonic() - start)
    return Row(version, found["torch"], what, "yes" if found["kernel"] else "no", seconds, fault)


def make_base(folder: Path, python: str, torch: str) -> Path:
    """An environment with torch."""
    run(python, "-m", "venv", str(folder))
    run(
        str(folder / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        f"torch=={torch}",
    )
    return folder


def constrained(name: str) -> str:
    """The version of the constraints."""
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{name}=="))


def current() -> str:
    """The version of the Python that runs this."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def find_python(version: str) -> str | None:
    """An interpreter of this version, on PATH or from pyenv."""
    if version == current():
        return sys._base_executable
    on_path = shutil.which(f"python{version}")
    candidates = [
        *(Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"),
        *([on_path] if on_path else []),
    ]
    for candidate in map(str, candidates):
        answer = subprocess.run(
            [candidate, "-c", "import sys; print(*sys.version_info[:2], sep='.')"], capture_output=True
        )
        if answer.stdout.decode().strip() == version:
            return candidate
    return None


def without_compilers(folder: Path) -> str:
    """A PATH with every program of this machine but compilers."""
    folder.mkdir()
    for place in os.environ["PATH"].split(":"):
        for program in Path(place).glob("*") if Path(place).is_dir() else ():
            link = folder / program.name
            if not any(name in program.name for name in ("gcc", "g++", "c++", "clang", "cc1")) and program.name != "cc":
                if not link.is_symlink() and ".pyenv" not in program.parts:
                    link.symlink_to(program)
    return str(folder)


def markdown(rows: list[Row]) -> str:
    """A page."""
    head = (
        "# Ways to install\n\n"
        "By `.venv/bin/python .ci/environments.py`: each in a new environment with torch alone; three steps, saved\n"
        "and loaded, have the bits of the reference backend. No way installs torch again.\n\n"
        "| Python | torch | from | CPU kernel | seconds | |\n|---|---|---|---|---|---|\n"
    )
    lines = [f"| {' | '.join(map(str, row[:-1]))} | {row.fault or 'right'} |\n" for row in rows]
    return head + "".join(lines)


def run(*command: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Standard output of a command that must succeed."""
    return subprocess.run(command, check=True, capture_output=True, encoding="utf-8", env=env, cwd=cwd).stdout


if __name__ == "__main__":
    main()
