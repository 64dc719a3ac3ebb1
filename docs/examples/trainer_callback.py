"""Follow the phases with the Trainer of transformers: a callback observes, decides and stops the Trainer.

    python docs/examples/trainer_callback.py out/trainer

The next phase then has a Trainer of its own. docs/library.md says what this loses, compared with `prelora_ds.Phases`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from prelora_ds import (
    Adapters,
    Duration,
    Layout,
    Observation,
    PhaseController,
    PhaseSpec,
    PreloraRanks,
    PreloraTest,
    Timeline,
    find_layout,
)
from prelora_ds.model.adapters import attach_adapters
from prelora_ds.model.families import frobenius, named_parameters


class PhaseCallback(TrainerCallback):
    """Observes whenever the Trainer logs its mean loss, and stops the Trainer when a phase ends."""

    def __init__(self, controller: PhaseController) -> None:
        self.controller = controller
        self.state = controller.initial()
        self.step = 0  # of all Trainers

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs:
            return
        norms = {family: {layer: frobenius(model.get_submodule(path).weight) for layer, path in layers.items()}
                 for family, layers in self.controller.layout.targets.items()}
        samples = args.logging_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.step += args.logging_steps
        before = self.state.plan.phase
        self.state = self.controller.next(self.state, Observation(self.step, samples, logs["loss"], norms))
        control.should_training_stop |= self.state.plan.phase != before


def follow(model: nn.Module, controller: PhaseController, state: Any) -> None:
    """Attach the adapters of a plan that are not there yet, and let exactly its parameters train."""
    if state.plan.adapters and not any("lora_A" in name for name, _ in model.named_parameters()):
        attach_adapters(model, state.plan, controller.layout, dropout=0.0)
    for name, parameter in named_parameters(model).items():
        parameter.requires_grad_(name in state.plan.trainable)


def train(out: Path, steps: int = 24) -> list[tuple[str, int]]:
    """Train a tiny BERT to find the first token; return (phase, trained parameters) of each Trainer."""
    torch.manual_seed(0)
    ids = torch.randint(0, 4, (256, 8))
    data = [{"input_ids": row, "labels": row[0]} for row in ids]
    model = BertForSequenceClassification(BertConfig(
        vocab_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=8, num_labels=4))
    families = {"q": r".*\.layer\.(?P<layer>\d+)\.attention\.self\.query",
                "fc1": r".*\.layer\.(?P<layer>\d+)\.intermediate\.dense"}
    layout: Layout = find_layout(model, tuple(families), families)
    phases = [
        PhaseSpec("full", until=PreloraTest(tau=50.0, zeta=90.0, k=2, m=2)),
        PhaseSpec("warmup", Adapters("lora", tuple(families), PreloraRanks(2, 8)), until=Duration("4 steps")),
        PhaseSpec("lora", train=("adapters", "rest")),
    ]
    timeline = Timeline(len(data), 16, Duration(f"{steps} steps"))
    callback = PhaseCallback(PhaseController(layout=layout, timeline=timeline, phases=phases, seed=0))

    walk = []
    while callback.step < steps:
        follow(model, callback.controller, callback.state)
        walk.append((callback.state.plan.phase, sum(p.numel() for p in model.parameters() if p.requires_grad)))
        arguments = TrainingArguments(
            str(out), max_steps=steps - callback.step, per_device_train_batch_size=16, logging_steps=2,
            learning_rate=1e-3, lr_scheduler_type="constant", save_strategy="no", report_to=[], disable_tqdm=True,
            use_cpu=True)
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    return walk


if __name__ == "__main__":
    print(train(Path(sys.argv[1])))
