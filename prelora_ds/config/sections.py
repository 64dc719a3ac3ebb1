"""Checks of a recipe that concern several of its sections at once; those of phases with each other are in method.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prelora_ds.config.adapters import FAMILIES
from prelora_ds.config.fields import FieldError
from prelora_ds.config.phases import PhaseConfig, PresetConfig
from prelora_ds.config.preset import check_authors
from prelora_ds.config.until import UntilConfig
from prelora_ds.core.switch_tests.combined import single_tests
from prelora_ds.core.switch_tests.prelora import PreloraTest

if TYPE_CHECKING:
    from prelora_ds.config.tree import Config


def check_sections(config: Config) -> None:
    """Raise FieldError if a phase does not fit the model, what is observed, or how checkpoints are written."""
    _check_families(config)
    for phase in config.phase_list:
        _check_phase(config, phase)


def check_preset(config: Config, phases: PresetConfig) -> None:
    """Raise FieldError if the preset does not fit the sections that are its parameters."""
    if phases.preset in ("prelora", "authors") and config.convergence is None:
        raise FieldError("convergence", None, f"is required by phases.preset {phases.preset}: set convergence.tau "
                         "and convergence.zeta")
    if phases.preset == "authors" and config.convergence is not None:
        check_authors(config.convergence, config.lora)
    if phases.preset == "full" and config.convergence is not None:
        raise FieldError("convergence", "...", "is not used by phases.preset full; set convergence=null, or choose "
                         "the preset prelora")


def _check_families(config: Config) -> None:
    known = FAMILIES if config.model.families is None else tuple(config.model.families)
    wanted = [(phase.name, phase.new_adapters.families or ())
              for phase in config.phase_list if phase.new_adapters is not None]
    for phase_name, families in wanted or [("full", config.families())]:
        for family in families:
            if family not in known:
                raise FieldError(
                    config.adapters_key(phase_name, "families"),
                    family,
                    "is not a family of this model",
                    f"choose among {', '.join(known)}, or add it to model.families",
                )


def _check_phase(config: Config, phase: PhaseConfig) -> None:
    _check_spectra(config, phase)
    _check_joined(config, phase)
    if phase.freeze_below is not None and config.model.factory is None \
            and phase.freeze_below >= config.model.num_hidden_layers:
        raise FieldError(f"phases.{phase.name}.freeze_below", phase.freeze_below,
                         f"is not a layer: the model has layers 0 to {config.model.num_hidden_layers - 1}")
    if config.model.factory is not None and phase.switch_test is not None and "flops" in phase.switch_test.needs:
        raise FieldError(f"phases.{phase.name}.until", "budget", "needs the FLOPs of a step, which are only known "
                         "for the built-in ViT", "end this phase in another way, or use a recipe without "
                         "model.factory")
    if phase.base is not None and config.checkpoint.deepspeed_format:
        raise FieldError(f"phases.{phase.name}.base.dtype", phase.base.dtype, "cannot be written in DeepSpeed's "
                         "own format, which has no place for quantised weights (checkpoint.deepspeed_format)",
                         "remove one of the two")
    if phase.active is not None and config.model.compile:
        raise FieldError(f"phases.{phase.name}.active", phase.active.choose, "would need other compiled code for "
                         "each choice of adapters, and beyond a limit torch runs uncompiled without a message",
                         "set model.compile=false, or remove active")


def _check_spectra(config: Config, phase: PhaseConfig) -> None:
    """Raise FieldError if the phase needs singular values that the run does not observe."""
    if config.observe.spectra:
        return
    new = phase.new_adapters
    if new is not None and new.ranks is not None and "spectra" in new.rank_rule.needs:
        raise FieldError(f"phases.{phase.name}.adapters.ranks.rule", new.ranks.rule,
                         "needs the singular values of the weights, which this run does not observe",
                         "set observe.spectra=true")
    if isinstance(phase.until, UntilConfig) and "spectra" in phase.until.switch_test().needs:
        raise FieldError(f"phases.{phase.name}.until", phase.until.model_dump(mode="json", exclude_unset=True),
                         "needs the singular values of the weights, which this run does not observe",
                         "set observe.spectra=true")


def _check_joined(config: Config, phase: PhaseConfig) -> None:
    """Raise FieldError if a test of the phase joins families that it cannot join."""
    is_preset = isinstance(config.phases, PresetConfig)
    key = "convergence.joined" if is_preset else f"phases.{phase.name}.until.joined"
    tests = () if phase.switch_test is None else single_tests(phase.switch_test)
    for joined in (test.joined for test in tests if isinstance(test, PreloraTest)):
        measured = config.families()
        families = [family for each in joined.values() for family in each]
        for name, each in joined.items():
            if not each or name in measured:
                raise FieldError(f"{key}.{name}", list(each), "is the name of a single family" if each else
                                 "joins no families", "choose another name, and at least two families")
        for family in families:
            if family not in measured or families.count(family) > 1:
                raise FieldError(key, family, "is joined twice" if family in measured else "is not a family whose "
                                 "norms are measured", f"choose among {', '.join(measured)}, each once")
