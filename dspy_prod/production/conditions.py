"""The conditions under which a `Production` runs its program."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

from dspy_prod.context.current import CallContext, Mark, call_context, current, merged_tags
from dspy_prod.errors import ConfigError
from dspy_prod.production.watch import Watch
from dspy_prod.runtime.clock import Clock, earlier
from dspy_prod.stores.programs import ProgramCalls


class Conditions:
    """Under which conditions a `Production` runs its program. Immutable, and shared by copies."""

    def __init__(
        self,
        name: str,
        deadline: float | dt.timedelta | None,
        priority: Any,
        tags: Mapping[str, str] | None,
        clock: Clock,
    ) -> None:
        try:
            with call_context(program=name, priority=priority, deadline=deadline, tags=tags):
                pass
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"Production: {error}") from None
        self.name = name
        self.deadline = deadline.total_seconds() if isinstance(deadline, dt.timedelta) else deadline
        self.priority: str | None = priority
        self.tags = {} if tags is None else {key: str(value) for key, value in tags.items()}
        self.clock = clock

    def __deepcopy__(self, memo: dict[int, Any]) -> Conditions:
        return self

    def watch(self, version: Mark | None = None, programs: ProgramCalls | None = None) -> Watch:
        """Begin one call of a program of this version, inside the context that is in force, to be recorded there."""
        outer = current()
        said = outer.prompt_version
        inner: CallContext = outer._replace(
            program=self.name,
            deadline=outer.deadline if self.deadline is None else earlier(outer.deadline, self.clock, self.deadline),
            priority=outer.priority if self.priority is None else self.priority,
            tags=merged_tags(outer.tags, self.tags) if self.tags else outer.tags,
            prompt_version=version if version is not None and (said is None or type(said) is Mark) else said,
        )
        return Watch(self.name, outer, inner, self.clock, programs)
