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
        "--no-page",
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
        page=False,
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
        no-page = true
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
        page=False,
        limit_mm_per_prompt={"image": 4, "video": 2},
        lora_modules={"colors": "one", "shapes": "two"},
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("prot = 1", "prot is not an option; did you mean port?"),
        ("config = 'a'", "config is not an option"),
        ("tensor-parallel-size = 2", "tensor-parallel-size: not supported: a server uses one"),
        ("lora-modules = ['x']", "lora-modules of --config server.toml: got 'x', must be NAME=DIR"),
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


def test_paths_in_a_config_file_are_relative_to_it(
    run: Run, configs: list[ServerConfig], tmp_path: Path
) -> None:
    (tmp_path / "sub" / "media").mkdir(parents=True)
    (tmp_path / "sub" / "of-a-model").mkdir()
    (tmp_path / "sub" / "server.toml").write_text(
        """
        model = "of-a-model"
        allowed-local-media-path = "media"
        lora-modules = {colors = "one"}
        """
    )
    result = run("serve", "--config", "sub/server.toml")
    assert result.exit_code == 0, result.stderr
    (config,) = configs
    assert config.served_model_names == ("of-a-model",)
    assert config.allowed_local_media_path == Path("sub/media")
    assert config.lora_modules == {"colors": "sub/one"}


def test_errors_name_where_a_value_came_from(
    run: Run, configs: list[ServerConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "server.toml").write_text("port = 70000")
    result = run("serve", "--config", "server.toml")
    assert "port of --config server.toml: got 70000" in result.stderr
    monkeypatch.setenv("QWEN2VL_API_KEY", "k\u00e9y")
    result = run("serve")
    assert "QWEN2VL_API_KEY: a key is empty" in result.stderr
    assert not configs


@pytest.mark.parametrize(
    "arguments",
    [
        ["--lora-modules", "a=one", "b=two", "--port", "8000"],
        ["--lora-modules=a=one", "b=two"],
        ["--lora-modules", "a=one", "--lora-modules", "b=two"],
        ["--lora-modules", '{"name": "a", "path": "one"}', '{"name": "b", "path": "two"}'],
        ["--lora-modules", '{"name": "a", "path": "one", "base_model_name": "x"}', "b=two", "nano"],
        ["nano", "--lora-modules", "a=one", "b=two"],
    ],
)
def test_the_forms_of_lora_modules(
    run: Run, configs: list[ServerConfig], arguments: list[str]
) -> None:
    result = run("serve", *arguments)
    assert result.exit_code == 0, result.stderr
    assert configs == [ServerConfig(lora_modules={"a": "one", "b": "two"})]


def test_help_shows_the_defaults_of_the_configuration(run: Run) -> None:
    from qwen2vl.cli.serve.server_options import MAX_NUM_SEQS
    from qwen2vl.engine import EngineConfig

    text = " ".join(run("serve", "--help").stdout.split())
    assert EngineConfig().max_num_seqs == MAX_NUM_SEQS
    for name in ("max_queue", "max_body_bytes", "request_timeout", "num_media_workers"):
        option = text.partition(f" --{name.replace('_', '-')} ")[2]
        assert option.partition("[default: ")[2].startswith(f"{getattr(ServerConfig(), name)}]")
    assert "[default: image=16,video=2]" in text


@pytest.mark.parametrize(
    ("arguments", "shown"), [([], "$QWEN2VL_API_KEY"), (["--api-key", "hunter2"], "KEY")]
)
def test_the_command_to_try_names_the_variable_only_if_it_is_set(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], shown: str
) -> None:
    keys: list[str] = []

    def describe_server(*_: Any, key: str, **__: Any) -> list[str]:
        keys.append(key)
        return []

    def run_server(*_: Any, on_ready: Any, **__: Any) -> int:
        on_ready(None, 8000)
        return 0

    monkeypatch.setattr("qwen2vl.cli.commands.serve.describe_server", describe_server)
    monkeypatch.setattr("qwen2vl.server.launch.run_server", run_server)
    monkeypatch.setattr("qwen2vl.server.listener.logs.configure_logs", lambda _: None)
    monkeypatch.setenv("QWEN2VL_API_KEY", "from-environment")
    assert run("serve", *arguments).exit_code == 0
    assert keys == [shown]


def test_a_missing_config_file(run: Run) -> None:
    result = run("serve", "--config", "missing.toml")
    assert (result.exit_code, "cannot be read" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--limit-mm-per-prompt", "image"], "must be as image=16,video=2"),
        (["--limit-mm-per-prompt", "imgae=1"], "did you mean image?"),
        (["--lora-modules", "folder"], "--lora-modules: got 'folder', must be NAME=DIR"),
        (["--lora-modules", '{"name": "a"}'], 'or {"name": "NAME", "path": "DIR"}'),
        (["--port", "1", "a=folder"], "give an adapter as --lora-modules a=folder"),
        (["--served-model-name", "a", "b", "c"], "MODEL: got 2 arguments, must be one"),
        (["--allowed-local-media-path", "no"], "--allowed-local-media-path: got 'no', must be"),
        (["--max-body-bytes", "0"], "--max-body-bytes: got 0"),
        (["--served-model-name", "a,a"], "--served-model-name, --lora-modules: 'a' is given twice"),
        (["--lora-modules", "a=b", "--lora-modules", "a=c"], "the name a is given twice"),
        (["--lora-modules", "a=b", "--compile"], "cannot be compiled"),
        (["--allowed-origins", "[1]"], "is not a JSON list of strings"),
        (["--port", "70000"], "--port: got 70000"),
        (["--kv-cache-dtype", "fp8"], "'fp8' is not one of 'auto', 'int8'"),
        (["a/b", "--model", "c/d"], "give one"),
        (["--api-key", ""], "--api-key: a key is empty"),
        (["--prot", "1"], "No such option"),
        (["--max-num-seqs=2", "--tensor-parallel-size=2"], "not supported: a server uses one"),
        (["--no-enable-prefix-caching"], "--no-enable-prefix-caching: not needed: chunked"),
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
    assert re.search("serving nano on cpu, (float32|bfloat16)\n", banner)  # by the processor
    assert "KV cache" in banner and "16 images, 2 videos per request" in banner
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
