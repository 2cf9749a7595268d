"""Measure models on labelled images: accuracy, at one size and over sizes, beside each other and the paper."""
