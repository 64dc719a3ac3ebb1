"""Pre-training of Vision Transformers that switches from all parameters to LoRA when training has settled.

The names of `__all__` are for a program of one's own (docs/library.md). Each is imported when it is first used, so that
``import prelora_ds`` takes no time, and the pure ones do without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from prelora_ds.version import __version__ as __version__

if TYPE_CHECKING:
    from prelora_ds.config.load import load_config as load_config
    from prelora_ds.config.tree import Config as Config
    from prelora_ds.core.adapters.kind import AdapterSpec as AdapterSpec
    from prelora_ds.core.controller import PhaseController as PhaseController
    from prelora_ds.core.controller import PhaseState as PhaseState
    from prelora_ds.core.duration import Duration as Duration
    from prelora_ds.core.layout import Layout as Layout
    from prelora_ds.core.phases import Adapters as Adapters
    from prelora_ds.core.phases import PhaseSpec as PhaseSpec
    from prelora_ds.core.plan import Plan as Plan
    from prelora_ds.core.rank_rules.prelora import PreloraRanks as PreloraRanks
    from prelora_ds.core.rank_rules.prelora import assign_ranks as assign_ranks
    from prelora_ds.core.rank_rules.uniform import UniformRank as UniformRank
    from prelora_ds.core.schedule import Timeline as Timeline
    from prelora_ds.core.switch_tests.budget import BudgetTest as BudgetTest
    from prelora_ds.core.switch_tests.combined import AllOf as AllOf
    from prelora_ds.core.switch_tests.combined import AnyOf as AnyOf
    from prelora_ds.core.switch_tests.fixed import FixedTest as FixedTest
    from prelora_ds.core.switch_tests.prelora import Observation as Observation
    from prelora_ds.core.switch_tests.prelora import PreloraTest as PreloraTest
    from prelora_ds.core.switch_tests.prelora import WindowStats as WindowStats
    from prelora_ds.core.switch_tests.prelora import partially_converged as partially_converged
    from prelora_ds.core.switch_tests.t_test import LossTTest as LossTTest
    from prelora_ds.engine.loop import LoopEngine as LoopEngine
    from prelora_ds.engine.loop import StaleEngineError as StaleEngineError
    from prelora_ds.errors import ConfigError as ConfigError
    from prelora_ds.handle import Phases as Phases
    from prelora_ds.model.families import find_layout as find_layout

# Name -> the module that defines it.
_HOMES = {
    # pure: no torch
    "Adapters": "core.phases",
    "AdapterSpec": "core.adapters.kind",
    "AllOf": "core.switch_tests.combined",
    "AnyOf": "core.switch_tests.combined",
    "BudgetTest": "core.switch_tests.budget",
    "Config": "config.tree",
    "ConfigError": "errors",
    "Duration": "core.duration",
    "FixedTest": "core.switch_tests.fixed",
    "Layout": "core.layout",
    "LossTTest": "core.switch_tests.t_test",
    "Observation": "core.switch_tests.prelora",
    "PhaseController": "core.controller",
    "PhaseSpec": "core.phases",
    "PhaseState": "core.controller",
    "Plan": "core.plan",
    "PreloraRanks": "core.rank_rules.prelora",
    "PreloraTest": "core.switch_tests.prelora",
    "Timeline": "core.schedule",
    "UniformRank": "core.rank_rules.uniform",
    "WindowStats": "core.switch_tests.prelora",
    "assign_ranks": "core.rank_rules.prelora",
    "load_config": "config.load",
    "partially_converged": "core.switch_tests.prelora",
    # with torch
    "find_layout": "model.families",
    # with DeepSpeed
    "LoopEngine": "engine.loop",
    "Phases": "handle",
    "StaleEngineError": "engine.loop",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Import ``name`` from its home at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
