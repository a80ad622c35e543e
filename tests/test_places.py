"""Section 5: where things lie, redirects, git's directories, the configuration, and files that are replaced whole."""

import json
import os
import subprocess
import threading

import pytest

import thrum


def git(path, *args):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    done = subprocess.run(["git", "-c", "user.name=T", "-c", "user.email=t@localhost", *args], cwd=path, env=clean, check=True,
                          capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def top(tmp_path):
    """A real path with a `.git` and a `.thrum` directory."""
    path = os.path.realpath(tmp_path) + "/main"
    os.makedirs(path + "/.thrum/identities")
    os.makedirs(path + "/.git")
    return path


# ---- locate and find_places

def test_locate_goes_up_to_the_nearest_worktree(top):
    os.makedirs(top + "/a/b/.thrum")
    os.makedirs(top + "/a/b/c")
    os.makedirs(top + "/x/y")
    for start, expected in ((top, top), (top + "/x/y", top), (top + "/a", top), (top + "/a/b/c", top + "/a/b")):
        assert thrum.locate(start) == (expected, expected + "/.thrum")


def test_locate_stops_at_git_without_thrum(top):
    os.makedirs(top + "/sub/.git")
    os.makedirs(top + "/sub/x")
    assert thrum.locate(top + "/sub/x") == (top + "/sub", "")
    os.makedirs(top + "/file/x")
    with open(top + "/file/.git", "w"):
        pass
    assert thrum.locate(top + "/file/x") == (top + "/file", "")


def test_locate_outside_of_everything():
    assert thrum.locate("/proc/self") == ("/proc/self", "")


@pytest.mark.parametrize("content", ["{target}", "{target}\n", "  {target}\t\r\n"])
def test_a_redirect_leads_to_the_other_thrum(top, content):
    other = os.path.dirname(top) + "/other ü"
    os.makedirs(other + "/.thrum/identities")
    os.makedirs(other + "/sub")
    os.makedirs(other + "/.git")
    with open(other + "/.thrum/redirect", "w") as file:
        file.write(content.format(target=top + "/.thrum"))
    places = thrum.find_places(other + "/sub")
    assert (places.top, places.thrum, places.root) == (other, top + "/.thrum", top)
    assert (places.identities, places.var) == (other + "/.thrum/identities", top + "/.thrum/var")


REDIRECTS = {       # what stands in the redirect: a part of the message
    "": "thrum", "\n": "thrum", "relative/.thrum": "not there", "../main/.thrum": "not there", "{top}/missing/.thrum": "not there",
    "{top}/file": "not there", "{chain}": "redirected itself", "{self}": "redirected itself", "\0": "not there",
}


@pytest.mark.parametrize("content", REDIRECTS, ids=repr)
def test_broken_redirects_are_refused(top, content):
    """A redirect that is empty, relative, missing, not a directory, or redirected again (spec, section 3)."""
    here, chain = os.path.dirname(top) + "/here", os.path.dirname(top) + "/chain/.thrum"
    for path in (here + "/.thrum", here + "/.git", chain):
        os.makedirs(path)
    with open(top + "/file", "w"), open(chain + "/redirect", "w") as file:
        file.write(top + "/.thrum")
    with open(here + "/.thrum/redirect", "w") as file:
        file.write(content.format(top=top, chain=chain, self=here + "/.thrum"))
    with pytest.raises(thrum.NotInitialized, match=REDIRECTS[content]):
        thrum.find_places(here)


def test_not_initialized_says_what_to_do(tmp_path):
    plain = os.path.realpath(tmp_path) + "/plain"
    os.makedirs(plain)
    with pytest.raises(thrum.NotInitialized, match="git init"):
        thrum.find_places(plain)
    os.makedirs(plain + "/.git")
    with pytest.raises(thrum.NotInitialized, match="thrum init"):
        thrum.find_places(plain)


def test_a_link_to_a_subdirectory_is_followed(top):
    os.makedirs(top + "/sub")
    os.symlink(top + "/sub", os.path.dirname(top) + "/link")
    assert thrum.find_places(os.path.dirname(top) + "/link").top == top


def test_places_are_absolute(top):
    places = thrum.find_places(top)
    for name in ("local", "root", "var", "journal", "database", "log", "bad_lines", "copy", "sync", "config", "identities"):
        assert os.path.isabs(getattr(places, name)), name
    assert places.sync == top + "/.git/thrum-sync/a-sync"
    assert places.journal == top + "/.thrum/var/journal"


# ---- git's directories

def test_git_common_dir_is_what_git_says(tmp_path):
    """In a main worktree, linked ones (also with odd names, moved and relative), a bare repository's, a submodule, a subdirectory."""
    base = os.path.realpath(tmp_path)
    main = base + "/main repo ü"
    os.makedirs(main + "/sub")
    git(main, "init", "-q", "-b", "main")
    git(main, "commit", "-q", "--allow-empty", "-m", "first")
    git(main, "worktree", "add", "-q", "-b", "one", base + "/linked one")
    git(main, "worktree", "add", "-q", "-b", "two", main + "/inside")
    git(base, "clone", "-q", "--bare", main, base + "/bare.git")
    git(base + "/bare.git", "worktree", "add", "-q", "-b", "three", base + "/of bare")
    git(base, "init", "-q", "--separate-git-dir", base + "/elsewhere", base + "/separate")
    git(main, "worktree", "move", "inside", base + "/moved")
    with open(base + "/linked one/.git") as file:
        absolute = file.read()[len("gitdir: "):].strip()
    for place in (main, base + "/linked one", base + "/moved", base + "/of bare", base + "/separate"):
        assert thrum.git_common_dir(place) == os.path.normpath(os.path.join(place, git(place, "rev-parse", "--git-common-dir"))), place
    with open(base + "/linked one/.git", "w") as file:
        file.write("gitdir: " + os.path.relpath(absolute, base + "/linked one") + "\n")
    assert thrum.git_common_dir(base + "/linked one") == main + "/.git"
    assert thrum.git_common_dir(main + "/sub") == ""


def test_a_linked_worktree_without_thrum_uses_the_main_one(tmp_path):
    base = os.path.realpath(tmp_path)
    os.makedirs(base + "/main")
    git(base + "/main", "init", "-q", "-b", "main")
    git(base + "/main", "commit", "-q", "--allow-empty", "-m", "first")
    git(base + "/main", "worktree", "add", "-q", "-b", "one", base + "/one")
    with pytest.raises(thrum.NotInitialized):
        thrum.find_places(base + "/one")
    os.makedirs(base + "/main/.thrum")
    places = thrum.find_places(base + "/one")
    assert (places.top, places.thrum, places.common) == (base + "/one", base + "/main/.thrum", base + "/main/.git")
    assert thrum.find_places(base + "/main").sync == places.sync


@pytest.mark.parametrize("content", ["", "x", "gitdir:", "gitdir: /nowhere/at/all", "\0", "gitdir: \udc80"])
def test_an_odd_git_file_is_no_crash(tmp_path, content):
    with open(tmp_path / ".git", "w", errors="surrogateescape") as file:
        file.write(content)
    assert isinstance(thrum.git_common_dir(str(tmp_path)), str)


# ---- files that are replaced

def test_atomic_write_replaces_content_and_mode(tmp_path):
    path = str(tmp_path / "file")
    for data, mode in ((b"one", 0o600), (b"", 0o644), (b"x" * 1_000_000, 0o755)):
        thrum.atomic_write(path, data, mode)
        with open(path, "rb") as file:
            assert file.read() == data
        assert os.stat(path).st_mode & 0o7777 == mode
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("failing", ["write_all", "durable_sync", "os.rename"])
def test_a_failed_atomic_write_leaves_the_old_file_alone(tmp_path, monkeypatch, failing):
    path = str(tmp_path / "file")
    thrum.atomic_write(path, b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")
    if failing.startswith("os."):
        monkeypatch.setattr(os, failing[3:], fail)
    else:
        monkeypatch.setattr(thrum, failing, fail)
    with pytest.raises(OSError, match="No space"):
        thrum.atomic_write(path, b"new")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["file"]
    with open(path, "rb") as file:
        assert file.read() == b"old"


def test_readers_see_old_or_new_never_a_mixture(tmp_path):
    path, wrong, stop = str(tmp_path / "file"), [], threading.Event()
    thrum.atomic_write(path, b"a" * 50_000)

    def read():
        while not stop.is_set():
            with open(path, "rb") as file:
                data = file.read()
            if len(data) != 50_000 or len(set(data)) != 1:
                wrong.append(data[:20])
    reader = threading.Thread(target=read)
    reader.start()
    for letter in b"bcdefghijklmnopqrstuvwxyz":
        thrum.atomic_write(path, bytes([letter]) * 50_000)
    stop.set()
    reader.join()
    assert not wrong


def test_write_all_goes_on_after_a_short_write(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data)[:3]))
    descriptor = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    thrum.write_all(descriptor, b"0123456789")
    os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b"0123456789"


