"""Where autotune.py keeps what it chose: a JSON file.

{device, Triton, call and entry in words: {"valid": digest, "parameters": what was chosen}}. The digest is of the
candidates and of the kernels' sources, so that an edit of a kernel or of its tiles makes older measurements void.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from heiretsu.kernels.gpu import launch


def cache_file() -> Path:
    """In the folder HEIRETSU_CACHE, or in ~/.cache/heiretsu."""
    return Path(os.environ.get("HEIRETSU_CACHE") or Path.home() / ".cache" / "heiretsu") / "autotune.json"


class Cache:
    """device: where the kernels run. say: told when the file cannot be read or written; neither ends the run."""

    def __init__(self, path: Path, device: torch.device, say: Callable[[str], None]):
        self.path, self.say = path, say
        named = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.device = f"{named} ({launch.architecture(device)})"
        self.sources = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
        self.records = self._read()
        if self.records is None:
            say(f"autotune: {path} is no cache of ours and will be replaced; all is measured anew")

    def get(self, call: str, entry: launch.Entry, candidates: list[dict]) -> dict | None:
        """What was chosen for an entry in a call; None if that is not known, or no longer valid."""
        record = (self.records or {}).get(self._key(call, entry))
        valid = isinstance(record, dict) and record.get("valid") == self._digest(candidates)
        return record["parameters"] if valid else None

    def put(self, call: str, entry: launch.Entry, candidates: list[dict], parameters: dict) -> None:
        """Keep a choice. Other processes see the old file or the new one; if two write at once, one record may be lost,
        and is measured again."""
        record = {"valid": self._digest(candidates), "parameters": parameters}
        self.records = (self._read() or {}) | {self._key(call, entry): record}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
                json.dump(self.records, file, indent=1)
            os.replace(file.name, self.path)
        except OSError as error:
            self.say(f"autotune: cannot keep the choice: {error}")

    def _read(self) -> dict | None:
        """The records; None if the file is there and holds none."""
        try:
            records = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            return None
        return records if isinstance(records, dict) else None

    def _key(self, call: str, entry: launch.Entry) -> str:
        return " | ".join((self.device, f"triton {triton.__version__}", call, entry.row, f"size {entry.size}"))

    def _digest(self, candidates: list[dict]) -> str:
        return hashlib.sha256(json.dumps(candidates).encode() + self.sources).hexdigest()
