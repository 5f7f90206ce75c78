"""`handful serve`: a model behind OpenAI's API."""

from __future__ import annotations

import sys
import threading
import webbrowser
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from handful.cli import answers, join
from handful.cli.shared import Json, open_screen, print_json
from handful.errors import ConfigError


class OnLoss(StrEnum):
    mask = "mask"
    wait = "wait"


EXAMPLE = "handful serve runs/demo/moe/seed-0 --port 8000"


def run(
    model: Annotated[
        str | None,
        typer.Argument(help="A run folder, a checkpoint folder or org/name[@revision]. Default: the newest run."),
    ] = None,
    host: Annotated[str, typer.Option(help="Where it listens; 0.0.0.0: to all who reach this computer.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model. Default: MODEL.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="HANDFUL_API_KEY", help="The key that clients must show.")
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Let anybody who can reach it ask.")] = False,
    show: Annotated[bool, typer.Option("--open", help="Show the page in this computer's browser.")] = False,
    cors: Annotated[
        list[str] | None, typer.Option(help="A web page's origin that may ask from a browser; *: any.")
    ] = None,
    max_sequences: Annotated[int, typer.Option(help="Requests that share the engine's steps.")] = 16,
    queue: Annotated[int, typer.Option(help="Requests that may wait; those beyond are refused.")] = 256,
    cache_tokens: Annotated[
        int | None, typer.Option(help="Tokens that all KV caches hold together. Default: 8 times the context.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of an answer at most. Default: the model's context.")] = None,
    max_batch: Annotated[int, typer.Option(help="Prompts × n of a request at most.")] = 128,
    max_body: Annotated[str, typer.Option(help="Of a request at most.")] = "4MiB",
    speculate: answers.SpeculateOption = None,
    quant: answers.QuantOption = None,
    exact_activations: answers.ExactOption = False,
    kv_cache_dtype: answers.KvCacheOption = "auto",
    memory: answers.MemoryOption = None,
    pack: answers.PackOption = None,
    ranks: Annotated[
        int, typer.Option(help="Processes that the experts are spread over; --memory is then of each. 0: one has all.")
    ] = 0,
    on_loss: Annotated[
        OnLoss, typer.Option(help="While experts of a lost rank are read again: answer without them, or wait for them.")
    ] = OnLoss.mask,
    replace_every: Annotated[
        float, typer.Option(help="With --ranks: place experts anew by their load, every so many seconds; 0: never.")
    ] = 0,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="With --ranks: measure the loss without a rank's experts.")
    ] = True,
    rank_port: Annotated[
        int | None, typer.Option(help="With --ranks: where `handful join` of other computers reaches this one.")
    ] = None,
    rank_token: answers.TokenOption = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Serve a model over HTTP to the clients of OpenAI's API."""
    from handful.cluster import start
    from handful.encoder_decoder import EncoderDecoder
    from handful.runs import newest_run
    from handful.server.app import Server
    from handful.server.run import listen, serve, url_of
    from handful.server.settings import ServerSettings
    from handful.units import parse_bytes

    screen = open_screen()
    settings = ServerSettings(
        name=name or model or str(newest_run(Path("runs"))),
        host=host,
        port=port,
        api_key=api_key,
        no_auth=no_auth,
        origins=tuple(cors or ()),
        queue=queue,
        max_body=parse_bytes(max_body, "max_body"),
        max_batch=max_batch,
        max_output=max_tokens,
    )
    model = model or str(newest_run(Path("runs")))
    answers.keep_exact(exact_activations)
    of_torchrun = start.of_torchrun()
    if of_torchrun is not None and ranks:
        number, host_of_first, port_of_first = of_torchrun
        if number:
            address = f"{host_of_first}:{port_of_first}"
            join.run(address, model, ranks, quant, exact_activations, memory, pack, rank_token)
            return
        rank_port = rank_port or port_of_first
    sock = listen(host, port)  # before the model, which may take minutes
    with sock:

        def ready(context: int) -> None:
            url = url_of(sock)
            screen.print(f"serving {settings.name} at {url}")
            screen.print(f"the page {url} shows what its routers do; API {url}/v1, metrics {url}/metrics", style="dim")
            screen.print("Ctrl-C ends", style="dim")
            if as_json:
                print_json({"model": settings.name, "url": url, "context": context})
                sys.stdout.flush()
            if show:
                open_page(url)

        if ranks:
            held = answers.held_by_ranks(model, quant, memory, pack)
            with answers.progress() as progress:
                decoder, layout = start.opened(held, progress)
            status = start.serve_on_ranks(
                held,
                decoder,
                layout,
                settings,
                sock,
                ranks=ranks,
                max_sequences=max_sequences,
                cache_tokens=cache_tokens,
                kv_cache_dtype=kv_cache_dtype,
                speculate=speculate,
                rank_port=rank_port,
                token=rank_token,
                on_loss=on_loss.value,
                replace_every=replace_every,
                measure=measure,
                debug="--debug" in sys.argv,
                told=screen.print,
                on_ready=lambda: ready(decoder.config.context),
            )
            raise typer.Exit(status)
        found, store = answers.open_model(model, quant, memory, pack)
        try:
            if isinstance(found, EncoderDecoder):
                raise ConfigError(f"{model}: is an encoder-decoder: a decoder is needed")
            server = Server(
                found,
                settings,
                max_sequences=max_sequences,
                cache_tokens=cache_tokens,
                kv_cache_dtype=kv_cache_dtype,
                speculate=speculate,
                store=store,
            )
            ready(found.config.context)
            serve(server, sock, say=screen.print)
        finally:
            if store is not None:
                store.close()


def open_page(url: str) -> None:
    """Show an address in the user's browser, if there is one. It is asked for beside: some browsers are waited for."""
    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
