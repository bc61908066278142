"""Adapters by PEFT and what it merges of them, written to folders."""

import warnings

from extras import optional


def merge_by_peft(out, model, config, prepare=None, saved=None, safe=False, std=0.1):
    """Write ``model``, a drawn adapter of ``config`` and the merged model below ``out``.

    ``prepare``: called with the adapted model before it is saved. The adapter is loaded anew
    before it is merged, as its user does.
    """
    torch, peft = optional("torch"), optional("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model.save_pretrained(out / "base")
        adapted = peft.get_peft_model(model, config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data + std * torch.randn_like(parameter)
        if prepare is not None:
            prepare(adapted)
        adapted.save_pretrained(out / "adapter", **(saved or {}))
        base = type(model).from_pretrained(out / "base", dtype=model.dtype)
        loaded = peft.PeftModel.from_pretrained(base, out / "adapter")
        loaded.merge_and_unload(safe_merge=safe).save_pretrained(out / "merged")
    return out


def causal_model(path, dtype="float32"):
    """The model in a folder, by transformers."""
    transformers, torch = optional("transformers"), optional("torch")
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
