"""A small LLM for the tests of this room: every parameter random, so that answers wander."""

from __future__ import annotations

import pytest

from qwen2vl.engine import LLM
from tests.parity.oracle import random_model
from tests.tiny import tiny_config, tiny_processor


@pytest.fixture(scope="session")
def llm() -> LLM:
    return LLM.of(random_model(tiny_config(tie_word_embeddings=False)), tiny_processor())
