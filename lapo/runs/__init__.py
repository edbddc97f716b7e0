"""What every training run needs: folder, checkpoints, tracking, device, optimiser, process group.

Nothing here depends on a stage, a network or the data.
"""
