"""autotune with a clock of ours, on the emulator: a kernel of the table for real, the rest with a table of ours."""

import copy
import json
import time

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources

from heiretsu.kernels.control import CONTROL
from heiretsu.kernels.gpu import autotune, autotune_cache, bias_gelu, launch
from heiretsu.offgpu.emulator import installed

CPU = torch.device("cpu")
TABLE = {
    "ampere": dict(BLOCK=32, ROWS=8, num_warps=4, num_stages=3),
    "hopper": dict(BLOCK=64, ROWS=8, num_warps=8, num_stages=2),
    "blackwell": dict(BLOCK=256, ROWS=16, num_warps=4, num_stages=2),
    "cdna3": dict(BLOCK=16, ROWS=8, num_warps=4, num_stages=1),
}
CANDIDATES = [
    dict(BLOCK=64, ROWS=8, num_warps=8, num_stages=2),
    dict(BLOCK=32, ROWS=8, num_warps=4, num_stages=3),
    dict(BLOCK=64, ROWS=8, num_warps=8, num_stages=1),
    dict(BLOCK=64, ROWS=8, num_warps=8, num_stages=3),
    dict(BLOCK=64, ROWS=8, num_warps=4, num_stages=2),
    dict(BLOCK=64, ROWS=8, num_warps=16, num_stages=2),
]
AMPERES, ONE_STAGE, THREE_STAGES, FOUR_WARPS, SIXTEEN_WARPS = CANDIDATES[1:]
TOYS = launch.Tiles("toy", {arch: {64: found, 128: found | {"BLOCK": 8}} for arch, found in TABLE.items()})
OTHERS = launch.Tiles("other", {arch: {64: dict(num_warps=4, num_stages=1)} for arch in TABLE})
TOY, OTHER = TOYS.find("hopper", 64), OTHERS.find("hopper", 64)


class Kernel:
    """A kernel whose launch does nothing."""

    def __init__(self, fn):
        self.fn = fn

    def __getitem__(self, grid):
        return lambda **parameters: None


TOY_KERNEL, OTHER_KERNEL = Kernel(lambda BLOCK, ROWS: None), Kernel(lambda: None)


@pytest.fixture(autouse=True)
def an_h100_with_two_toy_kernels(monkeypatch):
    monkeypatch.setattr(CONTROL, "chosen", {})
    for tiles in (TOYS, OTHERS):  # a test may change them
        monkeypatch.setattr(tiles, "rows", copy.deepcopy(tiles.rows))
    with installed(target=90):
        yield


class Toy:
    """A call that launches the two kernels, and the clock and the cache to tune it with."""

    def __init__(self, folder):
        self.path = folder / "cache" / "autotune.json"
        self.said: list[str] = []
        self.timed: list[dict] = []  # the toy kernel's parameters, at each use of the clock
        self.costs: list[tuple[dict, float]] = []  # ms; 1.0 where nothing is said
        self.result = lambda parameters: torch.arange(5.0)

    def prepare(self):
        def run():
            launched = TOYS.parameters(CPU, 50)
            OTHERS.parameters(CPU, 50).launch(OTHER_KERNEL, (1,))
            launched.launch(TOY_KERNEL, (1,))
            return {"y": self.result(launched)}

        return run

    def clock(self, run):
        run()
        self.timed.append(TOYS.parameters(CPU, 50))
        return next((ms for parameters, ms in self.costs if parameters == self.timed[-1]), 1.0)

    def tune(self, name="toy 5", **options):
        options = {"clock": self.clock, **options}
        return autotune.tune({name: self.prepare}, CPU, self.path, say=self.said.append, **options)

    @property
    def verdict(self):
        return next(line for line in self.said if line.startswith("autotune: toy (size to 64) in toy 5: "))


@pytest.fixture
def toy(tmp_path):
    return Toy(tmp_path)


