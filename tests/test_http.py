"""Section 15: heads of requests in, responses out (RFC 9112)."""

import doctest
import http.client
import io
import random
import string

import pytest

import thrum
from thrum import Head, HttpError, decode_head, decode_response_head, encode_response


def read(data, step=1 << 20):
    """What `decode_head` makes of `data` that arrives in pieces of `step` bytes: a Head, None, or the status of the error."""
    buffer = bytearray()
    for at in range(0, len(data), step):
        buffer += data[at:at + step]
        try:
            head = decode_head(buffer)
        except HttpError as error:
            return error.http
        if head is not None:
            return head
    return None


def request(*lines, first="GET / HTTP/1.1", host="Host: h"):
    return "\r\n".join([first, *([host] if host else []), *lines, "", ""]).encode("latin-1")


# ---- what is a head

HEADS = [
    # request, (method, target, version, headers), path, query
    (request(), ("GET", "/", "1.1", {"host": "h"}), "/", {}),
    (request(first="POST /a/b?c=d HTTP/1.1"), ("POST", "/a/b?c=d", "1.1", {"host": "h"}), "/a/b", {"c": "d"}),
    (b"\r\n" + request(), ("GET", "/", "1.1", {"host": "h"}), "/", {}),                # RFC 9112, section 2.2
    (request("A:b", "C: d ", "E:\t f\t"), ("GET", "/", "1.1", {"host": "h", "a": "b", "c": "d", "e": "f"}), "/", {}),
    (request("Empty:", "Blank:  "), ("GET", "/", "1.1", {"host": "h", "empty": "", "blank": ""}), "/", {}),
    (request("X: a", "x: b", "X: c"), ("GET", "/", "1.1", {"host": "h", "x": "a, b, c"}), "/", {}),
    (request("X: a:b\tc\xe9"), ("GET", "/", "1.1", {"host": "h", "x": "a:b\tc\xe9"}), "/", {}),
    (request("!#$%&'*+-.^_`|~0aZ: 1"), ("GET", "/", "1.1", {"host": "h", "!#$%&'*+-.^_`|~0az": "1"}), "/", {}),
    (request(first="GET / HTTP/1.0", host=""), ("GET", "/", "1.0", {}), "/", {}),
    (request(first="GET / HTTP/1.9"), ("GET", "/", "1.1", {"host": "h"}), "/", {}),      # we answer as 1.1 (RFC 9110, section 2.5)
    (request(first="get / HTTP/1.1"), ("get", "/", "1.1", {"host": "h"}), "/", {}),      # methods have a case of letters
    (request(first="OPTIONS * HTTP/1.1"), ("OPTIONS", "*", "1.1", {"host": "h"}), "*", {}),
    (request(first="GET //a//b/../c HTTP/1.1"), ("GET", "//a//b/../c", "1.1", {"host": "h"}), "//a//b/../c", {}),
    (request(host="Host:"), ("GET", "/", "1.1", {"host": ""}), "/", {}),
    # the absolute form: its host counts, not Host (section 3.2.2)
    (request(first="GET http://Evil:80/x?y=z HTTP/1.1"), ("GET", "/x?y=z", "1.1", {"host": "Evil:80"}), "/x", {"y": "z"}),
    (request(first="GET HTTP://evil HTTP/1.1"), ("GET", "/", "1.1", {"host": "evil"}), "/", {}),
    (request(first="GET http://evil?q HTTP/1.1"), ("GET", "/?q", "1.1", {"host": "evil"}), "/", {"q": ""}),
    # percent-decoding
    (request(first="GET /a%20b%2fc%C3%A9?%61=%62%26&a=2 HTTP/1.1"),
     ("GET", "/a%20b%2fc%C3%A9?%61=%62%26&a=2", "1.1", {"host": "h"}), "/a b/cé", {"a": "b&"}),
    (request(first="GET /%zz%4 HTTP/1.1"), ("GET", "/%zz%4", "1.1", {"host": "h"}), "/%zz%4", {}),
    (request(first="GET /%ff%25%34%31 HTTP/1.1"), ("GET", "/%ff%25%34%31", "1.1", {"host": "h"}), "/\ufffd%41", {}),
    (request(first="GET /+?a+b=c+d%2B&&=&e=f=g?h HTTP/1.1"),
     ("GET", "/+?a+b=c+d%2B&&=&e=f=g?h", "1.1", {"host": "h"}), "/+", {"a b": "c d+", "": "", "e": "f=g?h"}),
    # at the limits
    (request(*["a: b"] * (thrum.HEADERS_MAX - 1)), ("GET", "/", "1.1", {"host": "h", "a": ", ".join("b" * (thrum.HEADERS_MAX - 1))}),
     "/", {}),
    (request(first="M" * thrum.METHOD_MAX + " / HTTP/1.1"), ("M" * thrum.METHOD_MAX, "/", "1.1", {"host": "h"}), "/", {}),
]


