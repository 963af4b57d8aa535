"""Units that are decided on in a phase of the run, and go at its end."""

from __future__ import annotations

from typing import Any

from lightning_prune.allocation import as_allocation
from lightning_prune.callbacks.checks import too_early
from lightning_prune.callbacks.settings import Settings
from lightning_prune.callbacks.structured import StructuredCallback
from lightning_prune.criteria.locations import Locations
from lightning_prune.targets import Selection
from lightning_prune.timeline import Timeline
from lightning_prune.unit_layout import Layout

__all__ = ["PhasedCallback"]


class PhasedCallback(StructuredCallback):
    """A callback of units with one mask update, where the phase ends that ``start`` begins.

    Args:
        settings: How much, when, and of which weights.
        units: Kinds of units.
        multiple_of: Neurons and channels stay in multiples of this.
        uniform: Whether all layers keep as many.
        compact: Whether what is gone is cut out when ``fit`` ends.
    """

    def __init__(
        self,
        settings: Settings,
        units: list[str],
        *,
        multiple_of: int = 1,
        uniform: bool = False,
        compact: bool = True,
    ) -> None:
        self._window = (0, 0)  # the steps at which the phase begins and ends
        super().__init__(
            settings,
            Locations(),
            as_allocation("global"),
            units=units,
            multiple_of=multiple_of,
            uniform=uniform,
            compact=compact,
        )

    def timeline(
        self, selection: Selection, total_steps: int | None, *, squeeze: bool = False
    ) -> Timeline:
        """One update, at the end of the phase."""
        plain = super().timeline(selection, total_steps, squeeze=squeeze)
        if not plain.updates:
            return plain
        if self._timeline is None:  # a plan that is made later moves nothing
            self._window = (plain.updates[0], plain.last)
        return Timeline(updates=(plain.last,), values=(plain.final,), initial=plain.initial)

    @property
    def progress(self) -> float:
        """Share of the phase that is behind, in [0, 1]."""
        first, last = self._window
        if self._timeline is None or not self._timeline.updates:
            return 0.0
        if self.finished:
            return 1.0
        return min(1.0, max(0.0, (self.step - first) / max(1, last - first)))

    def _laid_out(self) -> Layout:
        if self._layout is None:
            raise too_early(self.name, "on_fit_start")
        return self._layout

    def state_dict(self) -> dict[str, Any]:
        """The masks' state, and the phase."""
        state = super().state_dict()
        if state and self._timeline is not None:
            state["window"] = list(self._window)
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        first, last = state["window"]
        self._window = (first, last)
