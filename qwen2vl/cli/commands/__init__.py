"""The commands of `qwen2vl`, one module each; every module exports one click command.

`qwen2vl.cli.main` lists them and imports a module only when its command runs.
"""