@pytest.mark.parametrize("data, fields, path, query", HEADS, ids=[repr(data[:50]) for data, *_ in HEADS])
def test_heads_whole_byte_by_byte_and_with_a_tail(data, fields, path, query):
    head = read(data)
    assert (head.method, head.target, head.version, head.headers) == fields
    assert (head.path, head.query) == (path, query)
    assert read(data, 1) == head
    buffer = bytearray(data + b"tail\r\n\r\n")
    assert decode_head(buffer) == head and buffer == b"tail\r\n\r\n"
    assert all(read(data[:end]) is None for end in range(len(data)))


# ---- what is none

BAD = [
    # request, status
    (request(first="GET /"), 400),                                      # HTTP/0.9
    (request(first="GET  / HTTP/1.1"), 400), (request(first="GET /  HTTP/1.1"), 400), (request(first=" GET / HTTP/1.1"), 400),
    (request(first="GET / HTTP/1.1 "), 400), (request(first="GET\t/ HTTP/1.1"), 400), (request(first="GET / a HTTP/1.1"), 400),
    (request(first="GET / HTTP/1."), 400), (request(first="GET / HTTP/11.1"), 400), (request(first="GET / http/1.1"), 400),
    (request(first="GET / HTTP/1.1x"), 400), (request(first="GET / ICY/1.1"), 400), (request(first="G@T / HTTP/1.1"), 400),
    (request(first=""), 400), (b"\r\n\r\n" + request(), 400), (request(first="/ HTTP/1.1"), 400),
    (request(first="GET / HTTP/2.0"), 505), (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505), (request(first="GET / HTTP/0.9"), 505),
    (request(first="M" * (thrum.METHOD_MAX + 1) + " / HTTP/1.1"), 501),
    # targets
    (request(first="GET * HTTP/1.1"), 400), (request(first="GET a HTTP/1.1"), 400), (request(first="CONNECT h:80 HTTP/1.1"), 400),
    (request(first="GET /a#b HTTP/1.1"), 400), (request(first="GET /\xe9 HTTP/1.1"), 400), (request(first="GET /\x7f HTTP/1.1"), 400),
    (request(first="GET /\0 HTTP/1.1"), 400), (request(first="GET http:// HTTP/1.1"), 400), (request(first="GET http:///a HTTP/1.1"), 400),
    (request(first="GET http://u@h/ HTTP/1.1"), 400), (request(first="GET http://u:p@h/ HTTP/1.1"), 400),
    (request(first="GET https://h/ HTTP/1.1"), 400), (request(first="GET ws://h/ HTTP/1.1"), 400),
    # lines
    (request("A : b"), 400), (request("A\t: b"), 400), (request(": b"), 400), (request("A"), 400), (request("A b: c"), 400),
    (request(" A: b"), 400), (request("A: b", " c"), 400), (request("A: b", "\tc"), 400),      # the last two are folded
    (request(" ", host=""), 400), (request("A: b\0"), 400), (request("A: b\x1fc"), 400), (request("A: \x7f"), 400),
    (request("A(: b"), 400), (request("\xe9: b"), 400), (request("A: b\rC: d"), 400), (request("A: b\nC: d"), 400),
    (request("A: b\r"), 400), (request("A: b\n"), 400), (request("\rA: b"), 400), (request("A: b\n c"), 400),
    (b"GET / HTTP/1.1\nHost: h\n\n", 400), (b"\nGET / HTTP/1.1\r\nHost: h\r\n\r\n", 400), (b"GET / HTTP/1.0\n\n", 400),
    (b"GET / HTTP/1.1\r\nHost: h\r\n\n", 400), (b"GET / HTTP/1.1\r\nHost: h\n\r\n", 400),
    # Host
    (request(host=""), 400), (request("Host: h"), 400), (request("host: other"), 400),
    (request(first="GET http://h/ HTTP/1.1", host=""), 400),
    (request("Host: a", "Host: a", first="GET / HTTP/1.0", host=""), 400),
    # where a body ends
    (request("Transfer-Encoding: chunked"), 411), (request("Transfer-Encoding: gzip"), 411), (request("transfer-encoding:"), 411),
    (request("Transfer-Encoding: identity"), 411), (request("Transfer-Encoding: chunked", first="GET / HTTP/1.0"), 411),
    (request("Transfer-Encoding: chunked", "Content-Length: 5"), 400), (request("Content-Length: 5", "Transfer-Encoding: x"), 400),
    (request("Transfer-Encoding : chunked", "Content-Length: 5"), 400), (request("Transfer-Encoding\x0b: chunked"), 400),
    (request("Content-Length: 5", "Content-Length: 6"), 400), (request("Content-Length: 5", "content-length: 5"), 400),
    (request("Content-Length: 5, 5"), 400), (request("Content-Length: +5"), 400), (request("Content-Length: -5"), 400),
    (request("Content-Length: 0x5"), 400), (request("Content-Length: 5 5"), 400), (request("Content-Length: 5.0"), 400),
    (request("Content-Length: 5_0"), 400), (request("Content-Length:"), 400), (request("Content-Length: \xb2"), 400),
    (request("Content-Length: 5;a"), 400), (request("Content-Length: " + "9" * 19), 400), (request("Content-Length: " + "9" * 9000), 400),
    # too much
    (request(*["a: b"] * thrum.HEADERS_MAX), 431), (request("A: " + "b" * thrum.HEAD_MAX), 431),
    (request(first="GET /" + "a" * thrum.HEAD_MAX + " HTTP/1.1"), 414),
]


