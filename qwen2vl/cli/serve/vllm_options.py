"""vLLM's options of `vllm serve` that do not exist here: what to do with each.

    --tensor-parallel-size 2     not supported: ...
    --enable-lora                not needed: ...; leave it out
    --quantization gptq          give --quantize int8, ...

They are answered, not accepted, and so are their negations (--no-enable-prefix-caching). The table
in docs/guides/serve.md has the same rows. (engine/arguments/keyword_hints.py: of LLM(...).)
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["VLLM_OPTIONS", "describe_vllm_options"]

# Names without the dashes -> what to do here.
VLLM_OPTIONS = {
    "tensor-parallel-size pipeline-parallel-size data-parallel-size enable-expert-parallel "
    "distributed-executor-backend tp pp dp": (
        "not supported: a server uses one device; give --device cuda:1, or start one per GPU"
    ),
    "gpu-memory-utilization kv-cache-memory-bytes num-gpu-blocks-override block-size swap-space "
    "cpu-offload-gb": (
        "not supported: the KV cache is sized by the free memory; --max-model-len and "
        "--max-num-seqs lower it"
    ),
    "calculate-kv-scales": "not needed: each token has scales of its own; leave it out",
    "max-num-batched-tokens max-num-partial-prefills long-prefill-token-threshold": (
        "not supported: an engine step has at most 2,048 tokens; leave it out"
    ),
    "enable-chunked-prefill enable-prefix-caching async-scheduling": (
        "not needed: chunked prefill and prefix caching are always on; leave it out"
    ),
    "enable-lora max-loras max-cpu-loras max-lora-rank fully-sharded-loras": (
        "not needed: --lora-modules NAME=DIR is enough; leave it out"
    ),
    "enable-auto-tool-choice tool-call-parser tool-parser-plugin": (
        "not needed: tools are always available, in the format of Qwen2-VL; leave it out"
    ),
    "reasoning-parser enable-reasoning": "not needed: Qwen2-VL writes no reasoning; leave it out",
    "guided-decoding-backend structured-outputs-config": (
        "not needed: llguidance is the only backend; leave it out"
    ),
    "trust-remote-code": "not needed: no code of a model's folder is run; leave it out",
    "enforce-eager": "not needed: nothing is compiled without --compile; leave it out",
    "compilation-config max-seq-len-to-capture cuda-graph-sizes": (
        "give --compile, or leave it out; CUDA graphs are captured by default"
    ),
    "quantization load-format q": (
        "give --quantize int8, int4 or fp8; a folder that is already quantized needs no option"
    ),
    "speculative-config speculative-model num-speculative-tokens": (
        "not supported: the server uses no speculative decoding"
    ),
    "chat-template chat-template-content-format default-chat-template-kwargs "
    "trust-request-chat-template response-role": (
        "not supported: the chat template is that of Qwen2-VL; leave it out"
    ),
    "mm-processor-kwargs media-io-kwargs": (
        "give --min-pixels and --max-pixels; fps and num_frames are fields of a request"
    ),
    "mm-processor-cache-gb disable-mm-preprocessor-cache mm-encoder-tp-mode skip-mm-profiling": (
        "not needed: images and videos are cached within a fixed size; leave it out"
    ),
    "tokenizer tokenizer-mode config-format hf-config-path hf-overrides rope-scaling rope-theta": (
        "not supported: the tokenizer and the configuration are those of the model's folder"
    ),
    "generation-config override-generation-config": (
        "not supported: defaults are those of the model's generation_config.json; give sampling "
        "parameters in the request"
    ),
    "revision code-revision tokenizer-revision": (
        "not supported: download that revision, and give its folder as --model"
    ),
    "download-dir": "set the variable HF_HOME",
    "task runner convert": "not needed: one server both generates and embeds; leave it out",
    "seed": "not supported: give a seed in the request",
    "max-logprobs": "not needed: a request may have top_logprobs up to 20; leave it out",
    "scheduling-policy": "not supported: requests are run in the order of arrival; leave it out",
    "ssl-keyfile ssl-certfile ssl-ca-certs ssl-cert-reqs ssl-ciphers enable-ssl-refresh": (
        "not supported: use a reverse proxy with TLS in front of the server"
    ),
    "root-path": "not supported: let the reverse proxy remove the prefix of the path",
    "uds": "not supported: give --host and --port",
    "middleware tool-server": "not supported: the server loads no code and calls no tools",
    "allow-credentials allowed-methods allowed-headers": (
        "not needed: an origin of --allowed-origins may use all methods and headers; leave it out"
    ),
    "api-server-count": "not supported: one process serves the API; leave it out",
    "enable-log-requests disable-log-requests max-log-len enable-log-outputs disable-log-stats": (
        "not needed: contents of requests are never logged; leave it out"
    ),
    "disable-uvicorn-access-log uvicorn-log-level log-config-file": (
        "give --disable-access-log or --log-format json, or leave it out"
    ),
    "enable-request-id-headers enable-prompt-tokens-details disable-fastapi-docs": (
        "not needed: X-Request-Id and prompt_tokens_details are always sent, there is no /docs; "
        "leave it out"
    ),
    "enable-force-include-usage": (
        'not supported: give "stream_options": {"include_usage": true} in the request'
    ),
    "return-tokens-as-token-ids": "not supported: give return_token_ids in the request",
}
_HINT_OF = {name: hint for names, hint in VLLM_OPTIONS.items() for name in names.split()}


def describe_vllm_options(given: Iterable[str]) -> str | None:
    """Return what to do with options of vLLM.

    Args:
        given: arguments of a command line, or keys of a config file; all others are skipped.

    Returns:
        Lines `--OPTION, --OPTION: HINT`, or None if none is an option of vLLM.
    """
    options_of: dict[str, list[str]] = {}
    for argument in given:
        option = argument.partition("=")[0]
        name = option.lstrip("-").replace("_", "-")
        hint = _HINT_OF.get(name) or _HINT_OF.get(name.removeprefix("no-"))
        if hint is not None and option not in options_of.setdefault(hint, []):
            options_of[hint].append(option)
    return "\n".join(f"{', '.join(names)}: {hint}" for hint, names in options_of.items()) or None
