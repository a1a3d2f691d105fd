"""The wheel: its files and entry points."""

from __future__ import annotations

import shutil
import zipfile

import pytest

import dsb_kernels
from dsb_runtime.demo import MODEL_DIR, SUDOKU_DIR
from tests.commands import ROOT, python

pytest.importorskip("setuptools", "77", reason="the build backend")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> text of the files of a wheel built from a copy of the checkout; weights left out."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("dsb_kernels", "dsb_runtime", "tools", "benchmarks", "tests", "examples"):
        ignore = shutil.ignore_patterns("__pycache__", "data")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    python("-c", "from setuptools.build_meta import build_wheel; build_wheel('.')", cwd=folder)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {
            name: "" if name.endswith(".safetensors") else archive.read(name).decode()
            for name in archive.namelist()
        }


def test_wheel_holds_every_module_the_embedded_models_and_nothing_else(wheel):
    expected = {
        str(path.relative_to(ROOT))
        for package in ("dsb_kernels", "dsb_runtime")
        for path in (ROOT / package).rglob("*.py")
    }
    expected |= {f"{package}/py.typed" for package in ("dsb_kernels", "dsb_runtime")}
    for model in (MODEL_DIR, SUDOKU_DIR):
        expected |= {str(path.relative_to(ROOT)) for path in model.iterdir()}
    page = ROOT / "dsb_runtime/doors/server/page"
    expected |= {str(path.relative_to(ROOT)) for path in page.iterdir()}
    assert {path for path in wheel if ".dist-info" not in path} == expected


def test_entry_points_leave_torch_alone(wheel):
    (text,) = (wheel[name] for name in wheel if name.endswith(".dist-info/entry_points.txt"))
    assert [line for line in text.split("\n") if line] == [
        "[console_scripts]", "dsb = dsb_runtime.cli.main:main",
        "[lm_eval.models]", "dsb = dsb_runtime.doors.lm_eval:DSBLM",
    ]  # fmt: skip


def test_version_is_the_changelogs_and_the_citations():
    version = dsb_kernels.__version__
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