# ---- configuration

def write_config(path, content):
    with open(f"{path}/config.json", "wb") as file:
        file.write(content if isinstance(content, bytes) else json.dumps(content).encode())


def read_config(path):
    with open(f"{path}/config.json") as file:
        return json.load(file)


@pytest.mark.parametrize("before, changes, after", [
    ({}, {"daemon.local_only": True}, {"daemon": {"local_only": True}}),
    ({"daemon": {"local_only": True, "mine": 1}}, {"daemon.local_only": False}, {"daemon": {"local_only": False, "mine": 1}}),
    ({"telegram": {"token": "t", "allow_from": [1]}, "x": [1, {"y": None}]}, {"daemon.ws_port": "auto"},
     {"telegram": {"token": "t", "allow_from": [1]}, "x": [1, {"y": None}], "daemon": {"ws_port": "auto"}}),
    ({"daemon": {"local_only": True, "autostart": False}}, {"daemon.autostart": None}, {"daemon": {"local_only": True}}),
    ({"runtime": {"primary": "claude"}}, {"runtime.primary": "codex"}, {"runtime": {"primary": "codex"}}),
    ({"a": 1}, {"b": None}, {"a": 1}),
    ({}, {"a.b.c": "ü"}, {"a": {"b": {"c": "ü"}}}),
    ({"local_only": True}, {"daemon.sync_interval": 30}, {"local_only": True, "daemon": {"sync_interval": 30}}),
], ids=str)
def test_settings_are_changed_and_all_others_kept(tmp_path, before, changes, after):
    write_config(tmp_path, before)
    thrum.save_config(str(tmp_path), changes)
    assert read_config(tmp_path) == thrum.load_config(str(tmp_path)) == after
    assert os.stat(tmp_path / "config.json").st_mode & 0o777 == 0o600
    text = (tmp_path / "config.json").read_text()
    assert text.endswith("}\n") and json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False) + "\n" == text


