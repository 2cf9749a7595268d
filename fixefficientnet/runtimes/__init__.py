"""Models in other runtimes: export, check, run."""
