"""What makes a checkpoint provable: run.json, whose every field is checked, and checksums.json over all its files.

    {"files": {"__0_0.distcp": {"bytes": 4193280, "sha256": "..."}, ...}, "sha256": "..."}      the latter of "files"

It is written last. So a folder without it is of a save that did not end, and a file that was cut, flipped, swapped or
lost since does not have the checksum that was written. SHA-256 is what `sha256sum` prints, too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from heiretsu.parallel.collectives import gather_objects
from heiretsu.parallel.mesh import Axis, Mesh

FORMAT = 2
UNSEALED_FORMAT = 1  # of earlier versions: without checksums, so that only missing and cut files show
SEAL = "checksums.json"
LARGEST_STEP = 10**15 - 1
_HASHED_AT_ONCE = 2**20  # bytes
_NAME = re.compile(r"step_(\d{8,15})")


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 for a folder of another name, which `--resume PATH` may point to."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def read_run(path: str | os.PathLike) -> dict[str, Any]:
    """The run.json of a checkpoint that has all its files in full length. ValueError, in one line, for any other."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such checkpoint")
    missing = [name for name in ("run.json", ".metadata") if not (path / name).is_file()]
    if missing:
        raise ValueError(f"{path}: not a complete checkpoint: {' and '.join(missing)} missing")
    run = read_json(path / "run.json")
    if type(run.get("format")) is not int or not UNSEALED_FORMAT <= run["format"] <= FORMAT:  # true is 1 to Python
        raise ValueError(
            f"{path}: run.json has checkpoint format {brief(run.get('format'))}, only {FORMAT} and older can be read"
        )
    if run["format"] == FORMAT or (path / SEAL).exists():
        seal = read_seal(path)
        _check_sizes(path, seal)
        _check_digest(path, "run.json", seal)
    else:
        _check_unsealed(path)
    _check_run(path, run)
    return run


def problem(check: Callable[..., object], *arguments) -> str:
    """What a check raises ValueError for, in words; "" if for nothing."""
    try:
        check(*arguments)
    except ValueError as error:
        return str(error)
    return ""


def is_sealed(path: Path) -> bool:
    return (path / SEAL).is_file()


def fingerprint(file: Path) -> dict[str, Any]:
    """{"bytes": size, "sha256": hex digest} of a file, read in pieces."""
    digest, size = hashlib.sha256(), 0
    with open(file, "rb") as stream:
        while piece := stream.read(_HASHED_AT_ONCE):
            digest.update(piece)
            size += len(piece)
    return {"bytes": size, "sha256": digest.hexdigest()}


def read_seal(path: Path) -> dict[str, dict[str, Any]]:
    """{file name: its fingerprint} as a save sealed it. ValueError if it is missing or is itself not as written."""
    _size_of(path, SEAL)
    seal = read_json(path / SEAL)
    files = seal.get("files")
    if not isinstance(files, dict) or seal.get("sha256") != _digest_of(files):
        raise ValueError(f"{path}: {SEAL} is not as it was written: the checkpoint is damaged")
    return files


