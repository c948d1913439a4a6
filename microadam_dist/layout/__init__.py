"""Where everything lies: spans of parameters, Top-K blocks on their grids, state sizes and offsets.

All offset, size and byte arithmetic of the package is here, in plain integers. Standard library only, so that the
planner predicts with the very code that allocates.

    parameter (global)   rows x row_numel, row-major                       BlockGrid
      span               a contiguous interval of it that a rank holds     ShardSpan
        band             consecutive rows of the span cut in the same way  (row intervals; at most 3 per span)
          run            rows x cols blocks of one length                  BlockRun
            block        Top-K unit, never crosses a row of the parameter; cut by a shard edge it is a fragment
              bucket     elements that share one quantization range, never crosses a block
"""

from .cuts import FlatShard, cut_each, cut_rows, cut_together, even_share, row_share
from .grid import Band, BlockGrid, Segment
from .spans import ShardSpan, plain_fqn
from .state import (
    DENSE_TENSORS,
    DTYPE_BYTES,
    ERROR_TENSORS,
    MIN_SAMPLED_BLOCKS,
    WINDOW_TENSORS,
    BlockRun,
    DenseRun,
    Extent,
    SampledRun,
    StateLayout,
    StateSize,
)

__all__ = [
    "DENSE_TENSORS",
    "DTYPE_BYTES",
    "ERROR_TENSORS",
    "MIN_SAMPLED_BLOCKS",
    "WINDOW_TENSORS",
    "Band",
    "BlockGrid",
    "BlockRun",
    "DenseRun",
    "Extent",
    "FlatShard",
    "SampledRun",
    "Segment",
    "ShardSpan",
    "StateLayout",
    "StateSize",
    "cut_each",
    "cut_rows",
    "cut_together",
    "even_share",
    "plain_fqn",
    "row_share",
]
