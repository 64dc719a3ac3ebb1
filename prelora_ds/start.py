"""From a recipe to a run: everything that can be wrong is checked first, then the process group is made."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from prelora_ds.config.load import check_world, dump_yaml, load_config
from prelora_ds.config.tree import Config
from prelora_ds.core.layout import Layout
from prelora_ds.core.phases import plans_at_rank
from prelora_ds.core.schedule import Timeline
from prelora_ds.errors import ORPHAN_EXIT_CODE, ConfigError, LaunchError, Stopped
from prelora_ds.hosts.ancestors import launcher_here
from prelora_ds.hosts.check_in import call_the_roll, declining, make_of
from prelora_ds.hosts.discovery import Ranks
from prelora_ds.hosts.heartbeat import Supervision
from prelora_ds.hosts.mpi import complete
from prelora_ds.hosts.network import choose_interface
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.guard import Guard, end_now
from prelora_ds.run.stop import StopRequest

if TYPE_CHECKING:
    from prelora_ds.data.manifest import Manifest
    from prelora_ds.data.setup import TrainData
    from prelora_ds.run.claim import Claim


def start(ranks: Ranks, recipe: str, overrides: Sequence[str], deepspeed_config: str | None,
          resume: str = "auto", watch: Supervision | None = None, stop: StopRequest | None = None,
          guard: Guard | None = None) -> None:
    """Check, then train. Raises ConfigError before any process group or weight is made; Stopped after a checkpoint.

    resume: auto (go on with what run.output_dir holds), never, or a checkpoint or run to go on from. watch: the rank's
    side of a supervisor. stop: made when the rank began, for its walltime. guard: one that has been
    started.
    """
    config = load_config(recipe, overrides, deepspeed_config)
    with declining(ranks, os.environ):  # another host may have other data, devices and disks
        config, train_data, val_data = check_run(config, ranks)

        # torch and DeepSpeed take seconds to import: only now, when the cheap mistakes are out
        from prelora_ds.data.setup import fingerprints, samples_per_epoch
        from prelora_ds.engine.runtime import (
            check_zero_config,
            choose_accelerator,
            init_process_group,
        )

        choose_accelerator()
        for phase in config.phase_list:
            check_zero_config(config.for_phase(phase.name).deepspeed.get("zero_optimization", {}))
        from prelora_ds.run.claim import claim_output

    folder = RunFolder(Path(config.run.output_dir))
    stop = stop or StopRequest()
    stop.walltime_s = config.checkpoint.walltime
    guard = guard or Guard(rank=ranks.rank, stop=stop).start()
    guard.beat()
    guard.limit_s = config.guard.hang_limit
    watch = watch or Supervision(None, ranks.rank)

    def give_up(error: LaunchError) -> NoReturn:
        watch.failed(error)
        end_now(error.exit_code, f"error: {error}")

    ranks = complete(ranks, config.launch.interface)
    assert ranks.master_addr is not None, "complete finds it, or raises"
    claim: Claim | None = None
    sources: Sequence[Path] = ()
    origin: str | None = None
    with declining(ranks, os.environ):
        choose_interface(config.launch.interface, ranks.master_addr, os.environ)
        ranks.export(os.environ)
        if ranks.rank == 0:
            timeline = Timeline(samples_per_epoch(config, len(train_data)),
                                config.train.global_batch_size, config.train.duration)
            claim = claim_output(folder, config, resume,
                                 fingerprints(train_data, val_data), train_data.classes,
                                 steps=timeline.total_steps)
            sources, origin = claim.sources, claim.origin
    try:
        if claim is not None:
            guard.watch(claim.lock.check)
            print(dump_yaml(config), flush=True)
            warn_of_a_short_run(config, timeline)
        guard.beat(2 * config.launch.timeout_s)  # the roll call ends by itself, and says who is missing
        # After the claim: a rank 0 that is refused its folder has not yet let the others in, and its exit code counts.
        hosts = call_the_roll(ranks, make_of(dump_yaml(config)), os.environ, config.launch.timeout_s, give_up,
                              launcher_here())
        guard.beat()
        init_process_group()
        from prelora_ds.train import train

        try:
            train(config, train_data, val_data, hosts, sources=sources, origin=origin, stop=stop, guard=guard)
            if ranks.rank == 0:
                report_if_possible(folder)
            watch.mark("DONE")
        except Stopped as why:
            guard.look()  # another rank may have seen it first
            if guard.orphaned:  # nobody asked the run to end: a supervisor starts it again
                watch.ended(ORPHAN_EXIT_CODE, guard.orphaned)
            watch.mark("STOPPED")
            close_process_group()
            if guard.orphaned and guard.orphaned not in str(why):
                raise Stopped(f"{why}; {guard.orphaned}") from why
            raise
        except OSError as exc:
            if claim is not None and (lost := claim.lock.lost()) is not None:
                raise lost from exc
            raise
        close_process_group()
    finally:
        if claim is not None:
            claim.lock.release()
        guard.stop()


def check_run(config: Config, ranks: Ranks) -> tuple[Config, TrainData, Manifest]:
    """Hold the config against the world, the data and the model's names; returns it, with every `auto` resolved, and
    both data sets.

    Raises ConfigError.
    """
    check_world(config, ranks.world_size)
    from prelora_ds.data.setup import open_data
    from prelora_ds.run.autosize import resolve_auto

    train_data, val_data = open_data(config, sizes=ranks.local_rank == 0)
    layout = check_phases(config, len(train_data.classes))
    return resolve_auto(config, layout, ranks), train_data, val_data


def warn_of_a_short_run(config: Config, timeline: Timeline) -> None:
    """Say when the warm-up of the rate is longer than the run: legal for a trial, and no training."""
    warmup = timeline.step_after(0, config.optimizer.warmup)
    if warmup > timeline.total_steps:
        print(f"warning: optimizer.warmup = {config.optimizer.warmup} takes {warmup} steps, and the run has "
              f"{timeline.total_steps}: the rate never reaches optimizer.lr", flush=True)


def report_if_possible(folder: RunFolder) -> None:
    """Print the table of a run that has ended well, also where its logs are damaged or gone."""
    from prelora_ds.reporting.table import print_report

    try:
        print_report(folder)
    except ConfigError as error:
        print(f"warning: there is no report: {error}", flush=True)


def check_phases(config: Config, num_labels: int) -> Layout:
    """Raise ConfigError when a phase does not fit the model, now and not days into a run; returns the model's layout.

    That is a family or a set of parameters that matches nothing, or an adapter that cannot be attached. The model is
    built without weights (on the meta device).
    """
    import torch

    from prelora_ds.model.adapters import attach_adapters
    from prelora_ds.model.families import find_layout
    from prelora_ds.model.vit import build_model

    with torch.device("meta"):
        layout = find_layout(build_model(config.model, num_labels), config.families(), config.model.families)
    for i, phase in enumerate(config.phase_list):
        try:
            plan = plans_at_rank(config.specs()[: i + 1], layout)[-1]
        except ValueError as exc:
            raise ConfigError(f"phases.{phase.name}", phase.model_dump(mode="json", exclude_defaults=True), str(exc),
                              "name parameters and layers of this model") from exc
        if phase.begins is None:
            continue
        with torch.device("meta"):
            module = build_model(config.model, num_labels)
        try:
            attach_adapters(module, plan, layout, dropout=phase.begins.dropout)
        except (RuntimeError, ValueError) as exc:
            families = list(phase.begins.families or config.families())
            raise ConfigError("lora.families", families, f"adapters cannot be attached in phase {phase.name}: {exc}",
                              "choose other families, or narrow model.families") from exc
    return layout


def close_process_group() -> None:
    """Leave the process group; a rank that just ends makes the others warn."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
