"""DeepSpeed's MoE layers: which of a layer's experts this rank has.

In the module every expert-parallel rank calls its own experts 0, 1, ...; here, as in DeepSpeed's files, an expert is
called by its number in the whole layer. So names are unique over all ranks, and mean the same whatever the ``ep_size``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..layout import plain_fqn


class _Layer(NamedTuple):
    """The experts of one layer: the name in front of their number, and which of them are this rank's."""

    prefix: str
    own: range
    num_experts: int


def has_frozen_experts(module: Any) -> bool:
    """Whether an expert that only some ranks have is frozen in part."""
    from deepspeed.moe.layer import MoE

    layers = [layer for layer in module.modules() if isinstance(layer, MoE) and layer.ep_size > 1]
    return any(not param.requires_grad for layer in layers for param in layer.deepspeed_moe.experts.parameters())


class ExpertNames:
    """Names of a module's tensors over all ranks.

    Args:
        module: With DeepSpeed's process groups in its MoE layers, if it has any.
    """

    def __init__(self, module: Any) -> None:
        from deepspeed.moe.layer import MoE
        from deepspeed.utils import groups

        self._layers = []
        for name, layer in module.named_modules():
            if isinstance(layer, MoE):
                count = layer.num_local_experts
                first = groups._get_expert_parallel_rank(layer.expert_group_name) * count
                prefix = plain_fqn(f"{name}.deepspeed_moe.experts.deepspeed_experts.".removeprefix("."))
                self._layers.append(_Layer(prefix, range(first, first + count), layer.num_experts))

    def over_all_ranks(self, name: str) -> str:
        """The name, without what wrappers add, of a tensor that the module calls ``name`` on this rank."""
        name = plain_fqn(name)
        for layer, number, rest in self._split(name):
            return f"{layer.prefix}{layer.own[number]}{rest}"
        return name

    def is_elsewhere(self, name: str) -> bool:
        """Whether a tensor of that name, over all ranks, belongs to an expert that other ranks have."""
        return any(n < layer.num_experts and n not in layer.own for layer, n, _ in self._split(name))

    def _split(self, name: str) -> list[tuple[_Layer, int, str]]:
        """The layer, the number of the expert and the rest of the name; nothing for a tensor of no expert."""
        found = []
        for layer in self._layers:
            if name.startswith(layer.prefix):
                number, dot, rest = name.removeprefix(layer.prefix).partition(".")
                found.append((layer, int(number), dot + rest))
        return found
