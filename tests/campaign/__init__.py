"""A campaign of faults and hostile input: what happens when processes are killed, disks fill and files lie.

python -m tests.campaign --help
"""