def test_no_configuration_is_an_empty_one(tmp_path):
    assert thrum.load_config(str(tmp_path)) == {}
    thrum.save_config(str(tmp_path), {"daemon.local_only": True})
    assert read_config(tmp_path) == {"daemon": {"local_only": True}}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"\xff", b'{"daemon":{"local_only":"yes"}}', b'{"daemon":{"local_only":1}}',
                                     b'{"daemon":{"sync_interval":"60"}}', b'{"daemon":{"sync_interval":true}}',
                                     b'{"daemon":{"ws_port":9999}}',
                                     b'{"daemon":{"autostart":0}}', b'{"daemon":5}', b'{"daemon":[]}', b'{"daemon":NaN}'])
def test_a_wrong_configuration_is_named_and_not_overwritten(tmp_path, content):
    write_config(tmp_path, content)
    for act in (lambda: thrum.load_config(str(tmp_path)), lambda: thrum.save_config(str(tmp_path), {"wake.max_hops": 5})):
        with pytest.raises(thrum.ThrumError, match="config.json"):
            act()
    assert (tmp_path / "config.json").read_bytes() == content


def test_get_setting():
    config = {"daemon": {"local_only": False, "none": None}, "flat": 5}
    for setting, value in (("daemon.local_only", False), ("daemon.other", "default"), ("daemon.none", "default"), ("flat", 5),
                           ("flat.deeper", "default"), ("x.y.z", "default"), ("daemon", config["daemon"])):
        assert thrum.get_setting(config, setting, "default") == value
