"""The config's data section, and the levels of augmentation."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, PlainValidator, model_validator

from prelora_ds.config.fields import FieldError, LocalPlace, Place, Positive, Share, Strict


class AugmentLevel(NamedTuple):
    """RandAugment's number of operations and magnitude (of 10), and the Beta parameter of Mixup."""

    layers: int
    magnitude: int
    mixup: float


Crop = Literal["inception", "pad", "none"]
Augment = Literal["none", "light1", "light2", "medium1", "medium2", "strong1", "strong2", "trivial"]
# Steiner et al. (2022); `trivial` is TrivialAugment (Mueller and Hutter 2021), which has no level.
AUGMENT_LEVELS: dict[str, AugmentLevel] = {
    "none": AugmentLevel(0, 0, 0.0), "trivial": AugmentLevel(0, 0, 0.0), "light1": AugmentLevel(2, 0, 0.0),
    "light2": AugmentLevel(2, 10, 0.2), "medium1": AugmentLevel(2, 15, 0.2), "medium2": AugmentLevel(2, 15, 0.5),
    "strong1": AugmentLevel(2, 20, 0.5), "strong2": AugmentLevel(2, 20, 0.8),
}


def _as_workers(value: Any) -> int | Literal["auto"]:
    if value == "auto" or (type(value) is int and value >= 0):
        workers: int | Literal["auto"] = value
        return workers
    raise ValueError(f'{value!r} is not a number of workers: give "auto", or an integer greater than '
                     "or equal to 0")


# Not a union that pydantic checks part by part: it would report both parts.
Workers = Annotated[int | Literal["auto"], PlainValidator(_as_workers)]


class DataConfig(Strict):
    """``train`` and ``val`` are folders or URLs of WebDataset shards with a manifest (`prelora shards`).

    With ``reader: webdataset``, ``train`` is a pattern of shards without one (docs/data.md says what is lost) and
    ``samples_per_epoch`` their number of samples. ``tail``: the last samples of an epoch, too few for a batch, go on
    into the next one or are dropped. ``augment`` is a level of Steiner et al.; ``mixup`` null takes the level's.
    ``cutmix`` and ``mixup`` are Beta parameters, ``random_erasing`` a probability. ``corrupt_budget`` is the share of
    an epoch's samples that may be unreadable before the run stops. ``cache_dir`` is a node-local folder that keeps
    whole shards, ``cache_gib`` of them. ``workers: auto`` counts them by the cores of a rank and the LoRA phase's rate.
    """

    train: Place
    val: Place
    reader: Literal["manifest", "webdataset"] = "manifest"
    samples_per_epoch: Positive | None = None
    tail: Literal["continue", "drop"] = "continue"
    crop: Crop = "inception"
    flip: bool = True
    augment: Augment = "none"
    mixup: Annotated[float, Field(ge=0)] | None = None
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    random_erasing: Annotated[float, Field(ge=0, le=1)] = 0.0
    corrupt_budget: Share = 0.001
    cache_dir: LocalPlace | None = None
    cache_gib: Annotated[float, Field(gt=0)] = 200.0
    workers: Workers = 2
    worker_start: Literal["forkserver", "spawn", "fork"] = "forkserver"

    @model_validator(mode="after")
    def _webdataset_has_a_length(self) -> DataConfig:
        if (self.reader == "webdataset") != (self.samples_per_epoch is not None):
            raise FieldError("samples_per_epoch", self.samples_per_epoch,
                             "samples_per_epoch is what data.reader webdataset, and only that, cannot know: "
                             "set both or none")
        return self

    @property
    def mixup_alpha(self) -> float:
        return AUGMENT_LEVELS[self.augment].mixup if self.mixup is None else self.mixup

    @property
    def mixes(self) -> bool:
        """Whether rows are mixed in pairs."""
        return self.mixup_alpha > 0 or self.cutmix > 0
