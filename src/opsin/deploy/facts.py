"""What an exported file says about itself, so that it can be used without the code that trained it.

The same table is written into ONNX (metadata properties, text by text) and into a `.pt2` program (`opsin.json`).
Normalisation belongs to the network, so none of it has to be known outside: every file takes images in [0, 1].
"""

import json
from dataclasses import asdict, dataclass

from opsin.errors import BadInput

KEY = "opsin"


@dataclass(frozen=True)
class Facts:
    """name: the model. size: (height, width) that it was trained and exported with, zeros where that is not known.
    output: what comes out.
    """

    name: str = ""
    task: str = ""
    classes: tuple[str, ...] = ()
    channels: int = 3
    size: tuple[int, int] = (0, 0)
    output: str = "output"
    values: str = "[0, 1]"

    def to_text(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_text(cls, text: str, source: str) -> "Facts":
        """Reads what `to_text` wrote. Raises BadInput that names the file."""
        try:
            table = json.loads(text)
            return cls(**{**table, "classes": tuple(table["classes"]), "size": tuple(table["size"])})
        except (ValueError, TypeError, KeyError) as error:
            raise BadInput(f"'{source}' was not written by `opsin export` (its description does not read)") from error

    def label(self, index: int) -> str:
        """The name of a class, or its number where the classes have no names."""
        return self.classes[index] if index < len(self.classes) else str(index)
