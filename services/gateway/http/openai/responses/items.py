"""The items of a response, built from its pieces, and the events that tell of them."""

from __future__ import annotations

from typing import Any

from services.gateway.http.openai.tools.heard import CallPiece, Piece

Event = dict[str, Any]


class Items:
    """`output` is the response so far: a message wherever there is text, and calls of functions.

    `base` is what the items' ids have in common.
    """

    def __init__(self, base: str) -> None:
        self.output: list[dict[str, Any]] = []
        self._base = base
        self._is_open = False

    def add(self, piece: Piece) -> list[Event]:
        """What there is to tell of a piece: events without their numbers."""
        events: list[Event] = []
        if piece.content:
            events += self._add_text(piece.content)
        for call in piece.calls:
            events += self._add_call(call)
        return events

    def finish(self, status: str) -> list[Event]:
        """The end of the response. There is always an item, if an empty one."""
        events = [] if self.output else self._open_message()
        return events + self._close(status)

    def _add_text(self, text: str) -> list[Event]:
        events = []
        if not (self._is_open and self._item["type"] == "message"):
            events = self._close("completed") + self._open_message()
        self._part["text"] += text
        delta = self._event("response.output_text.delta", content_index=0, delta=text, logprobs=[])
        return [*events, delta]

    def _add_call(self, call: CallPiece) -> list[Event]:
        events = []
        if call.name:
            events = self._close("completed")
            item = {
                "type": "function_call",
                "id": f"fc_{self._base}_{len(self.output)}",
                "call_id": call.id,
                "name": call.name,
                "arguments": "",
                "status": "in_progress",
            }
            events += self._open(item)
        if call.arguments:
            self._item["arguments"] += call.arguments
            kind = "response.function_call_arguments.delta"
            events.append(self._event(kind, delta=call.arguments))
        return events

    def _open_message(self) -> list[Event]:
        item = {
            "type": "message",
            "id": f"msg_{self._base}_{len(self.output)}",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        events = self._open(item)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._item["content"].append(part)
        return [*events, self._event("response.content_part.added", content_index=0, part={**part})]

    def _open(self, item: dict[str, Any]) -> list[Event]:
        self.output.append(item)
        self._is_open = True
        return [self._whole("response.output_item.added")]

    def _close(self, status: str) -> list[Event]:
        if not self._is_open:
            return []
        self._is_open = False
        item = self._item
        item["status"] = status
        if item["type"] == "message":
            part = self._part
            text = {"content_index": 0, "text": part["text"], "logprobs": []}
            events = [
                self._event("response.output_text.done", **text),
                self._event("response.content_part.done", content_index=0, part={**part}),
            ]
        else:
            kind = "response.function_call_arguments.done"
            events = [self._event(kind, name=item["name"], arguments=item["arguments"])]
        return [*events, self._whole("response.output_item.done")]

    @property
    def _item(self) -> dict[str, Any]:
        return self.output[-1]

    @property
    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = self._item["content"][0]
        return part

    def _event(self, kind: str, **values: Any) -> Event:
        place = {"item_id": self._item["id"], "output_index": len(self.output) - 1}
        return {"type": kind, **place, **values}

    def _whole(self, kind: str) -> Event:
        item = self._item
        shown = {**item, "content": [*item["content"]]} if "content" in item else {**item}
        return {"type": kind, "output_index": len(self.output) - 1, "item": shown}
