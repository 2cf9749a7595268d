"""The parts of the campaign; each module lists its trials."""

from campaign import disks, files, hub, images, kills, load, text, waits

PARTS = {
    "kills": kills,
    "disks": disks,
    "files": files,
    "images": images,
    "hub": hub,
    "waits": waits,
    "load": load,
    "text": text,
}
