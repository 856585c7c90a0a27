"""The page in a real Chromium: each of its abilities, by mouse and keyboard; and axe-core in both schemes and at phone width."""

import shutil

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(browser, running):
    page = browser.new_page()
    page.set_default_timeout(60_000)
    problems = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    outside = []
    page.on("request", lambda request: outside.append(request.url) if running.url not in request.url else None)
    page.goto(running.url)
    page.get_by_text("Runs here:").wait_for()
    yield page
    assert [p for p in problems if "status of 400" not in p] == []  # a refusal, which the page shows, is one of the tests
    assert not [url for url in outside if not url.startswith("data:")]


def open_tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def done(page):
    page.get_by_text("Done.").wait_for()
    assert page.locator("#problem").is_hidden()


def test_forward_colours_tokens_offers_others_and_goes_on_from_one(page):
    open_tab(page, "Forward")
    page.fill("#f-text", "the king fears the river")
    page.fill("#f-count", "5")
    page.click("#f-read")
    done(page)
    tokens = page.locator("#f-tokens button")
    assert "".join(tokens.all_text_contents()).strip() == "the king fears the river"
    assert all(cls.startswith("p") for cls in tokens.evaluate_all("all => all.map((b) => b.className)"))
    tokens.nth(2).focus()
    page.keyboard.press("Enter")
    others = page.locator("#f-others .bars button")
    assert others.count() == 8
    others.nth(3).click()
    page.get_by_text("Continuing").wait_for(state="hidden")
    done(page)
    assert not page.input_value("#f-text").startswith("the king fears")
    assert page.locator("#f-tokens button").count() > 3


def test_hidden_words_are_filled_at_once_and_in_steps(page):
    open_tab(page, "Both ways")
    page.fill("#b-text", "the king fears the river.")
    words = page.locator("#b-words button")
    words.nth(1).click()
    assert words.nth(1).get_attribute("aria-pressed") == "true"
    page.click("#b-once")
    done(page)
    assert page.locator("#b-found .bars li").count() == 6
    page.click("#b-show")
    words.nth(1).click()
    words.nth(2).focus()
    page.keyboard.press("Space")
    page.click("#b-steps")
    page.get_by_text("Step 2").wait_for()
    steps = page.locator("#b-found h3").all_text_contents()
    assert [step.split(":")[0] for step in steps] == ["Step 1", "Step 2"]


def test_the_dial_writes_in_blocks_of_its_size(page):
    open_tab(page, "The dial")
    page.fill("#d-text", "the king")
    slider = page.locator("#d-block")
    slider.focus()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    smallest = page.text_content("#d-size")
    page.keyboard.press("ArrowRight")
    assert int(page.text_content("#d-size")) > int(smallest)
    page.click("#d-go")
    done(page)
    assert page.text_content("#d-out").startswith("the king")
    assert "parts" in page.text_content("#d-figures")
    slider.focus()
    page.keyboard.press("ArrowLeft")  # turned, it writes the same prompt again, in blocks of the new size
    page.locator("#d-figures", has_text=f"blocks of {smallest}").wait_for()
    done(page)
    assert page.text_content("#d-out").startswith("the king")


def test_two_sentences_are_scored_by_every_run(page):
    open_tab(page, "Score")
    page.click("#s-go")
    done(page)
    rows = page.locator("#s-table tbody tr")
    rules = [row.split("\t")[1] for row in rows.all_inner_texts()]
    assert sorted(rules) == ["bound", "causal", "causal", "pll", "pll_word"]


def test_search_and_chat(page):
    open_tab(page, "Search")
    page.fill("#q-query", "The king is dead.")
    page.click("#q-go")
    done(page)
    assert "The king is dead." in page.locator("#q-found li").first.text_content()
    open_tab(page, "Chat")
    page.fill("#c-text", "the king?")
    page.keyboard.press("Enter")
    page.get_by_text("Answering").wait_for(state="hidden")
    done(page)
    assert page.locator("#c-log p").count() == 2


def test_tabs_are_reached_by_the_keyboard_and_errors_are_shown(page):
    open_tab(page, "Chat")
    page.keyboard.press("ArrowRight")
    assert page.locator("#forward").is_visible()
    page.fill("#f-text", "the king " * 60)
    page.click("#f-read")
    assert "tokens" in page.locator("#problem:visible").text_content()
    page.fill("#f-text", "the king")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1100), ("dark", 390)])
def test_axe_finds_nothing_serious_and_nothing_is_cut_off(browser, running, scheme, width):
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
    ).Axe()
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}, bypass_csp=True)
    page = context.new_page()
    page.goto(running.url)
    page.get_by_text("Runs here:").wait_for()
    page.fill("#f-text", "the king fears the river")
    page.click("#f-read")
    done(page)
    page.locator("#f-tokens button").nth(1).click()
    for name in ("Forward", "Both ways", "The dial", "Score", "Search", "Chat"):
        open_tab(page, name)
        found = axe.run(page).response["violations"]
        assert not [v["id"] for v in found if v["impact"] in ("serious", "critical")], found
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()
