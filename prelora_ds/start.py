"""Turn a recipe into a run: check everything that can be wrong, then create the process group."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from prelora_ds.accelerator import accelerator_fingerprint, choose_accelerator, gpu_address, take_gpu
from prelora_ds.config.load import check_world, dump_yaml, load_config
from prelora_ds.config.tree import Config
from prelora_ds.console import stamped
from prelora_ds.core.layout import Layout
from prelora_ds.core.schedule import Timeline
from prelora_ds.errors import ORPHAN_EXIT_CODE, ConfigError, LaunchError, Stopped
from prelora_ds.hosts.ancestors import find_launcher
from prelora_ds.hosts.check_in import CheckIn, announcing_failure, examines_host
from prelora_ds.hosts.discovery import Ranks
from prelora_ds.hosts.heartbeat import AttemptRecord
from prelora_ds.hosts.installed import environment_fingerprint, installed_code
from prelora_ds.hosts.mpi import with_master_addr
from prelora_ds.hosts.network import choose_interface
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.guard import AFTER_GUARD_S, Guard, end_now
from prelora_ds.run.stop import StopRequest

if TYPE_CHECKING:
    from prelora_ds.data.manifest import Manifest
    from prelora_ds.data.setup import TrainData
    from prelora_ds.run.claim import Claim


@dataclass(frozen=True)
class HostFacts:
    """What one rank of a host has read for all of them: the data sets, and which code is ``installed``."""

    train_data: TrainData
    val_data: Manifest
    installed: Mapping[str, str]


def start(ranks: Ranks, recipe: str, overrides: Sequence[str], deepspeed_config: str | None,
          resume: str = "auto", record: AttemptRecord | None = None,
          stop: StopRequest | None = None, guard: Guard | None = None) -> None:
    """Check the recipe, then train.

    resume: "auto" (resume the run in run.output_dir, if there is one), "never", or the path of a
    checkpoint or run to resume from. record: the rank's records for a supervisor. stop: created
    when the rank started, because the walltime counts from there. guard: a guard that has been
    started.

    Raises ConfigError before any process group or weight is created; Stopped after a checkpoint.
    """
    config = load_config(recipe, overrides, deepspeed_config)
    check_world(config, ranks.world_size)
    facts: HostFacts | None = None
    # Another host may have other data, devices and disks: only this rank may fail here.
    with announcing_failure(ranks, os.environ):
        if ranks.rank == 0:
            check_trackers(config.run.trackers)
        if examines_host(ranks):
            facts = examine_host(config)
            config = check_run(config, ranks, facts)

    folder = RunFolder(Path(config.run.output_dir))
    stop = stop or StopRequest()
    stop.walltime_s = config.checkpoint.walltime
    guard = guard or Guard(rank=ranks.rank, stop=stop).start()
    guard.beat()
    guard.limit_s = config.guard.hang_limit
    record = record or AttemptRecord(None, ranks.rank)

    def give_up(error: LaunchError) -> NoReturn:
        record.record_error(error)
        end_now(error.exit_code, f"error: {error}")

    ranks = with_master_addr(ranks, config.launch.interface)
    assert ranks.master_addr is not None, "with_master_addr finds the address or raises"
    claim: Claim | None = None
    resume_candidates: Sequence[Path] = ()
    resumed_from: str | None = None
    with announcing_failure(ranks, os.environ):
        choose_interface(config.launch.interface, ranks.master_addr, os.environ)
        ranks.export(os.environ)
        if ranks.rank == 0:
            from prelora_ds.data.setup import fingerprints, samples_per_epoch
            from prelora_ds.run.claim import claim_output

            assert facts is not None, "rank 0 examines its host"
            timeline = Timeline(samples_per_epoch(config, len(facts.train_data)),
                                config.train.global_batch_size, config.train.duration)
            claim = claim_output(folder, config, resume,
                                 fingerprints(facts.train_data, facts.val_data), facts.train_data.classes,
                                 steps=timeline.total_steps)
            resume_candidates = claim.resume_candidates
            resumed_from = claim.resumed_from
    try:
        if claim is not None:
            guard.watch(claim.lock.check)
            print(dump_yaml(config), flush=True)
            warn_of_a_short_run(config, timeline)
        guard.beat(2 * config.launch.timeout_s)  # the check-in has its own time limit

        # After the claim: if rank 0 cannot use the folder, the other ranks are still waiting and
        # its exit code is the job's.
        check_in = CheckIn(ranks, os.environ, config.launch.timeout_s, give_up, find_launcher())
        if facts is not None:
            check_in.publish(facts)
        else:
            facts = check_in.facts_of_host()
            with announcing_failure(ranks, os.environ):
                config = check_run(config, ranks, facts)
        fingerprint = environment_fingerprint(dump_yaml(config), facts.installed) | accelerator_fingerprint()
        hosts = check_in.meet(fingerprint, gpu_address())
        guard.beat()
        from prelora_ds.engine.runtime import init_process_group

        init_process_group(config.guard.hang_limit + AFTER_GUARD_S, deterministic=config.run.deterministic)
        from prelora_ds.train import train

        try:
            train(config, facts.train_data, facts.val_data, hosts, resume_candidates=resume_candidates,
                  resumed_from=resumed_from, stop=stop, guard=guard)
            if ranks.rank == 0:
                report_if_possible(folder)
            record.mark_done()
        except Stopped as why:
            guard.check_now()  # another rank may have seen it first
            if guard.orphaned:  # nobody asked the run to end: a supervisor starts it again
                record.record_exit(ORPHAN_EXIT_CODE, guard.orphaned)
            record.mark_stopped()
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


def examine_host(config: Config) -> HostFacts:
    """Open the data of ``config`` and read which code is installed here. Raises ConfigError."""
    from prelora_ds.data.setup import open_data

    return HostFacts(*open_data(config), installed_code())


def check_run(config: Config, ranks: Ranks, facts: HostFacts) -> Config:
    """Check the config against the model, DeepSpeed and the device of this rank; reads no file of the data or the code.

    Returns the config with every "auto" resolved. Raises ConfigError.
    """
    from prelora_ds.run.autosize import resolve_auto

    layout = check_phases(config, len(facts.train_data.classes))
    choose_accelerator()
    take_gpu(ranks.local_rank)  # `auto` asks for its memory
    config = resolve_auto(config, layout, ranks)

    # DeepSpeed takes seconds to import: only now, after the cheap checks.
    from prelora_ds.engine.runtime import check_zero_config

    for phase in config.phase_list:
        check_zero_config(config.for_phase(phase.name).deepspeed.get("zero_optimization", {}))
    return config


def check_trackers(trackers: Sequence[str]) -> None:
    """Raise ConfigError if a tracker needs a package that is not installed here."""
    for tracker, package in (("wandb", "wandb"), ("comet", "comet_ml")):
        try:
            if tracker in trackers:
                version(package)
        except PackageNotFoundError as exc:
            raise ConfigError("run.trackers", tracker, f"needs the package {package}, which is not installed",
                              f"pip install {package}, or remove {tracker} from run.trackers") from exc


def warn_of_a_short_run(config: Config, timeline: Timeline) -> None:
    """Warn when the learning-rate warm-up is longer than the run.

    It is allowed, but probably a mistake.
    """
    warmup = timeline.step_after(0, config.optimizer.warmup)
    if warmup > timeline.total_steps:
        print(stamped(f"warning: optimizer.warmup = {config.optimizer.warmup} is longer "
                      f"({warmup} steps) than the run ({timeline.total_steps} steps): "
                      "the learning rate never reaches optimizer.lr"), flush=True)


def report_if_possible(folder: RunFolder) -> None:
    """Print the summary of a finished run; only warn when its logs are damaged or gone."""
    from prelora_ds.reporting.table import print_report

    try:
        print_report(folder)
    except ConfigError as error:
        print(stamped(f"warning: no summary can be printed: {error}"), flush=True)


def check_phases(config: Config, num_labels: int) -> Layout:
    """Return the layout of the config's model, which is built without weights (on the meta device).

    Raises ConfigError if a family matches nothing, or a phase does not fit the model (`check_method_fits`).
    """
    from functools import partial

    import torch

    from prelora_ds.model.families import find_layout
    from prelora_ds.model.vit import build_model
    from prelora_ds.run.method_fits import check_method_fits

    make_module = partial(build_model, config.model, num_labels)
    with torch.device("meta"):
        layout = find_layout(make_module(), config.families(), config.model.families)
    check_method_fits(config, layout, make_module)
    return layout


def close_process_group() -> None:
    """Leave the process group. If a rank just ended, the others would warn."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
