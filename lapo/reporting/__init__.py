"""What runs have learnt, as numbers, tables and figures.

Nothing here trains; only figures.py needs matplotlib.
"""
