"""Small runs for tests: configs, plans and batches that depend on a seed alone."""

from __future__ import annotations

from typing import Any

from prelora_ds.config.load import validate
from prelora_ds.config.tree import Config
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from support.plans import full_plan, lora_plan, warmup_plan

LABELS = 10
ZEROS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0}, "zero1": {"stage": 1}, "zero2": {"stage": 2}, "zero3": {"stage": 3},
    "zero2_offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3_offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
}
SMALL = {"image_size": 16, "patch_size": 4, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 128}
# Large enough that staging and batches are small beside it, and that the C library gives pages back.
MEDIUM = {"image_size": 32, "patch_size": 8, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
          "intermediate_size": 1024}


def config(zero: str = "zero2", *, model: dict[str, Any] | None = None, deepspeed: dict[str, Any] | None = None,
           micro: int = 4, batch: int = 8, **sections: dict[str, Any]) -> Config:
    """A config of a small ViT; ``sections`` override whole keys of its sections."""
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "test", "output_dir": "out/test"}, "model": model or SMALL, "data": {"train": "-", "val": "-"},
        "optimizer": {"lr": 1e-3, "warmup": "0 steps"},
        "train": {"duration": "100 steps", "global_batch_size": batch, "micro_batch_size": micro},
        "deepspeed": {"zero_optimization": ZEROS[zero], **(deepspeed or {})},
        "convergence": {"tau": 1.0, "zeta": 5.0},  # the method has PreLoRA's phases, whose plans the tests make
        "lora": {"mode": "branch"},  # so narrow a model would train merged, and a switch round its outputs anew
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return validate(values, "test")


def plans(layout: Layout, *, seed: int = 0, train_a: bool = True) -> tuple[Plan, Plan, Plan]:
    """FULL, WARMUP and LORA plans with ranks 8, 16 and 32 in turn, begun at steps 0, 3 and 6."""
    ranks = {family: {layer: 8 << (i + layer) % 3 for layer in layers}
             for i, (family, layers) in enumerate(layout.targets.items())}
    warmup = warmup_plan(layout, ranks, seed=seed, since_step=3, train_a=train_a)
    return full_plan(layout), warmup, lora_plan(layout, warmup, since_step=6)


def micro_batches(cfg: Config, step: int, rank: int, world: int) -> list[Any]:
    """This rank's micro-batches of random images, rows of one global batch that is a function of ``step``."""
    import torch

    from prelora_ds.data.batch import MicroBatch

    generator = torch.Generator().manual_seed(1000 + step)
    m, g = cfg.model, cfg.train.global_batch_size
    images = torch.randint(0, 256, (g, m.num_channels, m.image_size, m.image_size), dtype=torch.uint8,
                           generator=generator)
    labels = torch.randint(0, LABELS, (g,), generator=generator)
    share, micro = g // world, cfg.train.micro_batch_size
    rows = range(rank * share, (rank + 1) * share, micro)
    return [MicroBatch(images[i:i + micro], labels[i:i + micro]) for i in rows]


class Trainer:
    """An engine from scratch and the steps it has taken; for functions that run in ranks.

    begin: the plan of its first step, "full", "warmup" or "lora".
    """

    def __init__(self, cfg: Config, begin: str = "full") -> None:
        import torch
        from deepspeed import comm

        from prelora_ds.engine.build import build_engine
        from prelora_ds.engine.state import initial_state
        from prelora_ds.model.families import find_layout
        from prelora_ds.model.vit import build_model

        self.cfg, self.rank, self.world, self.step = cfg, comm.get_rank(), comm.get_world_size(), 0
        torch.manual_seed(0)
        module = build_model(cfg.model, LABELS)
        self.layout = find_layout(module, cfg.families(), cfg.model.families)
        self.full, self.warmup, self.lora = plans(self.layout, train_a=cfg.lora.train_a)
        state = initial_state(module, self.rank, self.world)
        self.engine = build_engine(cfg, getattr(self, begin), self.layout, LABELS, state)

    def batches(self) -> list[Any]:
        """The micro-batches of the next step."""
        return micro_batches(self.cfg, self.step, self.rank, self.world)

    def train(self, steps: int) -> list[float]:
        """Losses of ``steps`` steps."""
        losses = []
        for _ in range(steps):
            losses.append(self.engine.train_step(self.batches(), lr=1e-3).loss)
            self.step += 1
        return losses

    def switch(self, plan: Plan) -> Any:
        """The one transition; returns its report."""
        from prelora_ds.engine.transition import transition

        self.engine, report = transition(self.engine, plan)
        return report

    def outputs(self) -> Any:
        """Logits of a fixed batch."""
        with self.engine.evaluating() as logits:
            return logits(self.batches_of(10_000))

    def batches_of(self, step: int) -> Any:
        """The images of rank 0's first micro-batch of ``step``, the same on all ranks."""
        return micro_batches(self.cfg, step, 0, 1)[0][0]

    def snapshot(self) -> dict[str, Any]:
        """Copies of this rank's masters, moments and steps: (name, what) -> tensor or int."""
        from prelora_ds.engine.fragments import adam_state, fragments
        from prelora_ds.engine.optimizer import inner_optimizer

        inner, steps, found = adam_state(self.engine.ds), inner_optimizer(self.engine.ds).steps, {}
        for f in fragments(self.engine.ds):
            found[f.name, "master"] = f.of(f.flat).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                if key in inner.get(f.flat, {}):
                    found[f.name, key] = f.of(inner[f.flat][key]).clone()
                    found[f.name, "step"] = steps[f.name]
        return found

    def whole_state(self) -> dict[str, Any]:
        """`snapshot` put together over ranks: whole tensors, comparable between engines of other partitioning."""
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
                full = whole.setdefault((name, what), torch.full(shapes[name], float("nan")).view(-1))
                full[where[name][0]: where[name][1]] = value
        comm.barrier()
        return whole

    def close(self) -> None:
        from prelora_ds.engine.release import release

        release(self.engine)


def same(a: dict[Any, Any], b: dict[Any, Any]) -> list[Any]:
    """Keys at which two snapshots differ by a bit, or that only one has."""
    import torch

    odd = sorted(set(a) ^ set(b), key=str)
    for key in set(a) & set(b):
        equal = torch.equal(a[key].view(torch.int32), b[key].view(torch.int32)) if torch.is_tensor(a[key]) \
            else a[key] == b[key]
        if not equal:
            odd.append(key)
    return odd
