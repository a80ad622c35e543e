"""Section 14: lines in, calls out (JSON-RPC 2.0)."""

import json
import random

import pytest

import thrum
from thrum import Call, Lines, decode_request, encode_reply

CALLS = [
    # line, [(method, params, id, answered, error code)], is a batch
    (b'{"jsonrpc":"2.0","method":"health","id":1}', [("health", None, 1, True, None)], False),
    (b'{"jsonrpc":"2.0","method":"health","id":"a","params":{}}', [("health", {}, "a", True, None)], False),
    (b'{"jsonrpc":"2.0","method":"m","id":1.5,"params":[1]}', [("m", [1], 1.5, True, None)], False),
    (b'{"jsonrpc":"2.0","method":"m","id":null}', [("m", None, None, True, None)], False),
    (b'{"jsonrpc":"2.0","method":"m"}', [("m", None, None, False, None)], False),
    (b'{"jsonrpc":"2.0","method":"m","params":null,"id":0}', [("m", None, 0, True, None)], False),
    (b'  {"jsonrpc" : "2.0", "method":"\\u00e9", "id":-1}\t', [("\u00e9", None, -1, True, None)], False),
    (b'{"jsonrpc":"2.0","id":1}', [("", None, 1, True, None)], False),
    (b'{"jsonrpc":"2.0","method":"m","id":1,"more":{"a":1}}', [("m", None, 1, True, None)], False),
    (b'[{"jsonrpc":"2.0","method":"a","id":1},{"jsonrpc":"2.0","method":"b"}]', [("a", None, 1, True, None), ("b", None, None, False,
     None)],
     True),
    (b'[{"jsonrpc":"2.0","method":"a","id":1}]', [("a", None, 1, True, None)], True),
    (b'[1,{"jsonrpc":"2.0","method":"b","id":2}]', [("", None, None, True, -32600), ("b", None, 2, True, None)], True),
    # the examples of section 7 of the specification that fail
    (b'{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]', [("", None, None, True, -32700)], False),
    (b'{"jsonrpc": "2.0", "method": 1, "params": "bar"}', [("", None, None, True, -32600)], False),
    (b'[{"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},{"jsonrpc": "2.0", "method"]', [("", None, None, True, -32700)],
     False),
    (b"[]", [("", None, None, True, -32600)], False),
    (b"[1,2,3]", [("", None, None, True, -32600)] * 3, True),
    # others
    (b"", [("", None, None, True, -32700)], False),
    (b"null", [("", None, None, True, -32600)], False),
    (b"5", [("", None, None, True, -32600)], False),
    (b'"x"', [("", None, None, True, -32600)], False),
    (b"\xff\xfe", [("", None, None, True, -32700)], False),
    (b'{"jsonrpc":"2.0","method":"m","id":1,"params":{"a":"\xff"}}', [("", None, None, True, -32700)], False),
    (b'{"jsonrpc":"2.0","method":"m","id":NaN}', [("", None, None, True, -32700)], False),
    (b'{"jsonrpc":"2.0","method":"m","id":1,"params":{"a":Infinity}}', [("", None, None, True, -32700)], False),
    (b"[" * 100_000, [("", None, None, True, -32700)], False),
    (b'{"a":' * 100_000, [("", None, None, True, -32700)], False),
    (b'{"jsonrpc":"1.0","method":"m","id":1}', [("", None, 1, True, -32600)], False),
    (b'{"jsonrpc":2.0,"method":"m","id":1}', [("", None, 1, True, -32600)], False),
    (b'{"method":"m","id":1}', [("", None, 1, True, -32600)], False),
    (b'{"jsonrpc":"2.0","method":"m","id":true}', [("", None, None, True, -32600)], False),
    (b'{"jsonrpc":"2.0","method":"m","id":{}}', [("", None, None, True, -32600)], False),
    (b'{"jsonrpc":"2.0","method":"m","id":[1]}', [("", None, None, True, -32600)], False),
    (b'{"jsonrpc":"2.0","method":["m"],"id":1}', [("", None, 1, True, -32600)], False),
    (b'{"jsonrpc":"2.0","method":"m","id":1,"params":5}', [("m", None, 1, True, -32602)], False),
    (b'{"jsonrpc":"2.0","method":"m","params":"x"}', [("m", None, None, False, -32602)], False),
    (b"[" + b",".join([b'{"jsonrpc":"2.0","method":"m","id":1}'] * thrum.BATCH_CALLS_MAX) + b"]",
     [("m", None, 1, True, None)] * thrum.BATCH_CALLS_MAX, True),
    (b"[" + b",".join([b'{"jsonrpc":"2.0","method":"m","id":1}'] * (thrum.BATCH_CALLS_MAX + 1)) + b"]", [("", None, None, True, -32600)],
     False),
]


