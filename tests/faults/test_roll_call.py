"""Ranks that are not alike are refused before they do anything together, on every rank, in one line that names it."""

import json
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from heiretsu.data.batches import TokenDataset
from heiretsu.run import roll_call
from heiretsu.run.lines import connect
from heiretsu.run.options import parse_args
from heiretsu.run.prepare import facts
from heiretsu.run.roll_call import Report, roll_call_over
from tests.faults.launch import TINY, last_line, run_to_the_end


def called(reports, timeout=30.0, store=None, head_start=0.0):
    """Each rank's Assembly, or the ValueError that it raised; ranks are threads here, rank 0 the last to begin."""
    store, found = store or dist.HashStore(), [None] * len(reports)

    def take_part(rank):
        try:
            found[rank] = roll_call_over(store, rank, len(reports), timeout, reports[rank])
        except ValueError as error:
            found[rank] = error

    threads = [threading.Thread(target=take_part, args=[rank]) for rank in range(len(reports)) if reports[rank]]
    for thread in reversed(threads):
        time.sleep(head_start if thread is threads[0] else 0.0)
        thread.start()
    for thread in threads:
        thread.join()
    for assembly in found:
        for line in assembly.lines.values() if isinstance(assembly, roll_call.Assembly) else ():
            line.close()
    return found


def facts_of(*flags, seed=0):
    config = parse_args(flags, world_size=2)
    data = [TokenDataset([bytes_of(seed)], 8, 0, 257)]
    return facts(config, "gloo on cpu", data, None)


def bytes_of(seed):
    import numpy as np

    return np.random.default_rng(seed).integers(200, size=100).astype(np.uint16)


