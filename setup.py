"""The folders at the top of the repository install under one name: heiretsu.kernels, heiretsu.parallel, ..."""

from setuptools import setup

FOLDERS = ("kernels", "parallel", "model", "data", "bench")

setup(
    packages=[f"heiretsu.{folder}" for folder in FOLDERS],
    package_dir={f"heiretsu.{folder}": folder for folder in FOLDERS},
)
