"""What agents keep for later: `context save/show/load/clear/preamble`, the context.* methods, and who may touch which file."""

import base64
import json
import os
import re
import shlex
import stat
import subprocess
import threading
from pathlib import Path

import pytest

import thrum
from conftest import CLEAN
from shapes import shaped
from team import Team, error_line, finish, start

pytestmark = pytest.mark.slow

AWAY = {"THRUM_SOCKET": "/nowhere/thrum.sock"}      # as in a sandbox that forbids the socket
TEXT = "# Notes\n\n\tindented – ünïcode 🎉  \n\nlast line without an end"


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    made = Team(tmp_path_factory.mktemp("context") / "two – agents")
    yield made
    made.close()


@pytest.fixture
def ada(team):
    """@ada with the default preamble and nothing saved."""
    team.ada.ok("context", "clear")
    team.ada.ok("context", "preamble", "--init")
    return team.ada


def folder(repo):
    return repo.path / ".thrum" / "context"


def listing(repo):
    return {path.name: path.read_bytes() for path in folder(repo).iterdir() if path.is_file()}


# ---------------------------------------------------------------- the commands

def test_save_show_and_clear(ada):
    """The texts of the contract (12.1), and vectors X1 to X3: what was saved comes back byte for byte; clearing twice is fine."""
    size = len(TEXT.encode())
    assert ada.ok("context", "save", input=TEXT) == f"Context saved for ada ({size} bytes)\n"
    preamble = ada.ok("context", "preamble")
    head, rest = ada.ok("context", "show").split("\n", 1)
    assert re.fullmatch(rf"# Context for ada \({size} bytes, updated 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\)", head)
    assert rest == f"\n{preamble}\n{TEXT}\n"
    assert ada.ok("context", "load", "--no-preamble") == f"{head}\n\n{TEXT}\n"
    assert ada.ok("context", "show", "--raw", "--no-preamble") == TEXT
    assert ada.ok("context", "show", "--raw") == \
        f"<!-- preamble: .thrum/context/ada_preamble.md -->\n{preamble}<!-- end preamble -->\n\n{TEXT}"
    for _ in range(2):
        assert ada.ok("context", "clear") == "Context cleared for ada\n"
        assert ada.ok("context", "show") == f"# Context for ada\n\n{preamble}", "the preamble stays"
        assert ada.ok("context", "show", "--no-preamble") == "No context saved for ada\n"
    assert ada.ok("context", "show", "--agent", "@nobody") == ada.ok("context", "show", "--agent", "nobody", "--raw") == \
        "No context saved for nobody\n"


def test_from_a_file(ada, tmp_path):
    """A file is found from the caller's directory; control characters reach a pipe only with --raw."""
    (ada.path / "sub dir").mkdir(exist_ok=True)
    (ada.path / "sub dir" / "notes.md").write_bytes(b"one\x1b[2J\r\ntwo\n")
    ada.ok("context", "save", "--file", "notes.md", cwd=ada.path / "sub dir")
    assert "\\x1b" in ada.ok("context", "show", "--no-preamble")
    raw = subprocess.run([ada.launcher, "context", "show", "--raw", "--no-preamble"], cwd=ada.path, env=CLEAN, capture_output=True).stdout
    assert raw == b"one\x1b[2J\r\ntwo\n"
    ada.ok("context", "save", f"--file={ada.path}/sub dir/notes.md", "--agent", "@ada")
    assert listing(ada)["ada.md"] == raw


