"""Fixtures that several test files share."""

import gc
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

_worker = os.environ.get("PYTEST_XDIST_WORKER")
if _worker and hasattr(os, "sched_setaffinity"):  # a core for each runner and what it starts: threads that wait for each other's cores are ten times slower
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_worker[2:]) % len(_cores)]})

gc.disable()  # until the first test: what is imported stays

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: threads only get in each other's way, and runners share the cores


SLOW_FILES = ("test_demo_learns", "test_benchmarks", "test_guide", "test_groups", "test_processes", "test_killed_runs", "test_resume_exact", "test_sdxl_runs",
              "test_vis_draw", "test_resume_cli")


def pytest_collection_modifyitems(items):
    """Files that take a minute come first: one that came last would keep one runner busy while the other has nothing to do."""
    items.sort(key=lambda item: SLOW_FILES.index(item.path.stem) if item.path.stem in SLOW_FILES else len(SLOW_FILES))


_frozen = {"modules": 0, "path": None}


def _freeze(item) -> None:
    """The collector, which each run calls, takes a quarter of a second to look through what libraries made when they were imported; it passes over that from here on."""
    if item.path != _frozen["path"] or len(sys.modules) > _frozen["modules"] + 200:
        gc.enable()
        gc.collect()
        gc.freeze()
        _frozen.update(modules=len(sys.modules), path=item.path)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Of another file: its fixtures are not there yet."""
    _freeze(item)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    """Its fixtures may have imported much."""
    _freeze(item)


@pytest.fixture(scope="session")
def one_tokenizer():
    """Tokenizers of the same files are read once, from here on."""
    from one_tokenizer import one_tokenizer

    with one_tokenizer():
        yield


def _tiny(tmp_path_factory, version):
    from tiny import make_tiny_sd

    return make_tiny_sd(tmp_path_factory.mktemp(version) / "model", version)


@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory, one_tokenizer):
    """Folder of a tiny SD1-shaped model."""
    return _tiny(tmp_path_factory, "sd1")


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory, one_tokenizer):
    """Folder of a tiny SD2-shaped model (v-prediction)."""
    return _tiny(tmp_path_factory, "sd2")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory, one_tokenizer):
    """Folder of a tiny SDXL-shaped model (two text encoders, epsilon)."""
    from tiny import make_tiny_sdxl

    return make_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "model")
