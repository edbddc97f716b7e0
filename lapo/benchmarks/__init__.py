"""Speed of the stages, and checks on a CUDA device.

What is measured are the stages' own steps; nothing outside imports this.
"""
