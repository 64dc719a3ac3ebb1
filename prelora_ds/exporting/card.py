"""The model card of an export: a README.md with metadata for the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from prelora_ds.config.model import ModelConfig
from prelora_ds.config.tree import Config
from prelora_ds.core.codec import CodecError
from prelora_ds.core.plan import Plan
from prelora_ds.data.manifest import data_name
from prelora_ds.data.setup import fingerprints
from prelora_ds.errors import ConfigError
from prelora_ds.files import replace_file
from prelora_ds.run.accuracy import StoredAccuracy, read_accuracy
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import EventKind, rows_until
from prelora_ds.version import __version__, git_commit

if TYPE_CHECKING:  # they import DeepSpeed, which `prelora evaluate` does not need
    from prelora_ds.run.context import Run
    from prelora_ds.run.run_state import RunState

CARD = "README.md"
TAG = "prelora_ds"
_TEMPLATE = Path(__file__).with_name("card.md")
_EVALUATED = "prelora evaluate, fp32"
_TRAINING = "in training, BF16"
# The sections of a recipe that describe the training, and not where it ran; and keys of them that
# hold paths, or in the case of factory_args may.
_SECTIONS = ("model", "data", "optimizer", "train", "observe", "convergence", "lora", "phases")
_LEFT_OUT = {"model": ("factory_args",), "data": ("train", "val", "cache_dir", "cache_gib", "workers", "worker_start")}
_LIBRARIES = {"hf": "transformers", "peft": "peft", "timm": "timm"}
_NOTES = {
    "hf": "With the path of this folder:",
    "peft": "peft looks for the base model relative to the current folder of the process. With the path of this "
    "folder from any other:",
    "timm": "With the path of this folder. `norm_layer` is optional: the model was trained with an epsilon of 1e-12, "
    "and timm's default is 1e-6.",
    "deepspeed": "In this folder, DeepSpeed's own script joins the fp32 weights (adapters are not merged):",
    "factory": "`model.safetensors` has the names of the module that the factory in `factory.json` builds:",
}
_EXAMPLES = {
    "hf": """from transformers import pipeline

classify = pipeline("image-classification", FOLDER)
classify("image.png")""",
    "peft": """from peft import PeftModel
from transformers import ViTForImageClassification

base = ViTForImageClassification.from_pretrained(f"{FOLDER}/base")
model = PeftModel.from_pretrained(base, FOLDER).eval()""",
    "timm": """from functools import partial

import timm
import torch

model = timm.create_model(f"local-dir:{FOLDER}", pretrained=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-12))
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model.eval()(transform(image)[None])""",
    "deepspeed": """import subprocess

subprocess.run(["python", "zero_to_fp32.py", ".", "fp32"], cwd=FOLDER, check=True)""",
    "factory": """from safetensors.torch import load_file

model.load_state_dict(load_file(f"{FOLDER}/model.safetensors"))""",
}


@dataclass(frozen=True)
class Phase:
    """A phase of a run.

    ranks: the rank of each adapter; None for a kind without ranks.
    trainable: how many parameters trained, or None if it is not known.
    """

    name: str
    first_step: int
    ranks: Sequence[int | None]
    trainable: int | None

    @property
    def trainable_text(self) -> str:
        return "not known" if self.trainable is None else f"{self.trainable:,}"

    @property
    def ranks_text(self) -> str:
        if not self.ranks:
            return "no adapters"
        known = [rank for rank in self.ranks if rank is not None]
        if not known:
            text = "none"
        elif min(known) == max(known):
            text = str(known[0])
        else:
            text = f"{min(known)} to {max(known)}, {mean(known):.1f} on average"
        return f"{text}, in {len(self.ranks)} linears"


@dataclass(frozen=True)
class Trained:
    """What is known about the training of a model.

    settings: the config of the run, as JSON; an older version may have written it.
    step: the number of optimizer steps that the weights have taken.
    phases: the phases up to this step, in order.
    data: key of the config -> fingerprint of that data set.
    forked_at: the step of the other run's checkpoint that the run began with, or None.
    complete: whether the run ended after ``step``.
    accuracy: the results on data.val that are known for these weights: how measured -> result.
    base: a sentence about the frozen weights below the adapters, if they are not simply in BF16.
    """

    settings: Mapping[str, Any]
    step: int
    phases: Sequence[Phase]
    data: Mapping[str, str]
    forked_at: int | None
    complete: bool
    accuracy: Mapping[str, StoredAccuracy]
    base: str | None = None

    def on_fp32_base(self) -> Trained:
        """The same for weights whose frozen part is in fp32, with which no accuracy was measured."""
        sentence = ("The frozen weights have the fp32 values from before they were frozen, not the rounded ones that "
                    "the adapters were trained on")
        return replace(self, accuracy={}, base=sentence)


def trained_by(
    folder: RunFolder | None,
    settings: Mapping[str, Any],
    state: RunState,
    data: Mapping[str, str],
    *,
    ends: bool = False,
) -> Trained:
    """Collect what is known about the training of the weights that ``state`` belongs to.

    folder: the run; None if there are only its checkpoints.
    settings, data: see `Trained`.
    ends: whether the run ends with these weights. Otherwise its log states it, and if so, the
        result of `prelora evaluate` for the run's own export is valid for these weights, too.

    Logs that are lost or damaged are not used. Raises ConfigError for a damaged accuracy.json.
    """
    events = [] if folder is None else _events(folder, state.step)
    complete = ends or any((row.get("event"), row["step"]) == (EventKind.END, state.step) for row in events)
    first = events[0] if events else {}
    accuracy = {}
    if state.accuracy is not None and state.acc1 is not None:
        accuracy[_TRAINING] = StoredAccuracy(
            correct=state.accuracy.correct,
            samples=state.accuracy.samples,
            correct5=state.accuracy.correct5,
            data=data_name(_setting(settings, "data.val")),
            identity=data.get("data.val"),
        )
    if folder is not None and complete and not ends and folder.accuracy.is_file():
        accuracy[_EVALUATED] = read_accuracy(folder.accuracy)
    return Trained(
        settings,
        state.step,
        _phases(events, state.phase.plan),
        data,
        first["step"] if first.get("event") == EventKind.RESUME else None,
        complete,
        accuracy,
        _quantised(state.phase.plan),
    )


def _quantised(plan: Plan) -> str | None:
    if not plan.quantised():
        return None
    return (f"The frozen weights below the adapters have the {plan.base_dtype} values that the adapters were trained "
            "on, multiplied out")


def _events(folder: RunFolder, step: int) -> list[dict[str, Any]]:
    """Read the run's events up to ``step``; none if they are lost or damaged."""
    path = folder.events_to_read
    if not path.is_file():  # Reading a pipe or a device might never end.
        return []
    try:
        return [row for row in rows_until(path, step) if "step" in row]
    except ConfigError:
        return []


