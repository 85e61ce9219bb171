"""Generate text from a checkpoint, on one device, whatever the mesh that saved it.

    python sample.py --checkpoint runs/checkpoints --prompt "The "
    python sample.py --checkpoint runs/checkpoints/step_00001000 --prompt "The " --temperature 0.7 --top_k 50 --seed 3

The text goes to standard output as it is made; what made it, to standard error. It ends early where the model ends it.
"""

from __future__ import annotations

import argparse
import codecs
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if importlib.util.find_spec("heiretsu") is None:
    sys.exit("heiretsu is not installed: run `pip install -e .` here (or `make install`, which makes a .venv)")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description="Generate text from any checkpoint on one device.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="one step's folder, or a run's, whose newest is taken")
    add("--prompt", default="", help="what the text begins with; nothing: a new document")
    add("--num_tokens", type=int, default=200, help="tokens to generate")
    add("--temperature", type=float, default=0.8, help="divides the logits; 0: always the likeliest token")
    add("--top_k", type=int, help="draw from so many of the likeliest tokens only; default: from all")
    add("--seed", type=int, default=1337)
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--fused", action="store_true", help="run the fused kernels instead of plain PyTorch")
    add("--vocab_dir", help="folder with GPT-2's encoder.json and vocab.bpe, where tiktoken cannot download them")
    args = parser.parse_args(argv)
    if not os.path.isdir(args.checkpoint):
        parser.error(f"{args.checkpoint}: there is no such folder")
    for name, low in (("num_tokens", 0), ("temperature", 0), ("top_k", 1)):
        value = getattr(args, name)
        if value is not None and not value >= low:
            parser.error(f"--{name} {value} must be at least {low}")
    return args


ARGS = parse_args() if __name__ == "__main__" else None  # before torch, whose import takes seconds

import torch

from heiretsu.data.terminal import escape_what_cannot_be_printed
from heiretsu.data.tokenizer import load_tokenizer
from heiretsu.parallel.checkpoint_seal import read_run
from heiretsu.run.device import choose_device, choose_ops
from heiretsu.run.sampling import generate
from heiretsu.run.saved import load_model, newest_in, say_on_stderr

if TYPE_CHECKING:
    import tiktoken


def main(args: argparse.Namespace) -> None:
    escape_what_cannot_be_printed()
    try:
        path = newest_in(args.checkpoint, say_on_stderr)
        float64 = read_run(path)["config"]["dtype"] == "float64"
        device = torch.device(choose_device(args.device, fused=args.fused, float64=float64))
        ops, kernels = choose_ops(args.fused, device)
        model, run = load_model(path, ops, device, verified=True)
        tokenizer = load_tokenizer(run["config"]["tokenizer"], args.vocab_dir)
        print(f"{path}: step {run['step']}; {kernels} on {device.type}", file=sys.stderr, flush=True)
        prompt = tokenizer.encode_ordinary(args.prompt) or [tokenizer.eot_token]
        tokens = generate(model, prompt, args.num_tokens, args.temperature, args.top_k, args.seed)
        print(args.prompt, end="", flush=True)
        for text in decode(tokenizer, tokens):
            print(text, end="", flush=True)
    except ValueError as error:
        sys.exit(f"sample.py: error: {error}")
    print()


def decode(tokenizer: tiktoken.Encoding, tokens: Iterable[int]) -> Iterator[str]:
    """The text of the tokens up to an end of text, piece by piece, each with whole characters only."""
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if token == tokenizer.eot_token:
            break
        yield utf8.decode(tokenizer.decode_single_token_bytes(token))
    yield utf8.decode(b"", final=True)


if __name__ == "__main__":
    main(ARGS)
