"""One run in a folder at a time: a lock that ends with the process that holds it, however that ends.

flock(2) on DIR/.lock. The system drops it with its process, so that none is ever stale on one machine; on NFS (Linux
has it as a lock of the server's) it is dropped when the server has noticed, which for a dead machine takes its lease
time. So a run waits for a predecessor of its own job, which is ending. Who holds it stands in the file, for the reader
of the refusal; nothing is decided by that.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

NAME = ".lock"
GRACE_S, SAME_JOB_GRACE_S = 3.0, 120.0  # the latter above the 90 s of an NFS 4 lease
_CANNOT_LOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class FolderLock:
    """Held from `take` until `release` or the end of the process."""

    def __init__(self, folder: str | os.PathLike):
        self.file: IO[str] | None = None
        self.path = Path(folder) / NAME

    def take(self, grace_s: float = GRACE_S, same_job_grace_s: float = SAME_JOB_GRACE_S) -> str | None:
        """Take the lock. ValueError if another run holds it, and does so until the grace is over.

        Returns a warning where the file system cannot lock, or None.
        """
        self.file = open(self.path, "a+", encoding="utf-8")
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in _CANNOT_LOCK:
                    self.release()
                    where = f"{self.path.parent}: its file system has no locks"
                    return f"{where}; nothing keeps another run out of the folder"
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
            holder = self._holder()
            ours = holder.get("job") is not None and holder.get("job") == _job()
            if time.monotonic() - began > (same_job_grace_s if ours else grace_s):
                self.release()
                who = f"process {holder.get('pid', '?')} on {holder.get('host', 'a machine unknown')}"
                raise ValueError(
                    f"--checkpoint_dir {self.path.parent}: another run is using it ({who}, since "
                    f"{holder.get('since', 'a time unknown')}): end that one, or choose another folder"
                )
            time.sleep(0.1)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "job": _job(), "since": since}, self.file)
        self.file.flush()
        return None

    def release(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def _holder(self) -> dict:
        try:
            self.file.seek(0)
            holder = json.load(self.file)
        except (OSError, ValueError):
            return {}
        return holder if isinstance(holder, dict) else {}


def _job() -> str | None:
    """What stays the same when a scheduler or torchrun starts a run again."""
    elastic = os.environ.get("TORCHELASTIC_RUN_ID")
    return os.environ.get("SLURM_JOB_ID") or (elastic if elastic != "none" else None)
