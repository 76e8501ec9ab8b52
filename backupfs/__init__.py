"""backupfs: a backup file system for volume images."""

__version__ = "0.1.0"
