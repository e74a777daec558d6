"""Opens an engine by settings: its tokenizer, its device, its scheduler."""

import difflib
import types
import typing
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

from sessile.core.limits import SchedulerOptions, TenantPolicy
from sessile.device.config import DeviceOptions
from sessile.engine.build import Device, DeviceRequest, Engine, open_engine
from sessile.engine.clock import Clock, MonotonicClock
from sessile.engine.config import EngineOptions
from sessile.engine.drafting import MakeDrafter, lookup_drafter
from sessile.errors import StartupError
from sessile.kernels.triton_start import head_start
from sessile.model.options import ModelOptions
from sessile.offline.driver import Driver
from sessile.options import check_options
from sessile.text.load import load_tokenizer
from sessile.text.tokenizer import Tokenizer

SECTIONS = (ModelOptions, DeviceOptions, SchedulerOptions, EngineOptions)
Sections = tuple[ModelOptions, DeviceOptions, SchedulerOptions, EngineOptions]


def open_driver(sections: Sections, tokenizer: Tokenizer) -> Driver:
    """An engine of these settings in a thread of this process. Raises StartupError."""
    clock = MonotonicClock()
    return Driver(open_configured_engine(*sections, clock=clock, tokenizer=tokenizer), clock)


def open_configured_engine(
    model: ModelOptions,
    device: DeviceOptions,
    scheduler: SchedulerOptions,
    engine: EngineOptions,
    *,
    clock: Clock,
    tokenizer: Tokenizer | None = None,
    report: Callable[[str], None] = lambda line: None,
    tenants: tuple[TenantPolicy, ...] = (),
    make_drafter: MakeDrafter = lookup_drafter,
) -> Engine:
    """Join a model's tokenizer (loaded here unless given), its device and the scheduler to an engine.

    report: is given a line for each part of a long start. tenants: those with limits of their own. make_drafter: as in
    `open_engine`. Raises StartupError.
    """
    with head_start(wanted=device.device != "cpu"):
        # Here, because importing torch takes longer than finding out that there is no such model.
        tokenizer = tokenizer or load_tokenizer(model.model)
        report("importing torch")
        from sessile.device.factory import chosen_kind, open_device

    def open_for(request: DeviceRequest) -> Device:
        return open_device(
            model,
            device,
            page_size=request.page_size,
            context_tokens=request.context_tokens,
            rows_max=request.rows_max,
            drafts_max=request.drafts_max,
            progress=lambda stage, share: report(f"{stage}, {share:.0%}"),
        )

    on_cpu = chosen_kind(device) == "cpu"
    return open_engine(
        scheduler, engine, open_for, tokenizer.facts, on_cpu=on_cpu, clock=clock, tenants=tenants,
        make_drafter=make_drafter, tokenize=partial(tokenizer.encode, add_special_tokens=False),
    )  # fmt: skip


def sections_of(settings: dict[str, Any]) -> Sections:
    """Settings by name, put into the sections that declare them. Raises StartupError for unknown or wrong ones."""
    left = dict(settings)
    sections: list[Any] = []
    for options in SECTIONS:
        hints = typing.get_type_hints(options)
        names = [declared.name for declared in fields(options) if declared.name in left]
        sections.append(options(**{name: _typed(name, left.pop(name), hints[name]) for name in names}))
    if left:
        unknown = next(iter(left))
        known = [declared.name for options in SECTIONS for declared in fields(options)]
        close = difflib.get_close_matches(unknown, known, n=1)
        raise StartupError(f"unknown setting {unknown!r}" + (f"; did you mean {close[0]}?" if close else ""))
    for section in sections:
        try:
            check_options(section)
        except ValueError as error:
            raise StartupError(str(error)) from error
    model, device, scheduler, engine = sections
    return model, device, scheduler, engine


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value; a whole number as a float where that is wanted. Raises StartupError for another type."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in kinds and type(value) is int:
        value = float(value)
    if type(value) not in kinds:
        words = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in kinds)
        raise StartupError(f"{name} must be {words}; got {value!r}")
    return value
