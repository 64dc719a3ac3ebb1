"""Class names and labels, as others write them."""

from __future__ import annotations

import pytest

from prelora_ds.data.labels import LabelReader, SampleError, read_classes
from prelora_ds.errors import ConfigError


@pytest.mark.parametrize(
    "content",
    [
        b"crane\ndog",
        b"crane\ndog\n\n\n",
        b"\xef\xbb\xbfcrane\ndog\n",
        b"crane\r\ndog\r\n",
        b"crane\rdog\r",
        b"\n\n crane \n\n\tdog\n",
    ],
)
def test_blank_lines_line_ends_and_a_byte_order_mark_are_dropped(tmp_path, content):
    (tmp_path / "names").write_bytes(content)
    assert read_classes(tmp_path / "names") == ("crane", "dog")


def test_a_name_is_a_whole_line(tmp_path):
    names = ("crane, bird", "caf\xe9", "a\u2028b", "\x1cx y")
    (tmp_path / "names").write_text("\n".join(names), encoding="utf-8")
    assert read_classes(tmp_path / "names") == ("crane, bird", "caf\xe9", "a\u2028b", "x y")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"crane\ndog\n\ncrane\n", "lists 'crane' twice, in lines 1 and 4"),
        (b"crane\ncaf\xe9\n", r"is not UTF-8 text \(.*byte 9\)"),
        ("crane\n".encode("utf-16"), "is not UTF-8 text"),
        (b"", "contains no class name"),
        (b"\xef\xbb\xbf\n \n", "contains no class name"),
        ("caf\xe9\ncafe\u0301\n".encode(), "lists the same text in two Unicode forms.*lines 1 and 2"),
        (b"a\0b\n", "line 1 contains a null byte"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused(tmp_path, content, problem):
    (tmp_path / "names").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"--classes = .*names'.*: {problem}"):
        read_classes(tmp_path / "names")
    with pytest.raises(ConfigError, match=r"--classes = .*cannot be read"):
        read_classes(tmp_path)


@pytest.mark.parametrize("data", [b"7", b" 7\n", b"\xef\xbb\xbf7\r\n", b"+7", b"07"])
def test_the_number_in_a_cls_is_decimal(data):
    assert LabelReader(None, None).read("cls", data) == 7


@pytest.mark.parametrize(
    "data", [b"", b"7.0", b"0x7", b"1_0", b"7 8", "٧".encode(), b"seven", b"7\0"]
)
def test_what_is_not_a_decimal_number_is_refused(data):
    with pytest.raises(SampleError, match=r"in its \.cls, which is not a number"):
        LabelReader(None, None).read("cls", data)


def test_a_name_of_two_classes_is_refused_where_a_label_has_it():
    """Hugging Face's ImageNet has two classes named crane; numbers still work there."""
    reader = LabelReader(None, ("crane", "dog", "crane"))
    assert (
        reader.read("json", b'{"label": "dog"}') == 1 and reader.read("json", b'{"label": 2}') == 2
    )
    with pytest.raises(SampleError, match="'crane', which is the name of the classes 0 and 2"):
        reader.read("json", b'{"label": "crane"}')


def test_a_name_comes_before_a_number():
    assert LabelReader(None, ("1", "0")).read("json", b'{"label": "0"}') == 1
    assert LabelReader(None, None).read("json", b'{"label": "12"}') == 12


@pytest.mark.parametrize("name", ["0", "4", "01", " 1", "-1"])
def test_a_string_that_is_not_a_name_is_not_taken_for_a_number(name):
    for classes in (("1", "2", "3"), ("cat", "dog")):
        with pytest.raises(SampleError, match=f"'{name}'.* is not the name of any of the"):
            LabelReader(None, classes).read("json", f'{{"label": "{name}"}}'.encode())


def test_strings_are_numbers_where_the_names_are_the_indices_of_their_classes():
    reader = LabelReader(None, ("0", "1", "2"))
    assert reader.read("json", b'{"label": "02"}') == 2
    assert reader.read("json", b'{"label": 2}') == 2


@pytest.mark.parametrize("classes", [("1", "2", "3"), ("0", "1", "10", "2"), ("1", "0", "cat")])
def test_a_number_that_may_be_an_index_or_a_name_is_refused(classes):
    reader = LabelReader(None, classes)
    with pytest.raises(SampleError, match=r"the number 1 .* index of a class or its name"):
        reader.read("json", b'{"label": 1}')
    assert reader.read("json", b'{"label": "1"}') == classes.index("1")
    assert reader.read("cls", b"1") == 1


def test_one_name_that_is_a_number_leaves_other_numbers_clear():
    reader = LabelReader(None, ("747", "A320", "DC-10"))
    assert reader.read("json", b'{"label": 2}') == 2
    assert reader.read("json", b'{"label": "747"}') == 0
