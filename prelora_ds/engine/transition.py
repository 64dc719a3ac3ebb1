"""The one walk between two plans: export -> release -> build -> restore."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deepspeed import comm

from prelora_ds.core.plan import Plan
from prelora_ds.engine.build import Engine, build_engine
from prelora_ds.engine.census import engine_storages, live_storages, settled
from prelora_ds.engine.checkpoint import save_slices
from prelora_ds.engine.measure import check_ranks_agree
from prelora_ds.engine.release import release
from prelora_ds.engine.state import export_state


@dataclass(frozen=True)
class Switch:
    """What a transition cost on this rank: ``released_bytes`` of the old engine, all of them gone, in ``seconds``."""

    seconds: float
    released_bytes: int

    def to_json(self) -> Mapping[str, float]:
        return dict(vars(self))


def transition(engine: Engine, plan: Plan, *, base_dir: Path | None = None) -> tuple[Engine, Switch]:
    """An engine for ``plan`` that carries on where ``engine`` stood; ``engine`` is dead afterwards. Collective.

    The fp32 masters of parameters that no longer train are written to ``base_dir`` first (they live on as BF16).
    Raises RuntimeError when the old engine's memory is not given back, or when ranks disagree afterwards.
    """
    begun = time.perf_counter()
    held = engine_storages(engine)
    state, counters = export_state(engine.ds), engine.counters()
    release(engine)
    left = settled(lambda: sum(nbytes for key, nbytes in live_storages().items() if key in held), lambda n: n == 0)
    if left:
        raise RuntimeError(f"{left} bytes of the old engine are still alive after its release")
    frozen = engine.plan.trainable - plan.trainable
    if base_dir is not None and frozen:
        save_slices(state, frozen, base_dir, comm.get_rank(), comm.get_world_size())
    new = build_engine(engine.run_config, plan, engine.layout, engine.num_labels, state, counters)
    check_ranks_agree(new)
    return new, Switch(time.perf_counter() - begun, sum(held.values()))
