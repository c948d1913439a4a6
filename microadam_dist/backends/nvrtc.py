"""The CUDA kernels compiled at first use by NVRTC, through ``cuda.core``, and cached on disk. No toolkit is needed."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..errors import BackendUnavailableError
from . import __path__ as _FOLDERS
from .cuda_installation import install_command

SOURCE_NAME = "microadam.cu"
T = TypeVar("T")


def source_folder() -> Path:
    """The folder with the CUDA sources: that of the checkout, else what was installed with the package.

    Raises:
        BackendUnavailableError: They are not there.
    """
    candidates = [Path(__file__).parents[2] / "csrc" / "cuda", *(Path(folder, "cuda_sources") for folder in _FOLDERS)]
    for candidate in candidates:
        if (candidate / SOURCE_NAME).exists():
            return candidate
    raise BackendUnavailableError('backend="cuda": the CUDA sources are not installed. Reinstall microadam-dist.')


def cache_folder() -> Path:
    """Where compiled kernels are kept; the environment variable ``MICROADAM_CACHE_DIR`` names another place."""
    override = os.environ.get("MICROADAM_CACHE_DIR")
    if override:
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "microadam_dist")


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """Version of the compiler.

    Raises:
        BackendUnavailableError: It cannot be loaded; says what to install.
    """
    try:
        import cuda.core
        from cuda.bindings import nvrtc

        if not hasattr(cuda.core, "Program"):
            raise ImportError(f"cuda-core {cuda.core.__version__} is too old")
        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as error:
        raise BackendUnavailableError(
            f'backend="cuda": NVRTC, which compiles the kernel, cannot be used ({" ".join(str(error).split())}). '
            f'{install_command(torch.version.cuda)}; or use backend="reference".'
        ) from error
    return major, minor


def compile_kernel(macros: Mapping[str, str | int], arch: str) -> bytes:
    """The kernel as a cubin, from the cache if it is there.

    Ranks that compile the same kernel at once do not disturb each other: a file appears when it is complete.

    Args:
        macros: Those of ``settings.cuh`` without their prefix.
        arch: ``"sm_90"`` and the like.

    Raises:
        BackendUnavailableError: NVRTC is missing or does not know the architecture.
    """
    path = cache_folder() / f"{_cache_key(macros, arch)}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        cubin, _ = compile_verbosely(macros, arch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            complete = Path(folder, path.name)
            complete.write_bytes(cubin)
            os.replace(complete, path)
    except OSError as error:
        warnings.warn(
            f"the compiled CUDA kernel cannot be kept in {path.parent} ({error}): every process compiles it again. "
            "Set MICROADAM_CACHE_DIR to a folder that can be written.",
            stacklevel=2,
        )
    return cubin


def compile_verbosely(macros: Mapping[str, str | int], arch: str, source: Path | None = None) -> tuple[bytes, str]:
    """The kernel as a cubin, and what the assembler says about its registers.

    Args:
        macros: See `compile_kernel`.
        arch: See `compile_kernel`.
        source: Another folder than `source_folder`.

    Raises:
        BackendUnavailableError: As `compile_kernel`.
    """
    version = nvrtc_version()
    from cuda.core import Program

    folder = source or source_folder()
    log = io.StringIO()
    options = compile_options(macros, arch, folder)
    program = (folder / SOURCE_NAME).read_text(encoding="utf-8")
    try:
        code = in_own_thread(lambda: Program(program, "c++", options).compile("cubin", logs=log).code)
    except Exception as error:  # cuda.core raises types of its own, which change
        raise BackendUnavailableError(
            f'backend="cuda": NVRTC {version[0]}.{version[1]} cannot compile the kernel for {arch}: {error}\n'
            f'{log.getvalue()}Update it, or use backend="reference".'
        ) from error
    return bytes(code), log.getvalue()


def in_own_thread(compile: Callable[[], T]) -> T:
    """What the function returns, called where it can do no harm to the caller.

    NVRTC before 13 leaves the thread that called it in the C locale, where Python opens text files as ASCII.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(compile).result()


def compile_options(macros: Mapping[str, str | int], arch: str, folder: Path) -> Any:
    """The ``cuda.core.ProgramOptions`` for the sources in a folder; ``macros`` and ``arch`` as for `compile_kernel`."""
    from cuda.core import ProgramOptions

    # The bits of the result are the contract: nothing fused, nothing flushed, exact division and square root.
    return ProgramOptions(
        name=SOURCE_NAME,
        arch=arch,
        std="c++17",
        device_as_default_execution_space=True,  # NVRTC before 13 takes a generic lambda for a host function
        fma=False,
        ftz=False,
        prec_div=True,
        prec_sqrt=True,
        include_path=str(folder),
        define_macro=[(f"MICROADAM_{name}", str(value)) for name, value in macros.items()],
        ptxas_options="-v",
    )


def _cache_key(macros: Mapping[str, str | int], arch: str) -> str:
    major, minor = nvrtc_version()
    parts = [arch, f"nvrtc {major}.{minor}", *(f"{name}={macros[name]}" for name in sorted(macros))]
    return hashlib.sha256("\n".join([source_hash(source_folder()), *parts]).encode()).hexdigest()[:32]


@functools.cache
def source_hash(folder: Path) -> str:
    """Hash of the CUDA sources and of the options they are compiled with, both of which lie in these files."""
    digest = hashlib.sha256()
    for path in [*sorted(folder.glob("*.cu*")), Path(__file__)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
