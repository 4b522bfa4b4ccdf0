"""A headless browser: what a person sees of a page."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_SIZE = {"width": 1700, "height": 1000}
_TIMEOUT_MS = 90_000


def find_browser():
    """The browser's program; without one the tests are skipped, but on CI they fail."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None and os.environ.get("CI"):
        pytest.fail(f"there is none of {', '.join(_NAMES)}; .ci/run installs one")
    if found is None:
        pytest.skip("needs chromium")
    return found


@contextmanager
def browse(shots):
    """Yield a page; `keep(page, name)` keeps a picture of what it shows."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        page = browser.new_page(viewport=_SIZE)
        page.set_default_timeout(_TIMEOUT_MS)
        # The panel of MLflow's assistant covers a quarter of every page until somebody closes it.
        close = page.locator("[data-component-id='mlflow.assistant.chat_panel.close']")
        page.add_locator_handler(close, lambda button: button.click())
        try:
            yield page
        except Exception:
            page.screenshot(path=shots / "failed.png")
            raise
        finally:
            browser.close()


def shots_directory(tmp_path_factory):
    """Where pictures are kept: SCREENSHOTS, to be looked at, or a place that is removed."""
    named = os.environ.get("SCREENSHOTS")
    directory = Path(named) if named else tmp_path_factory.mktemp("shots")
    directory.mkdir(parents=True, exist_ok=True)
    return directory
