"""What a step's line, its record and its bar say, to the letter; and what the file keeps of a run that goes on."""

import io
import json
import types
from unittest.mock import patch

import pytest
import torch

from heiretsu.parallel.engine import StepReport
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run import log as run_log
from heiretsu.run.data_sheets import DATA_SHEETS
from heiretsu.run.log import LogFile, RunLog, peak_flops, peak_memory_mib
from heiretsu.run.options import parse_args

GOOD, SKIPPED = StepReport({}, 1.0, False), StepReport({}, 1.0, True, not_finite="wte.weight")


@pytest.fixture
def known_machine(monkeypatch):
    monkeypatch.setattr(run_log, "peak_flops", lambda *_: 1e12)
    monkeypatch.setattr(run_log, "peak_memory_mib", lambda device: 7.5)


def lines(capsys, record, report=GOOD, flags=(), **options):
    log = RunLog(parse_args(["--max_iters", "1000", *flags]), abstract_mesh(), **options)
    log.write({"loss": 2.34567, "tokens_per_s": 1234567.0, **record}, report)
    log.close()
    return capsys.readouterr().out


def test_a_line_to_the_letter(capsys, known_machine):
    flops = parse_args([]).model.flops_per_token
    mfu = f"{100 * 1234567.0 * flops / 1e12:.0f}%"
    brief = f"loss 2.3457, 1,234,567 tokens/s, MFU {mfu}"
    assert lines(capsys, {"step": 0}) == f"step    1/1000: {brief}\n"
    assert lines(capsys, {"step": 49}) == f"step   50/1000: {brief}\n"
    assert lines(capsys, {"step": 50}) == ""
    evaluated = {"step": 6, "eval_loss": 3.14159, "eval_bits_per_byte": 1.23456}
    assert lines(capsys, evaluated) == f"step    7/1000: {brief}, validation loss 3.1416 (1.235 bits per byte)\n"
    skipped = lines(capsys, {"step": 998}, SKIPPED)
    assert skipped == f"step  999/1000: {brief}, skipped: wte.weight\n"


def test_a_line_is_out_before_the_next_step(monkeypatch):
    """Through a pipe, too, whose buffer holds minutes of lines."""
    seen = []

    class Pipe(io.StringIO):
        def flush(self):
            seen.append(self.getvalue())

    monkeypatch.setattr(run_log.sys, "stdout", Pipe())
    RunLog(parse_args([]), abstract_mesh()).say("a word")
    assert seen == ["a word\n"]


def test_without_a_known_peak_there_is_no_mfu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_log, "peak_flops", lambda *_: None)
    assert lines(capsys, {"step": 0}) == "step    1/1000: loss 2.3457, 1,234,567 tokens/s\n"


def test_a_record_gets_mfu_and_memory(tmp_path, capsys, known_machine):
    path = tmp_path / "log.jsonl"
    lines(capsys, {"step": 3, "grad_norm": float("nan")}, flags=["--log_file", str(path)])
    record = json.loads(path.read_text())
    mfu = record.pop("mfu")
    assert record == {"loss": 2.34567, "tokens_per_s": 1234567.0, "step": 3, "grad_norm": None, "memory_mib": 7.5}
    assert mfu == pytest.approx(1234567 * parse_args([]).model.flops_per_token / 1e12)


