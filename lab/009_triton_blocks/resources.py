# SPDX-License-Identifier: Apache-2.0
"""What the compiler makes of the block kernels, as a table: needs Triton and no GPU. See README.md."""

from __future__ import annotations

from fedpai_kernels.triton import BLOCKS
from tests.triton.compiling import Compiled, walk, weight_grad

ARITHMETIC = (("f32", "ieee"), ("f32", "tf32"), ("bf16", "ieee"))


def shown(made: Compiled) -> str:
    spilled = f", {made.spilled} spilled" if made.spilled else ""
    return f"{made.shared / 1024:.1f} KB / {made.registers}{spilled}"


def main() -> None:
    print("| kernel | operands | target |" + "".join(f" B = {block} |" for block in BLOCKS))
    print("|---|---|---|" + "---|" * len(BLOCKS))
    for name in ("forward", "weight gradient"):
        for dtype, precision in ARITHMETIC:
            for target in (80, 90):
                row = []
                for block in BLOCKS:
                    if name == "forward":
                        made = walk(block, dtype, precision, target, "batch_last", False)
                    else:
                        made = weight_grad(block, dtype, precision, target, "batch_last")
                    row.append(shown(made))
                operands = precision if precision == "tf32" else dtype
                print(f"| {name} | {operands} | sm_{target} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
