import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heiretsu.data import batches
from heiretsu.data.batches import TokenDataset, open_data
from heiretsu.data.corpus import load_corpus
from heiretsu.data.folder import write_meta
from heiretsu.data.shards import write_shard
from heiretsu.data.tokenizer import load_tokenizer


def counting(*lengths):
    """Shards whose tokens are their own positions, counted through all of them."""
    ends = np.cumsum((0, *lengths))
    return [np.arange(start, end, dtype=np.uint16) for start, end in zip(ends[:-1], ends[1:], strict=True)]


def starts(dataset, step, indices):
    return dataset.batch(step, indices)[0][:, 0].tolist()


def test_targets_are_the_inputs_one_token_on():
    dataset = TokenDataset(counting(1000), block_size=16, seed=0, vocab_size=1000)
    for inputs, targets in (dataset.batch(3, range(5)), dataset.eval_batch(range(5))):
        assert inputs.shape == targets.shape == (5, 16)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous() and targets.is_contiguous()
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(16))
        assert torch.equal(targets, inputs + 1)


@settings(deadline=None)
@given(st.integers(0, 2**40), st.lists(st.integers(0, 2**62), max_size=6), st.integers(-5, 2**70))
def test_sample_is_a_function_of_seed_step_and_index_alone(step, indices, seed):
    """However a batch is grouped, ordered or split over readers, and whatever was read before."""
    dataset = TokenDataset(counting(3000, 500), 8, seed, 3500)
    inputs, targets = dataset.batch(step, indices)
    assert inputs.shape == (len(indices), 8)
    other_reader = TokenDataset(counting(3000, 500), 8, seed, 3500)
    for row in reversed(range(len(indices))):
        alone = other_reader.batch(step, [indices[row]])
        assert torch.equal(alone[0][0], inputs[row])
        assert torch.equal(alone[1][0], targets[row])


def test_samples_do_not_change_between_releases():
    """A checkpoint keeps no data position: a resumed run draws the same windows only if these numbers stay."""
    dataset = TokenDataset(counting(50_000), 8, seed=1234, vocab_size=50_000)
    assert starts(dataset, 0, [0, 1, 2]) == [16733, 11984, 37411]
    assert starts(dataset, 1, [0, 1, 2]) == [32091, 42117, 42085]
    assert starts(dataset, 10**6, [511]) == [27775]
    small = TokenDataset(counting(200), 8, seed=1234, vocab_size=200)  # 24 windows: 15, the first stride, will not do
    assert small.eval_batch(range(6))[0][:, 0].tolist() == [0, 136, 80, 24, 160, 104]
    negative, large = (starts(TokenDataset(counting(50_000), 8, s, 50_000), 0, [0])[0] for s in (-1, 2**63 - 1))
    assert negative == starts(TokenDataset(counting(50_000), 8, 2**64 - 1, 50_000), 0, [0])[0] != large


def test_all_64_bits_of_seed_step_and_index_count():
    """None is rounded on its way: of the largest, too, the last bit gives another window."""
    high = 2**64 - 2
    for one, other in (
        ((high, 0, 0), (high + 1, 0, 0)),
        ((0, high, 0), (0, high + 1, 0)),
        ((0, 0, high), (0, 0, high + 1)),
    ):
        first, second = (
            starts(TokenDataset(counting(60_000), 8, seed, 60_000), step, [i]) for seed, step, i in (one, other)
        )
        assert first != second


