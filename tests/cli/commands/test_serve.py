"""`serve`: options, the config file, the banner, and one run of the real process."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from qwen2vl.server.config import ServerConfig
from tests.cli.conftest import Run


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[ServerConfig]:
    """Collect the configurations of the servers that would be started."""
    collected: list[ServerConfig] = []

    def run_server(config: ServerConfig, _: Any, **__: Any) -> int:
        collected.append(config)
        return 0

    monkeypatch.setattr("qwen2vl.server.launch.run_server", run_server)
    monkeypatch.setattr("qwen2vl.server.listener.logs.configure_logs", lambda _: None)
    monkeypatch.delenv("QWEN2VL_API_KEY", raising=False)
    return collected


def test_the_defaults(run: Run, configs: list[ServerConfig]) -> None:
    assert run("serve").exit_code == 0
    assert configs == [ServerConfig()]


def test_options(run: Run, configs: list[ServerConfig], tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    options = [
        *("--host", "0.0.0.0", "--port", "9", "--api-key", "a", "--api-key", "b"),
        *("--served-model-name", "gpt-4o,other", "--max-model-len", "1024"),
        *("--limit-mm-per-prompt", "image=3", "--lora-modules", "colors=some/folder"),
        *("--allowed-local-media-path", "media", "--allowed-media-domains", "a.example,b.example"),
        *("--allowed-origins", '["https://app.example", "null"]', "--allowed-hosts", "gpu"),
        *("--metrics-port", "9100", "--max-queue", "5", "--max-requests-per-key", "2"),
        *("--request-timeout", "5", "--shutdown-timeout", "0", "--log-format", "json"),
        *("--disable-access-log", "--max-body-bytes", "1000", "--num-media-workers", "1"),
    ]
    result = run("serve", *options)
    assert result.exit_code == 0, result.stderr
    (config,) = configs
    assert config == ServerConfig(
        host="0.0.0.0",
        port=9,
        api_keys=("a", "b"),
        served_model_names=("gpt-4o", "other"),
        max_model_len=1024,
        limit_mm_per_prompt={"image": 3, "video": 2},
        lora_modules={"colors": "some/folder"},
        allowed_local_media_path=Path("media"),
        allowed_media_domains=("a.example", "b.example"),
        allowed_origins=("https://app.example", "null"),
        allowed_hosts=("gpu",),
        metrics_port=9100,
        max_queue=5,
        max_requests_per_key=2,
        request_timeout=5.0,
        shutdown_timeout=0.0,
        log_format="json",
        access_log=False,
        max_body_bytes=1000,
        num_media_workers=1,
    )


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["org/model"], "org/model"),
        (["--model", "org/model"], "org/model"),
        (["--model", "folder/of-a-model/"], "of-a-model"),
    ],
)
def test_the_served_name(
    run: Run, configs: list[ServerConfig], tmp_path: Path, arguments: list[str], name: str
) -> None:
    """A path of this machine is not told to clients."""
    (tmp_path / "folder" / "of-a-model").mkdir(parents=True)
    assert run("serve", *arguments).exit_code == 0
    assert configs[0].served_model_names == (name,)


def test_named_adapters_are_served(run: Run, configs: list[ServerConfig], tmp_path: Path) -> None:
    (tmp_path / "x=y").mkdir()  # a folder may have such a name; it is merged
    options = ["--adapter", "a=b", "--adapter", "x=y", "--lora-modules", "c=d"]
    assert run("serve", *options).exit_code == 0
    assert configs[0].lora_modules == {"c": "d", "a": "b"}


def test_the_key_from_the_environment(
    run: Run, configs: list[ServerConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN2VL_API_KEY", "from-environment")
    run("serve")
    run("serve", "--api-key", "given")
    assert [config.api_keys for config in configs] == [("from-environment",), ("given",)]


def test_a_config_file(run: Run, configs: list[ServerConfig], tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text(
        """
        port = 9000
        served-model-name = ["a", "b"]
        max_model_len = 512
        allowed-hosts = "gpu"
        disable-access-log = true
        limit-mm-per-prompt = {image = 4}
        lora-modules = {colors = "one", shapes = "two"}
        """
    )
    result = run("serve", "--config", "server.toml", "--port", "9001")
    assert result.exit_code == 0, result.stderr
    (config,) = configs
    assert config == ServerConfig(
        port=9001,
        served_model_names=("a", "b"),
        max_model_len=512,
        allowed_hosts=("gpu",),
        access_log=False,
        limit_mm_per_prompt={"image": 4, "video": 2},
        lora_modules={"colors": "one", "shapes": "two"},
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("prot = 1", "prot is not an option; did you mean port?"),
        ("config = 'a'", "config is not an option"),
        ("port = [1]", "port: got [1], must be a string or a number"),
        ("port = true", "port: got True, must be a string or a number"),
        ("disable-access-log = 1", "must be true or false"),
        ("allowed-hosts = {a = 1}", "must be a list of strings"),
        ("port = ", "is not TOML"),
        ("port = 'x'", "is not a valid integer"),
    ],
)
def test_a_wrong_config_file(
    run: Run, configs: list[ServerConfig], tmp_path: Path, content: str, reason: str
) -> None:
    (tmp_path / "server.toml").write_text(content)
    result = run("serve", "--config", "server.toml")
    assert result.exit_code == 2
    assert reason in " ".join(result.stderr.split())
    assert not configs


def test_a_missing_config_file(run: Run) -> None:
    result = run("serve", "--config", "missing.toml")
    assert (result.exit_code, "cannot be read" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--limit-mm-per-prompt", "image"], "must be as image=16,video=2"),
        (["--limit-mm-per-prompt", "imgae=1"], "did you mean image?"),
        (["--lora-modules", "folder"], "must be NAME=DIR"),
        (["--lora-modules", "a=b", "--lora-modules", "a=c"], "the name a is given twice"),
        (["--lora-modules", "a=b", "--compile"], "cannot be compiled"),
        (["--allowed-origins", "[1]"], "is not a JSON list of strings"),
        (["--port", "70000"], "port: got 70000"),
        (["a/b", "--model", "c/d"], "give one"),
        (["--api-key", ""], "api_keys"),
        (["--prot", "1"], "No such option"),
    ],
)
def test_wrong_options(
    run: Run, configs: list[ServerConfig], options: list[str], reason: str
) -> None:
    result = run("serve", *options)
    assert result.exit_code == 2
    assert reason in result.stderr
    assert not configs


def test_a_port_in_use_is_reported_before_anything_is_loaded(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run("serve", "--port", port, "--model", "no/such-model")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"qwen2vl: error: 127.0.0.1:{port} is in use")


def test_a_server_from_start_to_end(tmp_path: Path) -> None:
    """The banner, the log, an answer, metrics on another port, and exit code 0 after SIGTERM."""
    errors = tmp_path / "stderr"
    command = [sys.executable, "-m", "qwen2vl", "serve", "--port", "0", "--metrics-port", "0"]
    environment = os.environ | {"QWEN2VL_API_KEY": "hunter2"}
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True
        )
    try:
        url = _wait_for_url(errors, process)
        headers = {"Authorization": "Bearer hunter2", "X-Request-Id": "abc"}
        assert httpx2.get(f"{url}/models").status_code == 401
        assert httpx2.get(f"{url}/models", headers=headers).json()["data"][0]["id"] == "nano"
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, errors.read_text()
    assert re.search(r"GET '/v1/models' 200 [0-9.]+ ms request_id=abc", output)
    banner = errors.read_text()
    assert "serving nano on cpu, float32" in banner
    assert "KV cache" in banner and "16 images, 2 videos a request" in banner
    assert f"curl {url}/chat/completions" in banner and "$QWEN2VL_API_KEY" in banner
    assert "hunter2" not in banner


def _wait_for_url(errors: Path, process: subprocess.Popen[str]) -> str:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        assert process.poll() is None, errors.read_text()
        if match := re.search(r"ready after [0-9.]+ s: (http://\S+)", errors.read_text()):
            return match[1]
        time.sleep(0.05)
    raise AssertionError("the server did not start")


def test_the_banner_warns_of_an_open_server() -> None:
    from qwen2vl.cli.commands.serve import _banner

    llm = SimpleNamespace(
        model=SimpleNamespace(dtype="torch.bfloat16"),
        device="cuda",
        max_model_len=4096,
        kv_cache_tokens=8192,
        engine_config=SimpleNamespace(max_num_seqs=16),
    )

    def banner(**config: Any) -> str:
        state: Any = SimpleNamespace(
            engine=SimpleNamespace(llm=llm), config=ServerConfig(**config), connector=None
        )
        return "\n".join(_banner(state, 8000, {"quantize": "int8"}, 1.0))

    assert "serving nano on cuda, bfloat16, int8 weights" in banner()
    assert "warning" not in banner()
    assert "warning: everyone who reaches 0.0.0.0" in banner(host="0.0.0.0")
    assert "warning" not in banner(host="0.0.0.0", api_keys=("key",))
