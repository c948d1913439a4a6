"""DDP with sharded state: both exchanges give the bits of one process, and the checkpoints are those of FSDP2."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from microadam_dist import ConfigError, MicroAdam, UnsupportedLayoutError
from microadam_dist.engines import changes, row_exchange
from tests.ranks import DEVICE, rank_device, run_ranks

from .checkpoints import DTYPES, END, SAVED_AT, Expected, check_loading, make, save
from .models import (
    SETTINGS,
    GivenGradients,
    assert_same,
    everything,
    gradients,
    inject,
    make_model,
    make_optimizer,
    message_of,
    shard,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

EXCHANGES = ["touched", "newest"]
NUM_STEPS, BAD_STEPS = 24, (3, 17)  # before the window has wrapped, and after


class Odd(GivenGradients):
    """With a number, a matrix that is not row-major, and a parameter that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.conv.weight.data = self.conv.weight.data.to(memory_format=torch.channels_last)
        self.unused = nn.Parameter(torch.randn(70, 64))

    def forward(self, grads: dict[str, Tensor]) -> Tensor:
        return super().forward(grads) + self.scale * grads["norm"][0]


def _odd(dtype: torch.dtype, **options: Any) -> tuple[nn.Module, MicroAdam]:
    torch.manual_seed(0)
    model = Odd().to(rank_device(), dtype)
    named = list(model.named_parameters())
    packed = {"packed_window": True, "window_size": 2, "density": 0.1, "weight_decay": 0.0}
    groups = [{"params": named[::2]}, {"params": named[1::2], **packed}]
    return model, MicroAdam(groups, **SETTINGS, **options)


def _step(model: nn.Module, optimizer: MicroAdam, step: int, dtype: torch.dtype, bad: bool = False) -> None:
    grads = gradients(step, dtype)
    if bad:  # in the rows of one rank only
        grads["embed"][60, 3] = torch.nan
    model(grads).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture(scope="module")
def plain() -> dict[torch.dtype, dict[str, Tensor]]:
    """Everything after all steps of one process."""
    results = {}
    for dtype in DTYPES:
        model, optimizer = _odd(dtype)
        for step in range(NUM_STEPS):
            _step(model, optimizer, step, dtype, bad=step in BAD_STEPS)
        results[dtype] = everything(optimizer)
    return results


@pytest.mark.filterwarnings("ignore:MicroAdam skipped")
@pytest.mark.parametrize("world_size", [2, 4])
def test_bits_of_one_process(world_size: int, plain: dict[torch.dtype, dict[str, Tensor]]) -> None:
    run_ranks(_bits, world_size, plain)


def _bits(rank: int, world_size: int, plain: dict[torch.dtype, dict[str, Tensor]]) -> None:
    if world_size == 2:  # several messages, of several pieces
        row_exchange.COMM_BUCKET_NUMEL = 5000
        changes.PIECE_NUMEL = 3001
    runs = itertools.product(EXCHANGES, DTYPES) if world_size == 2 else zip(EXCHANGES, DTYPES, strict=True)
    for exchange, dtype in runs:
        model, optimizer = _odd(dtype, shard_state=True, weight_exchange=exchange)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        for step in range(NUM_STEPS):
            _step(wrapped, optimizer, step, dtype, bad=step in BAD_STEPS)
        assert_same(everything(optimizer), plain[dtype])
        _check_equal_on_all_ranks(model)
        assert optimizer.num_nonfinite_blocks == (len(BAD_STEPS) if rank == world_size - 1 else 0)


def _check_equal_on_all_ranks(model: nn.Module) -> None:
    for param in model.parameters():
        weights = [
            torch.empty(param.shape, dtype=param.dtype, device=param.device) for _ in range(dist.get_world_size())
        ]
        dist.all_gather(weights, param.detach().contiguous())
        assert all(
            torch.equal(other.view(-1).view(torch.uint8), weights[0].view(-1).view(torch.uint8)) for other in weights
        )


