"""The handle for a user's own loop: the same run as our own loop, other models, resumes, and its errors."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.launch import launch
from torch import nn
from torch.nn.functional import cross_entropy

from prelora_ds import ConfigError, Phases, StaleEngineError
from prelora_ds.config.load import load_config
from prelora_ds.core.codec import to_json
from prelora_ds.core.layout import VIT_FAMILIES
from prelora_ds.data.setup import make_loader, open_data
from prelora_ds.data.transforms import to_float
from prelora_ds.engine.census import wait_until
from prelora_ds.errors import TrainingDivergedError
from prelora_ds.exporting.hf import with_rgb_patches
from prelora_ds.model.losses import classification_loss
from prelora_ds.model.vit import build_model
from prelora_ds.run.checkpoints.checkpoint_folder import list_checkpoints
from prelora_ds.run.log import read_lines
from prelora_ds.train import train

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs/examples/text_classifier.py"
DEBUG = ROOT / "launch/recipes/vit_tiny_debug.yaml"


# ---- the same run as our own loop

NONE = ("convergence=null", "lora.r_min=8", "lora.r_max=64", "lora.warmup=10 epochs", "train.duration=12 steps")
RELORA = "phases=[{name: full, until: 4 steps}, " \
         "{name: relora, adapters: {rank: 4, mode: branch}, train: [adapters, rest], until: 6 steps, " \
         "merge: {every: 3 steps, reset: {rule: magnitude, share: 0.9}, rewarm: 2 steps}}, " \
         "{name: joint, adapters: {rank: 2, from: merge, mode: branch}, train: all}]"
DYNALORA = "phases=[{name: full, until: 4 steps}, " \
           "{name: dyna, adapters: {rank: 4, mode: branch}, train: [adapters, rest], " \
           "active: {choose: discounted, k: 3, every: 2 steps, importance: backward, optimizer: local}}]"
METHODS = {"prelora": ("lora.mode=branch", "observe.spectra=true"), "relora": (*NONE, RELORA),
           "dynalora": (*NONE, DYNALORA)}


@pytest.mark.parametrize(("zero", "method"), [
    (3, "prelora"), (2, "relora"), (1, "dynalora"),
    *(pytest.param(*more, marks=pytest.mark.long) for more in [
        (0, "prelora"), (1, "prelora"), (2, "prelora"), (0, "relora"), (3, "relora"), (0, "dynalora"),
        (3, "dynalora")])])
def test_around_our_own_vit_and_data_it_is_our_own_loop_bit_for_bit(ranks, shards, tmp_path, zero, method):
    settings = [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", "model.hidden_dropout_prob=0.1",
                f"deepspeed={{zero_optimization: {{stage: {zero}}}}}", *METHODS[method]]
    settings += ["train.micro_batch_size=32"] if zero == 0 else []
    own = tmp_path / "own"
    own.mkdir()
    ranks.run(with_our_own_loop, settings=[*settings, f"run.output_dir={own}"])
    losses, closed, phases = ranks.run(with_the_handle, settings=settings, out=str(tmp_path / "model"))[0]

    rows = read_lines(own / "metrics.jsonl")
    assert losses == [row["train/loss"] for row in rows]
    assert phases == [row["phase"] for row in rows]
    windows = [{key: row[key] for key in ("index", "last_step", "loss", "norms", "losses", "spectra")}
               for row in read_lines(own / "windows.jsonl")]
    assert closed == windows
    ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (own, tmp_path))
    theirs = with_rgb_patches(theirs)  # our own export of a model for grey images takes RGB images
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def with_our_own_loop(settings):
    config = load_config(DEBUG, settings)
    train(config, *open_data(config), ["here"] * dist.get_world_size())


def with_the_handle(settings, out):
    """Return the loss of each step, the windows, and the phase of each step."""
    config = load_config(DEBUG, [*settings, "run.output_dir=-"])
    recipe = config.model_dump(mode="json")
    train_data, _ = open_data(config)
    phases = Phases(lambda: build_model(config.model, len(train_data.classes)), recipe, families=VIT_FAMILIES,
                    samples_per_epoch=len(train_data))
    engine, losses, walk = phases.start(), [], []
    loader = make_loader(config, train_data, rank=dist.get_rank(), world_size=dist.get_world_size(), workers=0,
                         start_step=0)
    while not phases.done:
        mean = []
        for batch in loader.next():
            logits = engine(to_float(batch.images, torch.bfloat16)).logits.float()
            loss = classification_loss(logits, batch.labels, kind="softmax", label_smoothing=0.0)
            engine.backward(loss)
            mean.append(loss.detach())
        engine.step()
        reduced = torch.stack(mean).mean().double()
        dist.all_reduce(reduced)
        losses.append(float(reduced.float()) / dist.get_world_size())
        walk.append(engine.phase)
        engine = phases.after_step()
    loader.close()
    windows = to_json(phases.state.windows)
    phases.export(out)
    return losses, windows, walk


# ---- the example

@pytest.mark.parametrize(("zero", "step"), [(0, 10), (2, 5), (3, 15)])
def test_the_text_classifier_walks_through_all_phases_and_resumes_bitwise(ranks, tmp_path, zero, step):
    """It resumes from a checkpoint of the full phase, of the warm-up, or of the LoRA phase."""
    whole = ranks.run(classify, out=tmp_path / "whole", zero=zero)
    assert [(name, len(list(steps))) for name, steps in groupby(whole[0], key=lambda step: step[0])] == [
        ("full", 8), ("warmup", 4), ("lora", 12)]
    assert sum(loss for _, loss in whole[0][-4:]) < sum(loss for _, loss in whole[0][:4]), "it has learned nothing"

    shutil.copytree(tmp_path / "whole/checkpoints", tmp_path / "run/checkpoints")
    resumed = ranks.run(classify, out=tmp_path / "run", zero=zero,
                        resume=tmp_path / f"run/checkpoints/step-{step:08d}")
    assert resumed == [losses[step:] for losses in whole]
    models = [tmp_path / run / "model/model.safetensors" for run in ("whole", "run")]
    assert models[0].read_bytes() == models[1].read_bytes()

    from transformers import BertForSequenceClassification

    bert = BertForSequenceClassification.from_pretrained(tmp_path / "run/model").eval()
    assert not any("lora" in name for name in bert.state_dict())
    ids, labels = example().snippets()
    with torch.no_grad():
        found = cross_entropy(bert(input_ids=ids).logits, labels)
    assert found < whole[0][0][1], "the exported model is no better than the first values"


def classify(out, zero, **options):
    torch.manual_seed(dist.get_rank() + 1000 * ("resume" in options))  # a job begins with any state
    return example().train(out, zero, **options)


def example():
    spec = importlib.util.spec_from_file_location("text_classifier", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
def test_the_example_runs_as_its_page_says(tmp_path):
    out = tmp_path / "text"
    done = launch(out, script=EXAMPLE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "step 24: lora" in done.stdout and (out / "model/config.json").is_file()


# ---- a small model for everything else

FAMILIES = {"up": r"blocks\.(?P<layer>\d+)\.up", "down": r"blocks\.(?P<layer>\d+)\.down"}
STATIC = [{"name": "full", "until": "2 steps"},
          {"name": "lora", "adapters": {"rank": 2}, "train": ["adapters", "rest"]}]


def small(zero=2, *, phases=STATIC, model=None, families=FAMILIES, **sections):
    from support.models import mlp

    recipe = {
        "optimizer": {"lr": 1e-3, "warmup": "0 steps"},
        "train": {"duration": "6 steps", "global_batch_size": 8, "micro_batch_size": 4},
        "observe": {"every": "1 step"},
        "deepspeed": {"zero_optimization": {"stage": zero}},
        "phases": phases,
    }
    recipe |= {name: {**recipe.get(name, {}), **values} for name, values in sections.items()}
    return Phases(model or (lambda: mlp(10)), recipe, families=families, samples_per_epoch=64)


def outputs_of(engine, step):
    generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
    return engine(torch.randn(engine.micro_batch_size, 3, 8, 8, generator=generator).bfloat16()).float()


def loss_of(engine, step):
    return cross_entropy(outputs_of(engine, step), torch.arange(engine.micro_batch_size))


def advance(phases, engine, steps):
    """Take steps; return the engine, and this rank's losses."""
    losses = []
    for _ in range(steps):
        for micro in range(engine.accumulation):
            loss = loss_of(engine, 10 * phases.step + micro)
            engine.backward(loss)
            losses.append(loss.item())
        engine.step()
        engine = phases.after_step()
    return engine, losses


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_stale_engine_raises_and_what_the_loop_still_holds_does_not_keep_it(ranks, tmp_path, zero):
    ranks.run(use_stale_engines, zero=zero, out=tmp_path / "model")


