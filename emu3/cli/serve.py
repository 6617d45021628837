"""``emu3 serve``."""

from typing import Annotated

import typer

from emu3.cli.common import (
    DECODER,
    Base,
    Device,
    Dtype,
    Model,
    OwnVision,
    QuantizedWeights,
    app,
    beside,
    kind,
    usable,
)
from emu3.weights import load


@app.command()
def serve(
    model: Model = DECODER,
    vision: OwnVision = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one", min=0, max=65535)] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            help="what clients must send; needed beyond this machine", envvar="EMU3_TOKEN"
        ),
    ] = None,
    max_batch: Annotated[
        int,
        typer.Option(help="rows that decode together: an image takes two, an answer one", min=2),
    ] = 16,
    max_queue: Annotated[int, typer.Option(help="requests that wait; more get 429", min=1)] = 64,
    context: Annotated[int, typer.Option(help="tokens of a row, all of them allocated", min=1)] = (
        16384
    ),
    page: Annotated[bool, typer.Option(help="a web page at / beside the routes")] = True,
    device: Annotated[Device, typer.Option(help="device to run on")] = Device.cpu,
    dtype: Annotated[Dtype | None, typer.Option(help="of the decoder")] = None,
    weights: QuantizedWeights = None,
    base: Base = None,
) -> None:
    """Serve images and answers over HTTP, in OpenAI's form, and on a web page.

    Requests that arrive together share forwards. SIGTERM ends the server when they are done.
    """
    # Imported here: FastAPI and uvicorn are of the optional group serve.
    from emu3.serve.app import app as routes
    from emu3.serve.run import check_host, run
    from emu3.serve.service import Limits, Service

    check_host(host, token)
    vision = beside(model) if vision is None else vision
    stored = {"weights": weights and weights.value, "base": base}
    loaded = load(model, vision=vision, device=usable(device), dtype=kind(dtype), **stored)
    limits = Limits(batch=max_batch, queue=max_queue, context=context)
    name = model.resolve().name if model.is_dir() else model.stem
    service = Service(loaded, name, limits)
    web = routes(service, token)
    if page:
        # Imported here: gradio takes seconds.
        from emu3.serve.page import mount

        mount(web, service)
    run(web, service, host, port)
