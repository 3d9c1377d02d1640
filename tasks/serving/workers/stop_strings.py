"""Text that arrives in pieces, up to the first of some stop strings, which is not part of it.

Example: Cutter(["END"]) gives "a" for "aE", "" for "N", "" for "D and more", and is `found` then.
"""

from collections.abc import Sequence


class Cutter:
    """What may be the beginning of a stop string is held back until the next piece says."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self.found = stops, "", False

    def feed(self, piece: str) -> str:
        """What can be passed on now; nothing any more once a stop string was found."""
        if self.found:
            return ""
        text = self._held + piece
        # The stop string that is complete first ends the text, however it was cut into pieces.
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.found, self._held = True, ""
            return text[: min(found)[1]]
        begun = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        keep = len(text) - max(begun, default=0)
        self._held = text[keep:]
        return text[:keep]

    def rest(self) -> str:
        """What was held back in vain, at the end of the text."""
        return self._held