def use_stale_engines(zero, out):
    phases = small(zero)
    first = second = phases.start()
    kept = []
    for step in range(2):
        assert second is first and first.phase == "full"
        outputs = outputs_of(first, step)
        loss = cross_entropy(outputs, torch.arange(4))
        first.backward(loss)
        first.step()
        kept += [outputs, loss, sum(kept, loss).exp()]
        second = phases.after_step()
    assert second is not first and second.phase == "lora"
    assert all(tensor.isfinite().all() and tensor.requires_grad for tensor in kept)

    match = "this engine ended at step 2; use the one that after_step returned"
    for use in (lambda: outputs_of(first, 2), lambda: first.backward(loss), first.step, lambda: first.accumulation,
                lambda: first.evaluating().__enter__()):
        with pytest.raises(StaleEngineError, match=match):
            use()
    second, _ = advance(phases, second, 4)
    assert phases.done
    with pytest.raises(RuntimeError, match=r"the run is over: it has 6 steps \(train.duration\)"):
        second.backward(loss)
    with second.evaluating():
        before = outputs_of(second, 3)
    with second.evaluating():
        assert torch.equal(before, outputs_of(second, 3)) and not before.requires_grad

    phases.export(out)
    with pytest.raises(StaleEngineError, match="ended at step 6, when its model was exported"):
        outputs_of(second, 3)
    if dist.get_rank() == 0:
        from support.models import mlp

        model = mlp(10)
        model.load_state_dict(load_file(out / "model.safetensors"))
        generator = torch.Generator().manual_seed(6)
        expected = model(torch.randn(4, 3, 8, 8, generator=generator))
        assert float((expected - before).detach().abs().max()) <= 2 ** -6 * float(expected.detach().abs().max())


