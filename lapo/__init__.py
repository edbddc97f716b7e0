"""Latent action policies: learning to act from videos without actions (Schmidt & Jiang, ICLR 2024).

The method lies at the top, in order: stage1_idm_wm, stage2_bc, stage3_decode, and what they share, models,
data_loader, ppo, decoding, probe and acting. What serves it lies in packages: games, runs, data, experts,
reporting, benchmarks.
"""
