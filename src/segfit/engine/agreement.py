"""Processes that train one model together have to train the same."""

from collections.abc import Mapping
from typing import Any

from segfit.engine.distributed import World
from segfit.errors import SegFitError


def refuse_differences(world: World, values: Mapping[str, Any]) -> None:
    """Compare plain values by name with those of the other processes; every process has to call.

    Machines differ: `hardware=auto` is another recipe on each kind of card, `precision=auto` another precision.

    Raises:
        SegFitError: if they differ, the same in every process.
    """
    every = world.gather(dict(values))
    problems = []
    for name in sorted({name for one in every for name in one}):
        found = [one.get(name) for one in every]
        odd = next((rank for rank, value in enumerate(found) if value != found[0]), None)
        if odd is not None:
            problems.append(
                f"the processes do not train the same: {name} is {found[0]} in process 0, {found[odd]} in process {odd}. "
                f"Give {name.split('.')[0]}= on the command line, and the same command to every machine."
            )
    if problems:
        raise SegFitError(problems)
