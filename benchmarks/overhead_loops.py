"""The four loops that overhead.py compares, with the same model, shards, batches, AdamW and config.

Each runs in its own ranks and takes its batches from a `Paced` loader, which is also the clock: a
step lasts from one call of `next` to the following one, whatever a loop does in between.
"""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from prelora_ds.config.load import load_config
from prelora_ds.config.tree import Config
from prelora_ds.data.loader import Loader
from prelora_ds.data.manifest import Manifest
from prelora_ds.data.setup import make_loader
from prelora_ds.data.transforms import to_float
from prelora_ds.model.vit import build_model

LABELS = 10
RECIPE = "recipe.yaml"
ZERO = "ds_configs/zero2.json"


class Paced:
    """A loader that waits for the script before each turn of ``turn`` steps, and sends its seconds."""

    def __init__(self, loader: Loader, pipe: Connection, turn: int) -> None:
        self._loader = loader
        self._pipe = pipe
        self._turn = turn
        self._steps = 0
        self._begun = 0.0

    def next(self) -> Any:
        """Return the next batch."""
        now = time.perf_counter()
        if self._steps % self._turn == 0:
            if self._steps:
                self._pipe.send(now - self._begun)
            self._pipe.recv()
            self._begun = time.perf_counter()
        self._steps += 1
        return self._loader.next()

    @property
    def waited_s(self) -> float:
        """Seconds of waiting for data."""
        return float(self._loader.waited_s)

    def close(self) -> None:
        self._loader.close()


def ours(pipe: Connection, folder: Path, turn: int) -> list[float]:
    """Run launch/pretrain.py without its argument parser, including logs, report and export."""
    import prelora_ds.run.begin as begin_module
    import prelora_ds.run.context as context_module
    from prelora_ds.hosts.discovery import ranks_from_environment
    from prelora_ds.run.folder import RunFolder
    from prelora_ds.run.log import read_lines
    from prelora_ds.start import start

    context_module.make_loader = lambda *args, **options: Paced(
        make_loader(*args, **options), pipe, turn
    )
    begin_module.build_model = in_bf16
    start(ranks_from_environment(os.environ), str(folder / RECIPE), [], ZERO)
    return [row["train/loss"] for row in read_lines(RunFolder(folder / "ours").metrics)]


def bare(pipe: Connection, folder: Path, turn: int) -> list[float]:
    """Run the loop of DeepSpeed's tutorials."""
    import deepspeed

    config, losses = load_config(folder / RECIPE, [], ZERO), []
    loader, model = paced_loader(config, pipe, turn), first_model(config)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=adamw(config, model), config=deepspeed_config(config)
    )
    for _ in range(int(config.train.duration.value)):
        [(images, labels, *_)] = loader.next()
        logits = engine(to_float(images.to(engine.device), torch.bfloat16)).logits
        loss = torch.nn.functional.cross_entropy(logits.float(), labels.to(engine.device))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    loader.close()
    return losses


def accelerate(pipe: Connection, folder: Path, turn: int) -> list[float]:
    """Run accelerate's own loop with its DeepSpeedPlugin."""
    from accelerate import Accelerator, DeepSpeedPlugin

    tell_accelerate()
    config, losses = load_config(folder / RECIPE, [], ZERO), []
    loader, model = paced_loader(config, pipe, turn), first_model(config)
    accelerator = Accelerator(
        mixed_precision="bf16",
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_config(config)),
    )
    model, optimizer = accelerator.prepare(model, adamw(config, model))
    for _ in range(int(config.train.duration.value)):
        [(images, labels, *_)] = loader.next()
        logits = model(to_float(images.to(accelerator.device), torch.bfloat16)).logits
        loss = torch.nn.functional.cross_entropy(logits.float(), labels.to(accelerator.device))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    loader.close()
    return losses


def hf_trainer(pipe: Connection, folder: Path, turn: int) -> list[float]:
    """Run Hugging Face's Trainer; it logs each step to TensorBoard, like ours."""
    from torch.utils.data import DataLoader, IterableDataset
    from transformers import Trainer, TrainingArguments, training_args

    config, losses = load_config(folder / RECIPE, [], ZERO), []
    loader, model = paced_loader(config, pipe, turn), first_model(config)

    class Batches(IterableDataset):
        def __iter__(self) -> Any:
            while True:
                [(images, labels, *_)] = loader.next()
                yield {"pixel_values": to_float(images, torch.bfloat16), "labels": labels}

    class SameRun(Trainer):
        def get_train_dataloader(self) -> Any:
            # Each rank already gets its own batches, so accelerate must not prepare the loader.
            return DataLoader(self.train_dataset, batch_size=None)

        def create_optimizer(self, model: Any = None) -> Any:
            # With DeepSpeed the Trainer ignores an optimizer that is passed as an argument.
            self.optimizer = self.optimizer or adamw(config, self.model)
            return self.optimizer

    def loss_of(
        outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor
    ) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="sum")
        losses.append(loss.item() / len(labels))
        return loss / num_items_in_batch

    # The Trainer refuses BF16 with DeepSpeed on a CPU, although DeepSpeed itself supports it.
    training_args.is_torch_bf16_gpu_available = lambda: True
    tell_accelerate()
    arguments = TrainingArguments(
        str(folder / "hf_trainer"),
        max_steps=int(config.train.duration.value),
        deepspeed=deepspeed_config(config),
        per_device_train_batch_size=config.train.micro_batch_size,
        bf16=True,
        learning_rate=config.optimizer.lr,
        max_grad_norm=config.optimizer.clip_grad_norm,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="tensorboard",
        disable_tqdm=True,
        accelerator_config={"use_configured_state": True},
    )
    SameRun(model, arguments, train_dataset=Batches(), compute_loss_func=loss_of).train()
    loader.close()
    return losses


def tell_accelerate() -> None:
    """Set accelerate's backend.

    accelerate 1.15 has no backend for DeepSpeed on a CPU, so every rank would believe it is alone.
    """
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend=torch.distributed.get_backend())


def in_bf16(*args: Any) -> torch.nn.Module:
    """Build the model with values that BF16 represents exactly.

    The masters of a bare engine start as float(bf16(w)), and ours as w; so they are equal.
    """
    model = build_model(*args)
    return model if next(model.parameters()).is_meta else model.bfloat16().float()


def first_model(config: Config) -> torch.nn.Module:
    """Build the model that our loop starts from."""
    torch.manual_seed(config.run.seed)
    return in_bf16(config.model, LABELS)


def paced_loader(config: Config, pipe: Connection, turn: int) -> Paced:
    """Return the loader of our loop, paced."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return Paced(
        make_loader(
            config,
            Manifest.load(config.data.train),
            rank=rank,
            world_size=world,
            workers=int(config.data.workers),
        ),
        pipe,
        turn,
    )


def adamw(config: Config, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return an AdamW with the groups of our optimizer: only matrices decay."""
    o = config.optimizer
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, p in model.named_parameters():
        is_matrix = name.endswith(".weight") and p.ndim > 1
        groups.setdefault(o.weight_decay if is_matrix else 0.0, []).append(p)
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": decay} for decay, params in groups.items()],
        lr=o.lr,
        betas=o.betas,
        eps=o.eps,
    )


def deepspeed_config(config: Config) -> dict[str, Any]:
    """Return the DeepSpeed config of our engine."""
    return {
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip_grad_norm,
    }
