"""Take a user's own model and DeepSpeed loop through the phases of a method: `Phases`.

docs/library.md shows it at work. Engines, decisions, transitions and checkpoints are those of the runs of `train`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from prelora_ds.config.changes import binding_differences
from prelora_ds.config.load import check_world, read_settings, validate
from prelora_ds.config.tree import Config
from prelora_ds.core.controller import PhaseController, PhaseState
from prelora_ds.core.layout import Layout
from prelora_ds.core.schedule import Timeline
from prelora_ds.cost.forecast import why_unfinished
from prelora_ds.engine.engine import Engine, StepStats
from prelora_ds.engine.loop import LoopEngine, StaleEngineError, Taken
from prelora_ds.engine.measure import weight_norms
from prelora_ds.engine.runtime import check_zero_config, init_process_group, on_all_ranks, on_rank_0
from prelora_ds.engine.spectra import SpectrumMeter, first_values
from prelora_ds.engine.state import EngineState, initial_state
from prelora_ds.engine.transition import release_checked
from prelora_ds.errors import ConfigError, NotSavedError, TrainingDivergedError, cannot_write
from prelora_ds.exporting.hf import export_weights, write_pretrained, write_tensors
from prelora_ds.model.families import find_layout
from prelora_ds.run.begin import first_engine, restored_engine
from prelora_ds.run.checkpoints.checkpoint_folder import (
    discard_partial,
    list_checkpoints,
    root_of,
    set_aside,
    step_folder,
)
from prelora_ds.run.checkpoints.resume import checkpoints_at, load_newest, rewind_output
from prelora_ds.run.checkpoints.saver import Saver
from prelora_ds.run.decide import decided, engine_for, to_follow
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.method_fits import check_method_fits
from prelora_ds.run.run_state import RunState
from prelora_ds.run.stored import settings_of

__all__ = ["LoopEngine", "Phases", "StaleEngineError", "loop_config"]

# A config says who builds the model. It is never called: the function is an argument of `Phases`.
OWN_MODEL = "own_loop:make_model"


class Phases:
    """Takes a model through the phases of a recipe, in a loop of one's own.

    make_model: returns the torch module, with its first values. It is called once on each rank, with torch's generator
        seeded from ``run.seed``, and has to return the same values on all ranks.
    recipe: a YAML file, or its values. Of the recipe `run.seed`, `run.deterministic`, `optimizer`, `train` (length and
        batch), `observe`, `phases` or `convergence` and `lora`, `deepspeed`, `checkpoint` and `model.compile` apply;
        the rest is for runs of `prelora_ds.train`.
    families: family -> a regular expression for whole module paths, with a group ``(?P<layer>\\d+)``.
    samples_per_epoch: how many samples an epoch has, for durations in epochs.
    deepspeed: a DeepSpeed JSON file, if the recipe has no section `deepspeed`.

    Every method but the properties is collective. Raises ConfigError.
    """

    def __init__(self, make_model: Callable[[], nn.Module], recipe: str | Path | Mapping[str, Any], *,
                 families: Mapping[str, str], samples_per_epoch: int, deepspeed: str | Path | None = None) -> None:
        self.config = loop_config(recipe, families, samples_per_epoch, deepspeed)
        self.timeline = Timeline(samples_per_epoch, self.config.train.global_batch_size, self.config.train.duration)
        self._observed_at = self.timeline.ticks(self.config.observe.every)
        self._make_model = make_model
        self._outline: nn.Module | None = None  # the model without values
        self._engine: LoopEngine | None = None
        self._state: RunState
        self._controller: PhaseController
        self._meter: SpectrumMeter | None = None
        self._unreduced: list[Taken] = []  # the steps since the last observation, or since the last checkpoint
        self._saver: Saver | None = None
        self._saved_own: Mapping[str, Any] = {}

    # ---- where the run is

    @property
    def step(self) -> int:
        """How many optimizer steps have been taken."""
        self._loop()
        return self._state.step

    @property
    def total_steps(self) -> int:
        """How many optimizer steps the run has."""
        return self.timeline.total_steps

    @property
    def done(self) -> bool:
        """Whether the last step has been taken."""
        return self.step >= self.total_steps

    @property
    def state(self) -> PhaseState:
        """The phase with its plan, the reason for it, and the windows of norms and losses so far."""
        self._loop()
        return self._state.phase

    # ---- the loop

    def start(self) -> LoopEngine:
        """Build the engine of the first step.

        Raises ConfigError on all ranks, before any engine is built, if the model does not fit the recipe or differs
        between ranks.
        """
        weights = self._build_model()
        engine, self._state = first_engine(self.config, self._controller, weights, None, num_labels=0,
                                           make_module=self._new_module)
        return self._begin(engine)

    def load(self, folder: str | Path) -> tuple[LoopEngine, dict[str, Any]]:
        """Build the engine of the newest intact checkpoint in ``folder``, and return it with the ``own`` of `save`.

        folder: as in `save`, or one checkpoint below it. Later checkpoints are set aside, and the next ones are written
            to the same folder. Rank 0's folder counts.

        Raises ConfigError on all ranks as `start` does, if there is no checkpoint or none is intact, or if the recipe
        has changed in more than what may differ between jobs.
        """
        self._build_model()
        place = on_rank_0(lambda: os.fspath(folder))
        candidates = on_rank_0(lambda: checkpoints_at(place, "folder"))
        run = RunFolder(root_of(candidates[0]).parent)
        checkpoint = load_newest(candidates, run, self._controller.layout, _say, key="folder")
        assert checkpoint is not None, "there are candidates"
        on_all_ranks(lambda: _check_same_settings(checkpoint.config, self.config, checkpoint.folder))
        rewind_output(run, checkpoint)
        on_rank_0(lambda: discard_partial(run.checkpoints))

        self._state = checkpoint.run
        own = dict(checkpoint.own)
        engine = restored_engine(self.config, self._controller, checkpoint, num_labels=0,
                                 make_module=self._new_module)
        self._saver = self._new_saver(run)
        self._saver.continue_from(checkpoint)
        self._saved_own = own
        return self._begin(engine), own

    def after_step(self) -> LoopEngine:
        """Count the step that the engine has taken, decide, and return the engine of the next step.

        It is the same engine, or if a phase has ended that of the next phase, and then the former one raises
        StaleEngineError. Norms are measured and losses reduced over ranks only at the steps of `observe.every`.

        Raises TrainingDivergedError on all ranks if a loss since the last reduction is not finite.
        """
        loop = self._loop()
        engine = loop.live()
        if loop.taken is None:
            raise RuntimeError("after_step() was called before step()")
        taken, loop.taken = loop.taken, None
        self._unreduced.append(taken)

        state = self._state
        step = state.step + 1
        if step in self._observed_at:
            self._reduce_losses(engine, step)
            if state.window.steps:
                state.phase = self._decide(engine, state, step)
        state.phase = self._controller.after_step(state.phase, step, importance=taken.importance,
                                                  updated=not taken.skipped)
        state.step = step
        return self._follow(loop, engine)

    def save(self, folder: str | Path, own: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint of this step to ``folder/checkpoints``, and remove older ones (`checkpoint.keep_last`).

        own: what the loop needs in order to continue, such as its position in the data, as values of JSON. Rank 0's
            is saved.

        Call it between two steps. Raises ConfigError on all ranks if the folder has checkpoints of another run or
        ``own`` is not JSON, and NotSavedError if the checkpoint could not be written; earlier ones stay.
        """
        loop = self._loop()
        engine = loop.live()
        if loop.taken is not None or engine.micro_batches_done:
            raise RuntimeError("save() was called within a step; call it after after_step()")
        if engine.plan != self.state.plan:
            raise RuntimeError("save() was called after after_step() had failed: the engine is not that of its phase")
        saver = self._saver_for(RunFolder(Path(on_rank_0(lambda: os.fspath(folder)))))
        own = on_rank_0(lambda: _as_json(own or {}))
        self._reduce_losses(engine, self.step)
        if saver.last_step == self.step:
            if own == self._saved_own:
                return
            on_rank_0(lambda: set_aside(saver.root, [step_folder(saver.root, self.step)]))
        if not saver.save(engine, self._state, wait=True, own=own):
            raise NotSavedError(
                f"the checkpoint of step {self.step} could not be written to {saver.root}\n"
                "  remedy: free space there, or save to another folder; the run can continue"
            )
        self._saved_own = own

    def export(self, folder: str | Path) -> None:
        """Write the model with its adapters merged to ``folder``, in fp32, and end the engine.

        A model of transformers becomes a folder for its ``from_pretrained``, any other model.safetensors with the
        module's own names. Raises NotSavedError on all ranks if the folder cannot be written.
        """
        module: Any = self._new_module()
        engine = self._end("its model was exported")
        write = partial(write_pretrained, model=module) if hasattr(module, "save_pretrained") else write_tensors
        export_weights(engine, Path(folder), lambda weights, partial_folder: write(weights, folder=partial_folder))

    def close(self) -> None:
        """End the engine and free its memory."""
        release_checked(self._end("the run was closed"))

    # ---- parts of these

    def _loop(self) -> LoopEngine:
        if self._engine is None:
            raise RuntimeError("call start() or load() first")
        return self._engine

    def _build_model(self) -> EngineState:
        """Build the model and check it on all ranks; return this rank's part of its first values."""
        if self._engine is not None:
            raise RuntimeError("this run has begun; make another Phases for another run")
        init_process_group(deterministic=self.config.run.deterministic)
        layout, weights, digest = on_all_ranks(self._checked_model)
        _check_ranks_built_the_same(digest)
        self._meter = SpectrumMeter(first_values(weights, layout)) if self.config.observe.spectra else None
        self._controller = PhaseController(layout=layout, timeline=self.timeline, phases=self.config.specs(),
                                           seed=self.config.run.seed)
        return weights

    def _checked_model(self) -> tuple[Layout, EngineState, Mapping[str, str]]:
        check_world(self.config, dist.get_world_size())
        for phase in self.config.phase_list:
            zero = self.config.for_phase(phase.name).deepspeed.get("zero_optimization", {})
            check_zero_config(zero)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.run.seed)
            module = self._make_model()
        if not isinstance(module, nn.Module):
            raise ConfigError("make_model", type(module).__name__, "is the type of what it returned",
                              "return a torch.nn.Module")
        layout = find_layout(module, self.config.families(), self.config.model.families, factory="make_model")
        digest = {"recipe": _digest_of_text(self.config.model_dump_json()), "make_model": _digest_of_values(module)}
        weights = initial_state(module, dist.get_rank(), dist.get_world_size())
        self._outline = module.to("meta")
        check_method_fits(self.config, layout, self._new_module)
        return layout, weights, digest

    def _new_module(self) -> nn.Module:
        """Return a new module without values. The function of the user may not work on the meta device."""
        assert self._outline is not None
        try:
            return copy.deepcopy(self._outline)
        except Exception as exc:  # whatever an attribute of a user's module raises
            raise ConfigError("make_model", type(self._outline).__name__, f"cannot be copied: {exc}",
                              "keep files, locks and the like out of the module") from exc

    def _begin(self, engine: Engine) -> LoopEngine:
        self._engine = LoopEngine(engine)
        self._set_next()
        problem = why_unfinished(self.config, self._controller.layout, self.timeline, self.state, self.step)
        if problem is not None:
            _say(f"warning: {problem}")
        return self._engine

    def _end(self, why: str) -> Engine:
        """End the last engine, and return it to be released."""
        loop = self._loop()
        engine = loop.live()
        loop.end(f"this engine ended at step {self.step}, when {why}")
        if self._saver is not None:
            self._saver.close()
        return engine

    def _set_next(self) -> None:
        if self.done:
            self._loop().over = f"the run is over: it has {self.total_steps} steps (train.duration)"
            return
        rates = self._controller.rates(self.state, self.step + 1, self.config.optimizer)
        self._loop().set_next(*rates, self._controller.cut(self.state, self.step + 1))

    def _decide(self, engine: Engine, state: RunState, step: int) -> PhaseState:
        norms = weight_norms(engine).effective
        spectra = {} if self._meter is None else self._meter.measure(engine)
        _, after = decided(self._controller, state, step, norms, spectra)
        return to_follow(self._controller, state.phase, after, step)

    def _follow(self, loop: LoopEngine, engine: Engine) -> LoopEngine:
        if self.state.plan.structure() != engine.plan.structure():
            loop.end(f"this engine ended at step {self.step}; use the one that after_step returned")
        keep_frozen = None if self._saver is None else self._saver.save_frozen
        followed, _ = engine_for(engine, self.state, self._controller, keep_frozen)
        if followed is not engine:
            self._engine = LoopEngine(followed)
        self._set_next()
        return self._loop()

    def _reduce_losses(self, engine: Engine, step: int) -> None:
        """Count the steps since the last reduction up to ``step``, with the mean losses over all ranks."""
        taken, self._unreduced = self._unreduced, []
        if not taken:
            return
        summed = engine.summed([one.loss for one in taken]).float().tolist()
        for number, (one, total) in enumerate(zip(taken, summed, strict=True), start=step - len(taken) + 1):
            loss = total / dist.get_world_size()
            if not math.isfinite(loss):
                raise TrainingDivergedError(f"step {number}, phase {self.state.plan.phase}: the loss is {loss}")
            self._state.count(StepStats(loss, math.nan, one.skipped), self.config.train, data_s=0.0)

    def _saver_for(self, run: RunFolder) -> Saver:
        """The saver of a folder, which is new at the first checkpoint there."""
        if self._saver is not None and self._saver.root == run.checkpoints:
            return self._saver
        on_rank_0(lambda: _check_unused(run))
        if self._saver is not None:
            self._saver.close()
        self._saver = self._new_saver(run)
        return self._saver

    def _new_saver(self, run: RunFolder) -> Saver:
        return Saver(run, self.config, self.timeline, _say)


