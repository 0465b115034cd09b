"""Says what pyproject.toml cannot: the wheel carries the checkout's `cfgs/` as `hcpdiff/cfgs/`, without a second copy in the checkout."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["hcpdiff", "hcpdiff.*"]), "hcpdiff.cfgs"],
    package_dir={"hcpdiff.cfgs": "cfgs"},
    package_data={"hcpdiff.cfgs": ["**/*.yaml", "**/*.txt"], "": ["*.json", "*.txt", "*.yaml", "*.safetensors", "*.md"]},
)