@pytest.mark.parametrize("data, status", BAD, ids=[repr(data[:60]) + f"-{number}" for number, (data, _) in enumerate(BAD)])
def test_bad_heads_whole_and_byte_by_byte(data, status):
    assert read(data) == status
    assert read(data, 1 if len(data) < 5000 else 13) == status


def test_the_answer_says_no_more_than_its_reason():
    with pytest.raises(HttpError) as raised:
        decode_head(bytearray(request("A : secret")))
    assert str(raised.value) == "Bad Request" and raised.value.headers == {} and raised.value.data is None


# ---- how long it may be

def test_a_head_of_the_greatest_length_passes():
    bare = len(request("A: "))
    data = request("A: " + "b" * (thrum.HEAD_MAX - bare))
    assert len(data) == thrum.HEAD_MAX
    assert read(data).headers["a"][:1] == "b" and read(data, 7) == read(data)
    assert read(request("A: " + "b" * (thrum.HEAD_MAX - bare + 1))) == 431


@pytest.mark.parametrize("begin, more, status", [
    (b"GET /", b"a", 414), (b"", b"G", 414), (b"GET / HTTP/1.1\r\n", b"a", 431), (b"GET / HTTP/1.1\r\nA: ", b"b", 431),
    (b"GET / HTTP/1.1\r\n", b"a: b\r\n", 431), (b"GET / HTTP/1.1\r\n", b"a: bbbbbbbbbbbbbbb\r\n", 431)], ids=repr)
