"""The start of a server: limits of its processor, its state, and a quick end when it must end."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest

from qwen2vl.engine import AsyncLLM
from qwen2vl.errors import InputError
from qwen2vl.server import launch
from qwen2vl.server.config import ServerConfig


def test_the_processor_reads_no_files_and_no_urls(async_llm: AsyncLLM, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"x")
    sources = [str(tmp_path / "image.png"), (tmp_path / "image.png").as_uri(), "http://127.0.0.1/a"]
    for source in sources:
        content = [{"type": "image", "image": source}]
        with pytest.raises(InputError, match="not allowed"):
            async_llm.llm.processor([{"role": "user", "content": content}])
    limits = async_llm.llm.processor.limits
    assert limits.max_image_pixels == ServerConfig().max_image_pixels
    assert not (limits.allow_files or limits.allow_urls)
    assert limits.image_formats == ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")


def test_the_state_has_the_limits_of_its_config(async_llm: AsyncLLM) -> None:
    config = ServerConfig(max_queue=7, max_requests_per_key=3, served_model_names=("a",))
    state = launch.build_state(async_llm, config)
    admission = state.admission
    assert (admission.max_running, admission.max_queue, admission.max_per_key) == (16, 7, 3)
    assert 'qwen2vl:num_requests_running{model_name="a"} 0.0' in state.metrics.expose().decode()


def test_the_server_starts_without_importing_torch() -> None:
    """Options are checked and the port is bound before the slow imports."""
    code = (
        "import sys, qwen2vl.server, qwen2vl.server.launch as launch; "
        "from qwen2vl.server.listener.http_server import HTTPServer; "
        "launch._import_without_torch(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("second", "status"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130)],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_second_signal_ends_the_process_at_once(
    tmp_path: Path, second: signal.Signals, status: int
) -> None:
    errors = tmp_path / "stderr"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "qwen2vl", "serve", "--port", "0", "--disable-access-log"],
            stderr=stderr,
        )
    try:
        deadline = time.monotonic() + 100
        while not (match := re.search(r": (http://\S+)/v1", errors.read_text())):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        body = {
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 4000,
            "ignore_eos": True,
        }

        def ask() -> None:
            with suppress(httpx2.HTTPError):
                httpx2.post(f"{match[1]}/v1/chat/completions", json=body, timeout=100)

        thread = threading.Thread(target=ask)
        thread.start()
        while (
            'requests_running{model_name="nano"} 1.0' not in httpx2.get(f"{match[1]}/metrics").text
        ):
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGTERM)
        while httpx2.get(f"{match[1]}/ready").status_code != 503:
            assert time.monotonic() < deadline
        began = time.monotonic()
        process.send_signal(second)
        assert process.wait(60) == status == launch.forced_exit_status(second)
        assert time.monotonic() - began < 10  # less than 4 s on a machine that is not busy
        thread.join(20)
        assert "Traceback" not in errors.read_text()
        assert "error" not in errors.read_text()
    finally:
        process.kill()
