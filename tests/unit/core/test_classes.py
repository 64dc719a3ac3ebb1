"""Whether two data sets, or a model and a data set, have the same classes."""

from __future__ import annotations

import pytest

from prelora_ds.core.classes import classes_of, difference, unnamed

ANIMALS = ("cat", "dog", "owl")


def test_the_same_names_in_the_same_order_do_not_differ() -> None:
    assert difference(ANIMALS, list(ANIMALS), "the model") is None


def test_another_number_is_told_with_both() -> None:
    assert difference(ANIMALS, ANIMALS[:2], "the model") == "has 3 classes, but the model has 2"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (("cat", "owl", "dog"), "has 'dog' as class 1, but the model has 'owl'"),
        (("cat", "dog", "Owl"), "has 'owl' as class 2, but the model has 'Owl'"),
    ],
)
def test_the_first_name_that_differs_is_told(other: tuple[str, ...], said: str) -> None:
    assert difference(ANIMALS, other, "the model") == said


def test_names_that_are_not_known_are_not_compared_and_their_number_is() -> None:
    assert difference(ANIMALS, unnamed(3), "the model") is None
    assert difference(ANIMALS, unnamed(2), "the model") == "has 3 classes, but the model has 2"


def test_a_checkpoint_tells_names_or_their_number_or_nothing() -> None:
    assert classes_of({"classes": list(ANIMALS), "num_labels": 3}) == ANIMALS
    assert classes_of({"num_labels": 2}) == ("LABEL_0", "LABEL_1")
    assert classes_of({}) is None