def test_candidates_are_the_tables_then_other_classes_then_neighbours():
    """Blackwell's has other ROWS, and cdna3 is no relation."""
    assert autotune.candidates(TOY) == CANDIDATES
    assert autotune.candidates(OTHER) == [dict(num_warps=w, num_stages=1) for w in (4, 8)]  # no pipeline: one stage


def test_candidates_have_a_stage_at_least_and_4_to_16_warps(monkeypatch):
    monkeypatch.setitem(TOYS.rows["toy"]["hopper"], 64, dict(BLOCK=64, ROWS=8, num_warps=16, num_stages=1))
    found = {(p["BLOCK"], p["num_warps"], p["num_stages"]) for p in autotune.candidates(TOY)}
    assert found == {(64, 16, 1), (32, 4, 3), (64, 16, 2), (64, 8, 1)}


def test_every_entry_of_the_table_has_few_candidates_that_keep_what_must_be_kept():
    for arch in ("ampere", "hopper", "blackwell", "cdna3"):
        for entry in launch.every_entry(arch):
            table, found = entry.parameters, autotune.candidates(entry)
            assert found[0] == table and 2 <= len(found) <= 7
            assert all(a != b for i, a in enumerate(found) for b in found[:i])
            for parameters in found:
                assert parameters.keys() == table.keys()
                assert {name: parameters.get(name) for name in autotune.FIXED} == {
                    name: table.get(name) for name in autotune.FIXED
                }


def test_the_fastest_is_chosen_said_and_launched(toy):
    toy.costs = [(AMPERES, 0.8), (FOUR_WARPS, 0.5)]
    CONTROL.chosen[TOYS.find("hopper", 128)] = SIXTEEN_WARPS  # by an earlier call: gone
    chosen = toy.tune()
    assert chosen == CONTROL.chosen == {OTHER: dict(num_warps=4, num_stages=1), TOY: FOUR_WARPS}
    assert TOYS.parameters(CPU, 50) == TOYS.parameters(CPU, 64) == FOUR_WARPS
    assert TOYS.parameters(CPU, 65)["BLOCK"] == 8  # another size, another entry
    assert "measuring 2 kernels with 8 candidates" in toy.said[0] and str(toy.path) in toy.said[0]
    assert toy.verdict.endswith("6 candidates, 1.000 -> 0.500 ms with num_warps 8 -> 4")
    assert toy.timed[-8:] == [*CANDIDATES, FOUR_WARPS, CANDIDATES[0]]  # the winner and the table's once more


@pytest.mark.parametrize("ms, wins", [(0.985, False), (0.97, True)])
def test_what_is_faster_by_less_than_the_noise_is_not_chosen(toy, ms, wins):
    toy.costs = [(ONE_STAGE, ms)]
    assert toy.tune()[TOY] == (ONE_STAGE if wins else CANDIDATES[0])
    assert toy.verdict.endswith("with num_stages 2 -> 1" if wins else "1.000 ms, kept")


def test_one_lucky_measurement_is_not_enough(toy):
    def clock(run):
        lucky = ONE_STAGE not in toy.timed
        ms = toy.clock(run)
        return 0.5 if toy.timed[-1] == ONE_STAGE and lucky else ms

    toy.costs = [(THREE_STAGES, 0.9)]
    assert toy.tune(clock=clock)[TOY] == THREE_STAGES


@pytest.mark.parametrize(
    "error, words",
    [
        (OutOfResources(300_000, 232_448, "shared memory"), "dropped, OutOfResources: out of resource: shared memory"),
        (RuntimeError("PassManager::run failed\nand more"), "dropped, RuntimeError: PassManager::run failed"),
    ],
)
def test_a_candidate_that_cannot_be_launched_is_dropped_and_named(toy, error, words):
    def fails(parameters):
        if parameters == SIXTEEN_WARPS:
            raise error
        return torch.ones(1)

    toy.costs, toy.result = [(SIXTEEN_WARPS, 0.1), (AMPERES, 0.9)], fails
    assert toy.tune()[TOY] == AMPERES
    (line,) = (line for line in toy.said if "dropped" in line)
    assert line.startswith(f"autotune: toy (size to 64) with num_warps 8 -> 16: {words}") and "\n" not in line


