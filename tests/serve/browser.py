"""The web page in Chromium; as a command it takes the README's screenshot of a running server.

python -m tests.serve.browser http://127.0.0.1:8000 docs/page.png
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import which

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

CHROMIUM = which("chromium") or which("chromium-browser") or which("google-chrome")
SHORT, LONG = 10_000, 60_000
"""Milliseconds."""
_SIZE = {"width": 1100, "height": 880}


@contextmanager
def opened(url: str) -> Iterator[Page]:
    """The page at ``url``, which must ask no other server for anything."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, asked = browser.new_page(viewport=_SIZE), []
        page.on("request", lambda one: asked.append(one.url))
        page.goto(url, wait_until="domcontentloaded", timeout=LONG)
        page.locator("#prompt textarea").wait_for(timeout=LONG)
        yield page
        assert [one for one in asked if not one.startswith((url, "data:", "blob:"))] == []
        browser.close()


def draw(page: Page, prompt: str, seed: str) -> None:
    """Type a prompt and a seed, and press the button."""
    page.get_by_role("tab", name="Images").click()
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#seed textarea").fill(seed)
    page.locator("#generate").click()


def ask(page: Page, words: str, files: Sequence[Path] = ()) -> None:
    """Ask about files in the chat, and wait for the answer."""
    page.get_by_role("tab", name="Chat").click()
    before = page.locator("#answers .bot.message").count()
    if files:
        page.locator("#question input[type=file]").set_input_files(files)
        expect(page.locator("#question img").first).to_be_visible(timeout=SHORT)
    page.locator("#question textarea").fill(words)
    page.locator("#question textarea").press("Enter")
    expect(page.locator("#answers .bot.message")).to_have_count(before + 1, timeout=LONG)


def main(url: str, out: Path) -> None:
    """Draw digits, ask about the last one, and put both tabs side by side."""
    shots = [out.with_suffix(f".{tab}.png") for tab in ("images", "chat")]
    with opened(url) as page:
        for number, prompt in enumerate(("a green zero", "a blue one", "a red seven"), 1):
            draw(page, prompt, "3")
            expect(page.locator("#gallery img")).to_have_count(number, timeout=LONG)
        page.screenshot(path=shots[0])
        drawn = page.locator("#gallery img").first.get_attribute("src")
        shown = out.with_suffix(".drawn.png")
        shown.write_bytes(page.request.get(drawn).body())
        ask(page, "which digit?", [shown])
        page.screenshot(path=shots[1])
    images = [Image.open(path) for path in shots]
    both = Image.new("RGB", (sum(one.width for one in images), images[0].height))
    both.paste(images[0])
    both.paste(images[1], (images[0].width, 0))
    both.save(out, optimize=True)
    for path in (*shots, shown):
        path.unlink()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
