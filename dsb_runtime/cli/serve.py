"""`dsb serve`: a model behind OpenAI's API, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsb_runtime.cli.process import end_by_signal
from dsb_runtime.config import check_int
from dsb_runtime.doors.server import KEY, MAX_QUEUE, served_name
from dsb_runtime.engine.batch import BatchEngine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    add("--port", type=int, default=8000, help="0 is any free one (default: 8000)")
    add("--api-key", metavar="KEY", help=f"what requests must bring (default: ${KEY}, else none)")
    add(
        "--max-rows", type=int, metavar="N",
        help="answers that are decoded at a time (default: 64, or what memory has room for)",
    )  # fmt: skip
    add(
        "--max-queue", type=int, default=MAX_QUEUE, metavar="N",
        help=f"answers that may wait; a request beyond them gets 429 (default: {MAX_QUEUE})",
    )  # fmt: skip


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError or TypeError for a wrong argument, ImportError without the extra."""
    check_int("--port", args.port, 0, 65535)
    check_int("--max-queue", args.max_queue, 0)
    if args.max_rows is not None:
        check_int("--max-rows", args.max_rows, 1)
    name = "--api-key" if args.api_key is not None else KEY
    if args.api_key is None:
        args.api_key = os.environ.get(KEY) or None
    if args.api_key is not None and not (
        args.api_key and args.api_key.isascii() and args.api_key.isprintable()
    ):
        raise ValueError(f"{name}: expected printable ASCII characters")  # the key is not shown
    try:
        import dsb_runtime.doors.server.app  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}; dsb serve needs the extra: dsb-kernels[serve]") from error


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, which takes no connections yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        raise OSError(f"--host={host!r} --port={port}: {error}") from error
    return bound


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def log_requests() -> None:
    """Write a line for each request to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("dsb_runtime.doors.server")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def run(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    bound: socket.socket,
) -> int:  # fmt: skip
    """Serve until a signal comes and the requests under way have ended. Returns 0, or the status of
    a second signal, which has ended the server at once."""
    from dsb_runtime.doors.server.app import create_app
    from dsb_runtime.doors.server.draining import Draining

    name, engine = served_name(args.model), BatchEngine(model, args.max_rows)
    app = create_app(engine, tokenizer, name, api_key=args.api_key, max_queue=args.max_queue)
    log_requests()
    said = f"{name}: {url_of(bound)}"
    server = Draining(app, lambda: print(said, flush=True))
    if signal.getsignal(signal.SIGHUP) is end_by_signal:  # uvicorn takes the other two
        signal.signal(signal.SIGHUP, server.handle_exit)
    server.run([bound])
    return 0 if server.second is None else 128 + server.second
