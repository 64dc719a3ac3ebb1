"""The config's data section, and the levels of augmentation."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, PlainValidator, model_validator

from prelora_ds.config.fields import FieldError, InWords, LocalPlace, Place, Positive, Share, Strict


class AugmentLevel(NamedTuple):
    """RandAugment's number of operations and magnitude (10 is the full range), and Mixup's Beta parameter."""

    layers: int
    magnitude: int
    mixup: float


Crop = Literal["inception", "pad", "none"]
Augment = Literal["none", "light1", "light2", "medium1", "medium2", "strong1", "strong2", "trivial"]
# The levels of Steiner et al. (2022). `trivial` is TrivialAugment (Mueller and Hutter 2021), which has no levels.
AUGMENT_LEVELS: dict[str, AugmentLevel] = {
    "none": AugmentLevel(0, 0, 0.0), "trivial": AugmentLevel(0, 0, 0.0), "light1": AugmentLevel(2, 0, 0.0),
    "light2": AugmentLevel(2, 10, 0.2), "medium1": AugmentLevel(2, 15, 0.2), "medium2": AugmentLevel(2, 15, 0.5),
    "strong1": AugmentLevel(2, 20, 0.5), "strong2": AugmentLevel(2, 20, 0.8),
}


def _as_workers(value: Any) -> int | Literal["auto"]:
    if value == "auto" or (type(value) is int and value >= 0):
        workers: int | Literal["auto"] = value
        return workers
    raise ValueError('must be "auto" or an integer >= 0')


# A plain validator, because pydantic would report an error for each part of the union.
Workers = Annotated[
    int | Literal["auto"], PlainValidator(_as_workers), InWords("`auto` or an integer >= 0")
]


class DataConfig(Strict):
    """Where the images come from, and how they are preprocessed and augmented (docs/data.md)."""

    train: Place
    """
    The training data: a folder or URL of WebDataset shards with a manifest (`prelora shards`), or
    with `data.reader: webdataset` a pattern of shards. A resumed run may find the same data at
    another place.
    """

    val: Place
    """
    The validation data: a folder or URL of WebDataset shards with a manifest, of the same classes.
    """

    reader: Literal["manifest", "webdataset"] = "manifest"
    """
    How `data.train` is read: `manifest` by an index of all samples, `webdataset` by the webdataset
    package, from shards that have no index. `webdataset` gives up exact epochs, bitwise resuming
    and checksums ([data.md](data.md)).
    """

    samples_per_epoch: Positive | None = None
    """
    The number of samples that count as one epoch; required with `data.reader: webdataset`, not
    allowed otherwise.
    """

    tail: Literal["continue", "drop"] = "continue"
    """
    What happens to the last samples of an epoch if they are fewer than a batch: `continue` fills
    the batch from the next epoch, `drop` omits them.
    """

    crop: Crop = "inception"
    """
    The crop of training images: `inception` takes 5 to 100 % of the area at a ratio of 3/4 to 4/3
    and resizes it, `pad` adds a black margin of 1/8 of the size and crops the size out of that,
    `none` only resizes.
    """

    flip: bool = True
    """Whether to mirror training images left to right with probability 1/2."""

    augment: Augment = "none"
    """
    The augmentation level of Steiner et al. (2022), which sets RandAugment and Mixup, or `trivial`
    for TrivialAugment (Mueller and Hutter 2021). [data.md](data.md) has the table of levels.
    """

    mixup: Annotated[float, Field(ge=0)] | None = None
    """
    The Beta parameter of Mixup; `null` takes that of the level `data.augment`, 0 disables Mixup.
    """

    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """
    The Beta parameter of CutMix; 0 disables it. If Mixup and CutMix are both enabled, each pair of
    images uses one of them with probability 1/2.
    """

    random_erasing: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The probability of replacing a rectangle of a training image by noise."""

    corrupt_budget: Share = 0.001
    """
    The share of an epoch's samples that may be unreadable (and are replaced) before the run stops.
    """

    cache_dir: LocalPlace | None = None
    """
    A folder on a disk of each node to which whole shards are copied during training; `null` for no
    cache.
    """

    cache_gib: Annotated[float, Field(gt=0)] = 200.0
    """The largest size of `data.cache_dir`, in GiB."""

    workers: Workers = 2
    """
    The number of decoding processes per rank; 0 decodes in the training process. `auto` starts
    enough for the predicted image rate of the LoRA phase plus 25 %, and at most one fewer than the
    cores per rank.
    """

    worker_start: Literal["forkserver", "spawn", "fork"] = "forkserver"
    """How Python starts the decoding processes; all methods yield the same batches."""

    @model_validator(mode="after")
    def _webdataset_has_a_length(self) -> DataConfig:
        if (self.reader == "webdataset") != (self.samples_per_epoch is not None):
            raise FieldError("samples_per_epoch", self.samples_per_epoch,
                             "is required with data.reader=webdataset, and not allowed otherwise")
        return self

    @property
    def mixup_alpha(self) -> float:
        return AUGMENT_LEVELS[self.augment].mixup if self.mixup is None else self.mixup

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup_alpha > 0 or self.cutmix > 0
