"""Measurements beside other libraries; every measured figure in docs/speed.md comes from here."""
