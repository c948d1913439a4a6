"""Prints the README's memory table, computed by the layout arithmetic that allocates the state.

python launch/memory_table.py
"""

from microadam_dist.config import MicroAdamConfig
from microadam_dist.planner.memory import (
    ADAMW_8BIT_BYTES,
    ADAMW_BF16_BYTES,
    ADAMW_FP32_BYTES,
    LLAMAS,
    state_memory,
    whole_parameter_layouts,
)

SETTINGS = {
    "10, 0.01 (the paper's)": MicroAdamConfig(window_size=10, density=0.01),
    "2, 0.05": MicroAdamConfig(window_size=2, density=0.05),
    "1, 0.10 (no window stored)": MicroAdamConfig(window_size=1, density=0.1),
}


def main() -> None:
    """Print one row an optimizer, one column a model."""
    print("| optimizer state | bytes a parameter |", " | ".join(LLAMAS), "|")
    print("|---|---|" + "---|" * len(LLAMAS))
    numels = {}
    for label, config in SETTINGS.items():
        memories = [state_memory(whole_parameter_layouts(llama.parameters(), config)) for llama in LLAMAS.values()]
        numels = dict(zip(LLAMAS, (memory.numel for memory in memories), strict=True))
        per_param = memories[0].total_bytes / memories[0].numel
        cells = " | ".join(f"{memory.total_bytes / 2**30:.1f} GiB" for memory in memories)
        print(f"| **MicroAdam**, window_size, density = {label} | {per_param:.2f} | {cells} |")
    others = {"8-bit AdamW": ADAMW_8BIT_BYTES, "AdamW, bf16 moments": ADAMW_BF16_BYTES, "AdamW": ADAMW_FP32_BYTES}
    for label, per_param in others.items():
        cells = " | ".join(f"{numel * per_param / 2**30:.1f} GiB" for numel in numels.values())
        print(f"| {label} | {per_param:.2f} | {cells} |")


if __name__ == "__main__":
    main()
