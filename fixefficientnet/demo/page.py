"""The page: what a person sees and moves. What it shows, `offer` computes."""

import contextlib
import functools
import html
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from PIL import Image

from fixefficientnet._internal.text import inert
from fixefficientnet.demo import heat
from fixefficientnet.demo.offer import Offer
from fixefficientnet.demo.photo import Sizes
from fixefficientnet.errors import FixEfficientNetError, ImageError
from fixefficientnet.prediction import Label
from fixefficientnet.preprocessing import open_image

_COLOURS = ("#1f8fb3", "#d9622b")
"""Of the left and the right model in the plots; both are seen on white and on black."""
_WAITING = 64
"""Most clicks that wait; whoever comes then is told so."""
_SECONDS_KEPT = 3600
"""How long uploaded photos stay on the disk."""
_EVENT: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_COMPUTING = _EVENT | {"concurrency_id": "computing"}
"""Of what computes, one event runs at a time: several would share its cores, and take as long together."""

CSS = """
.gradio-container { width: 100%; max-width: 72rem !important; margin: 0 auto !important; }
.shown .image-frame { width: 100%; }
.shown img { width: 100% !important; aspect-ratio: 1; object-fit: contain !important; }
.captioned { gap: .4rem !important; }
.quiet, .quiet p { color: var(--body-text-color-subdued); margin: 0; }
.quiet .html-container { padding: 0 !important; }
.report iframe { width: 100%; height: 80vh; border: 0; }
.classes { columns: 12rem; overflow-wrap: anywhere; }
"""


def theme() -> gr.themes.Base:
    """Gradio's own theme, with the fonts of the visitor's machine: others would come from elsewhere."""
    return gr.themes.Default(
        primary_hue="cyan",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["system-ui", "sans-serif"],
    )


class _Side:
    """One of the two models: what is chosen, and what is shown of it."""

    def __init__(self, offer: Offer, title: str, name: str, size: int):
        self._offer = offer
        with gr.Column(min_width=300):
            self.model = gr.Dropdown(list(offer.names), value=name, label=f"{title} model")
            self.size = gr.Slider(**self._range(name) | {"value": size}, label="Test size, in pixels", buttons=[])
            self.about = gr.Markdown(offer.about(name), elem_classes="quiet")
            self.labels = gr.Label(show_label=False, num_top_classes=5)
            with gr.Row():
                self.crop, self.crop_said = _captioned()
                self.heat, self.heat_said = _captioned()
        self.shown = [self.labels, self.crop, self.crop_said, self.heat, self.heat_said]

    def show(self, name: str, size: int, photo: Image.Image) -> list[Any]:
        """The values of `shown`."""
        found = self._offer.look(name, photo, int(size))
        side = found.crop.width
        crop = gr.Image(found.crop, alt_text="The crop that the network is shown")
        crop_said = f"What the network sees: {side} x {side} pixels, in {found.milliseconds:.0f} ms"
        if found.activations is None:
            heat_said = "No heat map: this network does not classify the mean of a feature map."
            return [_bars(found.labels), crop, crop_said, gr.Image(None, visible=False), heat_said]
        glow = gr.Image(heat.paint(found.crop, found.activations), alt_text="Class-activation map", visible=True)
        heat_said = f"What speaks for <bdi>{_escaped(found.labels[0].name)}</bdi>"
        return [_bars(found.labels), crop, crop_said, glow, heat_said]

    def changed(self, name: str) -> tuple[Any, str]:
        """Another model's slider, at its own test size, and what it is."""
        return gr.Slider(**self._range(name)), self._offer.about(name)

    def _range(self, name: str) -> dict[str, Any]:
        loaded = self._offer[name]
        sizes = Sizes.of(loaded)
        found = {"minimum": sizes.lowest, "maximum": sizes.highest, "step": sizes.step, "value": loaded.test.size}
        return found | {"interactive": sizes.lowest < sizes.highest}


def build(offer: Offer) -> gr.Blocks:
    """Makes the page."""
    blocks = gr.Blocks(title="FixEfficientNet", analytics_enabled=False, delete_cache=(60, _SECONDS_KEPT))
    with blocks:
        gr.Markdown("# What does the network see?\nDrop photos: two networks classify them side by side.")
        if not offer.reports:
            _photos(offer)
        else:
            with gr.Tab("Your photos"):
                _photos(offer)
            for name, page in offer.reports.items():
                _about(offer, name, page)
    blocks.queue(max_size=_WAITING, api_open=False, default_concurrency_limit=1)
    return blocks


