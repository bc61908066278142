"""The variants that keep LoRA's equation: another scale, initialization, rate or trained part."""

from __future__ import annotations

from minilora.spec.variants.entry import Entry

_FROM_BASE = "the adapter is taken out of the base's weight, which becomes the residual"

ENTRIES: dict[str, Entry] = {
    "lora": Entry("LoRA itself.", "Hu et al. 2021, equation 3"),
    "gaussian": Entry("A starts normal, not uniform.", "PEFT", init="gaussian"),
    "rslora": Entry("s = α/√r.", "Kalajdzievski 2023, theorem 3.2", rslora=True),
    "lora+": Entry(
        "B has a greater learning rate.", "Hayou, Ghosh and Yu 2024, section 4", lr_ratio=16.0
    ),
    "lora-fa": Entry(
        "A stays as it was drawn; its input need not be kept.",
        "Zhang et al. 2023, section 3",
        trained=("B",),
        tables=False,
    ),
    "pissa": Entry(
        "The adapter starts as the greatest singular values of W.",
        "Meng, Wang and Zhang 2024, equations 2 to 4",
        init="pissa",
        breaks={"frozen-weight": _FROM_BASE},
    ),
    "olora": Entry(
        "The adapter starts as the first columns of W's QR factors.",
        "Büyükakyüz 2024, algorithm 1",
        init="olora",
        breaks={"frozen-weight": _FROM_BASE},
    ),
    "orthogonal": Entry(
        "A and B start in orthogonal halves of the rank.", "PEFT", init="orthogonal"
    ),
    "loftq": Entry(
        "The base is quantized, and the adapter starts as what that lost.",
        "Li et al. 2023, algorithm 1",
        init="loftq",
        breaks={
            "frozen-weight": "the base becomes a quantized weight",
            "initial-output": (
                "rank r does not hold all that quantizing lost: the start is near, not equal"
            ),
        },
    ),
}
