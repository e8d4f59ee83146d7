"""The click command of `serve`: accepts vLLM's forms, and answers its option names.

click reports the first unknown option; an option of vLLM that does not exist here is reported with
all others of the command line, and with what to do in place of each.
"""

from __future__ import annotations

import click

from qwen2vl.cli.serve.lora_modules import expand_lora_modules
from qwen2vl.cli.serve.vllm_options import describe_vllm_options
from qwen2vl.errors import InputError

__all__ = ["ServeCommand"]


class ServeCommand(click.Command):
    """A command whose --lora-modules may have several values, and whose users may know vLLM."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; an error if an option is unknown."""
        args = expand_lora_modules(args)
        known = {option for parameter in self.params for option in parameter.opts}
        unknown = [
            arg for arg in args if arg.startswith("-") and arg.partition("=")[0] not in known
        ]
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption:
            message = describe_vllm_options(unknown)
            if message is None:
                raise
            raise InputError(message) from None
