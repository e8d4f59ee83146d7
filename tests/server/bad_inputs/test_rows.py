"""Every row of rows.csv is sent by a test of this folder, or by a named test elsewhere."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

from tests.server.bad_inputs.suite import ROWS, covered_rows

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]

# Rows whose tests here send only a part of what the row says, and the tests of the rest.
ELSEWHERE = {
    "SIGTERM with in-flight requests": (
        "tests/server/test_faults.py::test_sigterm_loses_no_accepted_request"
    ),
    "slow-loris request body or reading response 1 B/s": (
        "tests/server/listener/test_http_protocol.py::test_a_client_that_does_not_read_is_dropped"
    ),
    "kill -9 of worker process": (
        "tests/server/test_faults.py::test_a_killed_media_worker_costs_no_request"
    ),
    "NaN/Inf weights": (
        "tests/server/serving/test_chat_errors.py::test_logits_that_are_not_finite_fail_one_request"
    ),
    "DNS rebinding (public then private answer)": (
        "tests/server/media/test_fetch.py::test_dns_rebinding_connects_to_the_checked_address_only"
    ),
}


def test_every_row_is_sent() -> None:
    for path in sorted(FOLDER.glob("test_*.py")):
        import_module(f"{__package__}.{path.stem}")
    missing = sorted(set(ROWS) - set(covered_rows))
    assert not missing
    assert len(ROWS) == 126


def test_tests_elsewhere_exist() -> None:
    assert set(ELSEWHERE) <= set(ROWS)
    for node in ELSEWHERE.values():
        path, _, name = node.partition("::")
        text = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", text, re.MULTILINE), node
