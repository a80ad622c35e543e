"""Who gets in at the port, and who does not: real sockets against a real daemon."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from conftest import Repo
from wire import Refused, Wire, http_get, port_of, sockets_open

import thrum

TOKEN = "t0p-secret"


def make(tmp_path_factory, name, **settings):
    repo = Repo(tmp_path_factory.mktemp(name))
    repo.git("init", "-q")
    repo.ok("init")
    for setting, value in settings.items():
        repo.ok("config", "set", "daemon." + setting, value)
    if settings:
        repo.ok("daemon", "restart")
    return repo


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    repo = make(tmp_path_factory, "open")
    yield repo
    repo.close()


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    repo = make(tmp_path_factory, "locked", ws_token=TOKEN)
    yield repo
    repo.close()


def raw(repo, data, timeout=10, half=False):
    """What the port answers to bytes until it hangs up."""
    with socket.create_connection(("127.0.0.1", port_of(repo)), timeout) as sock:
        sock.sendall(data)
        if half:
            sock.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while data := sock.recv(65536):
                answer += data
        except ConnectionError:
            pass
        return answer


def status_of(answer):
    return int(answer.split(b" ", 2)[1]) if answer else 0


def opens(repo, path="/ws", **headers):
    """101, or the status with which a WebSocket is refused."""
    headers = {name.replace("_", "-"): value.format(port=port_of(repo)) for name, value in headers.items()}
    try:
        Wire(repo, path, headers).close()
        return 101
    except Refused as refused:
        return refused.args[0]


def test_health(repo):
    with Wire(repo):
        status, headers, body = http_get(repo, "/health")
        told = json.loads(body)
        assert status == 200 and headers["content-type"] == "application/json"
        assert told["status"] == "healthy" and told["connections"] == 1 and abs(told["timestamp"] - time.time()) < 60
    assert http_get(repo, "/health", method="POST")[0] == 405
    assert http_get(repo, "/health", method="HEAD")[2] == b""


@pytest.mark.parametrize("host, expected", [
    ("localhost:{port}", 101), ("127.0.0.1:{port}", 101), ("[::1]:{port}", 101), ("LOCALHOST:{port}", 101),
    ("localhost", 403), ("evil.example:{port}", 403), ("localhost.evil.example:{port}", 403), ("127.0.0.1:1", 403), ("", 403),
    ("localhost:{port}, evil.example", 403), ("0.0.0.0:{port}", 403)])
def test_host(repo, host, expected):
    """DNS rebinding: a name that is not ours, though it leads here."""
    assert opens(repo, Host=host) == expected
    found = http_get(repo, "/health", {"Host": host.format(port=port_of(repo))})
    assert found[0] == (200 if expected == 101 else expected)
    if expected != 101:
        assert found[2] == b"Forbidden\n"


@pytest.mark.parametrize("origin, expected", [
    ("http://localhost:{port}", 101), ("http://127.0.0.1:{port}", 101), ("http://localhost:1", 403), ("https://evil.example", 403),
    ("null", 403), ("http://localhost:{port}.evil.example", 403), ("file://", 403), ("", 403)])
def test_origin(repo, origin, expected):
    assert opens(repo, Origin=origin) == expected
    found = http_get(repo, "/health", {"Origin": origin.format(port=port_of(repo))})
    assert found[0] == (200 if expected == 101 else 403) and not any("access-control" in name for name in found[1])


@pytest.mark.parametrize("site, mode, path, expected", [
    ("same-origin", "cors", "/health", 200), ("none", "navigate", "/health", 200), ("cross-site", "no-cors", "/health", 403),
    ("same-site", "no-cors", "/health", 403), ("cross-site", "navigate", "/health", 403)])
def test_what_the_browser_says_of_the_page_that_asks(repo, site, mode, path, expected):
    """An image or a script of another page: it sends no Origin, but says where it comes from."""
    assert http_get(repo, path, {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode})[0] == expected


def test_token(locked):
    own = f"http://localhost:{port_of(locked)}"
    assert opens(locked) == 401 and opens(locked, "/ws?token=wrong") == 401 and opens(locked, f"/ws?token={TOKEN}") == 101
    assert opens(locked, Authorization="Bearer " + TOKEN) == 101 and opens(locked, Authorization="Bearer x") == 401
    assert opens(locked, Authorization="Basic " + TOKEN) == 401 and opens(locked, f"/ws?token={TOKEN}x") == 401
    assert opens(locked, Origin="http://evil.example") == 403 and opens(locked, f"/ws?token={TOKEN}", Origin="http://evil.example") == 101
    assert opens(locked, Origin=own) == 401             # forged, as a program can: it does not stand for the token
    for path in ("/", "/health", "/app.js", "/nothing"):
        assert http_get(locked, path)[::2] == (401, b"Unauthorized\n")
    assert http_get(locked, f"/health?token={TOKEN}")[0] == 200


def test_the_link_for_a_browser_is_good_once(locked):
    told = locked.json("daemon", "status")
    path = told["page"].partition(str(told["ws_port"]))[2]
    assert path.startswith("/?link=") and "Page:     http://localhost:" in locked.ok("daemon", "status")
    status, headers, _ = http_get(locked, path)
    cookie = headers["set-cookie"]
    assert (status, headers["location"]) == (303, "/")
    assert cookie.endswith("; Path=/; HttpOnly; SameSite=Strict") and TOKEN not in cookie
    assert http_get(locked, path)[0] == 401 and http_get(locked, "/?link=")[0] == 401
    cookie = cookie.partition(";")[0]
    assert http_get(locked, "/health", {"Cookie": f"a=b; {cookie}"})[0] == 200
    assert opens(locked, Cookie=cookie, Origin=f"http://localhost:{port_of(locked)}") == 101
    # A page on another port of localhost is the same site for cookies, but not the same origin.
    assert opens(locked, Cookie=cookie, Origin="http://localhost:3000") == 403
    assert http_get(locked, "/health", {"Cookie": cookie[:-1] + "0"})[0] == (200 if cookie[-1] == "0" else 401)
    locked.ok("daemon", "restart")
    assert http_get(locked, "/health", {"Cookie": cookie})[0] == 200      # it outlives the daemon
    assert TOKEN not in (locked.var / "daemon.log").read_text()


STRANGER = """
import os, socket, sys
"x".encode("idna")              # imported now: it may not read our files afterwards
os.setgroups([]); os.setgid(65534); os.setuid(65534)
s = socket.create_connection(("127.0.0.1", int(sys.argv[1])), 10)
s.sendall(b"GET /health HTTP/1.1\\r\\nHost: localhost:" + sys.argv[1].encode() + b"\\r\\n\\r\\n")
try:
    print(repr(s.recv(100)))
