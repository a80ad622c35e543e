"""A thousand who listen, and one of them who has stopped to read."""

import json
import re
import resource
import selectors
import socket

import pytest
import thrum
from conftest import Repo
from wire import Wire, port_of

LISTENERS = 1_000
MESSAGES = 300                  # sent while one does not read, and so many more when it is back:
MORE = 20
SEEN = 20                       # that it has read before
SCOPES = 16                     # of 250 characters each, in every message: the kernel must not hold those that are above QUEUE_MAX
GROWTH_MAX = 16 << 20           # bytes by which the daemon may grow: QUEUE_BYTES for the one who does not read, and slack
PREVIEW = re.compile(rb'"preview":"(\d+)"')


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = LISTENERS + 200
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    repo = Repo(tmp_path_factory.mktemp("crowd"))
    repo.git("init", "-q")
    repo.ok("init")
    for name in ("ada", "bob"):
        repo.join(name)
    yield repo
    repo.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Crowd:
    """People who subscribe to everything and read it as it comes."""

    def __init__(self, repo, count):
        self.selector = selectors.DefaultSelector()
        self.got = {}           # socket -> the previews that it was told, in the order in which they came
        for first in range(0, count, 100):      # fewer at once than may wait for their handshake
            joining = [self._join(port_of(repo), f"page{n}") for n in range(first, min(first + 100, count))]
            for sock in joining:
                answer, peer = bytearray(), thrum.WebSocket(1 << 20, client=True)
                while b'"after_seq"' not in answer:
                    answer += sock.recv(65536)
                thrum.decode_response_head(answer)
                peer.feed(bytes(answer))
                self.selector.register(sock, selectors.EVENT_READ, peer)
                self.got[sock] = []

    def _join(self, port, name):
        calls = (("user.register", {"username": name}), ("session.start", {"agent_id": "user:" + name}), ("subscribe", {"all": True}))
        batch = [{"jsonrpc": "2.0", "id": 1, "method": method, "params": params} for method, params in calls]
        sock = socket.create_connection(("127.0.0.1", port), 30)
        sock.sendall(thrum.request_upgrade(f"localhost:{port}", "/ws", "A" * 22 + "==")
                     + thrum.encode_frame(thrum.TEXT, json.dumps(batch).encode(), mask=b"mask"))
        return sock

    def read(self, until):
        """Read until everybody was told so many."""
        behind = sum(len(told) < until for told in self.got.values())
        while behind:
            ready = self.selector.select(30)
            assert ready, f"{behind} of {len(self.got)} were told less than {until}"
            for key, _ in ready:
                told, peer = self.got[key.fileobj], key.data
                before = len(told)
                peer.feed(key.fileobj.recv(65536))
                told += [int(found[1]) for found in (PREVIEW.search(message) for _, message in peer.messages()) if found]
                behind -= before < until <= len(told)
                assert not peer.closed, peer.close_code
                key.fileobj.sendall(peer.output())

    def close(self):
        for sock in self.got:
            sock.close()


class Lines(Wire):
    """The same over the Unix socket."""

    def __init__(self, repo):
        self.sock = socket.socket(fileno=thrum.dial(str(repo.var)).detach())
        self.file = self.sock.makefile("rb")
        self.ready, self.count = [], 0

    def send(self, value):
        self.sock.sendall(json.dumps(value).encode() + b"\n")

    def take(self):
        line = b"" if self.ready else self.file.readline()
        if not (line or self.ready):
            raise EOFError
        return json.loads(line) if line else self.ready.pop(0)

    def close(self):
        self.file.close()
        super().close()


def memory(repo):
    """The bytes of the daemon that are in memory."""
    with open(f"/proc/{repo.pid()}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class Sender:
    """Sends messages that are numbered from 0."""

    def __init__(self, client):
        self.client = client
        self.sent = 0
        self.scopes = [{"type": "pad", "value": f"{n:0250d}"} for n in range(SCOPES)]

    def send(self, count):
        for _ in range(count):
            self.client.call("message.send", content=str(self.sent), mentions=["@bob"], caller_agent_id="ada", scopes=self.scopes)
            self.sent += 1


def told(listener, count):
    """The (seq, number) of the messages that come next; fewer if it is closed before."""
    found = []
    try:
        while len(found) < count:
            note = listener.push("message")
            found.append((note["seq"], int(note["preview"])))
    except (EOFError, ConnectionError):
        pass
    return found


def listed(listener, cursor):
    """The (seq, number) of all messages after a sequence, from pages."""
    found = []
    while page := listener.call("message.list", after_seq=found[-1][0] if found else cursor, sort_order="asc", page_size=100)["messages"]:
        found += [(row["seq"], int(row["body"]["content"])) for row in page]
    return found


def come_back(listener, sender, seen):
    """All that a listener has got that has come back with what it had seen before."""
    sender.send(MORE)           # these are listed, and told as well
    seen += listed(listener, seen[-1][0])
    sender.send(MORE)
    return seen + [one for one in told(listener, 2 * MORE) if one[0] > seen[-1][0]]


@pytest.mark.slow
def test_a_thousand_listeners_and_one_who_stops(repo):
    with repo.client() as client:
        sender = Sender(client)
        with Wire(repo, limit=4096) as stopped:
            begin = stopped.join("stopped", all=True)["after_seq"]
            crowd = Crowd(repo, LISTENERS)
            before, most = memory(repo), 0
            sender.send(SEEN)
            seen = told(stopped, SEEN)
            for count in range(SEEN + 10, MESSAGES + 1, 10):
                sender.send(10)
                crowd.read(count)       # none of the others is ever behind, whatever becomes of that one
                most = max(most, memory(repo) - before)
            assert all(numbers == list(range(MESSAGES)) for numbers in crowd.got.values())
            assert most < GROWTH_MAX, f"the daemon has grown by {most:,} bytes"
            seen += told(stopped, MESSAGES)
            assert [number for _, number in seen] == list(range(len(seen))) and len(seen) < MESSAGES
            assert stopped.peer.close_code in (1006, 1013) and begin < seen[0][0]
        crowd.close()
        with Wire(repo) as back:
            assert back.join("stopped", all=True)["after_seq"] > seen[-1][0]
            everything = come_back(back, sender, seen)
    assert [number for _, number in everything] == list(range(MESSAGES + 2 * MORE))
    assert [seq for seq, _ in everything] == sorted({seq for seq, _ in everything})


def test_who_stops_on_the_unix_socket(repo):
    with repo.client() as client, Lines(repo) as stopped, Lines(repo) as back:
        sender = Sender(client)
        stopped.call("subscribe", caller_agent_id="bob", all=True)
        sender.send(SEEN)
        seen = told(stopped, SEEN)
        sender.send(MESSAGES)
        seen += told(stopped, MESSAGES)
        assert [number for _, number in seen] == list(range(len(seen))) and len(seen) < SEEN + MESSAGES
        back.call("subscriptions.list", caller_agent_id="bob")      # it is bob's connection now, and bob has subscribed
        everything = come_back(back, sender, seen)
    assert [number for _, number in everything] == list(range(SEEN + MESSAGES + 2 * MORE))
