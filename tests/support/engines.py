"""What holds for the engine of every trainer, checked in its ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from support.runs import LABELS, Trainer, only_owned

if TYPE_CHECKING:
    import torch

    from prelora_ds.core.plan import Plan


def full_values(t: Trainer) -> dict[str, torch.Tensor]:
    """Return name -> full fp32 value of each parameter."""
    import torch

    from prelora_ds.engine.state import copy_state, gather_full

    state = copy_state(t.engine.ds)
    return {name: gather_full(state, name, "value", shape, torch.device("cpu"))
            for name, shape in t.engine.plan.parameters(t.layout).items()}


def check_export(t: Trainer) -> None:
    """Compare the engine with the plain ViT that has the adapters folded in."""
    import torch

    from prelora_ds.engine.measure import relative_change
    from prelora_ds.exporting.hf import merge
    from prelora_ds.model.vit import build_model, logits_of

    plain = build_model(t.cfg.model, LABELS).eval()
    plain.load_state_dict(merge(full_values(t), t.engine.plan, t.layout))
    images = t.engine.prepare(t.batches_of(10_000))
    with torch.no_grad():
        expected = logits_of(plain(images.float()))
    difference = relative_change(expected, t.outputs())
    assert difference < 0.02, difference  # BF16 in the engine, fp32 in the plain ViT


def check_bytes(t: Trainer, plan: Plan) -> None:
    """Switch to ``plan``, train, and compare the bytes of every owner with those predicted, in and after a step."""
    from prelora_ds.cost.bytes import predict_bytes
    from prelora_ds.engine.census import census, wait_until

    def measured() -> Any:
        return wait_until(lambda: census(t.engine), only_owned)

    t.switch(plan)
    t.train(2)
    batches = t.batches()
    t.engine.backward(batches)
    at_backward = measured()
    t.engine.finish_step(lr=1e-3)
    del batches
    for found, after_backward in ((at_backward, True), (measured(), False)):
        predicted = vars(predict_bytes(plan, t.layout, t.engine.config.zero, t.world,
                                       after_backward=after_backward, kernel="branch"))
        for owner, expected in predicted.items():
            assert abs(found[owner] - expected) <= 0.02 * expected, (owner, predicted, found)
        assert only_owned(found), found