MINE = ["--dp", "2"]
OTHERS = {
    "seed": (["--seed", "7"], "--seed 7 (rank 0: 1337)"),
    "learning rate": (["--learning_rate", "0.01"], "--learning_rate 0.01 (rank 0: 0.001)"),
    "batch size": (["--batch_size", "4"], "--batch_size 4 (rank 0: 16)"),
    "warm-up": (["--warmup_iters", "5"], "--warmup_iters 5 (rank 0: 0)"),
    "dropout": (["--dropout", "0.3"], "--dropout 0.3 (rank 0: 0.0)"),
    "steps": (["--max_iters", "2"], "--max_iters 2 (rank 0: 1000)"),
    "mesh": (["--dp", "1", "--tp", "2"], "--dp 1 (rank 0: 2), --tp 2 (rank 0: 1)"),
    "folder on one rank alone": (["--checkpoint_dir", "x"], "a checkpoint folder True (rank 0: False)"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_flags_on_one_rank_are_refused_on_all(record_property, what):
    flags, message = OTHERS[what]
    record_property("fault", f"another {what} on rank 1")
    zero, one = called([Report(facts_of(*MINE)), Report(facts_of(*MINE, *flags))])
    record_property("outcome", zero.refused)
    assert zero.refused == one.refused == f"rank 1 has {message}: all ranks of a run must be started alike"


def test_ranks_that_are_alike_are_not_refused():
    zero, one, two = called([Report(facts_of(*MINE))] * 3)
    assert zero.refused == one.refused == two.refused == ""
    assert zero.token == one.token == two.token and sorted(zero.lines) == [1, 2] and sorted(two.lines) == [0]


def test_paths_may_differ_but_not_what_is_found_there(record_property):
    record_property("fault", "other tokens in a folder of the same name on rank 1")
    zero, one = called([Report(facts_of(*MINE)), Report(facts_of(*MINE, "--log_file", "elsewhere"))])
    assert zero.refused == one.refused == ""
    zero, one = called([Report(facts_of(*MINE)), Report(facts_of(*MINE, seed=1))])
    record_property("outcome", zero.refused)
    assert zero.refused == one.refused and zero.refused.startswith("rank 1 has data ")


def test_what_one_rank_cannot_do_is_refused_on_all(record_property):
    record_property("fault", "a bad shard on rank 2 alone")
    found = called([Report(facts_of(*MINE)), Report(facts_of(*MINE)), Report(refused="train_0.bin: not a token shard")])
    record_property("outcome", found[0].refused)
    assert all(f"rank 2 on {a.hosts[2]}: train_0.bin: not a token shard" == a.refused for a in found)


def test_a_rank_that_does_not_come_is_named_by_the_others(record_property):
    record_property("fault", "rank 1 of 3 does not come to the roll call")
    zero, _, two = called([Report({}), None, Report({})], timeout=1.0)
    record_property("outcome", zero.refused)
    assert zero.refused == two.refused == "rank 1 did not come within 1 s (--timeout)"


def test_a_rank_that_dies_while_others_are_waited_for_is_named_at_once(record_property):
    record_property("fault", "rank 1 of 3 dies after it has reported, rank 2 is not there yet")
    store, found = dist.HashStore(), []
    arguments = (store, 0, 3, 60.0, Report({}))
    caller = threading.Thread(target=lambda: found.append(roll_call_over(*arguments)))
    caller.start()
    place = json.loads(store.get("heiretsu/roll call"))
    line = connect(place["addresses"], place["port"], 5.0)
    line.send({"token": place["token"], "rank": 1, "host": "elsewhere", "facts": {}, "refused": "", "sees": True})
    line.close()
    caller.join(30)
    assert not caller.is_alive()
    record_property("outcome", found[0].refused)
    assert found[0].refused == "rank 1 on elsewhere was lost while the others were waited for"


def test_without_rank_0_the_others_say_so(record_property):
    record_property("fault", "rank 0 does not come to the roll call")
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    _, one = called([None, Report({})], timeout=1.0, store=store)
    record_property("outcome", str(one))
    assert isinstance(one, ValueError) and "rank 1 on " in str(one) and "did not find rank 0" in str(one)


def test_what_a_last_generation_left_in_the_store_is_passed_over(record_property):
    """torchrun --standalone --max-restarts keeps its store: the addresses in it were of processes that are dead."""
    record_property("fault", "the store of a run that torchrun restarted")
    store = dist.HashStore()
    first = called([Report({}), Report({})], store=store)
    again = called([Report({}), Report({})], store=store, head_start=0.5)  # rank 1 finds the old address
    record_property("outcome", "met again, under a prefix of their own")
    assert {a.token for a in first} != {a.token for a in again} and len({a.token for a in again}) == 1
    assert all(assembly.refused == "" for assembly in again)


def test_folders_that_are_not_one_are_refused(tmp_path, record_property, monkeypatch):
    record_property("fault", "--checkpoint_dir on a disk that rank 1 does not share")
    monkeypatch.setattr(roll_call, "_VISIBLE_S", 0.5)
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    zero, one = called([Report({}, folder=here), Report({}, folder=there)])
    record_property("outcome", zero.refused)
    assert zero.refused == one.refused and "rank 1 on " in zero.refused and "does not see what rank 0" in zero.refused
    zero, one = called([Report({}, folder=here), Report({}, folder=here)])
    assert zero.refused == one.refused == "" and list((tmp_path / "here").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused_at_the_start(tmp_path, record_property):
    record_property("fault", "--checkpoint_dir below a file")
    (tmp_path / "file").write_text("")
    zero, one = called([Report({}, folder=str(tmp_path / "file" / "x"))] * 2)
    record_property("outcome", zero.refused)
    assert zero.refused == one.refused and "Not a directory" in zero.refused


@pytest.mark.full
@pytest.mark.parametrize("fault", ["other-flags:1:0:--seed:7", "other-code:1:0", "other-data:1:0"])
def test_a_run_whose_ranks_differ_ends_before_it_begins(tmp_path, record_property, fault):
    record_property("fault", f"rank 1 with {fault.split(':')[0].replace('-', ' ')}, two processes")
    statuses, said = run_to_the_end([*TINY, "--dp", "2"], 2, tmp_path, fault)
    record_property("outcome", last_line(said, "train.py: error"))
    assert statuses == [2, 2] and said.count("all ranks of a run must be started alike") == 1, said
    assert "Traceback" not in said and "step 1" not in said
