"""`qwen2vl chat`: interactive multi-turn conversation about images and videos.

A loaded model answers, or with --server an OpenAI-compatible server; qwen2vl/cli/chat has the
session and both. A saved conversation is a JSON list of messages, as `LLM.chat` takes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from qwen2vl.cli import annotate, options, terminal
from qwen2vl.cli.chat.session import ChatSession
from qwen2vl.cli.media_arguments import read_media_arguments
from qwen2vl.cli.video.options import part_options

if TYPE_CHECKING:
    from qwen2vl.cli.chat.backend import ChatBackend

__all__ = ["chat"]

# Options of a model that is loaded here; a server was started with its own.
LOCAL_OPTIONS = (
    *("device", "dtype", "adapters", "quantize", "kv_cache_dtype", "compile"),
    "video_preset",
)
SAMPLING = ("max_tokens", "temperature", "top_k", "top_p", "seed")
PIXELS = ("min_pixels", "max_pixels")


@click.command()
@click.argument("names", metavar="[FILE]...", nargs=-1)
@options.media_input_options
@options.system_option
@click.option(
    "--server",
    metavar="URL",
    help="Answer with an OpenAI-compatible server, such as `qwen2vl serve`; --model is then the "
    "name of one of its models (default: the first).",
)
@click.option(
    "--api-key",
    metavar="KEY",
    envvar="QWEN2VL_API_KEY",
    show_envvar=True,
    help="API key of the server.",
)
@options.model_options
@options.sampling_options
@options.media_preprocessing_options
@click.option(
    "-o",
    "--output",
    metavar="PATH",
    help="Draw an answer's boxes on a copy of its image, or on the frames of its video; as for "
    "`ask`.",
)
@terminal.debug_option
def chat(
    names: tuple[str, ...],
    system: str | None,
    server: str | None,
    api_key: str | None,
    output: str | None,
    **given: Any,
) -> None:
    """Chat about images and videos in several turns; /help lists the commands of the chat.

    FILE is an image or a video, recognized by its content; the first message shows them.

    \b
    qwen2vl chat receipt.png
    qwen2vl chat --server http://127.0.0.1:8000 receipt.png
    """
    if output:
        annotate.check_output(output, 1)  # images may come later
    files = read_media_arguments(names)  # a missing one is reported before the model is loaded
    if server is None:
        backend, name = _load_model(given)
    else:
        backend, name = _connect(server, api_key, given)
    terminal.note(f"{name} is ready; /image FILE attaches an image, /help lists the commands")
    session = ChatSession(backend, video_options=part_options(given), output=output)
    if system:
        session.set_system(system)
    session.attach(files)
    session.run()


def _load_model(given: dict[str, Any]) -> tuple[ChatBackend, str]:
    """Load the model of the options; return it with its name."""
    from qwen2vl.cli.chat.local_backend import LocalBackend

    if _is_given("api_key", ParameterSource.COMMANDLINE):
        raise click.UsageError("--api-key is the key of a server; name it by --server URL")
    params = options.sampling_params_from_options(given)
    loaded = options.load_model_from_options(given)
    return LocalBackend(loaded, params), loaded.name


def _connect(server: str, api_key: str | None, given: dict[str, Any]) -> tuple[ChatBackend, str]:
    """Connect to a server; return it with the name of its model and its address."""
    from qwen2vl.cli.chat.server_backend import ServerBackend
    from qwen2vl.cli.chat.server_connection import ServerConnection

    for option in LOCAL_OPTIONS:
        if _is_given(option):
            flag = "--adapter" if option == "adapters" else f"--{option.replace('_', '-')}"
            chooses = "; /adapter NAME or --model NAME chooses" if option == "adapters" else ""
            raise click.UsageError(
                f"{flag} is an option of a model that is loaded here; with --server the server "
                f"was started with its own{chooses}"
            )
    parameters = {name: given[name] for name in SAMPLING}
    pixels = {name: given[name] for name in PIXELS if given[name] is not None}
    parameters["mm_processor_kwargs"] = pixels or None
    connection = ServerConnection(server, api_key)
    click.get_current_context().call_on_close(connection.close)
    model = given["model"] if _is_given("model") else None
    backend = ServerBackend(connection, model, parameters)
    return backend, f"{backend.adapter} at {connection.url}"


def _is_given(
    name: str,
    *sources: ParameterSource,
) -> bool:
    """Return whether an option of the command was given, rather than its default."""
    sources = sources or (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return click.get_current_context().get_parameter_source(name) in sources
