"""NVRTC compiles the kernels for every architecture, without a GPU; the cache on disk; what happens without them."""

from __future__ import annotations

import ctypes
import importlib.metadata
import locale
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from microadam_dist.backends import nvrtc
from microadam_dist.backends.cuda_launch import Shape, kernel_macros, launch_tables
from microadam_dist.backends.select import AutoBackend, select_backend
from microadam_dist.config import MicroAdamConfig
from microadam_dist.errors import BackendUnavailableError
from microadam_dist.layout import ShardSpan, StateLayout

from .cases import BF16, FP16, FP32

try:
    nvrtc.nvrtc_version()
except BackendUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
PAPER, MORE_KEPT, NO_WINDOW = ((10, 0.01), (2, 0.05), (1, 0.1))


def macros(
    shape: Shape,
    setting: tuple[int, float] = PAPER,
    dtypes: tuple[torch.dtype, torch.dtype] = (BF16, BF16),
    bucket_size: int = 64,
    packed_window: bool = False,
    ef_bits: float = 4,
) -> dict[str, str | int]:
    """For blocks that fill the shape."""
    numel = shape.capacity
    window_size, density = setting
    config = MicroAdamConfig(
        window_size=window_size,
        density=density,
        block_size=numel,
        bucket_size=bucket_size,
        packed_window=packed_window,
        ef_bits=ef_bits,
    )
    layout = StateLayout((ShardSpan("w", (64, numel), 0, 64 * numel),), config)
    (tables,) = launch_tables([layout], True, torch.device("cpu"))
    assert tables.shape == shape and tables.is_aligned and tables.length == numel
    return kernel_macros(tables, config, *dtypes)


SHAPES = [Shape(32), Shape(64), Shape(96), Shape(128), Shape(192), Shape(256), *(Shape(256, c) for c in (2, 4, 8))]
DEFAULT = Shape.for_blocks(4096)
COMPILED = [
    *((arch, macros(DEFAULT)) for arch in ARCHS),
    ("sm_90", macros(DEFAULT, MORE_KEPT)),
    *(("sm_90", macros(shape)) for shape in SHAPES if shape != DEFAULT),
    *(("sm_90", macros(DEFAULT, NO_WINDOW, dtypes)) for dtypes in ((FP32, FP32), (FP16, BF16), (BF16, BF16))),
    ("sm_90", {**macros(DEFAULT), "REPLAY": 1}),
    *(("sm_90", {**macros(DEFAULT, setting), "STOCHASTIC": 0}) for setting in (PAPER, NO_WINDOW)),
    *(("sm_90", macros(DEFAULT, setting, packed_window=True)) for setting in (PAPER, MORE_KEPT)),
    ("sm_90", macros(DEFAULT, (20, 1.0))),
    *(("sm_90", macros(DEFAULT, NO_WINDOW, ef_bits=bits)) for bits in (0, 1, 1.6, 2, 8)),
    ("sm_80", macros(DEFAULT, ef_bits=1.6)),
    ("sm_90", macros(DEFAULT, bucket_size=96)),  # buckets that fit no warp take the long way
]


def resources(log: str) -> dict[str, tuple[int, int]]:
    """Kernel -> registers of a thread and bytes it spills, from what the assembler prints."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        registers = re.search(r"Used (\d+) registers", part)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        assert registers and spills
        found[part.partition("'")[0]] = int(registers[1]), int(spills[1]) + int(spills[2])
    return found


def _name(value: str | dict[str, str | int]) -> str:
    return value if isinstance(value, str) else "-".join(map(str, value.values()))


@pytest.mark.parametrize(("arch", "macros"), COMPILED, ids=_name)
def test_fits_the_registers(arch: str, macros: dict[str, str | int]) -> None:
    _, log = nvrtc.compile_verbosely(macros, arch)
    assert "warning" not in log
    used = resources(log)
    assert used.keys() == {"microadam_step", "microadam_scalars"}
    registers, spilled = used["microadam_step"]
    # Rare kernels spill: of blocks above 16384, of buckets that fit no warp, and of fp32, a little.
    allowed = {"CHUNKS": 1024, "BUCKET_SIZE": 320, "PARAM": 32}
    usual = {"CHUNKS": (1, 2, 4), "BUCKET_SIZE": (64,), "PARAM": ("Bf16", "Fp16")}
    assert spilled <= sum(allowed[name] for name, values in usual.items() if macros[name] not in values)
    assert registers * int(macros["THREADS"]) * int(macros["MIN_BLOCKS"]) <= 65536
    assert registers <= {1: 64, 2: 128, 4: 255, 8: 255}[int(macros["CHUNKS"])]


# ---------------------------------------------------------------- the cache


def test_a_kernel_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROADAM_CACHE_DIR", str(tmp_path / "new" / "folder"))
    small = macros(SHAPES[0])
    cubin = nvrtc.compile_kernel(small, "sm_90")
    assert cubin.startswith(b"\x7fELF")
    (file,) = (tmp_path / "new" / "folder").iterdir()
    file.write_bytes(b"from the cache")
    assert nvrtc.compile_kernel(small, "sm_90") == b"from the cache"
    assert nvrtc.compile_kernel(small, "sm_80").startswith(b"\x7fELF")  # another architecture
    assert nvrtc.compile_kernel({**small, "BUCKET_SIZE": 32}, "sm_90").startswith(b"\x7fELF")  # other settings
    assert len(list(file.parent.iterdir())) == 3


def test_other_sources_have_another_hash(tmp_path: Path) -> None:
    for name in ("a.cuh", "microadam.cu"):
        (tmp_path / name).write_text("1")
    before = nvrtc.source_hash(tmp_path)
    (tmp_path / "a.cuh").write_text("2")
    nvrtc.source_hash.cache_clear()
    assert nvrtc.source_hash(tmp_path) != before


COMPILE = """
import sys
from microadam_dist.backends import nvrtc
sys.stdin.readline()  # all begin at once
sys.stdout.buffer.write(nvrtc.compile_kernel(eval(sys.argv[1]), "sm_90"))
"""


def test_processes_compile_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ranks do at their first step: each gets the whole kernel, and one complete file stays."""
    monkeypatch.setenv("MICROADAM_CACHE_DIR", str(tmp_path))
    command = [sys.executable, "-c", COMPILE, repr(macros(SHAPES[0]))]
    pipe = subprocess.PIPE
    ranks = [subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=Path(__file__).parents[2]) for _ in range(3)]
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write(b"\n")
        rank.stdin.flush()
    cubins = [rank.communicate()[0] for rank in ranks]
    (file,) = tmp_path.iterdir()
    assert all(cubin.startswith(b"\x7fELF") for cubin in cubins)
    assert file.read_bytes() in cubins


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MICROADAM_CACHE_DIR", str(tmp_path / "file" / "folder"))
    with pytest.warns(UserWarning, match="MICROADAM_CACHE_DIR"):
        assert nvrtc.compile_kernel(macros(SHAPES[0]), "sm_90").startswith(b"\x7fELF")


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MICROADAM_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert nvrtc.cache_folder() == Path("/somewhere/microadam_dist")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert nvrtc.cache_folder() == Path("/home/me/.cache/microadam_dist")


