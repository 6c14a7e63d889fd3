"""Move states from a live replica to a newcomer over HTTP: JSON and tensors, signed, on one address only.

The secret itself never travels. A request carries a random number (the nonce) and an HMAC of it and of the step. The
answer is the header and the tensors, each followed by its HMAC, which depends on the nonce, the step and the place in
the stream too: what was changed, exchanged or sent before is refused before it is used.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import io
import logging
import os
import secrets
import socket
import sys
import threading
import time
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor
from torchft.checkpointing.transport import CheckpointTransport

from titan_ft.network import in_url
from titan_ft.wire import num_bytes, packed, raw, unpacked

log = logging.getLogger(__name__)

SECRET_VARIABLE = "TITAN_FT_SECRET"
SIGNATURE_BYTES = 32
_NONCE, _PROOF = "X-Titan-Nonce", "X-Titan-Proof"
_SLICE_BYTES = 1 << 20
"""Sent at once: the time limit of a slow link is one of each slice, not of a whole tensor."""


def shared_secret(host: str) -> bytes:
    """Return the secret that all replicas share, from the environment; without one, only this machine may ask.

    Raises ValueError where other machines could ask and there is no secret.
    """
    secret = os.environ.get(SECRET_VARIABLE, "")
    if not secret and not ip_address(host.split("%")[0]).is_loopback:
        raise ValueError(
            f"{SECRET_VARIABLE} must be set where replicas run on several machines (this one is {host}), got nothing. "
            f"Set the environment of every rank to the same random text, such as that of openssl rand -hex 32."
        )
    return secret.encode()


def signature(secret: bytes, nonce: str, path: str, part: int) -> hmac.HMAC:
    """Return the HMAC of one part of an answer, to be updated with its bytes: part 0 is the header, n the n-th tensor.

    `path` says of which step the answer is.
    """
    return hmac.new(secret, f"answer {nonce} {path} {part}\n".encode(), hashlib.sha256)


class SnapshotTransport(CheckpointTransport[dict[str, Any]]):
    """Serves this rank's state to newcomers that know the secret, while they need it; holds none afterwards.

    What is received is read as JSON and raw tensors; `torch.load` and pickle are not used.
    """

    def __init__(self, host: str, timeout: timedelta, secret: bytes | None = None) -> None:
        self._secret = shared_secret(host) if secret is None else secret
        self._timeout_s = timeout.total_seconds()
        self._changed = threading.Condition()
        self._offer: tuple[int, bytes, list[Tensor]] | None = None
        self._num_readers = 0
        self._server = _server(host, self)
        self._address = f"http://{in_url(host)}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def metadata(self) -> str:
        return self._address

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: dict[str, Any], timeout: timedelta) -> None:
        """Offer the state of `step` until `disallow_checkpoint`."""
        header, tensors = packed(state_dict)
        with self._changed:
            self._offer = step, header, tensors
            self._changed.notify_all()

    def disallow_checkpoint(self) -> None:
        """Wait for newcomers that are still reading, then let the state go."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_readers == 0, self._timeout_s)
            self._offer = None

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> dict[str, Any]:
        """Fetch the state of a live replica's rank.

        Raises ValueError for anything but a whole state of that step, signed with the secret for this request.
        """
        parts, nonce, path = urlsplit(metadata), secrets.token_hex(16), f"/{step}"
        if parts.hostname is None:
            raise ValueError(f"The address of a live replica must name a host, got {metadata!r}.")
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout.total_seconds())
        try:
            connection.request("GET", path, headers={_NONCE: nonce, _PROOF: self._proof(nonce, path)})
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(f"The live replica at {metadata} refused to heal this one: {response.reason}.")
            stream = io.BufferedReader(response, _SLICE_BYTES)

            def check(part: int, *pieces: bytes | memoryview) -> None:
                expected = signature(self._secret, nonce, path, part)
                for piece in pieces:
                    expected.update(piece)
                received = stream.read(SIGNATURE_BYTES)
                if len(received) != SIGNATURE_BYTES:
                    raise ValueError(f"The healing stream ended early: no signature after its part {part}.")
                if not hmac.compare_digest(received, expected.digest()):
                    raise ValueError(
                        f"What the replica at {metadata} sends must be signed with the shared secret, got a wrong "
                        f"signature of part {part}."
                    )

            return unpacked(stream.read, stream.readinto, check)
        finally:
            connection.close()

    def shutdown(self, wait: bool = True) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request, in a thread of its own."""
        nonce, proof = request.headers.get(_NONCE, ""), request.headers.get(_PROOF, "")
        if not hmac.compare_digest(proof.encode(), self._proof(nonce, request.path).encode()):
            request.send_error(403, "wrong or missing proof of the shared secret")
            return
        offer = self._reserve(request.path)
        if offer is None:
            request.send_error(404, "no state of that step is offered")
            return
        try:
            _, header, tensors = offer
            num_signatures = 1 + len(tensors)
            request.send_response(200)
            request.send_header(
                "Content-Length", str(len(header) + num_bytes(tensors) + num_signatures * SIGNATURE_BYTES)
            )
            request.end_headers()
            self._send(request, nonce, 0, memoryview(header))
            for part, tensor in enumerate(tensors, start=1):
                self._send(request, nonce, part, raw(tensor))
        finally:
            with self._changed:
                self._num_readers -= 1
                self._changed.notify_all()

    def _reserve(self, path: str) -> tuple[int, bytes, list[Tensor]] | None:
        """Wait until the state of that step is offered, and keep it from being let go while it is read."""
        deadline = time.monotonic() + self._timeout_s
        with self._changed:
            while self._offer is None or path != f"/{self._offer[0]}":
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    return None
            self._num_readers += 1
            return self._offer

    def _send(self, request: BaseHTTPRequestHandler, nonce: str, part: int, content: memoryview) -> None:
        signed = signature(self._secret, nonce, request.path, part)
        for start in range(0, len(content), _SLICE_BYTES):
            piece = content[start : start + _SLICE_BYTES]
            signed.update(piece)
            request.wfile.write(piece)
        request.wfile.write(signed.digest())

    def _proof(self, nonce: str, path: str) -> str:
        return hmac.new(self._secret, f"request {nonce} {path}".encode(), hashlib.sha256).hexdigest()


def _server(host: str, transport: SnapshotTransport) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        timeout = 60  # seconds for a request to be read, and for each slice of the answer to be taken

        def do_GET(self) -> None:
            transport.answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            """Write no log line for each request."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Ignore a client that is gone or slow; warn of all else, which only this side knows."""
            error = sys.exc_info()[1]
            if not isinstance(error, ConnectionError | TimeoutError):
                log.warning("Sending the state to a newcomer failed: %r", error, exc_info=error)

    return Server((host, 0), Handler)