def test_each_worktree_has_its_own(team, ada):
    """@bob's files lie in his worktree, readable by nobody else, and --agent names somebody of the same worktree."""
    team.bob.ok("context", "save", input="bob's")
    ada.ok("context", "save", input="ada's")
    assert listing(team.bob)["bob.md"] == b"bob's" and "bob.md" not in listing(ada)
    assert ada.ok("context", "show", "--agent", "bob") == "No context saved for bob\n"
    for path in (*folder(ada).iterdir(), *folder(team.bob).iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert not team.ada.git("status", "--porcelain", "--", ".thrum") and not team.bob.git("status", "--porcelain")
    team.bob.ok("context", "clear")


SHAPES = {
    "save": {"agent_name": ("ada",), "message": str, "saved_at": str, "size": int},
    "show": {"agent_name": ("ada",), "content": ("words",), "has_context": (True,), "has_preamble": (True,), "preamble": str,
             "size": (5,), "updated_at": str},
    "clear": {"agent_name": ("ada",), "message": ("Context cleared for ada",), "cleared": (True,)},
    "preamble": {"agent_name": ("ada",), "content": str, "has_preamble": (True,)},
    "preamble --init": {"agent_name": ("ada",), "message": str, "saved_at": str, "size": int},
}


@pytest.mark.parametrize("words", SHAPES)
def test_json(ada, words):
    ada.ok("context", "save", input="words")
    shaped(ada.json("context", *words.split(), input="words"), SHAPES[words])


def test_the_preamble(team, ada, tmp_path):
    """Shown, replaced by a file, and set back: --init wins over --file, and takes the role of whose preamble it is."""
    (tmp_path / "own.md").write_text("my own words\n")
    assert team.ada.ok("context", "preamble", "--agent", "nobody") == "No preamble for nobody (use --init to create default)\n"
    assert ada.ok("context", "preamble", "--file", str(tmp_path / "own.md")) == "Preamble saved for ada (13 bytes)\n"
    assert ada.ok("context", "preamble") == "my own words\n"
    ada.ok("context", "save", input="notes")
    assert ada.ok("context", "preamble") == "my own words\n", "saving leaves it alone"
    assert re.fullmatch(r"Preamble saved for ada \(\d+ bytes\)\n", ada.ok("context", "preamble", "--init", "--file", "/nowhere"))
    assert ada.ok("context", "preamble") == thrum.default_preamble("ada", "planner")
    try:
        ada.ok("context", "preamble", "--init", "--agent", "bob")
        assert ada.ok("context", "preamble", "--agent", "bob") == thrum.default_preamble("bob", "implementer"), "not the caller's role"
    finally:
        (folder(ada) / "bob_preamble.md").unlink()


def test_the_first_save_makes_the_preamble(ada):
    (folder(ada) / "ada_preamble.md").unlink()
    ada.ok("context", "save", input="notes")
    assert ada.ok("context", "preamble") == thrum.default_preamble("ada", "planner")


def test_the_seeds_name_of_a_preamble_is_read(ada):
    """Decision 27: `ada.preamble.md` counts where there is no `ada_preamble.md`."""
    (folder(ada) / "ada_preamble.md").unlink()
    (folder(ada) / "ada.preamble.md").write_text("old words\n")
    try:
        assert ada.ok("context", "preamble") == "old words\n"
        ada.ok("context", "save", input="notes")
        assert not (folder(ada) / "ada_preamble.md").exists()
        with ada.client() as client:
            assert client.call("context.preamble.show", agent_name="ada", text=True)["content"] == "old words\n"
        ada.ok("context", "preamble", "--init")
        assert ada.ok("context", "preamble") == thrum.default_preamble("ada", "planner")
    finally:
        (folder(ada) / "ada.preamble.md").unlink()


def test_an_agent_called_like_a_preamble(ada):
    """`x_preamble`'s context is not the preamble of `x`."""
    ada.ok("context", "save", "--agent", "ada_preamble", input="mine")
    try:
        assert ada.ok("context", "preamble") == thrum.default_preamble("ada", "planner")
        assert ada.ok("context", "show", "--raw", "--no-preamble", "--agent", "ada_preamble") == "mine"
    finally:
        for name in thrum.context_files("ada_preamble")[:2]:
            (folder(ada) / name).unlink()
    names = [name for agent in ("x", "x_preamble", "x_preamble_preamble") for name in thrum.context_files(agent)]
    assert len(set(names)) == len(names)


def test_without_the_daemon(ada):
    """Where a sandbox forbids the socket, an agent can keep and find what it knows all the same."""
    assert ada.ok("context", "save", input="alone", env=AWAY) == "Context saved for ada (5 bytes)\n"
    assert ada.ok("context", "show", "--raw", "--no-preamble", env=AWAY) == "alone"
    ada.ok("context", "preamble", "--init", env=AWAY)
    assert ada.ok("context", "preamble") == thrum.default_preamble("ada", "planner")
    ada.ok("context", "clear", env=AWAY)
    assert ada.ok("context", "show", "--no-preamble") == "No context saved for ada\n"


# ---------------------------------------------------------------- what is refused

BAD = {
    "context save --file /nowhere": "read context file: No such file or directory: /nowhere",
    "context save --file .": "read context file: Is a directory", "context preamble --file /nowhere": "read preamble file: No such file",
    "context save --agent ../x": "invalid agent name: '../x'", "context show --agent a/b": "invalid agent name",
    "context clear --agent ..": "invalid agent name", "context preamble --init --agent .x": "invalid agent name",
    "context show --agent @": "invalid agent name: ''", "context show --agent a\x1bb": "invalid agent name",
    "context save": "there is nothing to save; 'thrum context clear'",
    "context save --file=": "read context file: No such file",
    "quickstart --name new --role r --module m --preamble-file /nowhere":
        'failed to read preamble file "/nowhere": No such file or directory: /nowhere',
}


@pytest.mark.parametrize(("line", "env"), [(line, {}) for line in BAD] + [(line, AWAY) for line in BAD if line.startswith("context")])
def test_refused_without_a_trace(team, ada, line, env):
    """One clear line and nothing written, by the daemon's word and without it."""
    before = team.trace()
    text = error_line(ada.run(*line.split(" "), env=env))
    assert BAD[line] in text, text
    assert team.trace() == before


@pytest.mark.parametrize("what", ["context save --file", "context preamble --file",
                                  "quickstart --name new --role r --module m --preamble-file"])
def test_the_size_has_a_limit_and_text_is_utf8(team, ada, tmp_path, what):
    before = team.trace()
    for data, reason in ((b"x" * (thrum.CONTEXT_MAX + 1), "the limit is"), (b"x" * (thrum.REQUEST_MAX + 1), "larger than"),
                         (b"caf\xe9", "not valid UTF-8"), (b"a\0b", "NUL")):
        (tmp_path / "f").write_bytes(data)
        assert reason in error_line(ada.run(*what.split(), str(tmp_path / "f")))
    assert team.trace() == before


def test_the_longest(ada):
    longest = "y" * thrum.CONTEXT_MAX
    ada.ok("context", "save", input=longest)
    assert ada.ok("context", "show", "--raw", "--no-preamble") == longest
    (folder(ada) / "ada.md").write_bytes(b"x" * (thrum.CONTEXT_MAX + 1))
    assert "larger than" in error_line(ada.run("context", "show"))
    assert ada.ok("status") and ada.ok("prime"), "the views show the rest"


def test_identity_is_needed_unless_the_agent_is_named(ada):
    who = {"THRUM_NAME": "ghost"}
    assert error_line(ada.run("context", "show", env=who)).startswith("failed to resolve agent identity: THRUM_NAME is 'ghost'")
    assert ada.ok("context", "show", "--agent", "x", env=who) == "No context saved for x\n"


@pytest.mark.parametrize("kind", ["file", "folder", "pipe"])
def test_links_lead_nowhere(ada, tmp_path, kind):
    """Neither client nor daemon reads or writes through a link in the folder; a FIFO blocks nobody."""
    secret = tmp_path / "secret.md"
    secret.write_text("secret")
    moved = folder(ada).with_name("kept")
    try:
        if kind == "folder":
            folder(ada).rename(moved)
            (tmp_path / "ada.md").write_text("secret")
            folder(ada).symlink_to(tmp_path)
        elif kind == "file":
            (folder(ada) / "ada.md").symlink_to(secret)
        else:
            os.mkfifo(folder(ada) / "ada.md")
        with ada.client() as client:
            if kind == "pipe":
                assert client.call("context.show", agent_name="ada")["has_context"] is False
                assert "No context" in ada.ok("context", "show", "--no-preamble")
                return
            assert "is a link" in error_line(ada.run("context", "show", "--no-preamble"))
            assert "is a link" in error_line(ada.run("context", "save", input="x"))
            assert "is a link" in error_line(ada.run("context", "clear"))
            for method, more in (("show", {}), ("save", {"content": ""}), ("clear", {})):
                with pytest.raises(thrum.ThrumError, match="is a link"):
                    client.call("context." + method, agent_name="ada", **more)
        assert secret.read_text() == "secret" and (kind == "file" or (tmp_path / "ada.md").read_text() == "secret")
    finally:
        if kind == "folder":
            folder(ada).unlink()
            moved.rename(folder(ada))
        else:
            (folder(ada) / "ada.md").unlink()


def test_the_client_gives_nothing_else(tmp_path):
    """Record N behind a NUL reads the folder of contexts and nothing beside it; W writes only where there is a .thrum."""
    top = str(tmp_path)
    assert thrum.answer_record(top, [], b"W", thrum.pack([b".thrum/context/a.md", b"1x"])).startswith(b"1this worktree is not set up")
    assert not list(tmp_path.iterdir())
    for path, text in ((".thrum/context/a.md", "yes"), (".thrum/identities/a.md", "no"), (".thrum/context/a.json", "no"), ("a.md", "no")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    data, changed_ns = thrum.loaded(thrum.answer_record(top, [], b"N", b"\0a.md")[1:])
    assert (data, changed_ns) == (b"yes", (tmp_path / ".thrum/context/a.md").stat().st_mtime_ns)
    assert thrum.answer_record(top, [], b"N", b"\0b.md") == b"0", "missing is no error"
    for name in (b"../identities/a.md", b"../../a.md", b"a.json", b"/etc/passwd", b"", b".", b"x/a.md", os.fsencode(top) + b"/a.md"):
        assert thrum.answer_record(top, [], b"N", b"\0" + name)[:1] == b"1", name
    assert thrum.answer_record(top, [], b"N", b".thrum/context/a.md")[:1] == b"1", "only what is behind a NUL, or in the command line"


# ---------------------------------------------------------------- joining

def test_quickstart_lays_out_the_files(team, tmp_path):
    """An empty context and the default preamble where they are missing; --preamble-file: default, a line, the file."""
    repo = team.ada.worktree("cleo")
    repo.join("cleo", "reviewer")
    default = thrum.default_preamble("cleo", "reviewer")
    assert listing(repo) == {"cleo.md": b"", "cleo_preamble.md": default.encode()}
    assert json.loads((repo.path / ".thrum/identities/cleo.json").read_text())["context_file"] == "context/cleo.md"
    assert repo.ok("context", "show", "--no-preamble") == "No context saved for cleo\n", "an empty one counts as none"
    repo.ok("context", "save", input="notes")
    (folder(repo) / "cleo_preamble.md").write_text("edited\n")
    repo.join("cleo", "reviewer")
    assert listing(repo) == {"cleo.md": b"notes", "cleo_preamble.md": b"edited\n"}, "nothing is overwritten"
    (tmp_path / "own.md").write_text("Ask @ada first.\n")
    repo.ok("quickstart", "--preamble-file", str(tmp_path / "own.md"))
    assert listing(repo) == {"cleo.md": b"notes", "cleo_preamble.md": f"{default}\n---\n\nAsk @ada first.\n".encode()}
    repo.ok("agent", "register", "--name", "dora", "--role", "monitor", "--module", "web")
    assert listing(repo)["dora_preamble.md"].startswith(b"## Your Role: monitor\n")


def test_a_context_that_cannot_be_written_does_not_undo_the_registration(team):
    repo = team.ada.worktree("eve")
    (repo.path / ".thrum" / "identities").mkdir(parents=True)
    (repo.path / ".thrum" / "redirect").write_text(str(team.ada.path / ".thrum"))
    (repo.path / ".thrum" / "context").write_text("in the way")
    done = repo.run("quickstart", "--name", "eve", "--role", "tester", "--module", "web", check=0,
                    command=[str(team.ada.launcher.with_name("thrum"))])
    assert "✓ Registered as @eve" in done.stdout and done.stderr.startswith("Warning: ") and done.stderr.count("\n") == 1


def test_generated_instructions_are_true():
    """Every command line in the preamble is one that the program accepts, through the launcher; no template is left over."""
    for role in (*thrum.ROLE_DUTIES, "poet", ""):
        text = thrum.default_preamble("ada", role)
        assert "@ada" in text and role in text and "{" not in text and text.count("\n") < 60
        assert (f"## Your Role: {role}\n" in text) is (role in thrum.ROLE_DUTIES)
        lines = re.findall(r"(?:^    |`)(\.thrum/bin/thrum .+?)(?:  |`|$)", text, re.M)
        assert len(lines) >= 10
        for line in lines:
            words = shlex.split(line.replace("…", "x"))[1:]
            name, rest = thrum.split_command(words, thrum.COMMANDS)
            thrum.parse_command(thrum.COMMANDS[name], rest)


# ---------------------------------------------------------------- the methods

def b64(data):
    return base64.b64encode(data).decode()


def test_the_methods(team, ada):
    """rpc.md 14.5 with the seeds' scalars: base64 unless `text`, the caller where nobody is named, any registered worktree."""
    with ada.client() as client:
        done = client.call("context.save", agent_name="ada", content=b64("nötes".encode()))
        shaped(done, {"agent_name": ("ada",), "message": ("Context saved for ada (6 bytes)",), "saved_at": str})
        assert thrum.ns_of(done["saved_at"])
        found = client.call("context.show", agent_name="ada", repo_path=str(ada.path))
        preamble = thrum.default_preamble("ada", "planner").encode()
        assert found == {"agent_name": "ada", "content": b64("nötes".encode()), "has_context": True, "has_preamble": True,
                         "preamble": b64(preamble), "preamble_size": len(preamble), "size": 6, "updated_at": found["updated_at"]}
        for more in ({"include_preamble": False}, {"no_preamble": True}):
            found = client.call("context.show", agent_name="ada", text=True, **more)
            assert (found["content"], found["has_preamble"], "preamble" in found) == ("nötes", False, False)
        assert client.call("context.show", text=True)["content"] == "nötes", "the identity of the daemon's worktree"
        assert client.call("context.show", caller_agent_id="ada", text=True)["content"] == "nötes"
        client.call("context.save", agent_name="bob", content="plain", text=True, repo_path=str(team.bob.path))
        assert listing(team.bob)["bob.md"] == b"plain" and "bob.md" not in listing(ada)
        assert team.bob.ok("context", "show", "--raw", "--no-preamble") == "plain"
        for _ in range(2):
            assert client.call("context.clear", agent_name="ada") == \
                {"agent_name": "ada", "message": "Context cleared for ada", "cleared": True}
        assert client.call("context.show", agent_name="ada", no_preamble=True) == \
            {"agent_name": "ada", "content": None, "has_context": False, "has_preamble": False}
        assert client.call("context.preamble.show", agent_name="zoe") == {"agent_name": "zoe", "content": None, "has_preamble": False}
        done = client.call("context.preamble.save", agent_name="ada", content=b64(b"own"))
        assert done["message"] == "Preamble saved for ada (3 bytes)" and done["saved_at"]
        assert client.call("context.preamble.show", agent_name="ada") == \
            {"agent_name": "ada", "content": b64(b"own"), "has_preamble": True}
        client.call("context.save", agent_name="bob", repo_path=str(team.bob.path))
        assert client.call("context.show", agent_name="bob", repo_path=str(team.bob.path))["has_context"] is False
    assert ada.ok("context", "preamble") == "own\n"


def test_what_the_methods_refuse(team, ada, tmp_path):
    """A path that is no worktree of this repository, a name that is a path, content that is not base64: nothing is written."""
    before = team.trace()
    unset = team.ada.worktree("unset")
    other = tmp_path / "other"
    other.mkdir()
    subprocess.run(["git", "init", "-q", str(other)], check=True, env=CLEAN)
    with ada.client() as client:
        for path in (str(other), str(tmp_path), "/", ".", "repo", str(ada.path / ".thrum"), str(ada.path / ".."), "\x1b"):
            with pytest.raises(thrum.InvalidParams, match="not a worktree of this repository"):
                client.call("context.save", agent_name="ada", content="", repo_path=path)
            with pytest.raises(thrum.InvalidParams, match="not a worktree of this repository"):
                client.call("worktree.status", repo_path=path)
        with pytest.raises(thrum.ThrumError, match="is not set up; run 'thrum setup'"):
            client.call("context.save", agent_name="ada", content="", repo_path=str(unset.path))
        assert not (unset.path / ".thrum").exists(), "it would hide the installation of the main worktree"
        for name in ("../x", "a/b", "..", "x" * 200, "a\nb"):
            for method in ("save", "show", "clear", "preamble.show", "preamble.save"):
                with pytest.raises(thrum.InvalidParams, match="invalid agent name"):
                    client.call("context." + method, agent_name=name)
        for content in ("!", "abc", "bm90\nZXM=", "ä", b64(b"\xff"), b64(b"a\0"), b64(b"x" * (thrum.CONTEXT_MAX + 1))):
            for method in ("save", "preamble.save"):
                with pytest.raises(thrum.InvalidParams):
                    client.call("context." + method, agent_name="ada", content=content)
    unset.git("worktree", "remove", "--force", str(unset.path))
    assert team.trace() == before


def test_writers_do_not_run_into_each_other(ada):
    """Programs and commands that save at once leave one of their texts, whole, and nothing else."""
    texts = [letter * 50_000 for letter in "abcdefghz"]
    errors = []

    def save(text):
        try:
            with ada.client() as client:
                for _ in range(10):
                    client.call("context.save", agent_name="ada", content=text, text=True)
        except Exception as error:
            errors.append(error)

    before = set(listing(ada)) | {"ada.md"}
    threads = [threading.Thread(target=save, args=(text,)) for text in texts[:-1]]
    for thread in threads:
        thread.start()
    ada.ok("context", "save", input=texts[-1])
    seen = [ada.ok("context", "show", "--raw", "--no-preamble") for _ in range(3)]
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert set(seen) | {listing(ada)["ada.md"].decode()} <= set(texts)
    assert set(listing(ada)) == before


def test_reading_what_comes_slowly(ada):
    """`context save` waits for the end of stdin, as it must for a command in a pipe."""
    process = start(ada, "context", "save", stdin=subprocess.PIPE)
    process.stdin.write(b"first ")
    process.stdin.flush()
    process.stdin.write(b"second")
    process.stdin.close()
    process.stdin = None
    assert finish(process)[:2] == (0, "Context saved for ada (12 bytes)\n")
    assert Path(folder(ada) / "ada.md").read_bytes() == b"first second"


def test_the_launcher_keeps_to_the_same_limit(tmp_path):
    """It carries the number written out: it must not import the constant's file."""
    folder = tmp_path / ".thrum" / "context"
    folder.mkdir(parents=True)
    for size, problem in ((thrum.CONTEXT_MAX, False), (thrum.CONTEXT_MAX + 1, True)):
        (folder / "x.md").write_bytes(b"a" * size)
        found = thrum.look(os.path.realpath(tmp_path), "x.md")
        assert (bool(found[0]), len(found[1] or b"")) == (problem, 0 if problem else size)