def test_an_error_with_the_tables_own_parameters_is_not_hidden(toy):
    def fails(parameters):
        raise RuntimeError("no such kernel")

    toy.result = fails
    with pytest.raises(RuntimeError, match="no such kernel"):
        toy.tune()


@pytest.mark.parametrize(
    "dtype, error, wrong",
    [
        (torch.float32, 0.01, True),
        (torch.float32, 4e-6, False),
        (torch.bfloat16, 0.25, True),
        (torch.bfloat16, 0.01, False),
        (torch.float32, float("nan"), True),
        (torch.int64, 1, True),
    ],
)
def test_a_candidate_with_wrong_results_is_refused_loudly(toy, dtype, error, wrong):
    def result(parameters):
        y = torch.ones(5, dtype=dtype)
        y[3] += error * (parameters == ONE_STAGE)
        return y

    toy.costs, toy.result = [(ONE_STAGE, 0.5), (AMPERES, 0.8)], result
    if error != error:  # 0 * nan is nan
        toy.result = lambda parameters: torch.tensor([1.0, error if parameters == ONE_STAGE else 1.0])
    assert toy.tune()[TOY] == (AMPERES if wrong else ONE_STAGE)
    assert any("num_stages 2 -> 1: dropped, WRONG RESULTS: y" in line for line in toy.said) == wrong


def test_override_wins_over_what_was_chosen(toy):
    toy.costs = [(FOUR_WARPS, 0.5)]
    toy.tune()
    with launch.override(num_stages=5, num_warps=2, NO_SUCH=1):
        assert TOYS.parameters(CPU, 50) == FOUR_WARPS | dict(num_stages=5, num_warps=2)
    assert TOYS.find("hopper", 50).parameters == CANDIDATES[0]  # what the audit compiles


def test_the_choice_is_kept_on_disk_and_taken_without_measuring(toy):
    toy.costs = [(FOUR_WARPS, 0.5)]
    first = toy.tune()
    CONTROL.chosen.clear()
    toy.said.clear()
    assert toy.tune(clock=lambda run: pytest.fail("measured again")) == first
    assert TOYS.parameters(CPU, 50) == FOUR_WARPS
    assert toy.said == [
        f"autotune: 2 kernels as measured before, in {toy.path}; toy (size to 64) with num_warps 8 -> 4"
    ]
    assert [file.name for file in toy.path.parent.iterdir()] == ["autotune.json"]


def test_another_shape_is_measured_by_itself_and_both_are_kept(toy):
    toy.tune("toy 5")
    toy.tune("toy 6")
    measured = len(toy.timed)
    toy.tune("toy 5")
    toy.tune("toy 6")
    assert measured == 2 * (6 + 2) == len(toy.timed)


def change_table(monkeypatch, tmp_path):
    monkeypatch.setitem(TOYS.rows["toy"]["hopper"], 64, CANDIDATES[0] | {"BLOCK": 96})


def change_relative(monkeypatch, tmp_path):
    monkeypatch.setitem(TOYS.rows["toy"]["ampere"], 64, CANDIDATES[1] | {"BLOCK": 96})


def change_kernels(monkeypatch, tmp_path):
    (tmp_path / "kernel.py").write_text("another kernel")
    monkeypatch.setattr(autotune_cache, "__file__", str(tmp_path / "autotune_cache.py"))


def change_triton(monkeypatch, tmp_path):
    monkeypatch.setattr(triton, "__version__", "99.0")


