"""What is recorded of the CPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from reproduce.processor import cpu_generation, cpu_name

TWO_CORES = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC: some
stepping\t: 1

processor\t: 1
cpu family\t: 6
"""


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    for function in (cpu_name, cpu_generation):
        function.cache_clear()
    yield
    for function in (cpu_name, cpu_generation):
        function.cache_clear()


def test_processors_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: TWO_CORES)
    assert cpu_name() == "AMD EPYC: some"
    assert cpu_generation() == "family 25, model 17, stepping 1"


def test_where_the_system_does_not_say_it_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr("platform.processor", lambda: "")
    assert cpu_name() == cpu_generation() == "unknown"
