"""What is wrong in the data, as far as it can be told without labels: repeated rows, and training text in the
evaluation."""

from __future__ import annotations

from ..data.duplicates import Duplicates, near_duplicates
from ..data.extras import require_data
from ..data.overlap import Overlap, overlap
from .page import Line, Plot, Section
from .subject import Subject

__all__ = ["DataFound", "check_data", "data_section"]


class DataFound:
    """Near duplicates among the training texts and their overlap with the held-out ones."""

    def __init__(self, duplicates: Duplicates, shared: Overlap, *, separate: bool) -> None:
        self.duplicates, self.shared, self.separate = duplicates, shared, separate

    @property
    def filters(self) -> tuple[str, ...]:
        """What `finetune --filter-data` would leave rows out by; overlap only of held-out rows that the user
        named."""
        of_overlap = ("overlap",) if self.shared.rows and self.separate else ()
        return (("duplicates",) if self.duplicates.dropped else ()) + of_overlap


def check_data(subject: Subject) -> DataFound:
    """Look for both; raises ModuleNotFoundError without the extra `data`."""
    require_data("datasketch")
    duplicates = near_duplicates(subject.train)
    return DataFound(
        duplicates, overlap(subject.train, subject.held_out), separate=bool(subject.config.eval_data)
    )


def data_section(found: DataFound) -> Section:
    """The section; where the held-out rows are a part of --data, shared text is a fault of the rows, not of
    the split."""
    lines = [
        Line(
            "near duplicates among the training rows",
            f"{len(found.duplicates.dropped)}",
            found.duplicates.verdict,
        ),
        Line("held-out rows found in the training text", f"{len(found.shared.rows)}", found.shared.verdict),
    ]
    faults = [
        fault
        for fault, there in (
            ("rows repeat", found.duplicates.dropped),
            ("the evaluation leaks", found.shared.rows),
        )
        if there
    ]
    verdict = (
        f"Mend it: {' and '.join(faults)}."
        if faults
        else "Nothing wrong was found: no repeated rows, no leak into the evaluation."
    )
    plots = (Plot("overlap", found.shared.draw),) if found.shared.rows else ()
    if found.duplicates.dropped:
        plots += (Plot("duplicates", found.duplicates.draw),)
    lines.append(Line("wrong labels", "not looked for", "rows with labels: peftkern data FILE --label KEY"))
    return Section("", verdict, tuple(lines), plots)