def test_calls_in_a_wrong_order_are_refused(ranks, tmp_path):
    ranks.run(call_in_a_wrong_order, out=tmp_path)


def call_in_a_wrong_order(out):
    phases = small(train={"global_batch_size": 16})
    for early in (lambda: phases.save(out), lambda: phases.done, lambda: phases.state):
        with pytest.raises(RuntimeError, match=r"call start\(\) or load\(\) first"):
            early()
    engine = phases.start()
    with pytest.raises(RuntimeError, match="this run has begun"):
        phases.start()
    with pytest.raises(RuntimeError, match=r"after_step\(\) was called before step\(\)"):
        phases.after_step()
    with pytest.raises(RuntimeError, match="the loss does not depend on outputs that this engine has computed"):
        engine.backward(torch.ones((), requires_grad=True) * 2)
    engine.backward(loss_of(engine, 0))
    with pytest.raises(RuntimeError, match=r"step\(\) was called after 1 backward passes, but .* takes 2 micro"):
        engine.step()
    with pytest.raises(RuntimeError, match=r"save\(\) was called within a step"):
        phases.save(out)
    engine.backward(loss_of(engine, 1))
    with pytest.raises(RuntimeError, match=r"step\(\) is due: 2 micro-batches"):
        engine.backward(loss_of(engine, 2))
    engine.step()
    for call in (engine.step, lambda: engine.backward(loss_of(engine, 3))):
        with pytest.raises(RuntimeError, match=r"was called before after_step\(\)"):
            call()
    phases.after_step()
    phases.close()
    with pytest.raises(StaleEngineError, match="ended at step 1, when the run was closed"):
        phases.close()


@pytest.mark.parametrize("zero", [2, 3])
def test_accumulated_micro_batches_of_another_size_per_phase(ranks, zero):
    ranks.run(accumulate, zero=zero)


def accumulate(zero):
    lora = {**STATIC[1], "micro_batch_size": 1, "zero_stage": 1}
    phases = small(zero, phases=[STATIC[0], lora])
    engine = phases.start()
    assert (engine.accumulation, engine.micro_batch_size) == (1, 4)
    engine, _ = advance(phases, engine, 2)
    assert (engine.accumulation, engine.micro_batch_size) == (4, 1) and engine.phase == "lora"
    advance(phases, engine, 2)
    phases.close()


def test_a_loss_that_is_not_finite_ends_the_run_at_the_next_observation(ranks):
    ranks.run(diverge)


def diverge():
    phases = small(observe={"every": "2 steps"}, phases=[{"name": "full"}])
    engine = phases.start()
    for step in (1, 2):
        loss = loss_of(engine, step)
        engine.backward(loss * float("nan") if step == 1 and dist.get_rank() == 1 else loss)
        engine.step()
        if step == 1:
            phases.after_step()
    with pytest.raises(TrainingDivergedError, match="step 1, phase full: the loss is nan"):
        phases.after_step()
    phases.close()


