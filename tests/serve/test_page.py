"""The web page, driven by a browser."""

import re

import pytest
import torch
from playwright.sync_api import expect

from emu3.data.media import read_image, write_image
from tests.serve.browser import CHROMIUM, LONG, SHORT, ask, draw, opened


@pytest.mark.e2e
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt install chromium")
def test_a_prompt_becomes_an_image_and_a_question_about_one_is_answered(server, tmp_path):
    write_image(tmp_path / "seen.png", torch.full((3, 16, 16), 90, dtype=torch.uint8))
    with opened(server[1]) as page:
        draw(page, "a red seven", "5")
        drawn = page.locator("#gallery img").first
        expect(drawn).to_be_visible(timeout=LONG)
        expect(page.locator("#gallery")).to_contain_text("a red seven (seed 5)", timeout=SHORT)
        assert page.evaluate("image => image.naturalWidth", drawn.element_handle()) == 16
        draw(page, "a red seven", "five")
        expect(page.get_by_text(re.compile("seed: .*integer"))).to_be_visible(timeout=SHORT)
        ask(page, "which digit?", [tmp_path / "seen.png"])
        expect(page.locator("#answers .user img").first).to_be_visible(timeout=SHORT)
        expect(page.locator("#answers")).to_contain_text("which digit?", timeout=SHORT)
        page.screenshot(path=tmp_path / "page.png")
    assert read_image(tmp_path / "page.png").float().std() > 1
