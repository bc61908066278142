"""Findings in LyCORIS."""

from minilora.findings.conditions import not_in_base
from minilora.findings.finding import Finding, Library, Stored
from minilora.findings.shared import ALL_TENSORS_FIT
from minilora.findings.stored import StoredAdapter

SEEN = "4.1.3"


def _without_alpha(adapter: StoredAdapter) -> list[str]:
    return [m.name for m in adapter.adapted if "alpha" not in m.parts]


FINDINGS = (
    Finding(
        id="lycoris.loaded-scale",
        title="An adapter is loaded with the scale that the network was built with",
        severity="silent",
        seen=SEEN,
        cause=(
            "the scale is a number, made of the constructor's argument, beside the buffer "
            "alpha (modules/locon.py)"
        ),
        code="lycoris/modules/locon.py:153 LoConModule.__init__",
        does="""
            `alpha` is a buffer that `load_state_dict` and `load_weights` fill; the scale is a
            number that was computed from the constructor's argument, and nothing computes it anew.
            """,
        fix=(
            "Compute the scale from the buffer alpha where it is used, or anew when a state is "
            "loaded"
        ),
        right=r"""
            $h = W x + (\alpha / r) B A x$ with the $\alpha$ of the file.
            """,
        consequence="""
            The function is another one, without a word, unless the network is built with the same
            alpha. `create_lycoris_from_weights` takes the file's.
            """,
        not_asked="the peer has no method that loads",
    ),
    Finding(
        id="lycoris.names",
        title="An adapter of another model is loaded as none",
        severity="silent",
        seen=SEEN,
        cause=(
            "names that are no module's come back in a dictionary, and nothing is raised "
            "(wrapper.py)"
        ),
        code="lycoris/wrapper.py:602 LycorisNetwork.load_weights",
        does="""
            A name that is no module's is passed over.
            """,
        fix="Raise where no name fits, and warn of those that are left over",
        right=ALL_TENSORS_FIT,
        consequence="""
            A wrong prefix or another model's file leaves the base as it is. Count `loras`.
            """,
        not_asked="the peer has no method that loads",
        stored=Stored(not_in_base, "dropped", "the base has no module of these names"),
    ),
    Finding(
        id="lycoris.no-alpha",
        title="An adapter without alpha fails",
        severity="fails",
        seen=SEEN,
        cause="float(alpha) of none (modules/locon.py)",
        code="lycoris/modules/locon.py:179 LoConModule.make_module_from_state_dict",
        does="""
            The constructor says that no alpha means the rank, and so it is for an alpha of 0.
            sd-scripts read an absent one so too.
            """,
        fix="Take the rank for a missing alpha, as kohya's own reader does",
        right="""
            Without an alpha $s = 1$.
            """,
        consequence="""
            Files of the time before alphas are not read. Put the rank into them.
            """,
        not_asked="the peer has no method that loads",
        stored=Stored(_without_alpha, "refused", "it fails on a module without alpha"),
    ),
    Finding(
        id="lycoris.dora-epsilon",
        title="DoRA starts as another function where rows are small",
        severity="silent",
        seen=SEEN,
        code="lycoris/functional/general.py:126 _weight_decompose",
        cause=(
            "the norm of each row is ‖V‖ + ε with ε = finfo.eps (_weight_decompose in "
            "functional/general.py), so rows of small norm come out too small"
        ),
        does=r"""
            To the norm of each row float32's $\epsilon$ is added, absolute, but not to the
            magnitude, which is that norm.
            """,
        fix="Divide by the norm, or by max(norm, eps), and not by norm + eps",
        right=r"""
            With $B = 0$ the rescaled row is $m\, W / \lVert W \rVert = W$. A row of norm $\epsilon$
            becomes half of itself.
            """,
        consequence="""
            Rows of ordinary size change in their last bit. A row that is near zero, such as a
            pruned one, shrinks, and a scale of all weights does not pass through.
            """,
        found_by=(
            "lycoris",
            "variants.dora.forward.all",
            "variants.dora.vjp.all",
            "variants.dora.merge.all",
        ),
    ),
)

LIBRARY = Library("lycoris", "LyCORIS", "lycoris-lora", FINDINGS, release=SEEN, reads=("kohya",))