def test_another_rank_says_and_writes_nothing(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    config = parse_args(["--dp", "2", "--log_file", str(path)], world_size=2)
    log = RunLog(config, abstract_mesh(dp=2, rank=1))
    log.write({"step": 0, "loss": 1.0, "tokens_per_s": 1.0}, GOOD)
    log.say("a word")
    log.close()
    assert not path.exists() and capsys.readouterr().out == ""


def test_on_a_terminal_there_is_a_bar_and_few_lines(monkeypatch, capsys, known_machine):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(run_log.sys, "stderr", Terminal())
    log = RunLog(parse_args(["--max_iters", "40"]), abstract_mesh(), first_step=10)
    assert (log.bar.total, log.bar.n, log.bar.unit) == (40, 10, "step") and callable(log.bar.dynamic_ncols)
    drawn = []
    with patch.object(log.bar, "refresh", lambda *args, **kwargs: drawn.append(log.bar.n)):
        for step in (10, 11):
            log.write({"step": step, "loss": 2.0, "tokens_per_s": 10.0}, GOOD)
    assert 10 not in drawn and drawn.count(11) <= 1  # at the most once a step, with its number
    assert log.bar.n == 12 and log.bar.postfix.startswith("loss 2.0000, 10 tokens/s")
    assert capsys.readouterr().out == ""
    log.write({"step": 12, "loss": 2.0, "tokens_per_s": 10.0, "eval_loss": 1.0}, GOOD)
    log.say("a word")
    assert "validation loss 1.0000\na word\n" in capsys.readouterr().out
    bar = log.bar
    log.close()
    assert bar.disable  # what tqdm makes of a closed bar


def test_the_file_of_a_run_that_goes_on_holds_each_step_once(tmp_path):
    path = tmp_path / "log.jsonl"
    first = LogFile(path, 0)
    for step in range(5):
        assert first.append({"step": step, "loss": float(step)}) is None
    first.close()
    with open(path, "ab") as torn:
        torn.write(b'{"step": 5, "lo')
    again = LogFile(path, 3)
    again.append({"step": 3, "loss": 30.0})
    again.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "loss": 0.0},
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 30.0},
    ]
    LogFile(path, 0).close()  # a run from the start begins its file anew
    assert path.read_text() == "" and [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_full_disk_costs_whole_lines_and_one_warning(tmp_path):
    log = LogFile(tmp_path / "log.jsonl", 0)
    log.append({"step": 0})
    real = log.file

    class Full:
        def __init__(self, result):
            self.result = result

        def write(self, line):
            if isinstance(self.result, OSError):
                raise self.result
            return real.write(line[: self.result])

        def __getattr__(self, name):
            return getattr(real, name)

    log.file = Full(4)
    why = log.append({"step": 1})
    assert why == f"--log_file {log.path}: 4 of 12 bytes could be written: lines are lost until there is room"
    log.file = Full(OSError(28, "No space left on device"))
    assert log.append({"step": 2}) is None  # it has said so
    log.file = real
    assert log.append({"step": 3}) is None
    log.close()
    assert log.path.read_text() == '{"step": 0}\n{"step": 3}\n'
    other = LogFile(tmp_path / "other.jsonl", 0)
    other.close()
    other.file = Full(OSError(28, "No space left on device"))
    with open(tmp_path / "x", "wb") as real:
        assert "other.jsonl: No space left on device: lines are lost" in other.append({"step": 0})


def test_peaks_are_those_of_the_data_sheets(monkeypatch):
    """Dense bf16, in FLOP/s."""
    nvidia = {"L40S": 362e12, "A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
    assert {sheet.name: sheet.bf16_flops for sheet in DATA_SHEETS} == nvidia | {"MI300X": 1307e12}
    bandwidth = {"L40S": 864e9, "A100": 2039e9, "H100": 3350e9, "H200": 4800e9, "B200": 8000e9, "MI300X": 5300e9}
    assert {sheet.name: sheet.dram_bytes for sheet in DATA_SHEETS} == bandwidth
    config, eight = parse_args(["--dp", "8"], world_size=8), abstract_mesh(dp=8, device="cuda")
    for name, peak in (("NVIDIA H100 80GB HBM3", 8 * 989e12), ("AMD Instinct MI300X", 8 * 1307e12), ("Tesla T4", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(eight, config) == peak
    assert peak_flops(abstract_mesh(device="mps"), parse_args([])) is None


@pytest.mark.parametrize(
    "flags, dtype",
    [
        ([], torch.float32),
        (["--amp", "bf16"], torch.bfloat16),
        (["--dtype", "float64"], torch.float64),
    ],
)
def test_a_cpus_peak_is_the_best_of_ten_products_in_the_dtype_of_the_activations(monkeypatch, flags, dtype):
    clock, products = iter([0, 5, 10, 12, *range(100, 120)]), []
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: float(next(clock)))
    real = torch.Tensor.__matmul__
    asked = lambda x, y: products.append((x.shape, x.dtype, x.device.type)) or real(x, y)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "__matmul__", asked)
    with torch.device("meta"):  # whatever the default is
        assert peak_flops(abstract_mesh(), parse_args(flags)) == 2 * 512**3  # the third product took a second
    assert products == [((512, 512), dtype, "cpu")] * 10


def test_memory_is_in_mib_wherever_it_comes_from(monkeypatch):
    usage = types.SimpleNamespace(ru_maxrss=3 * 2**20)
    monkeypatch.setattr(run_log.resource, "getrusage", lambda who: usage)
    cpu = torch.device("cpu")
    for platform, mib in (("linux", 3072.0), ("darwin", 3.0)):
        monkeypatch.setattr(run_log.sys, "platform", platform)
        assert peak_memory_mib(cpu) == mib
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 2**20)
    assert peak_memory_mib(torch.device("cuda")) == 5.0


def test_wandb_gets_the_share_of_each_expert_of_each_layer_and_of_all(monkeypatch):
    log = RunLog(parse_args([]), abstract_mesh())
    drawn = []
    bar = lambda table, x, y, title: drawn.append((table, x, y, title)) or "a chart"  # noqa: E731
    log.wandb = types.SimpleNamespace(
        Table=lambda columns, data: (columns, data), plot=types.SimpleNamespace(bar=bar), finish=lambda: None
    )
    load = torch.tensor([[1, 3, 0], [2, 2, 4]])
    found = log._expert_load(StepReport({"expert_load": load}, 1.0, False))
    assert found == {
        "expert_load/layer0/expert0": 0.25,
        "expert_load/layer0/expert1": 0.75,
        "expert_load/layer0/expert2": 0.0,
        "expert_load/layer1/expert0": 0.25,
        "expert_load/layer1/expert1": 0.25,
        "expert_load/layer1/expert2": 0.5,
        "expert_load/chart": "a chart",
    }
    (((columns, data), x, y, title),) = drawn
    assert columns == ["expert", "share"] and (x, y, title) == ("expert", "share", "Tokens by expert")
    assert [name for name, _ in data] == ["expert 0", "expert 1", "expert 2"]
    assert [share for _, share in data] == pytest.approx([3 / 12, 5 / 12, 4 / 12])
    assert log._expert_load(GOOD) == {}
