"""Healing transfers only JSON and tensors, only to replicas that know the secret, on one address."""

from __future__ import annotations

import http.client
import json
import pickle
import socket
import struct
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from titan_ft.snapshot import take_snapshot
from titan_ft.transport import SnapshotTransport, signature
from titan_ft.wire import MAGIC, raw_bytes

MINUTE = timedelta(seconds=60)
STATE = {"user": {"default": take_snapshot({"w": torch.arange(6.0), "step": 3})}, "torchft": {"step": 3}}


@pytest.fixture
def transport():
    """The transport of a live replica that offers STATE for step 3."""
    transport = SnapshotTransport("127.0.0.1", timedelta(seconds=2), b"right")
    transport.send_checkpoint([1], 3, STATE, MINUTE)
    yield transport
    transport.shutdown()


def receiver(secret: bytes = b"right") -> SnapshotTransport:
    return SnapshotTransport("127.0.0.1", timedelta(seconds=2), secret)


def test_a_receiver_that_knows_the_secret_gets_the_state(transport):
    received = receiver().recv_checkpoint(0, transport.metadata(), 3, MINUTE)
    assert received["torchft"] == {"step": 3}
    assert received["user"]["default"].values["step"] == 3
    assert torch.equal(received["user"]["default"].values["w"], torch.arange(6.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64])
def test_every_dtype_and_shape_is_transferred_bit_for_bit(dtype):
    tensors = [torch.randn(shape).to(dtype) for shape in [(), (0,), (3, 0, 2), (5, 7)]] + [
        torch.randn(4, 6).to(dtype).t()
    ]
    live = receiver()
    live.send_checkpoint([1], 0, {"tensors": tensors, "nested": [(1, None), {2: float("inf")}]}, MINUTE)
    received = receiver().recv_checkpoint(0, live.metadata(), 0, MINUTE)
    assert received["nested"] == [(1, None), {2: float("inf")}]
    for got, expected in zip(received["tensors"], tensors, strict=True):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert bytes(raw_bytes(got)) == bytes(raw_bytes(expected))


@pytest.mark.parametrize("headers", [{}, {"X-Titan-Proof": "right"}, {"X-Titan-Nonce": "n", "X-Titan-Proof": "0" * 64}])
def test_a_request_without_the_secret_is_rejected(transport, headers):
    parts = urlsplit(transport.metadata())
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    connection.request("GET", "/3", headers=headers)
    response = connection.getresponse()
    assert response.status == 403
    assert b"TITAN" not in response.read()


def test_a_receiver_with_another_secret_is_rejected(transport):
    with pytest.raises(ValueError, match="rejected the request: wrong or missing proof"):
        receiver(b"wrong").recv_checkpoint(0, transport.metadata(), 3, MINUTE)


def test_a_step_that_is_not_offered_is_rejected(transport):
    with pytest.raises(ValueError, match="no state of that step"):
        receiver().recv_checkpoint(0, transport.metadata(), 4, MINUTE)


def test_the_transport_listens_on_one_address_only(transport):
    port = urlsplit(transport.metadata()).port
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=2):
        pass


