"""The web page: what thrum.py carries is what lies in web/, keeps to its own policy, and is served as it should be."""

import http.client
import importlib.util
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import thrum
from conftest import ROOT, THRUM, Repo

WEB = ROOT / "web"
PAGE_BYTES = 200_000            # of all files together, before compression
EMBED = [sys.executable, str(WEB / "embed.py")]

spec = importlib.util.spec_from_file_location("embed", WEB / "embed.py")
embed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(embed)
PAGES = thrum.pages()


class Elements(HTMLParser):
    """The elements of a page: (tag, attributes), and the text within scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.found, self.inline, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br", "input", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style") and data.strip():
            self.inline.append(data)


HTML = {name: Elements(path.read_text(encoding="utf-8")) for name, path in ((path.name, path) for path in sorted(WEB.glob("*.html")))}


# ---- what is carried

def test_thrum_carries_the_page_as_it_is():
    done = subprocess.run([*EMBED, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_file_is_carried_whole():
    sources = embed.sources()
    assert {"index.html", "app.css", "app.js"} <= set(sources)
    assert {path: page for path, (_, page, _) in PAGES.items()} == {
        "/": sources["index.html"], **{"/" + name: data for name, data in sources.items()}}
    strangers = [path.name for path in WEB.iterdir() if path.name not in sources and path.name not in ("embed.py", "__pycache__")]
    assert not strangers, "files in web/ that embed.py has no content type for"


def test_a_stale_page_is_noticed_and_written(tmp_path):
    """In a copy: the check names the command, the command mends it, a second run leaves the file alone."""
    shutil.copytree(WEB, tmp_path / "web", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(THRUM, tmp_path / "thrum.py")
    (tmp_path / "web" / "app.js").write_text("// '''three\"\"\" \\ and more\n", encoding="utf-8")

    def run(*more):
        return subprocess.run([sys.executable, str(tmp_path / "web" / "embed.py"), *more], capture_output=True, text=True)
    stale = run("--check")
    assert (stale.returncode, stale.stdout) == (1, "") and "python3 web/embed.py" in stale.stderr
    assert run().returncode == 0
    assert run("--check").returncode == 0
    written = (tmp_path / "thrum.py").read_text(encoding="utf-8")
    assert embed.embedded(written)["app.js"][2] == (tmp_path / "web" / "app.js").read_bytes()
    # What is not the table is as it was, and of the table only the rows of the changed file differ.
    assert embed.TABLE.sub("", written) == embed.TABLE.sub("", THRUM.read_text(encoding="utf-8"))
    assert {name for name, row in embed.embedded(written).items() if row != embed.embedded(THRUM.read_text(encoding="utf-8"))[name]} \
        == {"app.js"}
    before = (tmp_path / "thrum.py").stat().st_mtime_ns
    assert run().returncode == 0
    assert (tmp_path / "thrum.py").stat().st_mtime_ns == before
    # A merge that took lines of both sides is written anew.
    (tmp_path / "thrum.py").write_text(written.replace('"app.css": (', '"app.css": (<<<<<<< ours', 1), encoding="utf-8")
    assert run("--check").returncode == 1
    assert run().returncode == 0
    assert (tmp_path / "thrum.py").read_text(encoding="utf-8") == written


def test_the_page_is_small_utf8_with_tags_of_its_own():
    files = {path: row for path, row in PAGES.items() if path != "/"}
    assert sum(len(page) for _, page, _ in files.values()) < PAGE_BYTES
    for path, (kind, page, tag) in files.items():
        assert kind.endswith("; charset=utf-8"), path
        assert page.decode() and b"\r" not in page and b"\0" not in page, path
        assert re.fullmatch(r'"[0-9a-f]{16}"', tag), path
    assert len({tag for _, _, tag in files.values()}) == len(files)
    assert PAGES["/"] == PAGES["/index.html"]


# ---- the policy of the page

@pytest.mark.parametrize("name", HTML)
def test_nothing_is_inline(name):
    page = HTML[name]
    assert page.found and not page.open, "an element is not closed"
    assert not page.inline
    for tag, attributes in page.found:
        assert tag not in ("style", "base", "iframe", "object", "embed"), tag
        for attribute, value in attributes.items():
            assert attribute != "style" and not attribute.startswith("on"), (tag, attribute)
            assert not (value or "").strip().lower().startswith(("javascript:", "data:")), (tag, attribute)


@pytest.mark.parametrize("name", HTML)
def test_all_references_lead_to_what_is_carried(name):
    ids = [attributes["id"] for _, attributes in HTML[name].found if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = [attributes[attribute] for _, attributes in HTML[name].found for attribute in ("src", "href") if attribute in attributes]
    assert references
    for reference in references:
        assert reference in PAGES or reference[0] == "#" and reference[1:] in ids, reference
    for _, attributes in HTML[name].found:
        for attribute in ("aria-labelledby", "aria-describedby", "aria-controls", "for"):
            assert set(attributes.get(attribute, "").split()) <= set(ids), attributes


def test_the_scripts_and_styles_need_nothing_else():
    ids = {attributes["id"] for _, attributes in HTML["index.html"].found if "id" in attributes}
    for path, (kind, page, _) in PAGES.items():
        text = page.decode()
        if kind.startswith("text/javascript"):
            found = re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|new Function|DOMParser)\b", text)
            assert not found, f"{path}: {found}"
            assert {"/" + name.lstrip("./") for name in re.findall(r"""from ["']([^"']+)["']""", text)} <= set(PAGES)
            assert set(re.findall(r"""byId\("([^"]+)"\)""", text)) <= ids
        if kind.startswith("text/css"):
            assert "@import" not in text and "url(" not in text, path
            assert text.count("{") == text.count("}"), path
        if not path.endswith(".svg"):
            assert not re.search(r"(https?|wss?):(?!//\$\{location\.host\})//", text), f"{path} reaches beyond this machine"


