from setuptools import setup

setup()  # everything about the package stands in pyproject.toml
