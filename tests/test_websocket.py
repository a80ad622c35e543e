"""Section 16: bytes in, messages out (RFC 6455), both sides of a connection."""

import base64
import doctest
import hashlib
import os
import random
import re
import struct
import time
import tracemalloc

import pytest

import thrum
from thrum import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, HttpError, ProtocolError, WebSocket

LIMIT = 1 << 20


# ---- a little model of section 5, which shares nothing with what it tests

def frame(opcode, payload=b"", fin=True, mask=b"\x37\xfa\x21\x3d", rsv=0, form=None, length=None):
    """A frame.  `form` is 7, 16 or 64: the bits its length is written in; `length` is what it says instead of the truth."""
    length = len(payload) if length is None else length
    form = form or (7 if length < 126 else 16 if length < 65_536 else 64)
    bit = 0x80 if mask else 0
    data = struct.pack("!B", fin << 7 | rsv << 4 | opcode)
    if form == 7:
        data += struct.pack("!B", bit | length)
    elif form == 16:
        data += struct.pack("!BH", bit | 126, length)
    else:
        data += struct.pack("!BQ", bit | 127, length)
    return data + mask + xor(payload, mask)


def xor(payload, mask):
    return bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload)) if mask else payload


def frames_of(data):
    """The frames in what one side sends: [(opcode, payload, fin)]; nothing may be left over."""
    found, at = [], 0
    while at < len(data):
        first, second = data[at], data[at + 1]
        length, at = second & 127, at + 2
        if length > 125:
            size = 2 if length == 126 else 8
            length, at = int.from_bytes(data[at:at + size], "big"), at + size
        mask = data[at:at + 4] if second & 128 else b""
        at += len(mask)
        found.append((first & 15, xor(data[at:at + length], mask), bool(first & 128)))
        at += length
        assert at <= len(data) and not first & 0x70
    return found


def closing(code, reason=b""):
    return struct.pack("!H", code) + reason


class Side:
    """A side under test; `mask` is what frames that it is sent carry."""

    def __init__(self, client=False, limit=LIMIT):
        self.socket = WebSocket(limit, client=client)
        self.mask = b"" if client else b"\x37\xfa\x21\x3d"
        self.got, self.sent = [], b""

    def frame(self, *args, **more):
        return frame(*args, **{"mask": self.mask, **more})

    def feed(self, data, cuts=()):
        """Feeds it in pieces that end at `cuts`; gathers the messages and what it sends."""
        begin = 0
        for end in (*cuts, len(data)):
            if end > begin:
                self.socket.feed(data[begin:end])
                self.got += self.socket.messages()
                self.sent += self.socket.output()
                begin = end
        return self

    def end(self):
        """The code of the Close that it sent as the last frame of all; None if there is none."""
        frames = frames_of(self.sent)
        assert [opcode for opcode, _, _ in frames[:-1]].count(CLOSE) == 0
        if not frames or frames[-1][0] != CLOSE:
            return None
        return struct.unpack("!H", frames[-1][1][:2])[0] if frames[-1][1] else 1005


@pytest.fixture(params=["server", "client"])
def side(request):
    return Side(request.param == "client")


def every(length):
    return range(1, length)


# ---- frames

EXAMPLES = [
    # RFC 6455, section 5.7: bytes, (opcode, payload, fin, mask)
    ("81 05 48 65 6c 6c 6f", (TEXT, b"Hello", True, "")),
    ("81 85 37 fa 21 3d 7f 9f 4d 51 58", (TEXT, b"Hello", True, "37 fa 21 3d")),
    ("01 03 48 65 6c", (TEXT, b"Hel", False, "")),
    ("80 02 6c 6f", (CONTINUATION, b"lo", True, "")),
    ("89 05 48 65 6c 6c 6f", (PING, b"Hello", True, "")),
    ("8a 85 37 fa 21 3d 7f 9f 4d 51 58", (PONG, b"Hello", True, "37 fa 21 3d")),
    ("82 7e 01 00" + " 61" * 256, (BINARY, b"a" * 256, True, "")),
    ("82 7f 00 00 00 00 00 01 00 00" + " 61" * 65_536, (BINARY, b"a" * 65_536, True, "")),
]


