"""One thread: the networks here are tiny, and threads that wait for each other take longer.

And Ctrl-C as usual: a shell that starts the tests in the background lets them ignore it.

`pytest --device cuda` runs the tests of what computes on that device, see `tests/device.py`.
"""

from __future__ import annotations

import signal

import pytest
import torch

from tests import device

torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", help="cpu, cuda, cuda:1, ...; 'pretended' is a CPU in disguise"
    )


_reason: str | None = None
"""Why no test can run on the device that is asked for."""


def pytest_configure(config: pytest.Config) -> None:
    """Let whatever names no device be built there, what test files build when imported, too."""
    global _reason
    name = config.getoption("--device")
    if name != "cpu":
        _reason = device.reason_against(name)
        torch.set_default_device("cpu" if _reason else name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    name = config.getoption("--device")
    if name == "cpu":
        return
    for item in items:
        is_elsewhere = item.path.stem not in device.ON_DEVICE
        if _reason or is_elsewhere:
            text = _reason or "what this file tests has nothing to do with the device"
            item.add_marker(pytest.mark.skip(reason=text))


@pytest.fixture
def values_are_seen() -> None:
    """Errors and numbers of steps that need a look at values, which a GPU's host is spared."""
    if device.current().type != "cpu":
        pytest.skip("nobody waits for the device to look at values")
