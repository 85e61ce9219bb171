"""The roll call to the letter: what a rank is asked and told. Ranks that differ: tests/faults/test_roll_call.py."""

import json
import os
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from heiretsu.run import roll_call
from heiretsu.run.lines import arrivals, connect, listen
from heiretsu.run.roll_call import Assembly, Report, assemble, disagreement, roll_call_over

KEY = "heiretsu/roll call"


@pytest.fixture(autouse=True)
def host(monkeypatch):
    monkeypatch.setattr(roll_call.socket, "gethostname", lambda: "here")
    monkeypatch.setattr(roll_call, "source_address", lambda target: "127.0.0.1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)


def hello(rank, **other):
    said = {"rank": rank, "host": f"host{rank}", "facts": {}, "refused": "", "sees": True, "folder": None}
    return said | other


def rank_0(hellos, mine=None, world_size=3, timeout=60.0):
    """What rank 0 makes of these ranks, what each of them hears, and where they were told to find it. A rank that has
    no facts hangs up."""
    store, found = dist.HashStore(), []
    caller = threading.Thread(
        target=lambda: found.append(roll_call_over(store, 0, world_size, timeout, mine or Report({}))), daemon=True
    )
    caller.start()
    place = json.loads(store.get(KEY))
    lines = [connect(place["addresses"], place["port"], 30.0) for _ in hellos]
    for line, said in zip(lines, hellos, strict=True):
        line.send({"token": place["token"], **said})
        time.sleep(0.02)
    heard = [line.wait(time.monotonic() + 60) for line in lines]
    caller.join(60)
    for line in [*lines, *found[0].lines.values()]:
        line.close()
    return found[0], heard, place


def test_ranks_that_are_all_there_hear_where_each_of_them_is(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assembly, heard, place = rank_0([hello(2), hello(1)])
    hosts = ["here", "host1", "host2"]
    assert (assembly.rank, assembly.hosts, sorted(assembly.lines), assembly.refused) == (0, hosts, [1, 2], "")
    assert heard == [{"token": assembly.token, "hosts": hosts, "refused": ""}] * 2
    assert place["addresses"] == ["127.0.0.1", "localhost", "here"] and place["token"] == assembly.token
    assert len(assembly.token) == 16 and int(assembly.token, 16) >= 0


def test_where_no_way_is_known_the_name_of_the_host_is_given(monkeypatch):
    monkeypatch.setattr(roll_call, "source_address", lambda target: None)
    store = dist.HashStore()
    roll_call_over(store, 0, 2, 0.05, Report({}))
    assert json.loads(store.get(KEY))["addresses"] == ["here", "here", "here"]


@pytest.mark.parametrize(
    "hellos, mine, refused",
    [
        ([hello(2, refused="no data"), hello(1, refused="no GPU")], {}, "rank 1 on host1: no GPU"),
        ([hello(2, refused="no data"), hello(1)], {"refused": "no folder"}, "no folder"),
        ([hello(2, refused="no data", facts={"--seed": 3}), hello(1)], {}, "rank 2 on host2: no data"),
        (
            [hello(1, facts={"--seed": 3}, sees=False), hello(2)],
            {"facts": {"--seed": 1}},
            "rank 1 has --seed 3 (rank 0: 1): all ranks of a run must be started alike",
        ),
        (
            [hello(2, sees=False, folder="x"), hello(1, sees=False, folder="/runs")],
            {},
            "rank 1 on host1 does not see what rank 0 on here wrote into --checkpoint_dir /runs: all ranks need one "
            "folder on a file system that they share",
        ),
    ],
)
def test_the_first_thing_that_is_wrong_is_what_all_hear(hellos, mine, refused):
    assembly, heard, _ = rank_0(hellos, Report(**mine))
    assert assembly.refused == refused and [said["refused"] for said in heard] == [refused] * 2


def test_who_does_not_come_is_named_and_others_of_another_run_do_not_count():
    assembly, heard, _ = rank_0([hello(2), hello(1, token="another run's")], world_size=4, timeout=2.0)
    assert assembly.refused == "rank 1, 3 did not come within 2 s (--timeout)"
    assert assembly.hosts == ["here", "?", "host2", "?"] and heard[0]["refused"] == assembly.refused
    assert heard[1] is None


def test_two_ranks_need_no_third(monkeypatch):
    assembly, _, _ = rank_0([hello(1)], world_size=2)
    assert assembly.refused == "" and assembly.hosts == ["here", "host1"]


def test_what_rank_0_says_is_sent_to_all_before_it_waits_for_any(monkeypatch):
    """A line that is full does not keep the others from their answer, and gets five seconds to take its own."""
    did = []

    def line(name):
        return SimpleNamespace(send=lambda said: did.append(name), flush=lambda seconds: did.append((name, seconds)))

    def arrive(door, deadline):
        token = json.loads(store.get(KEY))["token"]
        return [(line(rank), hello(rank, token=token)) for rank in (1, 2)]

    store = dist.HashStore()
    monkeypatch.setattr(roll_call, "arrivals", arrive)
    assert roll_call_over(store, 0, 3, 60.0, Report({})).refused == ""
    assert did == [1, 2, (1, 5.0), (2, 5.0)]


def rank_1(answers, timeout=60.0, mine=None, token="t"):
    """What rank 1 makes of rank 0's answers, one a call, and what it says to it."""
    store, said = dist.HashStore(), []
    with listen() as door:
        port = door.getsockname()[1]
        store.set(KEY, json.dumps({"token": token, "addresses": ["127.0.0.1"], "port": port}))

        def serve():
            for line, message in arrivals(door, time.monotonic() + 60):
                if message is not None:
                    said.append(message)
                    line.send(answers[len(said) - 1])
                if len(said) == len(answers):
                    return

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        found = roll_call_over(store, 1, 2, timeout, mine or Report({"--seed": 1}, folder=None))
        server.join(60)
    found.lines[0].close()
    return found, said


def test_a_rank_reports_until_rank_0_of_its_own_generation_answers():
    good = {"token": "t", "hosts": ["alder", "birch"], "refused": "not so"}
    found, said = rank_1([{"token": "old"}, good], mine=Report({"--seed": 1}, "no GPU", None))
    assert (found.rank, found.hosts, found.token, found.refused) == (1, ["alder", "birch"], "t", "not so")
    whole = {"token": "t", "rank": 1, "host": "here", "facts": {"--seed": 1}, "refused": "no GPU"}
    assert said == [whole | {"sees": True, "folder": None}] * 2 and sorted(found.lines) == [0]


def test_a_rank_waits_a_moment_longer_than_rank_0_does(monkeypatch):
    """Rank 0 may say in the last moment who is late."""
    waited, now = [], [50.0]
    line = SimpleNamespace(
        send=lambda message: None, wait=lambda deadline: waited.append(deadline), close=lambda: waited.append("closed")
    )
    asked = []
    monkeypatch.setattr(roll_call, "connect", lambda *how: asked.append(how) or (line if len(asked) == 1 else None))
    fake = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr(roll_call, "time", fake)
    store = dist.HashStore()
    store.set(KEY, json.dumps({"token": "t", "addresses": ["x"], "port": 7}))
    with pytest.raises(ValueError) as missed:
        roll_call_over(store, 1, 2, 0.25, Report({}))
    assert str(missed.value) == "rank 1 on here: rank 0 did not answer within 0 s (--timeout)"
    assert waited == [55.25, "closed"] and asked == [(["x"], 7, 5.0)] * 3 and now[0] == pytest.approx(50.3)


def test_a_store_that_knows_of_no_rank_0_is_told_of():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    with pytest.raises(ValueError) as missed:
        roll_call_over(store, 3, 4, 7.0, Report({}))
    assert str(missed.value) == "rank 3 on here did not find rank 0 within 7 s (--timeout)"


def test_how_ranks_differ_is_said_of_the_first_and_of_three_things():
    same = {"a": 1, "b": 2, "c": 3, "d": 4}
    assert disagreement([same, dict(same)]) == "" == disagreement([same])
    other = "rank 2 has a 7 (rank 0: 1): all ranks of a run must be started alike"
    assert disagreement([same, same, same | {"a": 7}, {}]) == other
    more = "rank 1 has a None (rank 0: 1), b None (rank 0: 2), c None (rank 0: 3)"
    assert disagreement([same, {"d": 4}]) == f"{more}: all ranks of a run must be started alike"
    assert disagreement([same, {}]) == f"{more} and 1 more: all ranks of a run must be started alike"
    assert disagreement([{}, {"e": 5}]) == "rank 1 has e 5 (rank 0: None): all ranks of a run must be started alike"


@pytest.mark.parametrize(
    "rank, agent, is_host", [(0, None, True), (0, "True", False), (0, "False", True), (1, None, False)]
)
def test_the_store_is_torchruns_or_rank_0s_own_and_is_written_below_the_generations_token(
    monkeypatch, rank, agent, is_host
):
    asked, store, mine = [], dist.HashStore(), Report({"a": 1})
    assembly = Assembly(rank, ["here"], {}, "token", "")
    monkeypatch.setenv("MASTER_ADDR", "alder")
    monkeypatch.setenv("MASTER_PORT", "29500")
    if agent is None:
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    else:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    monkeypatch.setattr(roll_call.dist, "TCPStore", lambda *how, **more: asked.append((how, more)) or store)
    monkeypatch.setattr(roll_call, "roll_call_over", lambda *what: asked.append(what) or assembly)
    found, prefixed = assemble(rank, 2, 7.5, mine)
    how = ("alder", 29500, None, is_host, timedelta(seconds=7.5))
    assert asked == [(how, {"wait_for_workers": False, "multi_tenant": is_host}), (store, rank, 2, 7.5, mine)]
    prefixed.set("key", "value")
    assert found is assembly and store.get("token/key") == b"value"


def test_where_ranks_meet_must_be_said_and_be_there(monkeypatch):
    for missing in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv("MASTER_ADDR", "alder")
        monkeypatch.setenv("MASTER_PORT", "29500")
        monkeypatch.delenv(missing)
        with pytest.raises(ValueError) as unsaid:
            assemble(1, 4, 7.0, Report({}))
        assert str(unsaid.value) == "4 ranks meet at MASTER_ADDR and MASTER_PORT, which are not set: use torchrun"

    def tcp_store(*how, **more):
        raise dist.DistError("no answer\nand much more")

    monkeypatch.setenv("MASTER_ADDR", "alder")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(roll_call.dist, "TCPStore", tcp_store)
    with pytest.raises(ValueError) as away:
        assemble(1, 4, 7.0, Report({}))
    said = "rank 1 on here did not find the store at alder:29500 within 7 s (--timeout): no answer"
    assert str(away.value) == said


def test_a_mark_is_in_the_folder_as_long_as_others_look_for_it(tmp_path):
    folder = tmp_path / "new" / "run"
    with roll_call._mark(str(folder), "t") as why:
        assert why == "" and [path.name for path in folder.iterdir()] == [".roll-call-t"]
        assert roll_call._sees(str(folder), "t") and roll_call._sees(None, "t")
        with roll_call._mark(str(folder), "u") as why:  # of another generation
            assert why == ""
    assert list(folder.iterdir()) == []
    with roll_call._mark(None, "t") as why:
        assert why == ""
    (tmp_path / "file").write_text("")
    with roll_call._mark(str(tmp_path / "file" / "x"), "t") as why:
        assert why == f"--checkpoint_dir {tmp_path / 'file' / 'x'}: Not a directory"


def test_a_mark_is_looked_for_five_seconds_and_the_folder_read_anew_each_time(tmp_path, monkeypatch):
    now, read = [50.0], []
    fake = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr(roll_call, "time", fake)

    def listdir(folder):
        read.append(now[0])
        raise OSError("stale")

    monkeypatch.setattr(roll_call, "os", SimpleNamespace(listdir=listdir, environ=os.environ))
    assert not roll_call._sees(str(tmp_path), "t")
    assert now[0] == pytest.approx(55.2, abs=0.21) and len(read) >= 25
    assert read[1] - read[0] == pytest.approx(0.2)
