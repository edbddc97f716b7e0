"""Chunks of frames on disk: their format, checks of it, and the decoding of videos.

Windows on the device are data_loader's; what records, imports or downloads chunks are scripts at the top.
"""
