"""Lines for the console."""

from __future__ import annotations

from datetime import datetime

from prelora_ds.console import stamped


def test_a_stamped_line_begins_with_the_local_date_and_time() -> None:
    before = datetime.now().replace(microsecond=0)
    date, time, text = stamped("two words").split(" ", 2)
    assert text == "two words"
    assert before <= datetime.fromisoformat(f"{date} {time}") <= datetime.now()
