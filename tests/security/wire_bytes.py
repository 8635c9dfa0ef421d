"""What strangers send at ports: ZeroMQ's own wire protocol, cut and bent, and HTTP likewise.

ZMTP 3.1 (rfc.zeromq.org/spec/37): a greeting of 64 bytes, a READY command, then frames.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from random import Random

from tests.security.hostile import hostile, with_other_bytes

_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
_MORE, _LONG, _COMMAND = 1, 2, 4
ANSWER_TIMEOUT_S = 10.0
HTTP_BODY = b'{"prompt": "def f(", "max_tokens": 4, "stop": ["x"], "logit_bias": {"5": 1.5}}'


def greeting(mechanism: bytes = b"NULL", version: bytes = b"\x03\x01") -> bytes:
    """The first 64 bytes of a connection."""
    return (_SIGNATURE + version + mechanism.ljust(20, b"\0")[:20]).ljust(64, b"\0")


def frame(body: bytes, flags: int = 0) -> bytes:
    """A frame, or with the flag of a command, one of those."""
    if len(body) > 255:
        return bytes([flags | _LONG]) + struct.pack(">Q", len(body)) + body
    return bytes([flags, len(body)]) + body


def ready(socket_type: bytes = b"DEALER") -> bytes:
    """The command that ends the handshake without encryption."""
    value = struct.pack(">I", len(socket_type)) + socket_type
    return frame(b"\x05READY" + b"\x0bSocket-Type" + value, _COMMAND)


def half_handshakes() -> Iterator[bytes]:
    """A greeting cut at each of its bytes, and handshakes that go nowhere."""
    whole = greeting() + ready()
    for length in range(len(whole)):
        yield whole[:length]
    for mechanism in (b"PLAIN", b"CURVE", b"GSSAPI", b"null", b"", b"\xff" * 20):
        yield greeting(mechanism)
        yield greeting(mechanism) + ready()
    for version in (b"\x00\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x7f\xff", b"\xff\xff"):
        yield greeting(version=version) + ready()
    for socket_type in (b"", b"PUB", b"ROUTER", b"X" * 300):
        yield greeting() + ready(socket_type)
    yield greeting() + ready() + frame(b"x")  # before the other end is ready
    yield greeting() + frame(b"\x05READY\x0bSocket-Type\xff\xff\xff\xffDEALER", _COMMAND)
    yield greeting() + frame(b"\x05ERROR\x03bad", _COMMAND)
    yield greeting() + frame(b"\x05HELLO" + bytes(194), _COMMAND)
    yield greeting() + bytes([_COMMAND | _LONG]) + b"\xff" * 8
    yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)  # TLS
    yield b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


def bad_frames() -> Iterator[bytes]:
    """What breaks the rules once the handshake is over."""
    yield bytes([_LONG]) + b"\x7f" + b"\xff" * 7
    yield bytes([_LONG]) + b"\xff" * 8
    yield b"\xff" * 9
    yield frame(b"x", _MORE)
    yield frame(b"", _MORE) * 5000 + frame(b"")
    yield frame(b"\x04PING\x00\x01" + b"x" * 16, _COMMAND)
    yield frame(b"\x04PING", _COMMAND)
    yield frame(b"\x04PONG" + b"x" * 300, _COMMAND)
    yield frame(b"\x09SUBSCRIBE" + b"x", _COMMAND)
    yield frame(b"\xffx", _COMMAND)
    yield frame(b"", _COMMAND)
    yield ready()


def messages(rng: Random, union: str) -> bytes:
    """Messages that no honest peer sends; at times with bytes of their framing changed."""
    raw = b""
    for _ in range(rng.randrange(1, 6)):
        raw += frame(hostile(rng, union), rng.choice([0, 0, 0, _MORE]))
    return with_other_bytes(rng, raw) if rng.random() < 0.3 else raw


def http(rng: Random) -> bytes:
    """A request with bytes changed in its head, its body, or nowhere."""
    path = rng.choice([b"/v1/completions", b"/v1/chat/completions", b"/v1/models", b"/metrics"])
    body = with_other_bytes(rng, HTTP_BODY) if rng.random() < 0.6 else HTTP_BODY
    head = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" % path
    head += b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
    return (with_other_bytes(rng, head) if rng.random() < 0.5 else head) + body


async def send(port: int, raw: bytes, *, greets: bool = False) -> None:
    """Connect, send, say that no more will come, and read until the other end hangs up. With
    `greets`, after a handshake that is in order.

    Raises TimeoutError if it does not."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            if greets:
                writer.write(greeting() + ready())
                await reader.readuntil(b"READY")
            writer.write(raw)
            writer.write_eof()
            while await reader.read(65536):
                pass
    except TimeoutError:
        raise
    except OSError:  # it hung up before we had said all
        pass
    finally:
        writer.close()
