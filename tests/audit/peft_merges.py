"""Adapters by PEFT and what it merges of them, written to folders."""

import copy
import warnings

from extras import optional
from safetensors.numpy import save_file


def merge_by_peft(out, model, config, safe=False, std=0.1, anew=True):
    """Write ``model``, a drawn adapter of ``config`` and the merged model below ``out``.

    A model of transformers is loaded ``anew``, with its adapter, before it is merged, as its user
    does; of another module the tensors are written.
    """
    torch, peft = optional("torch"), optional("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        original = copy.deepcopy(model) if anew else None
        _save(model, out / "base")
        adapted = peft.get_peft_model(model, config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data + std * torch.randn_like(parameter)
        adapted.save_pretrained(out / "adapter")
        loaded = adapted
        if anew:
            base = original
            if hasattr(model, "save_pretrained"):
                base = type(model).from_pretrained(out / "base", dtype=model.dtype)
            loaded = peft.PeftModel.from_pretrained(base, out / "adapter")
        _save(loaded.merge_and_unload(safe_merge=safe), out / "merged")
    return out


def _save(model, folder):
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        return
    folder.mkdir()
    tensors = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")


def causal_model(path, dtype="float32"):
    """The model in a folder, by transformers."""
    transformers, torch = optional("transformers"), optional("torch")
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))


def drawn_model(kind, **settings):
    """A small model of transformers, drawn, with these settings."""
    transformers, torch = optional("transformers"), optional("torch")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(1)
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 20,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_config(config)


def layers():
    """A module with each kind of convolution, a table and a linear layer with a bias."""
    torch = optional("torch")

    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.line = torch.nn.Conv1d(3, 4, 2)
            self.plane = torch.nn.Conv2d(3, 5, (2, 3))
            self.space = torch.nn.Conv3d(2, 6, 2)
            self.table = torch.nn.Embedding(7, 5)
            self.linear = torch.nn.Linear(5, 6)

        def forward(self, x):
            return self.linear(x)

    torch.manual_seed(2)
    return Layers()
