"""Which steps are profiled, and what is written of them."""

import json

import pytest
import torch

from heiretsu.parallel import profiling
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.parallel.profiling import StepProfiler, region


def steps(profiler, count=8, regions=1):
    """The tables that a few steps gave, by step."""
    tables = {}
    with profiler:
        for step in range(count):
            for i in range(regions):
                with region(f"part {i} of step {step}" if regions > 1 else f"step {step}"):
                    torch.ones(200, 200) @ torch.ones(200, 200)
            if table := profiler.step():
                tables[step] = table
    return tables


def test_three_steps_after_two_are_profiled_and_told_of_once(tmp_path):
    tables = steps(StepProfiler(str(tmp_path / "a" / "b"), abstract_mesh(dp=2, rank=1)))
    assert list(tables) == [4]
    assert tables[4].startswith("by region:\n") and "\nby kernel:\n" in tables[4] and "aten::mm" in tables[4]
    events = json.loads((tmp_path / "a" / "b" / "rank1.json").read_text())["traceEvents"]
    assert {e["name"] for e in events if e.get("name", "").startswith("step ")} == {"step 2", "step 3", "step 4"}


def test_the_tables_name_what_took_longest(tmp_path):
    """The twelve longest regions, which a step's own is one of, and the fifteen longest operators by themselves."""

    def names(table):
        rows = [line.split("  ") for line in table.splitlines()]
        cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
        return [row[0] for row in cells if len(row) == 7 and row[0].strip("-") not in ("", "Name")]

    (table,) = steps(StepProfiler(str(tmp_path), abstract_mesh()), regions=30).values()
    by_region, by_kernel = (names(part) for part in table.split("by kernel:\n"))
    assert len(by_region) == 12 and by_region[0] == "ProfilerStep*"
    assert all(name.startswith("part ") for name in by_region[1:])
    assert len(by_kernel) == 15 and "aten::mm" in by_kernel[:3]


def test_without_a_folder_it_does_nothing():
    profiler = StepProfiler(None, abstract_mesh(), memory=True)
    assert steps(profiler) == {} and not profiler.memory


@pytest.mark.parametrize(
    "device, asked, recorded", [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_memory_is_recorded_on_a_gpu_where_it_was_asked_for(tmp_path, monkeypatch, device, asked, recorded):
    calls, real = [], profiling.profile

    class Profile(real):  # of a machine with a GPU, as far as this one can
        def __init__(self, activities, **options):
            calls.append([activity.name for activity in activities])
            super().__init__(activities=activities[:1], **options)

    monkeypatch.setattr(profiling, "profile", Profile)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda: calls.append("recorded"))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(path))
    (table,) = steps(StepProfiler(str(tmp_path), abstract_mesh(device=device), memory=asked)).values()
    memory = ["recorded", str(tmp_path / "memory_rank0.pickle")] if recorded else []
    assert calls == [["CPU", "CUDA"] if device == "cuda" else ["CPU"], *memory]