def _phases(events: Sequence[Mapping[str, Any]], plan: Plan) -> list[Phase]:
    """Return the phases in ``events`` up to that of ``plan``; only the latter if the events do not lead to it."""
    phases: dict[str, Phase] = {}
    for row in events:
        if row.get("event") == EventKind.PLAN:
            try:
                logged = Plan.from_json(row["plan"])
            except (CodecError, KeyError, ValueError, TypeError, AttributeError):
                continue
            before = phases.get(logged.phase)
            first = row["step"] + 1 if before is None else before.first_step
            count = row.get("trainable_parameters")
            trainable = count if type(count) is int else None
            phases[logged.phase] = Phase(logged.phase, first, _ranks(logged), trainable)
    if plan.phase not in phases:
        return [Phase(plan.phase, plan.since_step + 1, _ranks(plan), None)]
    return list(phases.values())


def _ranks(plan: Plan) -> list[int | None]:
    return [spec.rank for spec in plan.adapters.values()]


def write_run_card(run: Run, state: RunState, folder: Path) -> None:
    """Write the card of the model that ``run`` ends with into the export in ``folder``. Raises OSError."""
    settings = run.config.model_dump(mode="json")
    trained = trained_by(run.folder, settings, state, fingerprints(run.train_data, run.val_data), ends=True)
    write_card(folder, "hf", trained, run.config, run.train_data.classes)


def write_card(
    folder: Path, export_format: str, trained: Trained, config: Config, classes: Sequence[str]
) -> None:
    """Write README.md into the export in ``folder``.

    config: has the model and the phases of the run.

    Raises OSError.
    """
    settings = trained.settings
    name = _setting(settings, "run.name")
    factory = config.model.factory
    form = "factory" if factory and export_format == "hf" else export_format
    results = [
        result
        for how, accuracy in _best_known(trained.accuracy).items()
        for result in _eval_results(accuracy, how)
    ]
    data = ModelCardData(
        library_name=_LIBRARIES.get(form),
        pipeline_tag="image-classification",
        tags=["image-classification", TAG] if factory else ["image-classification", "vit", TAG],
        model_name=name if results else None,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=name,
        kind=_kind(config.model),
        classes=len(classes),
        note=_NOTES[form],
        example=_EXAMPLES[form],
        grey=_grey(config.model, form),
        trained=trained,
        batch=_setting(settings, "train.global_batch_size"),
        duration=_setting(settings, "train.duration"),
        train_data=_described(_setting(settings, "data.train"), trained.data.get("data.train")),
        val_data=_described(_setting(settings, "data.val"), trained.data.get("data.val")),
        accuracy=[_sentence(accuracy, how) for how, accuracy in trained.accuracy.items()]
        or ["These weights were not evaluated."],
        not_run=_not_run(trained, [phase.name for phase in config.phase_list]),
        recipe=_recipe(settings),
        version=__version__,
        commit=git_commit(),
    )
    card.save(folder / CARD)


