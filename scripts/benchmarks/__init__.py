"""Measurements of backupfs beside other tools; run by ``scripts/bench``.

``workload`` makes the images, ``subjects`` knows how each tool is called, ``reading`` reads through
mounts, ``measure`` times and weighs, ``report`` writes the tables; ``__main__`` puts them in order.
Nothing here is imported by the package.
"""
