import hashlib
import json
import shutil
import socket
import sys
import time
from unittest.mock import Mock

import pytest
import requests
import tiktoken
import tiktoken_ext.openai_public
from hypothesis import given, settings
from hypothesis import strategies as st

from heiretsu.data import tokenizer
from heiretsu.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")

# What OpenAI's own encoder.py gives.
KNOWN = {
    "Hello world": [15496, 995],
    "hello world": [31373, 995],
    "Hello, my dog is cute": [15496, 11, 616, 3290, 318, 13779],
    "The quick brown fox jumps over the lazy dog": [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290],
    "": [],
}


@pytest.fixture(scope="module")
def gpt2(vocab_dir):
    return load_tokenizer("gpt2", vocab_dir)


@pytest.fixture
def cache(vocab_dir, tmp_path, monkeypatch):
    """A tiktoken cache that holds GPT-2's vocabulary, under the names that tiktoken gives the two files."""
    for file in ("encoder.json", "vocab.bpe"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{file}"
        shutil.copy(vocab_dir / file, tmp_path / hashlib.sha1(url.encode()).hexdigest())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def no_network(monkeypatch):
    asked = []

    def get(url, timeout):
        asked.append((url, timeout))
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(requests, "get", get)
    return asked


def test_bytes_tokenizer_has_the_bytes_and_end_of_text():
    assert (BYTES.name, BYTES.n_vocab, BYTES.eot_token) == ("bytes", 257, 256)
    assert BYTES.encode_ordinary("aé\n") == [97, 0xC3, 0xA9, 10]
    assert BYTES.encode("<|endoftext|>", allowed_special="all") == [256]
    assert BYTES.decode_bytes(range(256)) == bytes(range(256))


@settings(deadline=None)
@given(st.text())
def test_bytes_tokenizer_gives_the_bytes_of_any_text_and_back(text):
    tokens = BYTES.encode_ordinary(text)
    assert tokens == list(text.encode("utf-8"))
    assert BYTES.decode(tokens) == text


@pytest.mark.parametrize("text", KNOWN)
def test_gpt2_gives_the_known_tokens(text, gpt2):
    assert gpt2.encode(text) == KNOWN[text]


def test_gpt2_has_the_published_size_and_end_of_text(gpt2):
    assert (gpt2.name, gpt2.n_vocab, gpt2.eot_token) == ("gpt2", 50257, 50256)
    assert gpt2.encode("<|endoftext|>", allowed_special="all") == [50256]
    assert 50256 not in gpt2.encode_ordinary("<|endoftext|>")


@settings(deadline=None)
@given(st.text())
def test_gpt2_decodes_to_the_text(gpt2, text):
    assert gpt2.decode(gpt2.encode_ordinary(text)) == text


@pytest.fixture(scope="module")
def of_tiktoken(vocab_dir, tmp_path_factory):
    """GPT-2 as tiktoken itself builds it, hashes of the files checked."""
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        str(vocab_dir / "vocab.bpe"),
        str(vocab_dir / "encoder.json"),
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    )
    pattern = tiktoken_ext.openai_public.r50k_pat_str
    return tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.text("ab1'stlve.! \n\r\t\u3000é😀")))
def test_gpt2_agrees_with_the_encoding_of_tiktoken(gpt2, of_tiktoken, text):
    assert gpt2.encode_ordinary(text) == of_tiktoken.encode_ordinary(text)


@pytest.mark.parametrize("blank", [" ", "\n", "\u3000"], ids=["spaces", "empty lines", "ideographic spaces"])
@pytest.mark.parametrize("after", ["x", ""], ids=["then text", "to the end"])
def test_a_million_blanks_are_tokens_too(gpt2, blank, after):
    """tiktoken panics in its regular expression."""
    text = "word" + blank * 1_500_000 + after
    assert gpt2.decode(gpt2.encode_ordinary(text)) == text


