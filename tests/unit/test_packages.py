"""The pinned packages, as a user's pip sees them."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PINS = Path(__file__).parents[2] / "constraints.txt"
OLDEST = "3.11.0"  # Debian 12 has 3.11.2, and a pin that needs a later one stops `make setup` there


def test_every_pin_is_installable_on_the_oldest_python() -> None:
    assert SpecifierSet(str(distribution("prelora_ds").metadata["Requires-Python"])).contains(OLDEST)

    pins = [Requirement(line) for line in PINS.read_text().splitlines() if not line.startswith("#")]
    assert len(pins) > 100
    needs = {pin.name: distribution(pin.name).metadata.get("Requires-Python") or "" for pin in pins}
    assert {name: need for name, need in needs.items() if not SpecifierSet(need).contains(OLDEST)} == {}
