"""Imported by every Python process under test (it is on PYTHONPATH): heiretsu is the copy's, and lines are traced.

With MUTATION_TRACE=FOLDER in the environment each process writes there which lines of the product it reaches for the
first time in which test, as they are reached: ranks are killed once they have answered. A record is a line `=TEST`
followed by lines `FILE:LINE`.
"""

import contextlib
import importlib.util
import os
import sys
import threading

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
FOLDERS = ("kernels", "parallel", "model", "data", "run", "offgpu", "bench")


class _FromTheCopy:
    """Finds heiretsu.FOLDER in the tree that this file is in, before an installed one is asked."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        _, dot, folder = name.partition("heiretsu.")
        if not dot or folder not in FOLDERS:
            return None
        place = os.path.join(ROOT, folder)
        return importlib.util.spec_from_file_location(
            name, os.path.join(place, "__init__.py"), submodule_search_locations=[place]
        )


class Tracer:
    """Notes each line of the product at its first execution in a test, in this process and in those that it forks."""

    def __init__(self, folder: str):
        self.folder = folder
        self.files: dict[str, str | None] = {}  # a code object's file -> its name in the tree, if it is the product's
        self.left: dict = {}  # code object -> its lines that were not reached yet
        os.register_at_fork(after_in_child=self.attach)
        self.attach()
        threading.settrace(self._call)
        sys.settrace(self._call)

    def attach(self) -> None:
        """Record for this process, from here on, under the test that runs now."""
        self.record = os.open(os.path.join(self.folder, f"{os.getpid()}.lines"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        with open(os.path.join(self.folder, "test")) as file:
            self._begin(file.read())

    def begin(self, test: str) -> str:
        """A test begins, or goes on; returns the one before."""
        with open(os.path.join(self.folder, "test"), "w") as file:
            file.write(test)
        before = self.test
        self._begin(test)
        return before

    def _begin(self, test: str) -> None:
        self.test = test
        self.left.clear()
        os.write(self.record, f"={test}\n".encode())

    def _call(self, frame, event, argument):
        code = frame.f_code
        left = self.left.get(code)
        if left is None:
            path = code.co_filename
            if path not in self.files:
                inside = path.startswith(ROOT + os.sep)
                name = os.path.relpath(path, ROOT) if inside else None
                self.files[path] = None if name is None or name.startswith("tests" + os.sep) else name
            product = self.files[path] is not None
            left = self.left[code] = {line for _, _, line in code.co_lines() if line} if product else ()
        return self._line if left else None

    def _line(self, frame, event, argument):
        left = self.left.get(frame.f_code)
        if left is None:  # a frame that was there before the test began
            self._call(frame, event, argument)
            left = self.left[frame.f_code]
        if frame.f_lineno in left:
            left.discard(frame.f_lineno)
            with contextlib.suppress(OSError):  # a test may have limited the size of files
                os.write(self.record, f"{self.files[frame.f_code.co_filename]}:{frame.f_lineno}\n".encode())
        return self._line


sys.meta_path.insert(0, _FromTheCopy)
tracer = Tracer(os.environ["MUTATION_TRACE"]) if "MUTATION_TRACE" in os.environ else None
