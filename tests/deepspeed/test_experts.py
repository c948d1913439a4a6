"""DeepSpeed's MoE layers: every rank has other experts, called 0, 1, ... on each of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import microadam_dist
from microadam_dist import CheckpointMismatchError, ConfigError
from microadam_dist.arithmetic.state import flatten_state
from microadam_dist.checkpoint.deepspeed import read_checkpoint
from microadam_dist.checkpoint.deepspeed_reshard import reshard_checkpoint
from microadam_dist.checkpoint.reshard import Resharder, SourceShard
from microadam_dist.engines.deepspeed import module_tensors
from tests.checkpoint.blocks import assert_same, blocks, dense
from tests.deepspeed.engines import base_optimizer, initialize, make_config
from tests.ranks import run_ranks

pytestmark = pytest.mark.deepspeed
SAVED_AT, END = 3, 5
WIDTH = 72
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
CASES: dict[str, tuple[int, torch.dtype, dict[str, Any]]] = {
    "zero0-fp32": (0, torch.float32, {}),
    "zero1-fp32": (1, torch.float32, {}),
    "zero2-fp32": (2, torch.float32, {}),
    "zero0-bf16": (0, torch.bfloat16, {"gradient_clipping": 0.1}),
    "zero1-bf16": (1, torch.bfloat16, {}),
    "zero2-bf16": (2, torch.bfloat16, {"gradient_clipping": 0.1}),
    "zero1-bf16-fp32-sums": (1, torch.bfloat16, FP32_SUMS),
}


class Layers(nn.Module):
    """Two MoE layers, of which a rank has one expert and two, between dense layers; each expert begins differently."""

    def __init__(self, ep_size: int, seed: int) -> None:
        from deepspeed.moe.layer import MoE

        torch.manual_seed(seed)
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        moe = [
            MoE(WIDTH, nn.Linear(WIDTH, WIDTH), num_experts, ep_size, min_capacity=4, use_rts=False)
            for num_experts in (2, 4)
        ]
        self.moe = nn.ModuleList(moe)
        self.register_buffer("scale", torch.full((1,), float(seed)))
        with torch.no_grad():
            for param in self.moe.parameters():
                if not getattr(param, "allreduce", True):  # the ranks that have the same expert get those of the first
                    param.mul_(1 + 0.1 * (dist.get_rank() % ep_size))

    def forward(self, x: Tensor) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32)
        for moe in self.moe:
            x, auxiliary, _ = moe(torch.tanh(self.first(x)))
            loss = loss + x.float().pow(2).mean() + auxiliary.float()
        return loss


def _engine(case: str, *, ep_size: int = 2, seed: int = 0, frozen: bool = False) -> Any:
    from deepspeed.comm import init_distributed

    microadam_dist.deepspeed.disable_shm_allreduce()
    init_distributed("gloo")
    stage, dtype, extra = CASES[case]
    model = Layers(ep_size, seed)
    for name, param in model.named_parameters():
        param.requires_grad_(not (frozen and "moe.1" in name and "experts" in name))
    return initialize(model, make_config(stage, dtype, **extra), model_parameters=list(model.parameters()))


def _train(engine: Any, first: int, end: int) -> None:
    generator = torch.Generator().manual_seed(dist.get_rank())
    inputs = [torch.randn(16, WIDTH, generator=generator) for _ in range(end)]
    for x in inputs[first:]:
        engine.backward(engine(x.to(next(engine.module.parameters()))))
        engine.step()


def _snapshot(engine: Any) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The module's tensors by their names over all ranks; master weights and state of each local tensor."""
    sharded = base_optimizer(engine).sharded
    weights = {name: tensor.detach().clone() for name, tensor in module_tensors(engine).items()}
    local = []
    for p in sharded.layouts():
        state = sharded.flat_state(p) or {}
        local.append({"master": p.detach().clone(), **{name: tensor.clone() for name, tensor in state.items()}})
    return weights, local


