"""Exact evaluation: every sample once, counts as integers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prelora_ds.core.errors import ConfigError


@dataclass(frozen=True)
class Accuracy:
    """``correct`` of ``samples`` by top-1, and the mean cross-entropy (no label smoothing)."""

    correct: int
    samples: int
    loss: float

    @property
    def acc1(self) -> float:
        return self.correct / self.samples


@torch.no_grad()
def evaluate(logits_of: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor, Tensor]], *,
             samples: int, reduce: Callable[[Tensor], object] | None = None,
             device: torch.device | str = "cpu") -> Accuracy:
    """Top-1 over ``batches`` of (images, labels, mask); ``reduce`` sums a tensor over ranks in place.

    Raises RuntimeError unless exactly ``samples`` samples were counted.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    loss = torch.zeros(1, dtype=torch.float64, device=device)
    for images, labels, mask in batches:
        logits = logits_of(images)
        labels, mask = labels.to(logits.device), mask.to(logits.device)
        counts += torch.stack([((logits.argmax(-1) == labels) & mask).sum(), mask.sum()])
        losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        loss += losses[mask].double().sum()
    if reduce is not None:
        reduce(counts)
        reduce(loss)
    correct, counted = counts.tolist()
    if counted != samples:
        raise RuntimeError(f"the evaluation counted {counted} samples of {samples}")
    return Accuracy(correct, counted, float(loss) / counted)


def evaluate_folder(model: Path, data: Path, *, batch_size: int = 64, workers: int = 0) -> Accuracy:
    """Accuracy of an exported folder, opened by transformers as any user would, in fp32 on one device.

    Raises ConfigError when either folder is not what it should be.
    """
    from transformers import ViTForImageClassification

    from prelora_ds.data.datasets import Look
    from prelora_ds.data.loader import eval_batches
    from prelora_ds.data.manifest import Manifest
    from prelora_ds.data.transforms import to_float

    manifest = Manifest.load(data, key="--data")
    if not (model / "config.json").is_file():
        raise ConfigError("MODEL", str(model), "holds no config.json", "name the model/ folder of a finished run")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vit = ViTForImageClassification.from_pretrained(model).eval().to(device)
    crop = getattr(vit.config, "eval_crop", "inception")
    batches = eval_batches(manifest, Look(vit.config.image_size, vit.config.num_channels, crop), batch_size=batch_size,
                           rank=0, world_size=1, workers=workers)
    return evaluate(lambda images: vit(to_float(images.to(device), torch.float32)).logits, batches,
                    samples=len(manifest), device=device)
