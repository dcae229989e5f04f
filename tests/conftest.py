"""What all tests share."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def pytest_configure() -> None:
    # The tests run in several processes; torch threads of one would spin against those of the others.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What drives whole runs takes longest: first, so that no core waits for it at the end.
    items.sort(key=lambda item: item.path.name not in ("test_run.py", "test_readme.py"))


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written under another name first never gets its own."""
    def replace(*_: object) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "replace", replace)


@pytest.fixture
def data_root(request: pytest.FixtureRequest) -> Path:
    """The folder with the real data sets, for tests marked `data`; skips where there is none."""
    assert request.node.get_closest_marker("data"), "mark tests that use data_root with @pytest.mark.data"
    root = Path(os.environ.get("BACKDOOR_DATA", ROOT / "data"))
    if not root.is_dir():
        pytest.skip(f"no data sets at {root}; set BACKDOOR_DATA")
    return root
