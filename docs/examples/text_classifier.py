"""Train a text classifier of transformers from full training to LoRA, in a loop of one's own.

    deepspeed --num_accelerators 2 docs/examples/text_classifier.py out/text
    deepspeed --num_accelerators 2 docs/examples/text_classifier.py out/text --resume

The texts are snippets of the descriptions of scikit-learn's data sets, and the class is the data set. The model is a
tiny BERT with random first values that reads bytes. Nothing is downloaded, and a CPU is enough.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sklearn import datasets
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification

from prelora_ds import Phases

SOURCES = (datasets.load_breast_cancer, datasets.load_diabetes, datasets.load_digits, datasets.load_wine)
LENGTH = 48  # bytes of a snippet
FAMILIES = {
    "q": r".*\.layer\.(?P<layer>\d+)\.attention\.self\.query",
    "v": r".*\.layer\.(?P<layer>\d+)\.attention\.self\.value",
    "fc1": r".*\.layer\.(?P<layer>\d+)\.intermediate\.dense",
    "fc2": r".*\.layer\.(?P<layer>\d+)\.output\.dense",
}


def recipe(zero: int) -> dict[str, Any]:
    """The settings, as in a recipe file. The thresholds are so wide that the first test passes."""
    return {
        "optimizer": {"lr": 1e-3, "warmup": "4 steps"},
        # Two micro-batches per step on 2 ranks. ZeRO stage 0 has no fp32 accumulator and takes one.
        "train": {"duration": "24 steps", "global_batch_size": 32, "micro_batch_size": 16 if zero == 0 else 8},
        "observe": {"every": "2 steps"},
        "convergence": {"tau": 50.0, "zeta": 50.0, "k": 2, "m": 2},
        "lora": {"r_min": 2, "r_max": 8, "warmup": "4 steps"},
        "checkpoint": {"keep_last": 4},
        "deepspeed": {"zero_optimization": {"stage": zero}},
    }


def make_model() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=LENGTH, num_labels=len(SOURCES)))


def snippets() -> tuple[torch.Tensor, torch.Tensor]:
    """All snippets: bytes, int64 [N, LENGTH], and classes, int64 [N]."""
    ids, labels = [], []
    for label, source in enumerate(SOURCES):
        text = source()["DESCR"].encode()
        for start in range(0, len(text) - LENGTH, LENGTH // 4):
            ids.append(list(text[start:start + LENGTH]))
            labels.append(label)
    return torch.tensor(ids), torch.tensor(labels)


def rows_at(position: int, count: int, samples: int) -> torch.Tensor:
    """The indices of the ``count`` samples from ``position`` on, in an order that depends on the epoch."""
    rows = []
    while count:
        epoch, start = divmod(position, samples)
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(epoch))
        rows.append(order[start:start + count])
        position += len(rows[-1])
        count -= len(rows[-1])
    return torch.cat(rows)


def train(out: Path, zero: int, *, resume: Path | None = None) -> list[tuple[str, float]]:
    """Train from the start or from a checkpoint to the end; return (phase, this rank's loss) of each step."""
    ids, labels = snippets()
    phases = Phases(make_model, recipe(zero), families=FAMILIES, samples_per_epoch=len(ids))
    engine, own = phases.load(resume) if resume else (phases.start(), {"position": 0})
    position = own["position"]

    steps = []
    while not phases.done:
        losses = []
        for _ in range(engine.accumulation):
            size = engine.micro_batch_size
            mine = position + dist.get_rank() * size
            rows = rows_at(mine, size, len(ids))
            logits = engine(input_ids=ids[rows].to(engine.device)).logits.float()
            loss = cross_entropy(logits, labels[rows].to(engine.device))
            engine.backward(loss)
            losses.append(loss.item())
            position += dist.get_world_size() * size
        engine.step()
        steps.append((engine.phase, math.fsum(losses) / len(losses)))
        engine = phases.after_step()
        if phases.step % 5 == 0:
            phases.save(out, {"position": position})
        if dist.get_rank() == 0:
            print(f"step {phases.step}: {steps[-1][0]}, loss {steps[-1][1]:.3f}", flush=True)

    phases.export(out / "model")  # for BertForSequenceClassification.from_pretrained
    return steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--zero", type=int, default=2, choices=[0, 1, 2, 3])
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    arguments = parser.parse_args()
    train(arguments.out, arguments.zero, resume=arguments.out if arguments.resume else None)
    dist.destroy_process_group()
