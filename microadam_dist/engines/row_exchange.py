"""After a step with sharded state under DDP: how the ranks get the weights of the rows that other ranks have stepped.

    touched   each rank sends the weights that changed, see `changes`: at most window_size x density of them
    newest    the window of all rows is kept on every rank; each rank sends the Top-K of its rows, 4 bytes each, and
              every rank updates the other rows from the window, with the bits of the rank that has their gradient

Sent per parameter and step, bf16 weights: dense 2 bytes, touched 0.17 with the default settings and 0.18 with the
paper's (window 10, density 1 %), newest 0.04 with the paper's. ``newest`` costs the memory of the whole window (0.4
bytes per parameter) and the time to update all weights; it needs one, so a ``window_size`` above 1.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ..arithmetic.rounding import is_stochastic, step_key
from ..config import MicroAdamConfig
from ..errors import ConfigError
from ..layout import ShardSpan, StateLayout
from .base import ExchangedBytes, ExchangeSettings, Replay, Replayed, Rows, ShardState, Update, WeightExchange
from .changes import Decay, compare, exchange, pieces
from .cuts import row_shard
from .joins import require_no_join, watch_joins
from .replicated import ReplicatedShard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Parameters are exchanged together up to this many elements of one rank, to bound the temporaries.
COMM_BUCKET_NUMEL = 1 << 24


def make_exchange(settings: ExchangeSettings, counted: ExchangedBytes) -> WeightExchange | None:
    """How ranks that share the state of replicated parameters pass new weights on; None where they do not.

    Args:
        settings: Of the optimizer.
        counted: Counts what this rank sends.

    Raises:
        ConfigError: A setting is invalid, or there are no ranks.
    """
    if not settings.shards_state:
        return None
    names: dict[str | None, type[RowExchange]] = {"touched": TouchedExchange, "newest": NewestExchange}
    if settings.weight_exchange not in (None, *names):
        expected = " or ".join(map(repr, names))
        raise ConfigError(f"weight_exchange={settings.weight_exchange!r}: expected {expected}.")
    return names[settings.weight_exchange or "touched"](settings.shard_state, counted)


class RowExchange(ABC):
    """Makes parameters whole on every rank again; all ranks step together.

    Args:
        ranks: True for all, or a process group, or a mesh with one axis.
        counted: Counts what this rank sends.

    Raises:
        ConfigError: No such ranks.
    """

    def __init__(self, ranks: ShardState, counted: ExchangedBytes) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ConfigError(
                "shard_state is given, but torch.distributed is not initialized: there are no ranks to share the "
                "state. Construct MicroAdam after torch.distributed.init_process_group, or remove shard_state."
            )
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(ranks, DeviceMesh) and ranks.ndim != 1:
            raise ConfigError(f"shard_state={ranks}: expected a mesh with one axis, for example mesh['dp'].")
        if ranks is not True and not isinstance(ranks, dist.ProcessGroup | DeviceMesh):
            raise ConfigError(f"shard_state={ranks!r}: expected true, false, a process group or a DeviceMesh.")
        everyone = dist.group.WORLD
        assert everyone is not None  # it is initialized
        self._ranks: dist.ProcessGroup | DeviceMesh = everyone if ranks is True else ranks
        self._counted = counted
        self._meshes: dict[str, DeviceMesh] = {}
        self._agreed: set[Tensor] = set()  # parameters whose weights were equal on all ranks when the state was made
        watch_joins()

    def check(self, config: MicroAdamConfig) -> None:  # noqa: B027
        """Raise a ConfigError for settings that cannot be exchanged."""

    def mesh(self, device_type: str) -> DeviceMesh:
        """The ranks, for parameters on such a device."""
        if not isinstance(self._ranks, dist.ProcessGroup):
            return self._ranks
        if device_type not in self._meshes:
            from torch.distributed.device_mesh import DeviceMesh

            self._meshes[device_type] = DeviceMesh.from_group(self._ranks, device_type)
        return self._meshes[device_type]

    def forget(self, tensor: Tensor) -> None:
        """The state of a parameter was replaced."""
        self._agreed.discard(tensor)

    @property
    def replica_bytes(self) -> int:
        """Bytes of state kept of rows that other ranks step."""
        return 0

    def step(self, rows: Sequence[Rows], config: MicroAdamConfig, update: Update, replay: Replay) -> int | Tensor:
        """See `WeightExchange.step`."""
        if not rows:
            return 0
        require_no_join()
        self._require_agreement(rows, config)
        self._counted.dense += sum(row.shard.param.nbytes for row in rows)
        return sum(self._step_bucket(bucket, config, update, replay) for bucket in _comm_buckets(rows))

    @abstractmethod
    def _step_bucket(
        self, bucket: Sequence[Rows], config: MicroAdamConfig, update: Update, replay: Replay
    ) -> int | Tensor:
        """Step parameters of one dtype that have taken as many steps."""

    def _require_agreement(self, rows: Sequence[Rows], config: MicroAdamConfig) -> None:
        mesh, device = _shard(rows[0]).mesh, rows[0].tensor.device
        description = [f"settings {config}", *(self._describe(row) for row in rows)]
        checksum = torch.tensor([zlib.crc32("\n".join(description).encode())], device=device)
        if len(set(self._all_gather(checksum, mesh).flatten().tolist())) > 1:
            everyone: list[list[str]] = [[]] * mesh.size()
            dist.all_gather_object(everyone, description, group=mesh.get_group())
            mine, theirs = everyone[0], next(other for other in everyone if other != everyone[0])
            pairs = zip(mine, theirs, strict=False)
            first = next((pair for pair in pairs if pair[0] != pair[1]), (f"{len(mine)} parameters", f"{len(theirs)}"))
            raise ConfigError(
                f"shard_state: ranks {everyone.index(mine)} and {everyone.index(theirs)} are about to take different "
                f"steps: {first[0]} / {first[1]}. All ranks need the same parameters with a gradient, weights and "
                "settings; wrap the model in DistributedDataParallel before the first step, and load checkpoints and "
                "change the learning rate on all ranks alike."
            )
        self._agreed.update(row.tensor for row in rows)

    def _describe(self, row: Rows) -> str:
        text = f"{row.shard.name} {row.tensor.dtype} {tuple(row.tensor.shape)} after {row.step} steps"
        if row.tensor not in self._agreed:
            bits = row.tensor.detach().contiguous().view(-1).view(torch.uint8)
            text += f", sum of the bytes of its weights {int(bits.sum(dtype=torch.int64))}"
        return text

    def _all_gather(self, tensor: Tensor, mesh: DeviceMesh) -> Tensor:
        """The ranks' tensors (n,), stacked: (ranks, n)."""
        received = tensor.new_empty(mesh.size(), tensor.numel())
        if tensor.numel():
            # The newer name; torch 2.13 warns of the older one.
            all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            all_gather(received.view(-1), tensor, group=mesh.get_group())
        self._counted.sent += tensor.nbytes
        return received

    def _gather_rows(self, parts: Sequence[tuple[ReplicatedShard, Tensor]]) -> Iterator[tuple[int, list[Tensor]]]:
        """What other ranks have in the place of these tensors.

        Args:
            parts: Parameters, and something about each row that this rank steps: (rows, n).

        Yields:
            The number of another rank, and its tensors: (rows it steps, n).
        """
        mesh = parts[0][0].mesh
        lengths = [
            [_num_rows(shard, rank) * part.shape[1] * part.element_size() for shard, part in parts]
            for rank in range(mesh.size())
        ]
        message = torch.cat([part.reshape(-1).view(torch.uint8) for _, part in parts])
        # Neither gloo nor NCCL gathers tensors of different lengths.
        padded = torch.nn.functional.pad(message, (0, max(map(sum, lengths)) - len(message)))
        received = self._all_gather(padded, mesh)
        for rank in range(mesh.size()):
            if rank != mesh.get_local_rank():
                split = torch.split(received[rank, : sum(lengths[rank])], lengths[rank])
                yield (
                    rank,
                    [
                        nbytes.clone().view(part.dtype).view(_num_rows(shard, rank), part.shape[1])  # clone: aligned
                        for nbytes, (shard, part) in zip(split, parts, strict=True)
                    ],
                )

    def _gather_weights(self, shards: Sequence[ReplicatedShard]) -> None:
        """Take over the rows that other ranks have stepped."""
        for rank, weights in self._gather_rows([(shard, _matrix(shard.param)) for shard in shards]):
            for shard, theirs in zip(shards, weights, strict=True):
                _write(shard.rows_of(rank), theirs)