# ---- over the daemon

@pytest.fixture(scope="module")
def port(tmp_path_factory):
    repo = Repo(tmp_path_factory.mktemp("pages"))
    repo.git("init", "-q", "-b", "main")
    repo.ok("init", env={"THRUM_WS_PORT": "auto"})
    yield int((repo.var / "ws.port").read_text())
    repo.close()


def ask(port, method, path, headers=None):
    """(status, headers, body) of one request; the body is read to the end of the connection, so a stray one is seen."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, headers={"Connection": "close", **(headers or {})})
        stream = connection.sock.makefile("rb")
        head, _, body = stream.read().partition(b"\r\n\r\n")
        stream.close()
        status, *lines = head.decode().split("\r\n")
        return int(status.split()[1]), {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines)}, body
    finally:
        connection.close()


@pytest.mark.parametrize("path", PAGES)
def test_a_file_is_served_with_its_type_policy_and_tag(port, path):
    kind, page, tag = PAGES[path]
    status, headers, body = ask(port, "GET", path)
    assert (status, body, headers["content-type"], headers["etag"]) == (200, page, kind, tag)
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and "unsafe" not in headers["content-security-policy"]
    assert policy["script-src"] == policy["style-src"] == "'self'"
    assert policy["connect-src"] == f"'self' ws://127.0.0.1:{port}"     # not every browser takes 'self' for sockets, too
    assert headers["x-content-type-options"] == "nosniff"

    for condition in (tag, f'W/{tag}, "other"'):
        status, headers, body = ask(port, "GET", path, {"If-None-Match": condition})
        assert (status, headers["etag"], body) == (304, tag, b"")
    assert ask(port, "GET", path, {"If-None-Match": '"other"'})[0] == 200

    status, headers, body = ask(port, "HEAD", path)
    assert (status, headers["etag"], int(headers["content-length"]), body) == (200, tag, len(page), b"")

    for method in ("POST", "PUT", "DELETE"):
        status, headers, body = ask(port, method, path)
        assert status == 405 and headers["allow"] == "GET, HEAD" and page not in body


def test_a_deep_link_is_the_page_and_a_missing_asset_is_none(port):
    for path in ("/inbox", "/thread/thr_01", "/a/b/c?x=1"):
        status, headers, body = ask(port, "GET", path)
        assert (status, body, headers["etag"]) == (200, PAGES["/"][1], PAGES["/"][2])
    for path in ("/assets/x", "/assets/x.js"):
        status, _, body = ask(port, "GET", path)
        assert status == 404 and PAGES["/"][1] not in body
