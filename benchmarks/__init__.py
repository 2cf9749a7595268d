"""Measurements side by side with the peers; every figure in the docs comes from here."""
