"""Where a base or a data set comes from, by pin: the hub, a local path, a file inside a PyPI wheel."""
