"""The command line: one file a command, and the only room that prints.

main.py finds the command and turns every failure into one line; terminal.py is what they share.
Commands are imported when they are used, and models only when a command runs, so that help is
instant.
"""