@pytest.mark.parametrize("line, calls, batch", CALLS, ids=[repr(line[:60]) for line, _, _ in CALLS])
def test_lines_to_calls(line, calls, batch):
    found, is_batch = decode_request(line)
    assert [(c.method, c.params, c.id, c.answered, c.error and c.error.code) for c in found] == calls
    assert is_batch is batch


def test_decode_request_never_raises():
    """Any bytes give calls or errors: a peer cannot stop the daemon's loop."""
    rng = random.Random(1)
    pieces = [line for line, _, _ in CALLS if len(line) < 200] + [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\0", b"1e999",
              b"1" * 5000]
    for _ in range(2000):
        parts = [rng.choice(pieces) for _ in range(rng.randrange(1, 4))]
        line = b"".join(part[rng.randrange(len(part) + 1):] if rng.random() < 0.5 else part for part in parts)
        calls, batch = decode_request(line)
        assert calls and all(isinstance(call, Call) for call in calls)
        for call in calls:
            json.loads(encode_reply(call, error=call.error or thrum.MethodNotFound("x")))


REPLIES = [
    (Call("m", id=1), {"a": 1}, None, {"jsonrpc": "2.0", "result": {"a": 1}, "id": 1}),
    (Call("m", id="x"), None, None, {"jsonrpc": "2.0", "result": None, "id": "x"}),
    (Call("m", id=2), "\n\u2028é", None, {"jsonrpc": "2.0", "result": "\n\u2028é", "id": 2}),
    (Call("m", id=3), None, thrum.ThrumError("no"), {"jsonrpc": "2.0", "error": {"code": -32000, "message": "no"}, "id": 3}),
    (Call("m", id=3), None, thrum.InvalidParams("bad", {"field": "x"}),
     {"jsonrpc": "2.0", "error": {"code": -32602, "message": "bad", "data": {"field": "x"}}, "id": 3}),
    (Call(), None, thrum.ParseError("Parse error", "why"),
     {"jsonrpc": "2.0", "error": {"code": -32700, "message": "Parse error", "data": "why"}, "id": None}),
    (Call("m", id=4), None, KeyError("k"), {"jsonrpc": "2.0", "error": {"code": -32603, "message": "'k'"}, "id": 4}),
]


@pytest.mark.parametrize("call, result, error, reply", REPLIES, ids=range(len(REPLIES)))
def test_replies(call, result, error, reply):
    """A response has `result` or `error`, never both, and is one line."""
    line = encode_reply(call, result, error)
    assert json.loads(line) == reply
    assert b"\n" not in line


# ---- Lines

STREAMS = [
    (b"", [], b""), (b"a", [], b"a"), (b"a\n", [b"a"], b""), (b"\n", [b""], b""), (b"a\nb", [b"a"], b"b"), (b"a\r\nb\r\n", [b"a", b"b"],
     b""),
    (b"a\n\n\nb\n", [b"a", b"", b"", b"b"], b""), (b"a\rb\n", [b"a\rb"], b""), (b"\xff\0\n\xc3", [b"\xff\0"], b"\xc3"),
    (b"x" * 20 + b"\n" + b"y" * 20, [b"x" * 20], b"y" * 20),
]


@pytest.mark.parametrize("stream, lines, rest", STREAMS, ids=[repr(stream) for stream, _, _ in STREAMS])
def test_lines_whole_byte_by_byte_and_with_a_tail(stream, lines, rest):
    assert Lines(20).feed(stream) == lines
    one, found = Lines(20), []
    for index in range(len(stream)):
        found += one.feed(stream[index:index + 1])
    assert found == lines
    if len(rest) < 20:
        assert one.feed(b"!\n") == [rest + b"!"]


def test_any_lines_survive_any_split():
    for seed in range(300):
        rng = random.Random(seed)
        lines = [bytes(rng.choice(b"ab \xff{}") for _ in range(rng.randrange(20))) for _ in range(rng.randrange(6))]
        stream = b"".join(line + rng.choice((b"\n", b"\r\n")) for line in lines)
        codec, found = Lines(20), []
        while stream:
            cut = rng.randrange(1, len(stream) + 1)
            found += codec.feed(stream[:cut])
            stream = stream[cut:]
        assert found == lines, f"seed {seed}"


@pytest.mark.parametrize("chunks", [[b"x" * 21], [b"x" * 21 + b"\n"], [b"a\n" + b"x" * 21 + b"\nb\n"], [b"x" * 20, b"x"], [b"x"] * 21,
                                    [b"a\n", b"b" * 30]], ids=repr)
def test_a_line_that_is_too_long_is_refused_before_it_ends(chunks):
    codec = Lines(20)
    with pytest.raises(thrum.InvalidRequest) as raised:
        for chunk in chunks:
            codec.feed(chunk)
    assert "longer than 20 bytes" in raised.value.data
