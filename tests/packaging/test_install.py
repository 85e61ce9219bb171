"""The editable install, the wheel and an uninstalled checkout behave as the README says.

Each test works on a copy of the tracked files, with the packages of the running environment and without its own
heiretsu: `python -S` skips the .pth files through which an editable install is found.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SITE = sysconfig.get_paths()["purelib"]
FOLDERS = sorted(p.name for p in ROOT.iterdir() if (p / "__init__.py").is_file() and p.name != "tests")
SCRIPTS = [path for folder in (".", "bench", "data") for path in sorted((ROOT / folder).glob("*.py"))]
ENTRY_SCRIPTS = [str(path.relative_to(ROOT)) for path in SCRIPTS if 'if __name__ == "__main__":' in path.read_text()]


def run(*command, cwd, path=()):
    """The finished process; PYTHONPATH is exactly `path`."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what a clone would hold (and of files about to be committed), without anything built."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    if listed.returncode:
        pytest.fail(f"these tests copy the files that git lists: {listed.stderr}")
    copy = tmp_path_factory.mktemp("checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out]
    done = run(*pip, checkout, cwd=out)
    assert done.returncode == 0, done.stderr
    return next(out.glob("heiretsu-*.whl"))


def test_every_folder_with_code_is_in_the_wheel(checkout, wheel):
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".py")}
    expected = {f"heiretsu/{f.relative_to(checkout)}" for folder in FOLDERS for f in (checkout / folder).rglob("*.py")}
    assert packed == expected


def test_wheel_carries_the_version_and_the_licence(wheel):
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
    assert wheel.name == f"heiretsu-{version}-py3-none-any.whl"
    assert any(n.endswith("LICENSE") for n in zipfile.ZipFile(wheel).namelist())


def test_wheel_installs_and_imports(wheel, tmp_path):
    """All of its modules but the scripts import from the installed place, with no checkout in sight."""
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target]
    done = run(*pip, wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code = "from heiretsu.kernels import fused, plain; print(fused.__file__); import heiretsu.parallel, heiretsu.data"
    done = run(sys.executable, "-S", "-c", code, cwd=tmp_path, path=[target, SITE])
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(target)


def test_editable_install_follows_the_checkout(checkout, tmp_path):
    """Importable from anywhere, from the checkout itself, and with a module that was added after the install."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    lib = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (lib / "environment_of_the_tests.pth").write_text(SITE + "\n")
    done = run(
        *[python, "-m", "pip", "install", "--quiet", "--ignore-installed", "--no-deps", "--no-build-isolation"],
        *["--editable", checkout],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    added = checkout / "kernels" / "added_later.py"
    added.write_text("from heiretsu.kernels import plain\n")
    try:
        code = "import heiretsu.kernels.added_later as m; print(m.plain.__file__)"
        for cwd in (tmp_path, checkout, checkout / "bench"):
            done = run(python, "-c", code, cwd=cwd)
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip() == str(checkout / "kernels" / "plain.py")
    finally:
        added.unlink()


def test_pyproject_has_a_build_system_table():
    """Without it an editable install reports success and cannot be imported."""
    assert re.search(r"^\[build-system\]$", (ROOT / "pyproject.toml").read_text(), re.M)


@pytest.mark.parametrize("script", ENTRY_SCRIPTS)
def test_uninstalled_checkout_says_in_one_line_how_to_install(checkout, script):
    """One line and no traceback, whichever script is tried first."""
    done = run(sys.executable, "-S", script, cwd=checkout, path=[SITE])
    assert done.returncode == 1, done.stdout
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(r"heiretsu.*pip install -e (\.|'?\.\[).*make", done.stderr), done.stderr


def test_constraints_pin_the_pair_that_was_built_together():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert (pins["torch"], pins["triton"]) == ("2.13.0", "3.7.1")


def test_make_lists_its_targets():
    done = run("make", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    listed = set(re.findall(r"^  make (\w+)", done.stdout, re.M))
    declared = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M).group(1).split()
    assert listed == set(declared)
