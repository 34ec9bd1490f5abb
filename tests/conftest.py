"""One thread: the networks here are tiny, and threads that wait for each other take longer.

And Ctrl-C as usual: a shell that starts the tests in the background lets them ignore it.

`pytest --device cuda` runs the tests of what computes on that device, see `tests/device.py`.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    name = config.getoption("--device")
    if name == "cpu":
        return
    reason = device.reason_against(name)
    for item in items:
        is_elsewhere = item.path.stem not in device.ON_DEVICE
        if reason or is_elsewhere:
            text = reason or "what this file tests has nothing to do with the device"
            item.add_marker(pytest.mark.skip(reason=text))


@pytest.fixture(autouse=True)
def on_the_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Build on the device whatever a test builds without naming one."""
    name = request.config.getoption("--device")
    if name == "cpu":
        yield
        return
    with torch.device(name):
        yield