class Runs:
    """An object whose unpickling has a side effect."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def answering(*parts: bytes, cut: int | None = None) -> SnapshotTransport:
    """Return a replica that knows the secret and sends the signed `parts`, or only the first `cut` bytes of them."""

    class Bad(SnapshotTransport):
        def answer(self, request: Any) -> None:
            content = b""
            for part, each in enumerate(parts):
                signed = signature(b"right", request.headers["X-Titan-Nonce"], request.path, part)
                signed.update(each)
                content += each + signed.digest()
            request.send_response(200)
            request.send_header("Content-Length", str(len(content)))
            request.end_headers()
            request.wfile.write(content[:cut])

    return Bad("127.0.0.1", timedelta(seconds=2), b"right")


class Wire(SnapshotTransport):
    """A live replica whose bytes pass through `write(position in the stream, bytes)` in transit."""

    def __init__(self, write: Callable[[int, bytes], bytes]) -> None:
        super().__init__("127.0.0.1", MINUTE, b"right")
        self.write_through = write

    def answer(self, request: Any) -> None:
        wire, file, place = self, request.wfile, 0

        class Changed:
            def write(self, content: Any) -> None:
                nonlocal place
                if bytes(content[:5]) != b"HTTP/":
                    content = wire.write_through(place, bytes(content))
                    place += len(content)
                file.write(content)

        request.wfile = Changed()
        try:
            super().answer(request)
        finally:
            request.wfile = file


def with_header(header: Any) -> bytes:
    content = json.dumps(header).encode()
    return MAGIC + struct.pack("<Q", len(content)) + content


def test_a_malicious_payload_is_an_error_and_executes_nothing(tmp_path):
    sign = tmp_path / "executed"
    pickle.loads(pickle.dumps(Runs(sign)))
    assert sign.exists()  # otherwise the test proves nothing
    sign.unlink()
    saved = tmp_path / "saved.pt"
    torch.save({"user": Runs(sign)}, saved)
    payloads = [
        pickle.dumps(Runs(sign)),
        saved.read_bytes(),
        MAGIC + struct.pack("<Q", 1 << 60),
        with_header([]),
        with_header({"tree": {"tensor": 5}, "tensors": []}),
        with_header({"tree": {"eval": "1"}, "tensors": []}),
        with_header({"tree": None, "tensors": [["torch.nothing", [1]]]}),
        with_header({"tree": None, "tensors": [["torch.float32", [-1]]]}),
        with_header({"tree": None, "tensors": [["torch.float32", [True]]]}),
        MAGIC + struct.pack("<Q", 200_000) + b"[" * 200_000,
        MAGIC + struct.pack("<Q", 9) + b"not json!",
    ]
    for payload in payloads:
        with pytest.raises(ValueError):
            receiver().recv_checkpoint(0, answering(payload).metadata(), 3, MINUTE)
    assert not sign.exists()


def test_a_truncated_stream_is_an_error():
    parts = with_header({"tree": {"tensor": 0}, "tensors": [["torch.float32", [1000]]]}), bytes(4000)
    received = receiver().recv_checkpoint(0, answering(*parts).metadata(), 3, MINUTE)
    assert received.shape == (1000,)
    length = len(parts[0]) + 4000 + 64
    for cut in (0, 10, 40, len(parts[0]), len(parts[0]) + 40, length - 33, length - 1):
        with pytest.raises(ValueError, match=r"ended early|must begin with a titan-ft header"):
            receiver().recv_checkpoint(0, answering(*parts, cut=cut).metadata(), 3, MINUTE)


def test_a_source_that_does_not_know_the_secret_is_rejected():
    source = answering(with_header({"tree": None, "tensors": []}))
    with pytest.raises(ValueError, match="must be signed with the shared secret, got a wrong signature of part 0"):
        receiver(b"another").recv_checkpoint(0, source.metadata(), 3, MINUTE)


def test_a_changed_byte_is_detected_anywhere_in_the_stream():
    seen: list[bytes] = []

    def unchanged(place: int, content: bytes) -> bytes:
        seen.append(content)
        return content

    state = {"w": torch.arange(6.0), "b": torch.arange(6.0), "lr": 0.1}
    live = Wire(unchanged)
    live.send_checkpoint([1], 3, state, MINUTE)
    received = receiver().recv_checkpoint(0, live.metadata(), 3, MINUTE)
    assert torch.equal(received["w"], torch.arange(6.0))
    whole = b"".join(seen)
    places = [whole.index(b"0.1"), *range(len(whole) - 2 * (24 + 32) - 32, len(whole), 9)]  # from the first signature
    for changed_place in places:

        def changed(place: int, content: bytes, at: int = changed_place) -> bytes:
            if not place <= at < place + len(content):
                return content
            return content[: at - place] + bytes([content[at - place] ^ 1]) + content[at - place + 1 :]

        live.write_through = changed
        with pytest.raises(ValueError, match=r"must be signed with the shared secret, got a wrong signature of part"):
            receiver().recv_checkpoint(0, live.metadata(), 3, MINUTE)


def test_a_replayed_or_reordered_answer_is_rejected():
    sent: list[bytes] = []
    live = Wire(lambda place, content: sent.append(content) or content)
    live.send_checkpoint([1], 3, {"w": torch.zeros(6), "b": torch.zeros(6)}, MINUTE)
    receiver().recv_checkpoint(0, live.metadata(), 3, MINUTE)
    first, sent = sent, []
    live.write_through = lambda place, content: first.pop(0)
    with pytest.raises(ValueError, match="wrong signature of part 0"):
        receiver().recv_checkpoint(0, live.metadata(), 3, MINUTE)
    signatures: list[bytes] = []

    def swapped(place: int, content: bytes) -> bytes:
        """Replace the signature of the second tensor, of equal bytes, by that of the first."""
        if len(content) == 32:
            signatures.append(content)
        return signatures[1] if len(signatures) == 3 else content

    live.write_through = swapped
    with pytest.raises(ValueError, match="wrong signature of part 2"):
        receiver().recv_checkpoint(0, live.metadata(), 3, MINUTE)


def test_a_large_tensor_is_sent_in_slices_each_with_its_own_timeout():
    sizes: list[int] = []
    live = Wire(lambda place, content: sizes.append(len(content)) or content)
    large = torch.arange(700_001.0)
    live.send_checkpoint([1], 3, {"w": large}, MINUTE)
    assert torch.equal(receiver().recv_checkpoint(0, live.metadata(), 3, MINUTE)["w"], large)
    assert max(sizes) == 1 << 20
    assert sum(sizes) > 2_800_004


@pytest.mark.parametrize("error", [RuntimeError("the disk is on fire"), ConnectionResetError("gone")], ids=repr)
def test_an_error_of_the_source_is_logged_there_unless_the_receiver_disconnected(error, caplog):
    class Failing(SnapshotTransport):
        def answer(self, request: Any) -> None:
            raise error

    live = Failing("127.0.0.1", MINUTE, b"right")
    with pytest.raises(ConnectionError):
        receiver().recv_checkpoint(0, live.metadata(), 3, MINUTE)
    live.shutdown()
    assert ("the disk is on fire" in caplog.text) == (type(error) is RuntimeError)


def test_a_state_is_offered_until_the_last_reader_is_done():
    events: list[str] = []
    reading, may_end = threading.Event(), threading.Event()

    def held(place: int, content: bytes) -> bytes:
        reading.set()
        may_end.wait()
        events.append("read")
        return content

    live = Wire(held)
    live.send_checkpoint([1], 3, {"w": torch.zeros(8)}, MINUTE)
    reader = threading.Thread(target=lambda: receiver().recv_checkpoint(0, live.metadata(), 3, MINUTE))
    reader.start()
    reading.wait()
    threading.Timer(0.2, may_end.set).start()  # a transport that does not wait ends before this
    live.disallow_checkpoint()
    events.append("ended")
    reader.join()
    assert events == ["read"] * 4 + ["ended"]


def test_connections_from_other_machines_need_a_secret(monkeypatch):
    monkeypatch.delenv("TITAN_FT_SECRET", raising=False)
    with pytest.raises(ValueError, match="TITAN_FT_SECRET must be set for replicas on several machines"):
        SnapshotTransport("10.0.0.1", MINUTE)
    SnapshotTransport("127.0.0.1", MINUTE).shutdown()
