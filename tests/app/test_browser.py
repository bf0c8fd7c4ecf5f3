"""app.py in headless Chromium: no console errors, no other hosts, and controls that change the pages.

LIGHTNING_GPT_SCREENSHOTS=DIR also writes a screenshot of each page at both widths, as the manual shows them.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.launching import REPO

WIDTHS = (1280, 400)


@pytest.fixture
def served(tiny_run, tmp_path):
    """Serve the repository's results and a tiny run, and return the address."""
    shutil.copytree(tiny_run, tmp_path / "runs" / "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--port={port}", f"--results={REPO / 'results'}", f"--runs={tmp_path / 'runs'}"]
    server = subprocess.Popen([sys.executable, REPO / "app.py", *flags], cwd=tmp_path, stdout=subprocess.DEVNULL)
    address = f"http://localhost:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/_stcore/health", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, "the server has ended"
                time.sleep(0.25)
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def browser():
    """Start headless Chromium: the system's, or playwright's own."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    pytest.importorskip("streamlit", reason="needs requirements/app.txt")
    with api.sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no Chromium: {error}")
        yield chromium
        chromium.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_load_offline_and_controls_change_them(browser, served, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(60_000)
    problems, elsewhere = [], []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((served, "data:", "blob:")) else elsewhere.append(r.url))
    page.goto(served)

    def drawn(name):
        page.get_by_role("heading", name=name, exact=True).wait_for()
        page.wait_for_function("!document.querySelector('[data-testid=stStatusWidget], [data-testid=stSkeleton]')")
        page.wait_for_timeout(1500)
        # Charts and tables may scroll by themselves; the page may not.
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if folder := os.environ.get("LIGHTNING_GPT_SCREENSHOTS"):
            # The page scrolls inside of a frame, so a window as high as its content shows all of it.
            content = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
            page.set_viewport_size({"width": width, "height": content})
            page.wait_for_timeout(1500)
            page.screenshot(path=f"{folder}/app_{name.lower()}_{width}.png")
            page.set_viewport_size({"width": width, "height": 900})

    def go(name):
        if width < 800:  # the links are in a drawer
            page.get_by_test_id("stExpandSidebarButton").click()
        page.get_by_role("link", name=name).first.click()
        if width < 800:
            page.get_by_test_id("stSidebarCollapseButton").get_by_role("button").click()

    drawn("Compare")
    axis = page.get_by_test_id("stVegaLiteChart").first
    before = axis.screenshot()
    page.get_by_text("throughput", exact=True).first.click()
    page.wait_for_timeout(3000)
    changed = axis.screenshot()
    assert changed != before
    page.get_by_text("Activation checkpointing").click()
    page.wait_for_timeout(3000)
    assert axis.screenshot() != changed
    go("Plan")
    page.get_by_text("Dashed line").wait_for()
    drawn("Plan")
    go("Runs")
    page.get_by_test_id("stVegaLiteChart").first.wait_for()
    drawn("Runs")
    go("Write")
    page.get_by_role("button", name="Write", exact=True).wait_for()
    page.get_by_role("textbox", name="Prompt").fill("the cat")
    page.get_by_role("button", name="Write", exact=True).click()
    page.get_by_text("tokens/s").wait_for()
    assert page.get_by_test_id("stCode").inner_text().startswith("the cat")
    drawn("Write")
    assert problems == [] and elsewhere == []
