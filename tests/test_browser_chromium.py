"""The app in Debian's Chromium: what only a real page shows. Skipped where Chromium is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from browser_fixture import HOSTILE, HOSTILE_TOKENS
from browser_sites import drag, drawn_table, wait_feature, wait_idle, wait_shortcuts

pytestmark = pytest.mark.browser


@pytest.fixture
def site(planted_site: str) -> str:
    return planted_site


@pytest.fixture
def page(open_page: Callable[..., Any], site: str) -> Any:
    return open_page(site)


@pytest.fixture
def dark_page(open_page: Callable[..., Any], site: str) -> Any:
    return open_page(site, "dark")


def test_table_row_opens_its_feature_and_back_returns(page: Any, site: str) -> None:
    page.goto(f"{site}?sae=demo/tm")
    table = drawn_table(page)
    box = table.bounding_box()
    page.mouse.click(box["x"] + 18, box["y"] + 32 + 27 * 4 + 13)  # fifth row's box
    wait_feature(page, 4)
    assert "feature=4" in page.url
    page.go_back()
    table.wait_for()
    page.go_forward()
    wait_feature(page, 4)


def test_hostile_tokens_are_text_and_nothing_else(page: Any, site: str) -> None:
    page.goto(f"{site}?view=Feature&feature={HOSTILE}&around=whole")
    page.wait_for_selector(".groups .tok")
    wait_feature(page, HOSTILE)
    texts = set(page.eval_on_selector_all(".tok", "nodes => nodes.map(n => n.textContent)"))
    assert set(HOSTILE_TOKENS) <= texts
    assert page.evaluate("window.__x") is None
    assert page.evaluate("getComputedStyle(document.body).display") == "block"
    assert page.locator(".tok img, .tok a, .tok script, .label img, .label a").count() == 0


def test_hovering_a_token_shows_its_details(page: Any, site: str) -> None:
    page.goto(f"{site}?view=Feature&feature={HOSTILE}")
    hit = page.locator(".tok.hit").first
    hit.hover()
    tip = page.locator(".groups .tip")
    tip.wait_for()
    assert hit.text_content().strip() in tip.text_content()
    for name in ("token id", "position", "activation", "100 % of max", "document", "domain"):
        assert name in tip.text_content()
    box = tip.bounding_box()
    near = hit.bounding_box()
    assert abs(box["y"] - near["y"]) < 200


def test_keyboard_goes_to_the_next_feature_and_neighbours_open(page: Any, site: str) -> None:
    page.goto(f"{site}?view=Feature&feature=4")
    wait_feature(page, 4)
    wait_shortcuts(page)
    page.keyboard.press("ArrowRight")
    wait_feature(page, 5)
    page.keyboard.press("ArrowLeft")
    wait_feature(page, 4)
    neighbour = page.locator(".row.open").first
    number = int(neighbour.locator(".prefix").text_content())
    neighbour.click()
    wait_feature(page, number)
    assert f"feature={number}" in page.url
    page.go_back()
    wait_feature(page, 4)


def test_slash_goes_to_the_search_and_question_mark_lists_the_keys(page: Any, site: str) -> None:
    page.goto(f"{site}?sae=demo/tm")
    drawn_table(page)
    page.wait_for_selector("dialog.keys", state="attached")
    page.keyboard.press("?")
    keys = page.get_by_role("dialog", name="Keys")
    keys.wait_for()
    assert "next feature" in keys.text_content()
    page.keyboard.press("Escape")
    keys.wait_for(state="hidden")
    page.keyboard.press("/")
    page.keyboard.type("the?/")  # in a box they are letters
    assert page.locator('input[aria-label="Search"]').input_value() == "the?/"
    assert keys.count() == 0
    page.keyboard.press("Escape")
    page.goto(f"{site}?view=Feature&feature=4")
    wait_feature(page, 4)
    page.wait_for_selector("dialog.keys", state="attached")
    page.keyboard.press("/")
    page.keyboard.type("6")
    page.keyboard.press("Enter")
    wait_feature(page, 6)


def test_a_range_dragged_over_the_activations_shows_its_examples(page: Any, site: str) -> None:
    page.goto(f"{site}?view=Feature&feature=4")
    page.wait_for_selector(".groups .tok")
    wait_feature(page, 4)
    most = float(page.locator(".group .note").first.text_content().removeprefix("max "))
    drag(page, 0, 0.25, 0.75)
    group = page.locator(".group", has_text="Your range")
    group.wait_for()
    values = [float(text) for text in group.locator(".example .value").all_text_contents()]
    assert values
    assert all(0.24 * most <= value <= 0.76 * most for value in values)
    assert "range=" in page.url
    page.go_back()
    group.wait_for(state="detached")


def test_dark_theme(dark_page: Any, site: str) -> None:
    dark_page.goto(f"{site}?view=Feature&feature=0")
    dark_page.wait_for_selector(".tok.on")
    background, text = dark_page.eval_on_selector(
        ".tok.hit", "n => [getComputedStyle(n).backgroundColor, getComputedStyle(n).color]"
    )
    page_colour = dark_page.evaluate("getComputedStyle(document.querySelector('.stApp')).backgroundColor")
    assert page_colour == "rgb(21, 24, 29)"
    assert text == "rgb(227, 229, 232)"
    assert background.startswith("oklch(")
    lightness = float(background.removeprefix("oklch(").split()[0])
    assert lightness < 0.62  # light text stays readable on the strongest orange


def test_dead_feature_and_missing_index_render(page: Any, site: str) -> None:
    page.goto(f"{site}?view=Feature&feature=7")
    page.get_by_text("Feature 7 is dead").wait_for()
    page.goto(f"{site}?sae=demo/no-index")
    page.get_by_text("has no feature index yet").wait_for()
    page.goto(f"{site}?view=Steering")
    page.get_by_text("Steering needs the model").wait_for()


def test_the_start_page_links_to_every_run_and_back_returns_to_it(page: Any, site: str) -> None:
    page.goto(site)
    links = page.locator(".runs a")
    links.first.wait_for()
    assert links.all_text_contents() == ["demo/no-index", "demo/tm"]
    page.get_by_role("link", name="demo/tm").click()
    drawn_table(page)
    assert parse_qs(urlsplit(page.url).query)["sae"] == ["demo/tm"]
    page.go_back()
    links.first.wait_for()
    assert urlsplit(page.url).query == ""
    address = page.get_by_role("link", name="demo/no-index").get_attribute("href")
    page.goto(site + address)  # what "open in a new tab" loads
    page.get_by_text("towards-monosemanticity").wait_for()
    page.get_by_role("link", name="monosem").click()
    links.first.wait_for()


def test_links_to_what_does_not_exist_lead_to_what_does(page: Any, site: str) -> None:
    page.goto(f"{site}?sae=nope&view=Feature&feature=4")
    page.get_by_text("There is no dictionary “nope”").wait_for()
    page.get_by_role("link", name="demo/tm").click()
    drawn_table(page)
    page.goto(f"{site}?sae=demo/tm&view=Feature&feature=99999")
    page.get_by_text("demo/tm has no feature 99999").wait_for()
    wait_idle(page)
    assert "feature=99999" in page.url  # nothing else is shown in its place
    page.get_by_role("link", name="Feature 63", exact=True).click()
    wait_feature(page, 63)
    page.goto(f"{site}?sae=demo/tm&view=nowhere&feature=5")
    page.get_by_text("There is no view “nowhere”").wait_for()
    page.get_by_role("link", name="Feature", exact=True).click()
    wait_feature(page, 5)
