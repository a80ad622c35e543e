"""How a command runs (design, section 3): what happens when a part of it goes away, is slow, or is not allowed."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import thrum
from conftest import QUICK, SCRIPT, THRUM
from team import END_S, Proxy, Team, confined, error_line, finish, one_document, start, vendored

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    made = Team(tmp_path_factory.mktemp("client"))
    yield made
    made.close()


@pytest.fixture
def fresh(team):
    team.clear()
    return team


@pytest.fixture
def proxy(team, tmp_path_factory):
    made = Proxy(team.ada, tmp_path_factory.mktemp("p"))
    yield made
    made.close()


@pytest.fixture(scope="module", autouse=True)
def silent_daemon(team, tmp_path_factory):
    """Commands begun at once against a daemon that accepts and never answers; looked at in the last test."""
    path = str(tmp_path_factory.mktemp("s") / "s.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(8)
    ended = {}

    def watch(words):
        process = start(team.bob, *words.split(), env={"THRUM_SOCKET": path})
        since = time.monotonic()
        try:
            out, err = process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        ended[words] = time.monotonic() - since, subprocess.CompletedProcess(words, process.returncode, out.decode(), err.decode())
    threads = [threading.Thread(target=watch, args=(words,)) for words in ("inbox --unread", "daemon status")]
    for thread in threads:
        thread.start()

    def results():
        for thread in threads:
            thread.join()
        return ended
    yield results
    results()
    listener.close()


# ---------------------------------------------------------------- what was not shown stays unread

def full_pipe():
    """A pipe that nobody reads and that takes no more bytes: (read end, write end)."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"." * 4096)
    except BlockingIOError:
        pass
    os.set_blocking(writer, True)
    return reader, writer


@pytest.mark.parametrize("words", ["inbox", "inbox --json", "message get {id}"])
@pytest.mark.parametrize("by", ["launcher", "script"])
def test_killed_before_it_printed(fresh, proxy, words, by):
    """A command killed while its text waits in a full pipe has shown nothing: the mail stays unread."""
    sent = fresh.mail("do not lose me")
    reader, writer = full_pipe()
    try:
        command = fresh.bob.command() if by == "launcher" else QUICK
        process = start(fresh.bob, *words.format(id=sent).split(), env=proxy.env(), stdout=writer, command=command)
        proxy.await_record("X")         # everything is there: the process is stuck in its write, or about to be
        process.kill()
        process.communicate()
    finally:
        os.close(reader)
        os.close(writer)
    assert fresh.unread() == ["do not lose me"]


def test_the_acknowledgement_is_lost(fresh, proxy):
    """The line is cut after the text was printed but before the daemon knows: printed once, and rather unread than lost."""
    fresh.mail("only once")
    proxy.cut = lambda number, side, kind: number == 1 and kind == "A"
    out = fresh.bob.ok("inbox", env=proxy.env())
    assert out.count("only once") == 1
    assert fresh.unread() in (["only once"], [])


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_mail_that_comes_while_the_daemon_is_away(fresh, proxy, more):
    """An inbox whose line was cut before its end, and new mail before the second try: all of one answer, nothing half."""
    first, second = f"the first {fresh.seq()}", f"the second, which came in between {fresh.seq()}"
    fresh.mail(first)
    proxy.cut = lambda number, side, kind: number == 1 and side == "daemon" and kind == "X"
    proxy.on_cut = lambda: fresh.mail(second)
    out = fresh.bob.ok("inbox", *more, env=proxy.env())
    assert out.count(first) == 1
    assert {text for text in (first, second) if text in out} | set(fresh.unread()) == {first, second}, out
    if more:
        one_document(out)


@pytest.mark.parametrize("words", ["inbox", "inbox --json"])
def test_closed_stdout(fresh, words):
    """With no stdout there is nobody who has seen it."""
    fresh.mail("seen by nobody")
    done = fresh.bob.run(command=["sh", "-c", f"exec '{fresh.bob.launcher}' {words} >&-"])
    assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 1
    assert fresh.unread() == ["seen by nobody"]


