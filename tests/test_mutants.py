"""Every known mistake of the field turns at least one named check red, and none is red without it."""

from __future__ import annotations

import pytest

from mutants import MUTANTS


@pytest.mark.parametrize("name", MUTANTS)
def test_the_code_as_it_is_passes(name: str) -> None:
    MUTANTS[name].judge()


@pytest.mark.parametrize("name", MUTANTS)
def test_the_mistake_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name].patch(monkeypatch)
    with pytest.raises((AssertionError, ArithmeticError)):  # the second where the engine contradicts itself
        MUTANTS[name].judge()


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 12
