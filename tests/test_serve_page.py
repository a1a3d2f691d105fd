"""The server's page in a real headless browser: the canvas fills while somebody looks."""

from __future__ import annotations

import importlib.util
import os
from shutil import which

import pytest

import dsb_runtime as dsb
from tests.served import KEY, serving

BROWSER = next(filter(None, map(which, ("chromium", "chromium-browser", "google-chrome"))), None)
HAS_BROWSER = BROWSER is not None and importlib.util.find_spec("playwright") is not None
REQUIRED = "DSB_REQUIRE_BROWSER" in os.environ  # the test fails without a browser


@pytest.mark.slow
@pytest.mark.skipif(not (HAS_BROWSER or REQUIRED), reason="needs playwright and Chromium")
def test_page_shows_the_canvas_filling():
    from playwright.sync_api import expect, sync_playwright

    with serving() as served, sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        faults: list[str] = []
        hosts: set[str] = set()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        page.goto(served.url)
        page.evaluate("""() => {
            window.frames_seen = [];
            // An observer would see several drawings as one where the browser is late.
            const canvas = document.getElementById("canvas");
            const draw = canvas.replaceChildren.bind(canvas);
            canvas.replaceChildren = (...boxes) => {
                draw(...boxes);
                window.frames_seen.push(canvas.querySelectorAll(".mask").length);
            };
        }""")
        status = page.locator("#status")

        page.click("text=Decode")  # without the key
        expect(status).to_contain_text("the API key is missing", timeout=60_000)

        page.fill("#key", KEY)
        page.fill("#threshold", "1")
        page.fill("#max_tokens", "32")
        page.evaluate("window.frames_seen = []")
        page.click("text=Decode")
        expect(status).to_contain_text("tokens in", timeout=60_000)
        seen = page.evaluate("window.frames_seen")
        prompt, answer = page.input_value("#prompt"), page.inner_text("#answer")
        assert page.locator("#canvas .token").count() == 32
        browser.close()

        text = served.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = served.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        out = dsb.generate(served.model, ids, threshold=1.0, gen_length=32)
    response = out.sequences[0, ids.shape[1] :][: out.row_tokens[0]]
    assert answer == served.tokenizer.decode(response, skip_special_tokens=True)
    filling = seen[seen.index(max(seen)) :]  # after the canvas of the last question has gone
    assert len(set(filling)) > 5 and filling == sorted(filling, reverse=True)
    assert seen[-1] == 0
    assert faults == [] and hosts == {served.url.split("/")[2]}