def loop_config(recipe: str | Path | Mapping[str, Any], families: Mapping[str, str], samples_per_epoch: int,
                deepspeed: str | Path | None = None) -> Config:
    """The config of a run whose model and data are those of a loop. The arguments are those of `Phases`.

    Raises ConfigError.
    """
    if not families:
        raise ConfigError("families", families, "names no linears", r'set one, such as {"fc": r".*(?P<layer>\d+)\.fc"}')
    values = read_settings(recipe, deepspeed_config=deepspeed, recipe_key="recipe")

    def section(name: str) -> dict[str, Any]:
        given = values.get(name)
        if not isinstance(given, dict | None):
            raise ConfigError(name, given, "must be a mapping", "see docs/config.md")
        return given or {}

    compiled = section("model").get("compile", False)
    values["model"] = {"factory": OWN_MODEL, "families": dict(families), "compile": compiled}
    values["run"] = {"name": "own loop", "output_dir": "-"} | section("run")
    values["data"] = {"train": "-", "val": "-", "reader": "webdataset", "samples_per_epoch": samples_per_epoch}
    if not isinstance(values.get("phases"), list):  # of a preset, all families have adapters
        values["lora"] = {"families": list(families)} | section("lora")
    config = validate(values, "the recipe" if isinstance(recipe, Mapping) else str(recipe))
    for phase in config.phase_list:
        for key in ("micro_batch_size", "zero_stage"):
            if getattr(phase, key) == "auto":
                raise ConfigError(f"phases.{phase.name}.{key}", "auto", "is predicted from the sizes of a ViT, and the "
                                  "model of this loop is unknown", "set a number")
    return config


