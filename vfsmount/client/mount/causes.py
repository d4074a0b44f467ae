"""Which of several errors to tell: trio groups what fails together, a user wants the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfsmount.errors import VfsmountError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["cause_of"]


def cause_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the exception that explains a group: the first of ours, else the first of all."""
    leaves = list(_leaves(group))
    return next((error for error in leaves if isinstance(error, VfsmountError)), leaves[0])


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
