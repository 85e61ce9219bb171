"""A model of Hugging Face's as a checkpoint to train from, and back.

    python convert.py import HF_DIR OUT        # config.json, *.safetensors -> OUT/step_00000000
    python convert.py export CKPT DIR          # a checkpoint, or a run's newest -> the same two

Any topology starts from an imported one, with `train.py --init_from OUT --preset gpt2 --tokenizer gpt2` or the flags of
its sizes. transformers' from_pretrained reads an exported folder.
"""

import argparse
import importlib.util
import os
import sys

if importlib.util.find_spec("heiretsu") is None:
    sys.exit("heiretsu is not installed: run `pip install -e .` here (or `make install`, which makes a .venv)")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="convert.py", description="Models to and from Hugging Face's files.")
    directions = parser.add_subparsers(dest="direction", required=True)
    add = directions.add_parser("import", help="a Hugging Face folder -> a checkpoint of step 0").add_argument
    add("source", metavar="HF_DIR", help="folder with config.json and model.safetensors")
    add("out", metavar="OUT", help="folder of checkpoints to make")
    add = directions.add_parser("export", help="a dense checkpoint -> a folder that transformers reads").add_argument
    add("source", metavar="CKPT", help="one step's folder, or a run's, whose newest is taken")
    add("out", metavar="DIR", help="folder to make")
    add("--family", default="gpt2", help="what it becomes: a file of model/hf (default: gpt2)")
    args = parser.parse_args()
    if not os.path.isdir(args.source):
        parser.error(f"{args.source}: there is no such folder")
    return args


ARGS = parse_args() if __name__ == "__main__" else None  # before torch, whose import takes seconds

from heiretsu.parallel.checkpoint import SaveError
from heiretsu.run.conversion import export_model, import_model


def main(args: argparse.Namespace) -> None:
    try:
        if args.direction == "import":
            path = import_model(args.source, args.out)
        else:
            path = export_model(args.source, args.out, args.family)
    except (ValueError, SaveError) as error:
        sys.exit(f"convert.py: error: {error}")
    print(f"wrote {path}", file=sys.stderr)  # which prints any name, whatever its encoding


if __name__ == "__main__":
    main(ARGS)
