"""Build a DeepSpeed engine from a plan and a state: `build_engine`."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.utils import logger
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module
from torch import nn
from transformers import ViTForImageClassification

from prelora_ds.config.tree import Config
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.cost.bytes import bucket_elements
from prelora_ds.engine.active import apply_active
from prelora_ds.engine.engine import NO_STEPS, Counters, Engine
from prelora_ds.engine.norms import read_norms_once
from prelora_ds.engine.optimizer import bind_names, make_optimizer
from prelora_ds.engine.restore import restore_state
from prelora_ds.engine.runtime import device, share_timeout
from prelora_ds.engine.state import EngineState
from prelora_ds.model.adapters import attach_adapters, check_adapters, check_names
from prelora_ds.model.adapters.linear import adapted_linears
from prelora_ds.model.adapters.lora import lora_linears
from prelora_ds.model.families import MakeModule, named_parameters
from prelora_ds.model.patches import patches_as_products
from prelora_ds.model.vit import build_model, compile_blocks


def build_engine(
    run_config: Config,
    plan: Plan,
    layout: Layout,
    num_labels: int,
    state: EngineState,
    counters: Counters = NO_STEPS,
    *,
    parked: frozenset[str] = frozenset(),
    make_module: MakeModule | None = None,
) -> Engine:
    """Build an engine for ``plan`` that holds ``state``, which is consumed. Collective.

    counters: the step counters of the previous engine.
    parked: parameters whose fp32 values stay on the host if the plan freezes them
        (`Engine.parked`). Those of quantised weights always do.
    make_module: returns a new module of the model, on the meta device; None builds the model of
        ``run_config.model`` with ``num_labels`` labels.

    The module is always a new one, because DeepSpeed 0.19 leaves hooks and attributes of an earlier
    engine on its module.
    """
    config = run_config.for_phase(plan.phase)
    ds_config = deepspeed_config(config, plan, layout, comm.get_world_size())
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            module = build_model(config.model, num_labels) if make_module is None else make_module()
        module = empty_module(module, config, plan, layout, ds_config)
    optimizer = make_optimizer(config, plan, layout, module)
    with _quiet_initialize():
        ds, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=ds_config, dist_init_required=False
        )
    share_timeout()
    read_norms_once(ds.optimizer)
    check_adapters(ds.module, plan)
    bind_names(ds, plan.measured(layout))
    kept = restore_state(ds, plan, layout, state, parked=(parked | plan.quantised()) - plan.trainable)
    apply_active(ds, plan, layout)
    for _, linear in adapted_linears(ds.module):
        linear.micro_batches = ds.gradient_accumulation_steps()
    for name, value in vars(counters).items():
        setattr(ds, name, value)
    # DeepSpeed ends a step when micro_steps is a multiple of the accumulation. Realign it: the
    # accumulation may have changed with the world size or the micro-batch size.
    ds.micro_steps -= ds.micro_steps % ds.gradient_accumulation_steps()
    engine = Engine(run_config, plan, layout, num_labels, ds, kept, make_module)
    engine.measure(config.importance)
    ds.train()  # `make_module` may return a module in evaluation mode
    return engine


@contextlib.contextmanager
def _quiet_initialize() -> Iterator[None]:
    """Suppress what DeepSpeed 0.19 prints whenever an engine is initialized.

    At stage 1 it prints its memory use to stdout, and for an optimizer that is not its own it logs
    a warning (runtime/engine.py, _do_optimizer_sanity_check).
    """

    def is_worth_logging(record: logging.LogRecord) -> bool:
        return "untested optimizer" not in record.getMessage()

    logger.addFilter(is_worth_logging)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.removeFilter(is_worth_logging)


def deepspeed_config(config: Config, plan: Plan, layout: Layout, world_size: int) -> dict[str, Any]:
    """Return the DeepSpeed config of one phase: the user's ZeRO section plus the recipe's keys."""
    ds = copy.deepcopy(config.deepspeed)
    zero = ds.setdefault("zero_optimization", {})
    # ZeRO-3 allocates the full size of a bucket.
    zero["reduce_bucket_size"] = bucket_elements(plan, layout, config.zero)
    if config.zero.stage == 2:
        # One rank has nothing to wait for, and DeepSpeed would only synchronise the device once more.
        zero.setdefault("overlap_comm", config.zero.overlap_comm and world_size > 1)
    ds |= {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.grad_accum_steps(world_size),
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "bf16": {**ds.get("bf16", {}), "enabled": True},
        "communication_data_type": config.train.reduce_dtype,  # DeepSpeed's default is BF16, also for accumulation
        "steps_per_print": None,
        # They measure nothing that anybody reads, and wait for the device twice in each micro-batch.
        "timers": {"throughput": {"enabled": False}},
        # DeepSpeed 0.19 recognises optimizers by their exact class, and ours are subclasses
        # (runtime/zero/utils.py, ZERO_SUPPORTED_OPTIMIZERS).
        "zero_allow_untested_optimizer": True,
    }
    # Stage 0 accumulates only in BF16, so the config refuses accumulation there.
    if config.zero.stage > 0:
        ds["data_types"] = {"grad_accum_dtype": "fp32"}
    return ds


def empty_module(
    module: nn.Module, config: Config, plan: Plan, layout: Layout, ds_config: Mapping[str, Any]
) -> nn.Module:
    """Make ``module``, which is on the meta device, a BF16 module of zeros on this rank's device with its adapters.

    At stage 3 each parameter is partitioned as soon as it exists, so no rank ever holds them all.
    """
    attach_adapters(
        module, plan, layout, dropout=config.adapters.dropout, kernel=config.adapters.mode
    )
    check_names(module, plan, layout)
    module.to(torch.bfloat16)
    if device().type != "cpu":
        patches_as_products(module)

    partitioner: Init | None = None
    if config.zero.stage == 3:
        partitioner = Init(module=nn.Module(), config_dict_or_path=dict(ds_config))
    for submodule in module.modules():
        for key, p in submodule.named_parameters(recurse=False):
            zeros = nn.Parameter(torch.zeros_like(p, device=device()))
            setattr(submodule, key, zeros)
            if partitioner is not None:
                partitioner._convert_to_zero_parameters([zeros])
        for key, b in submodule.named_buffers(recurse=False):
            submodule.register_buffer(
                key,
                torch.zeros_like(b, device=device()),
                persistent=key not in submodule._non_persistent_buffers_set,
            )

    for name, p in named_parameters(module).items():
        p.requires_grad_(name in plan.trainable)
    if config.kernel() == "merged":
        for linear in lora_linears(module):
            if not linear.get_base_layer().weight.requires_grad:
                linear.keep_fp32_weight()

    units = units_of(module, plan, layout, config)
    for prefix in units:
        set_z3_leaf_module(module.get_submodule(prefix), True)
    if config.model.compile:
        # DeepSpeed's hooks on the submodules of a block would break its graph.
        compiled = units if config.zero.stage == 3 else [prefix.removesuffix(".") for prefix in layout.blocks]
        compile_blocks([module.get_submodule(path) for path in compiled])
    return module


def units_of(module: nn.Module, plan: Plan, layout: Layout, config: Config) -> list[str]:
    """Return the paths of the blocks that stage 3 gathers and reduces as units, which takes fewer messages and hooks.

    DeepSpeed 0.19 calls them leaf modules, and reduces all gradients of such a block in its backward hook
    (runtime/zero/stage3.py, create_reduce_and_remove_grad_hooks). These are not units:

    - the blocks of a phase that chooses which adapters train, because DeepSpeed would reduce zeros for the others and
      then fail in `zero_grad`;
    - a block before which nothing trains. If no input of a block needs a gradient, torch calls its backward hook before
      its parameters have gradients;
    - the blocks of another model than our ViT, unless they are compiled: the same happens if their inputs are keywords,
      and DeepSpeed fails if a block runs twice in a step.
    """
    if config.zero.stage < 3 or config.phase(plan.phase).active is not None or plan.training() != plan.trainable:
        return []
    if type(module) is not ViTForImageClassification and not config.model.compile:
        return []
    units = []
    trains = not plan.trainable.isdisjoint(layout.before_blocks())
    for prefix in layout.blocks:
        if trains:
            units.append(prefix.removesuffix("."))
        trains = trains or any(name.startswith(prefix) for name in plan.trainable)
    return units
