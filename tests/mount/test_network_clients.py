"""The servers and clients of a network that write files: sftp, scp and curl."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mounted import MIB, Mounted, needs, patched, random_bytes, run

pytestmark = pytest.mark.tools

IMAGE = random_bytes(4 * MIB + 5)
CHANGED = patched(IMAGE, MIB, b"changed")
SERVER = Path("/usr/lib/openssh/sftp-server")
needs_server = pytest.mark.skipif(not SERVER.exists(), reason=f"{SERVER} is not installed")


@needs("sftp")
@needs_server
@pytest.mark.parametrize("words", [[], ["-p"], ["-f"]])
def test_sftp_put(mounted: Mounted, words: list[str]) -> None:
    for content in (IMAGE, CHANGED):
        source = mounted.image(content)
        os.utime(source, (1_500_000_000, 1_500_000_000))
        command = f"put {' '.join(words)} {source} {mounted.staging}/web01.img\n"
        run("sftp", "-q", "-D", SERVER, "-b", "-", stdin=command.encode())

    mounted.assert_backups("web01", IMAGE, CHANGED)


@needs("sftp")
@needs_server
def test_sftp_put_that_resumes_a_file(mounted: Mounted) -> None:
    target = mounted.staging / "web01.part"
    run("cp", mounted.image(IMAGE[:MIB]), target)

    command = f"reput {mounted.image(IMAGE)} {target}\nrename {target} {mounted.staging}/web01\n"
    run("sftp", "-q", "-D", SERVER, "-b", "-", stdin=command.encode())

    mounted.assert_backups("web01", IMAGE)


@needs("scp")
@needs_server
@pytest.mark.parametrize("words", [[], ["-p"]])
def test_scp(mounted: Mounted, words: list[str]) -> None:
    """scp does not empty a file that exists: it sets the size when it has written all of it."""
    for content in (IMAGE, CHANGED, IMAGE + IMAGE[:MIB]):
        source = mounted.image(content)
        run("scp", "-q", *words, "-D", SERVER, source, f"host:{mounted.staging}/web01.img")

    mounted.assert_backups("web01", IMAGE, CHANGED, IMAGE + IMAGE[:MIB])


@needs("curl")
def test_curl(mounted: Mounted) -> None:
    for content in (IMAGE, CHANGED):
        source = mounted.image(content)
        run("curl", "-sS", "-o", mounted.staging / "web01.img", f"file://{source}")

    mounted.assert_backups("web01", IMAGE, CHANGED)
