"""LoRA's kernels, evaluation, loading and the choice of a micro-batch on the accelerator."""

from __future__ import annotations

import copy

import pytest
import torch
from support.plans import warmup_plan
from support.runs import Trainer, config
from torch import nn
from torch.profiler import ProfilerActivity, profile

from prelora_ds.cost.candidates import predict_candidate
from prelora_ds.data.manifest import Manifest
from prelora_ds.data.setup import make_loader
from prelora_ds.engine.runtime import device
from prelora_ds.hosts.discovery import Ranks
from prelora_ds.model.adapters import attach_adapters
from prelora_ds.model.families import find_layout
from prelora_ds.model.patches import PatchProduct, patches_as_products
from prelora_ds.run.autosize import resolve_auto
from prelora_ds.run.evaluate import evaluate

GPU = pytest.mark.gpu
# Per linear, forward and backward, by reading the code; the kernels that add up the parts of a product do not count.
MOST_KERNELS = {"branch": 10, "merged": 8, "fa": 9}
VIT_B = {"image_size": 224, "patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
         "intermediate_size": 3072, "attn_implementation": "sdpa"}


# ---- G8: the linears of LoRA


@pytest.mark.parametrize("kernel", MOST_KERNELS)
def test_g8_a_linear_with_an_adapter_computes_what_it_should_with_few_kernels(one, kernel):
    on_gpu = torch.cuda.is_available()
    one.run(lora_linear, kernel=kernel, ranks=(8, 16, 32, 64) if on_gpu else (8,),
            shape=(64, 197, 1024) if on_gpu else (2, 5, 64))


def lora_linear(kernel, ranks, shape):
    """The oracle is autograd over the formula in fp64."""
    for rank in ranks:
        generator = torch.Generator(device()).manual_seed(rank)

        def random(*size, scale=1.0, generator=generator):
            return (scale * torch.randn(size, device=device(), generator=generator)).bfloat16()

        width = shape[-1]
        holder = nn.Sequential(nn.Linear(width, width))
        layout = find_layout(holder, ("x",), {"x": r"(?P<layer>0)"})
        attach_adapters(holder, warmup_plan(layout, {"x": {0: rank}}, alpha_over_r=1.5), layout, dropout=0.0,
                        kernel="branch")
        layer = holder.to(device(), torch.bfloat16)[0]
        base = layer.get_base_layer().requires_grad_(False)
        base.weight.copy_(random(width, width, scale=width ** -0.5))
        base.bias.copy_(random(width))
        a, b = layer.lora_weights
        with torch.no_grad():
            a.copy_(random(rank, width, scale=width ** -0.5))
            b.copy_(random(width, rank, scale=rank ** -0.5))
        a.requires_grad_(kernel != "fa")
        b.requires_grad_()
        weight = base.weight.clone()
        if kernel == "merged":
            layer.keep_fp32_weight()
            layer.fp32_weight.copy_(weight)
            layer.refresh_merged_weight()
        x, g = random(*shape).requires_grad_(), random(*shape)

        def run(layer=layer, x=x, g=g):
            layer(x).backward(g)

        y = layer(x)
        y.backward(g)
        exact_x, exact_a, exact_b = (tensor.detach().double().requires_grad_() for tensor in (x, a, b))
        exact = nn.functional.linear(exact_x, weight.double() + 1.5 * exact_b @ exact_a, base.bias.double())
        exact.backward(g.double())
        pairs = {"y": (y, exact), "x": (x.grad, exact_x.grad), "b": (b.grad, exact_b.grad)}
        if kernel != "fa":
            pairs["a"] = (a.grad, exact_a.grad)
        else:
            assert a.grad is None
        for name, (found, expected) in pairs.items():
            error = float((found.double() - expected).norm() / expected.norm())
            assert error < 0.02, (kernel, rank, name, error)
        if torch.cuda.is_available():
            names = kernels_of(run)
            assert len(names) <= MOST_KERNELS[kernel], (kernel, rank, names)


