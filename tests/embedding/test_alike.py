"""`dspy_prod.Embedder` and `dspy.Embedder`, on the wire and in what comes back."""

from __future__ import annotations

import asyncio
from typing import Any

import dspy
import numpy as np
import pytest
from dspy.predict.knn import KNN
from dspy.retrievers import Embeddings
from dspy.utils.exceptions import LMUnexpectedError

import dspy_prod
from dspy_prod.testing import Provider
from tests.embedding.conftest import MODEL, MakeEmbedder

ASKED: list[tuple[Any, dict[str, Any]]] = [
    ("one text", {}),
    (["one text"], {}),
    (["a", "b", "c"], {}),
    (("a", "b"), {}),
    (["a", "b", "c", "d", "e"], {"batch_size": 2}),
    (["same", "same", "other"], {}),
    (["größer ☃ 日本語", ""], {}),
    (["a", "b"], {"dimensions": 4}),
    (["a"], {"user": "u1"}),
    (["a"], {"encoding_format": "float"}),
    ([], {}),
]


@pytest.mark.parametrize(("inputs", "options"), ASKED)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_same_is_sent_and_comes_back(
    provider: Provider, make: MakeEmbedder, inputs: Any, options: dict[str, Any], asynchronous: bool
) -> None:
    """Without caches, requests and arrays are the very same: bodies, order, shapes, types and numbers."""
    plain = dspy.Embedder(MODEL, caching=False, api_key="test", api_base=provider.url)
    ours = make(caching=False)
    found = []
    bodies = []
    for embedder in (plain, ours):
        before = len(provider.calls)
        if asynchronous:
            found.append(asyncio.run(embedder.acall(inputs, **options)))
        else:
            found.append(embedder(inputs, **options))
        bodies.append([call.body for call in provider.calls[before:]])
    assert bodies[0] == bodies[1]
    assert (found[0].shape, found[0].dtype) == (found[1].shape, found[1].dtype)
    assert np.array_equal(*found)
    assert found[1].flags.writeable


def test_headers_are_the_same(provider: Provider, make: MakeEmbedder) -> None:
    dspy.Embedder(MODEL, caching=False, api_key="test", api_base=provider.url)("a")
    make(caching=False)("a")
    plain, ours = (
        {name: value for name, value in call.headers.items() if not name.startswith("x-stainless") and name != "host"}
        for call in provider.calls
    )
    assert plain == ours


@pytest.mark.parametrize("inputs", [[1], ["a", None], [["a"]]])
def test_what_is_no_text_is_refused_alike(make: MakeEmbedder, inputs: Any) -> None:
    for embedder in (dspy.Embedder(MODEL), make()):
        with pytest.raises(ValueError, match=r"All inputs must be strings\."):
            embedder(inputs)


def by_length(texts: list[str]) -> Any:
    return np.array([[len(text), 1.0, 0.1] for text in texts])


def as_lists(texts: list[str], factor: float = 1.0) -> Any:
    return [[factor * len(text), 0.1] for text in texts]


@pytest.mark.parametrize("function", [by_length, as_lists])
@pytest.mark.parametrize("inputs", ["one", ["one", "three"]])
def test_a_function_gives_the_same(make: MakeEmbedder, function: Any, inputs: Any) -> None:
    plain, ours = dspy.Embedder(function, caching=False), make(function)
    assert np.array_equal(plain(inputs), ours(inputs))
    assert np.array_equal(plain(inputs), ours(inputs))  # from its cache
    assert np.array_equal(plain(inputs), asyncio.run(ours.acall(inputs)))
    assert ours(inputs).dtype == np.float32


def test_arguments_reach_a_function(make: MakeEmbedder) -> None:
    for embedder in (dspy.Embedder(as_lists, caching=False, factor=2.0), make(as_lists, factor=2.0)):
        assert embedder("one")[0] == 6.0
        assert embedder("one", factor=3.0)[0] == 9.0


def test_an_error_of_a_function_is_the_cause_of_dspy_s(make: MakeEmbedder) -> None:
    """As of an engine of one's own beneath an LM; the plain embedder raises it bare."""

    def broken(texts: list[str]) -> Any:
        raise KeyError("mine")

    with pytest.raises(LMUnexpectedError, match="mine") as raised:
        make(broken)("a")
    assert isinstance(raised.value.__cause__, KeyError)


def test_dspy_s_retrievers_find_the_same(provider: Provider, make: MakeEmbedder) -> None:
    corpus = ["the cat sat", "a dog barked", "ships at sea", "the sea is blue"]
    trainset = [dspy.Example(question=text, answer="x").with_inputs("question") for text in corpus]
    plain = dspy.Embedder(MODEL, caching=False, api_key="test", api_base=provider.url)
    found = []
    for embedder in (plain, make()):
        near = KNN(2, trainset, embedder)(question="a ship on the sea")
        passages = Embeddings(corpus, embedder, k=2)("a ship on the sea").passages
        found.append(([example.question for example in near], passages))
    assert found[0] == found[1]


def test_changed_arguments_hold_from_the_next_call(provider: Provider, make: MakeEmbedder) -> None:
    embedder = make()
    assert embedder("a").shape == (16,)
    embedder.default_kwargs["dimensions"] = 4
    assert embedder("a").shape == (4,)
    assert isinstance(embedder, dspy_prod.Embedder)
    assert isinstance(embedder, dspy.Embedder)