@pytest.mark.parametrize("text, parts", EXAMPLES, ids=[text[:40] for text, _ in EXAMPLES])
def test_the_frames_of_the_rfc(text, parts):
    opcode, payload, fin, mask = parts
    data = bytes.fromhex(text)
    assert thrum.encode_frame(opcode, payload, fin=fin, mask=bytes.fromhex(mask)) == data
    assert frames_of(data) == [(opcode, payload, fin)]
    assert frame(opcode, payload, fin, bytes.fromhex(mask)) == data


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536, 200_000])
@pytest.mark.parametrize("mask", [b"", b"\0\x01\xfe\xff"])
def test_a_length_is_written_in_its_shortest_form_and_read(size, mask):
    payload = bytes(range(256)) * (size // 256 + 1)
    data = thrum.encode_frame(BINARY, payload[:size], mask=mask)
    assert data == frame(BINARY, payload[:size], mask=mask)
    side = Side(client=not mask)
    assert side.feed(data).got == [(BINARY, payload[:size])]


@pytest.mark.parametrize("size", [*range(10), 127, 1000, *range(thrum.TRANSLATED_FROM - 2, thrum.TRANSLATED_FROM + 6), 100_003])
def test_masks(size):
    data = random.Random(size).randbytes(size)
    for mask in (b"\0\0\0\0", b"\x01\x02\x03\x04", b"\xff\0\xff\x80"):
        assert thrum.masked(data, mask) == xor(data, mask)
    assert thrum.masked(data, b"") == data


# ---- messages

def random_text(rng, size):
    return "".join(rng.choice("ab\0é\u07ff\u0800€\ud7ff\ue000\uffff\U00010000😀\U0010ffff") for _ in range(size)).encode()


def random_conversation(rng, side):
    """Messages in fragments with control frames between: (messages, payloads of the pings, bytes)."""
    messages, pings, stream = [], [], b""
    for _ in range(rng.randrange(1, 6)):
        size = rng.choice((0, 1, 5, 60, 125, 126, 300))
        if rng.random() < 0.02:
            size = 70_000
        opcode = rng.choice((TEXT, BINARY))
        payload = random_text(rng, size) if opcode == TEXT else rng.randbytes(size)
        messages.append((opcode, payload))
        cuts = sorted(rng.randrange(len(payload) + 1) for _ in range(rng.choice((0, 0, 1, 2, 9))))
        for number, (begin, end) in enumerate(zip([0, *cuts], [*cuts, len(payload)])):
            while rng.random() < 0.3:
                control = rng.choice((PING, PONG))
                body = rng.randbytes(rng.choice((0, 3, 125)))
                pings += [body] if control == PING else []
                stream += side.frame(control, body, mask=side.mask and rng.randbytes(4))
            stream += side.frame(opcode if number == 0 else CONTINUATION, payload[begin:end], fin=number == len(cuts),
                                 mask=side.mask and rng.randbytes(4))
    return messages, pings, stream


@pytest.mark.parametrize("client", [False, True], ids=["server", "client"])
def test_any_messages_survive_any_fragments_and_any_split(client):
    for seed in range(300):
        rng, side = random.Random(seed), Side(client)
        messages, pings, stream = random_conversation(rng, side)
        cuts = sorted(rng.randrange(len(stream) + 1) for _ in range(rng.choice((0, 1, 5, 50)))) if seed % 4 or len(stream) > 5000 \
            else every(len(stream))
        side.feed(stream, cuts)
        assert side.got == messages, f"seed {seed}"
        if len(cuts) or len(pings) < 10:
            answers = [payload for opcode, payload, fin in frames_of(side.sent) if opcode == PONG]
            assert answers == pings or len(pings) > thrum.PONGS_MAX and answers[-1] == pings[-1], f"seed {seed}"
        assert not side.socket.failure and not side.socket.closing


def test_two_sides_understand_each_other():
    for seed in range(50):
        rng = random.Random(seed)
        sides = WebSocket(LIMIT, client=True), WebSocket(LIMIT)
        said, heard = ([], []), ([], [])
        for _ in range(20):
            one = rng.randrange(2)
            payload = random_text(rng, rng.choice((1, 50, 1000)))
            sides[one].send(payload)
            sides[one].ping(b"x")
            said[one].append((TEXT, payload))
            data = sides[one].output()
            cut = rng.randrange(len(data))
            for part in filter(None, (data[:cut], data[cut:])):
                sides[1 - one].feed(part)
                heard[1 - one].extend(sides[1 - one].messages())
        assert heard == (said[1], said[0]), f"seed {seed}"
        sides[0].close(4000, "that is all")
        sides[1].feed(sides[0].output())
        sides[0].feed(sides[1].output())
        assert [(s.closed, s.close_code, s.failure) for s in sides] == [(True, 4000, None)] * 2
        assert sides[1].close_reason == "that is all"


def test_a_client_masks_each_frame_anew():
    drawn = []

    def draw(count):
        drawn.append(bytes([len(drawn) + 1]) * count)
        return drawn[-1]

    socket = WebSocket(LIMIT, client=True, random=draw)
    for _ in range(3):
        socket.send(b"hello")
    assert socket.output() == b"".join(frame(TEXT, b"hello", mask=mask) for mask in drawn) and len(drawn) == 3
    assert socket.output() == b""


# ---- what a peer may not do

def violations(side):
    """Name, bytes, code of the Close."""
    text, part = side.frame(TEXT, b"ok"), side.frame(TEXT, b"a", fin=False)
    for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15):
        yield f"opcode {opcode}", side.frame(opcode), 1002
        yield f"opcode {opcode} in fragments", part + side.frame(opcode, b"x", fin=False), 1002
    for opcode in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
        begun = part if opcode == CONTINUATION else b""
        for rsv in range(1, 8):
            yield f"reserved {rsv} at {opcode}", begun + side.frame(opcode, b"\x03\xe8", rsv=rsv), 1002
        yield f"wrong mask at {opcode}", begun + side.frame(opcode, b"\x03\xe8", mask=b"" if side.mask else b"abcd"), 1002
        yield f"wrong mask at empty {opcode}", begun + side.frame(opcode, mask=b"" if side.mask else b"abcd"), 1002
    for opcode in (CLOSE, PING, PONG):
        yield f"fragment of {opcode}", side.frame(opcode, fin=False), 1002
        yield f"fragment of {opcode} in fragments", part + side.frame(opcode, b"\x03\xe8", fin=False), 1002
        yield f"long {opcode}", side.frame(opcode, b"\x03\xe8" * 63), 1002
        yield f"long form of {opcode}", side.frame(opcode, b"\x03\xe8", form=16), 1002
        yield f"longest form of {opcode}", side.frame(opcode, b"\x03\xe8", form=64), 1002
    for opcode in (TEXT, BINARY):
        yield f"{opcode} in a message", part + side.frame(opcode, b"x"), 1002
        yield f"empty {opcode} in a message", part + side.frame(opcode), 1002
        yield f"{opcode} in an empty message", side.frame(TEXT, fin=False) + side.frame(opcode, b"x"), 1002
    yield "continuation of nothing", side.frame(CONTINUATION, b"x"), 1002
    yield "empty continuation of nothing", side.frame(CONTINUATION), 1002
    yield "fragment of nothing", side.frame(CONTINUATION, b"x", fin=False), 1002
    yield "continuation after the last", part + side.frame(CONTINUATION) + side.frame(CONTINUATION), 1002
    for form, length in ((16, 0), (16, 1), (16, 125), (64, 0), (64, 125), (64, 126), (64, 65_535)):
        yield f"{length} in {form} bits", side.frame(TEXT, b"a" * length, form=form), 1002
    for length in (1 << 63, (1 << 64) - 1, 1 << 63 | 5):
        yield f"length {length:x}", side.frame(TEXT, b"hello", form=64, length=length), 1002
    for length in (LIMIT + 1, 1 << 32, (1 << 63) - 1):
        yield f"length {length:x}", side.frame(TEXT, b"hello", length=length), 1009
        yield f"length {length:x} of a fragment", part + side.frame(CONTINUATION, b"hello", length=length), 1009
        yield f"length {length:x} of what is not UTF-8", side.frame(TEXT, b"\xff", length=length), 1009
    for code in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65_535):
        yield f"close with {code}", side.frame(CLOSE, closing(code)), 1002
        yield f"close with {code} and a reason", side.frame(CLOSE, closing(code, b"why")), 1002
    yield "close with half a code", side.frame(CLOSE, b"\x03"), 1002
    yield "close with bad UTF-8", side.frame(CLOSE, closing(1000, b"\xed\xa0\x80")), 1007
    yield "close that ends in a character", side.frame(CLOSE, closing(1000, "aé".encode()[:2])), 1007
    yield "close with a bad code and bad UTF-8", side.frame(CLOSE, closing(999, b"\xff")), 1002
    yield "bad UTF-8", side.frame(TEXT, b"a\xffb"), 1007
    yield "bad UTF-8 in a fragment", part + side.frame(CONTINUATION, b"\xff", fin=False), 1007
    yield "text that ends in a character", side.frame(TEXT, "aé".encode()[:2]), 1007
    yield "text whose last fragment ends in a character", part + side.frame(CONTINUATION, b"\xe2\x82"), 1007
    yield "text that ends in a character, with an empty fragment", side.frame(TEXT, b"\xe2\x82", fin=False) + side.frame(CONTINUATION), 1007
    yield "a character broken off by the next fragment", side.frame(TEXT, b"\xe2\x82", fin=False) + side.frame(CONTINUATION, b"a"), 1007
    yield "a violation after a ping", side.frame(PING, b"p") + side.frame(PING, rsv=4), 1002
    yield "a violation after a message", text + side.frame(3), 1002


