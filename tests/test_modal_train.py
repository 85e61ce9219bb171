"""What modal_train.py can get wrong without Modal's cloud: app, image, command line, check, price and preemption."""

import importlib.util
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import modal
import pytest

from heiretsu.model.gpt import GPT
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run.options import parse_args

ROOT = Path(__file__).parents[1]


def load(path=ROOT / "modal_train.py"):
    spec = importlib.util.spec_from_file_location("modal_train_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load()
CONFIG = script.TRAINING_CONFIG


def recorded(monkeypatch, owner, name):
    """A list that fills with the (args, kwargs) of every call of one of Modal's own methods; the calls go through."""
    calls, original = [], getattr(owner, name)

    def call(self, *args, **kwargs):
        calls.append((args, kwargs))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


def test_app_asks_for_the_machines_volumes_and_secret_of_the_configuration(monkeypatch):
    calls = recorded(monkeypatch, modal.App, "function")
    names = []
    secret, volume = modal.Secret.from_name, modal.Volume.from_name
    monkeypatch.setattr(modal.Secret, "from_name", lambda name, **kw: names.append(name) or secret(name, **kw))
    monkeypatch.setattr(modal.Volume, "from_name", lambda name, **kw: names.append(name) or volume(name, **kw))
    load()
    train, download, bench, parity = (kwargs for _, kwargs in calls)
    assert train["gpu"] == "A100-40GB:4"
    assert list(train["volumes"]) == ["/data", "/checkpoints"]
    assert len(train["secrets"]) == 1
    assert "gpu" not in download and list(download["volumes"]) == ["/data"]
    assert bench["gpu"] == parity["gpu"] == "A100-40GB"
    assert sorted(names) == ["fineweb-data", "heiretsu-checkpoints", "wandb-secret"]


@pytest.mark.parametrize("name", ["", "download", "bench", "parity"])
def test_modal_run_finds_each_entry(name):
    """`modal run modal_train.py` needs no name, because there is one local entry point."""
    reference = f"modal_train.py::{name}" if name else "modal_train.py"
    done = subprocess.run(
        [sys.executable, "-m", "modal", "run", reference, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"modal run {reference}" in done.stdout
    assert ("--arguments" in done.stdout) == (name in ("bench", "parity"))
    assert ("--shards" in done.stdout) == (name == "download")


def test_nodes_make_a_cluster_of_containers_that_share_the_gpus(monkeypatch):
    clusters, clustered = [], modal.clustered
    monkeypatch.setattr(sys, "argv", ["modal", "run", "modal_train.py", "--nodes", "2"])
    monkeypatch.setattr(modal, "clustered", lambda **kwargs: clusters.append(kwargs) or clustered(**kwargs))
    calls = recorded(monkeypatch, modal.App, "function")
    load()
    assert clusters == [{"size": 2, "rdma": True}]
    assert calls[0][1]["gpu"] == "A100-40GB:2" and calls[0][1]["retries"].max_retries > 0
    monkeypatch.delattr(modal, "clustered")  # as in modal 1.0 to 1.5
    monkeypatch.setattr(
        modal.experimental, "clustered", lambda **kwargs: clusters.append(kwargs) or clustered(**kwargs)
    )
    load()
    assert clusters[1:] == clusters[:1]


def test_a_container_finds_its_place_in_the_cluster(monkeypatch):
    addresses = ["fd00::1", "fd00::2"]
    context = modal._cluster.ClusterContext(1, "cu-1", addresses, ["192.0.2.1", "192.0.2.2"], [])
    monkeypatch.setattr(modal._cluster, "current_cluster_context", context)
    assert script.place_in_cluster() == (1, addresses)
    monkeypatch.delattr(modal, "Cluster")  # as in modal 1.0 to 1.5
    assert script.place_in_cluster() == (1, addresses)


def test_only_the_first_container_of_a_cluster_commits(monkeypatch):
    ran, commits = [], []
    monkeypatch.setattr(script, "train_on_node", lambda *args, **_: ran.append(args))
    monkeypatch.setattr(script.checkpoint_volume, "commit", lambda: commits.append(len(ran)))
    for node in (0, 1):
        monkeypatch.setattr(script, "place_in_cluster", lambda node=node: (node, ["fd00::1", "fd00::2"]))
        script.train.local(2, 8, ["--dp", "16"])
    assert ran == [(node, ["fd00::1", "fd00::2"], 8, ["--dp", "16"]) for node in (0, 1)]
    assert commits == [1]


def test_images_install_from_our_constraints(monkeypatch):
    """torch, triton and the rest have the versions of constraints.txt, because pip reads that very file."""
    files = recorded(monkeypatch, modal.Image, "add_local_file")
    installs = recorded(monkeypatch, modal.Image, "pip_install_from_pyproject")
    load()
    assert len(files) == len(installs) == 2
    for (args, kwargs), (install_args, install_kwargs) in zip(files, installs, strict=True):
        assert args[0] == ROOT / "constraints.txt" and kwargs == {"copy": True}
        assert install_args[0] == str(ROOT / "pyproject.toml")
        assert install_kwargs["extra_options"] == f"--constraint {args[1]}"


def test_images_install_extras_that_exist_and_can_be_had_without_ours(monkeypatch):
    """Modal gives the lists to pip as they are: an extra that names heiretsu itself would be looked up elsewhere."""
    text = (ROOT / "pyproject.toml").read_text()
    installs = recorded(monkeypatch, modal.Image, "pip_install_from_pyproject")
    load()
    for extra in {extra for args, _ in installs for extra in args[1]}:
        listed = re.search(rf"^{extra} = \[(.*?)\]$", text, re.M | re.S)
        assert listed, f"pyproject.toml has no extra {extra}"
        assert "heiretsu" not in listed.group(1)


def test_script_loads_in_a_container_where_only_it_is_there(tmp_path):
    shutil.copy(ROOT / "modal_train.py", tmp_path)
    assert load(tmp_path / "modal_train.py").SOURCE == script.SOURCE


def test_command_line_is_read_by_the_parser_of_train(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "DATA", str(tmp_path))
    run = parse_args(script.remote_flags(CONFIG), world_size=4)
    model = run.model
    assert (model.n_layer, model.n_head, model.n_embed, model.block_size) == (24, 16, 1024, 1024)
    assert (model.num_experts, model.top_k, model.moe_freq, model.vocab_size) == (8, 2, 2, 50257)
    assert (run.dp, run.ep, run.pp, run.tp) == (2, 1, 1, 2)
    assert (run.batch_size, run.grad_accum_steps, run.max_iters) == (8, 4, 2000)
    assert (run.amp, run.fused, run.wandb, run.wandb_project) == ("bf16", True, True, "heiretsu-moe-training")
    assert (run.data_dir, run.resume) == (str(tmp_path), "auto")
    assert run.checkpoint_dir == "/checkpoints/gpt2-medium-8x2-dp2-tp2" and run.save_interval > 0


def test_plan_names_machine_command_tokens_and_cost():
    plan = script.plan()
    assert "machine: 4 x A100-40GB" in plan
    assert shlex.join(script.remote_flags(CONFIG)) in plan
    assert "65,536 a step, 131,072,000 in 2000 steps" in plan
    assert re.search(r"\d\.\d of 40 GB a GPU", plan)
    assert re.search(r"about \d+\.\d h and \$\d+\.\d\d, at 25% MFU and \$2.10 a GPU hour", plan)


@pytest.mark.parametrize("change", [{}, {"num_experts": 0, "top_k": 1}, {"moe_freq": 1}])
def test_memory_is_sixteen_bytes_a_parameter(change):
    run = script.checked({**CONFIG, **change, "dp": 4, "tp": 1}, "H200")
    halves = script.checked({**CONFIG, **change, "tp": 2}, "H200")
    for config, tp in ((run, 1), (halves, 2)):
        stored = GPT(config.model, abstract_mesh(tp=tp, device="meta"), ops=None).parameters()
        assert script.state_gb(config) == pytest.approx(16e-9 * sum(param.numel() for param in stored), rel=1e-12)


def test_cost_is_flops_over_what_the_gpus_do_in_an_hour():
    run = script.checked(CONFIG, "A100-40GB")
    hours, dollars = script.estimate(run, "A100-40GB", 4)
    start_up = script.START_UP_MINUTES / 60
    computing = run.model.flops_per_token * 131_072_000 / (4 * 312e12 * script.ASSUMED_MFU) / 3600
    assert hours == pytest.approx(computing + start_up)
    assert dollars == pytest.approx(hours * 4 * 2.10)
    assert script.estimate(run, "A100-40GB", 8)[0] - start_up == pytest.approx(computing / 2)


@pytest.mark.parametrize(
    "change, gpu, message",
    [
        ({"tp": 3}, "A100-40GB", "--tp 3"),
        ({"top_k": 9}, "A100-40GB", "--top_k 9"),
        ({"n_layers": 24}, "A100-40GB", "--n_layers"),
        ({"dp": 16}, "A100-40GB", "32 GPUs, but a container has at most 8"),
        ({"n_embed": 6144}, "A100-40GB", "GB a GPU, but A100-40GB has 40: raise tp or pp"),
        ({"dp": 0}, "A100-40GB", "[0, 1, 1, 2]: each must be a whole number above 0"),
        ({}, "A100-41GB", "GPU 'A100-41GB' is none of"),
    ],
)
def test_what_train_would_refuse_is_refused_before_anything_is_rented(change, gpu, message, monkeypatch, capsys):
    monkeypatch.setattr(script, "plan", lambda **_: script.checked({**CONFIG, **change}, gpu))
    monkeypatch.setattr(script.train, "remote", lambda *_: pytest.fail("rented"))
    with pytest.raises(SystemExit) as refusal:
        script.main.info.raw_f()
    assert message in f"{refusal.value} {capsys.readouterr().err}"


@pytest.mark.parametrize(
    "change, nodes, message",
    [
        ({}, 3, "4 GPUs, which --nodes 3 does not divide"),
        ({"dp": 12}, 2, "24 GPUs, but a container has at most 8: raise --nodes 2, or lower dp"),
        ({"dp": 1, "tp": 4}, 2, "ep x pp x tp = 4 GPUs hold a model, but a container of --nodes 2 has 2"),
        ({"dp": 2, "tp": 2, "ep": 2}, 4, "ep x pp x tp = 4 GPUs hold a model, but a container of --nodes 4 has 2"),
    ],
)
def test_what_cannot_be_spread_over_containers_is_refused(change, nodes, message):
    with pytest.raises(SystemExit, match=message):
        script.plan({**CONFIG, **change}, "H100", nodes)


def test_plan_of_several_containers_names_them():
    assert "machine: 16 x H100 in 2 containers" in script.plan({**CONFIG, "dp": 8}, "H100", nodes=2)


def test_a_failing_run_fails_its_container(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        script.run_to_the_end([sys.executable, "-c", "raise SystemExit(3)"], cwd=tmp_path)


def test_a_preempted_run_may_save_before_it_ends(tmp_path):
    """An interrupt of the container's process reaches the run as SIGTERM, and is waited for."""
    run = (
        "import signal, sys, time, pathlib\n"
        "def save(*_):\n    time.sleep(0.2); pathlib.Path('saved').touch(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\npathlib.Path('started').touch()\ntime.sleep(60)"
    )
    outer = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import modal_train\n"
        f"modal_train.run_to_the_end([sys.executable, '-c', {run!r}], cwd='.')"
    )
    process = subprocess.Popen([sys.executable, "-c", outer], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert (tmp_path / "saved").exists(), error
    assert process.returncode != 0 and "KeyboardInterrupt" in error
