"""Plant each listed bug in a copy of kernels/, and see the named parity case go red: proof that the table can fail.

    python -m tests.kernels.mutation_runner [part of a mutation's name ...]

Triton kernels run in the interpreter, sanitized. A warm process that has never imported heiretsu.kernels forks once
for each mutation; the fork copies kernels/ with the edit and imports the copy under the same name, so that every file
sees the wrong function, whoever imports it, and no custom op is registered twice. It prints one line a mutation and,
with --json, writes the results for tests/kernels/test_mutations.py.
"""

import argparse
import contextlib
import dataclasses
import importlib.abc
import importlib.util
import json
import os
import pathlib
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback

KERNELS = pathlib.Path(__file__).parents[2] / "kernels"
SECONDS_A_CASE = 120  # a mutation may make a loop endless


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="run the mutations whose id contains one of these (default: all)")
    parser.add_argument("--json", help="write the results there")
    options = parser.parse_args(arguments)
    _warm_up()
    mutations = [m for m in _in_fork(_list_mutations) if not options.names or any(n in m["id"] for n in options.names)]
    results, green = {}, {}
    for mutation in mutations:
        start = time.perf_counter()
        result = results[mutation["id"]] = _in_fork(_run_mutated, mutation)
        if result["verdict"] == "caught":
            row = (mutation["op"], mutation["case"], result["dtype"])
            if row not in green:
                green[row] = _in_fork(_run_case, KERNELS, *row)
            if green[row]["verdict"] != "survived":
                result.update(verdict="red without the mutation", why=green[row]["why"])
        result["seconds"] = time.perf_counter() - start
        why = result["why"].partition(":")[0] if result["verdict"] == "caught" else result["why"]
        print(f"{result['verdict']}: {mutation['id']} by {mutation['case']} ({why})", flush=True)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(results))
    return any(result["verdict"] != "caught" for result in results.values())


def _warm_up():
    """Import and first-use whatever is slow, but nothing of heiretsu."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from heiretsu.offgpu.interpreter import watch

    torch.set_num_threads(1)  # a fork has no threads of its parent
    watch()

    @torch.library.custom_op("heiretsu_warm::up", mutates_args=())
    def up(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    up.register_fake(torch.empty_like)
    up.register_autograd(lambda ctx, gradient: gradient)
    up(torch.zeros(2, requires_grad=True)).sum().backward()


def _in_fork(function, *args):
    """function(*args) in a forked process; a dict with a verdict where the process dies."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        signal.alarm(SECONDS_A_CASE)
        try:
            answer = function(*args)
        except BaseException:  # whatever it is, it is the parent's to report
            answer = {"verdict": "broken", "why": traceback.format_exc(limit=-3), "dtype": None}
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if data:
        return pickle.loads(data)
    how = "did not end" if status == -signal.SIGALRM else f"died with status {status}"
    return {"verdict": "broken", "why": f"the process {how}", "dtype": None}


def _list_mutations():
    from tests.kernels.cases import all_mutations

    return [
        {**dataclasses.asdict(mutation), "id": mutation.id, "op": case.op, "case": case.name}
        for mutation, case in all_mutations()
    ]


def _run_mutated(mutation):
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "kernels"
        shutil.copytree(KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
        path = copy / "gpu" / mutation["file"]
        source = path.read_text()
        if source.count(mutation["old"]) != mutation["count"]:
            found = f"occurs {source.count(mutation['old'])} times, not {mutation['count']}"
            raise ValueError(f"{mutation['old']!r} {found}, in kernels/gpu/{mutation['file']}")
        path.write_text(source.replace(mutation["old"], mutation["new"]))
        return _run_case(copy, mutation["op"], mutation["case"])


def _run_case(folder, op, name, only=None):
    """Check a case in each dtype until it goes red, with the kernels of a folder.

    The verdict is "caught" (by the parity rule, the sanitizer or an assertion) or "survived"; other errors are raised.
    """
    sys.meta_path.insert(0, _KernelsFrom(folder))
    from heiretsu.offgpu.interpreter.sanitizer import sanitize
    from heiretsu.offgpu.scratch import poisoned_scratch
    from tests.kernels.cases import all_cases
    from tests.kernels.forms import triton_form
    from tests.kernels.parity import check, dtype_name

    (case,) = (case for case in all_cases() if (case.op, case.name) == (op, name))
    for dtype in case.dtypes:
        if only in (None, dtype_name(dtype)):
            with poisoned_scratch(), sanitize():
                try:
                    check(case, dtype, triton_form(op))
                except Exception as error:
                    return {"verdict": "caught", "why": _reason(error), "dtype": dtype_name(dtype)}
    return {"verdict": "survived", "why": "no error in any dtype", "dtype": None}


def _reason(error):
    """What caught it, in a line: the parity rule, the sanitizer or an overflow check; another error is raised again."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if not isinstance(cause, AssertionError):
        raise error
    lines = str(cause).splitlines() or [repr(cause)]
    return f"{type(cause).__name__}: {lines[min(1, len(lines) - 1)].strip()}"


class _KernelsFrom(importlib.abc.MetaPathFinder):
    """Makes `heiretsu.kernels` the folder given."""

    def __init__(self, folder):
        self.folder = folder

    def find_spec(self, name, path=None, target=None):
        if name != "heiretsu.kernels":
            return None
        places = [str(self.folder)]
        return importlib.util.spec_from_file_location(
            name, self.folder / "__init__.py", submodule_search_locations=places
        )


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
