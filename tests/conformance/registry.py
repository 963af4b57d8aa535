"""The checks of every law, and the callbacks that they run on.

A law module registers its checks with `check`; test_laws.py runs each on each callback.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L

from lightning_prune import callbacks
from tests.conformance.lora_toy import LoRAToy, LoRAUnits
from tests.conformance.sparse_toy import SparseToy
from tests.conformance.toy import Toy
from tests.conformance.variants import AT_ONCE, CHANNELS, DECIDED, MOVING, ROUNDS, VARIANTS

__all__ = ["CHECKS", "CUT", "LAWS", "UNITS", "Case", "Check", "cases", "check"]

LAWS = {
    1: "stock names",
    2: "exact budgets",
    3: "zeros stay zero",
    4: "resume is bit-exact",
    5: "ranks agree",
    6: "nothing left behind",
    7: "off means off",
    8: "say no early",
    9: "composable",
}

# What checks of units need.
UNITS, CUT = "network of units", "network of units that is cut"


@dataclass(frozen=True, kw_only=True)
class Case:
    """How one callback is made for the suite.

    Attributes:
        kind: The class. It declares what its masks cover (``covers``) and, where a law does not
            apply to it, why: ``laws = {4: "the reason"}``; of a single check
            ``laws = {"4-accumulation": "the reason"}``; of the runs of two processes whose names
            in ranks.py begin so, which must be refused then, ``laws = {"5-fsdp2": "the reason"}``.
        defaults: Arguments; those that the constructor does not take are left out.
        model: The network that it is tried on; takes the arguments of `Toy`.
        variant: What is special about these arguments, if a class is tried with several.
        laws: More declared reasons, of this variant alone.
        only: The checks and runs of two processes that are made, if not all are.
        why: The reason for it.
    """

    kind: type[L.Callback]
    defaults: Mapping[str, Any] = field(
        default_factory=lambda: {"sparsity": 0.5, "start": 2, "end": 8, "every": 2}
    )
    model: type[Toy] = Toy
    variant: str = ""
    laws: Mapping[int | str, str] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    why: str = ""

    @property
    def name(self) -> str:
        return self.kind.__name__

    def __str__(self) -> str:
        return f"{self.name}-{self.variant}" if self.variant else self.name

    @property
    def arguments(self) -> frozenset[str]:
        """What the constructor takes."""
        return frozenset(inspect.signature(self.kind).parameters)

    @property
    def covers(self) -> str:
        """What its masks are on."""
        return self.kind.covers

    def make(self, **wanted: Any) -> Any:
        """A new callback."""
        plain = {k: v for k, v in self.defaults.items() if k in self.arguments}
        return self.kind(**(plain | wanted))

    @property
    def declared(self) -> Mapping[int | str, str]:
        """Why laws, or single checks of them, do not apply."""
        return {**getattr(self.kind, "laws", {}), **self.laws}

    def excused(self, what: int | Check) -> str | None:
        """Why a law, or a check of it, does not apply."""
        law, needs = (what, ()) if isinstance(what, int) else (what.law, what.needs)
        for declared in (law, str(what)):
            if declared in self.declared:
                return self.declared[declared]
        missing = [name for name in needs if name not in self.arguments | self.has]
        return f"takes no {', '.join(missing)}" if missing else None

    def tries(self, name: str) -> bool:
        """Whether a check, or a run of two processes such as "5-ddp", is to be made at all."""
        if self.only:
            return name in self.only
        # other runs of two processes that are declared are made, and must be refused
        undisturbed = name == "5-disturbed" and name in self.declared
        return int(name[0]) not in self.declared and not undisturbed

    def refuses(self, name: str) -> bool:
        """Whether a run of two processes must be refused."""
        return any(name.startswith(what) for what in self.declared if isinstance(what, str))

    @property
    def has(self) -> frozenset[str]:
        """What checks can need besides arguments."""
        given = {UNITS: bool(self.defaults.get("units")), CUT: bool(self.defaults.get("compact"))}
        return frozenset(name for name, holds in given.items() if holds)


@dataclass(frozen=True)
class Check:
    """One way to look at one law.

    Attributes:
        law: Its number in the design.
        name: What is looked at.
        run: Raises AssertionError if the callback breaks the law; gets a folder of its own.
        needs: Arguments without which there is nothing to look at.
    """

    law: int
    name: str
    run: Callable[[Case, Path], None]
    needs: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.law}-{self.name}"


CHECKS: dict[str, Check] = {}


def check(
    law: int, *needs: str, name: str | None = None
) -> Callable[[Callable[[Case, Path], None]], Callable[[Case, Path], None]]:
    """Registers a check under its function's name, or under the name given."""

    def register(run: Callable[[Case, Path], None]) -> Callable[[Case, Path], None]:
        made = Check(law, name or run.__name__, run, needs)
        if str(made) in CHECKS:
            raise ValueError(f"two checks are called {made}")
        CHECKS[str(made)] = made
        return run

    return register


# A callback whose constructor or network is special gets a row here; all others need none.
ROWS: dict[str, Callable[[type[L.Callback]], Case]] = {
    "AllInOnePruning": lambda kind: Case(kind=kind, model=LoRAUnits, **DECIDED),
    "DynamicBatchLoading": lambda kind: Case(
        kind=kind, defaults={"reference_losses": {"web": 2.0, "code": 1.0}}
    ),
    "DynamicSparseTraining": lambda kind: Case(kind=kind, **MOVING),
    "LoRAPruning": lambda kind: Case(
        kind=kind,
        defaults={
            "sparsity": 0.5,
            "start": 2,
            "end": 8,
            "every": 2,
            "units": None,
            "allocation": "global",
            "merge": False,
        },
        model=LoRAToy,
    ),
    "LotteryTicket": lambda kind: Case(kind=kind, **ROUNDS),
    "OneShotPruning": lambda kind: Case(kind=kind, model=LoRAUnits, **AT_ONCE),
    "PruningAwareTuning": lambda kind: Case(kind=kind, **CHANNELS),
    "SparseRetraining": lambda kind: Case(kind=kind, defaults={"adapters": None}, model=SparseToy),
}


def cases() -> list[Case]:
    """All callbacks that `lightning_prune.callbacks` makes public, each with its variants."""
    found = []
    for name in callbacks.__all__:
        kind = getattr(callbacks, name)
        if inspect.isclass(kind) and issubclass(kind, L.Callback):
            found.append(ROWS[name](kind) if name in ROWS else Case(kind=kind))
            found += [Case(kind=kind, **variant) for variant in VARIANTS.get(name, [])]
    return found