def test_stdout_on_a_full_disk(fresh):
    """An answer that cannot be written is one line and exit 1, at once, and the mail stays unread."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    fresh.mail("no room")
    with open("/dev/full", "w") as full:
        status, _, err = finish(start(fresh.bob, "inbox", stdout=full))
    assert status == 1 and err.startswith("Error: ") and err.count("\n") == 1 and "No space left" in err
    assert fresh.unread() == ["no room"]


def test_closed_stdin_and_stderr(fresh):
    """Closed streams are not mistaken for the daemon's socket: `send -` says that there is nothing, a warning is dropped."""
    done = fresh.bob.run(command=["sh", "-c", f"exec '{fresh.bob.launcher}' send - --to @ada <&-"])
    error_line(done)
    done = fresh.bob.run(command=["sh", "-c", f"exec '{fresh.bob.launcher}' send role --to @planner 2>&-"], check=0)
    assert done.stdout.startswith("✓ Message sent")
    assert fresh.bob.run(command=["sh", "-c", f"exec '{fresh.bob.launcher}' send x --to @ghost 2>&-"]).returncode == 1
    assert fresh.unread(fresh.ada) == ["role"]


@pytest.mark.parametrize("words", ["send x --to @ghost", "nope", "message get msg_none"])
def test_nobody_reads_stderr(fresh, words):
    """A failure is a failure, also when nobody hears why."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stderr:
        assert finish(start(fresh.ada, *words.split(), stderr=stderr))[0] == 1


def test_head_is_quiet(fresh):
    """`inbox | head -1` says nothing on stderr and takes no long time, whether the text fits the pipe or not."""
    for _ in range(4):
        fresh.ada.ok("send", "-", "--to", "@bob", input="line of text\n" * 4500)
    done = fresh.bob.run(command=["bash", "-c", f"'{fresh.bob.launcher}' inbox --unread | head -1; echo ${{PIPESTATUS[0]}} >&2"])
    assert done.stdout.count("\n") == 1 and done.stderr == "0\n"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        for command in (fresh.bob.command(), QUICK):
            for words in ("inbox", "help", "help send", "status", "inbox --help"):
                status, _, err = finish(start(fresh.bob, *words.split(), stdout=stdout, command=command))
                assert (status, err) == (0, ""), words
    assert len(fresh.unread()) == 4


def test_non_blocking_stdout(fresh):
    """A pipe that a harness made non-blocking still gets every byte."""
    for _ in range(3):
        fresh.ada.ok("send", "-", "--to", "@bob", input="word " * 12_000)
    expected = fresh.bob.ok("inbox", "--unread")
    for command in (fresh.bob.command(), QUICK):
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        process = start(fresh.bob, "inbox", "--unread", stdout=writer, command=command)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            got = pipe.read().decode()
        assert finish(process)[::2] == (0, "")
        assert re.sub(r"just now|\dm ago", "", got) == re.sub(r"just now|\dm ago", "", expected)


# ---------------------------------------------------------------- stdin

def test_a_silent_stdin_delays_nothing(fresh, make_repo):
    """An open pipe on stdin that never ends: no command reads it unless the command line says `-`."""
    other = make_repo()
    for repo, words in ((fresh.ada, "send hello --to @bob"), (fresh.bob, "inbox"), (fresh.bob, "status"), (fresh.bob, "wait --timeout 0s"),
                        (other, "init"), (other, "quickstart --name a --role b --module c"), (other, "daemon restart"), (other, "help")):
        process = start(repo, *words.split(), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        try:
            assert process.wait(END_S) == (1 if "wait" in words else 0), words
        finally:
            process.kill()
            process.communicate()


def test_nobody_holds_the_callers_pipes(make_repo):
    """A command that starts the daemon ends for whoever reads its pipes to the end: the daemon holds none of them."""
    repo = make_repo()
    repo.join("ada")
    for words in ("daemon restart", "init"):
        assert finish(start(repo, *words.split()))[0] == 0      # communicate() waits for the end of the pipes
    repo.kill()
    assert finish(start(repo, "inbox"))[0] == 0
    for number in (0, 1, 2):
        assert os.readlink(f"/proc/{repo.pid()}/fd/{number}") == "/dev/null" if os.path.isdir("/proc/self/fd") else True


# ---------------------------------------------------------------- a daemon that goes away

@pytest.mark.parametrize("kind", ["X", "O"])
def test_a_send_is_not_doubled(fresh, proxy, kind):
    """The answer to a send is lost: the second try finds the first by its key, and says its id once."""
    proxy.cut = lambda number, side, what: number == 1 and side == "daemon" and what == kind
    out = fresh.ada.ok("send", "exactly once", "--to", "@bob", env=proxy.env())
    assert proxy.count == 2 and out.count("Message sent") == 1
    found = fresh.bob.json("inbox", "--unread")["messages"]
    assert [m["body"]["content"] for m in found] == ["exactly once"] and found[0]["message_id"] in out
    proxy.cut = lambda number, side, what: number == 3 and side == "daemon" and what == kind
    fresh.bob.ok("reply", found[0]["message_id"], "answered once", env=proxy.env())
    assert proxy.count == 4 and fresh.unread(fresh.ada) == ["answered once"]


def test_stdin_is_read_once(fresh, proxy):
    """A body from stdin survives the loss of the daemon: it is read once and given to the next."""
    proxy.cut = lambda number, side, kind: number % 2 == 1 and side == "daemon" and kind in "OEX"
    fresh.ada.ok("send", "-", "--to", "@bob", env=proxy.env(), input="from a pipe")
    parent = fresh.bob.json("inbox", "--unread")["messages"][0]["message_id"]
    fresh.bob.ok("reply", parent, "-", env=proxy.env(), input="and an answer")
    assert fresh.unread() == [] and fresh.unread(fresh.ada) == ["and an answer"]


def test_two_equal_sends_are_two(fresh):
    """The key belongs to one run of the command; the same text again is another message; --key makes it the same."""
    for _ in range(2):
        fresh.ada.ok("send", "again", "--to", "@bob")
    ids = {fresh.ada.json("send", "by key", "--to", "@bob", "--key", "k1")["message_id"] for _ in range(3)}
    assert fresh.unread() == ["by key", "again", "again"] and len(ids) == 1


def test_a_send_survives_kill_9(fresh, proxy):
    """The daemon is killed after the send was stored and before it answered: the next daemon has it, once."""
    proxy.cut = lambda number, side, kind: number == 1 and side == "daemon"
    proxy.on_cut = lambda: os.kill(fresh.ada.pid(), signal.SIGKILL)
    process = start(fresh.ada, "send", "survivor", "--to", "@bob", env=proxy.env())
    proxy.await_record("O")                     # which is cut: the daemon has been killed by then
    assert fresh.unread() == ["survivor"]       # this starts the next daemon, which the waiting send finds
    status, out, err = finish(process)
    assert (status, err) == (0, "") and "Message sent" in out
    assert fresh.unread() == ["survivor"]


@pytest.mark.parametrize("words", ["group create g-{n}", "message edit {own} text", "message delete {own} --force", "message read --all",
                                   "session set-intent x", "session end", "session start"])
def test_a_change_whose_answer_was_lost(fresh, proxy, words):
    """Any change whose answer was lost is done once, and does not end as an error."""
    seq, own = fresh.seq(), fresh.mail("own", fresh.bob, "@ada")
    fresh.mail("unread")
    proxy.cut = lambda number, side, kind: number == 1 and side == "daemon" and kind in "OX"
    try:
        done = fresh.bob.run(*words.format(n=seq, own=own).split(), env=proxy.env())
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert proxy.count == 2
    finally:
        fresh.bob.ok("session", "start")


def test_the_status_of_a_daemon_that_has_closed(monkeypatch):
    """The daemon closes after X, while the client still prints: the acknowledgement finds nobody, the status counts."""
    ours, theirs = socket.socketpair()
    printed = []

    def show(descriptor, data, *more):
        theirs.close()
        printed.append((descriptor, bytes(data)))
    monkeypatch.setattr(thrum, "show", show)
    with ours:
        ours.settimeout(END_S)
        theirs.sendall(thrum.record("O", b"one") + thrum.record("E", b"two") + thrum.record("X", b"7"))
        assert thrum.forward(ours, "/nowhere", b"call", dict(thrum.STATE), lambda kind, payload: None) == 7
    assert printed == [(1, b"one"), (2, b"two")]


def test_nothing_is_printed_of_half_an_answer(monkeypatch):
    """An answer whose end never came is not printed at all, so that the next try does not print it twice."""
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(thrum, "show", lambda *args: pytest.fail(f"printed {args}"))
    with ours:
        ours.settimeout(END_S)
        theirs.sendall(thrum.record("O", b"one") + thrum.record("X", b"7")[:-1])
        theirs.shutdown(socket.SHUT_WR)
        assert thrum.forward(ours, "/nowhere", b"call", dict(thrum.STATE), lambda kind, payload: None) is None
    theirs.close()


def test_wait_survives_a_restart(fresh, proxy):
    """A wait whose daemon restarts goes on with the next one, says so on stderr, and is woken by what comes then."""
    process = start(fresh.bob, "wait", "--timeout", "60s", env=proxy.env())
    proxy.await_record("S")
    fresh.ada.ok("daemon", "restart")
    proxy.await_record("C", "client")           # the next daemon has been asked
    fresh.mail("after the restart")
    status, out, err = finish(process)
    assert status == 0 and out.startswith("MESSAGES_RECEIVED\n  @ada: after the restart")
    assert err == "Lost connection to daemon, reconnecting...\n"


@pytest.mark.parametrize("words", ["wait", "wait --after +0s", "wait --after -1ms", "wait --unread", "wait --after-seq {seq}"])
def test_wait_misses_nothing_over_kill_9(fresh, proxy, words):
    """What is sent while the waiter has no daemon (kill -9, restarted by the sender) reaches it all the same.

    `--after` counts from when the command was called, not from when it found the next daemon.
    """
    process = start(fresh.bob, *words.format(seq=fresh.seq()).split(), "--timeout", "60s", "--json", env=proxy.env())
    if words in ("wait", "wait --after-seq {seq}", "wait --unread"):
        proxy.await_record("C", "client")
        if words == "wait":
            proxy.await_record("S")
    else:
        proxy.await_record("C", "client")
        fresh.ada.json("send", "a mark", "--to", "@ada")        # the daemon answers in order: the waiter has been heard
    proxy.closed.set()
    fresh.ada.kill()
    fresh.mail(f"in between, for {words}")
    proxy.closed.clear()
    status, out, err = finish(process)
    assert (status, err) == (0, ""), err
    assert [m["body"]["content"] for m in one_document(out)["messages"]] == [f"in between, for {words}"]


def test_the_time_of_a_wait_counts_from_its_start(fresh, proxy):
    """A wait that lost its daemon ends when its own time is up, not a whole timeout later."""
    process = start(fresh.bob, "wait", "--timeout", "2s", env=proxy.env())
    since = time.monotonic()
    proxy.await_record("S")
    proxy.closed.set()
    fresh.ada.kill()
    fresh.ada.ok("status")
    time.sleep(max(0, since + 1.8 - time.monotonic()))
    proxy.closed.clear()
    status, out, err = finish(process)
    assert status == 1 and out == "" and "NO_MESSAGES_TIMEOUT" in err
    assert time.monotonic() - since < 3.5


def test_a_wait_without_a_daemon_ends_in_time(fresh, proxy):
    """While there is no daemon at all, a wait does not go on for longer than it was asked to."""
    process = start(fresh.bob, "wait", "--timeout", "1s", env=proxy.env())
    proxy.await_record("S")
    proxy.closed.set()
    fresh.ada.kill()
    since = time.monotonic()
    status, out, _ = finish(process)
    assert status in (1, 2) and out == "" and time.monotonic() - since < 5


# ---------------------------------------------------------------- starting

def test_any_command_starts_the_daemon(fresh):
    """Without a daemon (kill -9: stale pid and socket), commands at once start one between them and all succeed."""
    fresh.ada.kill()
    processes = [start(fresh.ada, "send", f"at once {n}", "--to", "@bob") for n in range(4)]
    processes += [start(fresh.bob, "status") for _ in range(3)]
    assert [finish(p)[::2] for p in processes] == [(0, "")] * 7
    assert sorted(fresh.unread()) == [f"at once {n}" for n in range(4)]
    starts = [line for line in fresh.ada.ok("daemon", "logs", "--tail", "30").splitlines() if "started" in line or "stopp" in line]
    assert f"pid {fresh.ada.pid()}" in starts[-1] and starts.count(starts[-1]) == 1


def test_where_it_may_not_be_started(fresh):
    """Stopped on purpose, THRUM_AUTOSTART=0, the configuration, a socket that is named: one line with the way on, no daemon."""
    bob, config = fresh.bob, fresh.ada.path / ".thrum/config.json"
    good = config.read_bytes()
    bob.ok("daemon", "stop")
    try:
        for words in ("inbox", "send x", "status", "session start"):
            assert "it was stopped; 'thrum daemon start' starts it again" in error_line(bob.run(*words.split())), words
        (fresh.ada.var / "stopped").unlink()
        assert "'thrum daemon start' starts it" in error_line(bob.run("inbox", env={"THRUM_AUTOSTART": "0"}))
        config.write_text(json.dumps({"daemon": {"autostart": False}}))
        assert "'thrum daemon start' starts it" in error_line(bob.run("inbox"))
        config.write_bytes(good)
        text = error_line(bob.run("inbox", env={"THRUM_SOCKET": "/nowhere/s.sock"}))
        assert "/nowhere/s.sock: No such file or directory" in text and "THRUM_SOCKET" in text
        assert not (fresh.ada.var / "thrum.sock").exists(), "none of these has started it"
    finally:
        config.write_bytes(good)
    assert bob.run("inbox").returncode == 0, "and now it may"


def test_a_stopped_daemon_comes_back_with_init(make_repo):
    repo = make_repo()
    repo.join("ada")
    repo.ok("daemon", "stop")
    assert "✓ Daemon started" in repo.ok("init")
    assert repo.ok("inbox")


def test_a_sandbox_gets_one_clear_line(fresh):
    """A socket that may not be opened (EACCES) is not a missing daemon: the line says what it is, and nothing is started."""
    command = confined()
    if command is None:
        pytest.skip("no setpriv, and root may open every socket")
    sock, pid = fresh.ada.var / "thrum.sock", fresh.ada.pid()
    sock.chmod(0)
    try:
        for words, status in (("inbox", 1), ("send x --to @ada", 1), ("wait", 2), ("daemon status", 1)):
            for program in (fresh.bob.command(), QUICK):
                text = error_line(fresh.bob.run(*words.split(), command=[*command, *program]), status)
                assert "Permission denied" in text and "sandbox" in text, words
        done = fresh.bob.run("whoami", "--json", command=[*command, *fresh.bob.command()], check=0)
        assert one_document(done.stdout)["source"] == "file"
    finally:
        sock.chmod(0o600)
    assert fresh.ada.pid() == pid and fresh.ada.ok("status")


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES])
def test_reach_knows_a_sandbox(team, monkeypatch, number):
    """reach() starts a daemon on ENOENT and ECONNREFUSED alone (decision 10)."""
    def forbidden(var):
        raise OSError(number, os.strerror(number))
    started = []
    monkeypatch.setattr(thrum, "dial", forbidden)
    monkeypatch.setattr(thrum, "start_daemon", started.append)
    monkeypatch.delenv("THRUM_SOCKET", raising=False)
    with pytest.raises(thrum.Unreachable, match="sandbox") as caught:
        thrum.reach(thrum.find_places(str(team.ada.path)))
    assert "\n" not in str(caught.value) and not started


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ECONNREFUSED])
def test_reach_starts_what_is_absent(team, monkeypatch, number):
    started = []

    def absent(var):
        if started:
            return "a socket"
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(thrum, "dial", absent)
    monkeypatch.setattr(thrum, "start_daemon", started.append)
    monkeypatch.delenv("THRUM_SOCKET", raising=False)
    monkeypatch.delenv("THRUM_AUTOSTART", raising=False)
    assert thrum.reach(thrum.find_places(str(team.ada.path))) == "a socket" and len(started) == 1


# ---------------------------------------------------------------- copies and launchers

def test_two_copies_do_not_flap(make_repo):
    """A newer vendored copy replaces the daemon once; older and equal ones are served by it, in any order."""
    ada = make_repo()
    ada.join("ada")
    bob = ada.worktree("bob")
    bob.join("bob")
    old, new = vendored(ada.path / "thrum.py", "0.0.9"), vendored(bob.path / "thrum.py", "9.9.9")
    before = ada.pid()
    ada.run("send", "from the old", "--to", "@bob", command=old, check=0)
    assert ada.pid() == before and ada.json("daemon", "status")["version"] == thrum.__version__
    process = start(bob, "wait", "--timeout", "60s", "--after-seq", "10000", "--from", "@ada")
    bob.run("inbox", command=new, check=0)
    after = ada.pid()
    assert after != before and ada.json("daemon", "status")["version"] == "9.9.9"
    pids = set()
    for repo, command in ((ada, old), (bob, new), (ada, ada.command()), (bob, bob.command()), (ada, old)):
        assert repo.run("send", "in turns", "--to", "@everyone", command=command, check=0).stderr == ""
        pids.add(ada.pid())
    assert pids == {after}, "the daemon has changed hands more than once"
    for repo, command in ((bob, new), (ada, old)):
        repo.run("init", command=command, check=0)
    assert ada.pid() == after and thrum.read_version(str(ada.path / ".thrum/bin/thrum.py")) == "9.9.9"
    assert process.poll() is None, "who waited has gone on with the new daemon"
    process.kill()
    process.communicate()
    ada.ok("daemon", "restart", "--from", str(THRUM))
    assert ada.json("daemon", "status")["version"] == thrum.__version__, "going back takes an explicit word"


def test_a_broken_vendored_file_is_nobodys_daemon(make_repo):
    """The launcher and the daemon run their private copy: a half-saved file in the tree changes nothing."""
    repo = make_repo()
    (repo.path / "thrum.py").write_text(THRUM.read_text())
    repo.run("quickstart", "--name", "ada", "--role", "r", "--module", "m", command=[sys.executable, "thrum.py"], check=0)
    (repo.path / "thrum.py").write_text("import socket\ndef half_sav")
    (repo.path / "json.py").write_text("raise SystemExit('shadowed')")
    repo.ok("daemon", "restart")
    repo.ok("send", "fine")
    assert repo.ok("help", env={"PYTHONPATH": str(repo.path), "PYTHONSTARTUP": "/nowhere"})
    assert "cannot be compiled" in error_line(repo.run("daemon", "restart", "--from", "thrum.py"))
    assert repo.ok("status")


def test_the_launcher_without_its_interpreter(fresh, tmp_path):
    """It takes python3 when its interpreter has gone, and says so when there is none at all."""
    launcher = fresh.bob.launcher
    good = launcher.read_bytes()
    name = re.search(rb'for python in "([^"]+)"', good)[1]
    launcher.write_bytes(good.replace(name, b"/gone/bin/python3.99"))
    try:
        assert fresh.bob.json("whoami")["agent_id"] == "bob"
        assert fresh.bob.json("version")["version"] == thrum.__version__
        for tool in ("sh", "dirname"):
            (tmp_path / tool).symlink_to(shutil.which(tool))
        done = fresh.bob.run("inbox", env={"PATH": str(tmp_path)})
        assert done.returncode == 127 and done.stderr == "thrum: no python3 was found; install Python 3.9 or newer\n"
    finally:
        launcher.write_bytes(good)


def test_the_launcher_from_anywhere(fresh, tmp_path):
    """By a symbolic link, from a directory that has gone, and from another worktree: the worktree of the working directory counts."""
    link = tmp_path / "thrum"
    link.symlink_to(fresh.bob.launcher)
    assert fresh.ada.json("whoami", command=[str(link)])["agent_id"] == "ada"
    assert json.loads(fresh.ada.ok("whoami", "--json", command=[str(fresh.bob.launcher)]))["agent_id"] == "ada"
    gone = fresh.bob.path / "gone"
    gone.mkdir()
    for program in (f"'{fresh.bob.launcher}'", "../.thrum/bin/thrum", f"'{sys.executable}' '{THRUM}'"):
        for words in ("inbox", "init", "whoami"):
            gone.mkdir(exist_ok=True)
            done = fresh.bob.run(command=["sh", "-c", f"cd '{gone}' && rmdir '{gone}' && exec {program} {words} 2>&1 >/dev/null"])
            assert "Traceback" not in done.stdout and done.stdout.count("Error: ") <= 1, done.stdout


# ---------------------------------------------------------------- Ctrl-C, silence

@pytest.mark.parametrize("by", ["launcher", "script"])
@pytest.mark.parametrize("words", ["wait", "send -"])
def test_control_c(fresh, proxy, by, words):
    """Ctrl-C ends a command that waits with 130 and without a word; nothing is sent."""
    command = fresh.bob.command() if by == "launcher" else SCRIPT
    before = fresh.seq()
    process = start(fresh.bob, *words.split(), env=proxy.env(), command=command, stdin=subprocess.PIPE)
    proxy.await_record("S" if words == "wait" else "N")
    process.send_signal(signal.SIGINT)
    assert process.wait(END_S) == 130
    assert finish(process) == (130, "", "")
    assert fresh.seq() == before


def test_control_c_while_there_is_no_daemon(fresh, proxy):
    """Also while a command looks for its lost daemon."""
    process = start(fresh.bob, "wait", "--timeout", "60s", env=proxy.env())
    proxy.await_record("S")
    proxy.closed.set()
    fresh.ada.kill()
    assert process.stderr.readline().startswith(b"Lost connection")
    process.send_signal(signal.SIGINT)
    assert finish(process) == (130, "", "")


def test_a_terminal_gets_colour_and_its_width(fresh):
    """On a terminal: its width, bold names; NO_COLOR takes the colour away; a pipe has neither."""
    fresh.mail("word " * 60)

    def on_terminal(**env):
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, 0x5414, b"\x18\0\x32\0\0\0\0\0")        # TIOCSWINSZ: 24 lines of 50 columns
        process = start(fresh.bob, "inbox", "--unread", stdout=theirs, env=env)
        os.close(theirs)
        text = b""
        try:
            while True:
                data = os.read(ours, 65536)
                if not data:
                    break
                text += data
        except OSError:
            pass                # the other end is closed
        os.close(ours)
        assert finish(process)[0] == 0
        return text.decode()
    text = on_terminal()
    assert "\x1b[1m@ada\x1b[0m" in text
    assert all(len(line) <= 50 for line in text.splitlines() if line.startswith("  "))
    assert "\x1b" not in on_terminal(NO_COLOR="1") and "\x1b" not in fresh.bob.ok("inbox", "--unread")
    wide = fresh.bob.ok("inbox", "--unread", env={"COLUMNS": "150"})
    assert max(map(len, wide.splitlines())) > 100


def test_the_daemon_reads_no_file_for_a_caller(team):
    """answer_record: only what the command line names, and writes only below the worktree's .thrum (design, section 3)."""
    top = str(team.bob.path)
    assert thrum.answer_record(top, ["send", "--body-file", "/etc/hostname"], b"N", b"/etc/passwd")[:1] == b"1"
    for path in (b"/etc/x", b".thrum/../x", b"x", b".git/hooks/pre-commit", b".thrum/x", b"../.thrum/identities/x", b".thrum/i/../../x"):
        assert thrum.answer_record(top, [], b"W", thrum.pack([path, b"1data"]))[:1] == b"1", path
    assert thrum.answer_record(top, [], b"U", b"") is None


