"""Every command of the README runs, in order, as it stands."""

import os
import re
import shutil
import subprocess
import sys

import thrum
from conftest import CLEAN, ROOT, THRUM

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)( test)?\n(.*?)^```$", README, re.M | re.S)


def environment(tmp_path):
    """An environment in which `python3` is this Python."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "python3").symlink_to(sys.executable)
    return {**CLEAN, "PATH": f"{bin_}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def test_the_commands_run(make_repo, tmp_path):
    repo = make_repo()
    shutil.copy(THRUM, repo.path / "thrum.py")
    repo.git("add", "thrum.py")
    repo.git("commit", "-q", "-m", "Add thrum")
    script = "".join(block for language, test, block in BLOCKS if language == "sh" and not test)
    assert script.count("\n") > 20
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=repo.path, env=environment(tmp_path), capture_output=True,
                          text=True, input="", timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✓ Registered as @bob (reviewer, core)" in done.stdout
    assert "✓ Daemon stopped successfully" in done.stdout
    assert done.stderr.count("Error") == done.stderr.count("the thread has moved on") == 1, done.stderr      # the one that is shown
    assert "Removed" in done.stdout and not (repo.path / ".thrum").exists() and not repo.git("branch", "--list", "a-sync")


def test_the_python_example_runs(make_repo, tmp_path):
    repo = make_repo()
    repo.join("ada")
    worktree = repo.worktree("bob")
    worktree.join("bob")
    example = next(block for language, _, block in BLOCKS if language == "python")
    done = subprocess.run([sys.executable, "-c", example], cwd=repo.path, env=environment(tmp_path), capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0, done.stderr
    assert "agent.register" in done.stdout
    assert worktree.json("inbox")["messages"][0]["body"]["content"] == "tests are green"


def test_the_build_runs_the_readmes_test_command():
    commands = [block.strip() for _, test, block in BLOCKS if test]
    assert len(commands) == 1 and commands[0].endswith("python tests/run.py")
    assert "```sh test" in (ROOT / ".ci" / "run").read_text()


def test_the_tables_name_what_exists():
    for line in re.findall(r"\.thrum/bin/thrum ([a-z -]+)", README):
        name, _ = thrum.split_command(line.split(), {**thrum.COMMANDS, **thrum.HERE})
        assert name in {**thrum.COMMANDS, **thrum.HERE}, line
