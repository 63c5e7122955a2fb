"""The layers of a model: the blocks for which ":layers" asks."""

from lossray.networks.layout import Layout


def layers(layout: Layout) -> dict[str, list[str]]:
    """Parameter names by layer, in the model's order.

    A layer is the module that owns the parameters, so that weight and bias share one; a parameter of the
    model itself is a layer of its own.
    """
    by_layer: dict[str, list[str]] = {}
    for name in layout.names:
        owner, _, _ = name.rpartition(".")
        by_layer.setdefault(owner or name, []).append(name)
    return by_layer
