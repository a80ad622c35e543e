"""Helpers of the command and client tests: two agents in two worktrees, and a socket in between."""

import json
import os
import py_compile
import queue
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import thrum
from conftest import CLEAN, QUICK, THRUM, Repo

END_S = 20                      # how long anything may take before a test gives up on it

# What must never reach a screen as it is: C0 without tab and newline, DEL, C1, and Unicode's Bidi_Control.
RAW = {chr(c) for c in (*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A),
                        0x2028, 0x2029)} - {"\n", "\t"}
POISON = "a\x1b[2Jb\x9b31mc\x07\x08\x7f\r\u202ed\u2066e\u200ff\u061cg\u2028h"


def raw_in(text):
    """The characters of a text that a terminal would obey."""
    return sorted(map(hex, map(ord, RAW & set(text))))


class Team:
    """A repository with @ada (planner) in its main worktree and @bob (implementer) in a linked one."""

    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        path = folder / "repo"
        path.mkdir()
        self.ada = Repo(path)
        self.ada.git("init", "-q", "-b", "main")
        self.ada.git("commit", "-q", "--allow-empty", "-m", "first")
        self.ada.join("ada", "planner")
        self.bob = self.ada.worktree("bob")
        self.bob.join("bob", "implementer")

    def seq(self):
        """The number of the last event: what fails must not move it."""
        with self.ada.client() as client:
            return client.call("health")["last_seq"]

    def trace(self):
        """Everything a refused command must leave as it was."""
        files = {str(path): path.read_bytes() for repo in (self.ada, self.bob) for folder in ("identities", "context")
                 for path in (repo.path / ".thrum" / folder).glob("*")}
        return self.seq(), files, self.ada.git("status", "--porcelain"), self.bob.git("status", "--porcelain")

    def mail(self, text="hello", sender=None, to="@bob", *more):
        """Send a message; its id."""
        return (sender or self.ada).json("send", text, "--to", to, *more)["message_id"]

    def unread(self, repo=None):
        """The texts that @bob (or another) has not read."""
        return [m["body"]["content"] for m in (repo or self.bob).json("inbox", "--unread", "--limit", "100")["messages"]]

    def clear(self):
        for repo in (self.ada, self.bob):
            repo.ok("message", "read", "--all")

    def close(self):
        self.ada.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def start(repo, *args, env=None, command=None, cwd=None, **more):
    """A command as a process with pipes, to be looked at while it runs."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.Popen([*(command or repo.command()), *args], cwd=cwd or repo.path, env={**CLEAN, **(env or {})}, **streams)


def script(repo, *args, **more):
    """Run thrum.py itself instead of the launcher."""
    return repo.run(*args, command=QUICK, **more)


def vendored(path, version):
    """A copy of thrum.py that says it is of another version: what runs it as a script, compiled once and not at each call."""
    own = f'__version__ = "{thrum.__version__}"'
    text = THRUM.read_text()
    assert text.count(own) == 1
    path.write_text(text.replace(own, f'__version__ = "{version}"'))
    py_compile.compile(str(path), doraise=True)
    return [*QUICK[:-1], str(path)]


def shown(capfd, *argv):
    """What a command line says on stdout; it must succeed and say nothing else."""
    assert thrum.main(list(argv)) == 0, argv
    out, err = capfd.readouterr()
    assert not err, err
    return out


def finish(process):
    """(status, stdout, stderr) of a process that has to end soon."""
    try:
        out, err = process.communicate(timeout=END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise AssertionError(f"still running after {END_S} s: {process.args}") from None
    return process.returncode, (out or b"").decode(), (err or b"").decode()


def error_line(done, status=1):
    """The text of a refusal: nothing on stdout, one short line on stderr, and the right exit status."""
    assert done.stdout == "", done.stdout
    assert done.stderr.startswith("Error: ") and done.stderr.endswith("\n"), done.stderr
    assert done.stderr.count("\n") == 1 and len(done.stderr) < 500, done.stderr
    assert "Traceback" not in done.stderr and not raw_in(done.stderr)
    assert done.returncode == status, done.stderr
    return done.stderr[7:-1]


def confined(*command):
    """A command line whose process is held to file permissions also where the tests run as root; None where that cannot be."""
    if os.geteuid():
        return list(command)
    if not shutil.which("setpriv"):
        return None
    # without these two capabilities, root is a user like any other
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-dac_override,-dac_read_search", *command]


class Proxy:
    """A socket before the daemon's that sees each record and may cut the line there.

    `cut(number, side, kind)` is asked for each record of the connection `number` (from 1), where side is "client" or
    "daemon" (who sent it); when it is true, the record is not passed on, `on_cut` is called and both ends are closed.
    `seen` is a queue of (number, side, kind, payload).  While `closed` is set, nobody is let in.
    """

    def __init__(self, repo, folder):
        self.path = str(Path(folder) / "p.sock")
        self.var = str(repo.var)
        self.cut = lambda number, side, kind: False
        self.on_cut = lambda: None
        self.seen = queue.Queue()
        self.closed = threading.Event()
        self.count = 0
        self.sockets = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(8)
        self.threads = [threading.Thread(target=self._accept, daemon=True)]
        self.threads[0].start()

    def env(self):
        return {"THRUM_SOCKET": self.path}

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            if self.closed.is_set():
                client.close()
                continue
            daemon = socket.socket(socket.AF_UNIX)
            self.sockets += [client, daemon]
            try:
                daemon.connect(self.var + "/thrum.sock")
            except OSError:
                client.close()
                daemon.close()
                continue
            self.count += 1
            pair = (client, daemon)
            for side, a, b in (("client", client, daemon), ("daemon", daemon, client)):
                thread = threading.Thread(target=self._pump, args=(self.count, side, a, b, pair), daemon=True)
                self.threads.append(thread)
                thread.start()

    def _pump(self, number, side, source, sink, pair):
        records, raw = thrum.Records(1 << 24), False
        try:
            while True:
                data = source.recv(65536)
                if not data:
                    break
                if raw or data[:1] == b"{":         # JSON-RPC: not looked into
                    raw = True
                    sink.sendall(data)
                    continue
                for kind, payload in records.feed(data):
                    kind = kind.decode()
                    if self.cut(number, side, kind):
                        self.on_cut()
                        self.seen.put((number, side, kind, payload))
                        return
                    sink.sendall(thrum.record(kind, payload))
                    self.seen.put((number, side, kind, payload))
        except OSError:
            pass
        finally:
            for end in pair:
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def await_record(self, kind, side="daemon"):
        """The next record of a kind, with its connection's number and payload."""
        while True:
            number, who, what, payload = self.seen.get(timeout=END_S)
            if (who, what) == (side, kind):
                return number, payload

    def close(self):
        try:
            self.listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.listener.close()
        for end in self.sockets:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self.threads:
            thread.join(END_S)
        for end in self.sockets:
            end.close()


def one_document(text):
    """The only JSON document in a text, which ends with one newline."""
    assert text.endswith("\n") and not text.endswith("\n\n"), text[-40:]
    value, end = json.JSONDecoder().raw_decode(text)
    assert text[end:] == "\n"
    return value
