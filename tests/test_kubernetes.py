"""The Kubernetes manifest, against the models that Kubeflow Trainer publishes of its API."""

from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob as TrainJob
from pydantic import ValidationError

from heiretsu.run.options import parse_args

ROOT = Path(__file__).parents[1]
MANIFEST = ROOT / "examples/kubernetes/trainjob.yaml"


def manifest() -> dict:
    return yaml.safe_load(MANIFEST.read_text())


def complaint(job: dict) -> str | None:
    """Why the API would not take it as it is: a wrong type, or a field that it does not have and would drop."""
    try:
        read = TrainJob.from_dict(job).to_dict()
    except ValidationError as error:
        return str(error)
    return None if read == job else f"{read} is left of {job}"


def test_the_published_api_takes_the_whole_manifest():
    assert complaint(manifest()) is None


@pytest.mark.parametrize(
    "path, value",
    [
        (["trainer", "numNodes"], "two"),
        (["trainer", "nproc"], 8),
        (["trainer", "args"], [16]),
        (["runtimePatches", 0, "template"], {}),
    ],
)
def test_a_wrong_field_or_type_is_seen(path, value):
    job = manifest()
    at = job["spec"]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    assert complaint(job) is not None


def test_its_command_is_one_that_train_takes_on_its_nodes(tmp_path):
    trainer = manifest()["spec"]["trainer"]
    assert trainer["command"][:3] == ["python", "-m", "heiretsu.run.launch"]
    assert trainer["command"][3] == "/workspace/train.py"
    args = [str(tmp_path) if word == "/shared/fineweb10B" else word for word in trainer["args"]]
    config = parse_args(args, world_size=trainer["numNodes"] * trainer["numProcPerNode"])
    assert config.resume == "auto" and config.save_interval > 0
    mounts = manifest()["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    container = mounts["template"]["spec"]["template"]["spec"]["containers"][0]
    assert config.checkpoint_dir.startswith(container["volumeMounts"][0]["mountPath"])