def _photos(offer: Offer) -> None:
    """What is made of photos: their choice, the two models, the curves."""
    chosen = gr.State(0)
    photos = gr.Gallery(
        label="Photos",
        file_types=["image"],
        allow_preview=False,
        columns=8,
        fit_columns=False,
        height=150,
        object_fit="contain",
        buttons=[],
    )
    said = gr.HTML(visible=False)
    with gr.Column(visible=False) as results:
        compared = gr.Markdown(offer.compared(*offer.sides))
        with gr.Row():
            first, second = map(
                functools.partial(_Side, offer), ("First", "Second"), offer.sides, offer.sizes_at_first()
            )
        with gr.Row():
            plots = [_plot("probability", "Probability of the first class, %"), _plot("milliseconds", "Milliseconds")]
    given = [photos, chosen, first.model, first.size, second.model, second.size]
    shown = [said, results, *first.shown, *second.shown]

    def show(files: Any, index: int, one: str, size: int, other: str, other_size: int) -> dict[Any, Any]:
        try:
            photo = _photo(files, index)
            if photo is None:
                return {said: _saying(None), results: gr.Column(visible=False)}
            values = first.show(one, size, photo) + second.show(other, other_size, photo)
        except FixEfficientNetError as error:
            return {said: _saying(str(error)), results: gr.Column(visible=False)}
        return dict(zip(shown, [_saying(None), gr.Column(visible=True), *values], strict=True))

    def draw(files: Any, index: int, one: str, _: int, other: str, __: int) -> list[Any]:
        with contextlib.suppress(FixEfficientNetError):  # which `show` has told
            if photo := _photo(files, index):
                return [_curves(offer, one, other, photo)] * len(plots)
        return [gr.skip()] * len(plots)

    def then(event: Any) -> None:
        event.then(show, given, shown, **_COMPUTING).then(draw, given, plots, **_COMPUTING)

    def newest(files: Any) -> tuple[int, Any]:
        return len(files or ()) - 1, _saying("Classifying …" if files else None)

    then(photos.change(newest, photos, [chosen, said], **_EVENT))
    then(photos.select(_selected, None, chosen, **_EVENT))
    for side in (first, second):
        changed = side.model.input(side.changed, side.model, [side.size, side.about], **_COMPUTING)
        then(changed.then(offer.compared, [first.model, second.model], compared, **_COMPUTING))
        side.size.input(show, given, shown, trigger_mode="always_last", **_COMPUTING)


def _selected(event: gr.SelectData) -> int:
    return int(event.index)


def _photo(files: Sequence[tuple[str, Any]] | None, index: int) -> Image.Image | None:
    """The chosen one of the uploaded photos; None where there is none.

    Raises:
        ImageError: It cannot be used; named as its owner knows it.
    """
    if not files:
        return None
    path = Path(files[index % len(files)][0])
    try:
        return open_image(path.read_bytes(), upright=True, srgb=True)
    except OSError as error:
        raise ImageError(f"{path.name} is not here any more: drop it again.") from error
    except ImageError as error:
        raise ImageError(f"{path.name}: {error}") from error


def _saying(text: str | None) -> Any:
    return gr.HTML(f'<p role="status">{_escaped(text or "")}</p>', visible=text is not None)


def _captioned() -> tuple[gr.Image, gr.HTML]:
    """An image, and what is said below it."""
    with gr.Column(min_width=120, elem_classes="captioned"):
        image = gr.Image(show_label=False, interactive=False, format="jpeg", buttons=[], elem_classes="shown")
        return image, gr.HTML(elem_classes="quiet")


def _bars(labels: Sequence[Label]) -> dict[str, float]:
    """Labels for Gradio, which wants them to differ: crane is a bird's name, and a machine's."""
    names = [inert(label.name) for label in labels]
    return {
        name if names.count(name) == 1 else f"{name} ({label.synset or label.index})": label.probability
        for name, label in zip(names, labels, strict=True)
    }


def _plot(column: str, title: str) -> gr.LinePlot:
    return gr.LinePlot(
        x="size",
        y=column,
        color="model",
        title=title,
        x_title="Test size, in pixels",
        y_title=" ",
        y_lim=[0, 100 if column == "probability" else None],
        tooltip=["size", "class", column],
        height=220,
        min_width=300,
        buttons=[],
    )


def _curves(offer: Offer, one: str, other: str, photo: Image.Image) -> gr.LinePlot:
    """What is drawn of both models, in either plot."""
    rows = [
        {"model": name, **asdict(point), "class": inert(point.label)}
        for name in dict.fromkeys((one, other))
        for point in offer.curve(name, photo)
    ]
    sizes = [row["size"] for row in rows]
    colours = dict(zip(dict.fromkeys((one, other)), _COLOURS, strict=False))
    return gr.LinePlot(pd.DataFrame(rows), color_map=colours, x_lim=[min(sizes), max(sizes)])


def _about(offer: Offer, name: str, page: str | None) -> None:
    """A tab with a run's classes and its own page, on which no script runs; sent when it is opened."""
    with gr.Tab(f"{'Mistakes' if page else 'Classes'} of {Path(name).name}") as tab:
        if classes := offer[name].own_classes:
            listed = "".join(f"<div><bdi>{_escaped(one)}</bdi></div>" for one in classes)
            with gr.Accordion(f"{len(classes):,} classes", open=not page):
                gr.HTML(f'<div class="classes">{listed}</div>')
        if page:
            framed = f'<iframe sandbox title="Report" srcdoc="{html.escape(page)}"></iframe>'
            tab.select(lambda: framed, None, gr.HTML(elem_classes="report"), **_EVENT)


def _escaped(text: str) -> str:
    return html.escape(inert(text))
