"""What a run that saves finds out before it has anything to lose."""

import pytest
import torch

from heiretsu.kernels import plain
from heiretsu.parallel.mesh import abstract_mesh
from heiretsu.run.batches import read_batches
from heiretsu.run.building import adamw, build_engine
from heiretsu.run.options import parse_args
from heiretsu.run.saving import Saver
from tests.training import dataset

FLAGS = "--n_layer 1 --n_head 2 --n_embed 16 --block_size 16 --batch_size 2 --tokenizer bytes".split()


def nadam(groups, config):
    return torch.optim.NAdam(groups, lr=config.learning_rate)  # keeps mu_product, a number for each parameter


@pytest.mark.parametrize(
    "make_optimizer, folder, ends", [(nadam, True, True), (nadam, False, False), (adamw, True, False)]
)
def test_an_optimizer_that_cannot_be_saved_is_refused_after_one_step(tmp_path, capsys, make_optimizer, folder, ends):
    config = parse_args([*FLAGS, *(["--checkpoint_dir", str(tmp_path)] if folder else [])], world_size=1)
    engine = build_engine(config, abstract_mesh(), plain, make_optimizer=make_optimizer)
    saver = Saver(config, engine, {}, print)
    report = engine.step(read_batches(config, engine.mesh, dataset(257, 16), 0))
    if not ends:
        saver.after(report)
        return
    with pytest.raises(SystemExit, match="2"):
        saver.after(report)
    told = capsys.readouterr().err
    assert told.startswith("train.py: error: NAdam keeps mu_product for ") and told.count("\n") == 1
