"""An independent copy of a whole world: machine, device and books, object by object.

Only the closure needs it: it tries several next steps from one state. The core forbids copies of leases, and rightly:
here the whole pool is copied with them, so each copy of a page still has one owner. A lease is rebuilt by its own
constructor. Nothing here knows a field of the core by name, so a field that the core gains is copied as well.
"""

import types
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any, TypeVar

import msgspec
import numpy as np

from sessile.contract.plan import StepPlan, StepResult
from sessile.core.events import EventRing
from sessile.core.ledger import Lease
from sessile.core.rows import RowTable

T = TypeVar("T")
Memo = dict[int, Any]
Copier = Callable[[Any, Memo], Any]

_SHARED = (
    type(None), bool, int, float, str, bytes, frozenset, Enum, type, types.FunctionType, types.MethodType,
    types.BuiltinFunctionType, msgspec.Struct, StepPlan, StepResult, EventRing,
)  # fmt: skip
"""What nobody changes, or nobody reads but to tell what happened: the copy has the very same."""
_fields: dict[type, tuple[str, ...]] = {}
_copiers: dict[type, Copier | None] = {}


def twin(world: T) -> T:
    """A copy of an object and of everything it reaches, with the same sharing among its parts."""
    copied: T = _copy(world, {})
    return copied


def fields_of(kind: type) -> tuple[str, ...]:
    """The slots of a class and its bases; what else an object has is in its __dict__."""
    known = _fields.get(kind)
    if known is None:
        slots = [base.__dict__.get("__slots__", ()) for base in kind.__mro__]
        names = [name for each in slots for name in ((each,) if isinstance(each, str) else each)]
        known = _fields[kind] = tuple(name for name in names if name not in ("__dict__", "__weakref__"))
    return known


def _copier(kind: type) -> Copier | None:
    """How to copy what is of this type; None: it is shared."""
    if kind not in _copiers:
        _copiers[kind] = _copier_of(kind)
    return _copiers[kind]


def _copy(value: Any, memo: Memo) -> Any:
    copier = _copier(type(value))
    if copier is None:
        return value
    found = memo.get(id(value))
    return copier(value, memo) if found is None else found


def _copy_all(values: Iterable[Any], memo: Memo) -> list[Any]:
    """`_copy` of each, without a call for those whose types are known to be shared: most are."""
    known = _copiers.get
    return [value if known(type(value), value) is None else _copy(value, memo) for value in values]


def _copier_of(kind: type) -> Copier | None:
    parameters = getattr(kind, "__dataclass_params__", None)
    if issubclass(kind, _SHARED) or (parameters is not None and parameters.frozen):
        return None
    for base, copier in _BY_TYPE.items():
        if issubclass(kind, base):
            return copier
    assert kind.__module__.startswith("sessile."), f"no way to copy {kind}"
    return _copy_object


def _copy_list(value: Any, memo: Memo) -> Any:
    copied = memo[id(value)] = type(value)()
    copied.extend(_copy_all(value, memo))
    return copied


def _copy_tuple(value: Any, memo: Memo) -> Any:
    return tuple(_copy_all(value, memo))


def _copy_dict(value: Any, memo: Memo) -> Any:
    copied = memo[id(value)] = type(value)()
    if value:
        dict.update(copied, zip(value, _copy_all(value.values(), memo), strict=True))  # Counter.update would count.
    return copied


def _copy_plain(value: Any, memo: Memo) -> Any:
    copied = memo[id(value)] = value[:]
    return copied


def _copy_set(value: Any, memo: Memo) -> Any:
    copied = memo[id(value)] = set(value)
    return copied


def _copy_array(value: Any, memo: Memo) -> Any:
    base = value.base.obj if isinstance(value.base, memoryview) else value.base
    if isinstance(base, array):
        copied = np.frombuffer(_copy(base, memo), value.dtype)
    else:
        assert base is None or not value.flags.writeable, "a view was copied apart from what it is a view of"
        copied = value.copy()
    memo[id(value)] = copied
    return copied


def _copy_lease(value: Any, memo: Memo) -> Any:
    if value._account is None:
        return value  # Consumed: nobody can do anything with it.
    copied = memo[id(value)] = Lease(value._account, _copy(value._pages, memo), _copy(value._lost, memo))
    return copied


def _copy_rows(value: Any, memo: Memo) -> Any:
    """Its columns are views of one array, and its constructor makes them so again."""
    copied = memo[id(value)] = RowTable(value.rows_max)
    for name, item in value.__dict__.items():
        if not isinstance(item, np.ndarray):
            copied.__dict__[name] = _copy(item, memo)
        elif item.base is None:
            np.copyto(copied.__dict__[name], item)
    return copied


def _copy_object(value: Any, memo: Memo) -> Any:
    kind = type(value)
    copied = memo[id(value)] = object.__new__(kind)
    names = fields_of(kind)
    for name, item in zip(names, _copy_all([getattr(value, name) for name in names], memo), strict=True):
        setattr(copied, name, item)
    if hasattr(value, "__dict__"):
        attributes = value.__dict__
        copied.__dict__.update(zip(attributes, _copy_all(attributes.values(), memo), strict=True))
    return copied


_BY_TYPE: dict[type, Copier] = {
    Lease: _copy_lease,
    RowTable: _copy_rows,
    list: _copy_list,
    deque: _copy_list,
    tuple: _copy_tuple,
    Counter: _copy_dict,
    dict: _copy_dict,
    set: _copy_set,
    bytearray: _copy_plain,
    array: _copy_plain,
    np.ndarray: _copy_array,
}
