"""The ctypes structures that both fused kernels read: ``csrc/cpu/microadam_cpu.h``, ``csrc/cuda/launch.cuh``."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int64

from .. import layout
from ..arithmetic.rounding import shape_key
from ..arithmetic.scalars import StepScalars


class Extent(Structure):
    """`layout.Extent`."""

    _fields_ = [("start", c_int64), ("row_stride", c_int64), ("size", c_int64)]


class Place(Structure):
    """What the noise of stochastic rounding depends on, see `arithmetic.rounding`."""

    _fields_ = [("origin", c_int64), ("shape_key", c_int64)]


def place_of(span: layout.ShardSpan) -> Place:
    """Of the elements of a span, from their places in the local tensor."""
    return Place(span.origin, shape_key(span.global_shape))


EXTENT_FIELDS = [(name, Extent) for name in ("elements", *layout.StateSize._fields)]
"""Where the blocks of a run lie; the values are those of `extents_of`."""


def extents_of(run: layout.BlockRun) -> list[Extent]:
    """The `EXTENT_FIELDS` of a run."""
    return [Extent(extent.start, extent.row_stride, extent.size) for extent in run.extents]


_FLOAT_SCALARS = (
    *("lr", "eps", "decay", "grad_scale", "beta1", "beta2", "one_minus_beta1", "one_minus_beta2"),
    *("m_factor", "v_factor", "m_correction", "v_correction"),
)


class FloatScalars(Structure):
    """The numbers of `StepScalars` that are the same for every slot of the window; the kernels' scalars begin so."""

    _fields_ = [(name, c_float) for name in _FLOAT_SCALARS]


def float_values(scalars: StepScalars) -> list[float]:
    """The fields of `FloatScalars`."""
    return [getattr(scalars, name) for name in _FLOAT_SCALARS]
