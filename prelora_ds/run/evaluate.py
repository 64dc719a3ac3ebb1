"""Exact evaluation: every sample is counted once, in integers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from torch import Tensor

from prelora_ds.config.data import Crop
from prelora_ds.core.classes import difference
from prelora_ds.errors import ConfigError

if TYPE_CHECKING:
    from transformers import ViTForImageClassification

    from prelora_ds.engine.engine import Engine


@dataclass(frozen=True)
class Accuracy:
    """The top-1 accuracy, ``correct`` of ``samples``, and the mean loss.

    loss: the cross-entropy without label smoothing.
    correct5: of how many samples the right class is among the first five; None for at most five
        classes, where it would always be.
    """

    correct: int
    samples: int
    loss: float
    correct5: int | None = field(default=None, kw_only=True)

    @property
    def acc1(self) -> float:
        return self.correct / self.samples

    @property
    def acc5(self) -> float | None:
        return None if self.correct5 is None else self.correct5 / self.samples

    def columns(self) -> dict[str, float]:
        """Return the columns of a logged row."""
        columns = {"val/acc1": self.acc1, "val/loss": self.loss}
        return columns if self.acc5 is None else columns | {"val/acc5": self.acc5}


@torch.no_grad()
def evaluate(
    logits_of: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    samples: int,
    reduce: Callable[[Tensor], object] | None = None,
    device: torch.device | str = "cpu",
) -> Accuracy:
    """Evaluate top-1 and top-5 over ``batches`` of (images, labels, mask).

    Of classes with equal logits the one with the smaller number comes first. A sample whose logits
    are not all finite counts as wrong, because argmax would choose NaN.

    reduce: sums a tensor over the ranks in place; None for one rank.

    Raises RuntimeError unless exactly ``samples`` samples were counted.
    """
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    classes = 0
    loss = torch.zeros(1, dtype=torch.float64, device=device)
    for images, labels, mask in batches:
        logits = logits_of(images)
        labels, mask = (each.to(logits.device, non_blocking=True) for each in (labels, mask))
        counted = mask & logits.isfinite().all(-1)
        place = _place_of(labels, logits)
        counts += torch.stack(
            [((place == 0) & counted).sum(), ((place < 5) & counted).sum(), mask.sum()]
        )
        classes = logits.shape[-1]
        losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        loss += torch.where(mask, losses, 0.0).double().sum()  # to select by the mask would wait for its values
    if reduce is not None:
        reduce(counts)
        reduce(loss)
    correct, correct5, total = counts.tolist()
    if total != samples:
        raise RuntimeError(f"the evaluation counted {total} samples of {samples}")
    return Accuracy(
        correct, total, float(loss) / total, correct5=correct5 if classes > 5 else None
    )


def _place_of(labels: Tensor, logits: Tensor) -> Tensor:
    """Return how many classes come before the label of each sample: int64 [B]; 0 where argmax is right."""
    of_label = logits.gather(-1, labels[:, None])
    smaller = torch.arange(logits.shape[-1], device=logits.device) < labels[:, None]
    return ((logits > of_label) | ((logits == of_label) & smaller)).sum(-1)


def evaluate_engine(
    engine: Engine,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    samples: int,
    *,
    beat: Callable[[], None],
) -> Accuracy:
    """`evaluate` a training engine over this rank's ``batches``. Collective.

    samples: the number of samples of all ranks.
    beat: called before each batch, because an evaluation may take longer than a step.
    """
    with engine.evaluating() as logits_of:

        def beat_and_infer(images: Tensor) -> Tensor:
            beat()
            return logits_of(images)

        return evaluate(
            beat_and_infer,
            batches,
            samples=samples,
            reduce=torch.distributed.all_reduce,
            device=engine.ds.device,
        )


@dataclass(frozen=True)
class Result(Accuracy):
    """The accuracy of an exported model, and the data on which it was measured.

    data: the path or URL of the data, or a name without it.
    identity: the fingerprint of the data, which does not depend on where they are stored.
    """

    data: str
    identity: str


def evaluate_folder(model: Path, data: Path, *, batch_size: int = 64, workers: int = 0) -> Result:
    """Evaluate an exported folder, loaded through transformers, in fp32 on one device.

    Raises ConfigError if a folder is not valid, or if the classes of data and model differ.
    """
    from prelora_ds.data.datasets import ImagePipeline
    from prelora_ds.data.loader import eval_batches
    from prelora_ds.data.manifest import Manifest
    from prelora_ds.data.transforms import to_float

    manifest = Manifest.load(data, key="--data")
    vit = open_vit(model)
    config: Any = vit.config  # checked by open_vit; transformers allows more than we do
    names = [str(config.id2label[label]) for label in range(config.num_labels)]
    problem = difference(manifest.classes, names, f"the model in {model}")
    if problem:
        raise ConfigError(
            "--data",
            str(data),
            problem,
            "use data with the classes that the model was trained on; `prelora shards build` and "
            "`prelora shards index` copy the class list of its training data with --like",
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vit.eval().to(device)
    # A model that was trained on grey images takes RGB images, all of whose channels are grey here.
    channels = config.num_channels
    pipeline = ImagePipeline(
        config.image_size,
        getattr(config, "eval_channels", None) or channels,
        getattr(config, "eval_crop", "inception"),
    )

    def logits_of(images: Tensor) -> Tensor:
        inputs = to_float(images.to(device), torch.float32).expand(-1, channels, -1, -1)
        logits: Tensor = vit(inputs).logits
        return logits

    batches = eval_batches(
        manifest, pipeline, batch_size=batch_size, rank=0, world_size=1, workers=workers
    )
    accuracy = evaluate(logits_of, batches, samples=len(manifest), device=device)
    return Result(**vars(accuracy), data=str(data), identity=manifest.fingerprint)


def open_vit(folder: Path) -> ViTForImageClassification:
    """Load the model in an exported ``folder`` to the CPU.

    Raises ConfigError unless it is an intact ViT in the form in which we export it.
    """
    from transformers import ViTForImageClassification
    from transformers.utils import logging

    remedy = (
        "pass the model/ folder of a finished run, or a folder written by "
        "`prelora export --format hf`"
    )
    if (folder / "factory.json").is_file():
        raise ConfigError(
            "MODEL",
            str(folder),
            "is the export of a model.factory, but only a ViT can be evaluated",
            "load it with the code of its factory",
        )
    _check_config(folder, remedy)
    logging.set_verbosity_error()  # Missing weights are an error below.
    logging.disable_progress_bar()
    try:
        opened = ViTForImageClassification.from_pretrained(
            folder, output_loading_info=True, local_files_only=True
        )
    except Exception as exc:  # transformers, safetensors and torch each raise their own
        raise ConfigError(
            "MODEL",
            str(folder),
            f"cannot be opened ({type(exc).__name__}: {_first_line(exc)})",
            remedy,
        ) from exc
    # With output_loading_info the result is a pair, which transformers' annotation does not state.
    vit, info = cast("tuple[ViTForImageClassification, dict[str, Any]]", opened)
    mismatched = sorted(
        map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]])
    )
    if mismatched:
        raise ConfigError(
            "MODEL",
            str(folder),
            f"its weights do not match its config.json (first mismatch: {mismatched[0]})",
            remedy,
        )
    return vit


def _check_config(folder: Path, remedy: str) -> None:
    """Raise ConfigError if config.json describes another model, or one that we cannot evaluate."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except OSError as exc:
        raise ConfigError(
            "MODEL", str(folder), f"its config.json cannot be read ({exc.strerror})", remedy
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(
            "MODEL", str(folder), f"its config.json is not valid JSON ({exc})", remedy
        ) from exc
    if not isinstance(config, dict) or config.get("model_type") != "vit":
        raise ConfigError("MODEL", str(folder), "its config.json does not describe a ViT", remedy)
    expected = (
        ("num_channels", (1, 3)),
        ("eval_channels", (None, 1, config.get("num_channels"))),
        ("eval_crop", (None, *get_args(Crop))),
    )
    for key, allowed in expected:
        if config.get(key) not in allowed:
            raise ConfigError(
                "MODEL", str(folder), f"its config.json has {key} = {config.get(key)!r}", remedy
            )
    if type(config.get("image_size")) is not int or config["image_size"] < 1:
        raise ConfigError(
            "MODEL",
            str(folder),
            "its config.json does not set image_size to a positive integer",
            remedy,
        )
    labels = config.get("id2label", {"0": "", "1": ""})  # transformers' default
    numbers = {str(label) for label in range(len(labels))} if isinstance(labels, dict) else None
    if not labels or set(labels) != numbers:
        raise ConfigError(
            "MODEL",
            str(folder),
            "id2label in its config.json does not number the labels 0, 1, ...",
            remedy,
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