def test_a_panic_of_tiktoken_is_an_error():
    class PanicException(BaseException):
        pass

    class Panics:
        def encode_ordinary(self, text):
            raise PanicException("pani" * 30)

    with pytest.raises(ValueError, match=r"^tiktoken gave up on 1,004 characters \('(pani){20}'\)$"):
        tokenizer.encode(Panics(), "text" * 251)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_any_other_error_of_tiktoken_is_passed_on(error):
    with pytest.raises(error):
        tokenizer.encode(Mock(encode_ordinary=Mock(side_effect=error)), "text")


def test_what_a_server_refuses_is_not_taken_for_the_vocabulary(vocab_dir, tmp_path, monkeypatch):
    def get(url, timeout):
        refusal = requests.HTTPError("404 Not Found")
        content = (vocab_dir / url.rpartition("/")[2]).read_bytes()
        return Mock(content=content, raise_for_status=Mock(side_effect=refusal))

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(requests, "get", get)
    with pytest.raises(ValueError, match=r"vocab\.bpe \(404 Not Found\)\. Supply it with --vocab_dir DIR"):
        load_tokenizer("gpt2")


def test_a_vocabulary_of_bytes_alone_is_not_gpt2(vocab_dir, tmp_path):
    """The two files belong together, and are too small."""
    ids = json.loads((vocab_dir / "encoder.json").read_text(encoding="utf-8"))
    (tmp_path / "encoder.json").write_text(json.dumps({key: rank for key, rank in ids.items() if rank < 256}))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
    told = rf"^{tmp_path}: encoder\.json \(256 tokens\) and vocab\.bpe \(0 merges\) do not belong together or are not"
    with pytest.raises(ValueError, match=told):
        load_tokenizer("gpt2", tmp_path)


def test_without_tiktoken_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ValueError, match=r"^--tokenizer bytes: tiktoken is not installed \(pip install tiktoken\)$"):
        load_tokenizer("bytes")


def test_gpt2_comes_from_the_cache_of_tiktoken_without_a_network(cache, no_network):
    assert load_tokenizer("gpt2").encode("Hello world") == [15496, 995]
    assert no_network == []


def test_damaged_cache_is_not_believed(cache, no_network):
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="could not be downloaded"):
        load_tokenizer("gpt2")


def test_download_is_checked_and_kept_for_the_next_time(vocab_dir, tmp_path, monkeypatch):
    class Answer:
        def __init__(self, content):
            self.content = content

        def raise_for_status(self):
            pass

    asked = []

    def get(url, timeout):
        asked.append(url)
        return Answer((vocab_dir / url.rpartition("/")[2]).read_bytes())

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "new" / "deep"))
    monkeypatch.setattr(requests, "get", lambda url, timeout: Answer(b"<html>please log in</html>"))
    with pytest.raises(ValueError, match="not the published file"):
        load_tokenizer("gpt2")
    monkeypatch.setattr(requests, "get", get)
    for _ in range(2):
        assert load_tokenizer("gpt2").encode("Hello world") == [15496, 995]
    assert len(asked) == 2
    assert len(list((tmp_path / "new" / "deep").iterdir())) == 2


