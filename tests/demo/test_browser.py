"""The page in headless Chromium, as people use it: `make test-browser` installs Chromium and runs these alone."""

from __future__ import annotations

import base64
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo.conftest import Client, Served

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install 'pointalign[dev]'")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'pointalign[demo]'")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="Chromium and its driver are not here: make test-browser installs them"
)
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SECONDS = 40
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)
DESKTOP, PHONE = (1400, 1000), (390, 844)


class Browser:
    """The page in a browser, and what people do with it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, address: str) -> Browser:
        self.driver.get("about:blank")  # the page that is left logs that its connection is cut
        for kind in ("performance", "browser"):
            self.driver.get_log(kind)
        self.driver.get(address)
        self.wait(lambda: self.canvas.get_attribute("data-points"))
        return self

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def wait(self, come: Callable[[], Any]) -> Any:
        """What `come` gives once it gives something."""
        deadline, last = time.monotonic() + SECONDS, None
        while time.monotonic() < deadline:
            try:
                if found := come():
                    return found
            except Exception as error:  # the page is drawn anew at any moment
                last = error
            time.sleep(0.1)
        raise AssertionError(f"waited {SECONDS} seconds; {last}; {self.text('body')[:1000]}")

    @property
    def canvas(self) -> WebElement:
        return self.find("#viewer canvas")

    def drop(self, path: Path) -> None:
        self.find("#drop input").send_keys(str(path))

    def sees(self, name: str) -> None:
        self.wait(lambda: self.canvas.get_attribute("data-name") == name and name in self.text("#about"))

    def ask(self, question: str) -> None:
        self.find("#question textarea, #question input").send_keys(question + Keys.ENTER)

    def messages(self, chat: int = 0) -> list[str]:
        found = self.driver.find_elements(
            By.CSS_SELECTOR, f"#chat-{chat} [data-testid=user], #chat-{chat} [data-testid=bot]"
        )
        return [element.text.strip() for element in found]

    def picture(self) -> np.ndarray:
        """The canvas as (height, width, 4)."""
        data = self.driver.execute_script("return arguments[0].toDataURL('image/png')", self.canvas)
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGBA"))

    def settled(self) -> np.ndarray:
        """The canvas once it does not change any more."""
        last = self.picture()
        while True:
            time.sleep(0.3)
            if np.array_equal(now := self.picture(), last):
                return now
            last = now


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    assert CHROMIUM is not None
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(SECONDS)
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver: Any, served: Served) -> Iterator[Browser]:
    """The page on a desk's screen, opened anew."""
    screen(driver, *DESKTOP)
    yield Browser(driver).open(served.address)
    loud = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [message for message in loud if "413" not in message]


def screen(driver: Any, width: int, height: int, mobile: bool = False) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if mobile else 1, "mobile": mobile}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": mobile})


def test_two_files_and_two_questions(browser: Browser, served: Served) -> None:
    browser.drop(EXAMPLES / "chair.glb")
    browser.sees("chair.glb")
    browser.ask("What is this?")
    browser.wait(lambda: len(browser.messages(1)) == 2 and browser.messages(1)[1])
    browser.wait(lambda: browser.find("#question textarea, #question input").get_attribute("value") == "")
    browser.ask("What color is it?")
    browser.wait(lambda: len(browser.messages(1)) == 4 and browser.messages(1)[3])
    for chat in range(2):
        assert browser.messages(chat)[::2] == ["What is this?", "What color is it?"]
    assert browser.messages(0)[0] == "What is this?"
    assert browser.text("#chat-0 label, #chat-0 [data-testid=block-label]").strip().startswith("tiny")
    browser.drop(EXAMPLES / "oak_table.ply")
    browser.sees("oak_table.ply")
    assert browser.find("#list input").get_attribute("value") == ""
    browser.wait(lambda: browser.messages(0) == browser.messages(1) == [])
    assert [path for path in served.temporary.rglob("*") if path.is_file()] == []


