"""What the tests share: a World that can be set, and scratch repositories with their daemons."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Half a second a time: what it leaves is read by the processes that the tests start, whatever PYTHONDONTWRITEBYTECODE says.
sys.dont_write_bytecode = False
import thrum  # noqa: E402

THRUM = ROOT / "thrum.py"
SCRIPT = [sys.executable, str(THRUM)]
QUICK = [sys.executable, str(ROOT / "tests" / "script.py"), str(THRUM)]     # the same, without compiling it anew
CLEAN = {name: value for name, value in os.environ.items()
         if not name.startswith(("THRUM_", "GIT_")) and name not in ("COLUMNS", "NO_COLOR", "CI")}
# Who commits in the tests; a commit starts one process less without maintenance.
USER = ("-c", "user.name=Test", "-c", "user.email=test@localhost", "-c", "maintenance.auto=false")


class FakeWorld(thrum.World):
    """A World whose time stands until a test moves it, and whose randomness counts."""

    def __init__(self, at="2026-03-10T09:15:00.000000001Z"):
        super().__init__({})
        self.at = thrum.ns_of(at)
        self.drawn = 0

    def now_ns(self):
        return self.at

    def random(self, count):
        self.drawn += 1
        return self.drawn.to_bytes(count, "big")


@pytest.fixture
def world():
    return FakeWorld()


class Repo:
    """A scratch worktree with thrum in it, called as users call it."""

    def __init__(self, path, main=None):
        self.path = Path(path)
        self.main = main or self
        self.worktrees = []

    @property
    def var(self):
        return self.main.path / ".thrum" / "var"

    @property
    def launcher(self):
        return self.path / ".thrum" / "bin" / "thrum"

    def git(self, *args):
        return subprocess.run(["git", *USER, *args], cwd=self.path, env=CLEAN, check=True, capture_output=True, text=True).stdout

    def command(self, *args):
        """The command line that an agent here would use: the launcher, or the script before there is one."""
        return [*([str(self.launcher)] if self.launcher.exists() else QUICK), *args]

    def run(self, *args, env=None, input=None, check=None, cwd=None, command=None, timeout=60):
        """Run a command; `check` is the exit status that it must have.  Gives the CompletedProcess, as text."""
        done = subprocess.run([*(command or self.command()), *args], cwd=cwd or self.path, env={**CLEAN, **(env or {})},
                              input=input if input is not None else "", capture_output=True, text=True, timeout=timeout)
        if check is not None:
            assert done.returncode == check, f"{args}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def ok(self, *args, **more):
        """stdout of a command that must succeed."""
        return self.run(*args, check=0, **more).stdout

    def json(self, *args, **more):
        return json.loads(self.ok(*args, "--json", **more))

    def join(self, name, role="implementer", module="core", **more):
        return self.json("quickstart", "--name", name, "--role", role, "--module", module, **more)

    def worktree(self, name):
        """A linked worktree on a branch of its own."""
        self.git("worktree", "add", "-q", "-b", name, str(self.path.parent / name))
        other = Repo(self.path.parent / name, self.main)
        self.worktrees.append(other)
        return other

    def pid(self):
        return json.loads((self.var / "thrum.pid").read_text())["pid"]

    def kill(self, number=signal.SIGKILL):
        """Kill the daemon and wait until the kernel has let go of its lock."""
        os.kill(self.pid(), number)
        descriptor = thrum.take_lock(str(self.var / "thrum.lock"), 10)
        assert descriptor >= 0
        os.close(descriptor)

    def client(self):
        """A JSON-RPC client of the daemon."""
        return thrum.connect(str(self.path))

    def close(self):
        if self.var.exists():
            thrum.stop_daemon(thrum.find_places(str(self.path)))


@pytest.fixture
def make_repo(tmp_path):
    """Makes repositories with one commit; their daemons are stopped afterwards."""
    made = []

    def make(name="repo", commit=True):
        path = tmp_path / name
        path.mkdir(parents=True)
        repo = Repo(path)
        repo.git("init", "-q", "-b", "main")
        if commit:
            repo.git("commit", "-q", "--allow-empty", "-m", "first")
        made.append(repo)
        return repo

    yield make
    for repo in made:
        repo.close()
        shutil.rmtree(repo.path, ignore_errors=True)


@pytest.fixture
def repo(make_repo):
    return make_repo()
