"""Check that the phases of a recipe can run one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prelora_ds.config.adapters import KEPT_MAY_CHANGE, AdaptersConfig, check_computation, check_resizes
from prelora_ds.config.fields import FieldError
from prelora_ds.config.phases import PhaseConfig
from prelora_ds.config.until import UntilConfig
from prelora_ds.core.adapters import KINDS, AdapterSpec
from prelora_ds.core.duration import Duration
from prelora_ds.core.plan import ADAPTERS, BASE
from prelora_ds.core.selection import UNCONVERGED


def check_method(phases: Sequence[PhaseConfig]) -> None:
    """Raise FieldError, with a key below `phases`, if the phases cannot run one after the other."""
    if not phases:
        raise FieldError("", [], "must contain at least one phase")
    names = [phase.name for phase in phases]
    for name in names:
        if names.count(name) > 1:
            raise FieldError(f"{name}.name", name, "is the name of two phases")
    tests = any(phase.switch_test is not None and phase.switch_test.windowing is not None for phase in phases)
    adapters: AdaptersConfig | None = None
    for i, phase in enumerate(phases):
        _check_until(phase, last=i + 1 == len(phases))
        _check_costs(phase, phases[:i + 1])
        adapters = _check_adapters(phase, adapters, first=i == 0, tests=tests)
        _check_update(phase, adapters, phases[i - 1] if i else None)
        _check_roles(phase, adapters)
        if i == 0 and phase.moments == "reset":
            raise FieldError(f"{phase.name}.moments", "reset", "has nothing to reset in the first phase; remove it")


def _check_until(phase: PhaseConfig, *, last: bool) -> None:
    if last and phase.until is not None:
        raise FieldError(f"{phase.name}.until", _written(phase.until),
                         "must not be set in the last phase, which lasts until the end of the run; remove it")
    if not last and phase.until is None:
        raise FieldError(f"{phase.name}.until", None,
                         'is required, because another phase follows; set a duration ("20 epochs") or a test')


def _check_costs(phase: PhaseConfig, so_far: Sequence[PhaseConfig]) -> None:
    """Raise FieldError if ``phase`` ends by a budget, and the cost of a step so far depends on what is measured."""
    if phase.switch_test is None or "flops" not in phase.switch_test.needs:
        return
    for each in so_far:
        if each.active is not None:
            raise FieldError(f"{phase.name}.until", _written(phase.until), "depends on the FLOPs of phase "
                             f"{each.name}, which depend on the adapters that are chosen ({each.name}.active), so that "
                             "a replay could not repeat it", "end this phase in another way, or remove active")


def _check_adapters(phase: PhaseConfig, before: AdaptersConfig | None, *, first: bool,
                    tests: bool) -> AdaptersConfig | None:
    """The adapters that exist during ``phase``; ``before`` are those of the phase before it.

    tests: whether any phase ends by a test that looks at windows. Raises FieldError.
    """
    key = f"{phase.name}.adapters"
    adapters = before
    if phase.adapters == "none" and before is not None:
        raise FieldError(key, "none", "would discard what the adapters of the phase before have learned; "
                         "remove the key, which keeps them")

    if (new := phase.new_adapters) is not None:
        adapters = new
        if before is not None and new.from_ == "fresh":
            raise FieldError(f"{key}.from", "fresh", "would discard what the adapters of the phase before "
                             "have learned; choose keep, resize or merge")
        if before is None and new.from_ in ("merge", "resize"):
            raise FieldError(f"{key}.from", new.from_, "there are no adapters before this phase; choose fresh")
        if new.from_ == "resize":
            check_resizes(new, f"{key}.from", "resize")
            _check_removes_none(new, key, "from: resize")
        if new.ranks is not None and new.ranks.every is not None:
            _check_every(phase, new, f"{key}.ranks.every", str(new.ranks.every))
        if new.from_ == "merge" and before is not None and not KINDS[before.kind].can.merges:
            raise FieldError(f"{key}.from", "merge", f"adapters of the kind {before.kind} cannot be merged into the "
                             "weights; choose keep")
        if new.ranks is not None and new.rank_rule.windows > 0 and (first or not tests):
            raise FieldError(f"{key}.ranks.rule", new.ranks.rule, "needs the windows of a test, but no phase "
                             "before this one closes any; set a rank, or let an earlier phase end by a test that makes "
                             "windows (with m)")
    elif isinstance(phase.adapters, AdaptersConfig):
        if before is None:
            raise FieldError(f"{key}.from", "keep", "there are no adapters before this phase; choose fresh")
        check_computation(phase.adapters, before.kind, f"{key}.")
        adapters = before.model_copy(update={name: getattr(phase.adapters, name) for name in KEPT_MAY_CHANGE})

    if adapters is None and "adapters" in phase.trained:
        raise FieldError(f"{phase.name}.train", list(phase.trained),
                         "contains adapters, but there are none in this phase")
    _check_merge(phase, adapters)
    _check_base(phase, adapters)
    _check_active(phase, adapters, tests=tests)
    if adapters is not None and phase.zero_stage not in (None, "auto"):
        stages = KINDS[adapters.kind].can.zero_stages
        if phase.zero_stage not in stages:
            raise FieldError(f"{phase.name}.zero_stage", phase.zero_stage,
                             f"adapters of the kind {adapters.kind} train only at ZeRO stages "
                             f"{', '.join(map(str, sorted(stages)))}")
    return adapters


def _check_removes_none(new: AdaptersConfig, key: str, why: str) -> None:
    """Raise FieldError if adapters that train could get rank 0. why: what gives existing adapters other ranks."""
    if new.ranks is not None and new.ranks.leaves_out:
        raise FieldError(f"{key}.ranks.r_min", 0, f"would remove adapters that train ({why})",
                         "set r_min to at least 1 and remove settled")


def _check_update(phase: PhaseConfig, adapters: AdaptersConfig | None, before: PhaseConfig | None) -> None:
    """Raise FieldError if first values are to be made from an update of weights that there is not.

    before: the phase before.
    """
    if adapters is None or not KINDS[adapters.kind].needs_update(AdapterSpec("", 1, 1.0, 0, adapters.options)):
        return
    key, value = f"{phase.name}.adapters.options.init", "update"
    attached = phase.new_adapters is not None and phase.new_adapters.from_ != "resize"
    if attached and (before is None or "all" not in before.trained):
        raise FieldError(key, value, "makes A from the last update of the weights, but the phase before does not train "
                         "them", "choose kaiming or gaussian, or let the phase before train all")
    if adapters.options.get("train_a") is False:
        raise FieldError(key, value, "makes A from the last update of the weights, but with train_a: false a resumed "
                         "run draws A again from the seed", "choose kaiming or gaussian, or let A train")
    if phase.merge is not None:
        raise FieldError(key, value, "makes A from the last update of the weights, but adapters that begin again after "
                         f"a merge ({phase.name}.merge) have none", "choose kaiming or gaussian")


def _check_every(phase: PhaseConfig, new: AdaptersConfig, key: str, every: str) -> None:
    """Raise FieldError about ``key`` if the ranks cannot be chosen again during the phase."""
    check_resizes(new, key, every)
    _check_removes_none(new, f"{phase.name}.adapters", f"every: {every}")
    if new.rank_rule.windows == 0:
        raise FieldError(key, every, "would choose the same ranks again, because this rule does not depend on what "
                         "was measured", "remove it")
    if phase.merge is not None:
        raise FieldError(key, every, f"would change the ranks within a cycle of {phase.name}.merge",
                         "remove one of the two")


def _check_merge(phase: PhaseConfig, adapters: AdaptersConfig | None) -> None:
    """Raise FieldError if the phase merges adapters that it cannot merge."""
    if phase.merge is None:
        return
    key = f"{phase.name}.merge"
    if adapters is None:
        raise FieldError(key, phase.merge.model_dump(mode="json"), "merges adapters, but there are none in this phase",
                         "remove it, or attach adapters")
    can = KINDS[adapters.kind].can
    if not (can.merges and can.restarts):
        raise FieldError(key, phase.merge.model_dump(mode="json"), f"adapters of the kind {adapters.kind} cannot be "
                         "merged and begin again", "remove it")
    if "all" in phase.trained:
        raise FieldError(f"{phase.name}.train", list(phase.trained), "trains the weights themselves, so there is "
                         f"nothing to merge adapters into ({key})", "train [adapters, rest], or remove merge")


def _check_base(phase: PhaseConfig, adapters: AdaptersConfig | None) -> None:
    """Raise FieldError if the phase would quantise weights that train, or that its adapters need as they are."""
    if phase.base is None:
        return
    key, dtype = f"{phase.name}.base.dtype", phase.base.dtype
    if "all" in phase.trained:
        raise FieldError(key, dtype, "quantises the weights below the adapters, but this phase trains them (train: "
                         "all)", "train [adapters, rest], or remove base")
    if adapters is None:
        raise FieldError(key, dtype, "quantises the weights below adapters, but there are none in this phase",
                         "attach adapters, or remove base")
    if not KINDS[adapters.kind].can.quantised:
        able = ", ".join(name for name, kind in KINDS.items() if kind.can.quantised)
        raise FieldError(key, dtype, f"is not possible with adapters of the kind {adapters.kind}, whose linears "
                         "compute with the weight itself", f"choose the kind {able}, or remove base")
    if adapters.mode not in ("auto", "branch"):
        raise FieldError(f"{phase.name}.adapters.mode", adapters.mode, f"computes with the weight itself, which {key} "
                         f"{dtype} replaces by codes", "choose branch, or remove base")
    if adapters.dropout:
        raise FieldError(f"{phase.name}.adapters.dropout", adapters.dropout, "runs peft's code, which computes with "
                         f"the weight itself, and {key} {dtype} replaces that by codes", "set it to 0, or remove base")
    changes = "adds to the weights while the phase lasts, which a quantised weight cannot take up"
    if phase.merge is not None:
        raise FieldError(f"{phase.name}.merge", phase.merge.model_dump(mode="json"), f"{changes} ({key} {dtype})",
                         "remove one of the two")
    if adapters.ranks is not None and adapters.ranks.every is not None and phase.new_adapters is not None:
        raise FieldError(f"{phase.name}.adapters.ranks.every", str(adapters.ranks.every), f"{changes} ({key} {dtype})",
                         "remove one of the two")


def _check_active(phase: PhaseConfig, adapters: AdaptersConfig | None, *, tests: bool) -> None:
    """Raise FieldError if the phase selects adapters that it does not have or whose code knows no selection."""
    if phase.active is None:
        return
    key = f"{phase.name}.active"
    if adapters is None or not {"all", "adapters"} & set(phase.trained):
        raise FieldError(key, phase.active.choose, "selects adapters that train, but there are none in this phase",
                         "remove it, or train adapters")
    if phase.active.choose == UNCONVERGED and not tests:
        raise FieldError(f"{key}.choose", UNCONVERGED, "compares the windows of a test, but no phase ends by a test",
                         "choose another rule, or let a phase end by a test")
    if phase.active.k is not None and adapters.ranks is not None and adapters.ranks.leaves_out:
        raise FieldError(f"{key}.k", phase.active.k, "may be more than there are adapters, because their rule "
                         f"({adapters.ranks.rule}, r_min 0) leaves layers without one", "set share instead")
    if not KINDS[adapters.kind].can.selects:
        raise FieldError(key, phase.active.choose, f"selects adapters, but those of the kind {adapters.kind} all train "
                         "all the time", "remove it, or choose another kind")
    for name in ("dropout", "mode"):
        value = getattr(adapters, name)
        if value not in (0, "auto", "branch", "merged"):
            raise FieldError(f"{phase.name}.adapters.{name}", value, "runs peft's code, which knows no inactive "
                             f"adapters ({key})", "use dropout 0 and the kernel branch or merged")


def _check_roles(phase: PhaseConfig, adapters: AdaptersConfig | None) -> None:
    """Raise FieldError if the phase scales the learning rate of a role that it does not have."""
    roles = [BASE]
    if adapters is not None:
        roles += [ADAPTERS, *KINDS[adapters.kind].roles()]
    for role, factor in phase.lr_scale.items() if isinstance(phase.lr_scale, dict) else ():
        if role not in roles:
            raise FieldError(
                f"{phase.name}.lr_scale.{role}",
                factor,
                f"is not a role in this phase, which has {', '.join(roles)}",
            )


def _written(until: Duration | UntilConfig | None) -> Any:
    return until.model_dump(mode="json") if isinstance(until, UntilConfig) else str(until)