def test_without_a_network_the_error_says_how_to_supply_the_vocabulary(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(ValueError) as caught:
        load_tokenizer("gpt2")
    message = str(caught.value)
    for word in (
        "--tokenizer gpt2",
        "--vocab_dir",
        "encoder.json",
        "vocab.bpe",
        "TIKTOKEN_CACHE_DIR",
        "no route to host",
    ):
        assert word in message
    assert "\n" not in message
    ((_, timeout),) = no_network  # one attempt, and not an endless one
    assert timeout == (5, 20)


@pytest.mark.parametrize("length, said", [(119, "x" * 119), (120, "ConnectionError")])
def test_a_long_reason_is_told_by_its_name(tmp_path, monkeypatch, length, said):
    def get(url, timeout):
        raise requests.ConnectionError("x" * length)

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(requests, "get", get)
    with pytest.raises(ValueError, match=rf"downloaded from https://openaipublic\S+/vocab\.bpe \({said}\)\. Supply"):
        load_tokenizer("gpt2")


@pytest.mark.parametrize(
    "variable, value, place",
    [("DATA_GYM_CACHE_DIR", "gym", "gym"), ("TMPDIR", "tmp", "tmp/data-gym-cache"), ("TIKTOKEN_CACHE_DIR", "", None)],
)
def test_the_cache_is_where_tiktoken_has_it(vocab_dir, tmp_path, monkeypatch, variable, value, place):
    """And an empty name stands for none: nothing is kept."""
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for folder in ("gym", "tmp"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv(variable, value and str(tmp_path / value))
    monkeypatch.setattr(tokenizer.tempfile, "tempdir", None)
    monkeypatch.chdir(tmp_path)
    content = (vocab_dir / "vocab.bpe").read_bytes()
    monkeypatch.setattr(tokenizer, "_download", lambda url, sha256: content)
    assert tokenizer._read_cached("vocab.bpe") == content
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
    kept = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert kept == ({f"{place}/{hashlib.sha1(url.encode()).hexdigest()}"} if place else set())


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(tmp_path):
    (tmp_path / "file").touch()
    tokenizer._store(tmp_path / "file" / "vocab.bpe", b"content")
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    tokenizer._store(tmp_path / "taken", b"content")  # a folder has the name: what was written beside goes again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]


def test_a_server_that_never_answers_does_not_hang_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(tokenizer, "_TIMEOUTS_S", (0.2, 0.2))
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(tokenizer, "_GPT2_URL", f"http://127.0.0.1:{server.getsockname()[1]}/")
        start = time.monotonic()
        with pytest.raises(ValueError, match="could not be downloaded"):
            load_tokenizer("gpt2")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("missing", ["encoder.json", "vocab.bpe"])
def test_vocab_dir_without_a_file_is_an_error_that_names_it(missing, vocab_dir, tmp_path, no_network):
    kept = "vocab.bpe" if missing == "encoder.json" else "encoder.json"
    shutil.copy(vocab_dir / kept, tmp_path)
    with pytest.raises(ValueError, match=rf"--vocab_dir {tmp_path}: cannot read {missing}"):
        load_tokenizer("gpt2", tmp_path)
    assert no_network == []


DAMAGE = {
    "merges swapped": ("vocab.bpe", lambda text: text.replace("Ġ t\nĠ a\n", "Ġ a\nĠ t\n"), "do not belong together"),
    "a merge left out": ("vocab.bpe", lambda text: text.replace("Ġ t\n", ""), "do not belong together"),
    "three symbols in a merge": (
        "vocab.bpe",
        lambda text: text.replace("Ġ t\n", "Ġ t h\n"),
        "not what GPT-2 published",
    ),
    "json cut short": ("encoder.json", lambda text: text[:1000], "not what GPT-2 published"),
    "json of a list": ("encoder.json", lambda text: "[]", "not what GPT-2 published"),
    "a space in a token": ("encoder.json", lambda text: text.replace('"!"', '" "'), "not what GPT-2 published"),
    "small vocabulary": ("encoder.json", lambda text: '{"!": 0}', r"encoder.json \(1 tokens\)"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_vocabulary_that_is_not_gpt2_is_refused(kind, vocab_dir, tmp_path):
    file, damage, message = DAMAGE[kind]
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(vocab_dir / name, tmp_path)
    before = (tmp_path / file).read_text(encoding="utf-8")
    after = damage(before)
    assert after != before
    (tmp_path / file).write_text(after, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_tokenizer("gpt2", tmp_path)


def test_windows_line_ends_in_vocab_bpe_do_no_harm(vocab_dir, tmp_path):
    shutil.copy(vocab_dir / "encoder.json", tmp_path)
    (tmp_path / "vocab.bpe").write_bytes((vocab_dir / "vocab.bpe").read_bytes().replace(b"\n", b"\r\n"))
    assert load_tokenizer("gpt2", tmp_path).encode("Hello world") == [15496, 995]


def test_unknown_tokenizer_is_refused():
    with pytest.raises(ValueError, match="--tokenizer gpt3: unknown; choose one of bytes, gpt2"):
        load_tokenizer("gpt3")