except ConnectionError:
    print(repr(b""))
"""


def test_another_users_process_gets_nothing(repo):
    """As root, a process of nobody's really connects; else one that has gone must count as a stranger all the same."""
    if os.getuid() == 0:
        done = subprocess.run([sys.executable, "-IS", "-c", STRANGER, str(port_of(repo))], capture_output=True, text=True, check=True)
        assert done.stdout == "b''\n"
    with socket.create_server(("127.0.0.1", 0)) as server:
        for own in (True, False):
            client = socket.create_connection(server.getsockname())
            accepted, _ = server.accept()
            if not own:
                client.close()          # whose was it?  the kernel does not know any more
            assert thrum._same_user_behind(accepted) is own
            accepted.close()
            client.close()


@pytest.mark.parametrize("family, host", [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_the_owner_by_proc_is_the_same(family, host, monkeypatch):
    """Where netlink is forbidden, /proc/net/tcp tells."""
    def forbidden(*args):
        raise PermissionError
    socket_owner = os.getuid()
    with socket.create_server((host, 0), family=family) as server:
        client = socket.create_connection(server.getsockname()[:2])
        accepted, _ = server.accept()
        assert thrum._same_user_behind(accepted)
        monkeypatch.setattr(thrum, "NETLINK_SOCK_DIAG", 255)    # no such protocol: the socket cannot be made
        assert thrum._same_user_behind(accepted)
        monkeypatch.setattr(thrum.os, "getuid", lambda: 12345)
        assert thrum._same_user_behind(accepted) is (socket_owner == 0)     # root may
        client.close()
        accepted.close()


@pytest.mark.parametrize("change, expected", [
    (("GET /ws", "POST /ws"), 405), (("Version: 13", "Version: 12"), 426), (("Upgrade: websocket\r\n", ""), 400),
    (("Connection: Upgrade\r\n", ""), 400), (("HTTP/1.1", "HTTP/1.0"), 400), (("HTTP/1.1", "HTTP/2.0"), 505), (("/ws ", "/wss "), 404),
    (("Sec-WebSocket-Key: ", "Sec-WebSocket-Key: x"), 400), (("/ws ", "/ws/nothing "), 404), (("/ws ", "/ws/echo "), 404)])
def test_handshakes_that_are_wrong(repo, change, expected):
    request = thrum.request_upgrade(f"localhost:{port_of(repo)}", "/ws", "dGhlIHNhbXBsZSBub25jZQ==").decode()
    assert change[0] in request
    answer = raw(repo, request.replace(*change).encode(), half=True)
    assert status_of(answer) == expected, answer
    assert (b"Sec-WebSocket-Version: 13\r\n" in answer) == (expected == 426)


def test_a_websocket_at_the_root_too(repo):
    with Wire(repo, "/") as page:
        assert page.call("health")["status"] == "ok"


@pytest.mark.parametrize("data, expected", [
    (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200, 431), (b"GET /" + b"a" * 40_000, 414), (b"\x16\x03\x01\x02\x00" * 10 + b"\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 40_000, 431)])
def test_header_bombs_are_cut_short(repo, data, expected):
    assert status_of(raw(repo, data)) == expected


def test_one_connection_carries_many_requests(repo):
    one = f"GET /health HTTP/1.1\r\nHost: localhost:{port_of(repo)}\r\n\r\n".encode()
    assert raw(repo, one * 3, half=True).count(b"HTTP/1.1 200 OK") == 3
    closing = one.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    assert raw(repo, closing + one).count(b"HTTP/1.1 200 OK") == 1


def test_json_rpc_over_the_websocket(repo):
    with Wire(repo) as page:
        page.send(b"[" + b",".join(b'{"jsonrpc":"2.0","id":%d,"method":"health"}' % n for n in range(3)) + b"]")
        assert [one["id"] for one in page.take()] == [0, 1, 2]
        page.send(b"not json")
        assert page.take()["error"]["code"] == -32700
        page.send(b"[]")
        assert page.take()["error"]["data"] == "batch request cannot be empty"
        page.send(b'{"jsonrpc":"2.0","method":"health"}')
        page.peer.send(b'{"jsonrpc":"2.0","id":9,"method":"health"}', thrum.BINARY)
        page.flush()
        assert page.take()["id"] == 9           # what has no id has no answer


def test_too_much_is_1009(repo):
    with Wire(repo) as page:
        page.send(b" " * (thrum.REQUEST_MAX + 1))
        assert page.end() == 1009


def test_pings_are_answered_while_a_request_runs(repo):
    repo.join("ada", "planner")
    with Wire(repo) as page:
        page.send({"jsonrpc": "2.0", "id": 1, "method": "message.wait", "params": {"timeout_ms": 60_000, "caller_agent_id": "ada"}})
        page.peer.ping(b"still there?")
        page.flush()
        data = page.sock.recv(100)
        assert data == thrum.encode_frame(thrum.PONG, b"still there?")


def test_a_close_is_answered(repo):
    with Wire(repo) as page:
        page.peer.close(1001, "leaving")
        page.flush()
        assert page.end() == 1001
        assert page.sock.recv(1) == b""
    assert sockets_open(repo) == 0


def test_the_daemon_says_goodbye(tmp_path_factory):
    repo = make(tmp_path_factory, "bye")
    repo.join("ada", "planner")
    with Wire(repo) as idle, Wire(repo) as waiting:
        waiting.send({"jsonrpc": "2.0", "id": 1, "method": "message.wait", "params": {"timeout_ms": 60_000, "caller_agent_id": "ada"}})
        idle.call("health")
        begin = time.monotonic()
        repo.ok("daemon", "stop")
        assert time.monotonic() - begin < thrum.STOP_S
        assert (idle.end(), waiting.end()) == (1001, 1001)
    assert not (repo.var / "ws.port").exists()


def test_the_port_stays_the_same_and_gives_way(tmp_path_factory):
    repo = make(tmp_path_factory, "port")
    first = port_of(repo)
    assert first >= 9999 and repo.json("daemon", "status")["ws_port"] == first == repo.json("overview")["websocket_port"]
    with socket.socket() as probe:      # where no other daemon looks that a test beside this one starts
        probe.bind(("127.0.0.1", 0))
        first = probe.getsockname()[1]
    repo.ok("daemon", "restart", env={"THRUM_WS_PORT": str(first)})
    assert port_of(repo) == first
    repo.ok("daemon", "restart")
    assert port_of(repo) == first
    repo.kill()
    repo.ok("daemon", "start")
    assert port_of(repo) == first
    repo.ok("daemon", "stop")
    with socket.create_server(("127.0.0.1", first)):
        repo.ok("daemon", "start")
        assert port_of(repo) != first
        repo.ok("daemon", "stop")
    repo.close()


def test_thousands_of_half_open_connections_keep_nobody_out(repo):
    held = []
    try:
        for _ in range(thrum.OPENING_MAX + 200):
            sock = socket.create_connection(("127.0.0.1", port_of(repo)), 10)
            sock.sendall(b"GET /ws HT")
            held.append(sock)
        assert opens(repo) == 101
        assert repo.json("status")["health"]["status"] == "ok"
        held[0].settimeout(10)
        with pytest.raises((ConnectionError, EOFError)):
            if not held[0].recv(1):     # the oldest had to go
                raise EOFError
    finally:
        for sock in held:
            sock.close()


@pytest.mark.slow
def test_a_slow_handshake_ends_in_time(repo):
    """One byte a second is not enough, whatever else happens on the connection."""
    with socket.create_connection(("127.0.0.1", port_of(repo)), 1) as sock:
        begin, request = time.monotonic(), b"GET /ws HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 100
        with pytest.raises((ConnectionError, EOFError)):
            for n in range(60):
                sock.sendall(request[n:n + 1])
                try:
                    if not sock.recv(1):
                        raise EOFError
                except socket.timeout:
                    pass
        assert thrum.HANDSHAKE_S - 1 < time.monotonic() - begin < thrum.HANDSHAKE_S + 3
