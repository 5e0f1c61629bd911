"""Which layers of a checkpoint of Flash's width are stored, and which of them stand for others."""

import re

#: 0 and 1 sliding window, from 2 on ratio 4 and 128 in turn; 0 to 2 with hash routing. So 3 and 4
#: are like all that come after them.
NUM_STORED = 5
_LAYER = re.compile(r"^layers\.(\d+)\.")


def copies(layer: int, num_layers: int) -> range:
    """Return the layers that are not stored and get the weights of stored layer `layer`."""
    if layer < NUM_STORED - 2:
        return range(0)
    return range(layer + 2, num_layers, 2)


def layer_of(name: str) -> int | None:
    """Return the layer that a tensor belongs to; None for embedding, head and the MTP head."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None
