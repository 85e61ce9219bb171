"""What modal_train.py can get wrong without Modal's cloud: app, image, command line, check, price and preemption."""

import contextlib
import importlib.util
import re
import runpy
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


FLAGS = (
    "--n_layer 24 --n_head 16 --n_embed 1024 --block_size 1024 --num_experts 8 --top_k 2 --moe_freq 2 "
    "--dp 2 --ep 1 --pp 1 --tp 2 --batch_size 8 --grad_accum_steps 4 --max_iters 2000 --learning_rate 0.0003 "
    "--warmup_iters 100 --min_lr 3e-05 --weight_decay 0.1 --betas 0.9 0.95 --grad_clip 1.0 --amp bf16 --fused "
    "--tokenizer gpt2 --eval_interval 250 --eval_iters 10 --save_interval 250 --keep 2 "
    "--wandb --wandb_project heiretsu-moe-training --run_name gpt2-medium-8x2-dp2-tp2 "
    "--data_dir /data --checkpoint_dir /checkpoints/gpt2-medium-8x2-dp2-tp2 --resume auto"
)
PLAN = f"""machine: 4 x A100-40GB
command: train.py {FLAGS}
tokens:  65,536 a step, 131,072,000 in 2000 steps
memory:  8.5 of 40 GB a GPU for weights, gradients, AdamW; then activations
cost:    about 0.4 h and $3.52, at 25% MFU and $2.10 a GPU hour
"""


def run_as_command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["modal_train.py", *words])
    runpy.run_path(str(ROOT / "modal_train.py"), run_name="__main__")


def test_run_as_a_command_it_prints_the_plan(monkeypatch, capsys):
    run_as_command(monkeypatch)
    assert capsys.readouterr().out == PLAN
    run_as_command(monkeypatch, "--nodes", "2")
    assert capsys.readouterr().out == PLAN.replace("A100-40GB\n", "A100-40GB in 2 containers\n")


def test_without_modal_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "modal", None)
    with pytest.raises(SystemExit, match=r"modal.*: run `pip install -e \.\[modal\]` in this folder \(or `make train`"):
        run_as_command(monkeypatch)


@pytest.mark.parametrize(
    "gpu, memory_gb, price",
    [
        ("L40S", 48, "1.95"),
        ("A100-40GB", 40, "2.10"),
        ("A100-80GB", 80, "2.50"),
        ("H100", 80, "3.95"),
        ("H200", 141, "4.54"),
        ("B200", 180, "6.25"),
    ],
)
def test_each_gpu_has_its_memory_and_its_price(gpu, memory_gb, price, monkeypatch):
    monkeypatch.setattr(script, "state_gb", lambda run: memory_gb)
    plan = script.plan(gpu=gpu)
    assert f"\nmemory:  {memory_gb:.1f} of {memory_gb} GB a GPU for" in plan
    assert plan.endswith(f" at 25% MFU and ${price} a GPU hour")
    monkeypatch.setattr(script, "state_gb", lambda run: memory_gb + 0.001)
    needs = f"parameters, gradients and AdamW's moments take {memory_gb} GB a GPU, but {gpu} has {memory_gb}: raise tp"
    with pytest.raises(SystemExit, match=f"^TRAINING_CONFIG: {needs} or pp, or ep for experts$"):
        script.plan(gpu=gpu)


def test_gpus_are_the_product_of_the_axes_each_one_by_default():
    assert script.num_gpus({}) == 1
    assert script.num_gpus({"dp": 2, "ep": 3, "pp": 5, "tp": 7}) == 210
    for axis in ("dp", "ep", "pp", "tp"):
        for wrong in (0, -1, 1.5, "2"):
            with pytest.raises(SystemExit, match="each must be a whole number above 0"):
                script.num_gpus({axis: wrong})


def test_flags_of_the_container_follow_those_of_the_configuration():
    folders = ["--data_dir", "/data", "--checkpoint_dir", "/checkpoints/run", "--resume", "auto"]
    assert script.remote_flags({"dp": 2, "fused": True, "wandb": False}) == ["--dp", "2", "--fused", *folders]


def test_nodes_are_read_ahead_of_modal_and_nothing_else_is():
    for words, nodes in (([], 1), (["x", "--nodes", "3", "y"], 3), (["--nodes=2"], 2), (["--nodes", "0"], 1)):
        assert script.asked_nodes(words) == nodes
    assert script.asked_nodes(["--help", "--node", "5"]) == 1  # those are Modal's to answer


