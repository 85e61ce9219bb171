"""Download FineWeb-10B as GPT-2 tokens: `python data/fineweb.py N` fetches N training shards and the validation shard.

A shard is 100 million tokens (200 MB); all 103 are 10 billion. They come from the Hugging Face data set
kjj0/fineweb10B-gpt2 (FineWeb: Penedo et al. 2024, arXiv:2406.17557) and go to data/fineweb10B. What is there already
and whole is kept, so a second call continues the first.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

if importlib.util.find_spec("heiretsu") is None:
    sys.exit(
        "heiretsu is not installed: run `pip install -e .` in the checkout, or `make train`, which does it for you"
    )

from heiretsu.data.shards import read_shard
from heiretsu.data.terminal import escape_what_cannot_be_printed

REPO = "kjj0/fineweb10B-gpt2"
NUM_TRAIN_SHARDS = 103


def shard_files(num_train: int) -> list[str]:
    """Names of the validation shard and of the first num_train training shards; ValueError unless it is 1 to 103."""
    if not 1 <= num_train <= NUM_TRAIN_SHARDS:
        raise ValueError(f"{num_train} training shards: FineWeb-10B has 1 to {NUM_TRAIN_SHARDS}, of 100M tokens each")
    return ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, num_train + 1)]


def download(num_train: int, out: Path, fetch: Callable, progress: bool = False) -> list[Path]:
    """Bring the shards to folder `out` and return their paths. fetch: `huggingface_hub.hf_hub_download`.

    Raises ValueError if a file cannot be fetched, or is not a whole shard after all.
    """
    paths = []
    for name in tqdm(shard_files(num_train), unit="shard", disable=not progress):
        path = out / name
        if not _is_whole(path):
            try:
                # It writes beside and renames; force, because what lies there, if anything does, is damaged.
                fetch(repo_id=REPO, filename=name, repo_type="dataset", local_dir=out, force_download=path.exists())
            except Exception as error:  # the library's transport errors have no common base that all versions share
                raise ValueError(
                    f"{name}: could not be downloaded from huggingface.co/datasets/{REPO} "
                    f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}). Check the network, or copy "
                    f"the shards from a machine that has them to {out}; a second call continues where this one stopped"
                ) from error
            read_shard(path)
        paths.append(path)
    return paths


def _is_whole(path: Path) -> bool:
    try:
        read_shard(path)
    except ValueError:
        return False
    return True


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="fineweb.py", description="Download FineWeb-10B as GPT-2 tokens, in shards of 100M tokens (200 MB)."
    )
    parser.add_argument("num_train", type=int, metavar="N", help=f"training shards, 1 to {NUM_TRAIN_SHARDS}")
    parser.add_argument("--out", type=Path, default=Path("data/fineweb10B"), metavar="DIR", help="default: %(default)s")
    escape_what_cannot_be_printed()
    args = parser.parse_args(argv)
    try:
        from huggingface_hub import hf_hub_download  # optional: only this script needs it
    except ImportError:
        sys.exit("fineweb.py: needs huggingface_hub: pip install huggingface_hub (or pip install -e '.[fineweb]')")
    try:
        paths = download(args.num_train, args.out, hf_hub_download, progress=True)
    except (ValueError, OSError) as error:
        sys.exit(f"fineweb.py: {error}")
    except KeyboardInterrupt:
        print("fineweb.py: interrupted; a second call continues from here", file=sys.stderr)
        sys.exit(130)
    print(
        f"{len(paths)} shards in {args.out}; train on them with: python train.py --data_dir {args.out} --tokenizer gpt2"
    )


if __name__ == "__main__":
    main()
