"""Find a Chromium for the browser tests, or fetch one that needs neither root nor a package manager
of the system.

    python tests/chromium.py    says which one is used; fetches one with npm if there is none

What is fetched is the headless build of the npm package @sparticuz/chromium (x86-64 Linux), in one
version, checked by its hash. It brings its libraries and a font, so that a bare machine will do.
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

from jumprelu.files import cache_root

NAMES = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "chrome")
PACKAGE = "@sparticuz/chromium@147.0.0"
SHA512 = "4ZKeAQQa8up2mt675qSitztLdbQrlf8BKdC5naeap+5Mv1OV1OlJdPoU+EJC/p5sQUJUQmN4r+q5+EhaaOUHpQ=="
FONTS = (
    '<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig><dir '
    'prefix="relative">fonts</dir>'
    "<cachedir>{}</cachedir></fontconfig>"
)
UNPACK = (
    "const fs = require('fs'); const [from, to] = process.argv.slice(1); "
    "fs.writeFileSync(to, require('zlib').brotliDecompressSync(fs.readFileSync(from)))"
)


class Chromium(NamedTuple):
    """An executable, and what it needs in its environment."""

    path: str
    env: dict[str, str]


def find() -> Chromium | None:
    """`$CHROMIUM`, one that is installed, or one that was fetched; None without any."""
    for path in (os.environ.get("CHROMIUM"), *map(shutil.which, NAMES)):
        if path:
            return Chromium(path, {})
    folder = cache_root() / "chromium"
    env = {"LD_LIBRARY_PATH": str(folder / "lib"), "FONTCONFIG_PATH": str(folder)}
    return Chromium(str(folder / "chromium"), env) if (folder / "chromium").exists() else None


def fetch() -> None:
    """Put Chromium into the cache. Raises RuntimeError saying why that is not possible here."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if sys.platform != "linux" or platform.machine() != "x86_64" or not npm or not node:
        raise RuntimeError("fetching needs x86-64 Linux with npm")
    folder = cache_root() / "chromium"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        work = Path(temporary)
        done = subprocess.run(
            [npm, "pack", "--silent", PACKAGE], cwd=work, capture_output=True, text=True
        )
        archive = next(work.glob("*.tgz"), None)
        if done.returncode or archive is None:
            raise RuntimeError(f"npm could not fetch {PACKAGE}: {done.stderr.strip()[-300:]}")
        if base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() != SHA512:
            raise RuntimeError(f"{PACKAGE} is not the file that was expected: its hash differs")
        with tarfile.open(archive) as tar:
            tar.extractall(work, filter="data")
        packed, ready = work / "package" / "bin", work / "ready"
        ready.mkdir()
        for name in ("al2023.tar", "fonts.tar", "chromium"):
            subprocess.run(
                [node, "-e", UNPACK, str(packed / f"{name}.br"), str(ready / name)], check=True
            )
        for name in ("al2023.tar", "fonts.tar"):
            with tarfile.open(ready / name) as tar:
                tar.extractall(ready, filter="data")
            (ready / name).unlink()
        (ready / "fonts.conf").write_text(FONTS.format(html.escape(str(folder / "font-cache"))))
        (ready / "chromium").chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        ready.rename(folder)


def main() -> int:
    """Exit status 0 with a Chromium, 1 without."""
    try:
        if find() is None:
            print(f"fetching Chromium for the browser tests ({PACKAGE}, 68 MB)")
            fetch()
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        print(
            f"no Chromium, the browser tests will be skipped: {error}. Install one (Debian: "
            "apt-get install chromium), or set "
            "CHROMIUM to its path",
            file=sys.stderr,
        )
        return 1
    print(f"browser tests: {find().path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
