"""Parts of `qwen2vl serve`: its command line, its config file, and what it prints.

ServeCommand         click command that knows vLLM's forms and option names (command.py)
VLLM_OPTIONS         vLLM's option names, and what to do here (vllm_options.py)
parse_lora_modules   NAME=DIR, or vLLM's JSON (lora_modules.py)
read_config_file     options in a TOML file (config_file.py)
name_options         names options, not fields, in errors (option_names.py)
describe_server      the lines printed at the start (banner.py)
"""

from __future__ import annotations
