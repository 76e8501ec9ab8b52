"""Measurements of backupfs beside other tools; run by ``scripts/bench``.

``workload`` makes the images, ``subjects`` and ``peers`` know how each tool is called, ``bench`` has
them do everything in order, ``growth`` makes one thing larger and larger, ``reading`` reads through
mounts, ``measure`` times and weighs, ``report`` writes the tables and ``plot`` draws them.
Nothing here is imported by the package.
"""