@pytest.mark.parametrize("step", [9, 1000])
def test_a_head_that_never_ends_is_refused_at_the_limit(begin, more, status, step):
    """A bomb costs its sender the limit, and the daemon no more memory than that."""
    buffer, sent = bytearray(), 0
    stream = begin + more * (2 * thrum.HEAD_MAX // len(more))
    with pytest.raises(HttpError) as raised:
        while True:
            buffer += stream[sent:sent + step]
            sent += step
            assert decode_head(buffer) is None and len(buffer) < thrum.HEAD_MAX
    assert raised.value.http == status
    assert sent < thrum.HEAD_MAX + step
    if more.endswith(b"\n"):
        assert sent < len(begin) + (thrum.HEADERS_MAX + 1) * len(more) + step


def test_a_long_body_is_not_taken_for_a_long_head():
    body = b"\n" * (4 * thrum.HEAD_MAX)
    buffer = bytearray(request(f"Content-Length: {len(body)}") + body)
    assert decode_head(buffer).length == len(body)
    assert buffer == body


# ---- what it says

@pytest.mark.parametrize("version, connection, keeps", [
    ("1.1", None, True), ("1.1", "close", False), ("1.1", "Upgrade, CLOSE", False), ("1.1", "keep-alive", True), ("1.1", "enclosed", True),
    ("1.0", None, False), ("1.0", "Keep-Alive", True), ("1.0", "keep-alive , x", True), ("1.0", "close", False)])
def test_whether_the_connection_stays(version, connection, keeps):
    lines = [f"Connection: {connection}"] if connection else []
    assert read(request(*lines, first=f"GET / HTTP/{version}")).keeps is keeps


@pytest.mark.parametrize("lines, upgrades", [
    ([], False), (["Upgrade: websocket"], True), (["Upgrade: h2c,\tWebSocket "], True), (["Upgrade: h2c", "Upgrade: WEBSOCKET"], True),
    (["Upgrade: websocket2"], False), (["Upgrade: websocket/13"], False), (["Upgrade:"], False), (["Connection: websocket"], False)])
def test_whether_it_asks_for_a_websocket(lines, upgrades):
    assert read(request(*lines)).upgrades is upgrades


@pytest.mark.parametrize("text, length", [(None, 0), ("0", 0), ("5", 5), ("007", 7), ("9" * 18, 10 ** 18 - 1)])
def test_the_length_of_a_body(text, length):
    assert read(request(*[f"Content-Length: {text}"] if text else [])).length == length


# ---- streams

def random_heads(rng):
    """Some requests, each (method, target, headers, body), and their bytes."""
    token, value = string.ascii_letters + string.digits + "-_.!~", string.ascii_letters + string.punctuation + "\xe9\xff \t"
    requests, stream = [], b""
    for _ in range(rng.randrange(1, 5)):
        method, target = rng.choice(("GET", "POST", "HEAD", "x-y")), "/" + "".join(rng.choices(string.ascii_letters + "%&=?/", k=9))
        body = rng.randbytes(rng.choice((0, 0, 30)))
        headers = {"host": "h", "content-length": str(len(body))}
        for _ in range(rng.randrange(6)):
            name = "x-" + "".join(rng.choices(token, k=rng.randrange(9))).lower()
            headers[name] = "".join(rng.choices(value, k=rng.randrange(30))).strip()
        lines = [f"{rng.choice((name, name.upper(), name.title()))}:{rng.choice(('', ' ', chr(9)))}{value}{rng.choice(('', '  '))}"
                 for name, value in headers.items()]
        stream += f"{method} {target} HTTP/1.1\r\n".encode() + "".join(line + "\r\n" for line in lines).encode("latin-1") + b"\r\n" + body
        requests.append((method, target, headers, body))
    return requests, stream


def test_any_requests_survive_any_split():
    for seed in range(300):
        rng = random.Random(seed)
        requests, stream = random_heads(rng)
        buffer, found, head = bytearray(), [], None
        while stream or head:
            cut = rng.randrange(1, len(stream) + 1) if stream else 0
            buffer += stream[:cut]
            stream = stream[cut:]
            while True:
                head = head or decode_head(buffer)
                if head is None or len(buffer) < head.length:
                    break
                found.append((head.method, head.target, head.headers, bytes(buffer[:head.length])))
                del buffer[:head.length]
                head = None
        assert found == requests, f"seed {seed}"


def test_any_bytes_give_a_head_or_an_error():
    """Whatever arrives, and however it is cut, the answer is the same and it is an HttpError at most."""
    rng = random.Random(1)
    pieces = [b"GET", b" ", b"/", b"HTTP/1.1", b"\r\n", b"\n", b"\r", b"Host: h", b":", b"\0", b"\xff", b"Content-Length: 1", b"%", b"*",
              b"http://", b"?", b"@", b"a", b"Upgrade: websocket", b"\r\n\r\n", b"\t", b"Transfer-Encoding: chunked"]
    good = request("A: b", "Content-Length: 1")
    for _ in range(3000):
        if rng.random() < 0.5:
            data = b"".join(rng.choices(pieces, k=rng.randrange(12))) + b"\r\n\r\n"
        else:
            at = rng.randrange(len(good))
            data = good[:at] + rng.choice(pieces) + good[at + rng.randrange(3):]
        whole = read(data)
        assert isinstance(whole, (Head, int)) or whole is None and b"\r\n\r\n" not in data.lstrip(b"\r\n")
        if isinstance(whole, Head):
            assert whole.path and isinstance(whole.query, dict) and whole.length >= 0 and whole.keeps in (True, False)
        assert read(data, rng.randrange(1, 9)) == whole, data


class Wire(io.BytesIO):
    """A socket that keeps what is sent."""

    sendall = io.BytesIO.write

    def makefile(self, *_):
        return self


def test_what_another_client_sends():
    connection = http.client.HTTPConnection("localhost:8080")
    connection.sock = wire = Wire()
    connection.request("POST", "/api/telemetry?token=a%20b", body=b"{}", headers={"Content-Type": "application/json"})
    buffer = bytearray(wire.getvalue())
    head = decode_head(buffer)
    assert (head.method, head.path, head.query, head.length, head.keeps) == ("POST", "/api/telemetry", {"token": "a b"}, 2, True)
    assert head.headers["host"] == "localhost:8080" and buffer == b"{}"


# ---- responses

RESPONSES = [
    ((200, {}, b""), b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    ((200, {"A": "b", "C": "é"}, b"xy"), b"HTTP/1.1 200 OK\r\nA: b\r\nC: \xe9\r\nContent-Length: 2\r\n\r\nxy"),
    ((404, {"Connection": "close"}, b"Not Found"), b"HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: 9\r\n\r\nNot Found"),
    ((304, {"ETag": '"a"'}, b""), b'HTTP/1.1 304 Not Modified\r\nETag: "a"\r\n\r\n'),
    ((204, {}, b""), b"HTTP/1.1 204 No Content\r\n\r\n"),
    ((100, {}, b""), b"HTTP/1.1 100 Continue\r\n\r\n"),
    ((101, {"Upgrade": "websocket"}, b""), b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"),
]


@pytest.mark.parametrize("response, data", RESPONSES, ids=[response[0] for response, _ in RESPONSES])
def test_responses_both_ways(response, data):
    status, headers, body = response
    assert encode_response(status, headers, body) == data
    for step in (1, len(data)):
        buffer, head = bytearray(), None
        for at in range(0, len(data), step):
            buffer += data[at:at + step]
            head = head or decode_response_head(buffer)
        assert (head.status, head.version) == (status, "1.1") and buffer == body
        assert {name.lower(): value for name, value in headers.items()}.items() <= head.headers.items()


def test_a_response_to_head_has_the_length_but_not_the_body():
    assert encode_response(200, {}, b"xy", head_only=True) == b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"


RENAMED = (413, 414)            # by RFC 9110; older Pythons have the older phrases


@pytest.mark.parametrize("status", [status for status in thrum.REASONS if status >= 200])
def test_another_client_reads_our_responses(status):
    body = b"" if status in (204, 304) else b"x" * 5000
    response = http.client.HTTPResponse(Wire(encode_response(status, {"X-Y": "z"}, body)))
    response.begin()
    assert (response.status, response.headers["x-y"], response.read()) == (status, "z", body)
    assert response.reason == http.client.responses[status] or status in RENAMED


@pytest.mark.parametrize("data", [
    b"HTTP/1.1 20 OK\r\n\r\n", b"HTTP/1.1 2000 OK\r\n\r\n", b"HTTP/1.1 099 OK\r\n\r\n", b"HTTP/2 200 OK\r\n\r\n",
    b"HTTP/1.1  200 OK\r\n\r\n", b"HTTP/1.1 200OK\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    b"HTTP/1.1 200 \0\r\n\r\n", b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n"], ids=repr)
def test_bad_responses(data):
    with pytest.raises(HttpError):
        decode_response_head(bytearray(data))


def test_responses_without_a_reason():
    assert decode_response_head(bytearray(b"HTTP/1.1 200\r\n\r\n")).status == 200
    assert decode_response_head(bytearray(b"HTTP/1.0 101 \r\n\r\n")).version == "1.0"


def test_the_examples_run():
    globs = dict(vars(thrum))
    for test in doctest.DocTestFinder(recurse=False).find(decode_head, "decode_head", globs=globs):
        assert doctest.DocTestRunner().run(test).failed == 0 and test.examples