def test_the_digest_is_of_names_lengths_and_tokens(monkeypatch):
    """Of all tokens of a small set, of eight pieces of 32,768 of each shard of a large one. Checkpoints keep it."""
    shards = [("/a/one.bin", np.arange(60_000, dtype=np.uint16)), ("two.bin", np.arange(40_000, dtype=np.uint16))]

    def digest(shards):
        return TokenDataset(shards, 8, 0, 65536).digest()

    def by_hand(pieces):
        content = b""
        for (name, tokens), starts in zip(shards, pieces, strict=True):
            content += f"{name.rpartition('/')[2]} {len(tokens)}\0".encode()
            content += b"".join(tokens[start:stop].tobytes() for start, stop in starts)
        return hashlib.sha256(content).hexdigest()[:16]

    assert digest(shards) == by_hand([[(0, 60_000)], [(0, 40_000)]])
    assert batches._FULL_DIGEST_TOKENS == 16_777_216
    monkeypatch.setattr(batches, "_FULL_DIGEST_TOKENS", 100_000)
    assert digest(shards) == by_hand([[(0, 60_000)], [(0, 40_000)]])
    monkeypatch.setattr(batches, "_FULL_DIGEST_TOKENS", 99_999)
    starts = [[(last * i // 7, last * i // 7 + 32_768) for i in range(8)] for last in (27_232, 7_232)]
    assert digest(shards) == by_hand(starts)
    short = ("one.bin", np.arange(9, dtype=np.uint16))
    shards.append(short)
    assert digest(shards) == by_hand([*starts, [(0, 9)]])
    shards.pop()
    assert digest([short, *shards]) != digest([("one.bin", short[1][::-1]), *shards])


def test_seed_step_and_index_all_matter():
    """Swapping two of them, or carrying from one to the next, gives other windows."""
    tokens = counting(60_000)
    places = [(seed, step, i) for seed in range(4) for step in range(4) for i in range(4)] + [
        (0, 0, 2**32),
        (0, 2**32, 0),
    ]
    found = {starts(TokenDataset(tokens, 8, seed, 60_000), step, [i])[0] for seed, step, i in places}
    assert len(found) >= len(places) - 1  # one chance collision in 60 000 is no news


def test_every_start_position_is_equally_likely_and_no_window_crosses_shards():
    lengths, block_size, draws = (40, 9, 25), 8, 20_000
    dataset = TokenDataset(counting(*lengths), block_size, seed=7, vocab_size=100)
    inputs, targets = dataset.batch(0, range(draws))
    allowed = [s for first, n in ((0, 40), (40, 9), (49, 25)) for s in range(first, first + n - block_size)]
    assert len(allowed) == 32 + 1 + 17
    counts = torch.bincount(inputs[:, 0], minlength=74)
    assert [s for s in range(74) if counts[s]] == allowed
    expected = draws / len(allowed)
    chi_square = ((counts[allowed] - expected) ** 2 / expected).sum()
    assert chi_square < 85  # 49 degrees of freedom: exceeded by chance once in 1000; the draw is fixed
    assert torch.equal(targets[:, -1], inputs[:, 0] + block_size)


@settings(deadline=None)
@given(st.lists(st.integers(6, 60), min_size=1, max_size=4))
def test_evaluation_reads_every_window_of_the_split_once(lengths):
    block_size = 5
    dataset = TokenDataset(counting(*lengths), block_size, seed=0, vocab_size=1000)
    first = np.cumsum((0, *lengths))
    windows = [f + w * block_size for f, n in zip(first, lengths, strict=False) for w in range((n - 1) // block_size)]
    assert dataset.num_windows == len(windows)
    inputs, _ = dataset.eval_batch(range(len(windows)))
    assert sorted(inputs[:, 0].tolist()) == windows
    again, _ = dataset.eval_batch(range(len(windows), 2 * len(windows)))
    assert torch.equal(again, inputs)


def test_evaluation_does_not_depend_on_grouping_or_seed():
    dataset = TokenDataset(counting(1000), 8, seed=0, vocab_size=1000)
    whole, _ = dataset.eval_batch(range(12))
    other = TokenDataset(counting(1000), 8, seed=5, vocab_size=1000)
    assert torch.equal(torch.cat([other.eval_batch([2 * k, 2 * k + 1])[0] for k in range(6)]), whole)


@pytest.mark.parametrize("count", [5, 20, 100])
def test_a_short_evaluation_is_spread_over_the_split(count):
    """No gap between neighbouring windows is more than three times the mean one."""
    dataset = TokenDataset(counting(40_001), 8, seed=0, vocab_size=40_001)
    found = sorted([0, 40_000, *dataset.eval_batch(range(count))[0][:, 0].tolist()])
    assert max(np.diff(found)) < 3 * 40_000 / count


def test_shard_shorter_than_a_block_is_named_with_both_sizes(tmp_path):
    write_shard(tmp_path / "long.bin", range(100))
    write_shard(tmp_path / "short.bin", range(16))
    TokenDataset([tmp_path / "long.bin", tmp_path / "short.bin"], 15, 0, 257)
    with pytest.raises(ValueError, match=r"short\.bin: 16 tokens, but --block_size 16 needs at least 17 .* 15 or less"):
        TokenDataset([tmp_path / "long.bin", tmp_path / "short.bin"], 16, 0, 257)
    for length in (0, 1):
        with pytest.raises(ValueError, match=rf"array 0: {length} tokens.* in every shard; use more text"):
            TokenDataset([np.zeros(length, dtype=np.uint16)], 16, 0, 257)
    with pytest.raises(ValueError, match=r"array 1: 2 tokens.* needs at least 17 .* use --block_size 1 or less"):
        TokenDataset([np.zeros(20, dtype=np.uint16), np.zeros(2, dtype=np.uint16)], 16, 0, 257)


def test_token_outside_the_vocabulary_is_refused_when_the_data_is_opened(tmp_path):
    tokens = np.zeros(5000, dtype=np.uint16)
    tokens[4321] = 257
    write_shard(tmp_path / "good.bin", tokens[:4000])
    write_shard(tmp_path / "bad.bin", tokens)
    with pytest.raises(
        ValueError, match=r"bad\.bin: token id 257 at position 4321 is not below the vocabulary size 257"
    ):
        TokenDataset([tmp_path / "good.bin", tmp_path / "bad.bin"], 8, 0, 257)


def test_two_megabytes_are_looked_at_whole():
    tokens = np.zeros(2**20 + 10, dtype=np.uint16)
    tokens[-1] = 300
    with pytest.raises(ValueError, match="token id 300 at position 1048585 "):
        TokenDataset([tokens], 8, 0, 257)


def test_token_outside_the_vocabulary_in_data_too_large_to_scan_is_refused_when_read(monkeypatch):
    monkeypatch.setattr(batches, "_FULL_SCAN_TOKENS", 100)
    monkeypatch.setattr(batches, "_PART_SCAN_TOKENS", 50)
    tokens = np.zeros(201, dtype=np.uint16)
    tokens[123] = 300
    dataset = TokenDataset([("train_000007.bin", tokens)], 20, 0, 257)
    with pytest.raises(ValueError, match=r"train_000007\.bin: token id 300 at position 123 "):
        dataset.eval_batch(range(10))
    with pytest.raises(ValueError, match="token id 300 at position 99 "):  # as many as are looked at whole
        TokenDataset([np.array([0] * 99 + [300], dtype=np.uint16)], 20, 0, 257)
    tokens[49] = 400
    with pytest.raises(ValueError, match="token id 400 at position 49 "):
        TokenDataset([("train_000007.bin", tokens)], 20, 0, 257)


@pytest.fixture
def fineweb(tmp_path):
    """Two training shards and one for validation, as FineWeb's are named."""
    for i, tokens in enumerate(counting(300, 200, 100)):
        write_shard(tmp_path / ("fineweb_val_000000.bin" if i == 2 else f"fineweb_train_{i + 1:06d}.bin"), tokens)
    return tmp_path


def test_open_data_reads_fineweb_shards_in_order(fineweb):
    train, val = open_data(fineweb, 8, seed=1, vocab_size=600)
    assert [train.num_tokens, val.num_tokens] == [500, 100]
    assert torch.equal(train.batch(0, range(9))[0], TokenDataset(counting(300, 200), 8, 1, 600).batch(0, range(9))[0])
    assert val.eval_batch([0])[0][0, 0] == 500
    assert train.bytes_per_token is None and val.bytes_per_token is None


def test_open_data_limits_the_chunks(fineweb):
    train, val = open_data(fineweb, 8, 0, 600, num_train_chunks=1, num_val_chunks=1)
    assert [name.rpartition("/")[2] for name in train.names + val.names] == [
        "fineweb_train_000001.bin",
        "fineweb_val_000000.bin",
    ]
    with pytest.raises(ValueError, match=r"--num_train_chunks 3: .* has 2 train shard"):
        open_data(fineweb, 8, 0, 600, num_train_chunks=3)
    with pytest.raises(ValueError, match=r"--num_val_chunks 2: .* has 1 val shard"):
        open_data(fineweb, 8, 0, 600, num_val_chunks=2)


def test_open_data_names_the_corrupt_shard(fineweb):
    path = fineweb / "fineweb_train_000002.bin"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{path}: truncated: the header says 200 tokens"):
        open_data(fineweb, 8, 0, 600)


def test_open_data_takes_bytes_per_token_from_meta_and_refuses_what_contradicts_it(tmp_path):
    splits = {}
    for split, num_bytes in (("train", 400), ("val", 250)):
        write_shard(tmp_path / f"{split}_000000.bin", range(100))
        splits[split] = {"tokens": 100, "bytes": num_bytes, "documents": 1, "shards": 1}
    write_meta(tmp_path, {"tokenizer": "gpt2", "vocab_size": 50257, "end_of_text": 50256, "splits": splits})
    train, val = open_data(tmp_path, 8, 0, 50257)
    assert (train.bytes_per_token, val.bytes_per_token) == (4.0, 2.5)
    open_data(tmp_path, 8, 0, 50257, tokenizer="gpt2")
    with pytest.raises(ValueError, match=rf"--tokenizer bytes: --data_dir {tmp_path} was made with --tokenizer gpt2"):
        open_data(tmp_path, 8, 0, 50257, tokenizer="bytes")
    with pytest.raises(
        ValueError, match=rf"--data_dir {tmp_path}: .* gpt2 with 50257 ids, more than .* 257; use --token"
    ):
        open_data(tmp_path, 8, 0, 257)


def test_open_data_without_a_folder_is_the_embedded_corpus():
    train, val = open_data(None, 64, seed=0, vocab_size=257)
    splits = load_corpus()
    assert (train.num_tokens, val.num_tokens) == tuple(len(split.tokens) for split in splits)
    window = bytes(train.batch(0, [0])[0][0].tolist())
    assert window in bytes(splits[0].tokens.clip(max=255).astype(np.uint8))
    assert val.bytes_per_token == splits[1].num_bytes / len(splits[1].tokens)
    assert train.names + val.names == ("embedded corpus (train)", "embedded corpus (validation)")
    with pytest.raises(ValueError, match=r"embedded corpus \(train\): token id 256 at position 0 "):
        open_data(None, 64, 0, 256)


def test_open_data_encodes_the_embedded_corpus_with_the_tokenizer_asked_for(vocab_dir):
    _, val = open_data(None, 64, seed=0, vocab_size=50257, tokenizer="gpt2", vocab_dir=vocab_dir)
    gpt2 = load_tokenizer("gpt2", vocab_dir)
    text = bytes(load_corpus()[1].tokens.clip(max=255).astype(np.uint8))
    assert gpt2.decode_bytes(val.eval_batch([3])[0][0].tolist()) in text
    assert 1.5 < val.bytes_per_token < 4
    with pytest.raises(ValueError, match="--vocab_dir nowhere"):
        open_data(None, 64, seed=0, vocab_size=50257, tokenizer="gpt2", vocab_dir="nowhere")


@pytest.mark.parametrize("flag", ["num_train_chunks", "num_val_chunks"])
def test_chunks_of_the_embedded_corpus_are_refused(flag):
    with pytest.raises(ValueError, match=f"--{flag} 1: the embedded corpus has no chunks"):
        open_data(None, 64, 0, 257, **{flag: 1})
