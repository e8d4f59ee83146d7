"""Entry point of the command `qwen2vl` and of `python -m qwen2vl`.

For environments whose script folder is not on the PATH, the second. The commands are in
qwen2vl/cli/commands/. Nothing slow is imported here before Ctrl-C is handled.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = ["run"]

INTERRUPTED = 130  # exit code


def run() -> None:
    """Run the command line of this process, and exit with its code."""
    signal.signal(signal.SIGINT, _interrupt)
    from qwen2vl.cli.main import main

    main(prog_name="qwen2vl")


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; end the process at once if it is importing a module.

    Modules catch exceptions of what they import: torch goes on without numpy, and half of a second
    import fails.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"\nqwen2vl: interrupted\n")
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    run()
