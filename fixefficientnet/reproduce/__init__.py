"""FixRes fine-tuning: a network's classifier and last norm, tuned at the test size.

`python -m fixefficientnet.reproduce b2 --data IMAGENET`, or `run` from Python.

FixRes: Touvron et al., "Fixing the train-test resolution discrepancy", NeurIPS 2019, and its note on
EfficientNet, arXiv 2003.08237.
"""
