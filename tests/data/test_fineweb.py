import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from heiretsu.data import fineweb
from heiretsu.data.batches import open_data
from heiretsu.data.shards import read_shard, write_shard


class Hub:
    """Stands in for hf_hub_download: writes a shard of `content`, and keeps the calls."""

    def __init__(self, content=range(50)):
        self.content, self.calls = content, []

    def __call__(self, repo_id, filename, repo_type, local_dir, force_download):
        assert (repo_id, repo_type) == ("kjj0/fineweb10B-gpt2", "dataset")
        self.calls.append((filename, force_download))
        Path(local_dir).mkdir(exist_ok=True)
        write_shard(Path(local_dir, filename), self.content)


def test_download_brings_the_validation_shard_and_the_first_training_shards(tmp_path):
    hub = Hub()
    paths = fineweb.download(2, tmp_path / "new", hub)
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert [path.name for path in paths] == names
    assert hub.calls == [(name, False) for name in names]
    train, val = open_data(tmp_path / "new", 8, 0, 50257)
    assert (train.num_tokens, val.num_tokens) == (100, 50)


def test_second_download_fetches_only_what_is_missing_or_damaged(tmp_path):
    fineweb.download(2, tmp_path, Hub())
    damaged = tmp_path / "fineweb_train_000001.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    hub = Hub()
    fineweb.download(3, tmp_path, hub)
    assert hub.calls == [("fineweb_train_000001.bin", True), ("fineweb_train_000003.bin", False)]
    assert len(read_shard(damaged)) == 50


def test_failed_download_is_one_line_that_names_the_file_and_what_to_do(tmp_path):
    def no_network(**_):
        raise ConnectionError("Name or service not known\nand a page of advice")

    with pytest.raises(ValueError) as caught:
        fineweb.download(1, tmp_path, no_network)
    message = str(caught.value)
    assert (
        "fineweb_val_000000.bin: could not be downloaded from huggingface.co/datasets/kjj0/fineweb10B-gpt2" in message
    )
    assert "ConnectionError: Name or service not known" in message
    assert str(tmp_path) in message
    assert "\n" not in message


def test_download_that_is_not_a_shard_is_refused(tmp_path):
    def login_page(filename, local_dir, **_):
        Path(local_dir, filename).write_text("<html>please log in</html>")

    with pytest.raises(ValueError, match=r"fineweb_val_000000\.bin: not a token shard"):
        fineweb.download(1, tmp_path, login_page)


@pytest.mark.parametrize("number", [0, -1, 104])
def test_number_of_shards_outside_the_data_set_is_refused(number, tmp_path):
    with pytest.raises(ValueError, match=f"{number} training shards: FineWeb-10B has 1 to 103"):
        fineweb.download(number, tmp_path, Hub())
    assert len(fineweb.shard_files(103)) == 104


def test_command_downloads_and_says_how_to_train(tmp_path, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", type("module", (), {"hf_hub_download": hub}))
    fineweb.main(["1", "--out", str(tmp_path)])
    assert [name for name, _ in hub.calls] == ["fineweb_val_000000.bin", "fineweb_train_000001.bin"]
    assert f"train.py --data_dir {tmp_path} --tokenizer gpt2" in capsys.readouterr().out


def test_command_has_its_defaults_shows_progress_and_can_be_interrupted(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", type("module", (), {"hf_hub_download": "fetch"}))
    calls = []
    monkeypatch.setattr(fineweb, "download", lambda *args, **kwargs: calls.append((args, kwargs)) or ["a", "b"])
    fineweb.main(["7"])
    assert calls == [((7, Path("data/fineweb10B"), "fetch"), {"progress": True})]
    assert capsys.readouterr().out == (
        "2 shards in data/fineweb10B; train on them with: python train.py --data_dir data/fineweb10B --tokenizer gpt2\n"
    )
    monkeypatch.setattr(fineweb, "download", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as exit:
        fineweb.main(["7"])
    assert exit.value.code == 130
    assert capsys.readouterr().err == "fineweb.py: interrupted; a second call continues from here\n"


def test_progress_is_shown_where_it_is_asked_for(tmp_path, capsys):
    fineweb.download(1, tmp_path, Hub())
    assert capsys.readouterr().err == ""
    fineweb.download(1, tmp_path, Hub(), progress=True)
    assert "2/2" in capsys.readouterr().err


def test_command_without_huggingface_hub_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SystemExit, match=r"needs huggingface_hub: pip install huggingface_hub"):
        fineweb.main(["1"])


def test_command_reports_an_error_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", type("module", (), {"hf_hub_download": Hub()}))
    with pytest.raises(SystemExit, match="fineweb.py: 200 training shards: FineWeb-10B has 1 to 103"):
        fineweb.main(["200", "--out", str(tmp_path)])