def test_a_container_takes_eight_gpus_and_several_whole_models():
    eight = {**CONFIG, "dp": 4}
    assert script.checked(eight, "H100").dp == 4 and script.checked(eight, "H100", 2).tp == 2
    assert script.checked({**CONFIG, "dp": 1, "tp": 4}, "H100").tp == 4
    assert script.checked({**CONFIG, "dp": 8, "batch_size": 16}, "H100", 2).dp == 8
    assert script.checked(CONFIG, "H100", 2).dp == 2
    with pytest.raises(SystemExit, match="= 9 GPUs, but a container has at most 8: raise --nodes 1, or lower dp"):
        script.checked({**CONFIG, "dp": 9, "tp": 1, "batch_size": 9}, "H100")
    no_dp = {name: value for name, value in CONFIG.items() if name != "dp"} | {"tp": 4}
    with pytest.raises(SystemExit, match="= 4 GPUs hold a model, but a container of --nodes 2 has 2, and only dp may"):
        script.checked(no_dp, "H100", 2)
    with pytest.raises(SystemExit, match="^GPU 'T4' is none of L40S, A100-40GB, A100-80GB, H100, H200, B200$"):
        script.checked(CONFIG, "T4")


def declared(monkeypatch, *nodes, path=ROOT / "modal_train.py"):
    """The module, loaded anew, and the keyword arguments of its four functions."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["modal", "run", "modal_train.py", *nodes])
        calls = recorded(patch, modal.App, "function")
        return load(path), [kwargs for _, kwargs in calls]


def test_functions_are_declared_with_all_that_they_need(monkeypatch, tmp_path):
    module, (train, download, bench, parity) = declared(monkeypatch)
    data, checkpoints = module.data_volume, module.checkpoint_volume
    assert module.app.name == "heiretsu"
    assert train == {
        "image": module.training_image,
        "gpu": "A100-40GB:4",
        "volumes": {"/data": data, "/checkpoints": checkpoints},
        "secrets": module.secrets,
        "timeout": 86_400,
        "retries": None,
    }
    assert download == {"image": module.training_image, "volumes": {"/data": data}, "timeout": 21_600}
    assert bench == parity == {"image": module.checks_image, "gpu": "A100-40GB", "timeout": 3600}
    retries = declared(monkeypatch, "--nodes", "2")[1][0]["retries"]
    assert (retries.max_retries, retries.initial_delay.total_seconds()) == (5, 0)
    assert declared(monkeypatch, "--nodes", "4")[1][0]["gpu"] == "A100-40GB:1"
    without = tmp_path / "modal_train.py"
    without.write_text((ROOT / "modal_train.py").read_text().replace('"wandb": True', '"wandb": False'))
    assert declared(monkeypatch, "--nodes", "8", path=without)[1][0]["gpu"] == "A100-40GB:1"
    assert load(without).secrets == []


def test_volumes_are_made_where_there_are_none_and_images_from_scratch(monkeypatch):
    made, volume, slim = [], modal.Volume.from_name, modal.Image.debian_slim
    monkeypatch.setattr(modal.Volume, "from_name", lambda *a, **kw: made.append((a, kw)) or volume(*a, **kw))
    monkeypatch.setattr(modal.Image, "debian_slim", lambda *a, **kw: made.append((a, kw)) or slim(*a, **kw))
    steps = {
        name: recorded(monkeypatch, modal.Image, name)
        for name in ("apt_install", "add_local_file", "pip_install_from_pyproject", "add_local_dir", "run_commands")
    }
    load()
    names = [(("fineweb-data",), {"create_if_missing": True}), (("heiretsu-checkpoints",), {"create_if_missing": True})]
    assert made == [*names, *[((), {"python_version": "3.12"})] * 2]
    constraints = "/opt/heiretsu/constraints.txt"
    how = {"extra_options": f"--constraint {constraints}"}
    assert [extras for (_, extras), _ in steps["pip_install_from_pyproject"]] == [
        ["fineweb", "wandb"],
        ["bench", "test"],
    ]
    assert steps.pop("pip_install_from_pyproject")[0] == ((str(ROOT / "pyproject.toml"), ["fineweb", "wandb"]), how)
    ignore = {"copy": True, "ignore": script.LEFT_AT_HOME}
    assert steps == {
        "apt_install": [(("build-essential",), {})] * 2,
        "add_local_file": [((ROOT / "constraints.txt", constraints), {"copy": True})] * 2,
        "add_local_dir": [((ROOT, "/opt/heiretsu"), ignore)] * 2,
        "run_commands": [(("python -m pip install --no-deps --editable /opt/heiretsu",), {})] * 2,
    }


@pytest.mark.parametrize(
    "path, stays",
    [(path, True) for path in ".git/HEAD .venv/bin/pip heiretsu.egg-info/x .ruff_cache/x .hypothesis/x build/x".split()]
    + [(path, True) for path in "dist/x runs/x wandb/x data/__pycache__/x data/fineweb10B/a.bin".split()]
    + [(path, False) for path in "train.py data/prepare.py tests/kernels/conftest.py constraints.txt".split()],
)
def test_what_is_no_source_stays_at_home(path, stays):
    assert modal.FilePatternMatcher(*script.LEFT_AT_HOME)(Path(path)) == stays


def test_one_container_trains_alone_and_commits_whatever_ends_it(monkeypatch):
    calls = []
    monkeypatch.setattr(script.checkpoint_volume, "commit", lambda: calls.append("commit"))

    def ends(*args, **kwargs):
        calls.append((args, kwargs))
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "train_on_node", ends)
    with pytest.raises(KeyboardInterrupt):
        script.train.local(1, 4, ["--dp", "4"])
    assert calls == [((0, ["localhost"], 4, ["--dp", "4"]), {"cwd": "/opt/heiretsu"}), "commit"]


@pytest.fixture
def commands(monkeypatch):
    """Fills with the (command, cwd) of what would be run."""
    ran = []
    monkeypatch.setattr(script, "run_to_the_end", lambda command, cwd: ran.append((command, cwd)))
    return ran


@pytest.mark.parametrize(
    "node, addresses, first",
    [(0, ["fd00::1", "10.0.0.2"], "[fd00::1]"), (1, ["10.0.0.1", "fd00::2"], "10.0.0.1")],
)
def test_containers_meet_at_the_address_of_the_first(node, addresses, first, commands):
    script.train_on_node(node, addresses, 8, ["--dp", "16"], cwd="there")
    nodes = ["--nnodes=2", f"--node_rank={node}", f"--master_addr={first}"]
    train = ["train.py", "--dp", "16", "--local_checkpoints"]
    launch = [sys.executable, "-m", "heiretsu.run.launch", *nodes, "--nproc_per_node=8", *train]
    assert commands == [(launch, "there")]


def test_each_entry_runs_its_script_in_the_source(commands, monkeypatch):
    commits = []
    monkeypatch.setattr(script.data_volume, "commit", lambda: commits.append(len(commands)))
    script.train_on_node(0, ["localhost"], 4, ["--dp", "4"], cwd="there")
    script.download.local()
    script.download.local(3)
    for entry in (script.bench, script.parity):
        entry.local()
        entry.local("--quick -k 'a b'")
    python, source = sys.executable, "/opt/heiretsu"
    launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", "train.py", "--dp", "4"]
    bench, parity = [python, "bench/kernels.py"], [python, "-m", "pytest", "tests/kernels"]
    more = ["--quick", "-k", "a b"]
    assert commands == [
        (launch, "there"),
        *(([python, "data/fineweb.py", shards, "--out", "/data"], source) for shards in ("10", "3")),
        *((command, source) for command in (bench, bench + more, parity, parity + more)),
    ]
    assert commits == [2, 3]


def test_only_then_it_rents(monkeypatch):
    done = []
    monkeypatch.setattr(script, "print", lambda *args, **kwargs: done.append((args, kwargs)), raising=False)
    monkeypatch.setattr(script.train, "remote", lambda *args: done.append(args))
    script.main.info.raw_f()
    script.main.info.raw_f(nodes=2)
    flags, shown = shlex.split(FLAGS), {"flush": True}  # before Modal writes of its own
    assert done == [
        ((script.plan(),), shown),
        (1, 4, flags),
        ((script.plan(nodes=2),), shown),
        (2, 2, flags),
    ]


class Process:
    """Stands in for subprocess.Popen: `waits` are what its waits do, one after the other."""

    def __init__(self, done, waits):
        self.done, self.waits = done, waits

    def __call__(self, command, **kwargs):
        self.done.append((command, kwargs))
        return self

    def wait(self, *timeout):
        self.done.append(("wait", *timeout))
        result = self.waits.pop(0)
        if isinstance(result, BaseException):
            raise result
        return result

    def terminate(self):
        self.done.append("terminate")

    def kill(self):
        self.done.append("kill")


@pytest.mark.parametrize(
    "waits, raised, after",
    [
        ([0], None, []),
        ([3], subprocess.CalledProcessError, []),
        ([KeyboardInterrupt(), 0], KeyboardInterrupt, ["terminate", ("wait", 25)]),
        (
            [KeyboardInterrupt(), subprocess.TimeoutExpired("c", 25)],
            KeyboardInterrupt,
            ["terminate", ("wait", 25), "kill"],
        ),
    ],
)
def test_a_command_is_run_apart_and_told_to_end(waits, raised, after, monkeypatch):
    """In a session of its own, so that an interrupt reaches this process alone; of Modal's 30 s it gets 25 to save."""
    done = []
    monkeypatch.setattr(script.subprocess, "Popen", Process(done, waits))
    with pytest.raises(raised) if raised else contextlib.nullcontext() as error:
        script.run_to_the_end(["a", "b"], cwd="there")
    assert done == [(["a", "b"], {"cwd": "there", "start_new_session": True}), ("wait",), *after]
    if raised is subprocess.CalledProcessError:
        assert (error.value.returncode, error.value.cmd) == (3, ["a", "b"])


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
