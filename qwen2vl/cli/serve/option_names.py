"""Names of options in errors: of the command line, the config file or a variable.

ServerConfig, EngineConfig and LLM report their fields (`allowed_local_media_path: ...`); a user of
the command has given an option, and reads its name:

    --port: got 70000, ...    port of --config server.toml: got 70000, ...    QWEN2VL_API_KEY: ...
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import click
from click.core import ParameterSource

from qwen2vl.cli.serve.config_file import option_key
from qwen2vl.errors import ConfigError, InputError

__all__ = ["errors_name_options", "name_options"]

FIELD = re.compile(r"\b[a-z]\w*\b")
# Fields of ServerConfig and LLM -> parameters of the command with another name.
PARAMETER_OF = {
    "served_model_names": "served_model_name",
    "access_log": "disable_access_log",
}


@contextmanager
def errors_name_options(context: click.Context, config_path: str | None = None) -> Iterator[None]:
    """Let errors name the options that were given, not the fields of the configuration."""
    try:
        yield
    except (ConfigError, InputError) as error:
        error.args = (name_options(str(error), context, config_path),)
        raise


def name_options(message: str, context: click.Context, config_path: str | None) -> str:
    """Return the text of an error with options in place of the fields that it begins with.

    Args:
        message: `FIELD: ...`, `FIELD, FIELD: ...`, or another text with fields before its colon.
        context: of the command; says where each value came from.
        config_path: path of the config file, if one was given.
    """
    head, colon, rest = message.partition(":")
    parameters = {parameter.name: parameter for parameter in context.command.params}

    def replace(match: re.Match[str]) -> str:
        field = match[0]
        name = PARAMETER_OF.get(field, field)
        is_field = "_" in field or field == head  # a word such as "model" may be just a word
        parameter = parameters.get(name)
        if not (colon and is_field and isinstance(parameter, click.Option)):
            return field
        source = context.get_parameter_source(name)
        if source is ParameterSource.DEFAULT_MAP:
            return f"{option_key(parameter)} of --config {config_path}"
        if source is ParameterSource.ENVIRONMENT:
            return str(parameter.envvar)
        return f"--{option_key(parameter)}"

    return FIELD.sub(replace, head) + colon + rest
