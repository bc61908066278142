"""Findings in loralib."""

from minilora.findings.finding import Finding, Library

SEEN = "0.1.2"

FINDINGS = (
    Finding(
        id="loralib.train-returns",
        title="train() and eval() return nothing",
        severity="nuisance",
        seen=SEEN,
        cause="train returns nothing (layers.py)",
        code="loralib/layers.py:129 Linear.train",
        fix="return super().train(mode) at the end, after merging or unmerging",
        right="""
            As in all of PyTorch's modules, both return the module itself.
            """,
        consequence="""
            `layer = layer.eval()` is `None`. A model that holds the layer is not affected.
            """,
        not_asked="what `train()` and `eval()` return is not a number",
    ),
    Finding(
        id="loralib.saved-after-eval",
        title="What is saved after eval() is merged twice",
        severity="silent",
        seen=SEEN,
        cause="merged is a plain attribute, which no state_dict holds (layers.py)",
        code="loralib/layers.py:141 Linear.train",
        does="""
            `eval()` merges into the base weight and notes that in an attribute, which no
            `state_dict` holds. The README saves `lora_state_dict`, without the base; the trap is
            the whole `state_dict`.
            """,
        fix="Register merged as a buffer, or save the unmerged weight",
        right="""
            Saving and loading change no weight: $W + sBA$ is right and $W + 2sBA$ is not.
            """,
        consequence="""
            A checkpoint written during evaluation counts its adapter once more. [LoRA
            190](https://github.com/microsoft/LoRA/issues/190) reports base weights that change so.
            Call `train()` before saving, or set `merge_weights=False`.
            """,
        not_asked="the peer's session has no `save`",
    ),
    Finding(
        id="loralib.loaded-after-eval",
        title="What is loaded after eval() loses its adapter",
        severity="silent",
        seen=SEEN,
        code="loralib/layers.py:141 Linear.train",
        cause=(
            "eval() (layers.py) merges what there is, B = 0 at first, and an adapter that is "
            "loaded after it does not act; the next train() takes it out nevertheless"
        ),
        does="""
            The same attribute: a layer that takes itself for merged gets an unmerged weight.
            """,
        fix="Register merged as a buffer, or unmerge before a state is loaded",
        right="""
            The loaded layer is the saved one, $y = Wx + b + sBAx$. It answers $Wx + b$, and then
            `train()` leaves $W - sBA$.
            """,
        consequence="""
            Evaluation shows the base model, and training goes on from a damaged one; [ESPnet
            5722](https://github.com/espnet/espnet/pull/5722) met it. Load in training mode.
            """,
        found_by=("loralib", "lifecycle.random-steps"),
    ),
    Finding(
        id="loralib.gradient-after-eval",
        title="After eval() an adapter has no gradient",
        severity="training",
        seen=SEEN,
        cause="merged, the forward is the weight's alone (layers.py)",
        code="loralib/layers.py:146 Linear.forward",
        fix="Compute s B A x beside the base in evaluation, too, where a gradient is asked for",
        right=r"""
            $y$ depends on $A$ and $B$ in both modes alike: $\d A = s B^\top \d y\, x^\top$ and $\d
            B = s\, \d y\, (Ax)^\top$. Merged, they are no part of the forward.
            """,
        consequence="""
            Who trains in evaluation mode, to be without dropout, trains no adapter, and where a
            bias is trained no error tells. Set `merge_weights=False`.
            """,
        not_asked="the contract asks for no gradients while an adapter is merged",
    ),
    Finding(
        id="loralib.conv-dimensions",
        title="Convolutions of one and three dimensions fail",
        severity="fails",
        seen=SEEN,
        cause="A and B have one factor of the kernel each, of two in all (layers.py)",
        code="loralib/layers.py:256 ConvLoRA.__init__",
        fix=(
            "Make B (out / groups * k, r k) and A (r k, in k^(d - 1)) so that B A has in * out * "
            "k^d entries"
        ),
        right="""
            A delta has as many entries as its weight. $BA$ has a factor of the kernel's size in its
            rows and one in its columns, which is right for two dimensions only.
            """,
        consequence="""
            `Conv1d` and `Conv3d` work with kernels of size 1 only; reported as [LoRA
            115](https://github.com/microsoft/LoRA/issues/115).
            """,
        not_asked=(
            "the peer refuses kernels of several entries, whose factors are those of another matrix"
        ),
    ),
    Finding(
        id="loralib.conv-dropout",
        title="Convolutions ignore lora_dropout",
        severity="training",
        seen=SEEN,
        code="loralib/layers.py:291 ConvLoRA.forward",
        cause="convolutions build their dropout (layers.py) and never call it",
        does="""
            They take the argument, build the dropout and never call it.
            """,
        fix="Convolve self.lora_dropout(x) with B A beside the base's own convolution",
        right=r"""
            The branch sees $K \circ x$. Where everything is dropped the base alone is left, as
            `Linear` has it.
            """,
        consequence="""
            Adapters of convolutions train without the regularisation that was asked for.
            """,
        found_by=("loralib", "module.conv.pointwise.dropout"),
    ),
    Finding(
        id="loralib.nothing-enabled",
        title="MergedLinear fails where nothing is enabled",
        severity="fails",
        seen=SEEN,
        cause="the forward asks for factors that were not made (layers.py)",
        code="loralib/layers.py:242 MergedLinear.forward",
        does="""
            Nothing is the default of `enable_lora`.
            """,
        fix="Ask for any(self.enable_lora) beside r > 0 in the forward",
        right="""
            Without an adapter the layer is $Wx + b$, which it is after `eval()`.
            """,
        consequence="""
            In training mode the first forward raises. Name the parts, as the README does.
            """,
        not_asked="some part of a fused layer is enabled in every case",
    ),
    Finding(
        id="loralib.meta-device",
        title="MergedLinear built on the meta device loses its adapter",
        severity="silent",
        seen=SEEN,
        cause="lora_ind is a plain attribute and no buffer (layers.py)",
        code="loralib/layers.py:186 MergedLinear.__init__",
        does="""
            `lora_ind`, the mask of the rows that have an adapter, is a plain attribute and no
            buffer, so it stays on the device where it was made. On the meta device it has no
            values; PyTorch assigns nothing through it, and does not complain.
            """,
        fix="Register lora_ind as a buffer",
        right="""
            Where a layer was built changes nothing of $y = Wx + b + sBAx$.
            """,
        consequence="""
            Models that are built empty and filled later compute with the base alone, and no error
            tells.
            """,
        not_asked="no layer is built on the meta device",
    ),
    Finding(
        id="loralib.max-norm",
        title="Embedding with max_norm shortens lora_A in its forward",
        severity="silent",
        seen=SEEN,
        code="loralib/layers.py:81 Embedding.forward",
        cause=(
            "an embedding looks up the columns of lora_A with the max_norm of the table (layers.py)"
        ),
        does="""
            `max_norm` bounds the rows of an embedding, and PyTorch documents that looking up
            shortens them in place. loralib looks up the columns of $A$ with the same bound.
            """,
        fix="Look up the columns of A without max_norm",
        right="""
            Merging changes no output. The row of $W + sBA$ here is within the bound, so nothing is
            to be shortened; unmerged, the answer is shorter, and $A$ is another one afterwards.
            """,
        consequence="""
            A forward changes what is trained, and training and evaluation differ.
            """,
        found_by=(
            "loralib",
            "module.embedding.max-norm.forward",
            "module.embedding.max-norm.gradients",
        ),
    ),
    Finding(
        id="loralib.pickle",
        title="A layer without dropout cannot be pickled",
        severity="fails",
        seen=SEEN,
        cause="in the place of the dropout stands a lambda (layers.py)",
        code="loralib/layers.py:26 LoRALayer.__init__",
        does="""
            In the place of the dropout stands a `lambda`; `torch.nn.Identity` would be the same
            function.
            """,
        fix="Put torch.nn.Identity() in the place of the lambda",
        right="""
            A layer can be pickled and is the same afterwards, as it is with a dropout.
            """,
        consequence="""
            `torch.save` of a whole model fails, and so does sending one to another process;
            reported as [LoRA 200](https://github.com/microsoft/LoRA/pull/200).
            """,
        not_asked="no method pickles a layer",
    ),
)

LIBRARY = Library("loralib", "loralib", "loralib", FINDINGS, release=SEEN, reads=("loralib",))
