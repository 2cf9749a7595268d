"""The demo in a real browser: Debian's chromium, driven by playwright."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_demo_server import HOSTILE, hostile_run, serving

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.newest,
    pytest.mark.demo,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="there is no chromium"),
]
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
CAT, COFFEE = (str(ROOT / "examples" / name) for name in ("cat.jpg", "coffee.jpg"))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The demo of two runs of own classes: tiny ones, which are quick."""
    folder = tmp_path_factory.mktemp("runs")
    with serving([str(hostile_run(folder / f"mine{number}", number)) for number in range(2)]) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


class Opened:
    """The demo in a tab of its own, and what that asked for."""

    def __init__(self, browser: Any, address: str, **options: Any):
        self.address, self.asked = address, list[str]()
        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(60_000)
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.goto(address)
        self.tab.get_by_role("heading", name="What does the network see?").wait_for()

    def drop(self, *photos: Any) -> None:
        self.tab.locator("input[type=file]").first.set_input_files(list(photos))

    def seen(self, text: str) -> None:
        """Waits until the page says so."""
        self.tab.get_by_text(text).first.wait_for()

    @property
    def width(self) -> int:
        return int(self.tab.evaluate("document.documentElement.scrollWidth"))

    @property
    def elsewhere(self) -> list[str]:
        return [url for url in self.asked if not url.startswith((self.address, "data:", "blob:"))]


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Opened]:
    found = Opened(browser, address)
    yield found
    found.context.close()


def test_a_person_drops_photos_and_moves_the_size(opened: Opened):
    opened.drop(CAT, COFFEE)
    opened.seen("What the network sees: 48 x 48 pixels")
    tab = opened.tab
    assert tab.get_by_role("meter").count() == 6  # three classes of each model
    for image in ("The crop that the network is shown", "Class-activation map"):
        shown = tab.get_by_alt_text(image)
        assert shown.count() == 2
        for each in shown.all():
            each.wait_for()
            assert each.evaluate("image => image.decode().then(() => image.naturalWidth)") == 48
    tab.locator("svg.marks, canvas.marks").nth(1).wait_for()  # both plots
    crop = tab.get_by_alt_text("The crop that the network is shown").first.get_attribute("src")
    slider = tab.locator("input[type=range]").first
    slider.focus()
    slider.press("ArrowRight")
    opened.seen("What the network sees: 64 x 64 pixels")
    tab.get_by_role("button", name="Thumbnail 1 of 2").click()
    tab.wait_for_function(
        "before => document.querySelector('[alt^=\"The crop\"]').src !== before && !document.querySelector('.pending')",
        arg=crop,
    )
    assert opened.elsewhere == []


def test_another_model_brings_its_own_sizes(opened: Opened):
    opened.drop(CAT)
    opened.seen("What the network sees: 48 x 48 pixels")
    opened.seen("Two models, each at its own size.")
    tab = opened.tab
    tab.get_by_label("Second model").click()
    tab.get_by_role("option", name="lite0").click()
    opened.seen("What the network sees: 256 x 256 pixels")
    opened.seen("EfficientNet-Lite0, trained at 224 pixels, not tuned by FixRes")
    slider = tab.locator("input[type=range]").nth(1)
    assert (slider.get_attribute("min"), slider.get_attribute("max")) == ("96", "384")
    slider.focus()
    slider.press("End")
    opened.seen("What the network sees: 384 x 384 pixels")
    tab.get_by_label("First model").click()
    tab.get_by_role("option", name="lite0").click()
    opened.seen("lite0 has no FixRes weights: both sides are the same network.")


def test_a_file_that_is_no_image_is_told_of(opened: Opened, tmp_path: Path):
    opened.drop({"name": "holiday.jpg", "mimeType": "image/jpeg", "buffer": b"no image"})
    opened.seen("holiday.jpg: The image of 8 bytes is not an image, or of a kind that is not read: convert it to PNG.")
    assert opened.tab.get_by_role("meter").count() == 0
    opened.drop(CAT)  # and the page goes on
    opened.seen("What the network sees: 48 x 48 pixels")
    assert opened.tab.get_by_text("holiday.jpg: The image").count() == 0


def test_the_keyboard_alone_will_do(opened: Opened):
    tab = opened.tab
    tab.on("filechooser", lambda chooser: chooser.set_files([CAT, COFFEE]))

    def tabbed_to(found: str) -> None:
        """Presses Tab until the focus is there."""
        for _ in range(40):
            tab.keyboard.press("Tab")
            if tab.evaluate(f"(focused => {found})(document.activeElement)"):
                return
        raise AssertionError(found)

    tabbed_to("focused.closest('button')?.ariaLabel?.includes('pload')")
    tab.keyboard.press("Enter")
    opened.seen("What the network sees: 48 x 48 pixels")
    tabbed_to("focused.ariaLabel === 'Thumbnail 1 of 2'")
    tab.keyboard.press("Enter")
    tabbed_to("focused.type === 'range'")
    tab.keyboard.press("ArrowRight")
    opened.seen("What the network sees: 64 x 64 pixels")


def test_a_run_shows_what_it_mistakes(opened: Opened):
    tab = opened.tab
    tab.get_by_role("tab", name="Mistakes of mine0").click()
    tab.frame_locator("iframe").get_by_role("heading", name="Mistakes").wait_for()
    assert "scripted" not in tab.frame_locator("iframe").locator("body").inner_text()
    tab.get_by_role("button", name="3 classes").click()
    opened.seen(HOSTILE[0])
    assert opened.elsewhere == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_one_way(browser: Any, address: str, scheme: str):
    opened = Opened(browser, address, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    assert opened.width == 390
    opened.drop(CAT)
    opened.seen("What the network sees: 48 x 48 pixels")
    opened.tab.locator("svg.marks, canvas.marks").nth(1).wait_for()
    assert opened.width == 390
    dark = opened.tab.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).reduce((all, one) => all + +one, 0) < 200"
    )
    assert dark == (scheme == "dark")
    opened.context.close()