class TouchedExchange(RowExchange):
    """Sends the weights that changed."""

    def _step_bucket(
        self, bucket: Sequence[Rows], config: MicroAdamConfig, update: Update, replay: Replay
    ) -> int | Tensor:
        shards = [_shard(row) for row in bucket]
        mesh, own = shards[0].mesh, shards[0].rank
        shares = [_flat(shards, rank) for rank in range(mesh.size())]
        spans = [_flat_spans(shards, rank) for rank in range(mesh.size())]
        num_skipped = update([row.tensor for row in bucket])
        new = _flat(shards, own)
        key = step_key(config.seed, bucket[0].step) if is_stochastic(config.rounding, new.dtype) else None
        decay = Decay(1 - config.lr * config.weight_decay, key)
        longest = max(share.nbytes for share in shares)  # what a dense gather would send
        compared = ((shares[own][piece], new[piece]) for piece in pieces(len(new)))
        message = compare(compared, decay, spans[own], longest)
        if exchange(message, shares, spans, own, lambda tensor: self._all_gather(tensor, mesh)):
            for rank, share in enumerate(shares):
                if rank != own:
                    rows = [shard.rows_of(rank) for shard in shards]
                    for mine, theirs in zip(rows, torch.split(share, [r.numel() for r in rows]), strict=True):
                        _write(mine, theirs)
        else:
            self._gather_weights(shards)
        return num_skipped


