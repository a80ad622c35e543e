"""The daemon as a process: starting, stopping, being replaced, its socket and what people send into it, its limits.

Real daemons in scratch repositories.  `foreground` runs one with some constants or functions replaced, so that a limit
of minutes is seen in a moment and a slow disk is slow exactly as long as the test wants.
"""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time

import pytest

import thrum
from conftest import CLEAN, QUICK, ROOT, THRUM, Repo
from team import vendored

LONG = 30           # seconds after which something that should have happened has not
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


# ---- helpers

def until(condition, what, seconds=LONG):
    """Wait for something that gives no notice, such as the end of somebody else's process."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.01)
    return value


def gone(pid):
    """Whether a process has ended (a zombie that nobody collects counts)."""
    try:
        os.kill(pid, 0)
        if sys.platform == "linux":
            with open(f"/proc/{pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] == "Z"
        return False
    except (ProcessLookupError, FileNotFoundError):
        return True


def daemons(repo):
    """The processes that run as the daemon of a repository."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    words = file.read().split(b"\0")
            except OSError:
                continue
            if b"run" in words and os.fsencode(str(repo.path)) in words and not gone(int(name)):
                found.append(int(name))
    return found


def descriptors(pid):
    """What a process has open, as /proc shows it."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found


def sockets(pid):
    return sum(target.startswith("socket:") for target in descriptors(pid).values())


def memory(pid, field="VmRSS"):
    """Bytes of memory of a process, now or (`VmHWM`) at most."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def one_line(done, *words):
    """A refused command: exit status 1, nothing on stdout, one line on stderr with these words; gives the line."""
    assert done.returncode == 1, done
    assert done.stdout == "" and done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done
    for word in words:
        assert word in done.stderr, done.stderr
    return done.stderr


def prepare(repo):
    """Initialize without starting a daemon."""
    thrum.initialize(str(repo.path))
    return repo


def register(client, *names):
    for name in names:
        client.call("agent.register", name=name, role="role_of_" + name, module="core", force=True)
        client.call("session.start", agent_id=name)


def impatient_stop(repo):
    """`daemon stop` that gives each of its steps half a second."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import thrum\n"
            "thrum.STOP_S = thrum.START_S = 0.5; sys.exit(thrum.main(['daemon', 'stop']))")
    return repo.run(command=[sys.executable, "-c", code])


class Raw:
    """A connection to a daemon's socket, for bytes."""

    made = []

    def __init__(self, repo):
        self.sock = thrum.dial(str(repo.var))
        self.made.append(self.sock)
        self.sock.settimeout(LONG)
        self.buffer = b""

    def send(self, data):
        self.sock.sendall(data)
        return self

    def call(self, method, id=1, **params):
        return self.send(json.dumps({"jsonrpc": "2.0", "id": id, "method": method, "params": params}).encode() + b"\n")

    def line(self):
        """The next line, b"" at the end."""
        while b"\n" not in self.buffer:
            try:
                data = self.sock.recv(1 << 20)
            except ConnectionError:
                data = b""
            if not data:
                rest, self.buffer = self.buffer, b""
                return rest
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def reply(self):
        """The next line as JSON, which must not hold NaN or Infinity; None at the end."""
        line = self.line()

        def refuse(word):
            raise AssertionError(f"{word} is not JSON: {line!r}")
        return json.loads(line, parse_constant=refuse) if line else None

    def end_of_writing(self):
        self.sock.shutdown(socket.SHUT_WR)
        return self

    def close(self):
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *what):
        self.close()


@pytest.fixture(autouse=True)
def hang_up():
    """No test leaves a connection to the next one, failed or not."""
    yield
    while Raw.made:
        Raw.made.pop().close()


@pytest.fixture
def foreground():
    """Runs daemons as our children, with lines of Python executed before; they are killed afterwards."""
    started = []

    def start(repo, patch="", wait=True, pass_fds=()):
        code = (f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r}); import thrum\n{patch}\n"
                f"sys.exit(thrum.main(['daemon', 'run', '--repo', {str(repo.path)!r}]))")
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True, cwd="/", env=CLEAN, pass_fds=pass_fds)
        started.append(process)
        if wait:
            line = process.stderr.readline()
            assert "serving" in line, line + process.stderr.read()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """One daemon for all tests of the protocol, with the agents ada and bob."""
    path = tmp_path_factory.mktemp("served")
    repo = prepare(Repo(path)) if Repo(path).git("init", "-q", "-b", "main") == "" else None
    with repo.client() as client:
        register(client, "ada", "bob")
    yield repo
    repo.close()
    shutil.rmtree(path, ignore_errors=True)


# ---- start, stop, restart

def test_start_stop_restart_and_what_each_says(repo):
    assert "Daemon started" in repo.ok("init")
    first = repo.pid()
    error = one_line(repo.run("daemon", "start"), "already running", str(first))
    assert str(repo.path) in error and repo.pid() == first, "a second start says so and changes nothing"
    status = repo.json("daemon", "status")
    assert (status["running"], status["pid"], status["version"]) == (True, first, thrum.__version__)
    assert stat.S_IMODE(os.stat(repo.var / "thrum.sock").st_mode) == 0o600
    assert stat.S_IMODE(os.stat(repo.var).st_mode) == 0o700
    pid_file = json.loads((repo.var / "thrum.pid").read_text())
    assert pid_file["repo_path"] == str(repo.path) and thrum.ns_of(pid_file["started_at"])

    assert "restarted" in repo.ok("daemon", "restart")
    second = repo.pid()
    assert second != first and gone(first)

    assert "stopped" in repo.ok("daemon", "stop")
    assert gone(second) and not (repo.var / "thrum.sock").exists() and not (repo.var / "thrum.pid").exists()
    one_line(repo.run("daemon", "stop"), "daemon is not running")
    assert repo.run("daemon", "status").stdout == "Daemon:   not running\n"
    assert repo.json("daemon", "status")["running"] is False
    assert "restarted" in repo.ok("daemon", "restart") and repo.json("daemon", "status")["running"]


@linux
def test_of_daemons_started_at_once_one_runs(make_repo, foreground):
    repo = prepare(make_repo())
    commands = [subprocess.Popen(repo.command("daemon", "start"), cwd=repo.path, env=CLEAN, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True) for _ in range(5)]
    said = [command.communicate(timeout=LONG) for command in commands]
    assert sorted(command.returncode for command in commands) == [0, 1, 1, 1, 1], said
    for command, (_, error) in zip(commands, said):
        assert command.returncode == 0 or "already running" in error
    assert daemons(repo) == [repo.pid()]
    # Not through the start lock but against each other: two processes that want to be the daemon.
    repo.close()
    rivals = [foreground(repo, "thrum.STOP_S = 1", wait=False) for _ in range(2)]
    lines = [rival.stderr.readline() for rival in rivals]
    assert sorted("serving" in line for line in lines) == [False, True], lines
    loser = rivals[0] if "serving" in lines[1] else rivals[1]
    assert loser.wait(LONG) == 1 and any("already running" in line or "lock held" in line for line in lines)
    with repo.client() as client:
        assert client.call("health")["pid"] in [rival.pid for rival in rivals if rival is not loser]


