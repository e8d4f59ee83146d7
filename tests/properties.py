"""Properties that run with few examples by default, and with many where slow tests run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

SLOW_EXAMPLES = 2000


def at_both_sizes(
    test: Callable[..., None], *arguments: st.SearchStrategy[Any], examples: int = 200
) -> list[Any]:
    """Return a property as cases for parametrize: `examples`, and slow 2,000 of another seed."""
    phases = [phase for phase in Phase if phase is not Phase.explain]
    options: dict[str, Any] = {
        "deadline": None,
        "database": None,
        "phases": phases,
        "suppress_health_check": list(HealthCheck),
    }
    fast, slow = (
        seed(count)(settings(max_examples=count, **options)(given(*arguments)(test)))
        for count in (examples, SLOW_EXAMPLES)
    )
    marks = [pytest.mark.slow, pytest.mark.timeout(1800)]
    return [
        pytest.param(fast, id=str(examples)),
        pytest.param(slow, id=str(SLOW_EXAMPLES), marks=marks),
    ]
