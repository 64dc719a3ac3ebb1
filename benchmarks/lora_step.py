"""How long does a LoRA step take, compared with a full step?

    python benchmarks/lora_step.py

One process trains blocks of ViT-L width at 224 px in BF16 with batch 16 and adapters of rank 8, 16,
32 and 64 in turn (mean 30). All variants take turns in one run. The result is the median over
rounds, as a ratio to the full step; the limit next to it counts FLOPs of matrix products only. A
step is forward, backward and AdamW on fp32 masters.

A profile shows where a LoRA step is longer than its lower bound, a step of the frozen backbone. A
sweep over widths is the basis of `lora.mode: auto`.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import torch
from harness import interleaved, medians, print_table, record
from support.plans import full_plan, lora_plan, warmup_plan
from torch import nn
from torch.profiler import ProfilerActivity

from prelora_ds.config.adapters import FAMILIES
from prelora_ds.config.model import ModelConfig
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.model.adapters import attach_adapters, refresh_adapters
from prelora_ds.model.adapters.lora import lora_linears
from prelora_ds.model.families import find_layout, named_parameters
from prelora_ds.model.products import lacks_bf16_products, multiply_in_fp32
from prelora_ds.model.vit import build_model

RANKS = (8, 16, 32, 64)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ATTENTION = "eager" if DEVICE.type == "cpu" else "sdpa"


@dataclass
class Variant:
    """A model under one plan. Calling it takes a step and returns its seconds."""

    module: nn.Module
    layers: nn.Module
    inputs: torch.Tensor
    parts: dict[str, list[float]] = field(
        default_factory=lambda: {"forward": [], "backward": [], "optimizer": []}
    )

    def __post_init__(self) -> None:
        self.trained = [p for p in self.module.parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone().requires_grad_() for p in self.trained]
        self.adam = torch.optim.AdamW(self.masters, fused=True) if self.masters else None

    def __call__(self) -> float:
        begun = now()
        output = self.layers(self.inputs)
        loss = (
            (output if isinstance(output, torch.Tensor) else output.logits).float().square().mean()
        )
        forward_done = now()
        loss.backward()
        backward_done = now()
        for p, master in zip(self.trained, self.masters, strict=True):
            master.grad, p.grad = p.grad.float(), None
        if self.adam is not None:
            self.adam.step()
        with torch.no_grad():
            for p, master in zip(self.trained, self.masters, strict=True):
                p.copy_(master)
        refresh_adapters(self.module)
        self.inputs.grad = None
        done = now()
        self.parts["forward"].append(forward_done - begun)
        self.parts["backward"].append(backward_done - forward_done)
        self.parts["optimizer"].append(done - backward_done)
        return done - begun


def now() -> float:
    """Return the time when everything that was queued is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Blocks(nn.Module):
    """Only the encoder blocks of a ViT: [batch, tokens, width] -> the same shape."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.layers = vit.vit.layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def make(
    config: ModelConfig,
    plan: Callable[[Layout], Plan],
    *,
    batch: int,
    whole: bool = False,
    fast: bool = True,
    merged: bool = False,
    fp32_adapters: bool = False,
) -> Variant:
    """Return a variant of the blocks, or with ``whole`` of the complete model.

    Without ``whole`` the blocks compute the gradient of their input if the first block trains, as
    they would with an embedding below them, or if nothing trains.
    """
    torch.manual_seed(0)
    module = build_model(config, 1000)
    layout = find_layout(module, FAMILIES)
    the_plan = plan(layout)
    attach_adapters(module, the_plan, layout, dropout=0.0, kernel="branch" if fast else "peft").to(
        DEVICE, torch.bfloat16
    )
    for name, p in named_parameters(module).items():
        p.requires_grad_(name in the_plan.trainable)
        if fp32_adapters and ".lora_" in name:
            p.data = p.data.float()
    if merged:
        for linear in lora_linears(module):
            linear.keep_fp32_weight()
            linear.fp32_weight.copy_(linear.get_base_layer().weight)
    if whole:
        return Variant(
            module, module, torch.randn(batch, 3, config.image_size, config.image_size).bfloat16().to(DEVICE)
        )
    blocks = Blocks(module)
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    inputs = torch.randn(batch, tokens, config.hidden_size).bfloat16().to(DEVICE)
    inputs.requires_grad_(
        "vit.layers.0.layernorm_before.weight" in the_plan.trainable or not the_plan.trainable
    )
    return Variant(blocks, blocks, inputs)


def ranks_in_turn(layout: Layout) -> dict[str, dict[int, int]]:
    """Return ranks by family and layer, with each of RANKS equally often."""
    return {
        family: {layer: RANKS[(i + layer) % len(RANKS)] for layer in layers}
        for i, (family, layers) in enumerate(layout.targets.items())
    }


def full(layout: Layout) -> Plan:
    """Return the plan of the full phase."""
    return full_plan(layout)


def frozen(layout: Layout) -> Plan:
    """Return a plan in which nothing trains: its step is the lower bound of a LoRA step."""
    return Plan(full(layout).phase, trainable=frozenset())


def warm(layout: Layout, train_a: bool = True) -> Plan:
    """Return the plan of the warm-up."""
    return warmup_plan(layout, ranks_in_turn(layout), train_a=train_a)


def lora(layout: Layout, train_a: bool = True) -> Plan:
    """Return the plan of the LoRA phase."""
    return lora_plan(layout, warm(layout, train_a))


def top_half(layout: Layout) -> Plan:
    """Return a plan of the LoRA phase that freezes the lower half of the blocks."""
    layers = max(layer for family in layout.targets.values() for layer in family) + 1
    return lora_plan(layout, warm(layout, True), freeze_below=layers // 2)


def profile(variant: Variant) -> dict[str, float]:
    """Return the seconds of a step by kind of operator, and the TFLOP/s and GB/s of its matrix products.

    The products are those with weights and adapters. A product is skinny if one of its sides is at
    most the largest rank. GB are what it reads and writes at least, if caches keep nothing between
    operators.
    """
    variant()
    # The operators of the CPU have the shapes, also where kernels of a GPU take the time.
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        variant()
    seconds = Counter[str]()
    work = Counter[str]()
    moved = Counter[str]()
    for event in profiler.key_averages(group_by_input_shape=True):
        kind = "everything else"
        if event.key in ("aten::mm", "aten::addmm", "aten::addmm_"):
            (m, k), (_, n) = [shape for shape in event.input_shapes if len(shape) == 2][-2:]
            kind = "skinny products" if min(m, k, n) <= max(RANKS) else "large products"
            work[kind] += 2 * m * k * n * event.count
            sums = event.key == "aten::addmm_"  # it reads what it adds to
            moved[kind] += 2 * (m * k + k * n + m * n * (2 if sums else 1)) * event.count
        elif event.key in ("aten::bmm", "aten::baddbmm"):
            kind = "attention products"
        spent = (
            event.self_device_time_total if DEVICE.type == "cuda" else event.self_cpu_time_total
        )
        seconds[kind] += spent / 1e6
    rates = {f"{kind}, TFLOP/s": flops / seconds[kind] / 1e12 for kind, flops in work.items()}
    rates |= {f"{kind}, GB/s": size / seconds[kind] / 1e9 for kind, size in moved.items()}
    return {**{f"{kind} s": s for kind, s in sorted(seconds.items())}, **rates}


def copy_rate(tokens: int, width: int) -> float:
    """Return the GB/s of a copy of a BF16 [tokens, width], of which a read and a write count.

    It is the limit of what skinny products can read and write.
    """
    source = torch.randn(tokens, width, device=DEVICE).bfloat16()
    target = torch.empty_like(source)
    seconds = []
    for _ in range(20):
        begun = now()
        target.copy_(source)
        seconds.append(now() - begun)
    return 2 * source.nbytes / median(seconds) / 1e9


def widths(batch: int, rounds: int) -> list[dict[str, float]]:
    """Time a LoRA step of two blocks at several widths, in the modes that `auto` can choose."""
    rows = []
    for width in (96, 192, 384, 768, 1024):
        config = ModelConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=max(3, width // 64),
            num_hidden_layers=2,
            attn_implementation=ATTENTION,
        )
        blocks = partial(make, config, batch=batch)
        variants = {
            "full": blocks(full),
            "branch": blocks(lora),
            "merged": blocks(lora, merged=True),
        }
        seconds = medians(interleaved(variants, rounds))
        rows.append(
            {
                "width": width,
                "full step s": seconds["full"],
                **{
                    f"{mode} of full": seconds[mode] / seconds["full"]
                    for mode in ("branch", "merged")
                },
            }
        )
    return rows


def flops(config: ModelConfig, kind: str) -> float:
    """Return the FLOPs of the matrix products of one image and block, relative to a full step's.

    Each product of [m, k] and [k, n] counts 2 m n k.
    """
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    d, f, r = config.hidden_size, config.intermediate_size, sum(RANKS) / len(RANKS)
    linear, attention = 2 * tokens * (4 * d * d + 2 * d * f), 4 * tokens * tokens * d
    skinny = (
        2 * tokens * r * (4 * 2 * d + 2 * (d + f))
    )  # x A^T and h B^T; r times (in + out) of each linear
    one_way = 2 * linear + 3 * attention  # without gradients of weights
    branch = one_way + 3 * skinny
    counted = {
        "full": 3 * (linear + attention),
        "frozen": one_way,
        "warmup": 3 * (linear + attention + skinny),
        "branch": branch,
        "merged": one_way + 2 * skinny,
        "fa": one_way + 2.5 * skinny,
        "half": (linear + attention + skinny + branch) / 2,
    }
    return counted[kind] / counted["full"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16 if DEVICE.type == "cpu" else 64)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--whole-layers",
        type=int,
        default=24,
        help="blocks of the complete model, for the variant with the top half active",
    )
    parser.add_argument("--whole-rounds", type=int, default=3)
    args = parser.parse_args()
    if lacks_bf16_products():
        multiply_in_fp32()
    config = ModelConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=args.layers,
        attn_implementation=ATTENTION,
    )
    blocks = partial(make, config, batch=args.batch)
    variants = {
        "full step": (blocks(full), "full"),
        "warm-up step": (blocks(warm), "warmup"),
        "frozen backbone": (blocks(frozen), "frozen"),
        "LoRA, branch": (blocks(lora), "branch"),
        "LoRA, merged": (blocks(lora, merged=True), "merged"),
        "LoRA, fa": (blocks(partial(lora, train_a=False)), "fa"),
        "LoRA, branch, top half active": (blocks(top_half), "half"),
        "peft, as it comes": (blocks(lora, fast=False, fp32_adapters=True), "branch"),
        "peft, adapters in BF16": (blocks(lora, fast=False), "branch"),
    }
    seconds = interleaved({name: variant for name, (variant, _) in variants.items()}, args.rounds)
    ratio = {name: s / medians(seconds)["full step"] for name, s in medians(seconds).items()}
    rows = [
        {
            "variant": name,
            "step s": median(seconds[name]),
            "of full": ratio[name],
            "limit by FLOPs": flops(config, kind),
            **{f"{part} s": median(values[1:]) for part, values in variant.parts.items()},
        }
        for name, (variant, kind) in variants.items()
    ]
    whole = partial(
        make,
        config.model_copy(update={"num_hidden_layers": args.whole_layers}),
        batch=args.batch,
        whole=True,
    )
    profiles = [
        {"variant": name, **profile(variants[name][0])}
        for name in ("frozen backbone", "LoRA, branch")
    ]
    tokens = args.batch * ((config.image_size // config.patch_size) ** 2 + 1)
    copied = {f"copy of [{tokens:,}, {width:,}], GB/s": copy_rate(tokens, width) for width in (1024, 4096)}
    variants.clear()  # frees memory for the complete model
    swept = widths(args.batch // 2, args.rounds)
    both = medians(interleaved({"full": whole(full), "half": whole(top_half)}, args.whole_rounds))
    rows.append(
        {
            "variant": f"whole model, {args.whole_layers} blocks, full",
            "step s": both["full"],
            "of full": 1.0,
        }
    )
    rows.append(
        {
            "variant": f"whole model, {args.whole_layers} blocks, top half active",
            "step s": both["half"],
            "of full": both["half"] / both["full"],
            "limit by FLOPs": flops(config, "half"),
        }
    )
    print_table(
        rows,
        f"{args.layers} blocks of ViT-L width, batch {args.batch}, mean rank {sum(RANKS) / len(RANKS):g}",
    )
    print_table(profiles, "Where the time of a step goes, by operator")
    print_table([copied], "The limit of what skinny products read and write")
    print_table(swept, f"2 blocks of other widths, batch {args.batch // 2}")
    record(
        "lora_step",
        {
            "lora_r30_vs_full": ratio["LoRA, branch"],
            "lora_r30_vs_floor": ratio["LoRA, branch"] / ratio["frozen backbone"],
            "merged_r30_vs_full": ratio["LoRA, merged"],
            "fa_r30_vs_full": ratio["LoRA, fa"],
            "frozen_vs_full": ratio["frozen backbone"],
            "warmup_vs_full": ratio["warm-up step"],
            "half_active_vs_full": ratio["LoRA, branch, top half active"],
            "half_active_whole_vs_full": both["half"] / both["full"],
            "peft_default_vs_full": ratio["peft, as it comes"],
            "peft_same_dtype_vs_full": ratio["peft, adapters in BF16"],
        },
        [*rows, *profiles, copied, *swept],
        notes="Medians over rounds; all variants of the blocks are interleaved in one run. The limit counts matrix "
        "products only, without LayerNorm, GELU, softmax and the optimizer. The branch takes longer than the "
        "frozen backbone because of its skinny products, whose FLOPs cannot be reduced; the profile shows "
        "their TFLOP/s, and their GB/s beside those of a copy.",
    )


if __name__ == "__main__":
    main()
