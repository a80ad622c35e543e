"""Clients of the daemon's port for tests: plain HTTP, and JSON-RPC or anything else over a WebSocket."""

import base64
import http.client
import json
import os
import socket
import time

import thrum


def port_of(repo):
    return int((repo.var / "ws.port").read_text())


def http_get(repo, path, headers=None, method="GET", body=None):
    """(status, headers in lower case, body) of one request, sent with the right Host unless `headers` says otherwise."""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(repo), timeout=10)
    connection.request(method, path, body=body, headers={"Host": f"localhost:{port_of(repo)}", **(headers or {})})
    reply = connection.getresponse()
    found = reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()
    connection.close()
    return found


def sockets_open(repo, expected=0, patience_s=20):
    """How many WebSockets the daemon says there are, when it is as many as expected or it was asked for so long."""
    give_up_at = time.monotonic() + patience_s
    while True:
        count = json.loads(http_get(repo, "/health")[2])["connections"]
        if count == expected or time.monotonic() > give_up_at:
            return count


class Refused(Exception):
    """The server did not open a WebSocket; the status says why, 0 that it hung up."""


class Wire:
    """A WebSocket to a daemon.  `limit` makes its receive buffer small, so that it is soon behind."""

    def __init__(self, repo, path="/ws", headers=None, *, limit=0, timeout=10):
        self.port = port_of(repo)
        self.sock = socket.socket()
        if limit:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, limit)
        self.sock.settimeout(timeout)
        try:
            self._open(path, headers)
        except BaseException:
            self.sock.close()
            raise
        self.ready = []         # messages that nobody has taken yet
        self.count = 0

    def _open(self, path, headers):
        self.sock.connect(("127.0.0.1", self.port))
        headers = {"Host": f"localhost:{self.port}", **(headers or {})}
        key = base64.b64encode(os.urandom(16)).decode()
        self.sock.sendall(thrum.request_upgrade(headers.pop("Host"), path, key, headers))
        buffer, head = bytearray(), None
        while head is None:
            data = self.sock.recv(65536)
            if not data:
                raise Refused(0)
            buffer += data
            head = thrum.decode_response_head(buffer)
        if head.status != 101:
            raise Refused(head.status)
        thrum.check_upgrade(head, key)
        self.peer = thrum.WebSocket(1 << 26, client=True)
        self.peer.feed(bytes(buffer) or b"") if buffer else None

    def send(self, value):
        self.peer.send(value if isinstance(value, bytes) else json.dumps(value).encode())
        self.flush()

    def flush(self):
        self.sock.sendall(self.peer.output())

    def take(self):
        """The next message, as JSON; raises EOFError when the server has closed."""
        while not self.ready:
            self.ready += [json.loads(message) for _, message in self.peer.messages()]
            if self.ready:
                break
            if self.peer.closed:
                raise EOFError(self.peer.close_code)
            data = self.sock.recv(65536)
            self.peer.feed(data)
            output = self.peer.output()
            if output:
                self.sock.sendall(output)
        return self.ready.pop(0)

    def reply(self, method, **params):
        """The whole reply to a call; what is pushed meanwhile stays for `push`."""
        self.count += 1
        self.send({"jsonrpc": "2.0", "id": self.count, "method": method, "params": params})
        passed = []
        while True:
            message = self.take()
            if message.get("id") == self.count:
                self.ready[:0] = passed
                return message
            passed.append(message)

    def call(self, method, **params):
        """The result of a call that must succeed."""
        reply = self.reply(method, **params)
        assert "result" in reply, reply
        return reply["result"]

    def push(self, *methods):
        """The params of the next notification, of one of these methods if some are given; others are passed over."""
        while True:
            message = self.take()
            assert "id" not in message, message
            name = message["method"][len("notification."):]
            if not methods or name in methods:
                return {**message["params"], "method": name}

    def pushes(self):
        """What has been pushed up to now: everything before the reply to a call."""
        self.call("health")
        found, self.ready = self.ready, []
        return [{**message["params"], "method": message["method"][len("notification."):]} for message in found]

    def join(self, name, **subscription):
        """Become a person with a session; what `subscribe` answers, if something is to be subscribed to."""
        self.call("user.register", username=name)
        self.call("session.start", agent_id="user:" + name)
        return self.call("subscribe", **subscription) if subscription else None

    def end(self):
        """The close code that the server ends with, whatever it sends before; 1006 when it only hangs up."""
        try:
            while True:
                self.take()
        except (EOFError, ConnectionError):
            return self.peer.close_code

    def close(self):
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *what):
        self.close()
