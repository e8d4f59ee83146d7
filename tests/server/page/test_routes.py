"""The files of the page: headers, caching, what is not served, and what is in the package."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path
from shutil import ignore_patterns

import pytest
from starlette.testclient import TestClient

from qwen2vl.server.app import create_app
from qwen2vl.server.page.routes import PAGE_FILES, PAGE_PATHS, load_page_files
from tests.server.conftest import StateMaker

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "qwen2vl" / "server" / "page"
URL = "http://127.0.0.1:8000"
MAX_BYTES = 400_000
MAX_LINES = 250
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def own_files() -> list[Path]:
    """List what was written for the page, without vendored libraries and pictures."""
    return [FOLDER / name for name in ("index.html", *PAGE_FILES) if is_text(name)]


def is_text(name: str) -> bool:
    return not name.startswith("vendor/") and not name.endswith(".png")


# Serving ------------------------------------------------------------------------------------------


def test_every_file_is_served_with_its_headers(app_client: TestClient) -> None:
    types = {"css": "text/css", "js": "text/javascript", "mjs": "text/javascript"}
    for path in sorted(PAGE_PATHS):
        response = app_client.get(path)
        assert response.status_code == 200, path
        headers = response.headers
        assert headers["content-security-policy"].startswith(POLICY)
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "camera=(self)" in headers["permissions-policy"]
        expected = types.get(path.rpartition(".")[2])
        assert expected is None or headers["content-type"].startswith(expected)
    assert app_client.get("/").headers["content-type"].startswith("text/html")


def test_a_known_file_is_not_sent_again(app_client: TestClient) -> None:
    first = app_client.get("/page/style.css")
    etag = first.headers["etag"]
    for known in (etag, f'"other", W/{etag}'):
        again = app_client.get("/page/style.css", headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == etag
    changed = app_client.get("/page/style.css", headers={"If-None-Match": '"other"'})
    assert (changed.status_code, changed.content) == (200, first.content)


@pytest.mark.parametrize(
    "path",
    [
        *("/page", "/page/", "/page/js", "/page/js/", "/page/js/none.js", "/page/index.html"),
        *("/page/routes.py", "/page/__init__.py", "/page/vendor/MANIFEST.json", "/index.html"),
        *("/page/../config.py", "/page/js/../../config.py", "/page/%2e%2e/config.py"),
        *("/page/..%2f..%2f..%2fetc/passwd", "/page//etc/passwd", "/page/js/main.js%00.css"),
        *("/page/style.css/", "/page/Style.css", f"{URL}//page/style.css"),
    ],
)
def test_nothing_else_is_served(app_client: TestClient, path: str) -> None:
    response = app_client.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_files_are_only_read(app_client: TestClient, method: str) -> None:
    assert app_client.request(method, "/page/style.css").status_code == 405
    assert app_client.request(method, "/").status_code == 405


def test_the_page_needs_no_key_and_the_api_does(make_state: StateMaker) -> None:
    client = TestClient(create_app(make_state(api_keys=("key",))), base_url=URL)
    assert {client.get(path).status_code for path in PAGE_PATHS} == {200}
    for path in ("/v1/models", "/page/none.js", "/page/", "/page/js/../../config.py"):
        assert client.get(path).status_code == 401
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    assert client.post("/v1/chat/completions", json=body).status_code == 401


def test_no_page(make_state: StateMaker) -> None:
    client = TestClient(create_app(make_state(page=False)), base_url=URL)
    assert {client.get(path).status_code for path in PAGE_PATHS} == {404}
    locked = make_state(page=False, api_keys=("key",))
    client = TestClient(create_app(locked), base_url=URL)
    assert {client.get(path).status_code for path in PAGE_PATHS} == {401}


@pytest.mark.parametrize(
    ("host", "bound", "allowed"),
    [
        ("127.0.0.1:8000", "127.0.0.1", ()),
        ("localhost:8000", "127.0.0.1", ()),
        ("localhost", "127.0.0.1", ()),
        ("[::1]:8000", "::1", ()),
        ("LOCALHOST:8000", "127.0.0.1", ()),
        ("gpu.example:8000", "0.0.0.0", ("gpu.example",)),
        ("gpu.example", "0.0.0.0", ("gpu.example",)),
        ("10.1.2.3:8000", "10.1.2.3", ()),
    ],
)
def test_requests_of_the_page_are_accepted_under_every_host_and_no_others(
    make_state: StateMaker, host: str, bound: str, allowed: tuple[str, ...]
) -> None:
    state = make_state(host=bound, allowed_hosts=allowed)
    client = TestClient(create_app(state), base_url=URL, headers={"Host": host})

    def status(origin: str) -> int:
        body = {"prompt": "a"}
        return client.post("/tokenize", json=body, headers={"Origin": origin}).status_code

    assert status(f"http://{host.lower()}") == 200
    assert status(f"https://{host.lower()}") == 200  # of a proxy with TLS
    for foreign in (
        *("http://evil.example", f"http://evil.example:{host}", "null", ""),
        *(f"http://{host.lower()}.evil.example", f"http://{host.lower()}@evil.example"),
        *("http://127.0.0.1:9999", "file://", "http://localhost:9999"),
    ):
        assert status(foreign) == 403, foreign


# Contents -----------------------------------------------------------------------------------------


def test_the_page_is_small() -> None:
    assert sum(len(file.body) for file in load_page_files().values()) <= MAX_BYTES


def test_scripts_are_short() -> None:
    for path in (FOLDER / "js").rglob("*.js"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES, path.name


def test_every_file_of_the_folder_is_listed() -> None:
    listed = {FOLDER / name for name in PAGE_FILES} | {FOLDER / "index.html"}
    served = {".js", ".mjs", ".css", ".svg", ".png", ".html"}
    present = {path for path in FOLDER.rglob("*") if path.suffix in served}
    assert present == listed


def test_no_file_names_another_host() -> None:
    for path in own_files():
        urls = set(re.findall(r"\bhttps?://[^\s\"'`)]+", path.read_text(encoding="utf-8")))
        assert urls <= {"http://www.w3.org/2000/svg"}, path.name  # a namespace, not an address


def test_nothing_is_inline() -> None:
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"\sstyle=|\son\w+=|javascript:|<style|<script(?![^>]*\ssrc=)", html)
    for path in own_files():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\beval\(|new Function|innerHTML|outerHTML|document\.write", text)


def test_every_script_that_is_imported_is_listed() -> None:
    for path in (FOLDER / "js").rglob("*.js"):
        for name in re.findall(r'from "(\.[^"]+)"', path.read_text(encoding="utf-8")):
            target = (path.parent / name).resolve().relative_to(FOLDER)
            assert str(target) in PAGE_FILES


def test_every_icon_and_element_exists() -> None:
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for path in (FOLDER / "js").rglob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r'byId\("([^"]+)"\)', text)) <= set(ids), path.name
        icons = re.findall(r'\bicon(?:Button)?\(\s*"(\w+)"', text)
        assert {f"icon-{name}" for name in icons} <= set(ids), path.name


# Vendored libraries -------------------------------------------------------------------------------


def manifest() -> list[dict[str, str]]:
    return json.loads((FOLDER / "vendor" / "MANIFEST.json").read_text(encoding="utf-8"))["files"]


def test_vendored_libraries_are_unmodified() -> None:
    for entry in manifest():
        body = (FOLDER / "vendor" / entry["file"]).read_bytes()
        assert sha256(body).hexdigest() == entry["sha256"], entry["file"]
        assert (FOLDER / "vendor" / entry["license_file"]).stat().st_size > 500
        assert entry["license"] in ("MIT", "Apache-2.0")
        assert entry["version"] in entry["origin"]


def test_every_vendored_file_is_in_the_manifest() -> None:
    named = {entry[key] for entry in manifest() for key in ("file", "license_file")}
    assert {path.name for path in (FOLDER / "vendor").iterdir()} == named | {"MANIFEST.json"}


def test_a_built_package_has_all_files(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build writes into its folder
    shutil.copytree(ROOT / "qwen2vl", source / "qwen2vl", ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "import setuptools.build_meta as build, sys; build.build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(built).namelist())
    expected = {f"qwen2vl/server/page/{name}" for name in ("index.html", *PAGE_FILES)}
    expected |= {f"qwen2vl/server/page/vendor/{one['license_file']}" for one in manifest()}
    assert expected | {"qwen2vl/server/page/vendor/MANIFEST.json"} <= names
