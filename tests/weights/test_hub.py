"""Resolving model names to folders, and one-line errors with a remedy."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from qwen2vl.errors import CheckpointError
from qwen2vl.weights import resolve_model
from tests.folders import write_tiny

REPO = "Qwen/Qwen2-VL-2B-Instruct"


def check_refused(model: str | Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=text) as caught:
        resolve_model(model)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace the hub client: records arguments, returns a folder or raises."""
    client = SimpleNamespace(calls=[], outcome="somewhere")

    def download(repo_id: str, **options: Any) -> str:
        client.calls.append((repo_id, options))
        if isinstance(client.outcome, Exception):
            raise client.outcome
        return client.outcome

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return client


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the real client use an empty cache, offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def http_error(kind: type[Exception]) -> Exception:
    response = SimpleNamespace(headers={}, request=None)
    return kind("a text\nof many lines", response=response)


def test_folder_is_returned(tmp_path: Path, hub: SimpleNamespace) -> None:
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path
    assert not hub.calls


def test_folder_takes_precedence_over_a_repo_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: SimpleNamespace
) -> None:
    (tmp_path / REPO).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model(REPO) == Path(REPO)
    assert not hub.calls


def test_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model("~/model") == tmp_path / "model"
    (tmp_path / "~odd").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("./~odd") == Path("~odd")


def test_nano_is_the_packaged_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
    (tmp_path / "elsewhere" / "nano").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    check_refused(
        "nano", "holds no nano weights; install the released package, train them with `qwen2vl"
    )
    write_tiny(tmp_path / "nano")
    assert resolve_model("nano") == tmp_path / "nano"
    assert resolve_model("./nano") == Path("nano")


@pytest.mark.parametrize(
    "model", ["photo", "./no/such", "/no/such/folder", "~no-such-person/model", "a b/c", "x" * 5000]
)
def test_unknown_names_are_refused(model: str, hub: SimpleNamespace) -> None:
    check_refused(
        model, r"(no such folder|File name too long); give a folder, a repo id such as Qwen/Q"
    )
    assert not hub.calls


def test_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    check_refused(tmp_path / "model.safetensors", "is a file; give the folder it lies in")
    (tmp_path / "model.pt").touch()
    check_refused(tmp_path / "model.pt", "is a pickle, which can run code; convert it offline")


def test_unreadable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Path) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("os.listdir", refused)
    check_refused(tmp_path, "cannot be opened: Permission denied; give a folder")


def test_only_needed_files_are_downloaded(tmp_path: Path, hub: SimpleNamespace) -> None:
    hub.outcome = str(tmp_path)
    bar = type("Bar", (), {})
    assert resolve_model(REPO, tqdm_class=bar) == tmp_path
    ((repo_id, options),) = hub.calls
    assert repo_id == REPO
    assert options["tqdm_class"] is bar
    files = ["config.json", "merges.txt", "model.safetensors", "a.bin", "README.md", "x/a.json"]
    downloaded = huggingface_hub.utils.filter_repo_objects(
        files,
        allow_patterns=options["allow_patterns"],
        ignore_patterns=options["ignore_patterns"],
    )
    assert list(downloaded) == ["config.json", "merges.txt", "model.safetensors"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (http_error(errors.RepositoryNotFoundError), "no such repository on the hub .*auth login"),
        (errors.HFValidationError("bad"), "no such repository on the hub"),
        (http_error(errors.GatedRepoError), f"accept its terms on https://huggingface.co/{REPO}"),
        (http_error(errors.HfHubHTTPError), r"cannot be reached \(HfHubHTTPError\)"),
        (ConnectionError(), rf"cannot be reached \(ConnectionError\).*`hf download {REPO}`"),
        (RuntimeError("a bug"), r"cannot be reached \(RuntimeError\)"),
        (OSError(errno.ENOSPC, "x"), "cannot be written to the cache .*: No space left on device"),
        (PermissionError(errno.EACCES, "x"), "cannot be written to the cache .*set HF_HOME"),
    ],
)
def test_download_errors_are_explained(hub: SimpleNamespace, error: Exception, text: str) -> None:
    hub.outcome = error
    check_refused(REPO, text)


def test_offline_without_cache_is_refused(empty_cache: Path) -> None:
    check_refused(
        REPO, rf"not complete in the cache {empty_cache}, and HF_HUB_OFFLINE is set; .*download"
    )


def test_offline_with_cache(empty_cache: Path) -> None:
    commit = "0" * 40
    repository = empty_cache / f"models--{REPO.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.parent.mkdir()
    write_tiny(snapshot)
    assert resolve_model(REPO) == snapshot
