"""The parts of the campaign; each module lists its trials."""

from campaign import files, hub, load, waits

PARTS = {"files": files, "hub": hub, "load": load, "waits": waits}
