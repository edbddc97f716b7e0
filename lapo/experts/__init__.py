"""Who plays the games that are recorded: planners, the search, learned policies, DAgger, and the recording.

How LAPO's own policies are trained is not found here.
"""
