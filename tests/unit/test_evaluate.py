from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from prelora_ds.core.errors import ConfigError
from prelora_ds.evaluate import Accuracy, evaluate, evaluate_folder

LABELS = 3


def one_hot_of(images: Tensor) -> Tensor:
    """Logits of a model that says class ``images[i, 0]``, with a margin of 4."""
    return 4.0 * torch.nn.functional.one_hot(images[:, 0], LABELS).float()


def batch(said: list[int], labels: list[int], mask: list[bool] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.tensor(said).view(-1, 1), torch.tensor(labels),
            torch.tensor([True] * len(said) if mask is None else mask))


RIGHT, WRONG = math.log1p(2 * math.exp(-4)), 4 + math.log1p(2 * math.exp(-4))


def test_counts_and_loss_by_hand() -> None:
    found = evaluate(one_hot_of, [batch([0, 1, 2], [0, 1, 0]), batch([2, 2], [2, 1])], samples=5)
    assert (found.correct, found.samples) == (3, 5)
    assert found.acc1 == 0.6
    assert found.loss == pytest.approx((3 * RIGHT + 2 * WRONG) / 5, rel=1e-5)


def test_rows_out_of_the_mask_count_nowhere() -> None:
    batches = [batch([0, 1, 0], [0, 2, 0], [True, True, False]), batch([1, 0], [0, 0], [False, False])]
    assert evaluate(one_hot_of, batches, samples=2) == Accuracy(1, 2, pytest.approx((RIGHT + WRONG) / 2, rel=1e-5))


rows = st.lists(st.tuples(st.integers(0, LABELS - 1), st.integers(0, LABELS - 1), st.booleans()), min_size=1,
                max_size=30)


@settings(deadline=None)  # the machine's other work counts in it
@given(rows, st.integers(1, 7))
def test_counts_are_exact_whatever_the_batches_and_the_mask(rows: list[tuple[int, int, bool]], size: int) -> None:
    batches = [batch(*map(list, zip(*rows[i:i + size], strict=True))) for i in range(0, len(rows), size)]
    counted = [(said, label) for said, label, mask in rows if mask]
    assume(counted)
    found = evaluate(one_hot_of, batches, samples=len(counted))
    assert (found.correct, found.samples) == (sum(said == label for said, label in counted), len(counted))
    assert found.loss == pytest.approx(sum(RIGHT if s == y else WRONG for s, y in counted) / len(counted), rel=1e-5)


@pytest.mark.parametrize("samples", [0, 2, 4, 100])
def test_another_count_than_the_data_sets_is_an_error(samples: int) -> None:
    with pytest.raises(RuntimeError, match=f"the evaluation counted 3 samples of {samples}"):
        evaluate(one_hot_of, [batch([0, 1, 2, 0], [0, 1, 0, 0], [True, True, True, False])], samples=samples)


def test_the_count_is_held_against_the_data_set_after_the_sum_over_ranks() -> None:
    seen = []

    def double(tensor: Tensor) -> None:  # a second rank with the same rows
        seen.append(tensor.dtype)
        tensor.mul_(2)

    one = [batch([0, 1, 2], [0, 1, 0])]
    found = evaluate(one_hot_of, one, samples=6, reduce=double)
    assert (found.correct, found.samples) == (4, 6)
    assert found.loss == pytest.approx((2 * RIGHT + WRONG) / 3, rel=1e-5)
    assert seen == [torch.int64, torch.float64]
    with pytest.raises(RuntimeError, match="counted 6 samples of 3"):
        evaluate(one_hot_of, one, samples=3, reduce=double)


def test_no_gradients_are_recorded() -> None:
    weight = torch.ones(1, requires_grad=True)

    def model(images: Tensor) -> Tensor:
        logits = one_hot_of(images) * weight
        assert not logits.requires_grad
        return logits

    assert evaluate(model, [batch([0], [0])], samples=1).correct == 1


def test_a_folder_that_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        evaluate_folder(tmp_path, tmp_path / "none")
    assert caught.value.key == "--data"