@linux
def test_commands_that_come_at_once_start_one_daemon(make_repo):
    repo = prepare(make_repo())
    commands = [subprocess.Popen(repo.command("agent", "list"), cwd=repo.path, env=CLEAN, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True) for _ in range(8)]
    said = [command.communicate(timeout=LONG) for command in commands]
    assert [command.returncode for command in commands] == [0] * 8, said
    assert daemons(repo) == [repo.pid()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_clean_stop(make_repo, foreground, number):
    repo = prepare(make_repo())
    process = foreground(repo)
    with repo.client() as client:
        register(client, "ada")
    process.send_signal(number)
    assert process.wait(LONG) == 0
    assert not (repo.var / "thrum.sock").exists() and not (repo.var / "thrum.pid").exists()
    assert (repo.var / "clean.json").exists(), "the next start has nothing to check"
    foreground(repo)
    with repo.client() as client:
        assert client.call("health")["rebuilt_events"] == 0 and client.call("health")["agents"] == 1


@pytest.mark.parametrize("content", [
    b"", b"\xff\x00garbage", b"null", b"[1]", b'{"pid": -1}', b'{"pid": "1"}', b'{"pid": 1e3}', b"%d" % 10**30,
    b'{"pid": %d}' % os.getpid(), b"%d" % os.getppid(), b'{"pid": 1}'])
def test_a_stale_pid_file_says_nothing(make_repo, content):
    """Nobody holds the lock, so nobody is there; the test itself lives on, though the file names it."""
    repo = prepare(make_repo())
    repo.var.mkdir(exist_ok=True)
    (repo.var / "thrum.pid").write_bytes(content)
    assert thrum.stop_daemon(thrum.find_places(str(repo.path))) == 0


def test_a_stale_pid_of_another_process_is_not_killed(repo):
    repo.ok("init")
    repo.kill()
    other = subprocess.Popen([sys.executable, "-c", "input()", "thrum", "daemon", "run"], stdin=subprocess.PIPE)
    try:
        (repo.var / "thrum.pid").write_text(json.dumps({"pid": other.pid, "repo_path": str(repo.path)}))
        one_line(repo.run("daemon", "stop"), "not running")
        assert other.poll() is None
        repo.ok("daemon", "start")
        assert repo.pid() != other.pid
        repo.ok("daemon", "restart")
        repo.ok("daemon", "stop")
        assert other.poll() is None
    finally:
        other.communicate()


def test_the_daemon_of_another_repository_is_not_killed(make_repo):
    """A daemon that starts holds the lock while the pid file still names its predecessor, whose number has gone to another."""
    other, repo = prepare(make_repo("other")), prepare(make_repo("this"))
    with other.client() as client:
        other_pid = client.call("health")["pid"]
    repo.var.mkdir(exist_ok=True)
    (repo.var / "thrum.pid").write_text(json.dumps({"pid": other_pid, "repo_path": str(repo.path)}))
    lock = thrum.take_lock(str(repo.var / "thrum.lock"), 0)
    try:
        one_line(impatient_stop(repo), "thrum.lock")
    finally:
        os.close(lock)
        (repo.var / "thrum.pid").unlink()
    assert not gone(other_pid) and other.json("daemon", "status")["pid"] == other_pid


@pytest.mark.parametrize("leave", ["socket", "file", "nothing"])
def test_stale_files_are_reclaimed(repo, leave):
    """After kill -9 socket and pid file remain; the next command starts a daemon and nobody has to tidy up."""
    repo.ok("init")
    first = repo.pid()
    repo.kill()
    assert (repo.var / "thrum.sock").exists() and repo.pid() == first
    if leave != "socket":
        (repo.var / "thrum.sock").unlink()
        (repo.var / "thrum.pid").unlink()
    if leave == "file":
        (repo.var / "thrum.sock").write_text("not a socket")
        (repo.var / "thrum.pid").write_text("not a pid")
    assert repo.json("agent", "list")["agents"] == {"agents": []}
    assert repo.pid() != first and stat.S_ISSOCK(os.stat(repo.var / "thrum.sock").st_mode)


GATED = """
real_sync, real_write = thrum.durable_sync, thrum.Daemon._write
def gated_sync(descriptor):
    if os.path.exists({gate!r}):
        with open({gate!r}, "rb") as file:      # until the test has opened and closed it
            file.read()
    real_sync(descriptor)
async def noted_write(self, request):
    os.write({note}, b"w")
    return await real_write(self, request)
thrum.durable_sync, thrum.Daemon._write = gated_sync, noted_write
"""


class Gate:
    """A disk that stops at the next sync until the test lets it go on, and a note of each write that arrives."""

    def __init__(self, directory):
        self.path = str(directory / "gate")
        self.notes, self.note = os.pipe()
        self.patch = GATED.format(gate=self.path, note=self.note)

    def close_it(self):
        os.mkfifo(self.path)

    def wait_for_sync(self):
        """Returns when the daemon has arrived at a sync; only this one waits."""
        self.holding = os.open(self.path, os.O_WRONLY)
        os.unlink(self.path)

    def open_it(self):
        os.close(self.holding)

    def wait_for_writes(self, count):
        while count:
            count -= len(os.read(self.notes, count))

    def clean(self):
        os.close(self.notes)
        os.close(self.note)


@pytest.fixture
def gate(tmp_path):
    made = Gate(tmp_path)
    yield made
    made.clean()


def test_a_stop_answers_what_is_in_flight(make_repo, foreground, gate):
    """Five sends, one of them at the disk and four behind it, are answered and kept; who only waits is let go at once."""
    repo = prepare(make_repo())
    process = foreground(repo, gate.patch, pass_fds=(gate.note,))
    with repo.client() as client:
        register(client, "ada", "bob")
    gate.wait_for_writes(4)
    waiting, idle = Raw(repo).call("message.wait", caller_agent_id="bob", timeout_ms=600_000), Raw(repo)
    gate.close_it()
    senders = []
    for number in range(5):
        senders.append(Raw(repo).call("message.send", content=f"m{number}", mentions=["@bob"], caller_agent_id="ada"))
        if number == 0:
            gate.wait_for_sync()
    gate.wait_for_writes(5)
    process.send_signal(signal.SIGTERM)
    assert idle.reply() is None, "who says nothing is let go"
    with pytest.raises(OSError):
        thrum.dial(str(repo.var))       # nobody new is let in
    gate.open_it()
    ids = [sender.reply()["result"]["message_id"] for sender in senders]
    assert len(set(ids)) == 5 and [sender.reply() for sender in senders] == [None] * 5
    assert process.wait(thrum.STOP_S + 2) == 0
    for raw in (waiting, idle, *senders):
        raw.close()
    with repo.client() as client:
        found = client.call("message.list", for_agent="bob")
        assert sorted(m["message_id"] for m in found["messages"]) == sorted(ids) and found["total"] == 5


def test_a_stop_is_over_in_its_time_whatever_clients_do(make_repo, foreground):
    """Idle ones, half lines, waiters, unread replies: none of them delays the end."""
    repo = prepare(make_repo())
    process = foreground(repo, "thrum.STOP_S = 1")
    with repo.client() as client:
        register(client, "ada", "bob")
        for _ in range(20):
            client.call("message.send", content="x" * 60_000, mentions=["@bob"], caller_agent_id="ada")
    clients = [Raw(repo) for _ in range(4)]
    clients[1].send(b'{"jsonrpc":"2.0","id":1,')
    clients[2].call("message.wait", caller_agent_id="bob", timeout_ms=600_000)
    for number in range(50):
        clients[3].call("message.list", id=number, for_agent="bob", page_size=100)
    commands = [subprocess.Popen(repo.command("wait", "--timeout", "60s"), cwd=repo.path, env={**CLEAN, "THRUM_AGENT_ID": "bob"},
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)]
    clients[0].call("health").reply()
    (repo.var / "stopped").touch()      # or the command would start the next one
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(LONG) == 0
    assert time.monotonic() - begin < 1 + 2
    for command in commands:
        command.kill()
        command.communicate()
    for raw in clients:
        raw.close()


@linux
def test_a_hung_daemon_is_ended_by_stop(repo):
    """SIGSTOP: it accepts connections and never answers; within its times a stop takes the last resort."""
    repo.ok("init")
    pid = repo.pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        done = impatient_stop(repo)
        assert done.returncode == 0 and gone(pid), done
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    repo.ok("daemon", "start")
    assert repo.pid() != pid


@linux
def test_nobody_hangs_on_a_hung_daemon(repo):
    """Commands give up with one line, after the time that an answer may take, here made short in launcher and copy."""
    repo.join("ada")
    pid = repo.pid()
    for path in (repo.launcher, repo.path / ".thrum" / "bin" / "thrum.py"):
        text, count = re.subn(r"(answer_s=|^ANSWER_S = )\d+", r"\g<1>2", path.read_text(), flags=re.M)
        assert count == 1 + (path.suffix == ".py"), "the limit has moved: make it short here too"
        path.write_text(text)
    os.kill(pid, signal.SIGSTOP)
    try:
        commands = [subprocess.Popen(repo.command(*words), cwd=repo.path, env=CLEAN, stdin=subprocess.DEVNULL, text=True,
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                    for words in (["inbox"], ["send", "x"], ["daemon", "status"], ["agent", "list", "--repo", str(repo.path)])]
        end = time.monotonic() + 3 * 2 + 4
        hung = []
        for command in commands:
            try:
                out, error = command.communicate(timeout=max(0.1, end - time.monotonic()))
                assert command.returncode == 1 and error.count("\n") == 1 and "daemon" in error, (command.args, out, error)
            except subprocess.TimeoutExpired:
                hung.append(command.args[1:])
                command.kill()
                command.communicate()
        assert not hung, f"these wait for ever: {hung}"
    finally:
        os.kill(pid, signal.SIGKILL)


# ---- starting by itself

@linux
def test_a_command_starts_the_daemon_unless_it_was_stopped_on_purpose(repo):
    repo.join("ada")
    repo.kill()
    assert "No messages" in repo.ok("inbox") and len(daemons(repo)) == 1
    repo.ok("daemon", "stop")
    assert (repo.var / "stopped").exists()
    for words in (["inbox"], ["send", "x"], ["agent", "list"]):
        one_line(repo.run(*words), "stopped", "thrum daemon start")
    with pytest.raises(thrum.Unreachable, match="stopped"):
        repo.client()
    assert daemons(repo) == [] and "ada" in repo.ok("whoami"), "whoami needs no daemon"
    repo.ok("daemon", "start")
    assert not (repo.var / "stopped").exists() and repo.ok("inbox")
    repo.ok("daemon", "stop")
    repo.ok("init")
    assert not (repo.var / "stopped").exists() and repo.ok("inbox")


@linux
def test_autostart_can_be_forbidden_by_environment_and_config(repo, monkeypatch):
    repo.join("ada")
    repo.kill()
    line = one_line(repo.run("inbox", env={"THRUM_AUTOSTART": "0"}), "failed to connect to daemon", "thrum daemon start")
    assert str(repo.var) in line
    config = repo.path / ".thrum" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "daemon": {"autostart": False}}))
    one_line(repo.run("inbox"), "failed to connect to daemon", "thrum daemon start")
    with pytest.raises(thrum.Unreachable):
        repo.client()
    assert daemons(repo) == []
    repo.ok("daemon", "start")
    assert repo.ok("inbox", env={"THRUM_AUTOSTART": "0"}), "it forbids the start, not the use"
    config.write_text('{"daemon": {"autostart": "no"}}')
    repo.kill()
    one_line(repo.run("inbox"), "config.json", "autostart")


