"""Which libraries have a variant on a kind of layer; importing this imports none of them."""

from minilora.spec.variants import REGISTRY


def library_names(entry: str, kind: str) -> list[str]:
    """The libraries to ask: LyCORIS where PEFT has another gradient, else PEFT; two for LoRA."""
    if REGISTRY[entry].written_as:
        return ["LyCORIS"]
    if entry != "lora":
        return ["PEFT"]
    second: dict[str, list[str]] = {
        "experts": [],
        "tied": [],
        "conv1": ["LyCORIS"],
        "conv2": ["LyCORIS"],
    }
    return ["PEFT", *second.get(kind, ["loralib"])]
