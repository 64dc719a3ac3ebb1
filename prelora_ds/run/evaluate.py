"""Exact evaluation: every sample once, counts as integers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from torch import Tensor

from prelora_ds.config.data import Crop
from prelora_ds.core.classes import difference
from prelora_ds.errors import ConfigError

if TYPE_CHECKING:
    from transformers import ViTForImageClassification

    from prelora_ds.engine.build import Engine


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

    A sample whose logits are not all finite counts as wrong: argmax would take NaN for the answer.
    Raises RuntimeError unless exactly ``samples`` samples were counted.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    loss = torch.zeros(1, dtype=torch.float64, device=device)
    for images, labels, mask in batches:
        logits = logits_of(images)
        labels, mask = labels.to(logits.device), mask.to(logits.device)
        right = (logits.argmax(-1) == labels) & logits.isfinite().all(-1)
        counts += torch.stack([(right & mask).sum(), mask.sum()])
        losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        loss += losses[mask].double().sum()
    if reduce is not None:
        reduce(counts)
        reduce(loss)
    correct, counted = counts.tolist()
    if counted != samples:
        raise RuntimeError(f"the evaluation counted {counted} samples of {samples}")
    return Accuracy(correct, counted, float(loss) / counted)


def evaluate_engine(engine: Engine, batches: Iterable[tuple[Tensor, Tensor, Tensor]], samples: int, *,
                    beat: Callable[[], None]) -> Accuracy:
    """`evaluate` of a training engine over this rank's ``batches`` of ``samples`` in all. Collective.

    beat: called before each batch, since an evaluation may take longer than a step.
    """
    with engine.evaluating() as logits_of:

        def answer(images: Tensor) -> Tensor:
            beat()
            return logits_of(images)

        return evaluate(answer, batches, samples=samples, reduce=torch.distributed.all_reduce,
                        device=engine.ds.device)


@dataclass(frozen=True)
class Result(Accuracy):
    """The accuracy of an exported model, and of what: ``identity`` tells the data from others, wherever they lie."""

    data: str
    identity: str


def evaluate_folder(model: Path, data: Path, *, batch_size: int = 64, workers: int = 0) -> Result:
    """Accuracy of an exported folder, opened by transformers as any user would, in fp32 on one device.

    Raises ConfigError when either folder is not what it should be, or the data are of other classes than the model.
    """
    from prelora_ds.data.datasets import ImagePipeline
    from prelora_ds.data.loader import eval_batches
    from prelora_ds.data.manifest import Manifest
    from prelora_ds.data.transforms import to_float

    manifest = Manifest.load(data, key="--data")
    vit = open_vit(model)
    config: Any = vit.config  # open_vit has looked at it; transformers allows a config more than we do
    names = [str(config.id2label[label]) for label in range(config.num_labels)]
    if problem := difference(manifest.classes, names, f"the model in {model}"):
        raise ConfigError(
            "--data",
            str(data),
            problem,
            "name data of the classes that the model was trained on; "
            "`prelora shards build` and `prelora shards index` take them from its training data by "
            "--like",
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vit.eval().to(device)
    pipeline = ImagePipeline(
        config.image_size,
        config.num_channels,
        getattr(config, "eval_crop", "inception"),
    )
    batches = eval_batches(
        manifest, pipeline, batch_size=batch_size, rank=0, world_size=1, workers=workers
    )
    accuracy = evaluate(
        lambda images: vit(to_float(images.to(device), torch.float32)).logits,
        batches,
        samples=len(manifest),
        device=device,
    )
    return Result(**vars(accuracy), data=str(data), identity=manifest.fingerprint)


def open_vit(folder: Path) -> ViTForImageClassification:
    """The model in an exported ``folder``, on the CPU.

    Raises ConfigError unless it is a ViT, whole, and as we export it.
    """
    from transformers import ViTForImageClassification
    from transformers.utils import logging


    remedy = "name the model/ folder of a finished run, or what `prelora export --format hf` wrote"
    if (folder / "factory.json").is_file():
        raise ConfigError(
            "MODEL",
            str(folder),
            "is the export of a model.factory, and only a ViT can be evaluated",
            "open it by the code of its factory",
        )
    _check_config(folder, remedy)
    logging.set_verbosity_error()  # what it would say of missing weights is refused below
    logging.disable_progress_bar()
    try:
        opened = ViTForImageClassification.from_pretrained(
            folder, output_loading_info=True, local_files_only=True
        )
    except Exception as exc:  # transformers, safetensors and torch raise each their own
        raise ConfigError(
            "MODEL",
            str(folder),
            f"cannot be opened ({type(exc).__name__}: {_first_line(exc)})",
            remedy,
        ) from exc
    # With output_loading_info it is a pair, which transformers' annotation does not say.
    vit, info = cast("tuple[ViTForImageClassification, dict[str, Any]]", opened)
    odd = sorted(
        map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]])
    )
    if odd:
        raise ConfigError(
            "MODEL",
            str(folder),
            f"its weights are not those of its config.json, first at {odd[0]}",
            remedy,
        )
    return vit


def _check_config(folder: Path, remedy: str) -> None:
    """Raise ConfigError for a config.json that transformers would take for another model, or we could not feed."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except OSError as exc:
        raise ConfigError(
            "MODEL", str(folder), f"its config.json cannot be read ({exc.strerror})", remedy
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(
            "MODEL", str(folder), f"its config.json is not JSON ({exc})", remedy
        ) from exc
    if not isinstance(config, dict) or config.get("model_type") != "vit":
        raise ConfigError("MODEL", str(folder), "its config.json is not that of a ViT", remedy)
    for key, allowed in (("num_channels", (1, 3)), ("eval_crop", (None, *get_args(Crop)))):
        if config.get(key) not in allowed:
            raise ConfigError(
                "MODEL", str(folder), f"its config.json has {key} = {config.get(key)!r}", remedy
            )
    if type(config.get("image_size")) is not int or config["image_size"] < 1:
        raise ConfigError(
            "MODEL",
            str(folder),
            "its config.json has no image_size that is a positive integer",
            remedy,
        )
    labels = config.get("id2label", {"0": "", "1": ""})  # transformers' default
    numbers = {str(label) for label in range(len(labels))} if isinstance(labels, dict) else None
    if not labels or set(labels) != numbers:
        raise ConfigError(
            "MODEL",
            str(folder),
            "its config.json does not name the labels 0, 1, ... by id2label",
            remedy,
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
