"""The pages that run the model, in Debian's Chromium: clicks on canvases, streaming, keys, addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
from browser_fixture import HOSTILE_TOKENS
from browser_live_fixture import D_SAE, NAMES
from browser_sites import drag, wait_feature, wait_idle

PROMPT = "the quick brown fox"
pytestmark = pytest.mark.browser


@pytest.fixture
def site(live_site: str) -> str:
    return live_site


@pytest.fixture
def page(open_page: Callable[..., Any], site: str) -> Any:
    return open_page(site)


def visit(page: Any, site: str, view: str, **params: str) -> None:
    given = {"sae": NAMES[0], "view": view, "prompt": PROMPT} | params
    page.goto(site + "?" + "&".join(f"{name}={quote(value)}" for name, value in given.items()))


def wait_chosen(page: Any, position: int) -> None:
    """Until the table of the microscope shows this token as the chosen one."""
    page.locator(".grid .row.chosen .at").get_by_text(str(position), exact=True).wait_for()
    wait_idle(page)


def wait_steered(page: Any) -> None:
    """Until both texts are complete and the panel below them is drawn."""
    page.get_by_text("Copy as a command or as Python").wait_for()
    wait_idle(page)


def test_a_token_is_chosen_by_click_and_key_and_the_address_holds_it(page: Any, site: str) -> None:
    visit(page, site, "Microscope", hide="false")
    page.locator(".grid .row").nth(4).locator(".text").click()
    wait_chosen(page, 3)
    assert "at=3" in page.url
    page.locator(".grid").press("ArrowDown")
    wait_chosen(page, 4)
    page.go_back()
    wait_chosen(page, 3)
    page.reload()
    wait_chosen(page, 3)


def test_a_feature_goes_from_the_microscope_to_a_steered_text(page: Any, site: str) -> None:
    visit(page, site, "Microscope", hide="false", at="3")
    add = page.locator(".row .add").first
    feature = int(add.locator("xpath=..").locator(".prefix").text_content())
    add.click()
    wait_idle(page)
    page.get_by_text("Steering", exact=True).first.click()
    page.get_by_role("button", name="Generate").wait_for()
    wait_idle(page)
    assert quote(f"{feature}:set:5", safe="") in page.url
    page.get_by_role("button", name="Generate").click()
    wait_steered(page)
    assert page.locator(".groups .tok").count() > 2 * 40
    assert page.get_by_text(f"Steered: {feature} set to 5 × max").count() == 1


def test_text_streams_while_it_is_written(page: Any, site: str) -> None:
    """By what the app sends: how much of it a browser draws before the end depends on how busy the machine is."""
    from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

    frames: list[bytes] = []
    page.once("websocket", lambda socket: socket.on("framereceived", lambda frame: frames.append(frame)))
    visit(page, site, "Steering", edits="3:set:5", new="128")
    go = page.get_by_role("button", name="Generate")
    go.wait_for()
    wait_idle(page)
    frames.clear()
    go.click()
    wait_steered(page)
    drawn = [ForwardMsg.FromString(frame).delta.new_element for frame in frames if isinstance(frame, bytes)]
    shares = [each.progress.value for each in drawn if each.WhichOneof("type") == "progress"]
    lengths = [len(each.text.body) for each in drawn if each.WhichOneof("type") == "text"]
    assert len(set(shares)) >= 3
    assert shares == sorted(shares)
    assert len(set(lengths)) >= 3
    assert page.locator('[data-testid="stProgress"]').count() == 0  # gone when the texts are complete


def test_a_click_on_the_map_opens_a_feature(page: Any, site: str) -> None:
    visit(page, site, "Map")
    page.wait_for_selector(".map canvas")
    wait_idle(page)
    where = page.evaluate(
        """() => {
          const hosts = [...document.querySelectorAll('*')].filter(n => n.shadowRoot);
          const map = hosts.map(n => n.shadowRoot.querySelector('.map')).find(Boolean);
          const [x, y] = map.map2d.screen(7), box = map.getBoundingClientRect();
          return [box.left + x, box.top + y, map.map2d.nearest(x, y)];
        }"""
    )
    page.mouse.move(where[0], where[1])
    page.locator(".map .tip").wait_for()
    assert f"feature {where[2]}" in page.locator(".map .tip").text_content()
    page.mouse.click(where[0], where[1])
    wait_feature(page, where[2])
    assert f"feature={where[2]}" in page.url
    page.go_back()
    page.wait_for_selector(".map canvas")


def test_a_range_dragged_over_the_logit_weights_shows_what_they_follow(page: Any, site: str) -> None:
    visit(page, site, "Feature", feature="7")
    page.wait_for_selector(".groups[data-underlined]", state="attached")
    wait_idle(page)
    drag(page, 1, 0.3, 0.9)
    group = page.locator(".group", has_text="Your logit weights")
    group.wait_for()
    assert "firings are followed by one" in group.locator(".note").text_content()
    assert group.locator(".example").count() > 0
    assert "weights=" in page.url


def test_your_own_text_is_coloured_by_the_feature(page: Any, site: str) -> None:
    visit(page, site, "Feature", feature="7")
    page.wait_for_selector(".groups[data-underlined]", state="attached")
    wait_idle(page)
    page.get_by_text("Try a text").click()
    box = page.get_by_label("Text", exact=True)
    box.fill("the quick <b>fox</b>")
    box.press("Control+Enter")
    tried = page.locator(".group", has_text="Your text")
    tried.locator(".tok").first.wait_for()
    shown = "".join(tried.locator(".tok").all_text_contents())
    assert shown.endswith("the quick <b>fox</b>")


def test_hostile_prompts_are_text(page: Any, site: str) -> None:
    hostile = HOSTILE_TOKENS[0]
    visit(page, site, "Microscope", prompt=hostile)
    page.locator(".grid .row:not(.heads)").first.wait_for()  # a component is drawn after the page around it
    texts = page.eval_on_selector_all(".grid .row:not(.heads) .text", "nodes => nodes.map(n => n.textContent)")
    assert "".join(texts).endswith(hostile)
    visit(page, site, "Token", token=hostile)
    page.get_by_text(f"No token is exactly “{hostile}”").wait_for()
    assert page.evaluate("window.__x") is None


@pytest.mark.parametrize(
    ("view", "drawn"),
    [("Attention", ".grid .row.chosen"), ("Compare", "canvas"), ("Token", ".mono-title"), ("Map", ".map canvas")],
)
def test_every_page_is_drawn_without_an_error(page: Any, site: str, view: str, drawn: str) -> None:
    visit(page, site, view, feature=str(D_SAE - 1), token="#0", other=NAMES[1])
    page.locator(drawn).first.wait_for(state="attached")
    wait_idle(page)
