"""The playground in headless Chromium: what it shows, keyboard, phone width, dark mode, no network but the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from gircse.model import GIRCSE
from gircse.serve.service import Service
from tests.serving import NAME, running, tiny_model, tiny_settings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(backbone: Path) -> GIRCSE:
    return tiny_model(backbone)


@pytest.fixture(scope="module")
def server(model: GIRCSE) -> Iterator[str]:
    with running(Service(model, tiny_settings(max_num_steps=8), NAME)) as url:
        yield url


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Page]]:
    contexts: list[Any] = []
    problems: list[str] = []

    def make(url: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page: Page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if not local(request.url, url) else None)
        page.goto(url)
        return page

    yield make
    for context in contexts:
        context.close()
    assert not problems, "scripts fail, or the page asks others than its server"


def local(url: str, server: str) -> bool:
    return url.startswith((server + "/", "data:"))


def rows(page: Page) -> list[list[str]]:
    """The weights of every step that is shown."""
    found = page.query_selector_all("#tokens li:not(.head)")
    return [[weight.inner_text() for weight in row.query_selector_all(".chip small")] for row in found]


def test_an_encoder_only_model_begins_at_its_own_vector(backbone: Path, opened: Any) -> None:
    plain = tiny_model(backbone)
    plain.num_steps = 0
    with running(Service(plain, tiny_settings(max_num_steps=8), NAME)) as url:
        page = opened(url)
        page.wait_for_selector("#facts b")
        steps = [page.get_attribute("#steps", "min"), page.input_value("#steps"), page.get_attribute("#steps", "max")]
        assert steps == ["0", "0", "8"]


def test_soft_tokens_appear_and_the_slider_adds_steps(server: str, model: GIRCSE, opened: Any) -> None:
    page = opened(server)
    page.wait_for_selector("#facts b")
    assert "tiny" in page.inner_text("#facts")
    assert page.input_value("#steps") == "3"
    page.fill("#text", "a cat")
    page.fill("#instruction", "find")
    page.focus("#text")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#tokens li:nth-child(4)")
    expected = model.explain("a cat", instruction="find", num_steps=6)
    assert len(rows(page)) == 3
    assert rows(page)[0] == [f"{weight:.2f}" for weight in expected[0].weights]
    assert f"{expected[1].movement:.4f}" in page.inner_text("#tokens li:nth-child(3)")

    page.focus("#steps")
    page.keyboard.press("ArrowLeft")
    assert len(rows(page)) == 2, "fewer steps need no request"
    assert page.inner_text("#steps-value") == "2"
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.wait_for_selector("#tokens li:nth-child(7)")
    assert f"{expected[5].movement:.4f}" in page.inner_text("#tokens li:nth-child(7)")


def test_two_heat_maps_under_two_instructions(server: str, model: GIRCSE, opened: Any) -> None:
    page = opened(server)
    page.wait_for_selector("#facts b")
    texts = ["a cat", "dogs", "<b>x</b>"]
    page.fill("#texts", "\n".join([*texts, "", " "]))
    page.fill("#first", "find")
    page.fill("#second", "")
    page.click("#compare-run")
    page.wait_for_selector("#maps figure:nth-child(2)")
    for place, prompt in ((1, model.format_instruction("find")), (2, "")):
        vectors = model.encode(texts, prompt=prompt, normalize_embeddings=True)
        shown = [cell.inner_text() for cell in page.query_selector_all(f"#maps figure:nth-child({place}) td")]
        assert shown == [f"{value:.2f}" for value in (vectors @ vectors.T).ravel()]
    assert "<b>x</b>" in page.inner_text("#maps-legend"), "texts are shown as they are, never run"
    before = page.inner_text("#maps")
    page.focus("#steps")
    page.keyboard.press("End")
    page.wait_for_function("before => document.querySelector('#maps').innerText !== before", arg=before)

    page.fill("#texts", "only one")
    page.click("#compare-run")
    page.wait_for_function("() => document.querySelector('#compare-error').innerText.includes('2 to 24')")


def test_code_samples_follow_the_request(server: str, opened: Any) -> None:
    page = opened(server)
    page.wait_for_selector("#facts b")
    page.fill("#text", 'it\'s "quoted"')
    page.fill("#instruction", "find")
    curl = page.inner_text("#code")
    assert f"{server}/v1/embeddings" in curl
    assert "it'\\''s" in curl
    assert '"instruction": "find"' in curl
    page.focus("input[value=curl]")
    page.keyboard.press("ArrowRight")
    python = page.inner_text("#code")
    compile(python, "sample", "exec")
    assert f'base_url="{server}/v1"' in python
    assert '"num_steps": 3' in python
    page.keyboard.press("ArrowRight")
    assert "await fetch(" in page.inner_text("#code")
    page.fill("#texts", "one\ntwo")
    assert '"two"' in page.inner_text("#code")


def test_errors_and_keys(model: GIRCSE, opened: Any) -> None:
    with running(Service(model, tiny_settings(api_key="secret"), NAME)) as url:
        page = opened(url)
        page.wait_for_selector("#key-section:not([hidden])")
        page.fill("#key", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#facts b")
        page.fill("#text", "x" * 100)
        page.click("#inside-run")
        page.wait_for_function("() => document.querySelector('#inside-error').innerText.includes('48 tokens')")
        page.fill("#text", "a cat")
        page.fill("#instruction", "")
        page.click("#inside-run")
        page.wait_for_selector("#tokens li:nth-child(4)")
        assert page.inner_text("#inside-error") == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_width_and_dark_mode(server: str, opened: Any, scheme: str) -> None:
    page = opened(server, viewport={"width": 390, "height": 800}, color_scheme=scheme)
    page.wait_for_selector("#facts b")
    page.fill("#text", "a cat")
    page.fill("#instruction", "")
    page.fill("#texts", "\n".join(f"text {n}" for n in range(12)))
    page.fill("#first", "")
    page.fill("#second", "find")
    page.click("#inside-run")
    page.click("#compare-run")
    page.wait_for_selector("#maps figure:nth-child(2)")
    page.wait_for_selector("#tokens li:nth-child(4)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing is wider than the phone"
    brightness = page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((sum, c) => sum + Number(c), 0) / 3"
    )
    assert (brightness < 60) is (scheme == "dark")


def test_everything_is_reached_by_keyboard(server: str, opened: Any) -> None:
    page = opened(server)
    page.wait_for_selector("#facts b")
    reached = []
    for _ in range(16):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
    wanted = [
        "steps",
        "text",
        "instruction",
        "inside-run",
        "texts",
        "first",
        "second",
        "compare-run",
        "language",
        "copy",
    ]
    assert [name for name in reached if name in wanted] == wanted
    unlabelled = page.evaluate(
        "[...document.querySelectorAll('input, textarea')].filter((field) => !field.labels.length).length"
    )
    assert unlabelled == 0
