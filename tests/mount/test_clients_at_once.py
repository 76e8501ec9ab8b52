"""What happens to a staged file right after its copy: close(2) does not wait for the publish.

The kernel tells of the end of a copy when it likes, so the next program may be quicker. It must
not take away what is about to become a backup.
"""

from __future__ import annotations

import pytest
from mounted import MIB, Mounted, patched, random_bytes, shell

IMAGE = random_bytes(2 * MIB)
CHANGED = patched(IMAGE, MIB, b"changed")
ROUNDS = 12


@pytest.fixture
def arguments(mounted: Mounted) -> tuple[object, ...]:
    return mounted.image(IMAGE, "a"), mounted.image(CHANGED, "b"), mounted.staging


@pytest.mark.parametrize(
    ("script", "contents"),
    [
        ('cp "$1" "$3/$n.img"; cp "$2" "$3/$n.img"', [IMAGE, CHANGED]),
        ('cat "$1" > "$3/$n.img"; cat "$2" > "$3/$n.img"', [IMAGE, CHANGED]),
        ('cp "$1" "$3/$n.img"; rm "$3/$n.img"', [IMAGE]),
        ('cp "$1" "$3/$n.img"; rm "$3/$n.img"; cp "$2" "$3/$n.img"', [IMAGE, CHANGED]),
        ('cp "$1" "$3/$n.img"; truncate -s 3M "$3/$n.img"', [IMAGE, IMAGE + bytes(MIB)]),
        (
            'cp "$1" "$3/$n.img"; cp "$2" "$3/.$n.tmp"; mv "$3/.$n.tmp" "$3/$n.img"',
            [IMAGE, CHANGED],
        ),
        ('cp "$1" "$3/.$n"; mv "$3/.$n" "$3/$n.img"; rm "$3/$n.img"', [IMAGE]),
        (
            'cp "$1" "$3/$n.img"; printf changed'
            ' | dd of="$3/$n.img" bs=1M seek=1 conv=notrunc status=none',
            [IMAGE, CHANGED],
        ),
    ],
)
def test_next_program_takes_no_backup_away(
    mounted: Mounted, arguments: tuple, script: str, contents: list[bytes]
) -> None:
    shell(f"for n in $(seq {ROUNDS}); do {script}; done", *arguments)

    counts = {n: len(mounted.names(str(n))) for n in range(1, ROUNDS + 1)}
    assert set(counts.values()) == {len(contents)}, counts
    mounted.assert_backups("1", *contents)
    mounted.assert_backups(str(ROUNDS), *contents)


def test_second_name_is_refused_right_after_the_first(mounted: Mounted, arguments: tuple) -> None:
    script = 'cp "$1" "$3/x.img"; ! cp "$2" "$3/x.raw"; mv "$3/x.img" "$3/y.img"'

    shell(script, *arguments)

    mounted.assert_backups("x", IMAGE)
    mounted.assert_backups("y", IMAGE)
