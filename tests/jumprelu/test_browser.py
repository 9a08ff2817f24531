"""The pages in a real Chromium, from file://: what they do, and that they run, ask for and complain
of nothing else.

Without a Chromium (see chromium.py) these tests are skipped.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from chromium import find
from latents import FIRST, HOSTILE, hostile_contexts, hostile_lm, made_contexts, random_sae
from models import D_MODEL, tiny_lm

from jumprelu.latents.pages import SHOWN, Explanation, write_pages
from jumprelu.latents.rating import Item, write_study
from jumprelu.latents.verdicts import read_key, score

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs the package playwright (in the extra dev)"
)
expect = playwright.expect
expect.set_options(timeout=30_000)  # on cores that others use, five seconds may pass
CHROMIUM = find()
WITHOUT = "needs Chromium: python tests/chromium.py says how to get it"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=WITHOUT)

M = 60
WIDE, NARROW = {"width": 1200, "height": 800}, {"width": 360, "height": 640}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        sandbox = (
            [] if os.geteuid() else ["--no-sandbox"]
        )  # Chromium refuses to be sandboxed as root
        browser = driver.chromium.launch(
            executable_path=CHROMIUM.path, env={**os.environ, **CHROMIUM.env}, args=sandbox
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def latents_page(tmp_path_factory) -> Path:
    texts = {i: Explanation(f"Pattern p{i}", (i * 7 % 20) / 20) for i in range(10, 40)}
    texts[4] = Explanation("</script><img src=x onerror=window.hacked=9> \u202e", None)
    path = tmp_path_factory.mktemp("pages") / "latents.html"
    return write_pages(
        path,
        random_sae(D_MODEL, M),
        hostile_lm(),
        hostile_contexts(M),
        texts,
        title="<b>latents</b>",
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    items = [
        Item(0, n, "jumprelu" if n < 3 else "gated", "resid_post", 1, 20.0, 20.0)
        for n in (2, 7, 0, 1)
    ]
    return write_study(
        tmp_path_factory.mktemp("study"),
        hostile_lm(),
        {"secret": random_sae(D_MODEL, M)},
        items,
        {0: hostile_contexts(M)},
        title="<i>study</i>",
    )


@contextmanager
def opened(browser, path: Path, address: str = "", script: str = "", **options) -> Iterator:
    """The page in a context of its own. At the end, nothing else was requested, logged or run."""
    context = browser.new_context(**{"viewport": WIDE, **options})
    context.add_init_script(script)
    trouble: list[str] = []
    own = path.as_uri(), "blob:", "data:"
    context.on(
        "request", lambda request: request.url.startswith(own) or trouble.append(request.url)
    )
    context.on("console", lambda message: trouble.append(message.text))
    context.on("weberror", lambda error: trouble.append(str(error.error)))
    try:
        page = context.new_page()
        page.goto(path.as_uri() + address)
        yield page
        assert page.evaluate("window.hacked") is None
        assert (
            page.evaluate(
                "document.querySelectorAll('img, iframe, object, base, script:not([type])').length"
            )
            == 1
        )
        assert trouble == []
    finally:
        context.close()


def numbers(page) -> list[int]:
    """The latents in the list, as far as they are drawn."""
    return [int(text[1:]) for text in page.locator(".row b").all_text_contents()]


def active(page) -> str:
    return page.locator('.row[aria-selected="true"] b').text_content()


def scrolls_sideways(page) -> bool:
    return page.evaluate(
        "document.documentElement.scrollWidth > innerWidth || "
        "[...document.querySelectorAll('main, #detail, #item, #list')]"
        ".some(e => e.scrollWidth > e.clientWidth)"
    )


# ---- latents


def test_the_list_is_sorted_both_ways(browser, latents_page):
    with opened(browser, latents_page) as page:
        assert (
            numbers(page)[:3] == [0, 1, 2] and len(numbers(page)) < M
        )  # only what is seen is drawn
        page.select_option(
            "#sort", "threshold"
        )  # thresholds rise with the number, encoder norms and frequencies fall
        assert (
            numbers(page)[:3] == [59, 58, 57]
            and "threshold 1" in page.locator(".row").first.text_content()
        )
        page.click("#direction")
        assert numbers(page)[:3] == [0, 1, 2]
        page.select_option("#sort", "encoder")
        assert numbers(page)[:3] == [0, 1, 2]
        page.select_option("#sort", "score")
        best = sorted(range(10, 40), key=lambda i: (-(i * 7 % 20), i))
        assert numbers(page)[:10] == best[:10]
        page.focus("#list")
        page.keyboard.press("End")
        assert active(page) == "#59" and numbers(page)[-3:] == [
            57,
            58,
            59,
        ]  # without a score: last, by number


def test_search_finds_explanations_tokens_and_numbers(browser, latents_page):
    contexts = hostile_contexts(M)
    fires = [i for i in range(M) if (contexts.tokens[i][contexts.acts[i] > 0] == 77).any()]
    with opened(browser, latents_page) as page:
        page.fill("#search", "PATTERN p2")
        expect(page.locator("#found")).to_have_text("10 of 60 latents")
        assert numbers(page) == list(range(20, 30))
        page.fill("#search", "w77")
        expect(page.locator("#found")).to_have_text(f"{len(fires)} of 60 latents")
        assert numbers(page) == fires and 0 < len(fires) < M
        page.fill("#search", "#41")
        assert numbers(page) == [41]
        page.fill("#search", "<script>")
        scripts = torch.tensor([FIRST + k for k, word in enumerate(HOSTILE) if "<script>" in word])
        fires = [
            i
            for i in range(M)
            if torch.isin(contexts.tokens[i][contexts.acts[i] > 0], scripts).any()
        ]
        expect(page.locator("#found")).to_have_text(f"{len(fires)} of 60 latents")
        assert 0 < len(fires) < M
        page.fill("#search", "nowhere to be found")
        expect(page.locator("#found")).to_have_text("0 of 60 latents")
        page.keyboard.press("Enter")  # nothing to open
        assert "#" not in page.url
        page.keyboard.press("Escape")
        expect(page.locator("#found")).to_have_text("60 latents")


def test_a_latent_shows_its_contexts_as_they_are(browser, latents_page):
    contexts = hostile_contexts(M)
    with opened(browser, latents_page) as page:
        page.locator(".row", has_text="#5").first.click()
        expect(page.locator("#heading")).to_have_text("Latent 5")
        expect(page.locator(".context")).to_have_count(6)
        titles = [
            "Strongest",
            "Quantile 1 of 2 (strongest)",
            "Quantile 2 of 2 (weakest)",
            "Silent: the latent does not fire",
        ]
        assert page.locator(".group h3").all_text_contents() == titles
        tokens = page.locator(".tokens").first.locator("span")
        on = tokens.evaluate_all("spans => spans.map(s => s.classList.contains('on'))")
        assert on == (contexts.acts[5, 0] > 0).tolist()
        shares = tokens.evaluate_all(
            "spans => spans.map(s => parseFloat(s.style.getPropertyValue('--share')) || 0)"
        )
        assert shares == pytest.approx(
            [12 + 88 * a / 6 if a > 0 else 0 for a in contexts.acts[5, 0].tolist()], abs=1
        )
        assert (
            tokens.nth(4).get_attribute("class") == "on peak"
            and tokens.nth(4).get_attribute("title") == "about 6"
        )
        colours = tokens.evaluate_all(
            "spans => spans.map(s => getComputedStyle(s).backgroundColor)"
        )
        assert colours[4] == "color(srgb 1 0.623529 0.270588)" and len(set(colours)) == sum(on) + (
            not all(on)
        )
        assert page.locator(".histogram rect").count() == 32
        counts = page.locator(".histogram rect title").all_text_contents()
        assert [int(text.split(": ")[1]) for text in counts] == contexts.histogram[5].tolist()
        assert page.locator(".effects").nth(1).locator("li").count() == 10
        page.locator(".effects a").first.click()  # the nearest latent
        expect(page.locator("#heading")).not_to_have_text("Latent 5")
        page.go_back()
        expect(page.locator("#heading")).to_have_text("Latent 5")


def test_a_window_at_the_edge_and_an_empty_latent(browser, latents_page):
    with opened(browser, latents_page, "#latent=3") as page:
        expect(page.locator(".tokens").first.locator("span")).to_have_count(6)
        page.goto(latents_page.as_uri() + f"#latent={M - 1}")
        expect(page.locator(".context")).to_have_count(1)
        assert "fires on0 %" in page.locator("#facts").text_content()


def test_links_are_stable(browser, latents_page):
    with opened(browser, latents_page, "#latent=33") as page:
        expect(page.locator("#heading")).to_have_text("Latent 33")
        assert page.locator("#permalink").get_attribute(
            "href"
        ) == "#latent=33" and page.title().startswith("33 · ")
        assert active(page) == "#33"
        page.reload()
        expect(page.locator("#explanation")).to_have_text("Pattern p33")
        page.goto(latents_page.as_uri() + "#latent=999")
        expect(page.locator("#explanation")).to_have_text("This page does not have it.")
        page.goto(latents_page.as_uri() + "#latent=__proto__")
        expect(page.locator("#detail")).to_be_hidden()


def test_latents_by_keyboard(browser, latents_page):
    with opened(browser, latents_page) as page:
        page.keyboard.press("j")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("k")
        assert active(page) == "#1"
        assert page.locator("#list").get_attribute("aria-activedescendant") == "row-1"
        page.keyboard.press("/")
        expect(page.locator("#search")).to_be_focused()
        assert page.locator("#search").evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
        page.keyboard.type("p3 jk")
        assert page.locator("#search").input_value() == "p3 jk"
        page.fill("#search", "p3")
        page.keyboard.press("Enter")
        expect(page.locator("#heading")).to_have_text(f"Latent {numbers(page)[0]}")
        expect(page.locator("#list")).to_be_focused()
        page.keyboard.press("j")
        expect(page.locator("#heading")).to_have_text(f"Latent {numbers(page)[1]}")
        page.keyboard.press("Escape")
        expect(page.locator("#detail")).to_be_hidden()
        assert "#" not in page.url
        page.keyboard.press("Enter")
        expect(page.locator("#detail")).to_be_visible()
        for _ in range(12):  # every stop of the Tab key can be seen
            page.keyboard.press("Tab")
            focused = "document.activeElement"
            assert page.evaluate(
                f"{focused} === document.body"
                f" || getComputedStyle({focused}).outlineStyle === 'solid'"
            )


def test_hostile_tokens_are_text(browser, latents_page):
    with opened(browser, latents_page, "#latent=0") as page:
        shown = set(page.locator(".tokens span").all_text_contents())
        for word in HOSTILE:
            marks = {ord("\n"): "↵", ord("\t"): "→"} | {
                code: f"⟨{code:04X}⟩" for code in (0, 0x2028, 0x202E, 0x2066, 0x200B)
            }
            assert word.translate(marks) in shown
        expect(page.locator("#title")).to_have_text("<b>latents</b>")
        for number in (1, 2, 4):
            page.goto(latents_page.as_uri() + f"#latent={number}")
            expect(page.locator("#heading")).to_have_text(f"Latent {number}")
            expect(page.locator(".context").first).to_be_visible()
        expect(page.locator("#explanation")).to_have_text(
            "</script><img src=x onerror=window.hacked=9> ⟨202E⟩"
        )


def test_what_is_slipped_into_the_file_neither_runs_nor_loads(browser, latents_page, tmp_path):
    changed = tmp_path / "changed.html"
    image = "<img src='https://example.org/x.png' onerror='window.hacked=8'>"
    added = f"<script>window.hacked=8</script>{image}"
    changed.write_text(latents_page.read_text().replace("</body>", added + "</body>"))
    context = browser.new_context()
    said, asked = [], []
    context.on("console", lambda message: said.append(message.text))
    context.on("request", lambda request: asked.append(request.url))
    context.on(
        "requestfailed",
        lambda request: asked.remove(request.url) if request.failure == "csp" else None,
    )
    page = context.new_page()
    page.goto(changed.as_uri())
    expect(page.locator(".row").first).to_be_visible()
    assert page.evaluate("window.hacked") is None and asked == [changed.as_uri()]
    assert (
        sum("violates" in text for text in said) == 3
    )  # the script, the image and its handler: the watch above would see them
    with pytest.raises(playwright.Error, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<b>x</b>'")
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system_until_it_is_chosen(browser, latents_page, scheme):
    other = {"light": "dark", "dark": "light"}[scheme]
    with opened(browser, latents_page, color_scheme=scheme) as page:
        shade = "getComputedStyle(document.body).backgroundColor"
        first = page.evaluate(shade)
        page.emulate_media(color_scheme=other)
        expect(page.locator("html")).to_have_attribute("data-theme", other)
        assert page.evaluate(shade) != first
        page.click("#theme")
        page.reload()
        expect(page.locator("html")).to_have_attribute("data-theme", scheme)


def test_latents_on_a_phone(browser, latents_page):
    with opened(browser, latents_page, viewport=NARROW, has_touch=True, is_mobile=True) as page:
        assert not scrolls_sideways(page)
        expect(page.locator("#detail")).to_be_hidden()
        page.locator(".row").first.tap()
        expect(page.locator(".context").first).to_be_visible()
        expect(page.locator("#finder")).to_be_hidden()
        assert not scrolls_sideways(page)
        page.tap("#next")
        expect(page.locator("#heading")).to_have_text("Latent 1")
        page.goto(latents_page.as_uri() + "#latent=45")
        page.tap("#back")
        expect(page.locator('.row[aria-selected="true"]')).to_be_in_viewport()
        assert active(page) == "#45"


@pytest.fixture(scope="module")
def large_page(tmp_path_factory) -> Path:
    """16,384 latents, with as many contexts as the command line shows, of tokens as frequent as
    words are (Zipf)."""
    m, vocabulary = 2**14, 2**13
    slots = SHOWN["top"] + SHOWN["quantiles"] * SHOWN["per_quantile"] + SHOWN["negatives"]
    g = torch.Generator().manual_seed(0)
    share = torch.cumsum(1 / torch.arange(10, vocabulary), 0)
    tokens = torch.searchsorted(
        share / share[-1], torch.rand(m, slots, SHOWN["window"], generator=g)
    ).clamp_max(vocabulary - 1)
    words = "fires on the word {} where it stands behind an opening bracket in a call"
    texts = {i: Explanation(words.format(i), i / m) for i in range(m)}
    path = tmp_path_factory.mktemp("large") / "large.html"
    contexts = made_contexts(list(range(m)), tokens, positive=0.15)  # about the share on real text
    return write_pages(
        path, random_sae(D_MODEL, m), tiny_lm(vocab_size=vocabulary), contexts, texts
    )


def test_sixteen_thousand_latents_are_small_and_open_at_once(browser, large_page):
    assert large_page.stat().st_size < 30e6
    times = []
    for _ in range(3):  # the machine may be busy with something else
        with opened(browser, large_page) as page:
            times.append(page.evaluate("performance.getEntriesByName('list shown')[0].startTime"))
            assert (
                len(numbers(page)) < 40
                and page.locator(".row").first.get_attribute("aria-setsize") == "16384"
            )
    assert min(times) < 1000
    size = large_page.stat().st_size / 1e6
    print(f"\n16384 latents: {size:.1f} MB, list shown after {min(times):.0f} ms")


def test_sixteen_thousand_latents_are_searched_and_opened(browser, large_page):
    with opened(browser, large_page) as page:
        page.fill("#search", "word 16383")
        expect(page.locator("#found")).to_have_text(re.compile("^1 of 16384"))
        page.keyboard.press("Enter")
        expect(page.locator("#heading")).to_have_text("Latent 16383")
        page.keyboard.press("Escape")
        page.fill("#search", "")
        page.focus("#list")
        page.keyboard.press("End")
        assert active(page) == "#16383"


# ---- ratings


def test_rate_by_keyboard_reload_export_and_score(browser, study, tmp_path):
    with opened(browser, study.page, accept_downloads=True) as page:
        expect(page.locator(".context").first).to_be_visible()
        page.keyboard.press("y")
        expect(page.locator("#state")).to_have_text("Rated YES. 1 of 4 rated.")
        page.keyboard.press("e")
        page.keyboard.type('=SUM(1) yes, "quotes"\nand no & <b>')
        page.keyboard.press("Control+Enter")
        expect(page.locator("#heading")).to_have_text("Item 2 of 4")
        page.keyboard.press("m")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("n")
        page.reload()
        expect(page.locator("#heading")).to_have_text("Item 3 of 4")
        expect(page.locator('[data-rating="NO"]')).to_have_attribute("aria-pressed", "true")
        page.keyboard.press("n")  # undone
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        assert page.locator("#explanation").input_value() == '=SUM(1) yes, "quotes"\nand no & <b>'
        page.keyboard.press("Enter")
        expect(page.locator("#heading")).to_have_text("Item 3 of 4")  # unrated again
        page.keyboard.press("y")
        page.keyboard.press("Enter")
        page.click('[data-rating="NO"]')
        expect(page.locator("#state")).to_contain_text("finished")
        page.click("#export")
        expect(page.locator("#warning")).to_contain_text("Enter your name")
        page.keyboard.type("@Ada Lovelace")
        with page.expect_download() as waiting:
            page.click("#export")
        path = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(path)
    key = read_key(study.key)
    assert path.name == f"ratings-{key['study']}--Ada-Lovelace.csv"
    found = score(key, [path])
    assert found.items.verdict.tolist() == ["YES", "MAYBE", "YES", "NO"] and found.raters == (
        "@Ada Lovelace",
    )
    assert found.items["explanation: @Ada Lovelace"][0] == '=SUM(1) yes, "quotes" and no & <b>'
    shares = found.shares.set_index(["architecture", "rating"])["count"]
    assert shares["jumprelu", "YES"] == 2 and shares["gated", "MAYBE"] == 1
    rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    assert rows[1][3].startswith("'=SUM") and rows[1][4] == "'@Ada Lovelace"
    path.write_text(path.read_text(encoding="utf-8").replace("MAYBE", "YES"))
    with pytest.raises(ValueError, match="line 3: this row or one above"):
        score(key, [path])


def test_items_show_hostile_tokens_as_text(browser, study):
    with opened(browser, study.page) as page:
        expect(page.locator("#title")).to_have_text("<i>study</i>")
        for _ in range(4):
            expect(page.locator(".context").first).to_be_visible()
            page.keyboard.press("ArrowRight")
        assert HOSTILE[1] in page.locator(".tokens span").all_text_contents()
        titles = ["Most active", "Drawn from all levels of activity, falling", "Not active"]
        assert page.locator(".group h3").all_text_contents() == titles
        assert "about" not in (page.locator(".tokens .on").first.get_attribute("title"))


def test_ratings_that_cannot_be_kept_are_announced(browser, study):
    getter = "{get() { throw new DOMException('no', 'SecurityError'); }}"
    refuse = f"Object.defineProperty(window, 'localStorage', {getter})"
    with opened(browser, study.page, script=refuse) as page:
        expect(page.locator("#warning")).to_contain_text("does not keep what you enter")
        page.keyboard.press("y")
        expect(page.locator("#state")).to_have_text("Rated YES. 1 of 4 rated.")
        page.fill("#rater", "Ada")
        with page.expect_download():
            page.click("#export")
        expect(page.locator("#warning")).to_be_visible()


def test_what_was_kept_may_be_damaged(browser, study):
    key = f"jumprelu-study:{read_key(study.key)['study']}"
    for text in (
        "{",
        '{"entries": 3}',
        '{"rater": 1, "at": 99, "entries": {"x": {"rating": "YES", "explanation": ""}}}',
    ):
        script = f"if (location.protocol === 'file:') localStorage.setItem({key!r}, {text!r})"
        with opened(browser, study.page, script=script) as page:
            expect(page.locator("#heading")).to_have_text("Item 1 of 4")
            expect(page.locator("#state")).to_have_text("0 of 4 rated.")


def test_two_tabs_do_not_forget_each_others_ratings(browser, study):
    with opened(browser, study.page) as page:
        page.keyboard.press("y")
        second = page.context.new_page()
        second.goto(study.page.as_uri())
        second.keyboard.press("ArrowRight")
        second.keyboard.press("n")
        expect(page.locator("#state")).to_have_text("Rated NO. 2 of 4 rated.")
        page.on("dialog", lambda dialog: dialog.accept())
        page.click("#clear")
        expect(second.locator("#state")).to_have_text("0 of 4 rated.")


def test_ratings_on_a_phone(browser, study):
    with opened(browser, study.page, viewport=NARROW, has_touch=True, is_mobile=True) as page:
        assert not scrolls_sideways(page)
        page.tap('[data-rating="MAYBE"]')
        expect(page.locator("#state")).to_contain_text("Rated MAYBE")
        page.tap("#next")
        expect(page.locator("#heading")).to_have_text("Item 2 of 4")
        assert not scrolls_sideways(page)
