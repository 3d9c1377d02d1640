"""A person starts a retrain from the browser, without code: Prefect's form, drawn from our spec, in a real Chromium.

Run: pytest tests/services/test_browser.py -m slow. It skips without a Chromium on the PATH, and fails there if REQUIRE_BROWSER=1.
TUNEGATE_SCREENSHOTS=DIR keeps a picture of each step.
"""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.support.servers import Tunegate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SWITCHES = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run"]
SWITCHES += ["disable-background-networking", "disable-component-update", "disable-sync"]
SECONDS_FOR_A_RUN = 600


@pytest.fixture(scope="module")
def browser_path() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        wanted = f"none of {', '.join(BROWSERS)} is on the PATH"
        assert os.environ.get("REQUIRE_BROWSER") != "1", wanted
        pytest.skip(wanted)
    return found


@pytest.fixture(scope="module")
def tunegate(browser_path, tmp_path_factory) -> Iterator[Tunegate]:
    command = Tunegate(tmp_path_factory.mktemp("up"))
    try:
        code, _, errors = command("up", "smoke", *command.ports, "--set", "schedule.watch_minutes=null")
        assert code == 0, errors
        yield command
    finally:
        command("down")


@pytest.fixture
def page(browser_path) -> Iterator[Page]:
    with sync_playwright() as playwright:
        arguments = [f"--{switch}" for switch in SWITCHES]
        browser = playwright.chromium.launch(executable_path=browser_path, args=arguments)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def picture(page: Page, name: str) -> None:
    if folder := os.environ.get("TUNEGATE_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def wait_for_the_end(tunegate: Tunegate, name: str) -> dict:
    deadline = time.monotonic() + SECONDS_FOR_A_RUN
    while time.monotonic() < deadline:
        (run,) = tunegate.api("/flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}})
        if run["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            return run
        time.sleep(1)
    raise TimeoutError(f"{name} is still {run['state_name']}")


def test_a_retrain_is_started_from_the_form_with_a_setting_changed_and_its_gates_are_seen(tunegate, page):
    page.goto(f"http://127.0.0.1:{tunegate.prefect}/deployments")
    page.get_by_role("link", name="retrain", exact=True).first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()

    setting = page.locator(".schema-form-property", has=page.get_by_text("Max Steps")).last
    expect(setting).to_contain_text("Optimiser steps after which training stops; null trains all epochs.")
    assert setting.locator("input").input_value() == "12", "the form does not show the preset's value"
    setting.locator("input").fill("9")
    picture(page, "1-form")
    name = page.locator("input").first.input_value()
    page.get_by_role("button", name="Submit").click()
    page.get_by_role("link", name=name).first.click()
    picture(page, "2-started")

    run = wait_for_the_end(tunegate, name)
    assert (run["state_name"], run["parameters"]["spec"]["train"]["max_steps"]) == ("Completed", 9)
    page.reload()
    expect(page.get_by_text("Completed").first).to_be_visible()
    page.get_by_text("Artifacts", exact=True).click()
    picture(page, "3-artifacts")
    page.get_by_text("gates", exact=True).first.click()
    expect(page.get_by_text("PASS").first).to_be_visible()
    expect(page.get_by_text("qlora_keeps_loras_gain").first).to_be_visible()
    picture(page, "4-gates")
