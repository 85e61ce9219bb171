"""The folders at the top of the repository install under one name: heiretsu.kernels, heiretsu.parallel, ...

heiretsu itself is an implicit namespace. Everything else about the package is in pyproject.toml.
"""

from setuptools import find_packages, setup

FOLDERS = ("kernels", "parallel", "model", "data", "run", "offgpu", "bench")

# A folder and the packages inside it: offgpu, offgpu.audit, ...
packages = [name for folder in FOLDERS for name in (folder, *(f"{folder}.{inner}" for inner in find_packages(folder)))]

setup(
    packages=[f"heiretsu.{name}" for name in packages],
    package_dir={f"heiretsu.{folder}": folder for folder in FOLDERS},
)