def kernels_of(act):
    """Return the names of the kernels that ``act`` runs on the device."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        act()
        torch.cuda.synchronize()
    names = [event.name for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    # The gradients of x, A and B are added to those of the run before, which a step of the engine does not do.
    return [name for name in names if not any(
        word in name.lower() for word in ("splitk", "memset", "memcpy", "cudafunctor_add"))]


# ---- G12: evaluation


@pytest.mark.parametrize("samples", [22])
def test_g12_an_evaluation_with_padding_counts_what_the_cpu_counts(one, samples):
    one.run(counts, samples=samples)


def counts(samples):
    generator = torch.Generator().manual_seed(0)
    size = 7
    padded = -(-samples // size) * size
    logits = torch.randn(padded, 9, generator=generator)
    logits[3, 2] = float("nan")
    labels = torch.randint(0, 9, (padded,), generator=generator)
    mask = torch.arange(padded) < samples
    rows = torch.arange(padded).view(-1, size)
    results = []
    for where in (torch.device("cpu"), device()):
        table = logits.to(where)
        batches = ((row, labels[row], mask[row]) for row in rows)
        results.append(evaluate(lambda row, table=table: table[row.to(table.device)], batches, samples=samples,
                                device=where))
    on_cpu, on_device = results
    assert (on_cpu.correct, on_cpu.correct5, on_cpu.samples) == (
        on_device.correct, on_device.correct5, on_device.samples)


# ---- G14: predicted and measured memory


@GPU
def test_g14_the_micro_batch_that_auto_chooses_fits_and_the_prediction_is_close(one):
    used, predicted = one.run(chosen_micro_batch)[0]
    print(f"G14: {used / 2**30:.2f} GiB used, {predicted / 2**30:.2f} GiB predicted")
    assert 0.8 < used / predicted < 1.05


def chosen_micro_batch(gib=8.0):
    auto = {"warmup": {"micro_batch_size": "auto"}, "lora": {"micro_batch_size": "auto"}}
    cfg = config("zero2", model=VIT_B, batch=64, micro=4, phases=auto, machine={"memory_gib": gib})
    t = Trainer(cfg)
    layout, plan = t.layout, t.lora
    resolved = resolve_auto(cfg, layout, Ranks(0, 0, t.world)).for_phase("lora")
    micro = resolved.train.micro_batch_size
    predicted = predict_candidate(resolved, plan, layout, resolved.zero, t.world, micro).peak_bytes
    t.close()

    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / torch.cuda.get_device_properties().total_memory)
    try:
        t = Trainer(replace_micro(cfg, micro), begin="lora")
        t.train(2)
        torch.cuda.reset_peak_memory_stats()
        t.train(1)
        used = torch.cuda.max_memory_allocated()
        t.close()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return used, predicted


def replace_micro(cfg, micro):
    train = cfg.train.model_copy(update={"micro_batch_size": micro})
    return cfg.model_copy(update={"train": train})


# ---- G15: loading


@GPU
def test_g15_the_images_of_a_loader_are_in_pinned_memory(one, shards):
    one.run(pinned, train=shards / "train")


def pinned(train):
    digits = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "intermediate_size": 64}
    cfg = config("zero2", model=digits, data={"train": str(train), "val": str(train), "crop": "none", "flip": False,
                                              "workers": 1})
    loader = make_loader(cfg, Manifest.load(train), rank=0, world_size=1, workers=1)
    batches = loader.next()
    assert all(batch.images.is_pinned() and batch.labels.is_pinned() for batch in batches)
    loader.close()


# ---- G19: the patch embedding


def test_g19_the_patch_embedding_of_a_gpu_is_one_product(one):
    one.run(patch_embedding)


def patch_embedding():
    """The oracle is torch's convolution in fp64."""
    t = Trainer(config("zero2"))
    projection = t.engine.module.vit.embeddings.patch_embeddings.projection
    assert (type(projection) is PatchProduct) == (device().type != "cpu")
    t.close()

    conv = nn.Conv2d(3, 64, 16, 16).to(device(), torch.bfloat16)
    exact = copy.deepcopy(conv).double()
    images = torch.rand(4, 3, 64, 64, device=device()).bfloat16()
    patches_as_products(conv)
    results = [conv(images), exact(images.double())]
    direction = torch.randn_like(results[0])
    gradients = [torch.autograd.grad(result, [*of.parameters()], direction.to(result.dtype))
                 for result, of in zip(results, (conv, exact), strict=True)]
    for ours, wanted in [results, *zip(*gradients, strict=True)]:
        assert (ours.double() - wanted).norm() <= 0.02 * wanted.norm()
