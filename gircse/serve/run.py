"""A service under uvicorn: sockets, signals, and an orderly end. Knows nothing of requests."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from gircse.errors import GircseError
from gircse.serve.app import create_app
from gircse.serve.service import Service


class _Server(uvicorn.Server):
    """Uvicorn, except that a SIGTERM that was obeyed is a success: uvicorn would raise it again at the end."""

    on_stop: Callable[[], None] = staticmethod(lambda: None)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            self.on_stop()
            self.handle_exit(number, frame)

        signals = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, stop) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the process at once: as the first one of a container it would ignore it otherwise."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are not its business
        return
    before = signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, which refuses connections until `run` listens there.

    Raises:
        GircseError: The port is taken, or the address is none of this machine's.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if os.name == "posix":  # the port of a server that has just ended; elsewhere it would share one that runs
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if listener.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from error
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> GircseError:
    return GircseError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --host or --port")


def run(service: Service, listener: socket.socket, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what is queued.

    Args:
        service: What answers.
        listener: As `bind` gives it.
        announce: Told the address once connections are taken.

    Raises:
        GircseError: Another process listens there since.
    """
    settings = service.settings
    host, port = listener.getsockname()[:2]
    try:
        listener.listen(2048)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=75,  # above what load balancers keep idle connections for, so that they close first
        timeout_graceful_shutdown=max(1, round(settings.grace_period)),
    )
    server = _Server(config)

    server.on_stop = service.begin_stop
    announce(f"http://{'[' + host + ']' if ':' in host else host}:{port}")
    server.run(sockets=[listener])
    if service.engine.running:
        # A batch that outlived the grace period cannot be interrupted, and ending the interpreter under it may crash.
        logging.shutdown()
        os._exit(0)
