"""The one walk between two plans: export -> release -> edit -> build -> restore."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prelora_ds.core.plan import Plan
from prelora_ds.engine.build import Engine, build_engine
from prelora_ds.engine.census import engine_storages, live_storages, settled
from prelora_ds.engine.measure import check_ranks_agree
from prelora_ds.engine.release import release, trim_memory
from prelora_ds.engine.state import EngineState, export_state

Edit = Callable[[EngineState, Plan, Plan], object]


@dataclass(frozen=True)
class Switch:
    """What a transition cost on this rank: ``released_bytes`` of the old engine, all of them gone, in ``seconds``."""

    seconds: float
    released_bytes: int


def transition(engine: Engine, plan: Plan, *, edit: Edit | None = None,
               keep_frozen: Callable[[EngineState, Plan], object] | None = None,
               parked: frozenset[str] = frozenset()) -> tuple[Engine, Switch]:
    """An engine for ``plan`` that carries on where ``engine`` stood; ``engine`` is dead afterwards. Collective.

    edit: changes the state on its way, between the plan before and ``plan``, while no engine exists.
    keep_frozen: may write down what will not train under the plan: the fp32 masters live on as BF16.
    parked: what of that a later plan trains again; its fp32 values stay on the host (`Engine.parked`).

    Raises RuntimeError when the old engine's memory is not given back, or when ranks disagree afterwards.
    """
    begun = time.perf_counter()
    held = engine_storages(engine)  # counted before the export gives the optimizer's storage back
    state, counters = export_state(engine.ds), engine.counters()
    state.slices |= engine.parked
    release_checked(engine, held)
    if edit is not None:
        edit(state, engine.plan, plan)
    if keep_frozen is not None:
        keep_frozen(state, plan)
    new = build_engine(engine.run_config, plan, engine.layout, engine.num_labels, state, counters,
                       parked=parked)
    check_ranks_agree(new)
    return new, Switch(time.perf_counter() - begun, sum(held.values()))


def release_checked(engine: Engine, held: Mapping[int, int] | None = None) -> None:
    """Free all that ``engine`` holds, and count that it is gone; afterwards its ``ds`` is None.

    held: what `engine_storages` found before, where storages were given back since. Raises RuntimeError when memory
    of the engine is still alive.
    """
    held = engine_storages(engine) if held is None else held
    release(engine)

    def still_alive() -> int:
        if left := sum(nbytes for key, nbytes in live_storages().items() if key in held):
            trim_memory()  # what a thread of gloo dropped after the release may lie in a cycle
        return left

    if left := settled(still_alive, lambda n: n == 0):
        raise RuntimeError(f"{left} bytes of the old engine are still alive after its release")
