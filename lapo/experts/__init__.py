"""Experts to record from: planners, search, learned policies, DAgger; and the recording itself.

LAPO's own policies are trained elsewhere, by the stages.
"""