VIOLATIONS = [(client, *violation) for client in (False, True) for violation in violations(Side(client))]


@pytest.mark.parametrize("client, name, data, code", VIOLATIONS, ids=[f"{'client' if client else 'server'}-{name}" for client, name, *_ in
                                                                      VIOLATIONS])
def test_violations_however_they_are_cut(client, name, data, code):
    """One Close with the code, after what was valid; then nothing is read, ever."""
    rng = random.Random(name)
    for cuts in ([], every(len(data) + 20), *([rng.randrange(len(data) + 20)] for _ in range(5))):
        side = Side(client)
        before = side.frame(BINARY, b"before")
        after = side.frame(TEXT, b"after") + side.frame(PING, b"late") + side.frame(CLOSE, closing(1000))
        side.feed(before + data + after, cuts)
        assert side.got[0] == (BINARY, b"before") and side.got[1:] in ([], [(TEXT, b"ok")], [(TEXT, b"a")]), cuts
        assert side.end() == code, cuts
        assert b"late" not in [payload for _, payload, _ in frames_of(side.sent)]
        socket = side.socket
        assert socket.closed and socket.closing and socket.failure.close == code and socket.close_code == 1006
        sent = side.sent
        side.feed(after)
        socket.send(b"x")
        socket.ping()
        socket.close(1001)
        socket.feed(b"")
        assert side.sent == sent and socket.output() == b"" and len(side.got) < 3


