import json.decoder
import os
import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest

from heiretsu.data import corpus
from heiretsu.data.corpus import END_OF_TEXT, is_validation, load_corpus
from heiretsu.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def splits():
    return load_corpus()


def documents(split):
    """Name -> text, taken apart at the end-of-text tokens."""
    texts = np.split(split.tokens, np.flatnonzero(split.tokens == END_OF_TEXT))
    assert len(texts[0]) == 0, "a split opens with end-of-text"
    return {name: bytes(text[1:].tolist()) for name, text in zip(split.documents, texts[1:], strict=True)}


def test_corpus_is_a_few_megabytes_of_byte_tokens(splits):
    train, val = splits
    assert train.tokens.dtype == val.tokens.dtype == np.uint16
    assert 3e6 < len(train.tokens) < 15e6
    assert 1e5 < len(val.tokens) < 1e6
    assert load_tokenizer("bytes").eot_token == END_OF_TEXT == train.tokens.max()


def test_documents_are_the_files_of_the_library_and_topics_of_the_reference(splits):
    found = documents(splits[0]) | documents(splits[1])
    assert found["json/decoder.py"] == Path(json.decoder.__file__).read_bytes()
    assert found["os.py"] == Path(os.__file__).read_bytes()
    assert found["reference/while"].decode() == pydoc_data.topics.topics["while"]
    tables_and_optional = (
        "test/",
        "encodings/",
        "idlelib/",
        "tkinter/",
        "lib2to3/",
        "site-packages/",
        "_sysconfigdata",
    )
    assert [name for name in found if name.startswith(tables_and_optional)] == []


def test_no_document_is_in_both_splits_or_split_in_two(splits):
    train, val = splits
    names = train.documents + val.documents
    assert len(names) == len(set(names))
    assert set(val.documents) == {name for name in names if is_validation(name)}


def test_held_out_documents_depend_on_their_names_alone():
    """These must not change from one Python or one release to the next: validation text would become training text."""
    assert [
        name for name in ("ast.py", "os.py", "typing.py", "json/decoder.py", "reference/while") if is_validation(name)
    ] == [
        "ast.py",
        "typing.py",
    ]
    assert sum(is_validation(f"file {i}") for i in range(10_000)) == pytest.approx(500, abs=65)  # three sigma


def test_corpus_is_the_same_on_every_load(splits):
    for first, second in zip(splits, load_corpus(), strict=True):
        assert first.documents == second.documents
        assert np.array_equal(first.tokens, second.tokens)


def test_num_bytes_leaves_out_the_end_of_text_tokens(splits):
    for split in splits:
        assert split.num_bytes == sum(map(len, documents(split).values()))


def test_corpus_in_another_encoding_is_the_same_text(splits, vocab_dir):
    gpt2 = load_tokenizer("gpt2", vocab_dir)
    _, val = load_corpus(gpt2)
    assert val.documents == splits[1].documents
    assert val.num_bytes == splits[1].num_bytes
    text = gpt2.decode(val.tokens.tolist())
    assert text == "".join("<|endoftext|>" + document.decode() for document in documents(splits[1]).values())
    assert (val.tokens == gpt2.eot_token).sum() == len(val.documents)


def test_python_without_its_source_is_refused(tmp_path, monkeypatch):
    (tmp_path / "os.pyc").write_bytes(b"\0" * 100)
    monkeypatch.setattr(corpus, "_language_reference", dict)
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=rf"{tmp_path}: this Python comes without the source .* data/prepare.py"):
        load_corpus()


def test_any_library_folder_is_filtered_and_sorted_alike(tmp_path, monkeypatch):
    """What lies beside the library (a distribution's own modules, tests, site-packages) does not leak in."""
    monkeypatch.setattr(corpus, "_language_reference", dict)
    monkeypatch.setattr(corpus, "MIN_BYTES", 1)
    wanted = {"ast.py": b"a\r\nb\r\n", "json/tool.py": b"c\n", "os.py": b"d"}
    unwanted = ["sitecustomize.py", "site-packages/json/x.py", "os.txt", "html/entities.py", "re/_casefix.py"]
    unwanted += [f"{name}/x.py" for name in "distutils ensurepip idlelib lib2to3 test tkinter turtledemo".split()]
    unwanted += ["encodings/x.py", "pydoc_data/x.py", "stringprep.py"]
    unwanted += [f"json/{name}/x.py" for name in "test tests idle_test site-packages __pycache__".split()]
    for name in [*unwanted, *reversed(wanted)]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(wanted.get(name, b"unwanted"))
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    train, val = load_corpus()
    assert documents(train) == {"json/tool.py": b"c\n", "os.py": b"d"}
    assert list(documents(train)) == ["json/tool.py", "os.py"]
    assert documents(val) == {"ast.py": b"a\nb\n"}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Writes a library of one document in each split, of these bytes."""
    monkeypatch.setattr(corpus, "_language_reference", dict)
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})

    def write(train: bytes, val: bytes):
        (tmp_path / "os.py").write_bytes(train)
        (tmp_path / "ast.py").write_bytes(val)

    return write


def test_half_a_megabyte_is_corpus_enough_and_a_byte_less_is_not(library):
    library(b"x" * 499_990, b"y" * 10)
    assert [split.num_bytes for split in load_corpus()] == [499_990, 10]
    library(b"x" * 499_990, b"y" * 9)
    with pytest.raises(ValueError, match="comes without the source of its standard library"):
        load_corpus()


def test_a_byte_that_is_no_text_is_replaced_where_an_encoding_wants_text(library, monkeypatch):
    monkeypatch.setattr(corpus, "MIN_BYTES", 1)
    library(b"caf\xe9", b"y")
    assert documents(load_corpus(load_tokenizer("bytes"))[0]) == {"os.py": "caf\ufffd".encode()}
    assert documents(load_corpus()[0]) == {"os.py": b"caf\xe9"}


def test_python_without_the_reference_still_has_a_corpus(monkeypatch):
    real = corpus.importlib.import_module

    def without_reference(name):
        if name.startswith("pydoc_data"):
            raise ModuleNotFoundError(name)
        return real(name)

    monkeypatch.setattr(corpus.importlib, "import_module", without_reference)
    train, val = load_corpus()
    assert not any(name.startswith("reference/") for name in train.documents + val.documents)
    assert len(train.tokens) > 3e6
