"""Small runs for tests: configs, plans and batches that depend only on a seed."""

from __future__ import annotations

from typing import Any

from prelora_ds.config.load import validate
from prelora_ds.config.tree import Config
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from support.plans import full_plan, lora_plan, warmup_plan

LABELS = 10
ZEROS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero2_offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3_offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
}
SMALL = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
# Large enough that staging buffers and batches are comparatively small, and that the C library
# returns pages to the system.
MEDIUM = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}


def config(
    zero: str = "zero2",
    *,
    model: dict[str, Any] | None = None,
    deepspeed: dict[str, Any] | None = None,
    micro: int = 4,
    batch: int = 8,
    chooses: bool = False,
    **sections: dict[str, Any] | list[Any] | None,
) -> Config:
    """Return the config of a small ViT.

    A mapping among ``sections`` replaces keys of that section, anything else the whole section.
    chooses: whether the LoRA phase may choose which parameters train (`Engine.set_active`).
    """
    values: dict[str, Any] = {
        "run": {"name": "test", "output_dir": "out/test"},
        "model": model or SMALL,
        "data": {"train": "-", "val": "-"},
        "optimizer": {"lr": 1e-3, "warmup": "0 steps"},
        "train": {"duration": "100 steps", "global_batch_size": batch, "micro_batch_size": micro},
        "deepspeed": {"zero_optimization": ZEROS[zero], **(deepspeed or {})},
        "convergence": {"tau": 1.0, "zeta": 5.0},  # selects PreLoRA's phases
        # "auto" would choose merged for so narrow a model, whose outputs a switch would round.
        "lora": {"mode": "branch"},
    }
    for name, section in sections.items():
        is_mapping = isinstance(section, dict)
        values[name] = {**values.get(name, {}), **section} if is_mapping else section
    if chooses:
        del values["convergence"]
        adapters = {"rank": 8, **values.pop("lora")}
        active = {"choose": "random", "share": 0.5, "every": "4 steps"}
        values["phases"] = [{"name": "full", "until": "3 steps"},
                            {"name": "warmup", "adapters": adapters, "until": "3 steps"},
                            {"name": "lora", "train": ["adapters", "rest"], "active": active}]
    return validate(values, "test")


def plans(layout: Layout, *, seed: int = 0, train_a: bool = True) -> tuple[Plan, Plan, Plan]:
    """Return the full, warm-up and LoRA plans, which begin after steps 0, 3 and 6.

    Adapters have ranks 8, 16 and 32 in turn.
    """
    ranks = {
        family: {layer: 8 << (i + layer) % 3 for layer in layers}
        for i, (family, layers) in enumerate(layout.targets.items())
    }
    warmup = warmup_plan(layout, ranks, seed=seed, since_step=3, train_a=train_a)
    return full_plan(layout), warmup, lora_plan(layout, warmup, since_step=6)


def micro_batches(cfg: Config, step: int, rank: int, world: int) -> list[Any]:
    """Return this rank's micro-batches of random images.

    They are rows of a global batch that is a function of ``step``.
    """
    import torch

    from prelora_ds.data.batch import MicroBatch

    generator = torch.Generator().manual_seed(1000 + step)
    m = cfg.model
    g = cfg.train.global_batch_size
    images = torch.randint(
        0,
        256,
        (g, m.num_channels, m.image_size, m.image_size),
        dtype=torch.uint8,
        generator=generator,
    )
    labels = torch.randint(0, LABELS, (g,), generator=generator)
    share = g // world
    micro = cfg.train.micro_batch_size
    rows = range(rank * share, (rank + 1) * share, micro)
    return [MicroBatch(images[i : i + micro], labels[i : i + micro]) for i in rows]