def test_objects_are_switched_turned_and_zoomed(browser: Browser) -> None:
    first = browser.canvas.get_attribute("data-name")
    browser.find("#shelf button[data-id=scopia-dog]").click()
    browser.sees("a sitting dog")
    assert browser.find("#list input").get_attribute("value") == "a sitting dog"
    assert first != "a sitting dog"
    before = browser.settled()
    share = (before[..., 3] > 0).mean()
    assert 0.05 < share < 0.6
    assert len(np.unique(before[before[..., 3] > 0][:, :3], axis=0)) > 100
    ActionChains(browser.driver).drag_and_drop_by_offset(browser.canvas, 120, 30).perform()
    turned = browser.settled()
    assert not np.array_equal(turned, before)
    browser.find("#viewer [data-act=nearer]").click()
    browser.find("#viewer [data-act=nearer]").click()
    assert (browser.settled()[..., 3] > 0).mean() > 1.2 * share
    browser.find("#viewer [data-act=reset]").click()
    browser.wait(lambda: browser.canvas.get_attribute("data-zoom") == "1.000")
    assert np.array_equal(browser.settled(), before)
    browser.find("#viewer input[type=range]").send_keys(Keys.ARROW_RIGHT * 8)
    assert (browser.settled()[..., 3] > 0).mean() > 1.02 * share
    browser.canvas.send_keys(Keys.ARROW_LEFT)
    assert not np.array_equal(browser.settled(), before)


def test_a_bad_file_shows_a_message_and_the_object_stays(browser: Browser, tmp_path: Path) -> None:
    shown = browser.canvas.get_attribute("data-name")
    (tmp_path / "broken.glb").write_bytes(b"glTF but no more")
    browser.drop(tmp_path / "broken.glb")
    browser.wait(lambda: "broken.glb" in browser.text("#object-notice [role=alert]"))
    assert str(tmp_path) not in browser.text("body")
    (tmp_path / "large.ply").write_bytes(b"x" * (2**20 + 1))
    browser.drop(tmp_path / "large.ply")
    browser.wait(lambda: "large.ply is larger than" in browser.text("#object-notice [role=alert]"))
    assert browser.canvas.get_attribute("data-name") == shown
    browser.drop(EXAMPLES / "potted_plant.xyz")
    browser.sees("potted_plant.xyz")
    assert browser.text("#object-notice") == ""


def test_labels_get_bars_and_clear_forgets(browser: Browser) -> None:
    labels = browser.find("#labels textarea, #labels input")
    labels.clear()
    labels.send_keys("chair, table, lamp")
    browser.find("#score").click()
    for number in range(2):
        browser.wait(lambda number=number: browser.text(f"#bars-{number}").count("%") == 3)
        shares = [float(word.rstrip("%")) for word in browser.text(f"#bars-{number}").split() if word.endswith("%")]
        assert sum(shares) == pytest.approx(100, abs=2)
    browser.find("#suggestions button").click()
    browser.wait(lambda: len(browser.messages(1)) == 2)
    browser.find("#clear").click()
    browser.wait(lambda: browser.messages(0) == browser.messages(1) == [])


def test_a_phone_has_all_of_it(browser: Browser, served: Served) -> None:
    screen(browser.driver, *PHONE, mobile=True)
    browser.open(served.address)
    browser.drop(EXAMPLES / "chair.glb")
    browser.sees("chair.glb")
    browser.driver.execute_script("document.querySelector('#ask').scrollIntoView({block: 'center'})")
    browser.find("#question textarea, #question input").send_keys("What is this?")
    browser.find("#ask").click()
    browser.wait(lambda: len(browser.messages(1)) == 2 and browser.messages(1)[1])
    browser.driver.execute_script("document.querySelector('#score').scrollIntoView({block: 'center'})")
    browser.find("#score").click()
    browser.wait(lambda: "%" in browser.text("#bars-1"))
    width, inner = browser.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= inner == PHONE[0]
    for control in (
        "#viewer canvas",
        "#drop .zone",
        "#list",
        "#turn",
        "#question",
        "#ask",
        "#stop",
        "#clear",
        "#score",
    ):
        box = browser.find(control).rect
        assert box["x"] >= 0, control
        assert box["x"] + box["width"] <= PHONE[0], control
        assert box["height"] >= 24, control


def test_nothing_is_fetched_from_elsewhere(browser: Browser, served: Served) -> None:
    browser.find("#suggestions button").click()
    browser.wait(lambda: len(browser.messages(1)) == 2)
    events = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 10
    here = (served.address, "data:", "blob:", "chrome")
    assert [address for address in asked if not address.startswith(here)] == []


def test_visitors_wait_their_turn(browser: Browser, served: Served) -> None:
    clients = [Client(served.address) for _ in range(6)]
    for client in clients:
        client.do(None, "load", [])
        body = {"data": ["What is this?", None], "fn_index": client.events["ask", "click"]}
        client.http.post("/gradio_api/queue/join", json={**body, "session_hash": client.session})
    browser.ask("What is this?")
    browser.wait(lambda: len(browser.messages(1)) == 2 and browser.messages(1)[1])