def test_a_python_client(team):
    """connect() is the way in for programs: results, errors with the daemon's words, and a daemon that went away."""
    with thrum.connect(str(team.ada.path)) as client:
        sent = client.call("message.send", mentions=["@bob"], content="from python", caller_agent_id="ada")
        assert sent["message_id"].startswith("msg_")
        with pytest.raises(thrum.ThrumError, match="message not found: msg_none"):
            client.call("message.get", message_id="msg_none")
        with pytest.raises(thrum.InvalidParams, match="content must be a string"):
            client.call("message.send", content=5)
        team.ada.kill()
        with pytest.raises(thrum.Unreachable):
            client.call("health")
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(thrum.connect(str(team.ada.path)))) for _ in range(1)]
    for thread in threads:
        thread.start()
        thread.join(END_S)
    with answers[0] as client:
        assert client.call("health")["status"] == "ok"


def test_zz_a_daemon_that_never_answers(silent_daemon):
    """Nothing hangs: a daemon that accepts and is silent costs a command a limited time and one line that says what to try.

    The limit is two calls of 10 s (design, section 5), one for the answer and one to ask whether it lives, and some air.
    """
    for words, (seconds, done) in silent_daemon().items():
        text = error_line(done)
        assert "unresponsive" in text and "thrum daemon restart" in text
        assert seconds < 25, words
