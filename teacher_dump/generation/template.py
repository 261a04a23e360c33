"""A template of the user's, which makes a prompt of a row."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from knowledge_store.errors import InputError
from teacher_dump.corpus.rows import BadRow


class PromptTemplate:
    """A Jinja template, in a sandbox: it reads the columns of a row and nothing else, and a missing column is an error.

    Attributes:
        text: of its file.
        sha256: of that, hexadecimal.

    Raises (on construction):
        InputError: the file cannot be read, or is no Jinja.
    """

    def __init__(self, file: Path):
        try:
            self.text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot read --template {file}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise InputError(f"--template {file} is not UTF-8") from None
        if not self.text.strip():
            raise InputError(f"--template {file} is empty")
        self.sha256 = hashlib.sha256(self.text.encode()).hexdigest()
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        try:
            self._asked = meta.find_undeclared_variables(environment.parse(self.text))
            self._template = environment.from_string(self.text)
        except TemplateSyntaxError as error:
            raise InputError(f"--template {file} is not Jinja: line {error.lineno}: {error.message}") from None
        except TemplateError as error:
            raise InputError(f"--template {file} cannot be used: {error}") from None

    def render(self, columns: Mapping[str, Any]) -> str:
        """The prompt that it makes of a row; a column that is null is not there.

        Raises:
            BadRow: it asks for what the row does not have, renders nothing, or fails.
        """
        given = {name: value for name, value in columns.items() if value is not None}
        try:
            prompt = self._template.render(given)
        except UndefinedError as error:
            missing = sorted(name for name in self._asked if name not in given and f"'{name}'" in str(error))
            if not missing:
                raise BadRow(f"the template asks for what the row does not have: {error.message}") from None
            names = ", ".join(f"`{name}`" for name in given)
            raise BadRow(
                f"the template asks for the column `{missing[0]}`, which the row does not have (it has {names})"
            ) from None
        except Exception as error:  # a template is a program of its own, and a row can make it fail in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadRow(f"the template fails on it: {reason}") from None
        if not prompt.strip():
            raise BadRow("the template makes an empty prompt of it")
        return prompt
