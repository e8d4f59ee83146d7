"""`qwen2vl`: find the command, run it, and turn every failure into one line on stderr.

A command is one line of COMMANDS, imported only when it is called. Exit codes: 0 done, 1 failed,
2 asked for something impossible, 130 interrupted; a traceback only with --debug. It must not know
what any command does. Next room: ask.py.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

import qwen2vl
from qwen2vl.cli import terminal
from qwen2vl.errors import Qwen2VLError

__all__ = ["COMMANDS", "Program", "main"]

# Name of the command, which is also its module and its function ("-" is "_") -> its line in --help.
COMMANDS = {
    "ask": "Ask a question about pictures and clips.",
    "chat": "Talk about pictures and clips, turn by turn.",
    "tokens": "Show how the model sees a file: size, grid, token count.",
    "demo": "Draw pictures, ask about them, show answers beside the truth.",
    "eval": "Score a model on questions with known answers.",
    "parity": "Compare a model folder with transformers, step by step.",
    "init": "Build a model to train, out of a Qwen2 and a CLIP vision tower.",
    "pack-text": "Tokenize plain text once, for training to read from disk.",
    "train": "Train a model by a recipe, or go on where the last run stopped.",
    "plot": "Draw the curves of training runs.",
    "export": "Write a model folder from a run's last checkpoint, or from any.",
    "quantize": "Write a model folder in small integers, rounded with care.",
    "doctor": "Check this machine and, if wished, a model folder.",
}

INTERRUPTED = 130


class Program(click.Group):
    """A group whose commands are imported when called, and whose failures are one line."""

    debug = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        return getattr(import_module(f"qwen2vl.cli.commands.{name}"), name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands' lines without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a reader who closed the pipe is no failure."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # The interpreter flushes stdout once more when it ends; give it somewhere to go.
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
        """Run, and end the process with the exit code."""
        self.debug = False
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
            terminal.note(f"error: {_usage(error)}")
            code = error.exit_code
        except Exception as error:
            if self.debug:
                raise
            terminal.note(f"error: {_explain(error)}")
            code = error.exit_code if isinstance(error, Qwen2VLError) else 1
        sys.exit(code)


def _usage(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    where = f" ({context.command_path} --help shows the options)" if context else ""
    return " ".join(error.format_message().split()) + where


def _explain(error: Exception) -> str:
    """Put a failure into one line; what we did not raise ourselves says so."""
    text = " ".join(str(error).split())
    if isinstance(error, Qwen2VLError):
        return text
    return f"{type(error).__name__}: {text}; this is a bug of qwen2vl: run again with --debug"


@click.command(cls=Program)
@click.version_option(qwen2vl.__version__, prog_name="qwen2vl")
@terminal.debug_option
def main() -> None:
    """Ask questions about pictures and videos with Qwen2-VL."""
