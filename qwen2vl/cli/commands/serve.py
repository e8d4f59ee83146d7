"""`qwen2vl serve`: an HTTP server with the OpenAI API, in place of `vllm serve`.

Options have vLLM's names where it has them, and may be written into a TOML file (--config), which
the command line overrides. Everything is checked and the port is bound before the model is loaded;
clients are refused until it is. Ctrl-C and SIGTERM let running requests finish. Parts: cli/serve/.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from qwen2vl.cli import options, terminal
from qwen2vl.cli.serve.banner import describe_server
from qwen2vl.cli.serve.command import ServeCommand
from qwen2vl.cli.serve.config_file import read_config_file
from qwen2vl.cli.serve.lora_modules import is_named_adapter, parse_lora_modules
from qwen2vl.cli.serve.option_names import errors_name_options
from qwen2vl.cli.serve.server_options import (
    DEFAULTS,
    list_option,
    local_media_option,
    max_model_len_option,
    max_num_seqs_option,
    max_pixels_option,
    media_domains_option,
    media_limits_option,
    min_pixels_option,
    parse_media_limits,
    served_model_name,
)
from qwen2vl.server.config import ServerConfig

if TYPE_CHECKING:
    from qwen2vl.engine import LLM
    from qwen2vl.server.state import ServerState

__all__ = ["serve"]

API_KEY_VARIABLE = "QWEN2VL_API_KEY"
CONFIG_PATH = "qwen2vl.serve.config"  # key of the context's meta


def _load_config(context: click.Context, _: click.Parameter, path: str | None) -> None:
    if path is None:
        return
    context.meta[CONFIG_PATH] = path
    with _errors_name_options(context):
        context.default_map = read_config_file(path, context.command)


def _config_option(flag: str, help: str, **options: Any) -> Any:
    """Return an option whose default is that of the field of ServerConfig of the same name."""
    default = getattr(DEFAULTS, flag.removeprefix("--").replace("-", "_"))
    return click.option(flag, default=default, show_default=True, help=help, **options)


@click.command(cls=ServeCommand)
@click.argument("models", metavar="[MODEL]", nargs=-1)
@options.model_options
@_config_option("--host", "Address to listen at.")
@_config_option("--port", "Port to listen at; 0: any free one.")
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    metavar="KEY",
    envvar=API_KEY_VARIABLE,
    help="API key that clients must send; repeatable. Other users of this machine see the command "
    f"line: better set {API_KEY_VARIABLE}, or write it into the file of --config.",
)
@list_option(
    "--served-model-name",
    "NAME",
    "Model name in the API, in place of the repo id or the folder's name; repeatable.",
)
@max_model_len_option
@media_limits_option
@click.option(
    "--lora-modules",
    multiple=True,
    metavar="NAME=DIR",
    help='LoRA adapter, served as the model NAME; repeatable. Also {"name": NAME, "path": DIR}.',
)
@local_media_option
@media_domains_option
@list_option(
    "--allowed-origins",
    "ORIGIN",
    "Allow cross-origin requests of web pages of this origin (CORS), such as "
    "https://app.example, or * for any; repeatable.",
)
@list_option(
    "--allowed-hosts",
    "HOST",
    "Allow requests whose Host header has this name of the server, besides localhost and the "
    "address it listens at; repeatable.",
)
@click.option(
    "--metrics-port",
    type=int,
    show_default="the port of the API",
    help="Serve /metrics at 127.0.0.1 on this port instead.",
)
@max_num_seqs_option
@_config_option("--max-queue", "Requests that may wait; more get 429.")
@click.option(
    "--max-requests-per-key",
    type=int,
    show_default="no limit",
    help="Requests of one API key that may run and wait at the same time.",
)
@_config_option("--max-body-bytes", "Largest body of a request, in bytes.")
@_config_option("--request-timeout", "Seconds that a request may take.")
@_config_option("--shutdown-timeout", "Seconds that running requests have after Ctrl-C or SIGTERM.")
@_config_option("--num-media-workers", "Processes that decode images and videos.")
@min_pixels_option
@max_pixels_option
@_config_option(
    "--log-format",
    "Format of the access log (stdout) and of errors (stderr).",
    type=click.Choice(["plain", "json"]),
)
@click.option("--disable-access-log", is_flag=True, help="Write no access log.")
@click.option("--no-page", is_flag=True, help="Do not serve the page at /.")
@click.option(
    "--config",
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=_load_config,
    help="Read options from a TOML file; options of the command line take precedence.",
)
@terminal.debug_option
@click.pass_context
def serve(context: click.Context, models: tuple[str, ...], **given: Any) -> None:
    """Serve a model by the OpenAI API: chat with images and videos, completions, embeddings.

    \b
    qwen2vl serve --model Qwen/Qwen2-VL-2B-Instruct
    """
    from qwen2vl.server.launch import run_server
    from qwen2vl.server.listener.logs import configure_logs

    began = time.perf_counter()
    if models:
        given["model"] = _positional_model(context, models)
    with _errors_name_options(context):
        named = [one for one in given["adapters"] if is_named_adapter(one)]
        lora_modules = parse_lora_modules((*given["lora_modules"], *named))
        given["adapters"] = [one for one in given["adapters"] if one not in named]
        if lora_modules and given["compile"]:
            raise click.UsageError(
                "--compile: LoRA modules stay unmerged and cannot be compiled; merge one by "
                "--adapter DIR, or leave --compile out"
            )
        config = ServerConfig(**_config_arguments(given, lora_modules))

    configure_logs(config.log_format)

    def load() -> LLM:
        with _errors_name_options(context):
            return _load(given, config)

    def on_ready(state: ServerState, port: int) -> None:
        for line in describe_server(
            state,
            port,
            quantize=given["quantize"],
            key=_shown_key(context),
            seconds=time.perf_counter() - began,
        ):
            terminal.note(line)

    context.exit(run_server(config, load, on_ready=on_ready))


def _errors_name_options(context: click.Context) -> AbstractContextManager[None]:
    return errors_name_options(context, context.meta.get(CONFIG_PATH))


def _positional_model(context: click.Context, models: tuple[str, ...]) -> str:
    """Return the argument MODEL; values of options that ended up there are an error.

    Raises:
        UsageError: there are several, --model is given too, or it is an adapter.
    """
    (model, *others) = models
    if others:  # not shown, because one may be an API key
        raise click.UsageError(
            f"MODEL: got {len(models)} arguments, must be one; an option with several values is "
            "repeated, such as --served-model-name A --served-model-name B"
        )
    if is_named_adapter(model):
        raise click.UsageError(
            f"MODEL: got {model}, which is no model; give an adapter as --lora-modules {model}"
        )
    if context.get_parameter_source("model") is ParameterSource.COMMANDLINE:
        raise click.UsageError(f"{model} and --model {context.params['model']}: give one")
    return model


def _shown_key(context: click.Context) -> str:
    """Return how the command to try names the API key: never the key itself."""
    is_in_environment = context.get_parameter_source("api_keys") is ParameterSource.ENVIRONMENT
    return f"${API_KEY_VARIABLE}" if is_in_environment else "KEY"


def _config_arguments(given: Mapping[str, Any], lora_modules: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of ServerConfig."""
    same = (
        *("host", "port", "api_keys", "max_model_len", "metrics_port", "max_queue"),
        *("max_requests_per_key", "max_body_bytes", "request_timeout", "shutdown_timeout"),
        *("num_media_workers", "log_format", "allowed_media_domains", "allowed_origins"),
        "allowed_hosts",
    )
    fields = {name: given[name] for name in same}
    fields["access_log"] = not given["disable_access_log"]
    fields["page"] = not given["no_page"]
    fields["lora_modules"] = lora_modules
    names = given["served_model_name"]
    fields["served_model_names"] = names or (served_model_name(given["model"]),)
    fields["limit_mm_per_prompt"] = parse_media_limits(given["limit_mm_per_prompt"])
    if given["allowed_local_media_path"] is not None:
        fields["allowed_local_media_path"] = Path(given["allowed_local_media_path"])
    return fields


def _load(given: Mapping[str, Any], config: ServerConfig) -> LLM:
    from qwen2vl.engine import EngineConfig

    return options.load_model_from_options(
        dict(given),
        adapters=dict(config.lora_modules),
        max_model_len=config.max_model_len,
        engine=EngineConfig(max_num_seqs=given["max_num_seqs"]),
    ).llm
