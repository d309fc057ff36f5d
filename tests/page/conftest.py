"""The composed sample, both engines for it, and a browser if there is one."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from artefacts import ROOT

from granite_switch import compose
from granite_switch.cli.generate import load
from granite_switch.play.engine import Engine, Model
from granite_switch.play.local import Local
from granite_switch.play.remote import Remote

sys.path.insert(0, str(Path(__file__).parent))

import page_browser
from page_server import free_port, playing, serving


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sample") / "sample"
    compose(ROOT / "sample" / "base", [ROOT / "sample" / "library"], output, base_name="granite-switch-sample")
    return output


@pytest.fixture(scope="session")
def model(sample: Path) -> Any:
    return load(str(sample), "cpu")[0].float()


@pytest.fixture(scope="session")
def local(model: Any, sample: Path) -> Local:
    return Local(model, Model.read(sample))


@pytest.fixture(scope="session")
def served(local: Local) -> Iterator[str]:
    with serving(local, free_port()) as url:
        yield url


@pytest.fixture(params=["local", "remote"])
def engine(request: pytest.FixtureRequest, local: Local, served: str) -> Engine:
    return local if request.param == "local" else Remote(served, local.files)


@pytest.fixture(scope="module")
def page(sample: Path) -> Iterator[str]:
    with playing(sample, "--device-map", "cpu") as url:
        yield url


@pytest.fixture
def browse(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A function that opens a new browser."""
    if not page_browser.CHROMIUM or not page_browser.DRIVER:
        missing = "no chromium with chromium-driver here; `make test-page` installs them where apt can be used"
        (pytest.fail if "NEED_BROWSER" in os.environ else pytest.skip)(missing)
    opened: list[Any] = []

    def browse(url: str, **options: Any) -> Any:
        opened.append(page_browser.Page(url, tmp_path / f"profile-{len(opened)}", **options))
        return opened[-1]

    yield browse
    for page in opened:
        page.driver.quit()
