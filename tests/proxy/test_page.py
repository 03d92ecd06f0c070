"""The chat page in a headless browser: answers side by side, alpha, markup that stays text, errors, phone width."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpeft.proxy.blackbox import BackendError
from fedpeft.proxy.desk import Options
from proxy.browser import Page, browser
from proxy.served import Artefact, Script, fake_trio, serving

EVIL = "<img src onerror=hacked=1>&amp;"
ROOM = Artefact(fake_trio(context=400))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as made:
        yield made


@pytest.fixture
def script() -> Script:
    return Script(says=lambda prompt: f"you said {prompt}")


@pytest.fixture
def url(script: Script) -> Iterator[str]:
    with serving(script, artefact=ROOM) as (url, _):
        yield url


def ready(page: Page, url: str, **window: Any) -> None:
    page.log.clear()
    page.go(url, **window)
    page.wait("!document.querySelector('#send').disabled")
    page.run("document.querySelector('#max').value = 40")


def say(page: Page, text: str) -> None:
    page.click("#text")
    page.type(text)
    page.press_enter()
    page.wait("document.body.dataset.state === 'ready'")


def texts(page: Page, part: str = "p") -> dict[str, str]:
    """What the newest answers say, by model."""
    found = page.run(
        f"[...[...document.querySelectorAll('.answers')].at(-1).children].map(c => [c.dataset.model, "
        f"c.querySelector('{part}').textContent])"
    )
    return dict(found)


def asked(script: Script) -> list[tuple[str, float | None]]:
    """Who was asked, with which alpha, in no order."""
    kinds = {(True, True): "proxy", (True, False): "large", (False, True): "small"}
    return sorted(
        (kinds[trio.large is not None, trio.tuned is not None], settings[0].alpha)
        for trio, _, settings in script.opened
    )


def test_three_answers_stand_side_by_side_and_the_slider_asks_again(page, url, script):
    ready(page, url)
    assert page.run("document.querySelector('#name').textContent") == "toy"
    assert "alpha 0.75 unless you move it" in page.run("document.querySelector('#about').textContent")
    say(page, "hi")
    assert texts(page) == dict.fromkeys(("large", "proxy", "small"), "you said hi")
    assert asked(script) == [("large", None), ("proxy", 0.75), ("small", None)]
    assert all(text.startswith("11 tokens in ") for text in texts(page, "small").values())
    tops = page.run("[...document.querySelectorAll('.answer')].map(c => c.getBoundingClientRect().top)")
    assert len(set(tops)) == 1, "they stand side by side"
    script.opened.clear()
    script.says = lambda prompt: "otherwise"
    page.run(
        "(() => { const a = document.querySelector('#alpha'); a.value = 1.5; "
        "for (const name of ['input', 'change']) a.dispatchEvent(new Event(name, { bubbles: true })); })()"
    )
    page.wait("document.body.dataset.state === 'ready'")
    page.wait("document.querySelector('.proxy p').textContent === 'otherwise'")
    assert asked(script) == [("proxy", 1.5)] and texts(page)["large"] == "you said hi"
    assert texts(page, "h2")["proxy"].endswith("alpha 1.5")
    assert page.run("document.querySelector('#alpha-shown').textContent") == "1.5"


@pytest.mark.parametrize(("served", "least", "most"), [(-1.0, "-1", "2"), (-0.25, "-1", "2"), (3.3, "0", "4")])
def test_an_alpha_beyond_the_usual_ones_is_what_is_asked_for(page, script, served, least, most):
    with serving(script, artefact=Artefact(fake_trio(context=400), alpha=served)) as (url, _):
        ready(page, url)
        assert page.run("document.querySelector('#alpha-shown').textContent") == str(served).removesuffix(".0")
        assert page.run("['min', 'max'].map(name => document.querySelector('#alpha')[name])") == [least, most]
        say(page, "hi")
        assert ("proxy", served) in asked(script)


def test_later_questions_carry_each_model_s_own_chat(page, url, script):
    ready(page, url)
    sent = (
        "window.sent = []; const f = window.fetch; window.fetch = (...a) => { window.sent.push(a[1]); return f(...a); }"
    )
    page.run(f"(() => {{ {sent} }})()")
    say(page, "one")
    say(page, "two")
    bodies = [json.loads(each["body"]) for each in page.run("window.sent")]
    roles = [(m["role"], m["content"]) for m in bodies[-1]["messages"]]
    assert roles == [("user", "one"), ("assistant", "you said one"), ("user", "two")]
    assert {body["model"] for body in bodies} == {"toy", "toy:large", "toy:small"}
    page.click("#new")
    assert page.run("document.querySelectorAll('.answer').length") == 0


def test_markup_stays_text(page, url, script):
    script.says = lambda prompt: EVIL
    ready(page, url)
    say(page, EVIL)
    page.run("new Promise(done => setTimeout(done, 100))")
    assert page.run("window.hacked") is None
    assert texts(page) == dict.fromkeys(("large", "proxy", "small"), EVIL)
    assert page.run("document.querySelector('.mine').textContent") == EVIL
    assert page.run("document.querySelectorAll('#talk img, #talk script').length") == 0
    assert not [line for line in page.log if "exception" in line.lower()], page.log


def test_a_model_s_name_is_text_too(page):
    with serving(Script(), artefact=Artefact(name="<b onclick=x>toy</b>")) as (url, _):
        ready(page, url)
        assert page.run("document.querySelector('#name').textContent") == "<b onclick=x>toy</b>"
        assert page.run("document.querySelectorAll('#name *').length") == 0


def test_errors_are_shown_where_the_answer_would_be(page, url, script):
    ready(page, url)
    script.fail = lambda step: BackendError("large <i>died</i>; start it again") if step == 4 else None
    say(page, "hi")
    assert set(texts(page, "small").values()) == {"Error: large <i>died</i>; start it again (“New chat” begins anew.)"}
    assert page.run("getComputedStyle(document.querySelector('small')).color") == "rgb(164, 38, 44)", "it is red"
    script.fail = lambda step: None
    say(page, "again")
    assert texts(page)["proxy"] == "you said again"


def test_stopping_frees_the_rows(page, url, script):
    script.pause_s = 0.05
    ready(page, url)
    page.click("#text")
    page.type("hi")
    page.press_enter()
    page.wait("document.body.dataset.state === 'busy' && document.querySelector('.proxy p').textContent.length > 1")
    page.click("#stop")
    page.wait("document.body.dataset.state === 'ready'")
    assert set(texts(page, "small").values()) == {"stopped"}
    page.wait("fetch('health').then(r => r.json()).then(h => h.running === 0)")
    assert len(script.dropped) == 3


def test_a_key_is_asked_for(page):
    with serving(Script(), Options(key="s3cret")) as (url, _):
        page.go(url)
        page.wait("!document.querySelector('#door').hidden")
        for key, shown in (("wrong", "That key is wrong."), ("s3cret", "steered")):
            page.run("document.querySelector('#key').value = ''")
            page.click("#key")
            page.type(key)
            page.press_enter()
            page.wait(f"document.querySelector('#about').textContent.includes('{shown}')")
        assert page.run("document.querySelector('#door').hidden")
        page.run("document.querySelector('#max').value = 40")
        say(page, "hi")
        assert texts(page)["small"] == "you said hi"


def test_a_phone_shows_everything_without_scrolling_sideways(page, url):
    ready(page, url, width=360, height=740, mobile=True)
    say(page, "a long word: " + "x" * 25)
    assert page.run("document.documentElement.scrollWidth") <= 360
    boxes = page.run("[...document.querySelectorAll('.answer')].map(c => [c.offsetLeft, c.offsetTop, c.offsetWidth])")
    assert len({box[0] for box in boxes}) == 1 and len({box[1] for box in boxes}) == 3, "they stand below each other"
    assert all(box[2] > 300 for box in boxes)
    wide = page.run(
        "[...document.querySelectorAll('button, input, textarea')].map(e => [e.id, e.getBoundingClientRect()])"
        ".map(([id, box]) => [id, box.left, box.right])"
    )
    assert all(left >= 0 and right <= 360 for _, left, right in wide), wide


def test_pictures_for_people(page, url, script, tmp_path):
    """Kept where PAGE_PICTURES names a folder."""
    script.says = lambda prompt: f"Once upon a time: {prompt}"[:38]
    folder = Path(os.environ.get("PAGE_PICTURES", tmp_path))
    for name, window in (("laptop", {"width": 1280, "height": 800}), ("phone", {"width": 390, "height": 844})):
        ready(page, url, **window)
        say(page, "Tell me about the harbour.")
        assert texts(page)["proxy"] == "Once upon a time: Tell me about the ha"
        page.picture(folder / f"{name}.png")
        assert (folder / f"{name}.png").stat().st_size > 5000
