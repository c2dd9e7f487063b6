"""What users do to a streamed model comes to what docs/streamed-module.md says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from users import ROWS, Row, Trial, table

DOCUMENT = Path(__file__).parents[1] / "docs" / "streamed-module.md"
TRIED = [
    pytest.param(row, budget, id=f"{budget}: {row.what}") for row in ROWS for budget in row.budgets
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("row", "budget"), TRIED)
def test_it_comes_to_what_the_table_says(row: Row, budget: str, tmp_path: Path) -> None:
    trial = Trial(tmp_path, budget)
    torch.manual_seed(0)
    if row.kind is None:
        row.run(trial)
    else:
        with pytest.raises(row.kind, match=re.escape(row.says.strip(". "))):
            row.run(trial)
    trial.check()


def test_the_table_is_the_documented_one() -> None:
    text = DOCUMENT.read_text()
    assert table() in text, "python tests/users.py makes it"
