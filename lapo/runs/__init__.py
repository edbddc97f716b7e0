"""What every training run needs: folder, checkpoints, tracking, device, optimiser, process group."""
