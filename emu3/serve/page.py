"""The web page: images that grow, a gallery, and a chat about images and videos.

It is mounted beside the HTTP routes and calls the same service, so that its requests share
forwards, the queue and the limits with all others.
"""

from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import wraps
from mimetypes import guess_type
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from emu3.serve.engine import BusyError, DrainingError
from emu3.serve.requests import ChatRequest, ImageRequest
from emu3.serve.service import Service
from emu3.settings import parse

_PREVIEWS = 12
"""Of an image while it grows."""
_RATIOS = ["1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16"]
_MEDIA = {"image": "image_url", "video": "video_url"}
_FONTS = {
    "font": ["system-ui", "sans-serif"],
    "font_mono": ["ui-monospace", "monospace"],
}
"""Of the reader's system: nothing is fetched from elsewhere."""

_CSS = """
#growing img { width: 100%; height: 100%; object-fit: contain }
[aria-label=Share], [title=Share] { display: none }
"""
"""Small images are shown large, and nothing offers to be uploaded elsewhere."""


def mount(web: FastAPI, service: Service) -> FastAPI:
    """Add the page to the application, at ``/``; its other routes stay."""
    return gr.mount_gradio_app(
        web,
        page(service),
        path="/",
        footer_links=[],
        max_file_size=service.limits.body,
        ssr_mode=False,
        theme=gr.themes.Default(**_FONTS),
        css=_CSS,
    )


def page(service: Service) -> gr.Blocks:
    with gr.Blocks(title=f"emu3 · {service.name}", analytics_enabled=False) as blocks:
        gr.Markdown(f"## {service.name}")
        with gr.Tab("Images"):
            _images(service)
        with gr.Tab("Chat"):
            _chat(service)
    # The service batches requests and bounds its own queue.
    return blocks.queue(default_concurrency_limit=None)


def _images(service: Service) -> None:
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(label="Prompt", lines=2, elem_id="prompt", autofocus=True)
            negative = gr.Textbox(label="Negative prompt", placeholder="the model's own")
            ratio = gr.Dropdown(
                _RATIOS, label="Width : height", allow_custom_value=True, elem_id="ratio"
            )
            seed = gr.Textbox(label="Seed", placeholder="drawn", elem_id="seed")
            guidance = gr.Slider(1, 10, 3, step=0.1, label="Guidance", elem_id="guidance")
            count = gr.Slider(1, service.limits.images, 1, step=1, label="Images")
            with gr.Row():
                start = gr.Button("Generate", variant="primary", elem_id="generate")
                stop = gr.Button("Stop")
        with gr.Column():
            growing = gr.Image(
                label="Growing",
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
                height=420,
                elem_id="growing",
            )
            gallery = gr.Gallery(
                label="Gallery",
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
                columns=4,
                fit_columns=False,
                elem_id="gallery",
            )
    shown = gr.State([], time_to_live=3600)

    async def draw(
        prompt: str, negative: str, ratio: str, seed: str, guidance: float, count: int, shown: list
    ) -> AsyncIterator[tuple]:
        asked = {"prompt": prompt, "ratio": ratio, "guidance": guidance, "n": count}
        asked |= {"seed": seed.strip()} if seed.strip() else {}
        asked |= {"negative": negative} if negative else {}
        with_previews = parse(ImageRequest, asked | {"partial_images": _PREVIEWS})
        async with await service.images(with_previews) as events:
            async for event in events:
                if event.preview is None:
                    shown = [(event.image, f"{prompt} (seed {event.seed})"), *shown]
                yield event.image, shown, shown

    asked = [prompt, negative, ratio, seed, guidance, count, shown]
    events = [start.click, prompt.submit]
    run = gr.on(events, _told(draw), asked, [growing, gallery, shown], api_visibility="private")
    stop.click(None, cancels=[run], api_visibility="private")


def _chat(service: Service) -> None:
    answers = gr.Chatbot(label="Chat", buttons=["copy"], height=480, elem_id="answers")
    question = gr.MultimodalTextbox(
        show_label=False,
        placeholder="A question, with images and videos",
        file_types=["image", "video"],
        file_count="multiple",
        elem_id="question",
    )
    with gr.Row():
        stop, forget = gr.Button("Stop"), gr.Button("New chat")
    # The conversation in OpenAI's form.
    said = gr.State([], time_to_live=3600)

    async def answer(message: dict, answers: list, said: list) -> AsyncIterator[tuple]:
        parts = [*map(_part, message["files"]), {"type": "text", "text": message["text"]}]
        asked = [*said, {"role": "user", "content": parts}]
        files = [{"role": "user", "content": {"path": path}} for path in message["files"]]
        words = [{"role": "user", "content": message["text"]}] if message["text"] else []
        answers, told = [*answers, *files, *words], ""
        async with await service.chat(parse(ChatRequest, {"messages": asked})) as events:
            yield None, answers, said
            async for event in events:
                told += event.text
                replied = {"role": "assistant", "content": told.strip()}
                yield None, [*answers, replied], [*asked, replied]

    shown = [question, answers, said]
    run = question.submit(_told(answer), shown, shown, api_visibility="private")
    stop.click(None, cancels=[run], api_visibility="private")
    gr.on(
        [forget.click, answers.clear],
        lambda: (None, [], []),
        None,
        shown,
        cancels=[run],
        api_visibility="private",
    )


def _told(handler: Callable[..., AsyncIterator[tuple]]) -> Callable[..., AsyncIterator[tuple]]:
    """Show what the service refuses as a message of one line, and end its job with the handler."""

    @wraps(handler)
    async def handle(*values: Any) -> AsyncIterator[tuple]:
        try:
            async with aclosing(handler(*values)) as steps:
                async for step in steps:
                    yield step
        except (ValueError, BusyError, DrainingError) as error:
            raise gr.Error(str(error), print_exception=False) from None

    return handle


def _part(path: str) -> dict[str, Any]:
    """A file as a part of a message, by its name; the service checks what is in it."""
    kind = guess_type(path)[0] or ""
    name = _MEDIA.get(kind.partition("/")[0])
    if name is None:
        raise ValueError(f"{Path(path).name} must be an image or a video")
    url = f"data:{kind};base64,{b64encode(Path(path).read_bytes()).decode()}"
    return {"type": name, name: {"url": url}}
