"""Smaller networks beside masked ones: every family, every kind of unit, 20 random draws each.

    PYTHONPATH=. python benchmarks/check_equivalence.py

Configs, weights, heads and masks are those of tests/families.py. Fails where a difference is above
1e-5 of the largest output, a cut changes nothing, or a kind of unit was never met.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from pathlib import Path

import minilm
import torch

from lightning_prune.anatomy import Counter, survey
from lightning_prune.removal import cut, difference
from tests import families

RESULTS = Path(__file__).parent / "results"
KINDS = families.TRANSFORMER_KINDS
GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3")


@torch.no_grad()
def worst_of(family: str, draws: int) -> dict[str, tuple[float, int]]:
    """The largest relative difference and the number of cuts, by kind."""
    found: dict[str, tuple[float, int]] = {}
    for seed in range(draws):
        model = families.network(family, seed)
        given = families.batch(model, seed)
        anatomy = survey(model)
        dense = model(**given)[0]
        for kinds in (*((kind,) for kind in KINDS), KINDS):
            masks = families.masks(anatomy, kinds, seed)
            if not masks:
                continue
            smaller = copy.deepcopy(model)
            cut(smaller, anatomy, masks)
            apart = difference(model, smaller, anatomy, masks, given)
            said = smaller(**given)[0]
            same = said.shape == dense.shape and torch.allclose(said, dense, atol=1e-3)
            left = sum(p.numel() for p in smaller.parameters())
            counted = int(Counter.parameters(anatomy).count(masks))
            if not apart <= 1e-5 or same or left != counted:
                raise SystemExit(f"{family}, draw {seed}, {kinds}: {apart}, {left} of {counted}")
            name = kinds[0] if len(kinds) == 1 else "all together"
            worst, number = found.get(name, (0.0, 0))
            found[name] = (max(worst, apart), number + 1)
    return found


def main() -> None:
    """Checks everything and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=20)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    columns = [*KINDS, "all together"]
    lines = [
        "# Smaller networks beside masked ones",
        "",
        f"- Machine: {minilm.machine()}",
        "- Command: `PYTHONPATH=. python benchmarks/check_equivalence.py`",
        f"- {options.draws} random tiny configs a family, with random weights and heads, float32. "
        "Cells: the largest difference of any output, relative to the largest output, and the "
        "number of cuts. To reach: 1e-5. Parameters counted and left were equal in every cut.",
        "",
        "| family | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for family in families.FAMILIES:
        found = worst_of(family, options.draws)
        without = set() if family in GROUPED else {"query_heads"}
        without |= {"attention"} if family == "t5" else set()
        if set(columns) - set(found) != without:
            raise SystemExit(f"{family}: never met {set(columns) - set(found)}")
        cells = [f"{found[c][0]:.1e} ({found[c][1]})" if c in found else "-" for c in columns]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
        (RESULTS / "equivalence.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
