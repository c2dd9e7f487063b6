"""Names and values in messages: short, and safe to show."""

import pytest

from wsm_ext.wording import first_of, printable, shown


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, ""), (1, "a0"), (2, "a0, a1"), (3, "a0, a1 and 1 more"), (9, "a0, a1 and 7 more")],
)
def test_the_first_items_and_how_many_more(count, text):
    assert first_of([f"a{i}" for i in range(count)], 2) == text


def test_items_on_lines_of_their_own():
    assert first_of(["a", "b", "c"], 2, "\n  ") == "a\n  b\n  and 1 more"


def test_long_values_are_cut_and_control_characters_escaped():
    assert shown("a\x1b") == "'a\\x1b'"
    assert len(shown("a" * 10_000)) < 310 > len(shown(["a" * 10_000]))
    assert printable(ValueError("a\x1b[31m\nb")) == "a\\x1b[31m\\nb"
    assert len(printable(ValueError("a" * 10_000))) == 300
