"""Transfer of state from a live replica to one that joins, over HTTP: JSON and tensors, signed, on one address only.

The secret itself is never sent. A request carries a random number (the nonce) and an HMAC of the nonce and the step.
The answer is the header and the tensors, each followed by an HMAC that also covers the nonce, the step and the position
in the stream: data that was changed, exchanged or replayed is rejected before it is used.
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

from titan_ft.network import url_host
from titan_ft.wire import num_bytes, pack, raw_bytes, unpack

log = logging.getLogger(__name__)

SECRET_VARIABLE = "TITAN_FT_SECRET"
SIGNATURE_BYTES = 32
_NONCE, _PROOF = "X-Titan-Nonce", "X-Titan-Proof"
_SLICE_BYTES = 1 << 20
"""Size of one write; the socket timeout applies to each slice, not to a whole tensor on a slow link."""


def shared_secret(host: str) -> bytes:
    """Return the secret that all replicas share, from the environment; empty only if no other machine can connect.

    Raises ValueError if other machines can connect and no secret is set.
    """
    secret = os.environ.get(SECRET_VARIABLE, "")
    if not secret and not ip_address(host.split("%")[0]).is_loopback:
        raise ValueError(
            f"{SECRET_VARIABLE} must be set for replicas on several machines (this one is {host}), got nothing. Set "
            "it on every rank to the same random text, such as the output of `openssl rand -hex 32`."
        )
    return secret.encode()


def signature(secret: bytes, nonce: str, path: str, part: int) -> hmac.HMAC:
    """Return an HMAC to be updated with the bytes of a part of an answer: part 0 is the header, n the n-th tensor.

    `path` is the path of the request and names the step.
    """
    return hmac.new(secret, f"answer {nonce} {path} {part}\n".encode(), hashlib.sha256)


class SnapshotTransport(CheckpointTransport[dict[str, Any]]):
    """Serves this rank's state to replicas that know the secret, while they heal; keeps no state afterwards.

    Received data is parsed as JSON and raw tensors; `torch.load` and pickle are not used.
    """

    def __init__(self, host: str, timeout: timedelta, secret: bytes | None = None) -> None:
        self._secret = shared_secret(host) if secret is None else secret
        self._timeout_s = timeout.total_seconds()
        self._changed = threading.Condition()
        self._offer: tuple[int, bytes, list[Tensor]] | None = None
        self._num_readers = 0
        self._server = _server(host, self)
        self._address = f"http://{url_host(host)}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def metadata(self) -> str:
        return self._address

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: dict[str, Any], timeout: timedelta) -> None:
        """Offer the state of `step` until `disallow_checkpoint`."""
        header, tensors = pack(state_dict)
        with self._changed:
            self._offer = step, header, tensors
            self._changed.notify_all()

    def disallow_checkpoint(self) -> None:
        """Wait for replicas that are still reading, then free the state."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_readers == 0, self._timeout_s)
            self._offer = None

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> dict[str, Any]:
        """Fetch the state of a rank of a live replica.

        Raises ValueError unless the answer is a complete state of that step, signed with the secret for this request.
        """
        parts, nonce, path = urlsplit(metadata), secrets.token_hex(16), f"/{step}"
        if parts.hostname is None:
            raise ValueError(f"The address of a live replica must name a host, got {metadata!r}.")
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout.total_seconds())
        try:
            connection.request("GET", path, headers={_NONCE: nonce, _PROOF: self._proof(nonce, path)})
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(f"The live replica at {metadata} rejected the request: {response.reason}.")
            stream = io.BufferedReader(response, _SLICE_BYTES)

            def check(part: int, *buffers: bytes | memoryview) -> None:
                expected = signature(self._secret, nonce, path, part)
                for buffer in buffers:
                    expected.update(buffer)
                received = stream.read(SIGNATURE_BYTES)
                if len(received) != SIGNATURE_BYTES:
                    raise ValueError(f"The healing stream ended early: the signature of part {part} is missing.")
                if not hmac.compare_digest(received, expected.digest()):
                    raise ValueError(
                        f"Data from the replica at {metadata} must be signed with the shared secret, got a wrong "
                        f"signature of part {part}. Check that {SECRET_VARIABLE} is the same on all ranks."
                    )

            return unpack(stream.read, stream.readinto, check)
        finally:
            connection.close()

    def shutdown(self, wait: bool = True) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request, in its own thread."""
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
                self._send(request, nonce, part, raw_bytes(tensor))
        finally:
            with self._changed:
                self._num_readers -= 1
                self._changed.notify_all()

    def _reserve(self, path: str) -> tuple[int, bytes, list[Tensor]] | None:
        """Wait until the state of the requested step is offered, and keep it until the reader is done."""
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
            data = content[start : start + _SLICE_BYTES]
            signed.update(data)
            request.wfile.write(data)
        request.wfile.write(signed.digest())

    def _proof(self, nonce: str, path: str) -> str:
        return hmac.new(self._secret, f"request {nonce} {path}".encode(), hashlib.sha256).hexdigest()


def _server(host: str, transport: SnapshotTransport) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        timeout = 60  # seconds to read a request, and to send each slice of the answer

        def do_GET(self) -> None:
            transport.answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            """Write no log line for each request."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Ignore clients that disconnect or time out; log other errors, which the client cannot see."""
            error = sys.exc_info()[1]
            if not isinstance(error, ConnectionError | TimeoutError):
                log.warning("Sending the state to a replica that joins failed: %r", error, exc_info=error)

    return Server((host, 0), Handler)
