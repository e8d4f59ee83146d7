"""Command-line interface (CLI): one module a command; the only package that writes to stdout.

main.py dispatches to a command and formats every error as one line; options.py and terminal.py
are shared by the commands. Commands are imported lazily, and torch only when a command runs, so
that --help returns immediately.
"""
