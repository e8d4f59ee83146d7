"""Keyword hints: the answer to an unknown keyword, also where it is another library's name.

    chat("Hi", response_format=...)       give grammar=Grammar.json_schema(SCHEMA)
    chat("Hi", max_new_tokens=9)          write max_tokens
    LLM(gpu_memory_utilization=0.9)       give engine=EngineConfig(kv_cache_tokens=N)

Names of vLLM, the OpenAI API and transformers. They are answered, not accepted: one spelling is
enough in programs, and most of them take other values there. (train/key_hints.py: of trainings.)
"""

from __future__ import annotations

from collections.abc import Iterable

from qwen2vl.errors import InputError, suggest

__all__ = ["check_keywords", "describe_unknown_keyword"]

_SCHEMA = "give grammar=Grammar.json_schema(SCHEMA), of a schema or a pydantic class"
_ONE_DEVICE = "an LLM runs on one device, device='cuda:1' for example"
_MEMORY = "give engine=EngineConfig(kv_cache_tokens=N), the size of the KV cache"
_QUANTIZE = "write quantize='int8' or 'int4'; prequantized folders need no argument"
_KV_CACHE_DTYPE = "write LLM(kv_cache_dtype='int8') for an int8 KV cache"
_GREEDY = "temperature=0 is greedy, and top_k, top_p and temperature set the sampling"
_NO_BEAMS = "there is no beam search; n=N samples several completions"
_MESSAGES = "give the messages as the first argument"

_HINTS = {
    # Of calls and SamplingParams.
    "messages conversation inputs": _MESSAGES,
    "prompt": "give the text as the first argument",
    "sampling_params generation_config": "did you mean params?",
    "image": "did you mean images?",
    "video": "did you mean videos?",
    "response_format guided_json json_schema": _SCHEMA,
    "guided_regex regex": "give grammar=Grammar.regex(PATTERN)",
    "guided_choice choices": "give grammar=Grammar.choice(TEXTS)",
    "guided_grammar": "give grammar=Grammar.lark(TEXT)",
    "guided_decoding structured_outputs": (
        "give grammar=, of Grammar.json_schema, regex, choice or lark"
    ),
    "use_tqdm": "there is no progress bar; on_delta receives the output as it is generated",
    "stream": "LLM.stream yields the deltas of one conversation",
    "lora_request": "give adapter=NAME, one of LLM(adapters={NAME: FOLDER})",
    "max_new_tokens max_completion_tokens max_length max_output_tokens": "write max_tokens",
    "do_sample": _GREEDY,
    "num_beams use_beam_search best_of beam_width": _NO_BEAMS,
    "num_return_sequences": "write n",
    "stop_strings": "write stop",
    "eos_token_id": "write stop_token_ids, in addition to the checkpoint's end tokens",
    "top_logprobs output_scores": "write logprobs=N, the most likely tokens of each step",
    "streamer": "give on_delta=FUNCTION, or use LLM.stream",
    # Of LLM(...).
    "gpu_memory_utilization swap_space cpu_offload_gb num_gpu_blocks_override": _MEMORY,
    "kv_cache_tokens max_num_seqs max_num_batched_tokens": "it is a field of engine=EngineConfig()",
    "tensor_parallel_size pipeline_parallel_size data_parallel_size device_map": _ONE_DEVICE,
    "quantization quantization_config load_in_8bit load_in_4bit": _QUANTIZE,
    "torch_dtype": "write dtype",
    "cache_dtype cache_implementation cache_config": _KV_CACHE_DTYPE,
    "calculate_kv_scales": "each token has scales of its own; leave it out",
    "trust_remote_code": "no code of a model's folder is run; leave it out",
    "tokenizer tokenizer_mode": "it is read from the model's folder; leave it out",
    "enforce_eager": "nothing is compiled unless compile=True; leave it out",
    "enable_prefix_caching": "prefix caching is always on; leave it out",
    "attn_implementation": "attention has no option; the device decides",
    "limit_mm_per_prompt": "the context is the limit; limits=MediaLimits() bounds media files",
    "mm_processor_kwargs": "write min_pixels, max_pixels or video_preset",
    "enable_lora lora_modules": "give adapters={NAME: FOLDER}",
    "max_seq_len max_seq_length": "write max_model_len",
    "model_name model_id model_path pretrained_model_name_or_path": "write model",
}
_HINT_OF = {name: hint for names, hint in _HINTS.items() for name in names.split()}


def describe_unknown_keyword(name: str, known: Iterable[str]) -> str:
    """Return what to write in place of the keyword `name`, which is none of `known`."""
    return _HINT_OF.get(name) or suggest(name, known)


def check_keywords(given: Iterable[str], known: Iterable[str], kind: str = "argument") -> None:
    """Raise an InputError for the first of the given keywords that is not known.

    Args:
        given: keywords that a caller has used.
        known: all that exist.
        kind: what they are, for the message.
    """
    known = tuple(known)
    for name in given:
        if name not in known:
            raise InputError(
                f"{name}: there is no such {kind}; {describe_unknown_keyword(name, known)}"
            )
