"""Measure models on labelled pictures: accuracy, at one size and over sizes, beside each other and the paper."""