def _check_ranks_built_the_same(digest: Mapping[str, str]) -> None:
    """Raise ConfigError on all ranks if one of them has another recipe or another model. Collective."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, digest)
    remedies = {
        "recipe": "start all ranks with the same recipe",
        "make_model": "draw the first values from torch's generator, which is seeded alike on all ranks, or read them "
                      "from the same file",
    }
    for key, remedy in remedies.items():
        for rank, other in enumerate(ranks):
            if other[key] != ranks[0][key]:
                raise ConfigError(key, f"rank {rank}", "differs from that of rank 0, in its values or its names",
                                  remedy)


def _digest_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_of_values(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _check_same_settings(stored: Mapping[str, Any], config: Config, checkpoint: Path) -> None:
    """Raise ConfigError if the settings of a checkpoint may not be replaced by those of ``config``."""
    before = settings_of(stored, config, checkpoint, new_run=False)
    for key, old, new in binding_differences(before, config.model_dump(mode="json")):
        raise ConfigError(key, new, f"was {old!r} in {checkpoint} and cannot change when loading",
                          "set it to that value, or begin a new run with start() and save it to another folder")


def _check_unused(run: RunFolder) -> None:
    """Raise ConfigError if a new run may not save to this folder."""
    try:
        used = list_checkpoints(run.checkpoints)
        discard_partial(run.checkpoints)
    except OSError as exc:
        raise cannot_write("folder", str(run.path), exc) from exc
    if used:
        raise ConfigError("folder", str(run.path), f"has checkpoints of another run, such as {used[0].name}",
                          "continue that run with load(), or save to another folder")


def _as_json(own: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        values: Mapping[str, Any] = json.loads(json.dumps(own, allow_nan=False))
    except (TypeError, ValueError) as exc:
        raise ConfigError("own", own, f"is not JSON: {exc}",
                          "save numbers, texts, lists and mappings of them") from exc
    return values


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)
