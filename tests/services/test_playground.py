"""The playground in a real browser: Debian's Chromium, a running service, real pictures."""

import base64
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.services.exports import export, gray_png
from tests.services.running import Folder, Service, bit_serve

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
SLOW_MS = 15_000
OWN = ("blob:", "data:")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Browser, lamps: Service) -> Iterator[Page]:
    """The playground over `lamps`, whose challenger answers the other way round. Nothing may go to another host, nothing
    may be forbidden by the page's own policy, and no script may fail.
    """
    context = browser.new_context(base_url=lamps.url, permissions=["camera"])
    page = context.new_page()
    page.set_default_timeout(SLOW_MS)
    said: list[str] = []
    page.on("console", lambda told: said.append(told.text) if told.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda sent: None if sent.url.startswith((*OWN, lamps.url)) else said.append(sent.url))
    page.goto("/")
    expect(page.locator("#tenant option")).to_have_count(2, timeout=SLOW_MS)
    yield page
    context.close()
    assert said == []


def choose(page: Page, value: int = 230) -> None:
    page.set_input_files("#file", {"name": "lamp.png", "mimeType": "image/png", "buffer": gray_png(value)})


def test_a_picture_is_answered_by_champion_and_challenger(page: Page) -> None:
    choose(page)
    answers = page.locator("#answer > div")
    expect(answers).to_have_count(2, timeout=SLOW_MS)
    expect(answers.nth(0).locator(".best")).to_have_text("bright")
    expect(answers.nth(1).locator(".best")).to_have_text("dark")
    expect(answers.nth(1).locator(".best")).to_have_class("best differs")
    expect(answers.nth(0).locator(".row")).to_have_count(2)
    expect(answers.nth(0).locator(".facts")).to_contain_text("infer")
    widths = [bar.bounding_box()["width"] for bar in answers.nth(0).locator(".bar > div").all()]  # type: ignore[index]
    assert widths[0] > widths[1]
    page.locator("#compare").uncheck()
    expect(answers).to_have_count(1, timeout=SLOW_MS)


def test_tenant_and_version_are_chosen_and_the_card_tells_of_them(page: Page) -> None:
    choose(page)
    page.select_option("#version", "challenger")
    expect(page.locator("#answer > div").nth(0).locator(".best")).to_have_text("dark", timeout=SLOW_MS)
    expect(page.locator("#card")).to_contain_text("(challenger), in service since")
    for told in ("100.0 % on its test pictures", "2: dark, bright", "passed, off by", "Run (MLflow)"):
        expect(page.locator("#card")).to_contain_text(told)
    page.select_option("#tenant", "movers")
    expect(page.locator("#compare-label")).to_be_hidden(timeout=SLOW_MS)
    expect(page.locator("#answer > div")).to_have_count(1, timeout=SLOW_MS)


def test_why_lays_the_activation_map_over_the_picture(page: Page) -> None:
    choose(page)
    expect(page.locator("#why")).to_be_enabled(timeout=SLOW_MS)
    page.click("#why")
    expect(page.locator("#why-note")).to_contain_text("champion saw as “bright”", timeout=SLOW_MS)
    assert (page.get_attribute("#preview", "src") or "").startswith("data:image/png")
    page.click("#why")
    expect(page.locator("#why-note")).to_be_hidden(timeout=SLOW_MS)
    assert (page.get_attribute("#preview", "src") or "").startswith("blob:")


@pytest.mark.parametrize("event", ["paste", "drop"])
def test_a_picture_is_pasted_or_dropped(page: Page, event: str) -> None:
    page.evaluate(
        """([kind, encoded]) => {
            const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "lamp.png", { type: "image/png" }));
            const made = kind === "paste" ? new ClipboardEvent("paste", { clipboardData: data })
                                          : new DragEvent("drop", { dataTransfer: data, cancelable: true });
            document.dispatchEvent(made);
        }""",
        [event, base64.b64encode(gray_png(10)).decode()],
    )
    expect(page.locator("#answer .best").first).to_have_text("dark", timeout=SLOW_MS)


def test_the_camera_takes_a_picture(page: Page) -> None:
    page.click("#camera")
    page.click("#shoot")
    expect(page.locator("#answer .row").first).to_be_visible(timeout=SLOW_MS)
    expect(page.locator("#camera-dialog")).to_be_hidden()


def test_the_keyboard_alone_is_enough(page: Page) -> None:
    # Asked for long before Enter: the browser must know by then that somebody waits for the dialog.
    with page.expect_file_chooser() as chooser:
        for wanted in ("tenant", "version", "key-open", "file"):
            page.keyboard.press("Tab")
            assert page.evaluate("document.activeElement.id") == wanted
        page.keyboard.press("Enter")
    chooser.value.set_files({"name": "lamp.png", "mimeType": "image/png", "buffer": gray_png(230)})
    expect(page.locator("#answer .best").first).to_have_text("bright", timeout=SLOW_MS)
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(page.locator("#why-note")).to_be_visible(timeout=SLOW_MS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_without_scrolling_sideways(page: Page, scheme: str) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    choose(page)
    expect(page.locator("#answer .row").first).to_be_visible(timeout=SLOW_MS)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for control in page.locator("header select, header button, main .actions button").all():
        box = control.bounding_box()
        assert box is not None
        assert box["height"] >= 40, "large enough for a finger"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 19, 24)"
    assert dark == (scheme == "dark")


def test_a_key_is_asked_for_where_one_is_needed(browser: Browser, tmp_path: Path) -> None:
    keys = tmp_path / "tenants.json"
    keys.write_text(json.dumps({"lamps": {"keys": [hashlib.sha256(b"secret").hexdigest()]}}))
    store = Folder(tmp_path)
    store.publish("lamps", export())
    with bit_serve(store, tmp_path, "--tenants", str(keys)) as service:
        page = browser.new_page(base_url=service.url)
        page.goto("/")
        expect(page.locator("#key-form")).to_be_visible(timeout=SLOW_MS)
        page.fill("#key", "secret")
        page.keyboard.press("Enter")
        expect(page.locator("#tenant option")).to_have_count(1, timeout=SLOW_MS)
        choose(page)
        expect(page.locator("#answer .best")).to_have_text("bright", timeout=SLOW_MS)
        page.close()


def test_what_is_no_picture_is_told_as_the_service_tells_it(browser: Browser, lamps: Service) -> None:
    page = browser.new_page(base_url=lamps.url)
    page.goto("/")
    expect(page.locator("#tenant option")).to_have_count(2, timeout=SLOW_MS)
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    expect(page.locator("#answer .error").first).to_contain_text("not a picture", timeout=SLOW_MS)
    page.close()