# ---------------------------------------------------------------- bytes


def test_bytes_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    """With the default window and density and the paper's, on 2 ranks; also shown by ``-rP``."""
    (table, _) = run_ranks(_bytes, 2)
    print("bytes per parameter and step: dense, sent; state per parameter on a rank")
    for row in table:
        print("  {:8} window {:2} {:14} wd {:4}  {:5.3f}  {:5.3f}   {:5.3f}".format(*row))
    sent = {row[:4]: row[5] for row in table}
    for dtype in map(str, DTYPES):
        for decay in (0.0, 0.1):
            assert sent["newest", 10, dtype, decay] <= 0.06
            assert max(sent["touched", window_size, dtype, decay] for window_size in (1, 10)) <= 0.45


def _bytes(rank: int, world_size: int) -> list[tuple[Any, ...]]:
    table = []
    paper = MicroAdam.paper_defaults()
    for exchange, settings in (("touched", {}), ("touched", paper), ("newest", paper)):
        for dtype in DTYPES:
            for decay in (0.0, 0.1):
                torch.manual_seed(0)
                model = nn.Linear(1024, 512, bias=False).to(rank_device(), dtype)
                options = {"shard_state": True, "weight_exchange": exchange, **settings}
                optimizer = MicroAdam(model.named_parameters(), weight_decay=decay, **options)
                for step in range(30):
                    if step == 15:
                        before = optimizer.exchanged_bytes.sent, optimizer.exchanged_bytes.dense
                    model.weight.grad = torch.randn(512, 1024).to(model.weight)
                    optimizer.step()
                after = optimizer.exchanged_bytes.sent, optimizer.exchanged_bytes.dense
                numel = 15 * model.weight.numel() / world_size
                sent, dense = ((b - a) / numel for a, b in zip(before, after, strict=True))
                state = optimizer.state_bytes().sparse_bytes / model.weight.numel()
                window_size = optimizer.param_groups[0]["window_size"]
                table.append((exchange, window_size, str(dtype), decay, dense, sent, state))
    return table


# ---------------------------------------------------------------- checkpoints


def test_checkpoints_are_those_of_fsdp2(tmp_path: Path, expected: Expected, saved_by_one: Path) -> None:
    for dtype in DTYPES:
        (tmp_path / str(dtype)).mkdir()
    run_ranks(_save, 4, tmp_path, expected)
    run_ranks(_load, 3, tmp_path, expected, saved_by_one)
    for dtype in DTYPES:
        check_loading(tmp_path / str(dtype), dtype, expected, mesh=None)


def _save(rank: int, world_size: int, folder: Path, expected: Expected) -> None:
    for dtype in DTYPES:
        model, optimizer = make(dtype, exchange="touched")
        train(model, optimizer, range(SAVED_AT))
        assert_same(everything(optimizer), expected[dtype, SAVED_AT])
        save(folder / str(dtype), model, optimizer)
    check_loading(folder / str(dtype), dtype, expected, exchange="touched")


def _load(rank: int, world_size: int, folder: Path, expected: Expected, by_one: Path) -> None:
    for dtype in DTYPES:
        check_loading(folder / str(dtype), dtype, expected)  # FSDP2
        check_loading(folder / str(dtype), dtype, expected, exchange="touched")
    check_loading(by_one, torch.bfloat16, expected, exchange="touched")


def test_newest_after_loading(tmp_path: Path) -> None:
    run_ranks(_newest_after_loading, 3, tmp_path)


