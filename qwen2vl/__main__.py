"""`python -m qwen2vl` is the command `qwen2vl`.

It exists for machines where scripts are not on the PATH. Nothing else lives here: the commands
are in cli/, one file each.
"""

from __future__ import annotations

from qwen2vl.cli.main import main

if __name__ == "__main__":
    main(prog_name="qwen2vl")
