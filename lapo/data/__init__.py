"""Chunks of frames on disk, windows of frames on the device, the decoding of videos, and the
download of the hub's data set.

data_loader.py, one folder up, chooses which windows a run reads; the scripts that record, import or download
chunks lie there, too.
"""