class NewestExchange(RowExchange):
    """Sends the newest slot of the window, from which every rank updates the weights."""

    def __init__(self, ranks: ShardState, counted: ExchangedBytes) -> None:
        super().__init__(ranks, counted)
        self._replicas: dict[Tensor, Replica] = {}

    def check(self, config: MicroAdamConfig) -> None:
        """The newest slot must be stored."""
        if config.window_size == 1:
            raise ConfigError(
                "weight_exchange='newest' sends the newest slot of the window, and window_size=1 stores none: use "
                "weight_exchange='touched', which needs no more bytes there."
            )

    def forget(self, tensor: Tensor) -> None:
        """See `RowExchange.forget`."""
        super().forget(tensor)
        self._replicas.pop(tensor, None)

    @property
    def replica_bytes(self) -> int:
        """See `RowExchange.replica_bytes`."""
        return sum(part.nbytes for replica in self._replicas.values() for part in replica.window.values())

    def _step_bucket(
        self, bucket: Sequence[Rows], config: MicroAdamConfig, update: Update, replay: Replay
    ) -> int | Tensor:
        shards = [_shard(row) for row in bucket]
        sparse = [row for row in bucket if row.window]
        dense = [_shard(row) for row in bucket if not row.window]
        replicas = self._find_replicas(sparse)
        num_skipped = update([row.tensor for row in bucket])
        parts = [
            (_shard(row), part) for row in sparse for part in newest_slot(row.layout, row.window, row.step).values()
        ]
        parts += [(shard, _matrix(shard.param)) for shard in dense]
        for rank, received in self._gather_rows(parts):
            theirs = iter(received)
            for row, replica in zip(sparse, replicas, strict=True):
                replica.store_slot(rank, row, theirs)
            for shard, weights in zip(dense, theirs, strict=True):
                _write(shard.rows_of(rank), weights)
        skipped = torch.as_tensor(num_skipped, device=shards[0].tensor.device).view(1)
        if self._all_gather(skipped, shards[0].mesh).any():  # the weights of a skipped block do not follow its window
            self._gather_weights([_shard(row) for row in sparse])
        else:
            rows = zip(sparse, replicas, strict=True)
            replay([Replayed(row.tensor, replica.window, replica.layout, row.step) for row, replica in rows])
        return num_skipped

    def _find_replicas(self, rows: Sequence[Rows]) -> list[Replica]:
        """The windows of other ranks' rows; fetched where the state was loaded since the last step."""
        unknown = [row for row in rows if row.tensor not in self._replicas]
        self._replicas |= {row.tensor: Replica(row) for row in unknown}
        loaded = [row for row in unknown if row.step]
        if loaded:
            parts = [(_shard(row), part) for row in loaded for part in row.window.values()]
            for rank, received in self._gather_rows(parts):
                theirs = iter(received)
                for row in loaded:
                    replica = self._replicas[row.tensor]
                    for name in row.window:
                        replica.window[name][replica.row_slice(rank)] = next(theirs)
        return [self._replicas[row.tensor] for row in rows]


