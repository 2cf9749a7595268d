"""Labelled images: datasets by index, loaded in workers."""
