"""Take an engine from one plan to the next: export, release, edit, build, restore."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prelora_ds.core.plan import Plan
from prelora_ds.engine.build import build_engine
from prelora_ds.engine.census import engine_storages, live_storages, wait_until
from prelora_ds.engine.engine import Engine
from prelora_ds.engine.measure import check_ranks_agree
from prelora_ds.engine.release import release, trim_memory
from prelora_ds.engine.state import EngineState, export_state

Edit = Callable[[EngineState, Plan, Plan], object]
KeepFrozen = Callable[[EngineState, Plan], object]


@dataclass(frozen=True)
class Switch:
    """The cost of a transition on this rank.

    seconds: the duration of the transition.
    released_bytes: the bytes of the old engine, all of which were freed.
    """

    seconds: float
    released_bytes: int


def transition(
    engine: Engine,
    plan: Plan,
    *,
    edit: Edit | None = None,
    keep_frozen: KeepFrozen | None = None,
    parked: frozenset[str] = frozenset(),
) -> tuple[Engine, Switch]:
    """Replace ``engine`` by an engine for ``plan`` that continues from its state. Collective.

    ``engine`` cannot be used afterwards.

    edit: called as edit(state, old plan, new plan) while no engine exists; may change the state.
    keep_frozen: called as keep_frozen(state, new plan); may save the parameters that stop training.
        Afterwards only BF16 copies of them remain.
    parked: parameters that a later plan trains again; if ``plan`` freezes them, their fp32 values
        stay on the host (`Engine.parked`).

    Raises RuntimeError if the old engine's memory is not freed, or if the parameters of the ranks
    differ afterwards.
    """
    begun = time.perf_counter()
    owned = engine_storages(engine)  # counted now, because the export frees the optimizer's storage
    state = export_state(engine.ds)
    counters = engine.counters()
    state.slices |= engine.parked
    release_checked(engine, owned)

    if edit is not None:
        edit(state, engine.plan, plan)
    if keep_frozen is not None:
        keep_frozen(state, plan)

    new = build_engine(
        engine.run_config, plan, engine.layout, engine.num_labels, state, counters, parked=parked,
        make_module=engine.make_module,
    )
    check_ranks_agree(new)
    return new, Switch(time.perf_counter() - begun, sum(owned.values()))


def release_checked(engine: Engine, owned: Mapping[int, int] | None = None) -> None:
    """Free everything that ``engine`` holds and verify it; afterwards its ``ds`` is None.

    owned: the result of `engine_storages`, if some of the storages have been freed since.

    Raises RuntimeError if memory of the engine is still alive.
    """
    if owned is None:
        owned = engine_storages(engine)
    release(engine)

    def bytes_alive() -> int:
        remaining = sum(nbytes for key, nbytes in live_storages().items() if key in owned)
        if remaining:
            # Tensors that a gloo thread drops after the release may be in reference cycles.
            trim_memory()
        return remaining

    remaining = wait_until(bytes_alive, lambda n: n == 0)
    if remaining:
        raise RuntimeError(f"{remaining} bytes of the old engine are still alive after its release")