def test_a_socket_that_is_named_is_not_started(make_repo):
    repo = prepare(make_repo())
    one_line(repo.run("agent", "list", env={"THRUM_SOCKET": str(repo.path / "other.sock")}), "other.sock", "THRUM_SOCKET")


@pytest.mark.parametrize(("text", "word"), [("raise SystemExit(3)", "did not start"), ("def broken(:", "did not start")])
def test_a_copy_that_does_not_run_is_reported_in_one_line(make_repo, text, word):
    repo = prepare(make_repo())
    (repo.path / ".thrum" / "bin" / "thrum.py").write_text(f'__version__ = "9.9.9"\n{text}\n')
    one_line(repo.run("daemon", "start", command=QUICK), word)


@linux
def test_a_start_that_takes_too_long_is_given_up_and_ended(make_repo, monkeypatch):
    repo = prepare(make_repo())
    copy = repo.path / ".thrum" / "bin" / "thrum.py"
    copy.write_text('__version__ = "9.9.9"\nimport time\ntime.sleep(600)\n')
    monkeypatch.setattr(thrum, "START_S", 0.5)
    places = thrum.find_places(str(repo.path))
    with pytest.raises(thrum.ThrumError, match="did not start"):
        thrum.start_daemon(places)
    assert daemons(repo) == [], "it was not left behind"
    monkeypatch.undo()
    copy.write_bytes(THRUM.read_bytes())
    assert thrum.start_daemon(places) is True, "the start lock is free again"


