"""The requests of the kernel, each translated to a verb: thin on purpose.

Between two awaits nothing else runs here; what may wait for a disk or a lock goes to a thread. A
handler ends with an answer or a FUSEError, whatever happens: anything else would end the mount.

A release that publishes is counted before its first await, and a look into ``volumes/`` or
``backups/`` waits for those counted before it: that is why cp's backup is there when cp returns.
What changes a staged file waits for its own: close(2) does not wait for the release, so the next
program may be quicker, and must not take away what is about to become a backup.
"""

from __future__ import annotations

from backupfs.fuse.file_requests import FileRequests
from backupfs.fuse.name_requests import NameRequests


class Operations(NameRequests, FileRequests):
    """One mount. Its methods are called by pyfuse3 in the event loop."""