def record_accuracy(folder: Path, accuracy: StoredAccuracy) -> None:
    """Put the result of `prelora evaluate` into the metadata of the card in ``folder``, if we wrote that card.

    It replaces earlier results on the same data. Raises OSError, and ValueError if the metadata
    cannot be parsed.
    """
    path = folder / CARD
    if not path.is_file():
        return
    try:
        card = ModelCard.load(path)
    except yaml.YAMLError as exc:
        raise ValueError(str(exc)) from exc
    if TAG not in (card.data.tags or ()):
        return
    new = _eval_results(accuracy, _EVALUATED)
    others = [
        result
        for result in card.data.eval_results or ()
        if result.unique_identifier != new[0].unique_identifier
    ]
    heading = next((line[2:] for line in card.text.splitlines() if line.startswith("# ")), folder.name)
    card.data.model_name = card.data.model_name or heading
    card.data.eval_results = [*new, *others]
    replace_file(path, str(card))


def _setting(settings: Mapping[str, Any], key: str) -> str:
    """Return the setting with this dotted key as text, or "not known"."""
    value: Any = settings
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return "not known" if value is None else str(value)


def _best_known(accuracy: Mapping[str, StoredAccuracy]) -> Mapping[str, StoredAccuracy]:
    """Return the results without that of training if `prelora evaluate` measured the same data."""
    evaluated = accuracy.get(_EVALUATED)
    training = accuracy.get(_TRAINING)
    if evaluated is not None and training is not None and evaluated.identity in (None, training.identity):
        return {_EVALUATED: evaluated}
    return accuracy


def _eval_results(accuracy: StoredAccuracy, how: str) -> list[EvalResult]:
    counts = {"Top-1 accuracy": accuracy.correct, "Top-5 accuracy": accuracy.correct5}
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type="webdataset",
            dataset_name=_described(accuracy.data, None),
            dataset_revision=accuracy.identity,
            metric_type="accuracy",
            metric_name=f"{name} ({how})",
            metric_value=count / accuracy.samples,
        )
        for name, count in counts.items()
        if count is not None
    ]


def _sentence(accuracy: StoredAccuracy, how: str) -> str:
    top5 = "" if accuracy.correct5 is None else f", and {accuracy.correct5 / accuracy.samples:.2%} among the first five"
    return (
        f"{how}: {accuracy.correct:,} of {accuracy.samples:,} images of "
        f"{_described(accuracy.data, accuracy.identity)} are classified correctly "
        f"({accuracy.correct / accuracy.samples:.2%}){top5}."
    )


def _described(place: str | None, identity: str | None) -> str:
    name = "unnamed data" if place is None else data_name(place)
    return name if identity is None else f"{name} ({identity})"


def _kind(model: ModelConfig) -> str:
    if model.factory is not None:
        return f"A module of the factory `{model.factory}`"
    return (
        f"A Vision Transformer ({model.num_hidden_layers} blocks, width {model.hidden_size}, images of "
        f"{model.image_size} x {model.image_size} pixels, patches of {model.patch_size})"
    )


def _grey(model: ModelConfig, form: str) -> str | None:
    """Return what to say about the channels of a model that was trained on grey images."""
    if model.num_channels != 1 or form in ("factory", "deepspeed"):
        return None
    if form == "timm":
        return ' It takes one channel: open images with `Image.open(path).convert("L")`.'
    return (
        " It takes RGB, as transformers' pipeline provides it: the weight of the patch embedding is multiplied by the "
        "share of each colour in a grey value."
    )


def _not_run(trained: Trained, planned: Sequence[str]) -> list[str]:
    lines = []
    if _EVALUATED not in trained.accuracy:
        lines.append("`prelora evaluate` had not been run on this folder when this card was written. If it was run "
                     "later, the result is in accuracy.json and in the metadata of this card.")
    if not trained.complete:
        lines.append(f"The weights are those of a checkpoint after step {trained.step:,}, not those that the run ends "
                     "with.")
    now = trained.phases[-1].name
    later = planned[planned.index(now) + 1 :] if now in planned else ()
    lines += [f"Phase {name} of the recipe had not begun." for name in later]
    lines.append("The model was not tested on other data, for robustness, or for bias.")
    lines.append("No license is stated, because that of the weights depends on the data: add `license` to the metadata "
                 "before you publish them.")
    return lines


def _recipe(settings: Mapping[str, Any]) -> str:
    kept = {}
    for section in _SECTIONS:
        values = settings.get(section)
        if isinstance(values, Mapping):
            values = {key: value for key, value in values.items() if key not in _LEFT_OUT.get(section, ())}
        if values is not None:
            kept[section] = _without_deepspeed(values)
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).rstrip()


def _without_deepspeed(value: Any) -> Any:
    """Return ``value`` without DeepSpeed sections, which may hold the paths of disks."""
    if isinstance(value, Mapping):
        return {key: _without_deepspeed(item) for key, item in value.items() if key != "deepspeed"}
    if isinstance(value, list):
        return [_without_deepspeed(item) for item in value]
    return value