class Replica:
    """The window of all rows of a parameter but this rank's own.

    Attributes:
        layout: Of the rows before and after this rank's own.
        window: Its tensors for those rows, (rows, n).
    """

    def __init__(self, row: Rows) -> None:
        self._shard = _shard(row)
        (own,) = row.shard.spans
        end = own.start + own.numel
        before = ShardSpan(own.fqn, own.global_shape, 0, own.start)
        after = ShardSpan(own.fqn, own.global_shape, end, own.global_numel - end, offset=end)
        self.layout = StateLayout((before, after), row.layout.config)
        num_rows = row.tensor.shape[0] - _num_rows(self._shard, self._shard.rank)
        self.window = {name: part.new_zeros(num_rows, part.shape[1]) for name, part in row.window.items()}

    def row_slice(self, rank: int) -> slice:
        """Where the rows of another rank are."""
        rows = self._shard.row_slice(rank)
        passed = _num_rows(self._shard, self._shard.rank) if rank > self._shard.rank else 0
        return slice(rows.start - passed, rows.stop - passed)

    def store_slot(self, rank: int, row: Rows, parts: Iterator[Tensor]) -> None:
        """Put what `newest_slot` gives on another rank, part after part, in its place."""
        for name, columns in _slot_columns(row.layout, self.window, row.step).items():
            self.window[name][self.row_slice(rank)][:, columns] = next(parts)


def newest_slot(layout: StateLayout, window: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
    """What the step after ``step`` others has stored in each of the window's tensors: (rows, of a row's slots)."""
    return {name: window[name][:, columns] for name, columns in _slot_columns(layout, window, step).items()}


def _slot_columns(layout: StateLayout, window: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
    device = window["indices"].device
    columns = layout.slot_columns(step % layout.config.window_size)
    return {
        name: torch.cat([torch.arange(part.start, part.stop, device=device) for part in parts])
        for name, parts in columns.items()
    }


def _comm_buckets(rows: Sequence[Rows]) -> Iterator[list[Rows]]:
    """Parameters of one dtype and step, in order, up to `COMM_BUCKET_NUMEL` together; the same on all ranks."""
    for kind in dict.fromkeys((row.tensor.dtype, row.step) for row in rows):
        bucket: list[Rows] = []
        numel = 0
        for row in rows:
            if (row.tensor.dtype, row.step) == kind:
                most = _shard(row).rows_of(0).numel()  # no rank has more rows than the first
                if bucket and numel + most > COMM_BUCKET_NUMEL:
                    yield bucket
                    bucket, numel = [], 0
                bucket.append(row)
                numel += most
        yield bucket


def _shard(row: Rows) -> ReplicatedShard:
    assert isinstance(row.shard, ReplicatedShard)  # nothing else is exchanged
    return row.shard


def _flat(shards: Sequence[ReplicatedShard], rank: int) -> Tensor:
    """A copy of the rows a rank steps, one parameter after the other."""
    return torch.cat([shard.rows_of(rank).reshape(-1) for shard in shards])


def _flat_spans(shards: Sequence[ReplicatedShard], rank: int) -> list[ShardSpan]:
    """What `_flat` holds."""
    spans: list[ShardSpan] = []
    for shard in shards:
        (span,) = row_shard(shard.name, tuple(shard.tensor.shape), shard.mesh.size(), rank).spans
        spans.append(replace(span, offset=spans[-1].offset + spans[-1].numel if spans else 0))
    return spans


def _matrix(rows: Tensor) -> Tensor:
    """(rows, ...) as (rows, n)."""
    return rows.reshape(len(rows), math.prod(rows.shape[1:]))


def _write(rows: Tensor, weights: Tensor) -> None:
    """In place: rows of a parameter, in whatever order they lie in memory."""
    rows.copy_(weights.view(rows.shape))


def _num_rows(shard: ReplicatedShard, rank: int) -> int:
    return len(range(shard.tensor.shape[0])[shard.row_slice(rank)])
