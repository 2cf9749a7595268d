"""The parts of the campaign; each module lists its trials."""

from campaign import disks, files, hub, kills, load, waits

PARTS = {"kills": kills, "disks": disks, "files": files, "hub": hub, "load": load, "waits": waits}
