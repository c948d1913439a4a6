"""Memory of common GPUs, and which of them a job fits."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30

# What a process needs beside its tensors: the CUDA context with its kernels, cuBLAS workspaces and NCCL buffers, and
# what the caching allocator cannot use between its blocks. Assumptions, not measurements.
CONTEXT_BYTES = int(0.75 * GIB)
FRAGMENTATION = 0.03


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        names: Boards with this memory.
        nominal_gb: Its class, as sold.
        gib: What PyTorch reports as "total capacity" in its out-of-memory messages, the smallest of the boards: less
            than the nominal size, which counts what ECC and the driver take.
        bf16: Whether it trains in it.
    """

    names: str
    nominal_gb: int
    gib: float
    bf16: bool = True

    @property
    def num_bytes(self) -> int:
        """The capacity."""
        return int(self.gib * GIB)


GPUS = (
    Gpu("RTX 3070, RTX 4060", 8, 7.60),
    Gpu("RTX 3060, RTX 4070", 12, 11.49),
    Gpu("T4", 16, 14.56, bf16=False),
    Gpu("V100, RTX 4080", 16, 15.57),
    Gpu("A10, L4", 24, 22.03),
    Gpu("RTX 3090, RTX 4090", 24, 23.64),
    Gpu("V100, RTX 5090", 32, 31.36),
    Gpu("A100", 40, 39.38),
    Gpu("A40, L40S", 48, 44.34),
    Gpu("RTX A6000, RTX 6000 Ada", 48, 47.40),
    Gpu("A100, H100", 80, 79.10),
    Gpu("H20, GH200, RTX PRO 6000", 96, 94.50),
    Gpu("H200", 141, 139.72),
    Gpu("B200", 180, 178.35),
)


def needed_bytes(tensor_bytes: int) -> int:
    """What a GPU must have for a process with so many bytes of tensors at their peak."""
    return int(tensor_bytes * (1 + FRAGMENTATION)) + CONTEXT_BYTES


def smallest_gpu(tensor_bytes: int) -> Gpu | None:
    """The smallest GPU that a process with so many bytes of tensors fits, or None if there is none."""
    return next((gpu for gpu in GPUS if needed_bytes(tensor_bytes) <= gpu.num_bytes), None)
