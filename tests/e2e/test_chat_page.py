"""The chat page in a headless Chromium, over fake engines on a real port. Skips where Chromium is not installed."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rayswift.models.loading import load_tokenizer
from rayswift.serving import auth
from rayswift.serving.engine import Embedding, FakeEngine
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.versions import version_of
from tests import page_cases
from tests.page_cases import Page, export_of, page_of

pytest.importorskip("selenium", reason="selenium is not installed; make setup")
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on PATH; make browser"),
]
KEY = "a-key-for-tests-0123"
EVIL = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script><b>bold</b>'
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--window-size=1200,800",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # nothing but the endpoint can be reached
)  # fmt: skip


class Browser:
    """A tab, read and used as a person would."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, page: Page) -> None:
        self.driver.get_log("browser")  # what was said before is another test's
        self.driver.get(page.url)

    def all(self, css: str) -> list[WebElement]:
        return [found for found in self.driver.find_elements(By.CSS_SELECTOR, css) if found.is_displayed()]

    def one(self, css: str) -> WebElement:
        """The one element that is visible, waited for."""
        return self.until(lambda: found[0] if len(found := self.all(css)) == 1 else None)

    def texts(self, css: str) -> list[str]:
        return [found.get_property("textContent") for found in self.all(css)]

    def until(self, condition: Callable[[], Any]) -> Any:
        gone = (StaleElementReferenceException,)  # replaced while it was looked at
        return WebDriverWait(self.driver, 20, poll_frequency=0.02, ignored_exceptions=gone).until(lambda _: condition())

    def until_texts(self, css: str, expected: list[str]) -> None:
        self.until(lambda: self.texts(css) == expected)

    def say(self, text: str) -> None:
        self.one("#prompt").send_keys(text, Keys.ENTER)

    def complaints(self) -> list[str]:
        """What the console has: errors, and what the policy forbade."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    # With both paths given, selenium looks for no driver and asks nobody.
    driver = Chrome(options=options, service=ChromeService(executable_path=str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver: Chrome) -> Iterator[Browser]:
    found = Browser(driver)
    yield found
    shots = os.environ.get("RAYSWIFT_SHOTS")
    if shots:
        name = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0]
        driver.save_screenshot(str(Path(shots) / f"{name}.png"))
    driver.get("about:blank")


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return load_tokenizer(str(tiny_model_dir))


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> PromptBuilder:
    return PromptBuilder(tokenizer)


def engine(*pieces: str, held: bool = False) -> FakeEngine:
    return FakeEngine(pieces, max_model_len=4096, gate=asyncio.Event() if held else None)


def sent(page: Page, name: str, tokenizer: Any) -> str:
    """The prompt that an engine was given last."""
    return str(tokenizer.decode(page.engines[name].seen[-1].prompt.ids))


def test_an_answer_is_shown_as_it_grows(browser: Browser, prompts: PromptBuilder) -> None:
    with page_of({"demo": engine("Hello", ", ", "wörld", "!", held=True)}, prompts) as page:
        browser.open(page)
        browser.say("Who is there?")
        browser.until_texts(".assistant .text", ["Hello"])
        assert browser.texts(".user .text") == ["Who is there?"]
        assert [button.text for button in browser.all("#composer button")] == ["Stop"]
        assert browser.one(".log").get_attribute("aria-busy") == "true"
        page.open_gate("demo")
        browser.until_texts(".assistant .text", ["Hello, wörld!"])
        figures = browser.until(lambda: found[0] if (found := browser.texts(".figures")) and "4 tok" in found[0] else 0)
        assert figures.startswith("4 tokens · ")
        assert figures.endswith(" tokens/s · finished (stop)")
        browser.until(lambda: [button.text for button in browser.all("#composer button")] == ["Send"])
        assert browser.one(".log").get_attribute("aria-busy") == "false"
        assert browser.complaints() == []


def test_earlier_turns_and_settings_are_sent(browser: Browser, prompts: PromptBuilder) -> None:
    with page_of({"demo": engine("an", "swer")}, prompts) as page:
        browser.open(page)
        browser.one("#settings summary").click()
        browser.one("#system").send_keys("Be brief.")
        browser.one("#temperature").send_keys("0")
        browser.one("#max-tokens").send_keys("1")
        browser.one("#prompt").send_keys("first", Keys.SHIFT, Keys.ENTER, Keys.NULL, "line", Keys.ENTER)
        browser.until_texts(".figures", ["1 token · cut off (length)"])
        assert browser.texts(".user .text") == ["first\nline"]
        browser.until(lambda: browser.all("#send"))
        browser.say("second")
        browser.until(lambda: len(browser.texts(".figures")) == 2 and browser.all("#send"))
        turns = [("system", "Be brief."), ("user", "first\nline"), ("assistant", "an"), ("user", "second")]
        asked = prompts.turns([{"role": role, "content": text} for role, text in turns])
        assert list(page.engines["demo"].seen[-1].prompt.ids) == asked
        assert page.engines["demo"].seen[-1].sampling.temperature == 0
        browser.one("#new").click()
        assert browser.texts("article") == []
        browser.one("#temperature").send_keys("9")
        browser.say("third")
        assert (len(page.engines["demo"].seen), browser.texts("article")) == (2, [])  # 09 is more than 2
        assert browser.complaints() == []


def test_stop_frees_the_engine_and_keeps_what_was_said(
    browser: Browser, prompts: PromptBuilder, tokenizer: Any
) -> None:
    with page_of({"demo": engine("Well", " then", held=True)}, prompts) as page:
        browser.open(page)
        for number, stop in enumerate((lambda: browser.one("#stop").click(),
                                       lambda: browser.one("#prompt").send_keys(Keys.ESCAPE)), 1):  # fmt: skip
            browser.say("go")
            browser.until_texts(".assistant .text", ["Well"] * number)
            assert page.engines["demo"].running == 1
            stop()
            browser.until(lambda: page.engines["demo"].running == 0)
            browser.until_texts(".figures", ["~1 token · stopped by you"] * number)
            browser.until(lambda: browser.all("#send"))
        assert "Well" in sent(page, "demo", tokenizer)
        assert browser.complaints() == []


def test_two_models_side_by_side(browser: Browser, prompts: PromptBuilder, tokenizer: Any, tmp_path: Path) -> None:
    folders = {
        "new": export_of(tmp_path / "new", quantizer="gptq"),
        "old": export_of(tmp_path / "old", checkpoint_step=10),
        "plain": tmp_path,
    }
    engines = {"new": engine("A", "1"), "old": engine("B", "2"), "plain": engine("C")}
    engines["vectors"] = FakeEngine(embedding=Embedding(8))
    with page_of(engines, prompts, folders) as page:
        browser.open(page)
        browser.say("one")
        browser.until_texts(".assistant .text", ["A1"])
        browser.until(lambda: browser.all("#send"))
        browser.one("#compare").click()
        assert browser.texts(".assistant .text") == ["A1", "A1"]  # both go on from what was said
        browser.say("two")
        browser.until_texts(".assistant .text", ["A1", "A1", "A1", "B2"])
        assert browser.texts(".column + .column .assistant h2") == ["new", "old"]
        assert [sent(page, name, tokenizer).count("A1") for name in ("new", "old")] == [1, 1]
        browser.until(lambda: browser.all("#send"))

        summaries = browser.texts(".lineage summary")
        assert summaries == [f"Version {version_of(folders[name])}" for name in ("new", "old")]
        browser.all(".lineage summary")[0].click()
        shown = dict(zip(browser.texts(".lineage dt"), browser.texts(".lineage dd"), strict=True))
        assert shown == {
            "Base": f"base-8b · {'b' * 12}", "Method": "sft", "Run": "step 50", "Job": "c" * 12, "Quantizer": "gptq",
            "Type": "bfloat16",
        }  # fmt: skip
        assert "somebody" not in browser.driver.page_source

        offered = Select(browser.all("select")[1])
        assert [option.text for option in offered.options] == ["new", "old", "plain"], "those that talk"
        offered.select_by_visible_text("plain")
        assert browser.texts(".lineage summary")[1] == "No export: where it comes from is not known"
        browser.say("three")
        browser.until_texts(".assistant .text", ["A1", "A1", "A1", "A1", "B2", "C"])
        assert browser.complaints() == []


def test_a_version_beside_the_live_one_is_asked_for_by_its_id(
    browser: Browser, prompts: PromptBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [{"version": "0123456789ab"}, {"version": "ba9876543210", "base": "older"}]
    monkeypatch.setattr(page_cases, "lineage_of", lambda _: {**versions[0], "versions": versions})
    with page_of({"demo": engine("hi")}, prompts) as page:
        browser.open(page)
        browser.one("#prompt")
        browser.one("#compare").click()
        assert [option.text for option in Select(browser.all("select")[1]).options] == ["demo", "demo · ba9876543210"]
        assert browser.texts(".lineage summary") == ["Version 0123456789ab", "Version ba9876543210"]
        browser.say("hello")
        browser.until(lambda: browser.all("#send") and len(page.versions) == 2)
        assert set(page.versions) == {None, "ba9876543210"}  # in either order


def test_a_key_is_asked_for_and_kept_in_this_tab(browser: Browser, prompts: PromptBuilder) -> None:
    with page_of({"demo": engine("hi")}, prompts, api_key_sha256=(auth.fingerprint(KEY),)) as page:
        browser.open(page)
        field = browser.one("#key")
        assert browser.all("#columns") == browser.all("#composer") == []
        assert browser.driver.switch_to.active_element == field
        field.send_keys("not-the-key", Keys.ENTER)
        browser.until_texts("#notice", ["This key is refused."])
        browser.one("#key").send_keys("nö key", Keys.ENTER)
        browser.until_texts("#notice", ["A key is printable ASCII without spaces."])
        browser.one("#key").clear()
        browser.one("#key").send_keys(KEY, Keys.ENTER)
        browser.say("hello")
        browser.until_texts(".assistant .text", ["hi"])
        assert all("401" in complaint for complaint in browser.complaints())
        stored = "return [localStorage.length, document.cookie, document.querySelector('#key').value]"
        assert browser.driver.execute_script(stored) == [0, "", ""]

        browser.driver.refresh()
        browser.one("#prompt")
        browser.one("#forget").click()
        browser.one("#key")
        assert browser.driver.execute_script("return sessionStorage.length") == 0
        assert all("401" in complaint for complaint in browser.complaints())


def test_text_stays_text(browser: Browser, prompts: PromptBuilder, tmp_path: Path) -> None:
    folder = export_of(tmp_path / "evil", base=EVIL, method=EVIL)
    with page_of({"demo": engine(EVIL[:9], EVIL[9:])}, prompts, {"demo": folder}) as page:
        browser.open(page)
        browser.one("#settings summary").click()
        browser.one("#system").send_keys(EVIL)
        browser.say(EVIL)
        browser.until_texts(".text", [EVIL, EVIL])
        browser.one("#compare").click()
        browser.until_texts(".text", [EVIL] * 4)
        browser.all(".lineage summary")[0].click()
        assert EVIL in browser.texts(".lineage dd")
        assert browser.driver.execute_script("return window.hacked === undefined")
        assert browser.driver.find_elements(By.CSS_SELECTOR, "main img, main script, main b") == []
        assert browser.complaints() == []


def test_the_policy_is_in_force(browser: Browser, prompts: PromptBuilder) -> None:
    """What the other tests hold to be no violation would be seen: markup that came in all the same does not run."""
    with page_of({"demo": engine("hi")}, prompts) as page:
        browser.open(page)
        browser.one("#prompt")
        browser.driver.execute_script(
            "document.body.insertAdjacentHTML('beforeend', arguments[0]);"
            "const made = document.createElement('script'); made.textContent = 'window.hacked = 1';"
            "document.body.append(made); fetch('http://127.0.0.2:1/').catch(() => {});", EVIL
        )  # fmt: skip
        complaints = browser.until(lambda: found if len(found := browser.complaints()) >= 3 else None)
        assert all("Content Security Policy" in one for one in complaints if "404" not in one)
        assert browser.driver.execute_script("return window.hacked === undefined")


def test_what_the_endpoint_refuses_is_told_and_can_be_asked_again(
    browser: Browser, prompts: PromptBuilder, tokenizer: Any
) -> None:
    with page_of({"demo": engine("hi")}, prompts, max_body_bytes=1000) as page:
        browser.open(page)
        browser.one("#prompt")
        long = "long " * 300
        browser.driver.execute_script("document.getElementById('prompt').value = arguments[0]", long)
        browser.one("#send").click()
        browser.until(lambda: "larger than" in "".join(browser.texts(".failure")))
        browser.until(lambda: browser.one("#prompt").get_property("value") == long.strip())
        browser.one("#prompt").clear()
        browser.say("short")
        browser.until_texts(".assistant .text", ["", "hi"])
        assert "long" not in sent(page, "demo", tokenizer)
        assert all("413" in complaint for complaint in browser.complaints())


def test_an_endpoint_that_has_gone_is_told(browser: Browser, prompts: PromptBuilder) -> None:
    with page_of({"demo": engine("hi")}, prompts) as page:
        browser.open(page)
        browser.one("#prompt")
    browser.say("anyone?")
    browser.until_texts(".failure", ["the endpoint does not answer"])
    assert browser.one("#prompt").get_property("value") == "anyone?"


def test_every_control_has_a_name_and_fits_a_narrow_screen(browser: Browser, prompts: PromptBuilder) -> None:
    browser.driver.set_window_size(500, 700)
    try:
        with page_of({"demo": engine("word " * 50, "x" * 500)}, prompts) as page:
            browser.open(page)
            browser.one("#compare").click()
            browser.one("#settings summary").click()
            browser.say("hello")
            browser.until(lambda: len(browser.texts(".figures")) == 2 and browser.all("#send"))
            for control in browser.all("button, input, select, textarea, [role=log], section"):
                assert control.accessible_name, control.get_attribute("outerHTML")
            too_wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert browser.driver.execute_script(too_wide) <= 0
            assert browser.complaints() == []
    finally:
        browser.driver.set_window_size(1200, 800)
