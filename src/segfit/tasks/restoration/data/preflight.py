"""Pictures are looked at before the first step, and everything that is wrong with them is reported at once."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping

from segfit.data.files import some
from segfit.data.preflight import inspect_sources
from segfit.data.source import Source
from segfit.errors import SegFitError
from segfit.tasks.defaults import NothingToReport
from segfit.tasks.restoration.data.folder import PictureSource

# What `PictureSource.inspect` may report of a picture → the message, with how many there are, and some of them.
_MESSAGES = {
    "small": "{} pictures are too small: {}. Lower patch_size, or leave them out.",
    "shallow": "{} pictures of 16 bits use few of them, so that all is nearly black (their greatest values): {}. Save them with "
    "65535 as white. If that is meant: data.check=off.",
    "size": "{} pairs of unequal size: {}. Find the right partners.",
    "shift": "{} pictures lie beside their targets, by so many pixels [down, right]: {}. Align them, or the network learns to "
    "blur. If that is meant: data.check=off.",
}


def check_sources(
    sources: Mapping[str, Source],
    *,
    check: str,
    skip: bool,
    needs: Mapping[str, int],
    progress: Callable[[int, int], None] | None = None,
) -> NothingToReport:
    """Look at pictures before training; a source without files has nothing to look at.

    `check` "full" opens every file, "sample" a hundred of each split, "off" none. With `skip`, files that cannot be read
    are a notice and no problem. `needs` are the pictures that a split has to have at least; `progress` is called with
    (done, total) pictures while files are opened.

    Raises:
        SegFitError: with every problem found: too few pictures, files without a partner, unreadable files, pictures
            that are too small, pairs of unequal size or shifted against each other.
    """
    problems = [
        f"{split} has no pictures. Add some, or change data.split."
        for split, need in needs.items()
        if split not in sources or len(sources[split]) < need
    ]
    folders = {split: one for split, one in sources.items() if isinstance(one, PictureSource)}
    problems += dict.fromkeys(text for one in folders.values() for text in one.problems)
    seen, found = 0, defaultdict[str, list[str]](list)
    looked_at = {} if check == "off" else inspect_sources(folders, check, progress=progress)
    for split, reports in looked_at.items():
        for index, text in reports:
            seen += 1
            for kind, said in json.loads(text).items():
                file = folders[split].files(index)[-1]
                found[kind].append(said if kind == "unreadable" else f"{file} ({said})")
    unreadable = list(dict.fromkeys(found["unreadable"]))
    notices = list(dict.fromkeys(text for one in folders.values() for text in one.notices))
    if skip and 0 < len(unreadable) < seen:
        notices.append(f"data.on_bad_sample=skip leaves out {len(unreadable)}: {some(unreadable)}")
    else:
        problems += unreadable[:5]
        if len(unreadable) > 5:
            problems.append(f"… and {len(unreadable) - 5} more unreadable files.")
    if 2 * len(found["shallow"]) <= seen:
        del found["shallow"]  # some are dark
    problems += [
        message.format(len(found[kind]), some(found[kind]))
        for kind, message in _MESSAGES.items()
        if found[kind]
    ]
    if problems:
        raise SegFitError(problems)
    return NothingToReport(notices)
