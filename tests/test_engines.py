"""`--engine`: what runs a teacher, refused before anything is loaded where it is not here or an option does not go with it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from knowledge_store.errors import InputError
from teacher_dump.teachers.loading import Loading, check_loading

HERE = find_spec("vllm") is not None


@pytest.mark.skipif(HERE, reason="vllm is installed here")
def test_an_engine_that_is_not_installed_is_refused():
    with pytest.raises(InputError, match="--engine vllm needs the library vllm, which is not here: pip install"):
        check_loading(Loading(engine="vllm"))


@pytest.mark.parametrize(
    "option",
    [{"gguf_file": "a.gguf"}, {"device": "cpu"}, {"device_map": "auto"}, {"quantize": "8-bit"}, {"attention": "sdpa"}],
)
def test_options_that_an_engine_does_not_have_are_refused(option):
    with pytest.raises(InputError, match=f"--{next(iter(option)).replace('_', '-')} does not go with --engine vllm"):
        check_loading(Loading(engine="vllm", **option))
