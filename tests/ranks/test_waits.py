"""How often a step waits for the device, counted on the CPU (`support.waits`), and data taken ahead of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.runs import Trainer, config
from support.waits import counting_waits

from prelora_ds.run.log import read_lines

DEBUG = Path(__file__).parents[2] / "launch/recipes/vit_tiny_debug.yaml"

# A step reads its loss, which decides whether the update is made, and its gradient norm, which decides whether the run
# goes on. At stage 3 it also waits for DeepSpeed's streams. At stage 0 our code reads the norm of each optimizer group
# (`engine.norms`), and DeepSpeed adds them up on the host. At stages 2 and 3 DeepSpeed masks the norm of each group if
# it is not finite.
OURS = {"zero0": (1, 1), "zero1": (2, 0), "zero2": (2, 0), "zero3": (3, 0)}  # in a step, and for each group besides
DEEPSPEEDS = {"zero0": (0, 0), "zero1": (3, 0), "zero2": (0, 1), "zero3": (0, 1)}
LIMIT = 6  # as in G10 of docs/first-gpu.md


@pytest.mark.parametrize("zero", OURS)
def test_a_step_waits_for_the_device_only_to_decide(ranks, zero):
    ranks.run(waits_of_a_step, zero=zero)


def waits_of_a_step(zero):
    from prelora_ds.engine.optimizer import inner_optimizer

    for phase in ("full", "lora"):
        t = Trainer(config(zero, batch=8 if zero == "zero0" else 16), begin=phase)  # two micro-batches
        for group in inner_optimizer(t.engine.ds).param_groups:
            group["fused"] = True  # as on a GPU
        t.train(2)
        batches = t.batches()
        with counting_waits() as waits:
            t.engine.train_step(batches, lr=1e-3)
        print(f"{zero}, {phase}: ours {waits.of('ours')}, DeepSpeed's {waits.of('DeepSpeed')}, "
              f"others {waits.of('torch')}")
        assert waits.total("torch") == 0, waits
        groups = len(t.engine.ds.optimizer.param_groups)
        for owner, (in_a_step, of_a_group) in (("ours", OURS[zero]), ("DeepSpeed", DEEPSPEEDS[zero])):
            assert waits.total(owner) == in_a_step + groups * of_a_group, waits
        assert waits.total("ours") + waits.total("DeepSpeed") <= LIMIT, waits
        t.close()


def test_a_run_whose_feed_looks_ahead_as_on_a_gpu_is_the_same_to_the_bit(ranks, shards, tmp_path):
    """Its second phase cuts the rows into other micro-batches, when those of its first step are taken already."""
    settings = [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", "train.duration=7 steps",
                "data.mixup=0.2", "model.hidden_dropout_prob=0.1", "train.eval_every=3 steps",
                "convergence=null", "lora=null", "deepspeed={zero_optimization: {stage: 2}}",
                "phases=[{name: full, until: 4 steps}, {name: lora, adapters: {rank: 4, mode: branch}, "
                "train: [adapters, rest], micro_batch_size: 16}]"]
    runs = []
    for ahead in (False, True):
        out = tmp_path / str(ahead)
        out.mkdir()
        assert ranks.run(run_with_feed, settings=[*settings, f"run.output_dir={out}"], ahead=ahead) == [ahead, ahead]
        rows = [{key: value for key, value in row.items() if key in ("step", "phase", "train/loss", "grad_norm",
                                                                     "val/acc1", "data/corrupt")}
                for row in read_lines(out / "metrics.jsonl")]
        runs.append((rows, (out / "model/model.safetensors").read_bytes()))
    assert len(runs[0][0]) == 7 and {row["phase"] for row in runs[0][0]} == {"full", "lora"}
    assert runs[0] == runs[1]


def run_with_feed(settings, ahead):
    """Train, and return whether the feeds have looked ahead."""
    from prelora_ds.config.load import load_config
    from prelora_ds.data.setup import open_data
    from prelora_ds.engine.feed import DeviceFeed
    from prelora_ds.run import context
    from prelora_ds.train import train

    seconds = []

    class Feed(DeviceFeed):
        def __init__(self, loader, device):
            super().__init__(loader, device, ahead=ahead)

        def look_ahead(self):
            seconds.append(super().look_ahead())
            return seconds[-1]

    context.DeviceFeed = Feed
    try:
        config = load_config(DEBUG, settings)
        train(config, *open_data(config), ["here"] * torch.distributed.get_world_size())
    finally:
        context.DeviceFeed = DeviceFeed
    assert len(seconds) == 6, "not after the last step"
    return all(each > 0 for each in seconds)
