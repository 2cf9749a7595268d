"""The parts of the campaign; each module lists its trials."""

from campaign import files, hub, waits

PARTS = {"files": files, "hub": hub, "waits": waits}