def test_a_failure_says_why_in_its_close(side):
    side.feed(side.frame(CONTINUATION, b"x"))
    assert frames_of(side.sent) == [(CLOSE, closing(1002, b"a message is continued that was not begun"), True)]
    assert isinstance(side.socket.failure, ProtocolError)


def test_too_long_is_known_from_the_header(side):
    """Nothing of the payload has come: what a peer announces costs no memory."""
    for data in (side.frame(BINARY, length=LIMIT + 1), side.frame(BINARY, b"x", fin=False) + side.frame(CONTINUATION, length=LIMIT)):
        other = Side(side.socket._client)
        assert other.feed(data[:-1]).end() is None
        assert other.feed(data[-1:]).end() == 1009
    assert side.feed(side.frame(BINARY, b"x" * LIMIT)).got == [(BINARY, b"x" * LIMIT)]
    half = [side.frame(TEXT, b"x" * (LIMIT // 2), fin=False), side.frame(CONTINUATION, b"y" * (LIMIT // 2), fin=False)]
    assert len(side.feed(b"".join(half) + side.frame(CONTINUATION)).got[1][1]) == LIMIT
    assert side.feed(b"".join(half) + side.frame(CONTINUATION, b"z")).end() == 1009


# ---- UTF-8

# Unicode, table 3-7: the well-formed sequences of bytes
WELL_FORMED = re.compile(rb"(?:[\0-\x7f]|[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}|"
                         rb"\xed[\x80-\x9f][\x80-\xbf]|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}|\xf4[\x80-\x8f][\x80-\xbf]{2})*")
ENDINGS = (b"", b"\x80", b"\x90", b"\xa0", b"\x80\x80", b"\x90\x80", b"\xa0\x80", b"\x80\x80\x80", b"\x90\x80\x80", b"\xa0\x80\x80")


def goes_on(data):
    """Whether some text begins with these bytes."""
    return any(WELL_FORMED.fullmatch(data + ending) for ending in ENDINGS)


def sequences():
    """All of two bytes that are not both ASCII, and those of three and four from the edges of the table."""
    yield from (bytes((a, b)) for a in range(256) for b in range(256) if a > 127 or b > 127)
    edges = (0x41, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xff)
    leads = (0xc1, 0xc2, 0xdf, 0xe0, 0xe1, 0xec, 0xed, 0xee, 0xef, 0xf0, 0xf1, 0xf3, 0xf4, 0xf5, 0xf8, 0xff)
    yield from (bytes((a, b, c)) for a in leads for b in edges for c in edges)
    yield from (bytes((a, b, c, d)) for a in leads if a >= 0xf0 for b in edges for c in edges for d in edges)


def test_the_first_bad_byte_of_a_text_ends_it():
    """Within a frame of which more is to come, and byte by byte: the failure is there with the byte, not sooner or later."""
    head = frame(TEXT, length=100)
    for sequence in sequences():
        socket = WebSocket(LIMIT)
        socket.feed(head)
        for number in range(len(sequence)):
            socket.feed(xor(sequence, b"\x37\xfa\x21\x3d")[number:number + 1])
            assert socket.closed is not goes_on(sequence[:number + 1]), (sequence, number)
            if socket.closed:
                assert socket.failure.close == 1007
                break


def test_a_text_is_what_unicode_says():
    for sequence in sequences():
        side = Side()
        assert (side.feed(side.frame(TEXT, sequence)).got == [(TEXT, sequence)]) is bool(WELL_FORMED.fullmatch(sequence)), sequence
        assert side.end() == (None if side.got else 1007)


def test_binary_may_be_anything(side):
    assert side.feed(side.frame(BINARY, b"\xff\xfe", fin=False) + side.frame(CONTINUATION, b"\xc0")).got == [(BINARY, b"\xff\xfe\xc0")]


# ---- Close

@pytest.mark.parametrize("code", [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999])
@pytest.mark.parametrize("reason", ["", "bye", "é" * 61 + "x"], ids=len)
def test_a_close_is_answered_with_its_code(side, code, reason):
    data = side.frame(TEXT, b"last") + side.frame(CLOSE, closing(code, reason.encode()))
    side.feed(data + side.frame(TEXT, b"ignored") + side.frame(PING), every(len(data)))
    assert side.got == [(TEXT, b"last")]
    assert frames_of(side.sent) == [(CLOSE, closing(code), True)]
    socket = side.socket
    assert (socket.closing, socket.closed, socket.close_code, socket.close_reason, socket.failure) == (True, True, code, reason, None)


def test_a_close_without_a_code(side):
    side.feed(side.frame(CLOSE))
    assert frames_of(side.sent) == [(CLOSE, b"", True)]
    assert (side.socket.close_code, side.socket.close_reason, side.socket.closed) == (1005, "", True)


def test_a_close_within_a_message_ends_it(side):
    side.feed(side.frame(TEXT, b"a", fin=False) + side.frame(CLOSE, closing(1001)) + side.frame(CONTINUATION, b"b"))
    assert (side.got, side.end()) == ([], 1001)


def test_closing_first(side):
    """What the peer sent before it heard of it is still read; only its own Close ends the connection."""
    side.socket.send(b"before")
    side.socket.close(1001, "going away")
    side.socket.close(1000)
    assert side.socket.closing and not side.socket.closed
    side.sent += side.socket.output()
    assert frames_of(side.sent) == [(TEXT, b"before", True), (CLOSE, closing(1001, b"going away"), True)]
    side.socket.send(b"late")
    side.feed(side.frame(PING, b"x") + side.frame(TEXT, b"on its way"))
    assert side.got == [(TEXT, b"on its way")] and side.end() == 1001 and not side.socket.closed
    side.feed(side.frame(CLOSE, closing(1001)))
    assert side.socket.closed and side.socket.close_code == 1001 and side.end() == 1001


def test_a_failure_while_closing_sends_no_second_close(side):
    side.socket.close()
    side.sent += side.socket.output()
    side.feed(side.frame(3))
    assert side.end() == 1000 and side.socket.closed and side.socket.failure


@pytest.mark.parametrize("last", ["close", "failure"])
def test_what_is_answered_at_once_goes_before_the_close(side, last):
    """A question and the end of the connection came in one piece: the answer is not lost."""
    side.socket.feed(side.frame(TEXT, b"question") + side.frame(PING, b"p") + side.frame(CLOSE if last == "close" else 3))
    assert side.socket.closed and side.socket.messages() == [(TEXT, b"question")]
    side.socket.send(b"answer")
    frames = frames_of(side.socket.output())
    assert [opcode for opcode, _, _ in frames] == [PONG, TEXT, CLOSE] and frames[1][1] == b"answer"
    side.socket.send(b"late")
    assert side.socket.output() == b""


@pytest.mark.parametrize("end", [lambda socket: socket.close(), lambda socket: socket.feed(b"")], ids=["close", "torn"])
def test_what_nobody_will_hear_is_not_kept(side, end):
    end(side.socket)
    side.socket.output()
    tracemalloc.start()
    try:
        for _ in range(1000):
            side.socket.send(b"x" * 1000)
            side.socket.ping()
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept < 10_000


@pytest.mark.parametrize("reason, sent", [("x" * 200, b"x" * 123), ("é" * 100, "é".encode() * 61), ("😀" * 40, "😀".encode() * 30)])
def test_a_reason_is_cut_between_characters(side, reason, sent):
    side.socket.close(1011, reason)
    assert frames_of(side.socket.output()) == [(CLOSE, closing(1011, sent), True)]


@pytest.mark.parametrize("begun", [b"", b"\x81", b"\x81\x85\x37", b"\x01\x81\x37\xfa\x21\x3da"])
def test_a_stream_that_ends_without_a_close(begun):
    socket = WebSocket(LIMIT)
    socket.send(b"unsent")
    for data in filter(None, (begun, )):
        socket.feed(data)
    socket.feed(b"")
    assert (socket.closed, socket.closing, socket.close_code, socket.failure) == (True, True, 1006, None)
    socket.send(b"x")
    assert socket.output() == b"" and socket.messages() == []


# ---- pings

def test_pings_are_answered_in_order_with_what_they_carry(side):
    payloads = [b"", b"a", b"x" * 125, bytes(range(125))] * (thrum.PONGS_MAX // 4)
    side.feed(b"".join(side.frame(PING, payload) for payload in payloads))
    assert frames_of(side.sent) == [(PONG, payload, True) for payload in payloads]


def test_a_flood_of_pings_to_who_never_reads_is_bounded(side):
    for number in range(10_000):
        side.socket.feed(side.frame(PING, b"%d" % number))
    pongs = [payload for _, payload, _ in frames_of(side.socket.output())]
    assert pongs == [b"%d" % number for number in (*range(thrum.PONGS_MAX - 1), 9999)]      # section 5.5.3: the newest is answered


def test_frames_count_when_they_are_whole(side):
    """They are the signs of life: a frame that trickles in is none before it ends."""
    data = side.frame(TEXT, b"ab", fin=False) + side.frame(PONG, b"c") + side.frame(CONTINUATION) + side.frame(BINARY, b"de")
    ends = [len(side.frame(TEXT, b"x" * size)) for size in (2, 1, 0, 2)]
    counts = []
    for at in range(len(data)):
        side.feed(data[at:at + 1])
        counts.append(side.socket.frames)
    assert counts == [sum(sum(ends[:number + 1]) <= at + 1 for number in range(4)) for at in range(len(data))]


def test_a_pong_that_nobody_asked_for_is_ignored(side):
    side.feed(side.frame(PONG, b"x"))
    assert (side.got, side.sent, side.socket.closing) == ([], b"", False)


# ---- floods

def linear(work, few, many):
    """Whether `many` take about as long as they should after `few`: at most three times as long, of three tries."""
    return any(work(many) / many < 3 * min(work(few) for _ in range(3)) / few for _ in range(3))


@pytest.mark.parametrize("size", [0, 1, 64])
def test_fragments_take_time_in_proportion_to_their_number(size):
    """A copy of what there is with each of them would make it ten times as much."""
    def flood(count):
        data = frame(TEXT, b"a" * size, fin=False) + frame(CONTINUATION, b"a" * size, fin=False) * (count - 2) + frame(CONTINUATION)
        socket = WebSocket(16 << 20)
        begin = time.process_time()
        socket.feed(data)
        seconds = time.process_time() - begin
        assert socket.messages() == [(TEXT, b"a" * size * (count - 1))]
        return seconds
    assert linear(flood, 4_000, 60_000)


def test_bytes_one_by_one_take_time_in_proportion_to_their_number():
    def drip(count):
        data = frame(TEXT, "aé".encode() * (count // 3))
        socket = WebSocket(LIMIT)
        begin = time.process_time()
        for at in range(len(data)):
            socket.feed(data[at:at + 1])
        seconds = time.process_time() - begin
        assert socket.messages() == [(TEXT, "aé".encode() * (count // 3))]
        return seconds
    assert linear(drip, 9_000, 240_000)


def test_a_message_takes_its_time_once():
    """A mebibyte in pieces of four is masked, checked and kept piece by piece."""
    def trickle(count):
        data, socket = b"x" * count, WebSocket(LIMIT, client=True)
        socket.feed(frame(TEXT, length=count, mask=b""))
        begin = time.process_time()
        for at in range(0, count, 4):
            socket.feed(data[at:at + 4])
        seconds = time.process_time() - begin
        assert len(socket.messages()) == 1
        return seconds
    assert linear(trickle, 20_000, 600_000)


@pytest.mark.parametrize("size, kept", [(0, 0), (1, 20_000), (64, 1_280_000)])
def test_fragments_take_no_more_memory_than_what_they_carry(size, kept):
    side = Side(limit=16 << 20)
    side.feed(side.frame(BINARY, b"", fin=False))
    piece = side.frame(CONTINUATION, b"x" * size, fin=False) * 100
    tracemalloc.start()
    try:
        for _ in range(200):
            side.socket.feed(piece)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * kept + 50_000


# ---- the handshake

KEY = "dGhlIHNhbXBsZSBub25jZQ=="        # of section 1.3
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def head(first="GET /ws HTTP/1.1", **changes):
    """The head of a request for a WebSocket; None takes a header out."""
    fields = {"host": "localhost", "upgrade": "websocket", "connection": "Upgrade", "sec_websocket_key": KEY, "sec_websocket_version": "13",
              **changes}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items() if value is not None]
    return thrum.decode_head(bytearray("\r\n".join([first, *lines, "", ""]).encode()))


@pytest.mark.parametrize("changes", [{}, {"upgrade": "WebSocket"}, {"upgrade": "h2c, websocket"}, {"connection": "keep-alive, upgrade"},
                                     {"sec_websocket_protocol": "chat"}, {"sec_websocket_extensions": "permessage-deflate"},
                                     {"content_length": "0"}, {"origin": "null"}], ids=repr)
def test_a_handshake_that_is_accepted(changes):
    """Whatever it offers, nothing is chosen."""
    assert thrum.accept_upgrade(head(**changes)) == (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                                                     b"Sec-WebSocket-Accept: " + ACCEPT.encode() + b"\r\n\r\n")


@pytest.mark.parametrize("changes, status", [
    ({"first": "POST /ws HTTP/1.1"}, 405), ({"first": "get /ws HTTP/1.1"}, 405), ({"first": "GET /ws HTTP/1.0"}, 400),
    ({"upgrade": None}, 400), ({"upgrade": "h2c"}, 400), ({"connection": None}, 400), ({"connection": "keep-alive"}, 400),
    ({"connection": "close"}, 400), ({"content_length": "5"}, 400),
    ({"sec_websocket_key": None}, 400), ({"sec_websocket_key": ""}, 400), ({"sec_websocket_key": "AAAA"}, 400),
    ({"sec_websocket_key": base64.b64encode(bytes(15)).decode()}, 400), ({"sec_websocket_key": base64.b64encode(bytes(17)).decode()}, 400),
    ({"sec_websocket_key": base64.b64encode(bytes(18)).decode()}, 400), ({"sec_websocket_key": KEY[:-1] + "*"}, 400),
    ({"sec_websocket_key": KEY[:9] + "*" + KEY[9:]}, 400), ({"sec_websocket_key": KEY + ", " + KEY}, 400),
    ({"sec_websocket_key": "é" * 12}, 400),
    ({"sec_websocket_version": None}, 426), ({"sec_websocket_version": "8"}, 426), ({"sec_websocket_version": "13, 8"}, 426),
    ({"sec_websocket_version": "013"}, 426), ({"sec_websocket_version": ""}, 426)], ids=repr)
def test_a_handshake_that_is_refused(changes, status):
    with pytest.raises(HttpError) as raised:
        thrum.accept_upgrade(head(**changes))
    error = raised.value
    assert (error.http, str(error)) == (status, thrum.REASONS[status])
    assert error.headers == {405: {"Allow": "GET"}, 426: {"Upgrade": "websocket", "Sec-WebSocket-Version": "13"}}.get(status, {})


def test_both_sides_of_the_handshake():
    key = base64.b64encode(os.urandom(16)).decode()
    buffer = bytearray(thrum.request_upgrade("localhost:80", "/ws?token=a", key, {"Origin": "http://localhost:80"}) + b"frames")
    asked = thrum.decode_head(buffer)
    assert buffer == b"frames" and asked.query == {"token": "a"} and asked.upgrades
    assert (asked.headers["host"], asked.headers["origin"]) == ("localhost:80", "http://localhost:80")
    buffer = bytearray(thrum.accept_upgrade(asked) + b"more")
    answer = thrum.decode_response_head(buffer)
    thrum.check_upgrade(answer, key)
    assert buffer == b"more"
    assert answer.headers["sec-websocket-accept"] == base64.b64encode(
        hashlib.sha1(key.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()).decode()


@pytest.mark.parametrize("status, changes", [
    (200, {}), (401, {}), (101, {"Upgrade": "h2c"}), (101, {"Upgrade": None}), (101, {"Connection": None}), (101, {"Connection": "close"}),
    (101, {"Sec-WebSocket-Accept": None}), (101, {"Sec-WebSocket-Accept": ACCEPT.lower()}), (101, {"Sec-WebSocket-Accept": KEY}),
    (101, {"Sec-WebSocket-Extensions": "permessage-deflate"}), (101, {"Sec-WebSocket-Protocol": "chat"})], ids=repr)
def test_an_answer_that_opens_nothing(status, changes):
    fields = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Accept": ACCEPT}
    good = thrum.decode_response_head(bytearray(thrum.encode_response(101, fields)))
    thrum.check_upgrade(good, KEY)
    fields = {name: value for name, value in {**fields, **changes}.items() if value is not None}
    bad = thrum.decode_response_head(bytearray(thrum.encode_response(status, fields)))
    with pytest.raises(ProtocolError):
        thrum.check_upgrade(bad, KEY)


def test_the_examples_run():
    for thing in (WebSocket, thrum.encode_frame):
        for test in doctest.DocTestFinder(recurse=False).find(thing, thing.__name__, globs=dict(vars(thrum))):
            assert doctest.DocTestRunner().run(test).failed == 0 and test.examples