# ---- checkpoints

@pytest.mark.parametrize("step", [1, pytest.param(3, marks=pytest.mark.long)])
def test_a_checkpoint_keeps_the_state_of_the_loop_and_of_an_open_window(ranks, pools, tmp_path, step):
    """Losses since the last observation are in it. It can be read at another stage and on another number of ranks."""
    expected = ranks.run(save_and_continue, out=tmp_path / "run", step=step)
    assert expected == ranks.run(load_and_continue, out=tmp_path / "run", zero=2)
    ranks.run(load_and_continue, out=tmp_path / "run", zero=3)
    pools(1).run(load_and_continue, out=tmp_path / "run", zero=1)


TESTED = [{"name": "full", "until": {"test": "prelora", "tau": 90.0, "zeta": 90.0, "k": 2, "m": 1}},
          {"name": "lora", "adapters": {"rank": 2}, "train": ["adapters", "rest"]}]


def save_and_continue(out, step):
    phases = small(phases=TESTED, observe={"every": "2 steps"})
    engine, _ = advance(phases, phases.start(), step)
    phases.save(out, {"position": [step, "a"]})
    _, losses = advance(phases, engine, 6 - step)
    phases.close()
    return losses, to_json(phases.state)


def load_and_continue(out, zero):
    phases = small(zero, phases=TESTED, observe={"every": "2 steps"})
    engine, own = phases.load(out)
    assert own == {"position": [phases.step, "a"]}
    _, losses = advance(phases, engine, 6 - phases.step)
    phases.close()
    return losses, to_json(phases.state)


def test_saving_again_loses_nothing(ranks, tmp_path):
    ranks.run(save_again, out=tmp_path / "run", other=tmp_path / "other")


def save_again(out, other):
    phases = small()
    engine = phases.start()
    for _ in range(4):
        engine, _ = advance(phases, engine, 1)
        phases.save(out, {"position": phases.step})
    phases.save(out, {"position": 4})
    kept = wait_until(lambda: list_checkpoints(out / "checkpoints"), lambda checkpoints: len(checkpoints) == 2)
    assert [path.name for path in kept] == ["step-00000004", "step-00000003"], "a thread removes the others"
    assert len(list((out / "checkpoints").glob("base-*"))) == 1, "frozen weights are written once"
    phases.save(out, {"position": 5})
    assert (out / "checkpoints/aside/step-00000004").is_dir()
    phases.save(other)
    assert list_checkpoints(other / "checkpoints")[0].name == "step-00000004"

    with pytest.raises(ConfigError, match=r"own = .*: is not JSON"):
        phases.save(other, {"position": torch.zeros(1)})
    phases.close()

    another = small()
    another.start()
    with pytest.raises(ConfigError, match=r"has checkpoints of another run, such as step-.*\n  remedy"):
        another.save(out)
    another.close()

    for folder, own in ((out, {"position": 5}), (other, {}), (out / "checkpoints/step-00000003", {"position": 3})):
        phases = small()
        assert phases.load(folder)[1] == own
        phases.close()
    assert [path.name for path in list_checkpoints(out / "checkpoints")] == ["step-00000003"], "it continues from there"


def test_a_checkpoint_that_does_not_fit_is_refused_on_all_ranks(ranks, tmp_path):
    ranks.run(load_what_does_not_fit, out=tmp_path / "run", empty=tmp_path)


def load_what_does_not_fit(out, empty):
    phases = small()
    advance(phases, phases.start(), 1)
    phases.save(out)
    phases.close()
    with pytest.raises(ConfigError, match=r"folder = .*: is neither a checkpoint nor a run"):
        small().load(empty)
    with pytest.raises(ConfigError, match=r"optimizer.lr = 0.5: was 0.001 in .*step-00000001 and cannot change"):
        small(optimizer={"lr": 0.5}).load(out)
    other = {**STATIC[1], "adapters": {"rank": 4}}
    with pytest.raises(ConfigError, match=r"phases.lora.adapters.rank = 4: was 2 in"):
        small(phases=[STATIC[0], other]).load(out)
    with pytest.raises(ConfigError, match=r"data.samples_per_epoch = 65: was 64"):
        from support.models import mlp

        Phases(lambda: mlp(10), small().config.model_dump(mode="json"), families=FAMILIES,
               samples_per_epoch=65).load(out)


