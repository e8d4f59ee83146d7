"""A tiny LLM with all parameters random, so that outputs vary."""

from __future__ import annotations

import pytest

from qwen2vl.engine import LLM
from tests.parity.reference import random_model
from tests.tiny import tiny_config, tiny_processor


@pytest.fixture(scope="session")
def llm() -> LLM:
    return LLM(random_model(tiny_config(tie_word_embeddings=False)), tiny_processor())
