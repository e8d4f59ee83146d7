"""`qwen2vl serve`: an HTTP server with the OpenAI API, in place of `vllm serve`.

Options have vLLM's names where it has them, and may be written into a TOML file (--config), which
the command line overrides. Everything is checked and the port is bound before the model is loaded;
clients are refused until it is. Ctrl-C and SIGTERM let running requests finish.
"""

from __future__ import annotations

import json
import re
import time
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from qwen2vl.cli import options, terminal
from qwen2vl.errors import ConfigError, InputError, suggest

if TYPE_CHECKING:
    from qwen2vl.engine import LLM
    from qwen2vl.server import ServerConfig
    from qwen2vl.server.state import ServerState

__all__ = ["read_config_file", "serve"]

API_KEY_VARIABLE = "QWEN2VL_API_KEY"
GROUPS = ("lora_modules", "limit_mm_per_prompt")  # options that are tables in a config file
LORA_MODULE = re.compile(r"([\w.-]+)=(.+)")
UNLISTED = ("config", "debug", "help")  # options that a config file cannot hold


def _load_config(context: click.Context, _: click.Parameter, path: str | None) -> None:
    if path is not None:
        context.default_map = read_config_file(path, context.command)


def _split(_: click.Context, option: click.Parameter, values: Iterable[str]) -> tuple[str, ...]:
    """Return the values of a repeatable option that also takes a,b and vLLM's JSON list."""
    result: list[str] = []
    for value in values:
        if value.lstrip().startswith("["):
            try:
                parsed = json.loads(value)
            except ValueError:
                parsed = None
            if not isinstance(parsed, list) or not all(isinstance(one, str) for one in parsed):
                raise click.BadParameter(f"{value!r} is not a JSON list of strings", param=option)
            result += parsed
        else:
            result += [part.strip() for part in value.split(",") if part.strip()]
    return tuple(result)


def _list_option(flag: str, metavar: str, help: str) -> Any:
    return click.option(flag, multiple=True, callback=_split, metavar=metavar, help=help)