@pytest.mark.parametrize("change", [change_table, change_relative, change_kernels, change_triton])
def test_a_change_makes_what_was_measured_before_void(toy, monkeypatch, tmp_path, change):
    toy.costs = [(FOUR_WARPS, 0.5)]
    assert toy.tune()[TOY] == FOUR_WARPS
    change(monkeypatch, tmp_path)
    toy.costs = []
    assert toy.tune()[TOY] == TOYS.find("hopper", 50).parameters
    assert "as measured before" not in toy.said[-1] and toy.verdict


@pytest.mark.parametrize("text", ["{", "[1]", '"text"', '{"a": 3'])
def test_a_file_that_is_no_cache_is_said_once_and_replaced(toy, text):
    toy.path.parent.mkdir()
    toy.path.write_text(text)
    assert toy.tune()[TOY] == CANDIDATES[0]
    assert [line for line in toy.said if "no cache of ours" in line] == toy.said[:1]
    assert len(json.loads(toy.path.read_text())) == 2


def test_a_folder_that_cannot_be_written_does_not_end_the_run(toy):
    toy.costs = [(FOUR_WARPS, 0.5)]
    toy.path.parent.write_text("a file, where the folder should be")
    assert toy.tune()[TOY] == FOUR_WARPS
    assert any(line.startswith("autotune: cannot keep the choice: ") for line in toy.said)


def test_time_is_bounded_and_the_next_run_goes_on(toy, monkeypatch):
    toy.costs = [(FOUR_WARPS, 0.5)]
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def clock(run):
        now[0] += 1.0
        return toy.clock(run)

    chosen = toy.tune(clock=clock, seconds=4.5)  # two for the first kernel, three for the second
    assert chosen == {OTHER: dict(num_warps=4, num_stages=1)}
    assert TOYS.parameters(CPU, 50) == CANDIDATES[0]
    assert toy.timed[2:] == CANDIDATES[:3]
    assert toy.said[-1].startswith("autotune: out of time; the table's parameters stay for 1 kernel, ")
    assert toy.tune(clock=clock)[TOY] == FOUR_WARPS
    assert any("autotune: 1 kernel as measured before" in line for line in toy.said)


def test_the_cache_is_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HEIRETSU_CACHE", str(tmp_path))
    assert autotune.cache_file() == tmp_path / "autotune.json"
    monkeypatch.delenv("HEIRETSU_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(autotune.cache_file()) == "/home/someone/.cache/heiretsu/autotune.json"


def test_compiled_kernels_are_launched_with_what_was_chosen(tmp_path, monkeypatch):
    """bias_gelu, forward and backward, through its custom ops and autograd."""
    launched = []
    for name in ("_forward_kernel", "_backward_kernel"):
        kernel = getattr(bias_gelu, name)

        def run(*args, kernel=kernel, name=name, launch_it=kernel.run, **options):
            launched.append((name, options["num_warps"]))
            return launch_it(*args, **options)

        monkeypatch.setattr(kernel, "run", run)

    x = torch.linspace(-2, 2, 27).view(3, 9).requires_grad_()
    bias = torch.linspace(-1, 1, 9).requires_grad_()

    def forward_and_backward():
        y = bias_gelu.bias_gelu(x, bias)
        dx, dbias = torch.autograd.grad(y, (x, bias), torch.ones_like(y))
        return {"y": y.detach(), "dx": dx, "dbias": dbias}

    def clock(run):
        run()
        return 1.0 / launched[-1][1]  # more warps in the backward are faster; in the forward nothing is

    chosen = autotune.tune({"bias_gelu": lambda: forward_and_backward}, CPU, tmp_path / "c", clock, lambda line: None)
    assert {entry.row: parameters["num_warps"] for entry, parameters in chosen.items()} == {
        "bias_gelu_forward": 4,
        "bias_gelu_backward": 8,
    }
    assert ("_forward_kernel", 8) in launched  # it was tried
    del launched[:]
    forward_and_backward()
    assert launched == [("_forward_kernel", 4), ("_backward_kernel", 8)]
