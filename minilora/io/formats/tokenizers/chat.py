"""Chat templates: programs in files, which run in ``jinja2``'s sandbox."""

import json
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

EXTRA = "python -m pip install 'minilora[text]'"
"""What installs ``tokenizers``, ``jinja2`` and ``rouge-score``."""


def missing_library(name: str, what: str) -> ImportError:
    """The error that the library ``name``, which ``what`` needs, is not installed."""
    return ImportError(f"{what} needs the library {name}: {EXTRA}")


def compile_template(template: str) -> Callable[..., str]:
    """A chat template's function, in the environment that templates are written for.

    Errors: ValueError if it is no template; what it raises when it runs is one too. ImportError
    without ``jinja2``, or with one whose sandbox is known to leak.
    """
    try:
        from jinja2 import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise missing_library("jinja2", "a chat template") from error

    if tuple(int(part) for part in version("jinja2").split(".")[:3] if part.isdigit()) < (3, 1, 6):
        raise ImportError(f"jinja2 {version('jinja2')}: a chat template needs 3.1.6 or later")

    class Generation(Extension):  # type: ignore[misc]
        """``{% generation %} … {% endgeneration %}`` marks an answer; here it is only passed."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **settings)  # jinja2's own is for HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse

    try:
        program = environment.from_string(template)
    except TemplateError as error:
        raise ValueError(f"the chat template is none: {error}") from error

    def render(**values: Any) -> str:
        try:
            return str(program.render(**values))
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error

    return render