@click.command()
@click.argument("positional_model", metavar="[MODEL]", required=False)
@options.model_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", default=8000, show_default=True, help="Port to listen at; 0: any free.")
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    metavar="KEY",
    envvar=API_KEY_VARIABLE,
    help=f"Key that clients must send; repeatable. Other users of this machine see it: better set "
    f"{API_KEY_VARIABLE}.",
)
@_list_option("--served-model-name", "NAME", "Name of the model in the API; repeatable.")
@click.option("--max-model-len", type=int, help="Context length; default: of the model.")
@click.option(
    "--limit-mm-per-prompt",
    metavar="image=N,video=N",
    help="Images and videos of one request, also as JSON; default: image=16,video=2.",
)
@click.option(
    "--lora-modules",
    multiple=True,
    metavar="NAME=DIR",
    help="LoRA adapter, served as the model NAME; repeatable.",
)
@click.option(
    "--allowed-local-media-path", metavar="DIR", help="Folder that file:// URLs may read."
)
@_list_option("--allowed-media-domains", "HOST", "Host of http(s) URLs of media; repeatable.")
@_list_option("--allowed-origins", "ORIGIN", "Origin of web pages that may ask; repeatable.")
@_list_option("--allowed-hosts", "HOST", "Further name of this server, for Host; repeatable.")
@click.option("--metrics-port", type=int, help="Serve /metrics at 127.0.0.1 on this port instead.")
@click.option("--max-num-seqs", type=int, help="Sequences that run at the same time [16].")
@click.option("--max-queue", type=int, help="Requests that may wait; more get 429 [128].")
@click.option("--max-requests-per-key", type=int, help="Requests of one API key at a time.")
@click.option("--max-body-bytes", type=int, help="Largest request body [33554432].")
@click.option("--request-timeout", type=float, help="Seconds that a request may take [600].")
@click.option("--shutdown-timeout", type=float, help="Seconds to finish after SIGTERM [30].")
@click.option("--num-media-workers", type=int, help="Processes that decode media [2].")
@click.option("--min-pixels", type=int, help="Upscale images with fewer pixels than this.")
@click.option("--max-pixels", type=int, help="Downscale images with more pixels than this.")
@click.option(
    "--log-format",
    type=click.Choice(["plain", "json"]),
    default="plain",
    show_default=True,
    help="Form of the access log (stdout) and of errors (stderr).",
)
@click.option("--disable-access-log", is_flag=True, help="Write no access log.")
@click.option(
    "--config",
    metavar="FILE.toml",
    is_eager=True,
    expose_value=False,
    callback=_load_config,
    help="Read options from a TOML file; the command line wins.",
)
@terminal.debug_option
@click.pass_context
def serve(context: click.Context, positional_model: str | None, **given: Any) -> None:
    """Serve a model by the OpenAI API: chat with images and videos, completions, embeddings.

    \b
    qwen2vl serve --model Qwen/Qwen2-VL-2B-Instruct --api-key SECRET
    """
    from qwen2vl.server.config import ServerConfig
    from qwen2vl.server.launch import run_server
    from qwen2vl.server.listener.logs import configure_logs

    began = time.perf_counter()
    if positional_model is not None:
        if context.get_parameter_source("model") is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{positional_model} and --model {given['model']}: give one")
        given["model"] = positional_model
    named = [one for one in given["adapters"] if _is_named(one)]
    lora_modules = _lora_modules((*given["lora_modules"], *named))
    given["adapters"] = [one for one in given["adapters"] if one not in named]
    if lora_modules and given["compile"]:
        raise click.UsageError(
            "--compile: LoRA modules stay unmerged and cannot be compiled; merge one by --adapter "
            "DIR, or leave --compile out"
        )
    config = ServerConfig(**_config_arguments(given, lora_modules))

    configure_logs(config.log_format)

    def load() -> LLM:
        return _load(given, config)

    def on_ready(state: ServerState, port: int) -> None:
        for line in _banner(state, port, given, time.perf_counter() - began):
            terminal.note(line)

    context.exit(run_server(config, load, on_ready=on_ready))


def read_config_file(path: str, command: click.Command) -> dict[str, Any]:
    """Return the options in a TOML file, by parameter name, as click's defaults.

    Args:
        path: of the file; its keys are options without --, with - or _.
        command: whose options they are.

    Raises:
        InputError: the file cannot be read, is not TOML, or has an unknown key or wrong value.
    """
    where = f"--config {path}"
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # of TOML or of UTF-8
        raise InputError(f"{where}: is not TOML: {error}") from None
    parameters = {
        _flag_name(parameter): parameter
        for parameter in command.params
        if isinstance(parameter, click.Option) and parameter.name not in UNLISTED
    }
    defaults: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("_", "-")
        if name not in parameters:
            raise InputError(f"{where}: {key} is not an option; {suggest(name, parameters)}")
        parameter = parameters[name]
        assert parameter.name is not None
        defaults[parameter.name] = _default_of(parameter, value, f"{where}: {key}")
    return defaults


def _flag_name(parameter: click.Option) -> str:
    return max(parameter.opts, key=len).removeprefix("--")


def _default_of(parameter: click.Option, value: Any, where: str) -> Any:
    """Return a value of a config file as the command line would give it."""
    if isinstance(value, Mapping) and parameter.name in GROUPS:
        pairs = [f"{key}={one}" for key, one in value.items()]
        return pairs if parameter.multiple else ",".join(pairs)
    if isinstance(value, list) and parameter.multiple:
        return [str(one) for one in value]
    if not isinstance(value, str | int | float) or isinstance(value, bool) != parameter.is_flag:
        expected = "true or false" if parameter.is_flag else "a string or a number"
        expected = "a list of strings" if parameter.multiple else expected
        raise InputError(f"{where}: got {value!r}, must be {expected}")
    return [str(value)] if parameter.multiple else value