def test_a_start_proves_that_git_runs(make_repo, tmp_path):
    repo = prepare(make_repo())
    empty = tmp_path / "empty"
    empty.mkdir()
    one_line(repo.run("daemon", "start", command=QUICK, env={"PATH": str(empty)}), "git")
    assert not (repo.var / "thrum.sock").exists()


@linux
def test_the_background_process_holds_nothing_of_its_parent(make_repo):
    """No pipe, no terminal, no directory, no session, no identity: a harness that waits for EOF gets it."""
    repo = prepare(make_repo())
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    process = subprocess.Popen(repo.command("daemon", "start"), cwd=repo.path, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, pass_fds=(writing,), env={**CLEAN, "THRUM_NAME": "ada", "GIT_DIR": "/nowhere"})
    os.close(writing)
    out, _ = process.communicate(timeout=LONG)      # returns at EOF of both pipes: nobody else holds them
    assert b"started" in out
    assert os.read(reading, 1) == b"", "the pipe that was passed on is closed too"
    os.close(reading)
    pid = repo.pid()
    opened = descriptors(pid)
    assert [opened[number] for number in (0, 1, 2)] == ["/dev/null"] * 3
    assert not [target for target in opened.values() if target.startswith("pipe:") or target.startswith("/dev/pts")]
    assert os.getsid(pid) != os.getsid(0) and os.getpgid(pid) != os.getpgid(0)
    assert os.readlink(f"/proc/{pid}/cwd") == str(repo.var)
    with open(f"/proc/{pid}/environ", "rb") as file:
        environ = file.read()
    assert b"THRUM_NAME" not in environ and b"GIT_DIR" not in environ


def test_a_daemon_whose_directory_is_gone_ends(make_repo, foreground):
    repo = prepare(make_repo())
    process = foreground(repo, "thrum.SYNC_S = 0.1")
    shutil.rmtree(repo.path / ".thrum")
    process.wait(LONG)
    assert not (repo.path / ".thrum").exists(), "and does not bring it back"


# ---- being replaced

