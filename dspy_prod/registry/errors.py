"""What the registry refuses or cannot do. Each error carries data, and a sentence that names the remedy."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dspy_prod.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType


class Told(Protocol):
    """One of its steps, see `Step`."""

    @property
    def name(self) -> str: ...
    @property
    def result(self) -> str: ...
    @property
    def detail(self) -> str: ...
    @property
    def at(self) -> dt.datetime: ...


class Unfinished(Protocol):
    """How far a deployment came, as its error shows it: a `Deployment`, whose room knows these errors."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int | None: ...
    @property
    def outcome(self) -> str: ...
    @property
    def stages(self) -> tuple[str, ...]: ...
    @property
    def steps(self) -> Sequence[Told]: ...
    @property
    def before(self) -> Mapping[str, int | None]: ...
    @property
    def after(self) -> Mapping[str, int | None]: ...
    @property
    def error(self) -> str | None: ...
    @property
    def advice(self) -> tuple[str, ...]: ...
    @property
    def files(self) -> tuple[str, ...]: ...
    def to_dict(self) -> dict[str, Any]: ...
    def to_markdown(self) -> str: ...
    def __rich__(self) -> RenderableType: ...


class RegistryError(Exception):
    """The base of all errors of the registry.

    Attributes:
        deployment: what had been done by then, when `deploy` raised it (a `Deployment`); else None.

    Example:
        ```python
        try:
            registry.load("triage@production", program)
        except registry.RegistryError as error:
            print(error)
        ```
    """

    deployment: Unfinished | None = None


class RegistryUnavailableError(RegistryError):
    """The MLflow store did not answer in time, or failed; nothing is known about the outcome of a write.

    Example:
        ```python
        try:
            registry.promote("triage", second)
        except registry.RegistryUnavailableError:
            registry.promote("triage", second)  # to be sure: it does nothing where the first one arrived
        ```
    """


class UnknownVersionError(RegistryError, LookupError):
    """There is no such program, version or alias in this MLflow store.

    Example:
        ```python
        try:
            registry.load("triage/99", program)
        except registry.UnknownVersionError as error:
            print(error)
        ```
    """


class SignatureMismatchError(RegistryError, ConfigError):
    """The program in the code is not the one that was published; nothing of it was changed.

    Attributes:
        predictor: name of the first predictor that differs, as in `named_predictors()`.
        field: name of the field that differs, or None when the predictor itself is missing or new.

    Example:
        ```python
        try:
            registry.load("triage/1", dspy.Predict("question -> answer"))
        except registry.SignatureMismatchError as error:
            print(error.predictor, error.field)
        ```
    """

    def __init__(self, message: str, *, predictor: str, field: str | None = None) -> None:
        super().__init__(message)
        self.predictor = predictor
        self.field = field


class PromotionConflictError(RegistryError):
    """Somebody else moved the alias first; nothing was moved. Look at `history`, then decide again.

    Attributes:
        alias: the alias.
        expected: the version it should have had.
        actual: the version it has, None for none.

    Example:
        ```python
        try:
            registry.promote("triage", second, expected=99)
        except registry.PromotionConflictError as error:
            print(error.alias, error.expected, error.actual)
        ```
    """

    def __init__(self, message: str, *, alias: str, expected: int | None, actual: int | None) -> None:
        super().__init__(message)
        self.alias = alias
        self.expected = expected
        self.actual = actual
