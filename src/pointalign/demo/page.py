"""The page itself: what stands where, and what happens on a click."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr
from gradio.themes import Default

from pointalign.answering.answerer import CAPTION_QUESTION, FREE_QUESTION
from pointalign.data.files import PointCloud
from pointalign.data.files.source import MEBIBYTE, readable
from pointalign.data.household import ASSETS
from pointalign.demo.objects import about_html, bundled_cloud, choices, shelf, shelf_html, viewer_value
from pointalign.demo.uploads import ADDRESS, FORMATS_TAKEN
from pointalign.demo.visit import LONGEST_QUESTION, Desk, Visit
from pointalign.errors import PointAlignError

FOLDER = ASSETS / "demo"
QUESTIONS = (FREE_QUESTION, CAPTION_QUESTION, "What color is it?", "What is it used for?")
LABELS = "chair, table, sofa, lamp, bed, plant, vehicle, animal, toy, food"
# A visitor who comes back after an hour, or after this many others, starts anew.
MOST_VISITS = 64
SHOWN_LABELS = 8
Update = Any


def asset(name: str) -> str:
    """The text of a file that belongs to the page."""
    return (FOLDER / name).read_text(encoding="utf-8")


class PageBuilder:
    """Builds the page of a desk: components first, then what happens.

    Args:
        desk: serves the visitors.
    """

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.blocks = gr.Blocks(title="PointAlign", analytics_enabled=False, fill_width=True)
        with self.blocks:
            self.visit = gr.State(None)
            gr.HTML(self._head(), elem_id="head")
            with gr.Row(elem_id="columns", equal_height=False):
                with gr.Column(scale=5, min_width=300, elem_id="object-side"):
                    self._object_side()
                with gr.Column(scale=6, min_width=300, elem_id="talk-side"):
                    self._talk_side()
            self._connect()
        self.blocks.queue(max_size=desk.page.waiting, default_concurrency_limit=4, api_open=False)

    def _head(self) -> str:
        names = " and ".join(f"<b>{escape(name)}</b>" for name in self.desk.names)
        return f"<h1>PointAlign</h1><p>Ask {names} about a 3D object. Files stay on this machine.</p>"

    def _object_side(self) -> None:
        self.viewer = gr.HTML(
            "",
            html_template=asset("viewer.html"),
            js_on_load=asset("viewer.js"),
            apply_default_css=False,
            elem_id="viewer",
        )
        self.about = gr.HTML("", elem_id="about")
        self.object_notice = gr.HTML("", elem_id="object-notice")
        self.shelf = gr.HTML(
            shelf_html(), js_on_load=asset("shelf.js"), apply_default_css=False, elem_id="shelf", padding=False
        )
        most = self.desk.page.max_upload_mb * MEBIBYTE
        self.drop = gr.HTML(
            "",
            html_template=asset("drop.html"),
            js_on_load=asset("drop.js"),
            apply_default_css=False,
            elem_id="drop",
            address=ADDRESS,
            endings=FORMATS_TAKEN,
            most=most,
            largest=readable(most),
            limits=f"{FORMATS_TAKEN.replace(',', ' ')}, up to {readable(most)}",
        )
        with gr.Row(elem_id="object-row"):
            self.list = gr.Dropdown(
                choices(), value=None, label="All bundled objects", elem_id="list", scale=3, min_width=180
            )
            self.turn = gr.Button("Lies on its side? Turn it", elem_id="turn", scale=2, min_width=140, size="md")

    def _talk_side(self) -> None:
        names = self.desk.names
        with gr.Row(elem_id="chats"):
            self.chats = [
                gr.Chatbot(
                    label=name,
                    elem_id=f"chat-{number}",
                    height="min(46vh, 440px)",
                    min_height=220,
                    min_width=260,
                    render_markdown=False,
                    allow_tags=True,
                    buttons=["copy", "copy_all"],
                    feedback_options=None,
                    layout="bubble",
                    placeholder="Ask something about the object",
                )
                for number, name in enumerate(names)
            ]
        self.talk_notice = gr.HTML("", elem_id="talk-notice")
        with gr.Row(elem_id="ask-row"):
            self.question = gr.Textbox(
                placeholder="What is this?",
                label="Question",
                show_label=False,
                container=False,
                max_length=LONGEST_QUESTION,
                elem_id="question",
                scale=6,
                min_width=180,
                html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
            )
            self.ask = gr.Button("Ask", variant="primary", elem_id="ask", scale=1, min_width=80)
            self.stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=80)
        with gr.Row(elem_id="suggestions"):
            self.suggestions = [gr.Button(text, size="sm", min_width=60) for text in QUESTIONS]
            self.clear = gr.Button("Clear", size="sm", min_width=60, elem_id="clear", variant="secondary")
        with gr.Row(elem_id="labels-row"):
            self.labels = gr.Textbox(
                LABELS, label="Which of these is it?", elem_id="labels", scale=6, min_width=180, max_lines=3
            )
            self.score = gr.Button("Compare", elem_id="score", scale=1, min_width=100)
        with gr.Row(elem_id="bars"):
            self.bars = [
                gr.Label(
                    label=name, num_top_classes=SHOWN_LABELS, elem_id=f"bars-{number}", min_width=240, visible=False
                )
                for number, name in enumerate(names)
            ]

    # What happens

    def _connect(self) -> None:
        shown = [
            self.visit,
            self.viewer,
            self.about,
            self.object_notice,
            self.talk_notice,
            *self.chats,
            *self.bars,
            self.list,
        ]
        look = {"outputs": shown, "show_progress": "hidden", "api_visibility": "private"}
        reading = {"concurrency_id": "reading", "concurrency_limit": 1}
        answering = {"concurrency_id": "answering", "concurrency_limit": 1, "api_visibility": "private"}
        talk = {
            "inputs": [self.question, self.visit],
            "outputs": [self.question, self.talk_notice, *self.chats],
            "show_progress": "minimal",
            **answering,
        }
        asked: list[Any] = [self.ask.click(self.answer, **talk), self.question.submit(self.answer, **talk)]
        for button in self.suggestions:
            asked.append(button.click(self.answer, **{**talk, "inputs": [button, self.visit]}))
        scored = self.score.click(
            self.compare,
            [self.labels, self.visit],
            [self.talk_notice, *self.bars],
            show_progress="minimal",
            **answering,
        )
        other = [*asked, scored]
        self.blocks.load(lambda: self.look_at_listed(shelf()[0]), **look)
        self.drop.upload(self.look_at_file, **look, **reading, cancels=other)
        self.drop.input(self.tell_of_file, outputs=self.object_notice, api_visibility="private", show_progress="hidden")
        self.shelf.select(self.look_at_picture, **look, cancels=other)
        self.list.input(self.look_at_listed, self.list, **look, cancels=other)
        self.turn.click(self.look_turned, self.visit, **look, cancels=other)
        self.stop.click(None, cancels=other)
        forget = {"inputs": self.visit, "outputs": [self.talk_notice, *self.chats], "api_visibility": "private"}
        for clears in (self.clear.click, *(chat.clear for chat in self.chats)):
            clears(self.forget, **forget, cancels=asked)

    def look_at(self, cloud: PointCloud, listed: str | None = None) -> list[Update]:
        """Show a cloud; what was said of another is forgotten.

        Args:
            cloud: to look at.
            listed: its id in the list of bundled objects, where it is one of them.
        """
        return self._shown(self.desk.visit(cloud), gr.update(value=listed))

    def _shown(self, visit: Visit, listed: Update) -> list[Update]:
        number = len(self.chats)
        hidden = [gr.update(value=None, visible=False)] * number
        return [visit, viewer_value(visit.cloud), about_html(visit.cloud), "", "", *([[]] * number), *hidden, listed]

    def _kept(self, error: PointAlignError) -> list[Update]:
        """What is shown stays; what went wrong is told."""
        return [gr.skip(), gr.skip(), gr.skip(), notice(str(error)), *([gr.skip()] * (2 + 2 * len(self.chats)))]

    def look_at_file(self, event: gr.EventData) -> list[Update]:
        """Show a file that was dropped."""
        try:
            return self.look_at(self.desk.read(str(event.word)))
        except PointAlignError as error:
            return self._kept(error)

    def look_at_picture(self, event: gr.EventData) -> list[Update]:
        """Show the bundled object whose picture was clicked."""
        return self.look_at_listed(str(event.id))

    def look_at_listed(self, object_id: str | None) -> list[Update]:
        """Show a bundled object."""
        try:
            return self.look_at(bundled_cloud(object_id or ""), object_id)
        except PointAlignError as error:
            return self._kept(error)

    def look_turned(self, visit: Visit | None) -> list[Update]:
        """Show the same cloud the other way up."""
        if visit is None:
            return self._kept(NOTHING_YET)
        return self._shown(self.desk.turned(visit), gr.skip())

    def tell_of_file(self, event: gr.EventData) -> str:
        """Tell why a file did not arrive."""
        return notice(str(event.message))

    def answer(self, question: str, visit: Visit | None) -> Iterator[list[Update]]:
        """Write the answers to a question as they come."""
        words = question.strip()
        same = [gr.skip()] * len(self.chats)
        if visit is None or not words:
            yield [question, notice(str(NOTHING_YET)) if visit is None else "", *same]
            return
        try:
            for told in self.desk.ask(visit, words):
                yield ["", notice(told), *(list(talk.messages) for talk in visit.talks)]
        except PointAlignError as error:
            yield [question, notice(str(error)), *same]

    def forget(self, visit: Visit | None) -> list[Update]:
        """Start the conversation anew."""
        if visit is not None:
            self.desk.clear(visit)
        return ["", *([[]] * len(self.chats))]

    def compare(self, labels: str, visit: Visit | None) -> list[Update]:
        """Show how probable each label is."""
        try:
            if visit is None:
                raise NOTHING_YET
            scores = self.desk.score(visit, labels)
        except PointAlignError as error:
            return [notice(str(error)), *([gr.skip()] * len(self.bars))]
        return ["", *(gr.update(value=row, visible=True) for row in scores)]


NOTHING_YET = PointAlignError("there is no object yet; drop a file or pick one")


def notice(text: str) -> str:
    """A line that people must not miss; nothing for no text."""
    return f'<div class="notice" role="alert">{escape(text)}</div>' if text else ""


def appearance() -> dict[str, Any]:
    """Fonts, colours and styles, as `launch` takes them; nothing of them comes from elsewhere."""
    theme = Default(
        primary_hue="indigo",
        secondary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    # What Gradio takes as css it prefixes rule by rule, and rules for a phone's screen then miss the page's outer boxes.
    return {"theme": theme, "head": f"<style>{asset('page.css')}</style>"}
