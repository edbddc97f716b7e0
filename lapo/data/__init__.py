"""Chunks of frames on disk, windows of frames on the device, and the decoding of videos.

data_loader.py, one folder up, chooses which windows a run reads; the scripts that record, import or download
chunks lie there, too.
"""