# ---------------------------------------------------------------- the compiler that older torches bring


@pytest.fixture(scope="module")
def nvrtc_12() -> ctypes.CDLL:
    """NVRTC as torch 2.6 to 2.10 have it, without the bindings, which look for one version alone."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvrtc-cu12") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("nvidia-cuda-nvrtc-cu12 is not installed")
    (library,) = (file.locate() for file in files if file.name == "libnvrtc.so.12")
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("setting", [PAPER, MORE_KEPT, NO_WINDOW], ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_compiles_with_cuda_12(arch: str, setting: tuple[int, float], nvrtc_12: ctypes.CDLL) -> None:
    folder = nvrtc.source_folder()
    options = nvrtc.compile_options(macros(DEFAULT, setting), arch, folder).as_bytes("nvrtc")
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    source = (folder / nvrtc.SOURCE_NAME).read_bytes()
    assert nvrtc_12.nvrtcCreateProgram(ctypes.byref(program), source, b"microadam.cu", 0, None, None) == 0
    arguments = program, len(options), (ctypes.c_char_p * len(options))(*options)
    encoding = locale.getpreferredencoding(False)
    status = nvrtc.in_own_thread(lambda: nvrtc_12.nvrtcCompileProgram(*arguments))
    assert locale.getpreferredencoding(False) == encoding
    assert nvrtc_12.nvrtcGetProgramLogSize(program, ctypes.byref(size)) == 0
    log = ctypes.create_string_buffer(size.value)
    assert nvrtc_12.nvrtcGetProgramLog(program, log) == 0
    assert status == 0, log.value.decode()
    found = resources(log.value.decode())
    assert found.keys() == {"microadam_scalars", "microadam_step"}
    assert nvrtc_12.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0 and size.value > 0
    nvrtc_12.nvrtcDestroyProgram(ctypes.byref(program))


# ---------------------------------------------------------------- what is missing is named


def test_an_unknown_architecture() -> None:
    with pytest.raises(BackendUnavailableError, match=r"NVRTC \d+\.\d+ cannot compile the kernel for sm_10"):
        nvrtc.compile_verbosely(macros(SHAPES[0]), "sm_10")


WITHOUT_CUDA_CORE = """
import sys
sys.modules["cuda.core"] = None
from microadam_dist.backends import nvrtc
from microadam_dist.errors import BackendUnavailableError
try:
    nvrtc.nvrtc_version()
except BackendUnavailableError as error:
    print(error)
"""


def test_cuda_core_is_missing() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_CUDA_CORE], capture_output=True, text=True, check=True)
    assert re.search(r"NVRTC.*cannot be used.*pip install 'cuda-core\[cu\d\d\]'", run.stdout), run.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_there_is_no_gpu() -> None:
    with pytest.raises(BackendUnavailableError, match='torch sees no CUDA device.*backend="auto"'):
        select_backend("cuda")
    auto = AutoBackend()
    with pytest.warns(UserWarning, match="slow reference backend on cuda:0.*torch sees no CUDA device"):
        assert auto.choose(torch.device("cuda", 0)).name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert auto.choose(torch.device("cuda", 0)).name == "reference"
    assert "no CUDA device" in auto.unavailable["cuda"]
