"""Which adapter a request asks for, and its prompt as that adapter sees it.

A picture encoded by an adapted tower has other rows than the same picture without: it is another
item, and gets another digest. Everything that goes by digests (the shelf, the vision cache in
memory and on disk, keys of blocks) then keeps the two apart without knowing why. What an adapter
does to the words is kept apart by sequence.py, which gives keys of blocks their beginning.
Next room: llm.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from hashlib import blake2b

from qwen2vl.adapt.served import Adapter
from qwen2vl.errors import InputError
from qwen2vl.processor.inputs import ModelInput

__all__ = ["find_adapter", "seen_through"]


def find_adapter(adapters: Mapping[str, Adapter], name: str | None) -> Adapter | None:
    """Look up the adapter of a request; None: the model alone.

    Raises:
        InputError: there is none of that name.
    """
    if name is None:
        return None
    if name not in adapters:
        known = f"it has {', '.join(sorted(adapters))}" if adapters else "it has none"
        raise InputError(f"adapter {name!r}: this LLM was not given it, {known}; LLM(adapters=...)")
    return adapters[name]


def seen_through(prompt: ModelInput, adapter: Adapter | None) -> ModelInput:
    """Tell a prompt's items from the same ones that another tower sees."""
    if adapter is None or not adapter.vision_digest or not prompt.items:
        return prompt
    items = [
        replace(item, digest=blake2b(item.digest + adapter.vision_digest, digest_size=32).digest())
        for item in prompt.items
    ]
    return replace(prompt, items=tuple(items))