class Trainer:
    """A new engine and the number of steps it has taken, for functions that run in ranks.

    begin: the plan of its first step, "full", "warmup" or "lora".
    """

    def __init__(self, cfg: Config, begin: str = "full") -> None:
        import torch
        from deepspeed import comm

        from prelora_ds.engine.build import build_engine
        from prelora_ds.engine.state import initial_state
        from prelora_ds.model.families import find_layout
        from prelora_ds.model.vit import build_model

        self.cfg = cfg
        self.rank = comm.get_rank()
        self.world = comm.get_world_size()
        self.step = 0

        torch.manual_seed(0)
        module = build_model(cfg.model, LABELS)
        self.layout = find_layout(module, cfg.families(), cfg.model.families)
        self.full, self.warmup, self.lora = plans(self.layout, train_a=cfg.lora.train_a)
        state = initial_state(module, self.rank, self.world)
        self.engine = build_engine(cfg, getattr(self, begin), self.layout, LABELS, state)

    def batches(self) -> list[Any]:
        """Return the micro-batches of the next step."""
        return micro_batches(self.cfg, self.step, self.rank, self.world)

    def train(self, steps: int) -> list[float]:
        """Take ``steps`` steps, and return their losses."""
        losses = []
        for _ in range(steps):
            losses.append(self.engine.train_step(self.batches(), lr=1e-3).loss)
            self.step += 1
        return losses

    def switch(self, plan: Plan) -> Any:
        """Switch to ``plan``, and return the report of the transition."""
        from prelora_ds.engine.transition import transition

        self.engine, report = transition(self.engine, plan)
        return report

    def outputs(self) -> Any:
        """Return the logits of a fixed batch."""
        with self.engine.evaluating() as logits:
            return logits(self.batches_of(10_000))

    def batches_of(self, step: int) -> Any:
        """Return the images of rank 0's first micro-batch of ``step``, the same on all ranks."""
        return micro_batches(self.cfg, step, 0, 1)[0][0]

    def snapshot(self) -> dict[str, Any]:
        """Return copies of this rank's state: (name, what) -> tensor or int."""
        from prelora_ds.engine.fragments import adam_state, fragments
        from prelora_ds.engine.optimizer import inner_optimizer

        inner = adam_state(self.engine.ds)
        steps = inner_optimizer(self.engine.ds).steps
        copies: dict[Any, Any] = {}
        for f in fragments(self.engine.ds):
            copies[f.name, "master"] = f.of(f.flat).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                if key in inner.get(f.flat, {}):
                    copies[f.name, key] = f.of(inner[f.flat][key]).clone()
                    copies[f.name, "step"] = steps[f.name]
        return copies

    def whole_state(self) -> dict[str, Any]:
        """Return `snapshot` gathered over ranks: full tensors, comparable between partitionings."""
        import torch
        from deepspeed import comm

        from prelora_ds.engine.fragments import fragments

        shapes = self.engine.plan.parameters(self.layout)
        mine = self.snapshot()
        spans = {f.name: (f.start, f.stop) for f in fragments(self.engine.ds)}
        whole: dict[str, Any] = {}
        gathered: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(gathered, (mine, spans))
        for parts, where in gathered:
            for (name, what), value in parts.items():
                if what == "step":
                    whole[name, what] = value
                    continue
                full = whole.setdefault(
                    (name, what), torch.full(shapes[name], float("nan")).view(-1)
                )
                full[where[name][0] : where[name][1]] = value
        comm.barrier()
        return whole

    def parked_weights(self) -> dict[str, Any]:
        """Return the parked fp32 weights in full, on every rank. Collective."""
        import torch

        from prelora_ds.engine.state import EngineState, gather_full

        shapes = self.engine.plan.parameters(self.layout)
        return {name: gather_full(EngineState({name: part}), name, "value", shapes[name], torch.device("cpu"))
                for name, part in sorted(self.engine.parked.items())}

    def close(self) -> None:
        """Release the engine."""
        from prelora_ds.engine.release import release

        release(self.engine)


def same(a: dict[Any, Any], b: dict[Any, Any]) -> list[Any]:
    """Return the keys at which two snapshots differ by a bit, or that only one of them has."""
    import torch

    different = sorted(set(a) ^ set(b), key=str)
    for key in set(a) & set(b):
        if torch.is_tensor(a[key]):
            equal = torch.equal(a[key].view(torch.int32), b[key].view(torch.int32))
        else:
            equal = a[key] == b[key]
        if not equal:
            different.append(key)
    return different


def only_owned(measured: dict[str, int]) -> bool:
    """Return whether a census knows the owner of all but 2 % of its bytes."""
    return measured["other"] <= 0.02 * sum(measured.values())
