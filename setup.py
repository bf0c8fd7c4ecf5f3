"""The packages of the wheel; everything else is in pyproject.toml, which cannot name a package of another folder."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["lightning_gpt*", "mingpt*", "nanogpt*", "moderngpt*"]),
        "lightning_gpt.configs",  # --config configs/NAME.yaml works outside of a clone as well
    ],
    package_dir={"lightning_gpt.configs": "configs"},
    package_data={"lightning_gpt": ["py.typed"], "lightning_gpt.configs": ["*.yaml"]},
)
