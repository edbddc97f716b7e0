"""Numbers, tables and figures of runs.

Nothing here trains; only figures.py needs matplotlib.
"""
