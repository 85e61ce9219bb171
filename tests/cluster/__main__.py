"""Whether this machine can be two hosts with a Slurm, in one line if not: what `make cluster` asks first.

python -m tests.cluster [--install]
"""

import argparse
import shutil
import subprocess
import sys

from heiretsu.bench import network
from tests.cluster import slurm

PACKAGES = sorted({*network.NEEDED.values(), *slurm.NEEDED.values()})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__.partition("\n")[0])
    parser.add_argument("--install", action="store_true", help="let apt-get bring what is missing")
    install = parser.parse_args().install
    if install and (network.lacking() or slurm.lacking()) and shutil.which("apt-get"):
        print(f"make cluster: apt-get install {' '.join(PACKAGES)}", flush=True)
        for words in (["update", "-qq"], ["install", "-qq", "--yes", "--no-install-recommends", *PACKAGES]):
            subprocess.run(["apt-get", *words], stdout=subprocess.DEVNULL, check=False)
    if lacking := network.lacking() or slurm.lacking():
        sys.exit(f"make cluster: two hosts with a Slurm need Debian (or like it) and root, and here: {lacking}")


if __name__ == "__main__":
    main()
