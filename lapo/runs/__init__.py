"""What any training run needs: folder, checkpoints, tracking, device, optimiser, several processes.

Nothing here knows what is trained, or on what.
"""