def seal(path: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write checksums.json over files that lie in the folder. Raises OSError where one does not lie here as its rank
    wrote it, which is so where the ranks do not share the folder."""
    for name, expected in files.items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != expected["bytes"]:
            found = "is not there" if size is None else f"has {size} bytes, not {expected['bytes']}"
            raise OSError(f"{name} {found} where rank 0 looks: do all nodes share the folder of --checkpoint_dir?")
    write_json(path / SEAL, {"files": files, "sha256": _digest_of(files)})
    sync_folder(path)


def verify(path: str | os.PathLike, mesh: Mesh | None = None) -> None:
    """Read every file of a checkpoint against its checksums. ValueError, in one line, naming one that differs.

    With a mesh, all ranks call it; each reads a share of the files, and all raise alike. A checkpoint of an earlier
    version has no checksums: it passes if its files are there and long enough.
    """
    world = mesh.world if mesh else Axis("world")
    for rank, why in enumerate(gather_objects(problem(_check_share, Path(path), world), world)):
        if why:
            raise ValueError(why if rank == 0 else f"{why} (seen by rank {rank})")


def _check_share(path: Path, world: Axis) -> None:
    """What this rank verifies. The files are dealt out by size, so that each is read once."""
    read_run(path)
    files = read_seal(path) if is_sealed(path) else {}
    loads, mine = [0] * world.size, []
    for name in sorted(files, key=lambda name: (-files[name]["bytes"], name)):
        lightest = loads.index(min(loads))
        loads[lightest] += files[name]["bytes"]
        if lightest == world.index:
            mine.append(name)
    with ThreadPoolExecutor() as threads:
        for _ in threads.map(lambda name: _check_digest(path, name, files), mine):
            pass


def write_json(file: Path, content: dict) -> None:
    with open(file, "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Names on disk, too, where the system can be asked for it."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return  # Windows opens no folder
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems refuse it, and order names by themselves
    finally:
        os.close(handle)


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: of a million brackets
        raise ValueError(f"{file.parent}: {file.name} cannot be read ({brief(error)}): damaged") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file.parent}: {file.name} holds {brief(content)}, not an object: damaged")
    return content


def _size_of(path: Path, name: str) -> int:
    """ValueError where there is no such file."""
    if not (path / name).is_file():
        raise ValueError(f"{path}: not a complete checkpoint: {name} missing")
    return (path / name).stat().st_size


def _check_sizes(path: Path, sealed: dict[str, dict[str, Any]]) -> None:
    for name, expected in sealed.items():
        if (size := _size_of(path, name)) != expected["bytes"]:
            raise ValueError(f"{path}: {name} has {size} bytes, not the {expected['bytes']} that were written: damaged")


def _check_digest(path: Path, name: str, sealed: dict[str, dict[str, Any]]) -> None:
    try:
        found = fingerprint(path / name)
    except OSError as error:
        raise ValueError(f"{path}: {name} cannot be read ({brief(error)})") from error
    if found != sealed.get(name):
        raise ValueError(f"{path}: {name} does not have the checksum that was written: damaged")


def _check_unsealed(path: Path) -> None:
    """Of an earlier version's checkpoint: that each file is as long as .metadata says."""
    try:
        metadata = dcp.FileSystemReader(path).read_metadata()
        ends: dict[str, int] = {}
        for info in metadata.storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    except Exception as error:  # whatever a damaged pickle makes Python do
        raise ValueError(f"{path}: .metadata cannot be read ({brief(error)}): damaged") from error
    for name, end in sorted(ends.items()):
        if (size := _size_of(path, name)) < end:
            raise ValueError(f"{path}: {name} has {size} bytes, not {end}: damaged")


def _check_run(path: Path, run: dict[str, Any]) -> None:
    """ValueError unless every number and name that is read from run.json is there and can be what it stands for."""

    def is_count(value: Any, largest: int) -> bool:
        return type(value) is int and 0 <= value <= largest

    def is_scale(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and value > 0

    config, scaler = run.get("config"), run.get("scaler")
    step, dtype = run.get("step"), config.get("dtype") if isinstance(config, dict) else None
    sound = {
        f"step {brief(step)}": is_count(step, LARGEST_STEP),
        f"step {brief(step)}, but the folder's name says {step_of(path)}": step_of(path) in (-1, step),
        f"optimizer_steps {brief(run.get('optimizer_steps'))}": is_count(
            run.get("optimizer_steps"), step if type(step) is int else 0
        ),
        f"scaler {brief(scaler)}": isinstance(scaler, dict)
        and scaler.keys() >= {"scale", "growth", "good_steps"}
        and is_scale(scaler["scale"])
        and is_count(scaler["growth"], LARGEST_STEP)
        and is_count(scaler["good_steps"], LARGEST_STEP),
        f"config {brief(config)}": isinstance(config, dict) and isinstance(config.get("model"), dict),
        f"dtype {brief(dtype)}": dtype in ("float32", "float64"),
    }
    for what, is_sound in sound.items():
        if not is_sound:
            raise ValueError(f"{path}: run.json has {what}: damaged")


def _digest_of(files: dict) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def brief(value: object, most: int = 80) -> str:
    """On one line, and not a page of it."""
    text = " ".join((f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else repr(value)).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
