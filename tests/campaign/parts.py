"""The parts of the campaign; each module lists its trials."""

from campaign import bombs, disks, files, hub, images, kills, load, text, waits, weights

PARTS = {
    "kills": kills,
    "disks": disks,
    "files": files,
    "weights": weights,
    "images": images,
    "bombs": bombs,
    "hub": hub,
    "waits": waits,
    "load": load,
    "text": text,
}
