"""Packaging of DSB Kernels: ranges live here, `constraints.txt` pins what has been tested."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

setup(
    name="dsb-kernels",
    version="0.1.0",
    description="Exact, fast decoding of diffusion language models: DSB and DSB Cache",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    py_modules=["dsb_lm_eval"],
    packages=find_namespace_packages(include=["dsb_kernels*", "dsb_runtime*"]),
    package_data={"dsb_runtime.demo": ["model/*"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5.17",
        "safetensors",
        "tokenizers",
        "numpy",
        "rich",
        "tqdm",
        "matplotlib",
    ],
    extras_require={
        "eval": ["lm-eval>=0.4.13", "accelerate"],
        "flash": ["flash-attn"],
        "test": ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "ruff", "accelerate"],
    },
    entry_points={
        "console_scripts": ["dsb = dsb_runtime.cli.main:main"],
        "lm_eval.models": ["dsb = dsb_runtime.doors.lm_eval:DSBLM"],
        # The same for lm-eval up to 0.4.13, which reads no entry points: see dsb_lm_eval.py.
        "torch.backends": ["dsb_lm_eval = dsb_lm_eval:register"],
    },
)