# ---- errors about the model

def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def frozen():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].requires_grad_(False)
    return model


def uncopyable():
    model = nn.Sequential(nn.Linear(4, 4))
    model.lines = (line for line in ())
    return model


ANY = r"(?P<layer>\d+)"
MISTAKES = {
    "a family that matches nothing": (lambda: nn.Sequential(nn.Linear(4, 4)), {"a": r"x(?P<layer>\d+)"},
                                      r"model.families.a = .*matches no module.*\n.*the linear modules include: 0"),
    "no linears": (lambda: nn.Sequential(nn.LayerNorm(4)), {"a": r"x(?P<layer>\d+)"},
                   r"matches no module of this model\n.*choose a model with torch.nn.Linear"),
    "not a linear": (lambda: nn.Sequential(nn.LayerNorm(4)), {"a": ANY}, "a LayerNorm, not a torch.nn.Linear"),
    "tied": (tied, {"a": ANY}, r"make_model = '1.weight': is tied to another parameter or frozen.*\n  remedy"),
    "frozen": (frozen, {"a": ANY}, r"make_model = '1.bias': is tied to another parameter or frozen"),
    "not a module": (lambda: 3, {"a": ANY}, "make_model = 'int': is the type of what it returned"),
    "uncopyable": (uncopyable, {"a": ANY}, r"make_model = 'Sequential': cannot be copied"),
    "a rank too large": (lambda: nn.Sequential(nn.Linear(1, 1)), {"a": ANY}, "is larger than 0"),
}


def test_a_model_that_does_not_fit_is_one_error_on_all_ranks(ranks):
    ranks.run(make_mistakes)


def make_mistakes():
    for model, families, match in MISTAKES.values():
        with pytest.raises(ConfigError, match=match):
            small(model=model, families=families).start()

    # Only one of the ranks is wrong, and all of them raise.
    rank = dist.get_rank()
    model, families, match = MISTAKES["a family that matches nothing"]
    with pytest.raises(ConfigError, match=match):
        small(model=model, families=families if rank == 1 else {"a": ANY}).start()
    with pytest.raises(ConfigError, match=r"make_model = 'rank 1': differs from that of rank 0"):
        small(model=lambda: nn.Sequential(nn.Linear(4 + rank, 4)), families={"a": ANY}).start()
    with pytest.raises(ConfigError, match=r"recipe = 'rank 1': differs from that of rank 0"):
        small(run={"seed": rank}).start()

    def fail_on_one():
        if rank == 1:
            raise FileNotFoundError("no weights here")
        return nn.Sequential(nn.Linear(4, 4))

    with pytest.raises(FileNotFoundError if rank == 1 else RuntimeError, match="no weights here"):
        small(model=fail_on_one, families={"a": ANY}).start()


def test_a_recipe_that_cannot_be_followed_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"phases.lora.zero_stage = 'auto': is predicted from the sizes of a ViT"):
        small(phases=[STATIC[0], {**STATIC[1], "zero_stage": "auto"}])
    with pytest.raises(ConfigError, match=r"model.families.up = .*has no group \(\?P<layer>"):
        small(families={"up": "up"})
    with pytest.raises(ConfigError, match=r"families = \{\}: names no linears"):
        small(families={})
    with pytest.raises(ConfigError, match=r"train.global_batch = .*unknown key"):
        small(train={"global_batch": 8})
    with pytest.raises(ConfigError, match=r"lora = 3: must be a mapping"):
        Phases(lambda: nn.Linear(1, 1), {"lora": 3}, families=FAMILIES, samples_per_epoch=1)
    with pytest.raises(ConfigError, match=r"recipe = .*nowhere.yaml.*does not exist"):
        Phases(lambda: nn.Linear(1, 1), tmp_path / "nowhere.yaml", families=FAMILIES, samples_per_epoch=1)


def test_a_recipe_file_and_a_deepspeed_file_serve_as_well():
    phases = Phases(lambda: nn.Linear(1, 1), DEBUG, families={"a": ANY}, samples_per_epoch=1437,
                    deepspeed=ROOT / "ds_configs/zero3.json")
    assert phases.total_steps == 20 and phases.config.zero.stage == 3
    assert phases.config.families() == ("a",) and phases.config.lora.r_max == 4


if str(ROOT / "tests") not in sys.path:  # the ranks import this file by its path
    sys.path.insert(0, str(ROOT / "tests"))
