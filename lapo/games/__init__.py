"""Procgen: the table of its games, the vector environment, and what a simulator's state says.

Nothing here knows of networks, runs or recorded frames.
"""
