"""How fast the stages run, and what a CUDA device makes of them.

What is measured are the stages' own steps; nothing outside imports this.
"""