def _newest_after_loading(rank: int, world_size: int, folder: Path) -> None:
    """The window of the other ranks' rows is fetched, and whoever looks sees what is allocated."""
    own = {}
    for dtype in DTYPES:
        model, optimizer = make(dtype, exchange="newest")
        for start, end in ((0, SAVED_AT), (SAVED_AT, END)):
            train(model, optimizer, range(start, end))
            own[dtype, end] = everything(optimizer)
            if end == SAVED_AT:
                save(folder, model, optimizer)
        check_loading(folder, dtype, own, exchange="newest")
        dist.barrier()
    names = ("indices", "values", "scales")
    windows = [tensor for name, tensor in own[dtype, END].items() if name.endswith(names)]
    local = {name: [] for name in (*names, "others")}
    for state in optimizer.state.values():
        for name in state.keys() - {"step"}:
            local[name if name in names else "others"].append(state[name].to_local())
    held = optimizer.state_bytes()
    assert held.sparse_bytes + held.dense_bytes == sum(tensor.nbytes for tensor in windows + local["others"])


# ---------------------------------------------------------------- what is refused


def test_groups_and_meshes_and_what_is_refused() -> None:
    run_ranks(_refused, 4)


def _refused(rank: int, world_size: int) -> None:
    model, optimizer = make(torch.float32, mesh=None)
    train(model, optimizer, range(5))
    expected = everything(optimizer)
    mesh = dist.init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("other", "dp"))
    for ranks in (dist.group.WORLD, mesh["dp"], mesh["dp"].get_group()):
        model = make_model()
        optimizer = make_optimizer(model, shard_state=ranks)
        train(model, optimizer, range(5))
        assert_same(everything(optimizer), expected)
    assert "one axis" in message_of(ConfigError, lambda: MicroAdam(model.parameters(), shard_state=mesh))
    assert "'yes'" in message_of(ConfigError, lambda: MicroAdam(model.parameters(), shard_state="yes"))

    sharded = shard(make_model())
    optimizer = MicroAdam(sharded.named_parameters(), shard_state=True)
    inject(sharded, 0)
    assert "remove shard_state" in message_of(UnsupportedLayoutError, optimizer.step)

    # Ranks that would not do the same raise together, before anything is changed.
    for what in ("weights", "lr", "gradient", "step"):
        model = make_model()
        optimizer = MicroAdam(model.named_parameters(), **SETTINGS, shard_state=True)
        if what != "weights":
            train(model, optimizer, range(2))
        inject(model, 7)
        if rank == 1:
            if what == "weights":
                model.few.weight.data[0, 0] += 1
            elif what == "lr":
                optimizer.param_groups[0]["lr"] = 0.5
            elif what == "gradient":
                model.embed.weight.grad = None
            else:
                optimizer.state[model.few.weight]["step"] += 1
        before = everything(optimizer)
        message = message_of(ConfigError, optimizer.step)
        named = {"weights": "few.weight", "lr": "lr=0.5", "gradient": "embed.weight", "step": "after 3 steps"}
        assert "ranks 0 and 1" in message and named[what] in message, message
        if what != "weights":
            assert_same(everything(optimizer), before)


def test_settings() -> None:
    params = [nn.Parameter(torch.zeros(64, 64))]
    assert "not initialized" in message_of(ConfigError, lambda: MicroAdam(params, shard_state=True))
    assert "'dense'" in message_of(ConfigError, lambda: MicroAdam(params, weight_exchange="dense"))
    run_ranks(_window1, 1)


def _window1(rank: int, world_size: int) -> None:
    params = [nn.Parameter(torch.zeros(64, 64))]
    options = {"window_size": 1, "shard_state": True, "weight_exchange": "newest"}
    assert "'touched'" in message_of(ConfigError, lambda: MicroAdam(params, **options))


def _under_join(rank: int, world_size: int) -> None:
    model = DistributedDataParallel(make_model())
    optimizer = make_optimizer(model, shard_state=True)

    def step() -> None:
        optimizer.zero_grad()
        model(gradients(0)).backward()
        optimizer.step()

    step()
    before = everything(optimizer)
    with pytest.raises(ConfigError, match=r"does not work under ddp.join\(\)"):
        with model.join():
            for _ in range(2 + rank):  # uneven
                step()
    assert_same(everything(optimizer), before)
    with model.join(enable=False):
        step()
    step()


def test_uneven_inputs_raise_at_once() -> None:
    run_ranks(_under_join, 2)