def _config_arguments(given: Mapping[str, Any], lora_modules: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of ServerConfig; what was not given keeps its default."""
    names = (
        *("host", "port", "api_keys", "max_model_len", "metrics_port", "max_queue"),
        *("max_requests_per_key", "max_body_bytes", "request_timeout", "shutdown_timeout"),
        *("num_media_workers", "log_format", "allowed_media_domains", "allowed_origins"),
        "allowed_hosts",
    )
    fields = {name: given[name] for name in names if given[name] is not None}
    fields["access_log"] = not given["disable_access_log"]
    fields["lora_modules"] = lora_modules
    fields["served_model_names"] = given["served_model_name"] or (_model_name(given["model"]),)
    if given["allowed_local_media_path"] is not None:
        fields["allowed_local_media_path"] = Path(given["allowed_local_media_path"])
    if given["limit_mm_per_prompt"] is not None:
        fields["limit_mm_per_prompt"] = _media_limits(given["limit_mm_per_prompt"])
    return fields


def _model_name(model: str) -> str:
    """Return the name under which a model is served: never a path of this machine."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def _media_limits(text: str) -> dict[str, Any]:
    """Parse image=16,video=2, or JSON; ServerConfig validates the values."""
    try:
        if text.lstrip().startswith("{"):
            return json.loads(text)
        pairs = [part.split("=") for part in text.split(",")]
        return {kind.strip(): int(count) for kind, count in pairs}
    except ValueError:
        raise ConfigError(
            f'--limit-mm-per-prompt {text}: must be as image=16,video=2 or {{"image": 16}}'
        ) from None


def _is_named(adapter: str) -> bool:
    return LORA_MODULE.fullmatch(adapter) is not None and not Path(adapter).exists()


def _lora_modules(modules: Iterable[str]) -> dict[str, str]:
    """Return the adapters that are served as models, name -> folder.

    Raises:
        ConfigError: one has another form than NAME=DIR, or a name is given twice.
    """
    result: dict[str, str] = {}
    for value in modules:
        match = LORA_MODULE.fullmatch(value)
        if match is None:
            raise ConfigError(f"--lora-modules {value}: must be NAME=DIR")
        if match[1] in result:
            raise ConfigError(f"--lora-modules {value}: the name {match[1]} is given twice")
        result[match[1]] = match[2]
    return result


def _load(given: Mapping[str, Any], config: ServerConfig) -> LLM:
    from qwen2vl.engine import EngineConfig

    engine = EngineConfig()
    if given["max_num_seqs"] is not None:
        engine = EngineConfig(max_num_seqs=given["max_num_seqs"])
    return options.load_model_from_options(
        dict(given),
        adapters=dict(config.lora_modules),
        max_model_len=config.max_model_len,
        engine=engine,
    ).llm


def _banner(
    state: ServerState, port: int, given: Mapping[str, Any], seconds: float
) -> Iterable[str]:
    """Yield the lines that say what is served, where, and how to ask it."""
    from qwen2vl.server.middleware.access_control import is_loopback

    llm, config = state.engine.llm, state.config
    precision = str(llm.model.dtype).removeprefix("torch.")
    quantized = f", {given['quantize']} weights" if given["quantize"] else ""
    url = f"http://{_url_host(config.host)}:{port}"
    key = ' -H "Authorization: Bearer $QWEN2VL_API_KEY"' if config.api_keys else ""
    name = config.served_model_names[0]
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hi"}]})
    media = ", ".join(f"{count} {kind}s" for kind, count in config.limit_mm_per_prompt.items())
    yield f"serving {name} on {llm.device}, {precision}{quantized}"
    for adapter in config.lora_modules:
        yield f"serving the LoRA adapter {adapter}"
    yield (
        f"context {llm.max_model_len:,} tokens, KV cache {llm.kv_cache_tokens:,} tokens, "
        f"{llm.engine_config.max_num_seqs} running and {config.max_queue} waiting requests, "
        f"{media} a request"
    )
    yield f"ready after {seconds:.1f} s: {url}/v1"
    yield f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"
    if not config.api_keys and not is_loopback(config.host):
        yield (
            f"warning: everyone who reaches {config.host} can use this server; set "
            f"{API_KEY_VARIABLE} to require a key"
        )


def _url_host(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
