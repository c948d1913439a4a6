"""Where everything lies: spans of parameters, Top-K blocks on their grids, state sizes and offsets.

All offset, size and byte arithmetic of the package is here, in plain integers. Standard library only, so that the
planner predicts with the very code that allocates.

    parameter (global)   rows x row_numel, row-major                       BlockGrid
      span               a contiguous interval of it that a rank holds     ShardSpan
        band             consecutive rows of the span cut in the same way  (row intervals; at most 3 per span)
          run            rows x cols blocks of one length                  BlockRun
            block        Top-K unit, never crosses a row of the parameter; cut by a shard edge it is a fragment
              bucket     elements whose codes share one range or scale, never crosses a block
"""

from .grid import Band as Band
from .grid import BlockGrid as BlockGrid
from .grid import Segment as Segment
from .spans import ShardSpan as ShardSpan
from .spans import are_positions as are_positions
from .spans import plain_fqn as plain_fqn
from .state import (
    CODES_PER_BYTE as CODES_PER_BYTE,
)
from .state import (
    DENSE_TENSORS as DENSE_TENSORS,
)
from .state import (
    DTYPE_BYTES as DTYPE_BYTES,
)
from .state import (
    ERROR_TENSORS as ERROR_TENSORS,
)
from .state import (
    MAX_SCALED_BITS as MAX_SCALED_BITS,
)
from .state import (
    MIN_SAMPLED_BLOCKS as MIN_SAMPLED_BLOCKS,
)
from .state import (
    SPARSE_DTYPES as SPARSE_DTYPES,
)
from .state import (
    WINDOW_TENSORS as WINDOW_TENSORS,
)
from .state import (
    BlockRun as BlockRun,
)
from .state import (
    DenseRun as DenseRun,
)
from .state import (
    Extent as Extent,
)
from .state import (
    SampledRun as SampledRun,
)
from .state import (
    StateLayout as StateLayout,
)
from .state import (
    StateSize as StateSize,
)
from .state import (
    num_levels as num_levels,
)
from .state import (
    ternary_groups as ternary_groups,
)