def _same(got: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return torch.equal(got, expected)
    keys = expected if isinstance(expected, dict) else range(len(expected))
    return len(got) == len(expected) and all(_same(got[key], expected[key]) for key in keys)


# ---------------------------------------------------------------- the same ranks


def _save(rank: int, world_size: int, folder: str) -> None:
    for case, frozen in [*((case, False) for case in CASES), ("zero0-fp32", True), ("zero1-bf16", True)]:
        engine = _engine(case, frozen=frozen)
        _train(engine, 0, SAVED_AT)
        path = Path(folder, f"{case}-frozen" if frozen else case)
        engine.save_checkpoint(str(path), client_state={"epoch": 3})
        then = _snapshot(engine)
        _train(engine, SAVED_AT, END)
        torch.save((then, _snapshot(engine)), path / f"snapshot{rank}.pt")
        engine.destroy()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved-by-2-ranks")
    run_ranks(_save, 2, str(folder))
    return folder


def _resume(rank: int, world_size: int, folder: str) -> None:
    for path in sorted(Path(folder).iterdir()):
        case, frozen = path.name.removesuffix("-frozen"), path.name.endswith("-frozen")
        then, end = torch.load(path / f"snapshot{rank}.pt")
        for elastically in (True, False):
            engine = _engine(case, seed=1, frozen=frozen)
            if elastically:
                _, client_state = microadam_dist.deepspeed.load_checkpoint(engine, path)
                assert client_state == {"epoch": 3}
            else:
                engine.load_checkpoint(str(path))
            assert _same(_snapshot(engine), then), f"{path.name}, {elastically=}: another state"
            _train(engine, SAVED_AT, END)
            assert _same(_snapshot(engine), end), f"{path.name}, {elastically=}: goes on in another way"
            engine.destroy()


def test_every_rank_gets_its_own_experts_and_goes_on_bit_for_bit(saved: Path) -> None:
    run_ranks(_resume, 2, str(saved))


def test_names_are_unique_over_all_ranks(saved: Path) -> None:
    experts = [
        f"moe.{i}.deepspeed_moe.experts.deepspeed_experts.{n}.weight" for i, n in ((0, 2), (1, 4)) for n in range(n)
    ]
    for case in CASES:
        (first, *_), (second, *_) = (torch.load(saved / case / f"snapshot{rank}.pt")[0] for rank in (0, 1))
        assert [name in first for name in experts] == [True, False, True, True, False, False]
        assert [name in second for name in experts] == [False, True, False, False, True, True]
        weights = [(first.get(name), second.get(name)) for name in experts]
        stacked = torch.stack([a if a is not None else b for a, b in weights])
        assert len(stacked.unique(dim=0)) == len(experts)


# ---------------------------------------------------------------- other ranks


def _move(rank: int, world_size: int, folder: str, ep_size: int, moves: list[tuple[str, str]]) -> list[Any]:
    results = []
    for source, case in moves:
        engine = _engine(case, ep_size=ep_size, seed=1)
        microadam_dist.deepspeed.load_checkpoint(engine, f"{folder}/{source}")
        optimizer = base_optimizer(engine)
        loaded = [
            SourceShard(layout, flatten_state(optimizer.state[p]), p.detach().flatten().clone(), "")
            for p, layout in optimizer.sharded.layouts().items()
            if p in optimizer.state
        ]
        state = {name: {n: t.clone() for n, t in block.items()} for name, block in blocks(loaded).items()}
        results.append((_snapshot(engine)[0], state, dense(loaded)))
        _train(engine, SAVED_AT, END)
        engine.destroy()
    return results


@pytest.mark.parametrize(
    "world_size, ep_size, moves",
    [
        (1, 1, [("zero1-fp32", "zero1-fp32"), ("zero0-bf16", "zero2-bf16")]),
        (2, 1, [("zero0-fp32", "zero0-fp32"), ("zero2-bf16", "zero1-bf16-fp32-sums")]),
        (4, 2, [("zero2-fp32", "zero2-fp32"), ("zero0-fp32-frozen", "zero0-fp32")]),
    ],
    ids=["one rank", "two ranks with all experts", "four ranks"],
)
def test_experts_move_to_other_ranks(world_size: int, ep_size: int, moves: list[tuple[str, str]], saved: Path) -> None:
    all_results = run_ranks(_move, world_size, str(saved), ep_size, moves)
    for index, (source, case) in enumerate(moves):
        sources = read_checkpoint(saved / source).sources()
        resharder = Resharder(sources)
        ranks = [results[index] for results in all_results]
        assert {name for tensors, _, _ in ranks for name in tensors} == set(resharder.shapes)
        for name in resharder.shapes:
            whole = resharder.whole(name)
            for tensors in (tensors for tensors, _, _ in ranks if name in tensors):
                assert torch.equal(tensors[name], whole.to(tensors[name].dtype)), f"{source} -> {case}: {name}"
        stepped = [shard for shard in sources if shard.state is not None]
        theirs = blocks(stepped)
        moments = dense(stepped)
        ours = {key for _, state, _ in ranks for key in state}
        assert len(ours - theirs.keys()) <= 4 * world_size  # cut in another way
        assert CASES[case][0] or ours == theirs.keys()
        for _, state, own_moments in ranks:
            assert own_moments.items() <= moments.items()
            for key in state.keys() & theirs.keys():
                assert_same(state[key], theirs[key])
        assert {key for _, _, own_moments in ranks for key in own_moments} == moments.keys()


# ---------------------------------------------------------------- refusals


def _edit(path: Path, change: Any) -> None:
    states = torch.load(path, weights_only=False)
    change(states)
    torch.save(states, path)


def _name_locally(states: Any) -> None:
    """As versions did that took the names in the module."""
    tensors = states["optimizer_state_dict"]["base_optimizer_state"]["microadam"]["tensors"]
    for tensor in tensors.values():
        for before, after in (("moe.0", 1), ("moe.1", 2), ("moe.1", 3)):
            experts = f"{before}.deepspeed_moe.experts.deepspeed_experts."
            local = 0 if before == "moe.0" else after - 2
            tensor["spans"] = [
                (name.replace(f"{experts}{after}.", f"{experts}{local}."), *rest) for name, *rest in tensor["spans"]
            ]


def _change_a_replica(states: Any) -> None:
    state = next(state for state in states["optimizer"]["state"].values() if "codes" in state)
    state["codes"].view(-1)[0] ^= 1


def _mark_as_autoep(states: Any) -> None:
    states["ds_autoep_layers"] = [{"moe_layer_id": 0}]


# What is done to a file of a checkpoint, and what the error says
DAMAGES: dict[str, tuple[str, str, Any, str]] = {
    "expert": ("zero1-fp32", "layer_1_expert_3_mp_rank_00_model_states.pt", None, "layer_1_expert_3_mp_rank_00"),
    "optimizer of a rank": ("zero0-fp32", "expp_rank_1_mp_rank_00_optim_states.pt", None, "expp_rank_*"),
    "another replica": ("zero0-fp32", "expp_rank_1_mp_rank_00_optim_states.pt", _change_a_replica, "(codes)"),
    "local names": ("zero1-fp32", "zero_pp_rank_1_mp_rank_00_optim_states.pt", _name_locally, "under one name"),
    "AutoEP": ("zero1-fp32", "mp_rank_00_model_states.pt", _mark_as_autoep, "AutoEP"),
}


def _fail(rank: int, world_size: int, folder: str) -> dict[str, str]:
    messages = {}
    for case in ("zero0-fp32", "zero1-fp32"):
        engine = _engine(case, seed=1)
        _train(engine, 0, 1)
        before = _snapshot(engine)
        for damage in (damage for damage, (of, *_) in DAMAGES.items() if of == case):
            with pytest.raises(CheckpointMismatchError) as error:
                microadam_dist.deepspeed.load_checkpoint(engine, f"{folder}/{damage}")
            messages[damage] = str(error.value)
            assert _same(_snapshot(engine), before), f"{damage}: the engine was changed"
        engine.destroy()
    with pytest.raises(ConfigError) as refusal:
        _engine("zero2-bf16", frozen=True)
    return {**messages, "frozen": str(refusal.value)}


def test_what_cannot_be_restored_is_refused_on_every_rank_and_changes_nothing(saved: Path, tmp_path: Path) -> None:
    for damage, (case, file, change, _) in DAMAGES.items():
        path = tmp_path / damage / f"global_step{SAVED_AT}" / file
        shutil.copytree(saved / case, tmp_path / damage)
        if change is None:
            path.unlink()
        else:
            _edit(path, change)
    for messages in run_ranks(_fail, 2, str(tmp_path)):
        for damage, (*_, expected) in DAMAGES.items():
            assert expected in messages[damage]
        # DeepSpeed's own load would mix them up.
        assert "zero_optimization.stage = 2 with frozen experts" in messages["frozen"]


@pytest.mark.parametrize("case", ["zero0-fp32", "zero1-bf16"])
def test_experts_are_not_rewritten_offline(case: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatchError, match=r"experts .* microadam_dist\.deepspeed\.load_checkpoint"):
        reshard_checkpoint(saved / case, tmp_path / "target", 1)
    assert not (tmp_path / "target").exists()
