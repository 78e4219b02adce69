"""What shows itself: as a table in a notebook, and as text when printed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeVar, overload

if TYPE_CHECKING:
    from dspy_prod.views.parts import Page, Table

T = TypeVar("T")
L = TypeVar("L", bound="ShownList[Any]")


class Shown(ABC):
    """Gives a class `_repr_html_` and `str()` from one description of what it shows; its `repr()` stays.

    Example:
        ```python
        class Answer(Shown, BaseModel):
            usd: float

            def _view(self) -> Table:
                return Table("Answer", ("USD",), [(self.usd,)])
        ```
    """

    __slots__ = ()

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        cls._repr_pretty_ = Shown._repr_pretty_  # type: ignore[method-assign]  # IPython prefers a class's own __repr__

    @abstractmethod
    def _view(self) -> Table | Page:
        """What is shown."""

    def _repr_html_(self) -> str:
        return self._view().html()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython shows at a terminal: the table when it is asked for itself, else one line."""
        alone = not cycle and len(printer.stack) <= 1
        printer.text(str(self) if alone else repr(self))

    def __str__(self) -> str:
        return self._view().text()

    def __rich__(self) -> Table | Page:
        """On rich's consoles it has its colours, and nothing is cut."""
        return self._view()


class ShownList(Shown, list[T]):
    """A list that shows itself, as its slices do, with what else it knows."""

    @overload
    def __getitem__(self, at: SupportsIndex) -> T: ...
    @overload
    def __getitem__(self: L, at: slice) -> L: ...
    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        if not isinstance(at, slice):
            return found
        part = type(self).__new__(type(self))
        part.extend(found)
        part.__dict__.update(self.__dict__)
        return part
