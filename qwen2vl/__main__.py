"""Entry point of `python -m qwen2vl`, equivalent to the command `qwen2vl`.

For environments whose script folder is not on the PATH. The commands are in qwen2vl/cli/commands/.
"""

from __future__ import annotations

from qwen2vl.cli.main import main

if __name__ == "__main__":
    main(prog_name="qwen2vl")
