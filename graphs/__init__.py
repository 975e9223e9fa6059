"""Recorded passes: record a pass once per shape, replay it.

Owns: shapes, attention-state pairs, recorders and the managers that say when a graph is ready.
Must never know models, sessions or the service; it imports torch and the standard library only, and nothing by itself.
"""
