"""What any training run needs: folder, checkpoints, tracking, device, optimiser, several processes.

The stages themselves, networks and frames are found elsewhere.
"""
