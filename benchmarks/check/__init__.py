"""What a GPU should show before days are spent on it; `benchmarks.cuda` runs it, `command.PARTS` names its parts.

Each part is a module with `rows(setting)`, which gives one row per case, and runs in a process of its own.
"""