@linux
def test_a_newer_copy_replaces_the_daemon_and_two_copies_do_not_flap(repo, tmp_path):
    repo.join("ada")
    repo.join("bob", role="tester")
    first = repo.pid()
    waiting = subprocess.Popen(repo.command("wait", "--timeout", "60s", "--json"), cwd=repo.path, text=True,
                               env={**CLEAN, "THRUM_NAME": "bob"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    as_ada = {"THRUM_NAME": "ada"}
    until(lambda: sockets(first) > 2 or waiting.poll() is not None, "the waiting command has connected")
    for version in ("0.0.9", thrum.__version__):
        repo.ok("agent", "list", command=vendored(tmp_path / f"{version}.py", version))
        assert repo.pid() == first, "equal or lower is served as it is"
    up, down = (vendored(tmp_path / f"{version}.py", version) for version in ("9.10.0", "9.9.9"))
    repo.ok("agent", "list", command=up)
    second = repo.pid()
    assert second != first and gone(first) and repo.json("daemon", "status")["version"] == "9.10.0"
    for _ in range(3):
        for command in (down, up, repo.command()):
            repo.ok("agent", "list", command=command)
    assert repo.pid() == second and daemons(repo) == [second]
    sent = repo.json("send", "after the upgrade", "--to", "@bob", env=as_ada)
    out, error = waiting.communicate(timeout=LONG)
    assert waiting.returncode == 0, error
    assert [m["message_id"] for m in json.loads(out)["messages"]] == [sent["message_id"]], "the waiting command went on"
    repo.ok("daemon", "restart", "--from", str(THRUM))
    assert repo.json("daemon", "status")["version"] == thrum.__version__
    (repo.path / "broken.py").write_text('__version__ = "99"\ndef x(:\n')
    one_line(repo.run("daemon", "restart", "--from", "broken.py"), "broken.py", "compiled")
    assert repo.json("daemon", "status")["version"] == thrum.__version__


@linux
def test_commands_of_a_newer_copy_at_once_replace_the_daemon_once(repo, tmp_path):
    repo.ok("init")
    first, command = repo.pid(), vendored(tmp_path / "newer.py", "9.9.9")
    processes = [subprocess.Popen([*command, "agent", "list"], cwd=repo.path, env=CLEAN, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate(timeout=2 * LONG) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said
    assert daemons(repo) == [repo.pid()] and repo.pid() != first
    assert (repo.var / "daemon.log").read_text().count("started: version 9.9.9") == 1, "once, not once for each"


# ---- the log

def test_the_log_tells_starts_and_stops_and_is_rotated(repo):
    repo.ok("init")
    log = repo.var / "daemon.log"
    assert f"started: version {thrum.__version__}, pid {repo.pid()}" in log.read_text()
    for number in range(thrum.LOG_FILES + 2):
        thrum.stop_daemon(thrum.find_places(str(repo.path)))
        assert "stopped" in log.read_text()
        with open(log, "a") as file:
            file.write(f"filler {number} " + "x" * thrum.LOG_BYTES + "\n")
        repo.ok("daemon", "start")
    logs = sorted(path.name for path in repo.var.glob("daemon.log*"))
    assert logs == ["daemon.log"] + [f"daemon.log.{n}" for n in range(1, thrum.LOG_FILES + 1)]
    assert log.stat().st_size < thrum.LOG_BYTES
    assert f"filler {thrum.LOG_FILES + 1} " in (repo.var / "daemon.log.1").read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    tail = repo.ok("daemon", "logs", "--tail", "1")
    assert "started" in tail and tail.count("\n") == 1


# ---- JSON-RPC

HEALTH = {"jsonrpc": "2.0", "method": "health"}


def talk(raw, line):
    """The replies to one line.  That the connection still answers afterwards is how their end is known."""
    raw.send(line + b"\n").call("agent.list", id="sentinel", role="nobody")
    replies = []
    while True:
        reply = raw.reply()
        assert reply is not None, "the connection was closed"
        if isinstance(reply, dict) and reply.get("id") == "sentinel":
            return replies
        replies.append(reply)


def shape(reply):
    """A reply reduced to what the table below tells of it: (id, code or "ok")."""
    if isinstance(reply, list):
        return [shape(one) for one in reply]
    assert reply["jsonrpc"] == "2.0" and "id" in reply and ("result" in reply) != ("error" in reply), reply
    if "error" in reply:
        assert type(reply["error"]["code"]) is int and type(reply["error"]["message"]) is str, reply
        assert "\n" not in reply["error"]["message"]
    return reply["id"], reply["error"]["code"] if "error" in reply else "ok"


CALL = b'{"jsonrpc":"2.0","id":1,"method":"health"%s}'
SHAPES = [
    (CALL % b"", [(1, "ok")]),
    (b"  " + CALL % b"" + b" \t\r", [(1, "ok")]),
    (CALL % b',"params":{}', [(1, "ok")]),
    (CALL % b',"params":null', [(1, "ok")]),
    (CALL % b',"more":[{}]', [(1, "ok")]),
    (b'{"jsonrpc":"2.0","id":"a","method":"health"}', [("a", "ok")]),
    (b'{"jsonrpc":"2.0","id":"","method":"health"}', [("", "ok")]),
    (b'{"jsonrpc":"2.0","id":0,"method":"health"}', [(0, "ok")]),
    (b'{"jsonrpc":"2.0","id":-1.5,"method":"health"}', [(-1.5, "ok")]),
    (b'{"jsonrpc":"2.0","id":null,"method":"health"}', [(None, "ok")]),
    # notifications: carried out, never answered, not even with an error
    (b'{"jsonrpc":"2.0","method":"health"}', []),
    (b'{"jsonrpc":"2.0","method":"nope.x"}', []),
    (b'{"jsonrpc":"2.0","method":"health","params":7}', []),
    (b'{"jsonrpc":"2.0","method":"message.get","params":{"message_id":7}}', []),
    # what cannot be parsed
    (b"", [(None, -32700)]),
    (b"nonsense", [(None, -32700)]),
    (b"\xff\xfe\x00", [(None, -32700)]),
    (b'{"jsonrpc":"2.0","id":1,"method":"health"', [(None, -32700)]),
    (CALL % b"" + CALL % b"", [(None, -32700)]),
    (CALL % b',"params":{"a":NaN}', [(None, -32700)]),
    (b"[" * 100_000, [(None, -32700)]),
    (b'{"a":' * 50_000, [(None, -32700)]),
    (b'[{"jsonrpc":"2.0","id":1,"method":"health"},', [(None, -32700)]),
    # what is no request
    (b"{}", [(None, -32600)]),
    (b'{"jsonrpc":"2.0"}', [(None, -32600)]),
    (b'"text"', [(None, -32600)]),
    (b"1", [(None, -32600)]),
    (b"null", [(None, -32600)]),
    (b"true", [(None, -32600)]),
    (b'{"id":1,"method":"health"}', [(1, -32600)]),
    (b'{"jsonrpc":"1.0","id":1,"method":"health"}', [(1, -32600)]),
    (b'{"jsonrpc":2.0,"id":1,"method":"health"}', [(1, -32600)]),
    (b'{"jsonrpc":"2.0","id":1,"method":7}', [(1, -32600)]),
    (b'{"jsonrpc":"2.0","id":{},"method":"health"}', [(None, -32600)]),
    (b'{"jsonrpc":"2.0","id":[1],"method":"health"}', [(None, -32600)]),
    (b'{"jsonrpc":"2.0","id":true,"method":"health"}', [(None, -32600)]),
    # what nobody answers to
    (b'{"jsonrpc":"2.0","id":1,"method":"nope.x"}', [(1, -32601)]),
    (b'{"jsonrpc":"2.0","id":1,"method":"__class__"}', [(1, -32601)]),
    (b'{"jsonrpc":"2.0","id":1,"method":"\\ud800"}', [(1, -32601)]),
    # what is asked wrongly
    (CALL % b',"params":7', [(1, -32602)]),
    (CALL % b',"params":"x"', [(1, -32602)]),
    (CALL % b',"params":[1]', [(1, -32602)]),
    (b'{"jsonrpc":"2.0","id":1,"method":"message.get","params":{"message_id":7}}', [(1, -32602)]),
    (b'{"jsonrpc":"2.0","id":1,"method":"message.get"}', [(1, -32000)]),
    # batches (decision 15: on both transports)
    (b"[]", [(None, -32600)]),
    (b"[1,2]", [[(None, -32600), (None, -32600)]]),
    (b"[[]]", [[(None, -32600)]]),
    (b" [" + CALL % b"" + b"]", [[(1, "ok")]]),
    (b'[{"jsonrpc":"2.0","method":"health"}]', []),
    (b'[{"jsonrpc":"2.0","method":"health"},{"jsonrpc":"2.0","method":"nope.x"}]', []),
    (json.dumps([{**HEALTH, "id": 1}, HEALTH, {**HEALTH, "id": 2, "method": "nope.x"}, {"foo": 1}, {**HEALTH, "id": "z"}]).encode(),
     [[(1, "ok"), (2, -32601), (None, -32600), ("z", "ok")]]),
    (json.dumps([{**HEALTH, "id": n} for n in range(thrum.BATCH_CALLS_MAX)]).encode(),
     [[(n, "ok") for n in range(thrum.BATCH_CALLS_MAX)]]),
    (json.dumps([{**HEALTH, "id": n} for n in range(thrum.BATCH_CALLS_MAX + 1)]).encode(), [(None, -32600)]),
]


@pytest.mark.parametrize(("line", "expected"), SHAPES, ids=[f"{n}-{line[:40]!r}" for n, (line, _) in enumerate(SHAPES)])
def test_shapes_of_calls_and_what_is_answered(served, line, expected):
    """Each answered as JSON-RPC 2.0 says, and the same connection answers the next call."""
    with Raw(served) as raw:
        assert [shape(reply) for reply in talk(raw, line)] == expected


def test_errors_say_what_is_wrong(served):
    with Raw(served) as raw:
        (reply,) = talk(raw, b'{"jsonrpc":"2.0","id":1,"method":"nope.x"}')
        assert reply["error"] == {"code": -32601, "message": "Method not found", "data": "method 'nope.x' is not registered"}
        (reply,) = talk(raw, b'{"id":1,"method":"health"}')
        assert reply["error"] == {"code": -32600, "message": "Invalid request", "data": "jsonrpc field must be '2.0'"}
        (reply,) = talk(raw, b"[]")
        assert reply["error"]["data"] == "batch request cannot be empty"
        (reply,) = talk(raw, b"nonsense")
        assert reply["error"]["message"] == "Parse error" and reply["error"]["data"]
        for method in (None, "absent"):
            call = {"jsonrpc": "2.0", "id": 1, "method": method}
            (reply,) = talk(raw, json.dumps({k: v for k, v in call.items() if v != "absent"}).encode())
            assert reply["id"] == 1 and reply["error"]["code"] in (-32600, -32601)


def test_every_reply_is_json_whatever_the_id(served):
    """json.loads reads 1e400 as infinity, which no JSON can say again; long numbers and lone surrogates are kept or refused."""
    with Raw(served) as raw:
        for id in (b"1e400", b"-1e999", b"1" * 4000, b"1" * 5000, b'"\\ud800"', b'"\\u0000"', b"1e-400", b'"' + b"i" * 10_000 + b'"'):
            (reply,) = talk(raw, b'{"jsonrpc":"2.0","id":%s,"method":"health"}' % id)
            assert "result" in reply or reply["error"]["code"] in (-32600, -32700), id


def test_a_notification_is_carried_out(served):
    with Raw(served) as raw:
        line = {"jsonrpc": "2.0", "method": "message.send", "params": {
            "content": "by notification", "mentions": ["@bob"], "caller_agent_id": "ada"}}
        assert talk(raw, json.dumps(line).encode()) == []
        raw.call("message.list", for_agent="bob", page_size=1)
        assert raw.reply()["result"]["messages"][0]["body"]["content"] == "by notification"


def test_a_batch_runs_in_order_and_one_failure_stops_nothing(served):
    def send(id, **params):
        return {"jsonrpc": "2.0", "id": id, "method": "message.send", "params": {"caller_agent_id": "ada", **params}}
    with Raw(served) as raw:
        (replies,) = talk(raw, json.dumps([send(1, content="first", mentions=["@bob"]), send(2, content="x", mentions=["@ghost"]), send(
            3, content="second", mentions=["@bob"])]).encode())
        assert [shape(reply) for reply in replies] == [(1, "ok"), (2, -32000), (3, "ok")]
        assert replies[0]["result"]["seq"] < replies[2]["result"]["seq"]


def test_pipelined_calls_are_answered_in_order(served):
    lines = [json.dumps({"jsonrpc": "2.0", "id": n, "method": ("health", "agent.list", "nope.x", "message.send")[n % 4],
                         "params": {"content": str(n), "mentions": ["@bob"], "caller_agent_id": "ada"}}) for n in range(400)]
    with Raw(served) as raw:
        writing = threading.Thread(target=raw.send, args=(("\n".join(lines) + "\n").encode(),))
        writing.start()
        replies = [raw.reply() for _ in lines]
        writing.join(LONG)
    assert [reply["id"] for reply in replies] == list(range(400))
    assert [shape(reply)[1] for reply in replies[:4]] == ["ok", "ok", -32601, "ok"]
    sequences = [reply["result"]["seq"] for reply in replies if "seq" in reply.get("result", {})]
    assert len(sequences) == 100 and sequences == sorted(set(sequences))


def test_a_call_that_comes_byte_by_byte_is_answered(served):
    line = '{"jsonrpc":"2.0","id":"é漢","method":"health"}\r\n'.encode()
    with Raw(served) as raw:
        for n in range(len(line)):
            raw.send(line[n:n + 1])
        assert shape(raw.reply()) == ("é漢", "ok")


def test_a_half_closed_socket_gets_its_replies_and_the_end(served):
    with Raw(served) as raw:
        raw.call("health", 1).call("nope.x", 2).call("agent.list", 3).send(b'{"jsonrpc":"2.0","id":4,"method":"health"}').end_of_writing()
        assert [shape(raw.reply()) for _ in range(3)] == [(1, "ok"), (2, -32601), (3, "ok")]
        assert raw.reply() is None, "a line without its end is no line"


def test_a_wait_of_a_half_closed_socket_is_answered_too(served):
    with Raw(served) as raw, served.client() as client:
        raw.call("message.wait", caller_agent_id="bob", after_seq=client.call("health")["last_seq"], timeout_ms=20_000).end_of_writing()
        client.call("message.send", content="for who listens only", mentions=["@bob"], caller_agent_id="ada")
        assert raw.reply()["result"]["messages"][0]["body"]["content"] == "for who listens only"


@linux
def test_who_leaves_in_the_middle_leaves_nothing_behind(served):
    """Vector 36, and more: half lines, unread replies, waits and silent ones; the daemon closes them all."""
    with served.client() as client:
        pid = client.call("health")["pid"]
        before = sockets(pid)
        clients = [Raw(served) for _ in range(60)]
        for number, raw in enumerate(clients):
            if number % 5 == 0:
                raw.send(b'{"jsonrpc":"2.0","id":1,"meth')
            elif number % 5 == 1:
                raw.call("message.list", page_size=100)
            elif number % 5 == 2:
                raw.call("message.wait", caller_agent_id="bob", timeout_ms=500)
            elif number % 5 == 3:
                raw.send(b"C\0\0\0\7half")
        for raw in clients:
            raw.close()
        assert client.call("health")["status"] == "ok"
        until(lambda: sockets(pid) <= before, "their sockets are closed")


@linux
def test_a_line_without_end_is_cut_off(served):
    """More than 1 MiB without a newline: one error, the end, and no memory for it; others do not notice."""
    with served.client() as client:
        pid = client.call("health")["pid"]
        before = memory(pid)
        for _ in range(8):
            with Raw(served) as raw:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    for _ in range(64):
                        raw.send(b"x" * (1 << 20))
                assert shape(raw.reply()) == (None, -32600) and raw.reply() is None
            assert client.call("health")["status"] == "ok"
        assert memory(pid) - before < 32 << 20


def test_the_longest_line_is_read(served):
    line = b'{"jsonrpc":"2.0","id":1,"method":"health","params":{"x":"%s"}}'
    room = thrum.REQUEST_MAX - len(line) + 2
    with Raw(served) as raw:
        assert [shape(reply) for reply in talk(raw, line % (b"x" * room))] == [(1, "ok")]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            raw.send(line % (b"x" * (room + 1)) + b"\n")
        assert shape(raw.reply()) == (None, -32600) and raw.reply() is None


@pytest.mark.parametrize("data", [b"C" + b"\xff" * 4 + b"x" * 1000, b"C\0\0\0\4\0\0\0\7", b"C\0\0\0\0", b"C" + bytes(4) * 50,
                                  b"C\0\0\0\x0c" + b"\0\0\0\1x" * 2 + b"xx", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\0" * 5000,
                                  bytes(range(256)) * 50])
def test_other_garbage_ends_only_its_own_connection(served, data):
    with Raw(served) as raw, served.client() as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            raw.send(data).end_of_writing()
        while raw.line():
            pass
        assert client.call("health")["status"] == "ok"


@linux
def test_clients_that_never_read_are_dropped_and_cost_a_bounded_sum(make_repo, foreground):
    """Each asks for 60 MB and reads nothing: others are served meanwhile, and after WRITE_S they are gone."""
    repo = prepare(make_repo())
    process = foreground(repo, "thrum.WRITE_S = 1")
    with repo.client() as client:
        register(client, "ada", "bob")
        for _ in range(20):
            client.call("message.send", content="x" * 60_000, mentions=["@bob"], caller_agent_id="ada")
        client.call("message.list", for_agent="bob", page_size=100)
        before, open_before = memory(process.pid), sockets(process.pid)
        clients = [Raw(repo) for _ in range(20)]
        for raw in clients:
            for number in range(50):
                raw.call("message.list", id=number, for_agent="bob", page_size=100)
        begin = time.monotonic()
        assert client.call("message.send", content="meanwhile", mentions=["@bob"], caller_agent_id="ada")["message_id"]
        assert time.monotonic() - begin < 5
        until(lambda: sockets(process.pid) <= open_before, "the daemon has closed them", 15)
        assert memory(process.pid, "VmHWM") - before < 150 << 20
        for raw in clients:
            raw.close()
        assert client.call("health")["status"] == "ok"


@linux
def test_a_batch_of_large_answers_is_bounded(make_repo, foreground):
    """One line of 10 kB must not make the daemon hold hundreds of megabytes."""
    repo = prepare(make_repo())
    process = foreground(repo)
    with repo.client() as client:
        register(client, "ada", "bob")
        for _ in range(100):
            client.call("message.send", content="x" * 60_000, mentions=["@bob"], caller_agent_id="ada")
        before = memory(process.pid)
    call = {"jsonrpc": "2.0", "method": "message.list", "params": {"for_agent": "bob", "page_size": 100}}
    with Raw(repo) as raw:
        raw.send(json.dumps([{**call, "id": n} for n in range(thrum.BATCH_CALLS_MAX)]).encode() + b"\n")
        while data := raw.sock.recv(1 << 20):
            if data.endswith(b"\n"):
                break
    assert memory(process.pid, "VmHWM") - before < 150 << 20


@linux
def test_more_connections_than_descriptors_harm_nobody_who_is_in(make_repo, foreground):
    repo = prepare(make_repo())
    process = foreground(repo, "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); thrum.SYNC_S = 0.5")
    with repo.client() as client:
        register(client, "ada", "bob")
        clients = [Raw(repo) for _ in range(120)]
        for number in range(20):
            client.call("message.send", content=f"m{number}", mentions=["@bob"], caller_agent_id="ada")
        assert client.call("message.list", for_agent="bob")["total"] == 20
        for raw in clients:
            raw.close()

    def served_again():
        with Raw(repo) as raw:
            reply = raw.call("health").reply()      # None: turned away, while the others are still being closed
            return reply and reply["result"]["sync_state"]
    assert until(served_again, "those who come later are served")
    assert until(lambda: served_again() == "ok", "what could not be opened meanwhile is opened now")
    assert process.poll() is None


def test_mixed_calls_in_parallel(served):
    """Vector 39: the valid ones all succeed, each invalid one gets its own error."""
    problems = []

    def work(worker):
        with Raw(served) as raw:
            for number in range(25):
                good = (worker + number) % 2
                raw.call("health" if good else "nope.x", id=number)
                if shape(raw.reply()) != (number, "ok" if good else -32601):
                    problems.append((worker, number))
    threads = [threading.Thread(target=work, args=(n,)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert not problems and not any(thread.is_alive() for thread in threads)


# ---- deadlines

def test_a_silent_connection_is_closed(make_repo, foreground):
    repo = prepare(make_repo())
    foreground(repo, "thrum.IDLE_S = thrum.SYNC_S = 0.3")
    with Raw(repo) as silent, Raw(repo) as spoke, Raw(repo) as half:
        assert shape(spoke.call("health").reply()) == (1, "ok")
        half.send(b'{"jsonrpc"')
        assert [raw.reply() for raw in (silent, spoke, half)] == [None] * 3, "closed, without a word"
    with repo.client() as client:
        assert client.call("health")["status"] == "ok"


def test_a_wait_is_no_idleness(make_repo, foreground):
    repo = prepare(make_repo())
    foreground(repo, "thrum.IDLE_S = thrum.SYNC_S = 0.1")
    with Raw(repo) as raw:
        raw.call("message.wait", all=True, timeout_ms=600)
        assert raw.reply()["result"]["timed_out"] is True


def test_a_disk_that_does_not_answer_fails_the_call_and_delays_no_reader(make_repo, foreground, gate):
    """Vector 37: the blocked call ends with an error near its limit, everybody else is answered at once."""
    repo = prepare(make_repo())
    foreground(repo, gate.patch + "thrum.CALL_S = 1", pass_fds=(gate.note,))
    with repo.client() as client:
        register(client, "ada", "bob")
        gate.close_it()
        with Raw(repo) as blocked:
            blocked.call("message.send", content="slow", mentions=["@bob"], caller_agent_id="ada")
            gate.wait_for_sync()
            for method in ("health", "agent.list", "message.list"):
                begin = time.monotonic()
                client.call(method)
                assert time.monotonic() - begin < 1, method
            assert client.call("message.list")["total"] == 0, "what is not durable is not shown"
            error = blocked.reply()["error"]
            assert error["code"] == -32000 and "1 s" in error["message"]
        gate.open_it()
        assert client.call("message.send", content="again", mentions=["@bob"], caller_agent_id="ada")["message_id"]
        assert sorted(m["body"]["content"] for m in client.call("message.list")["messages"]) == ["again", "slow"]


def test_slow_methods_keep_no_quick_one_waiting(make_repo, foreground):
    """More of them than the daemon has threads of both kinds."""
    repo = prepare(make_repo())
    foreground(repo, """
import threading
opened, begun = threading.Event(), threading.Semaphore(0)
def slow(context, params):
    begun.release()
    return {"opened": opened.wait(30), "agents": len(context.store.agents())}
def both(context, params):
    return {"begun": [begun.acquire(timeout=30) for _ in range(thrum.SLOW_READERS)]}
thrum.METHODS["slow.git"] = thrum.Method(slow, {}, "Slow.", slow=True)
thrum.METHODS["slow.both"] = thrum.Method(both, {}, "When as many run as there are threads for.")
thrum.METHODS["slow.open"] = thrum.Method(lambda context, params: {"set": opened.set()}, {}, "Open.")
""")
    with repo.client() as client:
        register(client, "ada", "bob")
        waiting = [Raw(repo).call("slow.git") for _ in range(thrum.READERS + thrum.SLOW_READERS)]
        assert client.call("slow.both") == {"begun": [True] * thrum.SLOW_READERS}
        assert client.call("message.send", content="quick", mentions=["@bob"], caller_agent_id="ada")["message_id"]
        assert client.call("message.list")["total"] == 1
        client.call("slow.open")
        assert [raw.reply()["result"] for raw in waiting] == [{"opened": True, "agents": 2}] * len(waiting)


def test_a_question_that_takes_too_long_is_interrupted(make_repo, foreground):
    """In a reader and in the writer: an error that says so, and the next question is answered."""
    repo = prepare(make_repo())
    foreground(repo, """
thrum.QUERY_S = 0.3
ENDLESS = "with recursive c(x) as (select 1 union all select x + 1 from c) select count(*) from c"
def endless(context, params):
    return {"count": context.store.value(ENDLESS)}
thrum.METHODS["slow.read"] = thrum.Method(endless, {}, "Slow.")
thrum.METHODS["slow.write"] = thrum.Method(endless, {}, "Slow.", writes=True)
""")
    with repo.client() as client:
        register(client, "ada", "bob")
        for method in ("slow.read", "slow.write"):
            begin = time.monotonic()
            with pytest.raises(thrum.ThrumError) as caught:
                client.call(method)
            assert caught.value.code == -32000 and time.monotonic() - begin < 5
            assert client.call("message.send", content=method, mentions=["@bob"], caller_agent_id="ada")["message_id"]
            assert client.call("message.list", for_agent="bob")["messages"][0]["body"]["content"] == method


def test_a_database_locked_by_somebody_else_fails_writes_only(make_repo, foreground):
    """A person with the sqlite3 shell: sends fail in time with one line, reads go on, afterwards all is well."""
    repo = prepare(make_repo())
    foreground(repo, """
import sqlite3
connect = sqlite3.connect
sqlite3.connect = lambda *args, **named: connect(*args, **{**named, "timeout": 0.5})
""")
    with repo.client() as client:
        register(client, "ada", "bob")
        other = sqlite3.connect(str(repo.var / "messages.db"), isolation_level=None)
        other.execute("begin immediate")
        with Raw(repo) as blocked:
            begin = time.monotonic()
            blocked.call("message.send", content="refused", mentions=["@bob"], caller_agent_id="ada")
            assert client.call("message.list")["total"] == 0 and time.monotonic() - begin < 2
            error = blocked.reply()["error"]
            assert "locked" in error["message"] and time.monotonic() - begin < thrum.CALL_S
        other.execute("rollback")
        other.close()
        assert client.call("message.send", content="kept", mentions=["@bob"], caller_agent_id="ada")["message_id"]
        assert [m["body"]["content"] for m in client.call("message.list")["messages"]] == ["kept"]


def test_a_bug_in_a_method_harms_nobody_else(make_repo, foreground):
    """-32603 with no inner detail, logged with its traceback; nothing of it is stored, and the connection goes on."""
    repo = prepare(make_repo())
    foreground(repo, """
def broken(context, params):
    if params.get("append"):
        context.append("group.create", group_id="grp_x", name="x")
    raise KeyError("secret detail")
thrum.METHODS["broken.read"] = thrum.Method(broken, {}, "Broken.")
thrum.METHODS["broken.write"] = thrum.Method(broken, {"append": bool}, "Broken.", writes=True)
""")
    with Raw(repo) as raw:
        for method, params in (("broken.read", {}), ("broken.write", {"append": True})):
            reply = raw.call(method, **params).reply()
            assert reply["error"]["code"] == -32603 and "secret" not in reply["error"]["message"]
        groups = raw.call("group.list").reply()["result"]["groups"]
        assert [group["name"] for group in groups] == ["everyone"]
    assert (repo.var / "daemon.log").read_text().count("KeyError: 'secret detail'") == 2


# ---- where it lies

def test_a_path_of_300_characters_with_spaces_and_other_letters(make_repo):
    """Longer than sun_path: socket, launcher, worktree, subdirectory, --repo and Python clients all find the daemon."""
    part = "päth with späces 漢字 " + "x" * 20
    repo = make_repo("/".join([part] * 8))
    assert len(str(repo.path)) >= 300
    repo.join("ada")
    other = repo.worktree("zweiter bäum".replace(" ", "-"))
    other.join("bob", role="tester")
    sent = repo.json("send", "grüße", "--to", "@bob")
    below = other.path / "a b" / "ç"
    below.mkdir(parents=True)
    assert [m["message_id"] for m in other.json("inbox", "--unread", cwd=below)["messages"]] == [sent["message_id"]]
    away = other.run("inbox", "--unread", "--json", "--repo", str(other.path), cwd="/", command=QUICK, check=0)
    assert sent["message_id"] in away.stdout
    here = os.getcwd()
    with repo.client() as client:
        assert client.call("message.get", message_id=sent["message_id"])["message"]["body"]["content"] == "grüße"
    assert os.getcwd() == here, "the way to a long socket leads back"
    repo.kill()
    assert "grüße" in other.ok("inbox", "--unread"), "and it starts there by itself"
    repo.ok("daemon", "restart")
    repo.ok("daemon", "stop")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user to come from")
def test_another_user_is_not_served(make_repo, tmp_path):
    """Even where the directory has been opened to all, the peer's uid decides."""
    repo = prepare(make_repo())
    with repo.client() as client:
        assert client.call("health")["status"] == "ok"
    public = socket.socket(socket.AF_UNIX)
    os.chmod(repo.var / "thrum.sock", 0o777)
    here = os.getcwd()
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:         # the child connects as nobody; it holds the directory already
        try:
            os.chdir(repo.var)
            os.setuid(65534)
            public.settimeout(LONG)
            public.connect("thrum.sock")
            public.sendall(b'{"jsonrpc":"2.0","id":1,"method":"health"}\n')
            os.write(writing, b"<" + public.recv(100) + b">")
        except OSError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    said = os.read(reading, 1000)
    os.close(reading)
    public.close()
    os.chdir(here)
    assert said == b"<>" or b"denied" in said or b"reset" in said.lower(), said


def test_the_table_of_limits_is_finite():
    for name in ("CONNECT_S", "CALL_S", "SLOW_S", "IDLE_S", "WRITE_S", "STOP_S", "START_S", "QUERY_S", "AWAY_S"):
        assert 0 < getattr(thrum, name) <= 300, name
    assert resource.getrlimit(resource.RLIMIT_NOFILE)
