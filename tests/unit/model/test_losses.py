from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from prelora_ds.errors import ConfigError
from prelora_ds.model.losses import classification_loss, count_right, init_sigmoid_head

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, -3.0]])
LABELS = torch.tensor([0, 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_hard_and_equivalent_soft_labels_give_the_same_loss(kind, smoothing):
    hard = classification_loss(LOGITS, LABELS, kind=kind, label_smoothing=smoothing)
    soft = classification_loss(
        LOGITS, functional.one_hot(LABELS, 3).float(), kind=kind, label_smoothing=smoothing
    )
    assert hard.shape == () and float(hard) == pytest.approx(float(soft), rel=1e-6)


def test_samples_whose_label_is_largest_or_among_five_are_counted():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 9, generator=generator), torch.randint(0, 9, (200,), generator=generator)
    logits[3, (labels[3] + 1) % 9] = math.nan
    places = [sorted(range(9), key=lambda k, row=row: -row[k]).index(label)
              for i, (row, label) in enumerate(zip(logits.tolist(), labels.tolist(), strict=True)) if i != 3]
    assert count_right(logits, labels).tolist() == [places.count(0), sum(place < 5 for place in places), 200]
    assert count_right(logits[:2, :3], torch.tensor([0, 1])).tolist()[1:] == [2, 2], "three classes, all among five"


def test_softmax_is_torchs_and_sigmoid_sums_over_classes_by_hand():
    assert classification_loss(
        LOGITS, LABELS, kind="softmax", label_smoothing=0.1
    ) == functional.cross_entropy(LOGITS, LABELS, label_smoothing=0.1)
    expected = (
        sum(
            math.log1p(math.exp(-x if own else x))
            for row, label in zip(LOGITS.tolist(), LABELS, strict=True)
            for own, x in ((k == label, x) for k, x in enumerate(row))
        )
        / 2
    )
    assert float(
        classification_loss(LOGITS, LABELS, kind="sigmoid", label_smoothing=0)
    ) == pytest.approx(expected)


def test_a_sigmoid_head_starts_at_a_probability_of_a_thousandth_for_every_class():
    model = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 7), nn.Linear(7, 5), nn.Linear(5, 7))
    init_sigmoid_head(model, 7)
    logits = model(torch.randn(2, 4))
    assert torch.sigmoid(logits).detach().unique().tolist() == pytest.approx([0.001], rel=0.01)
    assert model[0].weight.any() and model[1].weight.any()
    with pytest.raises(ConfigError, match=r"train\.loss"):
        init_sigmoid_head(nn.Linear(3, 6, bias=False), 6)
